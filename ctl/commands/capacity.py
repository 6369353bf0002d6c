"""cellvisor capacity."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Tell how many PCI slots and how much memory room are free."
EXAMPLE = "cellvisor capacity web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        answer = client.call("capacity")
    if options.json:
        return common.show_json(answer)
    slots = answer["slots"]
    following = "none" if slots["next"] is None else f"{slots['next']}"
    print(f"PCI slots: {slots['free']} of {slots['total']} free, next: {following}")
    print(f"memory: {answer['memory']['hotplug_free'] >> 20} MiB of hotplug room")
    return 0
