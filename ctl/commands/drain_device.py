"""cellvisor drain-device."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common, plugging

HELP = "Give a parked device up: all that the guest asks of it fails until its driver resets it."
EXAMPLE = "cellvisor drain-device web data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM and ID."""
    parser.add_argument("words", nargs="+", metavar="[VM] ID", help="the device's name, see cellvisor devices")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Ask; the answer comes when its process serves."""
    from cellvisor.ctl.client import Client

    vm, key = plugging.split(options)
    with Client(vm) as client:
        answer = client.call("drain-device", id=key)
        if options.json:
            return common.show_json(answer)
        print(f"{key}: given up, process {answer['pid']}")
    return 0
