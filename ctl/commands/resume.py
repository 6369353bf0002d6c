"""cellvisor resume."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Go on after a pause."
EXAMPLE = "cellvisor resume web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    return common.ask(options, "resume", "running")
