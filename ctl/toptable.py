"""The table of `top`: columns, units, orders; rich is loaded only to draw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cellvisor.ctl.sampling import STATES_OF_NOBODY, Row, Snapshot

COLUMNS = ("VM", "NAME", "TYPE", "STATE", "PID ", "CPU% ", "PSS MiB ", "IOPS ", "MB/s ", "LAT us ", "RESTARTS ")
ORDERS = ("vm", "cpu", "pss", "iops", "bytes_per_second", "latency", "restarts", "name")
TITLES = {"vm": "VM", "bytes_per_second": "MB/s", "cpu": "CPU", "pss": "PSS", "iops": "IOPS"}
EXPENDABLE = ("TYPE", "PID ", "RESTARTS ", "LAT us ", "PSS MiB ", "VM", "STATE", "MB/s ")  # in a narrow window
KINDS = ("vcpu", "device", "core", "nursery", "controlplane")


def ordered(rows: Sequence[Row], order: str) -> list[Row]:
    """Sort rows: by VM and kind, by name, or by a number, the largest first and those without one last."""
    if order == "vm":
        return sorted(rows, key=lambda row: (row.vm, KINDS.index(row.kind) if row.kind in KINDS else 9))
    if order == "name":
        return sorted(rows, key=lambda row: (row.name, row.vm))
    return sorted(rows, key=lambda row: (getattr(row, order) is None, -(getattr(row, order) or 0)))


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's text for COLUMNS."""
    return (row.vm, row.name, row.type or row.kind, row.state or "-", str(row.pid or "-"), _number(row.cpu, 1),
            _number(row.pss, 1, 1024), _number(row.iops), _number(row.bytes_per_second, 2, 1e6),
            _number(row.latency), _number(row.restarts))


def _number(value: float | None, digits: int = 0, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:.{digits}f}"


def title(snapshot: Snapshot | None) -> str:
    """Return the line above the table."""
    if snapshot is None:
        return "asking..."
    told = [f"{name} {state}" for name, state in snapshot.states.items()]
    return f"{len(told)} VM{'' if len(told) == 1 else 's'}: {', '.join(told)}" if told else "no VM is running"


def fitting(table: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return which columns of COLUMNS a window shows: the least wanted ones go until the rest fits."""
    widths = [max(map(len, column)) + 1 for column in zip([name.strip() for name in COLUMNS], *table, strict=True)]
    left = list(range(len(COLUMNS)))
    for name in EXPENDABLE:
        if sum(widths[number] for number in left) <= width + 1:
            break
        left.remove(COLUMNS.index(name))
    return left


def drawing(snapshot: Snapshot | None, rows: Sequence[Row], selected: int, order: int, foot: str,
            size: tuple[int, int]) -> Any:
    """Return what rich draws in a window of `size` (columns, lines): the rows around the selected one."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    width, height = size
    room = max(1, height - 3)
    first = max(0, min(selected - room // 2, len(rows) - room))
    shown = [cells(row) for row in rows[first:first + room]]
    columns = fitting(shown, width)
    table = Table(box=None, header_style="bold", expand=True, pad_edge=False, padding=(0, 1, 0, 0))
    for number in columns:
        name = COLUMNS[number]
        table.add_column(name.strip(), justify="right" if name.endswith(" ") else "left", no_wrap=True)
    for number, (row, text) in enumerate(zip(rows[first:], shown, strict=False), first):
        bad = row.state in STATES_OF_NOBODY
        # Names come from outside: Text takes no markup from them.
        table.add_row(*(Text(text[column]) for column in columns),
                      style="reverse" if number == selected else "red" if bad else "")
    head = f"{title(snapshot)}   sorted by {TITLES.get(ORDERS[order], ORDERS[order])}"
    if snapshot is not None and snapshot.errors:
        head += "   " + "; ".join(f"{name}: {error}" for name, error in snapshot.errors.items())
    return Group(Text(head, no_wrap=True, overflow="ellipsis"), table,
                 Text(foot, style="dim", no_wrap=True, overflow="ellipsis"))
