"""cellvisor boot."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Boot the VM that was created."
EXAMPLE = "cellvisor boot web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    return common.ask(options, "boot", "booted")
