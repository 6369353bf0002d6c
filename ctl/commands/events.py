"""cellvisor events."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from cellvisor.ctl import common

HELP = "Show what happened to a VM; -f follows it."
EXAMPLE = "cellvisor events -f web"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --json, -f and --since."""
    common.add_vm(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
    parser.add_argument("--since", type=common.count, default=0, metavar="SEQ", help="only events after this number")


def run(options: argparse.Namespace) -> int:
    """Print events, one a line; with --json one object a line."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        for event in client.events(since=options.since, follow=options.follow):
            print(json.dumps(event, default=str) if options.json else _line(event), flush=True)
    return 0


def _line(event: dict[str, Any]) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    details = " ".join(f"{key}={value}" for key, value in event["properties"].items())
    return f"{event['seq']:>4} {clock}.{int(event['time'] * 1000) % 1000:03d} {event['event']:<16} {details}".rstrip()
