"""cellvisor resize-disk."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Change the size of a disk; the guest is told."
EXAMPLE = "cellvisor resize-disk web --disk _disk0 --size 20G"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --disk and --size."""
    common.add_vm(parser)
    parser.add_argument("--disk", required=True, metavar="ID", help="the disk's name, see cellvisor devices")
    parser.add_argument("--size", required=True, metavar="SIZE", help="bytes, or with K, M, G or T")


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    size = common.size("--size", options.size)
    return common.ask(options, "resize-disk", f"{options.disk} has {size} bytes", id=options.disk, desired_size=size)
