"""cellvisor nmi."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Inject a non-maskable interrupt into every vCPU."
EXAMPLE = "cellvisor nmi web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    return common.ask(options, "nmi", "NMI injected")
