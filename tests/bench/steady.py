"""What a block request costs when nothing happens but requests: messages, exits, system calls, CPU time.

These are counts, or CPU time: other load on the machine changes them little.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.effort import Effort, Place, wait_until
from tests.bench.figures import Row
from tests.native.qemu import start_qemu

EXITS = ("io", "mmio", "settled")
BLOCK = 4096
LOAD = "test=blk-bench op=randread span=32M duration_ms=600000"
VCPU = re.compile(r"CPU \d+/KVM")


def bytes_read(pid: int) -> int:
    """Return what a process has read with system calls; other than asking it, this costs it nothing."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


def steady(effort: Effort, place: Place) -> dict[str, Any]:
    """Measure per 4 KiB read at each depth, for the disk's worker: messages, exits, system calls, CPU time in us.

    The CPU time of QEMU is that of all its threads but those that run the guest.
    """
    disk = place.disk("disk.raw")
    return {str(depth): _ours(place, disk, depth, effort.requests) | {
        f"qemu-{aio}": {"cpu_us": _theirs(place, disk, depth, effort.requests, aio)} for aio in ("io_uring", "threads")}
        for depth in effort.steady_depths}


def _ours(place: Place, disk: Path, depth: int, requests: int) -> dict[str, Any]:
    place.tell(f"{requests} requests at depth {depth}")
    with place.steer(f"{LOAD} depth={depth}", disks=[f"path={disk},hang_timeout=0"]) as vmm:
        vmm.running.wait_for("features=")
        pid = int(vmm.device()["pid"])

        def serve(count: int) -> int:
            begin = bytes_read(pid)
            wait_until(lambda: bytes_read(pid) - begin >= count * BLOCK, f"{count} requests")
            return (bytes_read(pid) - begin) // BLOCK

        def look() -> dict[str, int]:
            core = vmm.client.call("info")["core"]
            counts = {kind: sum(vcpu[kind] for vcpu in core["vcpus"]) for kind in EXITS}
            return counts | {way: core["messages"][way] for way in ("to_workers", "from_workers")}

        serve(100)
        before, spent = look(), cpu_ns(pid)
        served = serve(requests)
        spent, after = cpu_ns(pid) - spent, look()
        calls = _calls(place, pid, lambda: serve(requests // 2))
    changed = {kind: after[kind] - before[kind] for kind in before}
    return {"requests": served, "exits": sum(changed[kind] for kind in EXITS),
            "messages": changed["to_workers"] + changed["from_workers"], "changed": changed,
            "cpu_us": round(spent / 1000 / served, 2), "calls": calls}


def _calls(place: Place, pid: int, load: Callable[[], Any]) -> dict[str, float]:
    if shutil.which("strace") is None:
        place.tell("strace is missing (apt-get install strace): system calls are not counted")
        return {}
    report = place.where / "strace.txt"
    tracer = subprocess.Popen(["strace", "-f", "-c", "-o", str(report), "-p", str(pid)], stderr=subprocess.DEVNULL)
    try:
        load()
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(10)
    return per_request(parse_strace(report.read_text()))


def parse_strace(text: str) -> dict[str, int]:
    """Read the table of strace -c: {system call: how often}."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 5 and words[0].replace(".", "").isdecimal() and words[-1] != "total":
            found[words[-1]] = int(words[3])
    return found


def per_request(counted: dict[str, int]) -> dict[str, float]:
    """Divide by the number of requests, each of which is one preadv; the most frequent first."""
    requests = counted.get("preadv") or counted.get("preadv2") or 0
    ordered = sorted(counted.items(), key=lambda one: -one[1]) if requests else []
    return {name: round(count / requests, 4) for name, count in ordered if count / requests >= 0.001}


def _theirs(place: Place, disk: Path, depth: int, requests: int, aio: str) -> float:
    place.tell(f"CPU time of QEMU with {aio} at depth {depth}")
    with start_qemu(f"{LOAD} depth={depth} progress_ms=20", place.where, disks=[disk], aio=aio,
                    extra=["-name", "bench,debug-threads=on"]) as running:
        running.wait_for("progress=")
        begin, spent = progress(running.text), cpu_ns(running.process.pid)
        wait_until(lambda: progress(running.text) >= begin + requests, f"{requests} requests")
        spent = cpu_ns(running.process.pid) - spent
        return round(spent / 1000 / (progress(running.text) - begin), 2)


def progress(text: str) -> int:
    """Return how many requests the guest said last that it had completed."""
    return int(re.findall(r"progress=(\d+)\r?\n", text)[-1])


def cpu_ns(pid: int) -> int:
    """Return the CPU time of a process's threads in ns, those left out that run the guest."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            if not VCPU.match((task / "comm").read_text()):
                total += int((task / "schedstat").read_text().split()[0])
    return total


def steady_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    rows = []
    for depth, one in found.items():
        count = one["requests"]
        rows += [Row(f"exits to userspace per request, depth {depth}", f"{one['exits'] / count:g}", "",
                     f"{one['exits']} in {count} requests"),
                 Row(f"messages per request, depth {depth}", f"{one['messages'] / count:g}", "",
                     f"{one['messages']} in {count} requests"),
                 Row(f"CPU time of the device per request, depth {depth}", f"{one['cpu_us']:.1f} us", "",
                     ", ".join(f"{name} {other['cpu_us']:.1f}" for name, other in one.items()
                               if name.startswith("qemu")))]
        if one["calls"]:
            rows.append(Row(f"system calls per request, depth {depth}", f"{sum(one['calls'].values()):.2f}", "",
                            ", ".join(f"{name} {each:.2f}" for name, each in list(one["calls"].items())[:6])))
    return rows
