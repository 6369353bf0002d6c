"""cellvisor adopt."""

from __future__ import annotations

import argparse

HELP = "Steer a VM whose controlplane died, in the foreground (a nursery does it by itself)."
EXAMPLE = "cellvisor adopt web"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --wait and -v."""
    parser.add_argument("vm", metavar="VM", help="name of the VM; refused while its controlplane is alive")
    parser.add_argument("--wait", action="store_true", help="while another steers it, wait to take its place")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log more to stderr; twice for debugging")


def run(options: argparse.Namespace) -> int:
    """Become the controlplane."""
    from cellvisor.ctl.cli import become_controlplane

    become_controlplane(["adopt", *["-v"] * options.verbose, *["--wait"] * options.wait, options.vm])
