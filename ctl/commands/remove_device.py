"""cellvisor remove-device."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common, plugging

HELP = "Have the guest give a device back, then end it."
EXAMPLE = "cellvisor remove-device web data"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, ID, --timeout, --host-only and --no-wait."""
    plugging.add_words(parser, "ID", "the device's name, see cellvisor devices")
    parser.add_argument("--timeout", type=common.seconds, default=30.0, metavar="SECONDS",
                        help="how long the guest may take before it counts as silent (30)")
    parser.add_argument("--host-only", action="store_true",
                        help="take the device away without asking: the guest's driver is not prepared, loses what it "
                             "has not written, and may hang until the guest reboots")


def request(options: argparse.Namespace) -> common.Request:
    """Say what is asked for."""
    vm, key = plugging.split(options)
    return common.Request(vm, "remove-device", {"id": key, "timeout": options.timeout, "host_only": options.host_only})


def run(options: argparse.Namespace) -> int:
    """Ask, then follow the operation."""
    return plugging.ask(options, request(options))
