"""cellvisor power-button."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Press the ACPI power button: the guest may shut down."
EXAMPLE = "cellvisor power-button web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    return common.ask(options, "power-button", "power button pressed")
