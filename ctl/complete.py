"""What could come next on the command line, from the same verbs and parsers that read it; ctl/commands/completion.py
has the shells' side. Nothing found means file names.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise

from cellvisor.core.errors import CellvisorError, UsageError
from cellvisor.core.wire import places
from cellvisor.ctl import dispatch

PATIENCE = 2.0  # seconds for a VM to answer: somebody waits at the prompt
GLOBAL = ("--api-socket", "--help", "--version")


def complete(words: list[str]) -> list[str]:
    """Return what the last of `words` (after `cellvisor`) may become.

    bash splits at `=`: its `--vm = w` is put together again, and only what follows the `=` is returned.
    """
    words, lead = _rejoin(words)
    *before, now = words
    if before[-1:] == ["--api-socket"]:
        return []
    before = _without_socket(before)
    found: Iterable[str]
    if not before:
        found = GLOBAL if now.startswith("-") else dispatch.names()
    else:
        try:
            found = _arguments(before[0], before[1:], now)
        except (CellvisorError, OSError, subprocess.SubprocessError):
            found = ()
    return [word[len(lead):] for word in sorted(set(found)) if word.startswith(now)]


def _arguments(verb: str, before: list[str], now: str) -> Iterable[str]:
    if verb == "run":
        return _run_flags() if now.startswith("-") else ()
    if verb == "validate" and before:
        return _arguments(before[0], before[1:], now)
    parser = dispatch.parser(verb, dispatch.load(verb))
    flags = {flag: action for action in parser._actions for flag in action.option_strings}
    flag, equals, _ = now.partition("=")
    if now.startswith("-"):
        if equals and flag in flags:
            return (f"{flag}={value}" for value in _values(verb, flags[flag], before))
        return [*(flag for flag in flags if flag.startswith("--")), "--api-socket"]
    last = flags.get(before[-1]) if before else None
    if last is not None and last.nargs is None:
        return _values(verb, last, before)
    given = _positional(before, flags)
    for at, action in enumerate(action for action in parser._actions if not action.option_strings):
        if action.nargs in ("*", "+") or at == len(given):
            return _values(verb, action, before, given[at:])
    return ()


def _positional(before: list[str], flags: dict[str, argparse.Action]) -> list[str]:
    """Leave out flags and their values."""
    found, skip = [], False
    for word in before:
        if skip or word.startswith("-"):
            action = flags.get(word)
            skip = not skip and action is not None and action.nargs is None
        else:
            found.append(word)
    return found


def _vms() -> list[str]:
    from cellvisor.ctl import remotes

    with contextlib.suppress(CellvisorError):
        return [*places.running(), *remotes.names()]
    return list(places.running())


def _values(verb: str, action: argparse.Action, before: list[str], given: list[str] | None = None) -> Iterable[str]:
    """Return values for one argument, by its choices or its name in the parser."""
    given = given or []
    named = next((value for flag, value in pairwise(before) if flag == "--vm"), None)
    if action.choices is not None:
        return map(str, action.choices)
    if action.dest == "vm":
        return _vms()
    if action.dest == "words":  # [VM] and something about it
        if len(given) > 1:
            return ()
        vms = () if given else _vms()
        return [*vms, *(_devices(given[0] if given else None) if "ID" in str(action.metavar) else ()),
                *(("all",) if "all" in str(action.metavar) else ())]
    if action.dest in ("disk", "net", "device"):
        return _devices(next((word for word in before if word in _vms()), None))
    if verb == "ops" and action.dest == "id":
        return [*_ask(named, lambda call: [one["id"] for one in call("ops")["operations"]]), *_devices(named)]
    if verb == "validate" and action.dest == "verb":
        from cellvisor.ctl.commands import validate

        return validate.verbs()
    return ()


def _devices(vm: str | None) -> list[str]:
    return _ask(vm, lambda call: [one["id"] for one in call("devices")["devices"]])


def _ask(vm: str | None, what: Callable[[Callable[..., dict[str, list[dict[str, str]]]]], list[str]]) -> list[str]:
    from cellvisor.ctl.client import Client

    try:
        with Client(vm, timeout=PATIENCE) as client:
            return what(client.call)
    except CellvisorError:
        return []


def _run_flags() -> list[str]:
    """Return the flags of `cellvisor run`, which the controlplane reads: from its own help."""
    done = subprocess.run([sys.executable, "-P", "-m", "cellvisor.controlplane", "run", "--help"],
                          capture_output=True, text=True, timeout=10, check=True)
    return re.findall(r"^ +(?:-\w, )?(--[a-z-]+)", done.stdout, re.MULTILINE)


def _rejoin(words: list[str]) -> tuple[list[str], str]:
    """Undo bash's splitting at `=`; returns the words and what of the last one bash does not replace."""
    found: list[str] = []
    lead = ""
    glue = False
    for index, word in enumerate(words):
        if word == "=" and found:
            found[-1] += "="
            glue = True
            if index == len(words) - 1:
                lead = found[-1]
        elif glue:
            lead = found[-1] if index == len(words) - 1 else ""
            found[-1] += word
            glue = False
        else:
            found.append(word)
    if not found:
        raise UsageError("completion words: the word to complete is missing", hint="it may be empty, but not absent")
    return found, lead


def _without_socket(words: list[str]) -> list[str]:
    rest, skip = [], False
    for word in words:
        if not skip and not word.startswith("--api-socket"):
            rest.append(word)
        skip = word == "--api-socket"
    return rest
