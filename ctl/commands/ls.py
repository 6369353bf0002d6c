"""cellvisor ls."""

from __future__ import annotations

import argparse

from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire import places
from cellvisor.ctl import common, render

HELP = "List the running VMs of this user."
EXAMPLE = "cellvisor ls --json"
add_arguments = common.add_json


def run(options: argparse.Namespace) -> int:
    """Ask every VM for its state; one that does not answer is listed all the same."""
    from cellvisor.ctl.client import Client

    found = []
    for name, pids in places.running().items():
        entry = {"name": name, "pid": pids.get("pid"), "state": "no answer", "vcpus": None, "memory": None}
        try:
            with Client(name, timeout=2.0) as client:
                info = client.call("info")
            entry |= {"state": info["state"], "vcpus": info["config"]["cpus"]["boot_vcpus"],
                      "memory": info["memory_actual_size"]}
        except CellvisorError as error:
            entry |= {"state": "Empty"} if error.code == "not-created" else {"error": str(error)}
        found.append(entry)
    if options.json:
        return common.show_json(found)
    rows = [(str(entry["name"]), str(entry["state"]), str(entry["pid"] or "-"), str(entry["vcpus"] or "-"),
             f"{entry['memory'] >> 20}" if isinstance(entry["memory"], int) else "-") for entry in found]
    render.table(("NAME", "STATE", "PID ", "VCPUS ", "MIB "), rows)
    return 0
