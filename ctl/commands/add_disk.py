"""cellvisor add-disk."""

from __future__ import annotations

import argparse

from cellvisor.ctl import plugging
from cellvisor.ctl.common import Request

HELP = "Plug a disk into a running VM."
EXAMPLE = "cellvisor add-disk web path=/srv/data.raw,id=data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, the options and --no-wait."""
    plugging.add_words(parser, "path=FILE,key=value", "options as for --disk")


def request(options: argparse.Namespace) -> Request:
    """Say what is asked for."""
    return plugging.addition(options, "add-disk")


def run(options: argparse.Namespace) -> int:
    """Ask, then follow the operation."""
    return plugging.ask(options, request(options))
