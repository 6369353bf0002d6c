"""Numbers that the kernel's headers own: found in Python sources, and compared with the headers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.lint.source import Source
from tests.lint.style import assigned

# Names of these families may only come from the compiler (core/_native/kernel.cdef).
KERNEL_OWNED = re.compile(r"^_?(KVM_|VFIO_|VHOST_|VIRTIO_|TUN|FALLOC_|EPOLL|TIOC|IFF_)[A-Z0-9_]+$")
DEFINE = re.compile(r"^#\s*define\s+(\w+)\s+(0[xX][0-9a-fA-F]+|\d+)[uUlL]*\s*(?:/\*.*)?$", re.MULTILINE)


def header_numbers(*paths: Path) -> dict[str, int]:
    """Return every plain number that the C headers define."""
    return {name: int(value, 0) for path in paths for name, value in DEFINE.findall(path.read_text())}


def literals(source: Source) -> list[tuple[ast.stmt, str, int]]:
    """Return (node, NAME, number) for each integer literal given a name at module or class level."""
    found = []
    bodies = [source.tree.body, *(node.body for node in source.tree.body if isinstance(node, ast.ClassDef))]
    for node in (node for body in bodies for node in body):
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant) and type(value.value) is int:
            found += [(node, name, value.value) for name in assigned(node)]
    return found


def retyped(source: Source) -> list[str]:
    """Return each kernel number that was typed instead of asked from the compiler."""
    return [source.at(node, f"{name} = {value:#x} is the kernel's: take it from _native.lib")
            for node, name, value in literals(source) if KERNEL_OWNED.match(name)]


def differing(source: Source, numbers: dict[str, int], rename: dict[str, str]) -> list[str]:
    """Return each declared number that a header gives another value. `rename` maps our names to theirs."""
    found = []
    for node, name, value in literals(source):
        theirs = numbers.get(rename.get(name, name))
        if theirs is not None and theirs != value:
            found.append(source.at(node, f"{name} is {value:#x}, the header says {theirs:#x}"))
    return found
