"""cellvisor add-net."""

from __future__ import annotations

import argparse

from cellvisor.ctl import plugging

HELP = "Plug a network card into a running VM."
EXAMPLE = "cellvisor add-net web tap=tap1,mac=52:54:00:12:34:56,id=lan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, the options and --no-wait."""
    plugging.add_words(parser, "tap=NAME,key=value", "options as for --net; fd=[N] goes along over --api-socket")


def run(options: argparse.Namespace) -> int:
    """Ask, then follow the operation."""
    return plugging.add(options, "add-net", fds=True)
