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


def request(options: argparse.Namespace) -> common.Request:
    """Say what is asked for."""
    return common.Request(options.vm, "resize-disk", {"id": options.disk,
                                                      "desired_size": common.size("--size", options.size)})


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    asked = request(options)
    return common.change(options, asked, f"{options.disk} has {asked.args['desired_size']} bytes")
