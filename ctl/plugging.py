"""What the verbs that add and remove devices share: their words, and following an operation to its end."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from cellvisor.core.errors import CellvisorError, Conflict, TryAgain, UsageError
from cellvisor.core.wire import places
from cellvisor.core.wire.control import TEXT
from cellvisor.ctl import common

if TYPE_CHECKING:
    from cellvisor.ctl.client import Client

OVER = ("done", "refused", "cancelled", "timed-out")
TURN = 20.0  # seconds of one wait; a VM that ends meanwhile is noticed by the client


def add_words(parser: argparse.ArgumentParser, what: str, help: str, *, optional: bool = False) -> None:
    """Add [VM] and `what`, --no-wait and --json."""
    parser.usage = f"%(prog)s [VM] {f'[{what}]' if optional else what} [--no-wait] [--json]"
    parser.add_argument("words", nargs="*" if optional else "+", metavar=f"[VM] {what}",
                        help=f"{help}; VM is not needed with a single VM running")
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the guest has been told")
    common.add_json(parser)


def split(options: argparse.Namespace, *, optional: bool = False) -> tuple[str | None, str]:
    """Return VM (or None) and the other word. Raises UsageError."""
    words: list[str] = options.words
    if len(words) > 2:
        raise UsageError(f"unexpected argument {words[2][:80]!r}", hint="options are one word: key=value,key=value")
    if "" in words[:-1] or (optional and words == [""]):
        raise UsageError("VM '' is no name", hint="leave it out for the only VM that runs")
    if len(words) == 2:
        return words[0], words[1]
    if optional and (not words or "=" not in words[0]):
        return (words[0] if words else None), ""
    return None, words[0]


def addition(options: argparse.Namespace, verb: str, *, optional: bool = False, fds: bool = False,
             **more: Any) -> common.Request:
    """Ask for a device whose options are the last word. `fds`: its key fd names descriptors of ours."""
    vm, text = split(options, optional=optional)
    if vm is None and not optional and "=" not in text and text in places.running():
        raise UsageError(f"{verb}: {text} is a VM, and what it shall get is missing",
                         hint=f"see cellvisor {verb} --help")
    text, ours = take_fds(text) if fds else (text, ())
    return common.Request(vm, verb, {**more, TEXT: text}, ours)


def ask(options: argparse.Namespace, request: common.Request) -> int:
    """Ask for a device to come or to go, and follow it."""
    from cellvisor.ctl.client import Client

    with Client(request.vm) as client:
        return follow(client, options, request.put(client))


def take_fds(text: str) -> tuple[str, tuple[int, ...]]:
    """Split options into all but fd=[N,...], and its numbers. Raises UsageError for one that is not open."""
    found = re.search(r"(?:^|,)fd=(?:\[([\d,]*)\]|(\d+))(?=,|$)", text)
    if found is None:
        return text, ()
    fds = tuple(int(word) for word in (found[1] or found[2] or "").split(",") if word)
    for fd in fds:
        try:
            os.fstat(fd)
        except (OSError, OverflowError):
            raise UsageError(f"fd={fd}: is not open", hint="open it in the shell: 3<>/dev/tap5") from None
    return (text[:found.start()] + text[found.end():]).lstrip(","), fds


def follow(client: Client, options: argparse.Namespace, answer: dict[str, Any]) -> int:
    """Show what becomes of the latest operation of device answer["id"]. Raises its outcome unless it is done."""
    key, bdf = str(answer["id"]), str(answer["bdf"])
    if options.no_wait:
        if options.json:
            return common.show_json(answer)
        print(f"{key} {bdf}: requested")
        return 0
    key = str(answer.get("operation") or client.call("ops", action="show", id=key)["id"])
    seen: dict[str, Any] = {"state": ""}
    try:
        while seen["state"] not in OVER:
            now = client.call("ops", action="wait", id=key, seen=seen["state"] or "requested", timeout=TURN)
            if now["state"] != seen["state"] and not options.json:
                print(_line(now), flush=True)
            seen = now
    except KeyboardInterrupt:
        print(f"cellvisor: {key} goes on (cellvisor ops wait {key}, or cellvisor ops cancel {key})", file=sys.stderr)
        raise
    if seen["state"] != "done":
        raise outcome(seen)
    return common.show_json({**answer, "operation": seen}) if options.json else 0


def outcome(operation: dict[str, Any]) -> CellvisorError:
    """Return the error that stands for an operation that did not end in "done"."""
    said = f"{operation['device']}: {operation['state']}: {operation['reason'] or 'no reason given'}"
    if operation["state"] == "timed-out":
        return TryAgain(said, hint=f"it may still come; ask again, or cellvisor ops cancel {operation['id']}",
                        code="timed-out")
    return Conflict(said, code=operation["state"])


def _line(operation: dict[str, Any]) -> str:
    state = operation["state"]
    took = operation["times"].get(state)
    after = f" after {took:.0f} ms" if took is not None else ""
    return f"{operation['device']} {operation['bdf']}: {state}{after}"
