"""cellvisor devices."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common, render

HELP = "List the devices: slot, type, process, state."
EXAMPLE = "cellvisor devices web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        listed = client.call("devices")["devices"]
    if options.json:
        return common.show_json(listed)
    render.table(("ID", "BDF", "TYPE", "STATE", "PID ", "GENERATION ", "REASON"),
                 [(entry["id"], entry["bdf"], entry["type"], entry["state"], str(entry.get("pid") or "-"),
                   str(entry.get("generation", "-")), entry.get("reason", "")) for entry in listed])
    return 0
