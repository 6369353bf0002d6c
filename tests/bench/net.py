"""virtio-net next to QEMU's, each on a tap of one network namespace, and once more while its process is killed.

The kernel itself sends the guest's echo frames back out of the tap they came from, so no program of the host takes
part. As in blk.py only results of one round are compared.
"""

from __future__ import annotations

import time
from typing import Any

from tests.bench.effort import Effort, Place
from tests.bench.figures import Row, abba, ratio, show_ratio, show_times, summary
from tests.native import netns
from tests.native.guest import GuestResult
from tests.native.qemu import card, start_qemu
from tests.native.storm import OPTIONS, Storm

OURS, KILLED, QEMU = "ours", "killed", "qemu"
SEED = 7
# Name -> what the guest does, what counts of it, how it is shown
CELLS: dict[str, tuple[str, str, str]] = {
    "round trip, 64 bytes": ("op=rr:depth=1:bs=64", "pps", "round trips/s"),
    "both ways, 64 bytes, depth 64": ("op=rr:depth=64:bs=64", "pps", "frames/s each way"),
    "both ways, 1514 bytes, depth 64": ("op=rr:depth=64:bs=1514", "pps", "frames/s each way"),
    "out, 64 bytes": ("op=tx:bs=64", "pps", "frames/s"),
    "out, 1514 bytes": ("op=tx:bs=1514", "mbit_s", "Mbit/s"),
    "out, segments of 60000 bytes": ("op=tx:gso=1:bs=60000", "mbit_s", "Mbit/s"),
}


def cmdline(effort: Effort) -> str:
    """Return what the guest is told: a load that warms up, then each cell."""
    loads = ",".join(f"net-bench:{load}" for load, _, _ in CELLS.values())
    return f"test=net-bench:op=rr:depth=8,{loads} duration_ms={effort.cell_ms} patience_ms=300"


def parse(said: GuestResult) -> dict[str, float]:
    """Return the figure of each cell."""
    parts = said.text.replace("\r", "").split("test=net-bench\n")[2:]
    if not said.ok or len(parts) != len(CELLS):
        raise RuntimeError(f"the guest: {said.reason or 'no result'}; {len(parts)} of {len(CELLS)} loads\n"
                           f"{said.text[-1000:]}{said.stderr[-1000:]}")
    found = {}
    for (name, (_, key, _)), part in zip(CELLS.items(), parts, strict=True):
        found[name] = float(next(line.partition("=")[2] for line in part.splitlines() if line.startswith(f"{key}=")))
    return found


def compare(effort: Effort, place: Place) -> dict[str, Any]:
    """Run the rounds; returns samples, medians, and ratios of ours to QEMU's and of killed to not killed."""
    if netns.unusable:
        return {"skipped": netns.unusable}
    samples: dict[str, dict[str, list[float]]] = {who: {cell: [] for cell in CELLS} for who in (OURS, KILLED, QEMU)}
    kills, restarts, began, rounds = 0, [0.0] * 0, time.monotonic(), 0
    with netns.namespace():
        for tap in (OURS, QEMU):
            netns.reflect(netns.make_tap(tap))
        for order in abba([OURS, QEMU, KILLED], effort.rounds):
            if rounds >= 2 and time.monotonic() - began > effort.seconds / 2:
                break
            rounds += 1
            place.tell(f"round {rounds} of {effort.rounds}")
            for who in order:
                if who == KILLED:
                    said, killed, took = _killed(effort, place)
                    kills, restarts = kills + killed, restarts + took
                elif who == OURS:
                    said = place(cmdline(effort), extra=["--net", f"tap={OURS}"])
                else:
                    with start_qemu(cmdline(effort), place.where, extra=card(QEMU)) as running:
                        said = running.finish()
                for cell, value in parse(said).items():
                    samples[who][cell].append(value)
    return {"rounds": rounds, "kills": kills, "restart_ms": summary(restarts), "samples": samples,
            "cells": {cell: {"medians": {who: summary(samples[who][cell], 0)["p50"] for who in samples},
                             "to_qemu": ratio(samples[OURS][cell], samples[QEMU][cell]),
                             "killed": ratio(samples[KILLED][cell], samples[OURS][cell])} for cell in CELLS}}


def _killed(effort: Effort, place: Place) -> tuple[GuestResult, int, list[float]]:
    """Run the loads while the card's process is killed about ten times a second; returns kills and ms to READY too."""
    with place.steer(cmdline(effort), extra=["--net", f"tap={OURS},{OPTIONS}"]) as vmm:
        vmm.running.wait_for("features=")
        storm = Storm(vmm.pid("nursery"), int(vmm.device("net")["pid"]), SEED,
                      lambda: vmm.running.process.poll() is None, early=0.0, shortest=0.08)
        kills = len(list(storm.blow(len(CELLS) * effort.cell_ms // 150)))
        took = [event["properties"]["ms"] for event in vmm.events() if event["event"] == "device.restarted"]
        return vmm.running.finish(), kills, took


def compare_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    if "skipped" in found:
        return [Row("virtio-net", "not measured", "", found["skipped"])]
    rows = []
    for cell, one in found["cells"].items():
        medians, unit = one["medians"], CELLS[cell][2]
        rows.append(Row(f"net, {cell}, ours : QEMU's tap", *show_ratio(one["to_qemu"]),
                        f"{medians[OURS]:.0f} : {medians[QEMU]:.0f} {unit}"))
        rows.append(Row(f"net, {cell}, killed : not killed", *show_ratio(one["killed"]),
                        f"{medians[KILLED]:.0f} : {medians[OURS]:.0f} {unit}"))
    return [*rows, Row("net: death noticed → successor ready", *show_times(found["restart_ms"]),
                       f"{found['kills']} kills")]
