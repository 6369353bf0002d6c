"""cellvisor run: here for the list of verbs; ctl/cli.py replaces the process before this would be loaded."""

from __future__ import annotations

import argparse

HELP = "Boot a VM in the foreground (cellvisor run --help shows its flags)."
EXAMPLE = "cellvisor run --kernel vmlinuz --disk path=root.raw"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take everything: the controlplane reads its own flags."""
    parser.add_argument("flags", nargs=argparse.REMAINDER)


def run(options: argparse.Namespace) -> int:
    """Become the controlplane."""
    from cellvisor.ctl.cli import become_controlplane

    become_controlplane(["run", *options.flags])
