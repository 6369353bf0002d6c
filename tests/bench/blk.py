"""virtio-blk next to QEMU: the same guest, the same file, the same moment.

One round starts each VMM once, in turn; the guest then runs every load for a moment. Only results of one round are
compared, so what others do on the machine meanwhile hits both sides of a ratio nearly alike.
"""

from __future__ import annotations

import time
from typing import Any

from tests.bench.effort import Effort, Place
from tests.bench.figures import Row, abba, ratio, show_ratio, summary
from tests.native.guest import GuestResult
from tests.native.qemu import run_qemu

OURS = "cellvisor"
PEERS = ("qemu-io_uring", "qemu-threads")
OPS = ("read", "write")


def cells(effort: Effort) -> list[str]:
    """Name the loads: "read-1" is 4 KiB random reads at depth 1."""
    return [f"{op}-{depth}" for depth in effort.depths for op in OPS]


def cmdline(effort: Effort) -> str:
    """Return what the guest is told: a load that warms up, then each load."""
    loads = ["blk-bench:op=randread:depth=8"]
    for cell in cells(effort):
        op, depth = cell.split("-")
        loads.append(f"blk-bench:op=rand{op}:depth={depth}")
    return f"test={','.join(loads)} bs=4096 span=32M duration_ms={effort.cell_ms}"


def parse(said: GuestResult, effort: Effort) -> dict[str, dict[str, float]]:
    """Return for each load requests a second, their median latency in us, kicks and interrupts per request."""
    parts = said.text.replace("\r", "").split("test=blk-bench\n")[2:]
    found, interrupts = {}, 0
    wanted = cells(effort)
    if not said.ok or len(parts) != len(wanted):
        raise RuntimeError(f"the guest: {said.reason or 'no result'}; {len(parts)} of {len(wanted)} loads\n"
                           f"{said.text[-1000:]}{said.stderr[-1000:]}")
    before = said.text.replace("\r", "").split("test=blk-bench\n")[1]
    interrupts = _number(before, "irqs")
    for cell, part in zip(wanted, parts, strict=True):
        requests, irqs = _number(part, "requests"), _number(part, "irqs")
        found[cell] = {"iops": _number(part, "iops"), "p50_us": _number(part, "lat_p50_ns") / 1000,
                       "kicks": _number(part, "kicks") / max(requests, 1),
                       "interrupts": (irqs - interrupts) / max(requests, 1)}
        interrupts = irqs
    return found


def _number(part: str, key: str) -> int:
    return next(int(line.partition("=")[2]) for line in part.splitlines() if line.startswith(f"{key}="))


def compare(effort: Effort, place: Place) -> dict[str, Any]:
    """Run the rounds; returns samples, medians and ratios of requests a second (ours to theirs, above 1: faster)."""
    disk = place.disk("disk.raw")
    words = cmdline(effort)
    samples: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {cell: [] for cell in cells(effort)} for name in (OURS, *PEERS)}
    began, rounds = time.monotonic(), 0
    for order in abba([OURS, *PEERS], effort.rounds):
        if rounds >= 2 and time.monotonic() - began > effort.seconds:
            break
        rounds += 1
        place.tell(f"round {rounds} of {effort.rounds}")
        for name in order:
            if name == OURS:
                said = place(words, disks=[disk])
            else:
                said = run_qemu(words, place.where, disks=[disk], aio=name.partition("-")[2])
            for cell, values in parse(said, effort).items():
                samples[name][cell].append(values)
    return {"rounds": rounds, "cells": {cell: _cell(samples, cell) for cell in cells(effort)}, "samples": samples}


def _cell(samples: dict[str, dict[str, list[dict[str, float]]]], cell: str) -> dict[str, Any]:
    def column(name: str, key: str) -> list[float]:
        return [one[key] for one in samples[name][cell]]

    found: dict[str, Any] = {name: {key: summary(column(name, key), 4)["p50"]
                                    for key in ("iops", "p50_us", "kicks", "interrupts")} for name in samples}
    return found | {"ratios": {peer: ratio(column(OURS, "iops"), column(peer, "iops")) for peer in PEERS}}


def compare_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    rows = []
    for cell, one in found["cells"].items():
        op, depth = cell.split("-")
        for peer in PEERS:
            figure, spread = show_ratio(one["ratios"][peer])
            rows.append(Row(f"4 KiB random {op}, depth {depth}, ours : {peer}", figure, spread,
                            f"{one[OURS]['iops']:.0f} : {one[peer]['iops']:.0f} requests/s"))
    return rows
