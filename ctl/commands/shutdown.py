"""cellvisor shutdown."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "End a VM now, without asking the guest (power-button asks)."
EXAMPLE = "cellvisor shutdown web"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --json and --no-wait."""
    common.add_vm(parser)
    parser.add_argument("--no-wait", action="store_true", help="return before everything is gone")


def run(options: argparse.Namespace) -> int:
    """Ask, then wait until nothing of the VM is left; a process started with --api-socket stays."""
    return common.end(options, "shutdown")
