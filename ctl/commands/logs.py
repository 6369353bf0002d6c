"""cellvisor logs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cellvisor.core.errors import NotFound, TryAgain
from cellvisor.core.wire import places
from cellvisor.ctl import common

if TYPE_CHECKING:
    from cellvisor.ctl.client import Client

HELP = "Show the log of all processes of a VM; -f follows it."
EXAMPLE = "cellvisor logs -f web"
POLL_SECONDS = 0.2
TIMEOUT = 10.0  # for an answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --json, -f and --lines."""
    common.add_vm(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the VM ends")
    parser.add_argument("-n", "--lines", type=common.count, metavar="N", help="only the last N lines")


def run(options: argparse.Namespace) -> int:
    """Print lines; with --json one object a line."""
    from cellvisor.ctl.client import Client

    with Client(options.vm, TIMEOUT) as client:
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


def _path(client: Client) -> str:
    """Return where the log is; where it is by itself, if the VM is too busy to say."""
    try:
        return str(client.call("ping").get("log_file") or "")
    except TryAgain:
        usual = os.path.join(client.path, places.LOG)
        if not os.path.isfile(usual):
            raise
        return usual


def _lines(client: Client, options: argparse.Namespace) -> Iterator[str]:
    path = _path(client)
    if not path:
        raise NotFound(f"{client.name}: keeps no log", hint="it is on the stderr of the one who started it")
    try:
        file = open(path, errors="replace")  # noqa: SIM115 - a generator: closed below
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}", hint="it is on the machine of the VM") from None
    with file:
        kept = file.readlines()
        begun = kept.pop() if options.follow and kept and not kept[-1].endswith("\n") else ""
        for line in deque(kept, maxlen=options.lines) if options.lines is not None else kept:
            yield line.rstrip("\r\n")
        is_alive = options.follow
        while is_alive:
            is_alive = client.is_alive()
            while line := file.readline():
                begun += line
                if begun.endswith("\n"):
                    yield begun.rstrip("\r\n")
                    begun = ""
            if is_alive:
                time.sleep(POLL_SECONDS)
        if begun:
            yield begun


def _parsed(line: str) -> dict[str, str]:
    """Split core/log.py's form; a line of a traceback is text alone."""
    words = line.split(" ", 3)
    if len(words) == 4 and words[0].count(":") == 2:
        return {"time": words[0], "process": words[1], "level": words[2], "text": words[3]}
    return {"text": line}
