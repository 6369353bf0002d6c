"""cellvisor ops."""

from __future__ import annotations

import argparse
import time
from typing import Any

from cellvisor.core.errors import UsageError
from cellvisor.ctl import common, plugging, render

HELP = "List operations, show one, wait for its end, or cancel it."
EXAMPLE = "cellvisor ops wait op3"
ACTIONS = ("list", "show", "wait", "cancel")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ACTION, ID, --vm and --timeout."""
    parser.add_argument("action", nargs="?", default="list", choices=ACTIONS, metavar="|".join(ACTIONS))
    parser.add_argument("id", nargs="?", metavar="ID", help="an operation, or a device for its latest one")
    parser.add_argument("--vm", metavar="VM", help="name or path; not needed with a single VM running")
    parser.add_argument("--timeout", type=common.seconds, default=30.0, metavar="SECONDS", help="for wait (30)")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    from cellvisor.ctl.client import Client

    if options.action != "list" and not options.id:
        raise UsageError(f"ops {options.action}: ID is missing", hint="an operation's, or a device's for its latest")
    with Client(options.vm) as client:
        answer = _wait(client, options) if options.action == "wait" else client.call(
            "ops", action=options.action, id=options.id)
    found: list[dict[str, Any]] = answer["operations"] if options.action == "list" else [answer]
    if options.json:
        common.show_json(answer)
    else:
        render.table(("ID", "VERB", "DEVICE", "BDF", "STATE", "MS ", "REASON"), [
            (one["id"], one["verb"], one["device"], one["bdf"], one["state"],
             f"{one['times'].get(one['state'], 0):.0f}", one["reason"]) for one in found])
    if options.action == "wait" and answer["state"] != "done":
        raise plugging.outcome(answer)
    return 0


def _wait(client: Any, options: argparse.Namespace) -> dict[str, Any]:
    until = time.monotonic() + options.timeout
    while True:
        left = max(0.0, until - time.monotonic())
        answer: dict[str, Any] = client.call("ops", action="wait", id=options.id, timeout=min(left, plugging.TURN))
        if answer["state"] in plugging.OVER or left == 0:
            return answer
