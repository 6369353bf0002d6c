"""cellvisor tree."""

from __future__ import annotations

import argparse

from cellvisor.ctl import common, render

HELP = "Show a VM's processes with their proportional memory (PSS)."
EXAMPLE = "cellvisor tree web"
add_arguments = common.add_vm


def run(options: argparse.Namespace) -> int:
    """Ask and draw."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        processes = client.call("info", processes=True)["processes"]
    if options.json:
        return common.show_json(processes)
    render.process_tree(processes)
    return 0
