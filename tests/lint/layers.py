"""Which package may import which: the import graph of the whole tree, read with ast."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from tests.lint.source import PACKAGES, Source

# Everybody may have these; they may have each other and nothing else of ours.
COMMON = ("core.errors", "core.log", "core.trace", "core.metrics")
LOWER = ("core._native", "core.abi", "core.wire", "core.mem", "core.ring", "core.kvm", "core.pci", "core.virtio",
         "core.acpi", "core.board", "core.boot")

# First match wins: files below the prefix -> what they may import besides COMMON and their own package.
ALLOWED: tuple[tuple[str, tuple[str, ...]], ...] = (
    *((name, ()) for name in COMMON),
    ("core._native", ()),
    ("core.abi", ("core._native",)),
    ("core.wire", ("core._native",)),
    *((name, LOWER) for name in LOWER[3:]),
    ("core", LOWER),  # its top-level modules assemble the machine; nothing below may import them
    ("devices.virtio", ("devices.device", "devices.backends", "core.abi", "core.wire", "core.mem", "core.ring")),
    ("devices.vfio", ("devices.device", "devices.backends", "core.abi", "core.wire", "core.mem", "core.ring")),
    ("devices.backends", ("core._native", "core.abi", "core.wire")),  # a few system calls live in C
    ("devices", ("devices", "core.abi", "core.wire", "core.mem", "core.ring")),
    ("controlplane", ("core.wire",)),
    ("ctl", ("core.wire",)),
)
DEVICE_FOLDERS = ("devices.virtio", "devices.vfio")


def below(name: str, prefix: str) -> bool:
    """Say whether dotted `name` is `prefix` or inside it."""
    return name == prefix or name.startswith(prefix + ".")


def imports(source: Source, modules: frozenset[str]) -> Iterator[tuple[ast.AST, str]]:
    """Yield (node, full module name) for each import, wherever in the file it stands."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node, "." * node.level + (node.module or "")
                continue
            for alias in node.names:  # `from package import module` names the module
                full = f"{node.module}.{alias.name}"
                yield node, full if full in modules else str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node, first.value


def problems(sources: Iterable[Source]) -> list[str]:
    """Return each import that goes the wrong way."""
    sources = list(sources)
    modules = frozenset(source.module for source in sources)
    found = []
    for source in sources:
        own = source.module.removeprefix("cellvisor.")
        for node, target in imports(source, modules):
            reason = _refusal(own, target)
            if reason:
                found.append(source.at(node, f"{own} imports {target}: {reason}"))
    return found


def _refusal(own: str, target: str) -> str:
    if target.startswith("."):
        return "imports are absolute"
    if target.split(".")[0] in PACKAGES:
        return "that is a second copy of it, say cellvisor." + target
    if not below(target, "cellvisor") or target == "cellvisor":
        return ""
    name = target.removeprefix("cellvisor.")
    rule = next(((prefix, allowed) for prefix, allowed in ALLOWED if below(own, prefix)), None)
    if rule is None or (rule[0] == "core" and own.count(".") > 1):
        return "its package has no rule here"
    prefix, allowed = rule
    if below(own, "core") and not below(name, "core"):
        return "core knows no device, controlplane or command line"
    if prefix in DEVICE_FOLDERS and below(name, prefix) and name != own and own not in DEVICE_FOLDERS:
        return "no device file imports another"
    ours = (prefix, *allowed, *COMMON)
    if any(below(name, part) for part in ours):
        return ""
    return f"allowed are {', '.join(ours)}"
