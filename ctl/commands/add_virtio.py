"""cellvisor add-virtio."""

from __future__ import annotations

import argparse

from cellvisor.core.errors import UsageError
from cellvisor.ctl import plugging

HELP = "Plug a device of any type into a running VM."
EXAMPLE = "cellvisor add-virtio web rng,src=/dev/urandom"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, type with options, and --no-wait."""
    plugging.add_words(parser, "TYPE,key=value", "a type and its options as for --device-type")


def run(options: argparse.Namespace) -> int:
    """Ask, then follow the operation."""
    *before, word = options.words
    kind, _, text = word.partition(",")
    if not kind or "=" in kind:
        raise UsageError(f"{word[:80]!r} does not begin with the name of a type", hint="write TYPE,key=value")
    options.words = [*before, text]
    return plugging.add(options, "add-virtio", type=kind)
