"""cellvisor console."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from cellvisor.ctl import common

HELP = "Attach this terminal to a console that is a pty or a socket; Ctrl-] leaves."
EXAMPLE = "cellvisor console web --device serial"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --json and --device."""
    common.add_vm(parser)
    parser.add_argument("--device", metavar="ID", help="console, serial, or a console's name; the first that works")


def run(options: argparse.Namespace) -> int:
    """Find where it is, then copy both ways: by ourselves, or through the API of a VM on another machine."""
    from cellvisor.core.wire import ports
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        key, (kind, path) = ports.choose(client.call("info")["config"], options.device, client.name)
        if options.json:
            return common.show_json({"device": key, "kind": kind, "path": path})
        from cellvisor.ctl import attach

        print(f"{ports.PLAIN.get(key, key)} of {client.name} at {path}; Ctrl-] leaves", file=sys.stderr)
        if client.is_remote:
            from cellvisor.ctl.farconsole import FarConsole

            why = FarConsole(client, key).run()
        else:
            why = attach.attach(kind, path, resized=partial(_tell_size, options.vm, key))
    print(f"\n{why}", file=sys.stderr)
    return 0


def _tell_size(vm: str | None, device: str, columns: int, rows: int) -> None:
    """Have the guest learn it, if the VM can be asked just now; the copying does not wait for that."""
    from cellvisor.ctl.client import Client
    from cellvisor.ctl.errand import Errand

    def tell() -> None:
        with Client(vm, timeout=5.0) as client:
            client.call("console", action="resize", id=device, columns=columns, rows=rows)

    Errand(tell)
