"""Find the file of a verb, read its arguments, run it, and turn errors into one line and an exit status."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import os
import pkgutil
import sys
from typing import Protocol, cast

from cellvisor.core.errors import CellvisorError, NotFound, TryAgain, UsageError
from cellvisor.ctl import commands
from cellvisor.ctl.cli import EXIT_STATUS
from cellvisor.ctl.client import ENVIRONMENT
from cellvisor.ctl.parsing import Parser

WITHOUT_VM = ("adopt", "completion", "keys", "ls", "report")  # who have nothing to ask of a VM's HTTP socket
ALIASES = {"upgrade-device": "upgrade"}  # the API's name of a verb that has a shorter one here


class Command(Protocol):
    """What a file in ctl/commands has. Its name is the verb, with `_` for `-`."""

    HELP: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int: ...


def names() -> list[str]:
    """Return every verb."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(commands.__path__))


def load(verb: str) -> Command:
    """Import the file of `verb`. Raises UsageError with the nearest name."""
    known = names()
    verb = ALIASES.get(verb, verb)
    if verb not in known:
        from cellvisor.core.wire.control import VERBS, look_up

        if verb in VERBS:
            look_up(verb)  # says that it is not supported yet
        if verb.startswith("-"):
            raise UsageError(f"unknown flag {verb.partition('=')[0][:80]}", hint="see cellvisor --help")
        close = difflib.get_close_matches(verb, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"verbs: {', '.join(known)}"
        raise UsageError(f"unknown verb {verb[:60]!r}", hint=hint)
    return cast("Command", importlib.import_module(f"{commands.__name__}.{verb.replace('-', '_')}"))


def parser(verb: str, command: Command) -> Parser:
    """Return what reads the arguments of `verb`."""
    made = Parser(prog=f"cellvisor {verb}", description=command.HELP, allow_abbrev=False,
                   epilog=f"example:\n  {command.EXAMPLE}\n\n{EXIT_STATUS}",
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_arguments(made)
    return made


def run(argv: list[str]) -> int:
    """Run one command; return the exit status."""
    as_json = "--json" in argv[:argv.index("--") if "--" in argv else None]
    try:
        argv, socket = _take_socket(argv)
        if not argv or argv[0] in ("-h", "--help"):
            _print_help()
            return 0 if argv else 2
        if argv[0] in ("-V", "--version"):
            from cellvisor import __version__

            print(f"cellvisor {__version__}")
            return 0
        command = load(argv[0])
        reader = parser(argv[0], command)
        if argv[0] not in ("run", "validate"):
            reader.check_flags(argv[1:])
        options = reader.parse_args(argv[1:])
        if getattr(options, "vm", None) == "":  # an empty variable in a script must not mean the VM that happens to run
            raise UsageError("VM '' is no name", hint="leave it out for the only VM that runs")
        if socket is not None:
            if argv[0] in WITHOUT_VM:
                raise UsageError(f"{argv[0]} takes no --api-socket", hint="leave it out")
            if getattr(options, "vm", None) is not None:
                raise UsageError(f"both --api-socket and VM {options.vm[:80]!r} are given", hint="give one of them")
            os.environ[ENVIRONMENT] = socket  # where ctl/client.py looks
        status = command.run(options)
        sys.stdout.flush()
        return status
    except CellvisorError as error:
        shown = json.dumps({"error": error.as_wire()}) if as_json else f"cellvisor: {error}"
        print(shown, file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `cellvisor events | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _take_socket(argv: list[str]) -> tuple[list[str], str | None]:
    """Take `--api-socket PATH` out, wherever it stands, as ch-remote has it."""
    rest, found = [], None
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word == "--api-socket":
            found = next(words, "")
        elif word.startswith("--api-socket="):
            found = word.partition("=")[2]
        else:
            rest.append(word)
    if found is None:
        return rest, None
    found = found.removeprefix("path=")
    if not found:
        raise UsageError("--api-socket: no path is given", hint="write --api-socket PATH")
    return rest, os.path.abspath(found)


def exit_status(error: CellvisorError) -> int:
    """Return the documented exit status for an error."""
    if error.code == "no-vm":
        return 3
    if isinstance(error, TryAgain):
        return 4
    return 2 if isinstance(error, UsageError) and not isinstance(error, NotFound) else 1


def _print_help() -> None:
    print("usage: cellvisor [--api-socket PATH] VERB [VM] [--json] ...\n\nRun and steer virtual machines in which "
          "every device is a process.\nVM is a name or a path; with a single VM running it is not needed. --api-socket "
          f"(or ${ENVIRONMENT})\nnames a VM by its HTTP socket instead.\n\nverbs:")
    for verb in names():
        print(f"  {verb:<14} {load(verb).HELP}")
    print(f"\n{EXIT_STATUS}\n`cellvisor VERB --help` shows arguments and an example.")
