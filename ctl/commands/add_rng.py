"""cellvisor add-rng."""

from __future__ import annotations

import argparse

from cellvisor.ctl import plugging
from cellvisor.ctl.common import Request

HELP = "Plug an entropy source into a running VM."
EXAMPLE = "cellvisor add-rng web src=/dev/urandom"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, the options and --no-wait."""
    plugging.add_words(parser, "key=value", "options as for --rng", optional=True)


def request(options: argparse.Namespace) -> Request:
    """Say what is asked for."""
    return plugging.addition(options, "add-rng", optional=True)


def run(options: argparse.Namespace) -> int:
    """Ask, then follow the operation."""
    return plugging.ask(options, request(options))
