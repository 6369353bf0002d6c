"""What most verbs share: the VM argument, --json, and printing an answer."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cellvisor.core.errors import TryAgain, UsageError

if TYPE_CHECKING:
    from cellvisor.ctl.client import Client

PATIENCE = 30.0  # seconds for everything to be gone


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


@dataclass(frozen=True, slots=True)
class Request:
    """What a command asks of which VM (None: the only one), and the descriptors that go along."""

    vm: str | None
    verb: str
    args: dict[str, Any]
    fds: tuple[int, ...] = ()

    def put(self, client: Client) -> Any:
        """Ask, and return the answer."""
        return client.call(self.verb, *self.fds, **self.args)


def change(options: argparse.Namespace, request: Request, done: str) -> int:
    """Ask the VM for a change and say that it is done."""
    from cellvisor.ctl.client import Client

    with Client(request.vm) as client:
        answer = request.put(client)
        if options.json:
            return show_json(answer)
        print(f"{client.name}: {done}")
    return 0


def ask(options: argparse.Namespace, verb: str, done: str, **args: Any) -> int:
    """Ask the VM of the arguments for a change and say that it is done."""
    return change(options, Request(options.vm, verb, args), done)


def end(options: argparse.Namespace, verb: str) -> int:
    """Ask for an end and wait until nothing is left, if the process ends at all."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        answer = client.call(verb)
        ends = answer.get("ends", verb == "shutdown-vmm")
        if ends and not options.no_wait and not client.wait_gone(PATIENCE):
            raise TryAgain(f"still ending after {PATIENCE:g} s", hint="see cellvisor ls")
        if options.json:
            return show_json(answer)
        print(f"{client.name}: shut down" + ("" if ends else "; its process waits (cellvisor shutdown-vmm ends it)"))
    return 0


def size(flag: str, text: str) -> int:
    """Read a number of bytes: 1048576, 1024K, 1M."""
    from cellvisor.core.wire.options import validate

    rule = {"keys": {"value": {"type": "size", "required": True}}}
    try:
        return int(validate({"value": text}, rule, flag)["value"])
    except UsageError as error:
        raise UsageError(f"{flag} {text[:80]}: is not a size", hint=error.hint or "a number of bytes, K, M, G or T") \
            from None


def count(text: str) -> int:
    """Read a number that is not negative; a `type` of argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number from 0 on")
    return int(text)


def seconds(text: str) -> float:
    """Read a time; a `type` of argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number of seconds from 0 to 86400")
    return value
