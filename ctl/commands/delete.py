"""cellvisor delete."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "End a VM and forget its configuration."
EXAMPLE = "cellvisor delete web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    return common.ask(options, "delete", "deleted")
