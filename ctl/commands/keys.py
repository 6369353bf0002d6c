"""cellvisor keys."""

from __future__ import annotations

import argparse

from cellvisor.core.errors import NotFound
from cellvisor.ctl import common

HELP = "Make and show keys for VMs and clients that talk over TCP."
EXAMPLE = "cellvisor keys new laptop"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add new|show, NAME and --json."""
    parser.add_argument("action", choices=("new", "show"), metavar="new|show",
                        help="make a pair of keys, or show its public one")
    parser.add_argument("name", metavar="NAME", help="of the pair; a VM's is `server` unless --api says key=FILE")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the public key and where the pair is."""
    from cellvisor.core.wire import keys

    path = keys.key_file(options.name)
    try:
        pair = keys.make_pair(path) if options.action == "new" else keys.read_pair(path)
    except NotFound as error:
        raise NotFound(error.message, hint=f"cellvisor keys new {options.name} makes it") from None
    if options.json:
        return common.show_json({"name": options.name, "path": path, "public": pair.public})
    print(f'{options.name} = "{pair.public}"')
    if options.action == "new":
        print(f"{path} holds the secret: it stays here. The line above is for {keys.CLIENTS} of whoever shall\n"
              f"let {options.name} in; the key in quotes is `server` in {keys.REMOTES} of clients if a VM has it.")
    return 0
