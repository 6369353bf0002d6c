"""cellvisor reboot."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "The same as reset."
EXAMPLE = "cellvisor reboot web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    return common.ask(options, "reboot", "reset")
