"""cellvisor pause."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Stop the vCPUs and quiesce every device."
EXAMPLE = "cellvisor pause web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    return common.ask(options, "pause", "paused")
