"""cellvisor shutdown."""

from __future__ import annotations

import argparse

from cellvisor.core.errors import TryAgain
from cellvisor.ctl import common

HELP = "End a VM now, without asking the guest (power-button asks)."
EXAMPLE = "cellvisor shutdown web"
PATIENCE = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --json and --no-wait."""
    common.add_vm(parser)
    parser.add_argument("--no-wait", action="store_true", help="return before everything is gone")


def run(options: argparse.Namespace) -> int:
    """Ask, then wait until nothing of the VM is left."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        answer = client.call("shutdown")
        if not options.no_wait and not client.wait_gone(PATIENCE):
            raise TryAgain(f"still ending after {PATIENCE:g} s", hint="see cellvisor ls")
        if options.json:
            return common.show_json(answer)
        print(f"{client.path.rpartition('/')[2]}: shut down")
    return 0
