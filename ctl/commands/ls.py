"""cellvisor ls."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cellvisor.core.errors import CellvisorError
from cellvisor.ctl import common, render

HELP = "List the running VMs of this user, and those of remotes.toml."
EXAMPLE = "cellvisor ls"
PATIENCE = 3.0  # seconds for all of them together
ANSWER = 2.5    # seconds for one answer
STATES = {"refused": "refused", "bad-request": "misconfigured"}  # of a remote that does not answer, by the error
NOBODY_KNOWS = {"state": "no answer", "vcpus": None, "memory": None, "devices": None, "uptime": None, "restarts": None}
COLUMNS = ("NAME", "STATE", "PID ", "VCPUS ", "MIB ", "DEVICES ", "UPTIME ", "RESTARTS ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --local and --json."""
    parser.add_argument("--local", action="store_true", help="only those of this machine, none of remotes.toml")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Ask all VMs at once; one that does not answer is listed all the same, one that has just ended here is not."""
    from cellvisor.core.wire import places
    from cellvisor.ctl import remotes
    from cellvisor.ctl.errand import ask_all

    running = places.running()
    far, wrong = ([], "") if options.local else remotes.besides(running)
    where = {name: places.vm_dir(name) for name in running} | {name: name for name in far}
    said = [wrong] if wrong else []
    found = []
    for name, answer in ask_all(where, lambda name: _ask(where[name]), PATIENCE).items():
        entry = {"name": name, "pid": running.get(name, {}).get("pid"), **NOBODY_KNOWS}
        if not isinstance(answer, CellvisorError):
            entry |= answer
        elif answer.code == "no-vm" and name in running:
            continue
        elif answer.code == "not-created":
            entry |= {"state": "Empty"}
        else:
            entry |= {"state": STATES.get(answer.code, "no answer"), "error": str(answer)}
            if name in far:
                said.append(f"{name}: {str(answer).removeprefix(name + ': ')}")
        found.append(entry)
    for line in said:
        print(line, file=sys.stderr)
    if options.json:
        return common.show_json(found)
    render.table(COLUMNS, [
        (str(entry["name"]), str(entry["state"]), _shown(entry["pid"]), _shown(entry["vcpus"]),
         _shown(entry["memory"], 1 << 20), _shown(entry["devices"]), _since(entry["uptime"]),
         _shown(entry["restarts"])) for entry in found])
    return 0


def _ask(where: str) -> dict[str, Any]:
    from cellvisor.ctl.client import Client

    with Client(where, timeout=ANSWER) as client:
        info = client.call("info")
        devices = client.call("devices")["devices"]
    return {"state": info["state"], "vcpus": info["config"]["cpus"]["boot_vcpus"],
            "memory": info["memory_actual_size"], "devices": len(devices), "uptime": info["uptime"],
            "restarts": sum(max(0, one.get("generation", 1) - 1) for one in devices)}


def _shown(value: object, unit: int = 1) -> str:
    return str(value // unit) if isinstance(value, int) else "-"


def _since(value: object) -> str:
    """Show seconds as 12s, 3m04s, 2h05m or 6d03h."""
    if not isinstance(value, (int, float)):
        return "-"
    seconds = int(value)
    for size, name, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{name}{seconds % size // below:02d}{small}"
    return f"{seconds}s"
