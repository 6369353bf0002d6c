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
    try:
        if path == "-":
            body = json.load(sys.stdin)
        else:
            with open(path) as file:
                body = json.load(file)
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file", hint="write - for stdin") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}", hint="it must be JSON: {\"payload\": {\"kernel\": PATH}, ...}") from None
    if not isinstance(body, dict):
        raise UsageError(f"{path}: {type(body).__name__} instead of an object")
    return body
