"""cellvisor console."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cellvisor.core.errors import NotFound
from cellvisor.ctl import common

HELP = "Attach this terminal to a console that is a pty or a socket; Ctrl-] leaves."
EXAMPLE = "cellvisor console web --device serial"
PORTS = {"__console": "console", "__serial": "serial"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, --json and --device."""
    common.add_vm(parser)
    parser.add_argument("--device", metavar="ID", help="console, serial, or a console's name; the first that works")


def run(options: argparse.Namespace) -> int:
    """Find where it is, then copy both ways."""
    from cellvisor.ctl.client import Client

    with Client(options.vm) as client:
        if client.is_remote:
            raise NotFound(f"{client.name}: its consoles are on its own machine", hint="attach there")
        found = places(client.call("info")["config"])
        name = client.name
    key = next((key for key, plain in PORTS.items() if plain == options.device), options.device)
    if key is None:
        key = next(iter(found), "console")
    if key not in found:
        known = f"there are: {', '.join(PORTS.get(one, one) for one in found)}" if found else \
            "start the VM with --console pty, --serial pty or socket=PATH"
        raise NotFound(f"{name}: {PORTS.get(key, key)} is neither a pty nor a socket", hint=known)
    kind, path = found[key]
    if options.json:
        return common.show_json({"device": key, "kind": kind, "path": path})
    from cellvisor.ctl import attach

    print(f"{PORTS.get(key, key)} of {name} at {path}; Ctrl-] leaves", file=sys.stderr)
    why = attach.attach(kind, path)
    print(f"\n{why}", file=sys.stderr)
    return 0


def places(config: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return device -> ("pty" or "socket", path) of every console that can be attached to."""
    ports = [("__console", config.get("console") or {}), ("__serial", config.get("serial") or {})]
    ports += [(str(entry.get("id")), entry) for entry in config.get("virtio", ()) if entry.get("mode")]
    found = {}
    for key, port in ports:
        mode = str(port.get("mode", "")).lower()
        path = port.get("file") if mode == "pty" else port.get("socket") if mode == "socket" else None
        if path:
            found[key] = (mode, str(path))
    return found
