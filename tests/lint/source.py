"""The sources that house rules look at: each file parsed once, with its dotted name."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "devices", "controlplane", "ctl")


@dataclass(frozen=True)
class Source:
    """One Python file. `path` is relative to the checkout, `module` as it is imported ("" for tests)."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed file."""
        return ast.parse(self.text, self.path)

    @property
    def module(self) -> str:
        """The dotted name, `cellvisor.core.wire.spec`."""
        parts = list(Path(self.path).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        return ".".join(["cellvisor", *parts]) if parts and parts[0] in PACKAGES else ""

    @property
    def lines(self) -> int:
        """All lines, blank ones too."""
        return len(self.text.splitlines())

    def at(self, node: ast.AST, what: str) -> str:
        """Return a complaint about `node`."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {what}"


def python_files(root: Path, *folders: str) -> list[Source]:
    """Return each Python file below `folders` of `root`, sorted."""
    found = [path for folder in folders for path in (root / folder).rglob("*.py")]
    return [Source(str(path.relative_to(root)), path.read_text()) for path in sorted(found)
            if "build" not in path.relative_to(root).parts]


def c_files(root: Path) -> list[Source]:
    """Return each hand-written C file and header."""
    found = [path for suffix in ("c", "h", "S") for folder in (*PACKAGES, "tests")
             for path in (root / folder).rglob(f"*.{suffix}")]
    return [Source(str(path.relative_to(root)), path.read_text()) for path in sorted(found)
            if path.name != "_native.c" and "build" not in path.relative_to(root).parts]
