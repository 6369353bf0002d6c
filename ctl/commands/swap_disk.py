"""cellvisor swap-disk."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Give a disk another image while the guest runs: have it unmounted there first."
EXAMPLE = "cellvisor swap-disk web --disk data --path /srv/other.raw"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --disk and --path."""
    common.add_vm(parser)
    parser.add_argument("--disk", required=True, metavar="ID", help="the disk's name, see cellvisor devices")
    parser.add_argument("--path", required=True, metavar="FILE", help="raw image or block device")


def request(options: argparse.Namespace) -> common.Request:
    """Say what is asked for."""
    import os

    path = os.path.abspath(options.path) if options.path else ""
    return common.Request(options.vm, "swap-disk", {"id": options.disk, "path": path})


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    asked = request(options)
    return common.change(options, asked, f"{options.disk} has {asked.args['path']}")
