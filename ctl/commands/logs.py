"""cellvisor logs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cellvisor.core.errors import CellvisorError, NotFound, TryAgain
from cellvisor.ctl import common

if TYPE_CHECKING:
    from cellvisor.ctl.client import Client

HELP = "Show the log of all processes of a VM; -f follows it."
EXAMPLE = "cellvisor logs -f web"
POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --json, -f and --lines."""
    common.add_vm(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
    parser.add_argument("-n", "--lines", type=common.count, metavar="N", help="only the last N lines")


def run(options: argparse.Namespace) -> int:
    """Print lines; with --json one object a line."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        found = _far_lines(client, options) if client.is_remote else _lines(client, options)
        for line in found:
            print(json.dumps(_parsed(line)) if options.json else line, flush=options.follow)
    return 0


def _far_lines(client: Client, options: argparse.Namespace) -> Iterator[str]:
    """Ask for piece after piece; a controlplane that dies over it has a successor, which goes on."""
    args = {"lines": options.lines}
    begun = ""
    while True:
        try:
            piece = client.call("logs", **args)
        except TryAgain as error:
            if not options.follow or client.is_alive():
                raise
            print(f"{error.message}; trying again, Ctrl-C ends", file=sys.stderr)
            client.connect_again()
            continue
        args = {"since": piece["next"]}
        *lines, begun = (begun + piece["text"]).split("\n")
        yield from (line.rstrip("\r") for line in lines)
        if not piece["text"]:
            if not options.follow:
                break
            time.sleep(POLL_SECONDS)
    if begun or piece["rest"]:
        yield begun + piece["rest"]


def _lines(client: Client, options: argparse.Namespace) -> Iterator[str]:
    path = str(client.call("ping").get("log_file") or "")
    if not path:
        raise NotFound(f"{client.name}: keeps no log", hint="it is on the stderr of the one who started it")
    try:
        file = open(path, errors="replace")  # noqa: SIM115 - a generator: closed below
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}", hint="it is on the machine of the VM") from None
    with file:
        kept = file.readlines()
        for line in deque(kept, maxlen=options.lines) if options.lines is not None else kept:
            yield line.rstrip("\r\n")
        while options.follow:
            while line := file.readline():
                yield line.rstrip("\r\n")
            time.sleep(POLL_SECONDS)
            try:
                client.call("ping")
            except CellvisorError:
                break
        for line in file if options.follow else ():
            yield line.rstrip("\r\n")


def _parsed(line: str) -> dict[str, str]:
    """Split core/log.py's form; a line of a traceback is text alone."""
    words = line.split(" ", 3)
    if len(words) == 4 and words[0].count(":") == 2:
        return {"time": words[0], "process": words[1], "level": words[2], "text": words[3]}
    return {"text": line}
