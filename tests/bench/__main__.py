"""Measure what the design has budgets for: python -m tests.bench [--quick] [--only NAME,NAME] [--json FILE].

Prints a line as each measurement goes on (stderr) and a table at the end (stdout). Times depend on what else the
machine does: compare ratios and counts, not times of two days.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellvisor.ctl import render
from tests.bench import api, blk, hotplug, net, process, recovery, serve, steady
from tests.bench.effort import QUICK, Effort, Place
from tests.bench.figures import Row
from tests.native.guest import HAVE_KVM

Measure = Callable[[Effort, Place], dict[str, Any]]
Rows = Callable[[dict[str, Any]], list[Row]]

SECTIONS: dict[str, tuple[Measure, Rows]] = {
    "hello": (process.hello, process.hello_rows),
    "memory": (process.memory, process.memory_rows),
    "footprint": (process.footprint, process.footprint_rows),
    "boot": (process.boot, process.boot_rows),
    "steady": (steady.steady, steady.steady_rows),
    "hotplug": (hotplug.hotplug, hotplug.hotplug_rows),
    "api": (api.api, api.api_rows),
    "serve": (serve.serve, serve.serve_rows),
    "kills": (recovery.kills, recovery.kills_rows),
    "upgrades": (recovery.upgrades, recovery.upgrades_rows),
    "blk": (blk.compare, blk.compare_rows),
    "net": (net.compare, net.compare_rows),
}


def measure(names: list[str], effort: Effort, where: Path) -> dict[str, Any]:
    """Run the named measurements; one that fails leaves {"error"} and the others go on."""
    began = time.monotonic()
    found: dict[str, Any] = {}
    for name in names:
        def tell(text: str, name: str = name) -> None:
            sys.stderr.write(f"bench: {time.monotonic() - began:5.1f} s  {name}: {text}\n")

        place = Place(where, tell)
        tell("begins")
        try:
            found[name] = SECTIONS[name][0](effort, place)
        except (Exception, pytest.fail.Exception) as error:
            tell(f"failed: {type(error).__name__}: {error}")
            found[name] = {"error": f"{type(error).__name__}: {error}"}
        finally:
            place.leave()
    return {"effort": dataclasses.asdict(effort), "machine": machine(),
            "seconds": round(time.monotonic() - began, 1), "figures": found}


def machine() -> dict[str, Any]:
    """Describe the machine, and how busy others keep it."""
    return {"cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
            "load": os.getloadavg()}


def rows(result: dict[str, Any]) -> list[Row]:
    """Return the lines of the table."""
    lines = []
    for name, found in result["figures"].items():
        lines += [Row(name, "failed", "", str(found["error"]).splitlines()[0])] if "error" in found \
            else SECTIONS[name][1](found)
    return lines


def main(argv: list[str] | None = None) -> int:
    """Measure and show; returns 1 if a measurement failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure cellvisor.")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    options = parser.parse_args(argv)
    names = options.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))} (known: {', '.join(SECTIONS)})")
    if not HAVE_KVM:
        parser.error("/dev/kvm is missing or not ours to open")
    with tempfile.TemporaryDirectory(prefix="cv-bench-", dir="/var/tmp") as where:  # a disk, not a tmpfs
        result = measure(names, QUICK if options.quick else Effort(), Path(where))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    render.table(("MEASURED", "FIGURE ", "SPREAD", "REMARK"),
                 [(row.what, row.figure, row.spread, row.remark) for row in rows(result)])
    return int(any("error" in found for found in result["figures"].values()))


if __name__ == "__main__":
    sys.exit(main())
