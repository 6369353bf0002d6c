"""cellvisor restart-device."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common, plugging

HELP = "Start a new process for a parked device; what the guest waits for is done."
EXAMPLE = "cellvisor restart-device web data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM and ID."""
    parser.add_argument("words", nargs="+", metavar="[VM] ID", help="the device's name, see cellvisor devices")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Ask; the answer comes when its process serves."""
    from cellvisor.ctl.client import Client

    vm, key = plugging.split(options)
    with Client(vm) as client:
        answer = client.call("restart-device", id=key)
        if options.json:
            return common.show_json(answer)
        print(f"{key}: serving again, process {answer['pid']}")
    return 0
