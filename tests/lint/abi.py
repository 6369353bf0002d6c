"""Numbers that the kernel's headers own: found in Python sources, and compared with the headers."""

from __future__ import annotations

import ast
import re
from collections.abc import Container
from pathlib import Path

from tests.lint.source import Source
from tests.lint.style import assigned

DEFINED = re.compile(r"^#\s*define\s+(\w+)\s+\S", re.MULTILINE)
NUMBER = re.compile(r"^#\s*define\s+(\w+)\s+(0[xX][0-9a-fA-F]+|\d+)[uUlL]*\s*(?:/\*.*)?$", re.MULTILINE)


def header_names(*paths: Path) -> set[str]:
    """Return every name that the C headers define as something."""
    return {name for path in paths for name in DEFINED.findall(path.read_text())}


def header_numbers(*paths: Path) -> dict[str, int]:
    """Return every plain number that the C headers define."""
    return {name: int(value, 0) for path in paths for name, value in NUMBER.findall(path.read_text())}


def literals(source: Source) -> list[tuple[ast.stmt, str, int]]:
    """Return (node, NAME, number) for each integer literal given a name at module or class level."""
    found = []
    bodies = [source.tree.body, *(node.body for node in source.tree.body if isinstance(node, ast.ClassDef))]
    for node in (node for body in bodies for node in body):
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant) and type(value.value) is int:
            found += [(node, name, value.value) for name in assigned(node)]
    return found


def retyped(source: Source, names: Container[str]) -> list[str]:
    """Return each number typed under a name that is in a header, with or without a leading underscore."""
    return [source.at(node, f"{name} = {value:#x} is the kernel's: take it from _native.lib")
            for node, name, value in literals(source) if name.lstrip("_") in names]


def differing(source: Source, numbers: dict[str, int], rename: dict[str, str]) -> list[str]:
    """Return each declared number that a header gives another value. `rename` maps our names to theirs."""
    return [source.at(node, f"{name} is {value:#x}, {rename[name]} is {numbers[rename[name]]:#x}")
            for node, name, value in literals(source)
            if rename.get(name) in numbers and numbers[rename[name]] != value]
