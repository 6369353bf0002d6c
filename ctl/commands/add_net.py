"""cellvisor add-net."""

from __future__ import annotations

import argparse

from cellvisor.ctl import plugging
from cellvisor.ctl.common import Request

HELP = "Plug a network card into a running VM."
EXAMPLE = "cellvisor add-net web tap=tap1,mac=52:54:00:12:34:56,id=lan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, the options and --no-wait."""
    plugging.add_words(parser, "tap=NAME,key=value", "options as for --net; fd=[N] goes along over --api-socket")


def request(options: argparse.Namespace) -> Request:
    """Say what is asked for."""
    return plugging.addition(options, "add-net", fds=True)


def run(options: argparse.Namespace) -> int:
    """Ask, then follow the operation."""
    return plugging.ask(options, request(options))
