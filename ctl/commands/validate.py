"""cellvisor validate."""

from __future__ import annotations

import argparse

from cellvisor.core.errors import UsageError
from cellvisor.core.wire.control import TEXT
from cellvisor.ctl import common

HELP = "Check what a verb that adds a device would do, without doing it."
EXAMPLE = "cellvisor validate add-disk path=/srv/data.raw,pci_device_id=9"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VERB, the options and --vm."""
    parser.add_argument("verb", metavar="VERB", help="add-disk, add-rng, add-console or add-virtio")
    parser.add_argument("text", nargs="?", default="", metavar="key=value", help="as for that verb")
    parser.add_argument("--vm", metavar="VM", help="name or path; not needed with a single VM running")
    common.add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Ask and print."""
    from cellvisor.ctl.client import Client

    more, text = {}, options.text
    if options.verb == "add-virtio":
        more["type"], _, text = text.partition(",")
        if not more["type"]:
            raise UsageError("add-virtio: the type is missing", hint="write TYPE,key=value")
    with Client(options.vm) as client:
        answer = client.call("validate", verb=options.verb, **more, **{TEXT: text})
    if options.json:
        return common.show_json(answer)
    print(f"would become {answer['id']} ({answer['type']}) at {answer['bdf']}")
    return 0
