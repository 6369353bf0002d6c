"""What most verbs share: the VM argument, --json, and printing an answer."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_vm(parser: argparse.ArgumentParser) -> None:
    """Add the VM, optional while a single one runs, and --json."""
    parser.add_argument("vm", nargs="?", metavar="VM", help="name or path; not needed with a single VM running")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs, errors included")


def show_json(body: Any) -> int:
    """Print one JSON document."""
    print(json.dumps(body, indent=2, default=str))
    return 0


def ask(options: argparse.Namespace, verb: str, done: str) -> int:
    """Ask the VM for a change and say that it is done."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        answer = client.call(verb)
        if options.json:
            return show_json(answer)
        print(f"{client.path.rpartition('/')[2]}: {done}")
    return 0
