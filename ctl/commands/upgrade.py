"""cellvisor upgrade."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common, plugging

HELP = "Give a device, or all, the code that is on disk now; the guest runs on."
EXAMPLE = "cellvisor upgrade web all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM and ID."""
    parser.add_argument("words", nargs="+", metavar="[VM] ID|all", help="the device's name, see cellvisor devices")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Ask; the answer comes when the new process serves."""
    from cellvisor.ctl.client import Client

    vm, key = plugging.split(options)
    with Client(vm) as client:
        answer = client.call("upgrade-device", id=key)
        if options.json:
            return common.show_json(answer)
        for one in answer["upgraded"]:
            print(f"{one['id']}: process {one['pid']}, paused for {one['ms']:.1f} ms")
    return 0
