"""cellvisor add-virtio."""

from __future__ import annotations

import argparse

from cellvisor.core.errors import UsageError
from cellvisor.ctl import plugging
from cellvisor.ctl.common import Request

HELP = "Plug a device of any type into a running VM."
EXAMPLE = "cellvisor add-virtio web rng,src=/dev/urandom"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add VM, type with options, and --no-wait."""
    plugging.add_words(parser, "TYPE,key=value", "a type and its options as for --device-type")


def request(options: argparse.Namespace) -> Request:
    """Say what is asked for. Raises UsageError for options without a type."""
    *before, word = options.words
    kind, _, text = word.partition(",")
    if not kind or "=" in kind:
        raise UsageError(f"{word[:80]!r} does not begin with the name of a type", hint="write TYPE,key=value")
    options.words = [*before, text]
    return plugging.addition(options, "add-virtio", type=kind)


def run(options: argparse.Namespace) -> int:
    """Ask, then follow the operation."""
    return plugging.ask(options, request(options))
