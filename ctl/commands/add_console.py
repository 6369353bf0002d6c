"""cellvisor add-console."""

from __future__ import annotations

import argparse

from cellvisor.ctl import plugging
from cellvisor.ctl.common import Request

HELP = "Plug a console into a running VM."
EXAMPLE = "cellvisor add-console web mode=pty"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, the options and --no-wait."""
    plugging.add_words(parser, "mode=MODE", "options as for --console")


def request(options: argparse.Namespace) -> Request:
    """Say what is asked for."""
    return plugging.addition(options, "add-console")


def run(options: argparse.Namespace) -> int:
    """Ask, then follow the operation."""
    return plugging.ask(options, request(options))
