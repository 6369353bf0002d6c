"""cellvisor validate."""

from __future__ import annotations

import argparse
from typing import Any

from cellvisor.core.errors import UsageError
from cellvisor.ctl import common, dispatch

HELP = "Say whether a verb would be refused now, in its own words, without doing it."
EXAMPLE = "cellvisor validate add-disk web path=/srv/data.raw,pci_device_id=9"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VERB and whatever it takes."""
    parser.usage = "%(prog)s [--json] VERB ..."
    parser.add_argument("verb", metavar="VERB", help="add-disk, remove-device, resize-disk, swap-disk, create, ...")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the arguments of that verb")
    common.add_json(parser)


def verbs() -> list[str]:
    """Return the verbs that can be tried."""
    return [name for name in dispatch.names() if hasattr(dispatch.load(name), "request")]


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    from cellvisor.ctl.client import Client

    command = dispatch.load(options.verb)
    if not hasattr(command, "request"):
        raise UsageError(f"validate: {options.verb} cannot be tried", hint=f"verbs: {', '.join(verbs())}")
    reader = dispatch.parser(options.verb, command)
    reader.check_flags(options.rest)
    given = reader.parse_args(options.rest)
    asked: common.Request = command.request(given)
    with Client(asked.vm) as client:
        answer = client.call("validate", *asked.fds, **{**asked.args, "verb": asked.verb})
    if options.json or given.json:
        return common.show_json(answer)
    for line in _lines(answer):
        print(line)
    return 0


def _lines(answer: dict[str, Any]) -> list[str]:
    if answer["verb"].startswith("add-"):
        return [f"would become {answer['id']} ({answer['type']}) at {answer['bdf']}"]
    if "devices" in answer:
        return [f"would have {one['id']} ({one['type']}) at {one['bdf']}" for one in answer["devices"]]
    return [f"{answer['verb']} {answer.get('id', answer.get('group'))}: would be done"]
