"""cellvisor reset."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Reset the machine as its reset button would."
EXAMPLE = "cellvisor reset web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    return common.ask(options, "reset", "reset")
