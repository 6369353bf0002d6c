"""cellvisor shutdown-vmm."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "End a process and its VM, whether one runs in it or not."
EXAMPLE = "cellvisor shutdown-vmm web"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --json and --no-wait."""
    common.add_vm(parser)
    parser.add_argument("--no-wait", action="store_true", help="return before everything is gone")


def run(options: argparse.Namespace) -> int:
    """Ask, then wait until nothing is left."""
    return common.end(options, "shutdown-vmm")
