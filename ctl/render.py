"""Tables and trees: drawn with rich on a terminal, plain aligned text elsewhere. rich is loaded only to draw."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Node:
    """One line of a tree: cells, and the nodes below it."""

    cells: tuple[str, ...]
    below: list[Node] = field(default_factory=list)


def is_fancy() -> bool:
    """Tell whether stdout is a terminal of somebody who has not asked for plain text."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their column names; columns whose name ends in a blank are aligned right."""
    if is_fancy():
        from rich.console import Console
        from rich.table import Table

        drawn = Table(box=None, header_style="bold")
        for name in columns:
            drawn.add_column(name.strip(), justify="right" if name.endswith(" ") else "left")
        for row in rows:
            drawn.add_row(*row)
        Console().print(drawn)
        return
    widths = [max(len(text) for text in column) for column in zip([c.strip() for c in columns], *rows, strict=True)]
    for row in ([name.strip() for name in columns], *rows):
        cells = [text.rjust(width) if name.endswith(" ") else text.ljust(width)
                 for text, width, name in zip(row, widths, columns, strict=True)]
        print("  ".join(cells).rstrip())


def lines(node: Node, lead: str = "", rest: str = "") -> list[tuple[str, ...]]:
    """Return a tree as rows whose first cell carries the branches."""
    rows = [(lead + node.cells[0], *node.cells[1:])]
    for index, child in enumerate(node.below):
        last = index == len(node.below) - 1
        rows += lines(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))
    return rows


def mib(kib: int | None) -> str:
    """Show KiB as MiB."""
    return "?" if kib is None else f"{kib / 1024:.1f}"


def process_tree(processes: Sequence[dict[str, object]]) -> None:
    """Print who started whom, with proportional memory: all of it, and how much is shared (guest RAM)."""
    nodes = {entry["pid"]: Node((_label(entry), str(entry["pid"]), mib(_number(entry, "pss")),
                                 mib(_number(entry, "pss_shmem")))) for entry in processes}
    roots: list[Node] = []
    for entry in processes:
        above = nodes.get(entry.get("parent"))
        (above.below if above is not None else roots).append(nodes[entry["pid"]])
    rows = [row for root in roots for row in lines(root)]
    totals = [mib(sum(_number(entry, key) or 0 for entry in processes)) for key in ("pss", "pss_shmem")]
    table(("PROCESS", "PID ", "PSS MiB ", "SHARED MiB "), [*rows, ("total", "", *totals)])


def stages(found: Sequence[dict[str, object]]) -> None:
    """Print the boot stages in ms since the command was started."""
    table(("STAGE", "MS "), [(str(entry["name"]), f"{entry['ms']:.1f}") for entry in found])


def _label(entry: dict[str, object]) -> str:
    if entry.get("role") != "worker":
        owner = entry.get("device")
        return f"{entry.get('role')} ({owner})" if owner else str(entry.get("role"))
    return f"{entry.get('device')} ({entry.get('type')}, generation {entry.get('generation')})"


def _number(entry: dict[str, object], key: str) -> int | None:
    value = entry.get(key)
    return value if isinstance(value, int) else None
