"""cellvisor counters."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common, render

HELP = "Show what each device has counted."
EXAMPLE = "cellvisor counters web --json"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        found = client.call("counters")
    if options.json:
        return common.show_json(found)
    render.table(("DEVICE", "COUNTER", "VALUE "), [
        (device, name, str(value)) for device, values in found.items() for name, value in values.items()])
    return 0
