"""cellvisor add-console."""

from __future__ import annotations

import argparse

from cellvisor.ctl import plugging

HELP = "Plug a console into a running VM."
EXAMPLE = "cellvisor add-console web mode=pty"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, the options and --no-wait."""
    plugging.add_words(parser, "mode=MODE", "options as for --console")


def run(options: argparse.Namespace) -> int:
    """Ask, then follow the operation."""
    return plugging.add(options, "add-console")
