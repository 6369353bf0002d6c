"""cellvisor create."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from cellvisor.core.errors import NotFound, UsageError
from cellvisor.ctl import common

HELP = "Give a process that waits for it the configuration of a VM (JSON)."
EXAMPLE = "cellvisor create web vm.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add [VM] FILE."""
    parser.usage = "%(prog)s [VM] [FILE|-] [--json]"
    parser.add_argument("words", nargs="*", metavar="[VM] FILE",
                        help="a VmConfig, as `cellvisor info --json` shows under config; - or nothing is stdin")
    common.add_json(parser)


def request(options: argparse.Namespace) -> common.Request:
    """Say what is asked for. Raises NotFound, UsageError for a file that is no configuration."""
    if len(options.words) > 2:
        raise UsageError(f"unexpected argument {options.words[2][:80]!r}", hint="write cellvisor create VM FILE")
    body = _read(options.words[-1] if options.words else "-")
    return common.Request(options.words[0] if len(options.words) == 2 else None, "create", body)


def run(options: argparse.Namespace) -> int:
    """Read, then ask."""
    from cellvisor.ctl.client import Client

    asked = request(options)
    with Client(asked.vm) as client:
        answer = asked.put(client)
        if options.json:
            return common.show_json(answer)
        print(f"{client.name}: created; cellvisor boot starts it")
    return 0


def _read(path: str) -> dict[str, Any]:
    where, hint = ("stdin" if path == "-" else path), 'it must be JSON: {"payload": {"kernel": PATH}, ...}'
    try:
        if path == "-":
            text = sys.stdin.read()
        else:
            with open(path) as file:
                text = file.read()
        body = json.loads(text) if text.strip() else None
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file", hint="write - for stdin") from None
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"{where}: {error}", hint=hint) from None
    if body is None:
        raise UsageError(f"{where} is empty", hint=hint)
    if not isinstance(body, dict):
        raise UsageError(f"{where}: {type(body).__name__} instead of an object", hint=hint)
    return body
