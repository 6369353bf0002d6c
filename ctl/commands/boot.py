"""cellvisor boot."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common

HELP = "Boot the VM that was created."
EXAMPLE = "cellvisor boot web"
add_arguments = common.add_vm


def request(options: argparse.Namespace) -> common.Request:
    """Say what is asked for."""
    return common.Request(options.vm, "boot", {})


def run(options: argparse.Namespace) -> int:
    """Ask for it."""
    return common.change(options, request(options), "booted")
