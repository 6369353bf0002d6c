"""What processes cost: from the fork of a worker to its first word, from the command to the guest, and memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from cellvisor.controlplane.report import memory_kib
from cellvisor.core.wire import places
from cellvisor.core.wire.messages import FromNursery, ToCore
from cellvisor.ctl.client import Client
from tests.bench.effort import Effort, Place
from tests.bench.figures import Row, abba, ratio, show_ratio, show_times, summary
from tests.fakes.core import FakeCore, NurseryProcess, kill
from tests.native.cellvisor import start_cellvisor
from tests.native.guest import Running
from tests.native.qemu import start_qemu

SECONDS = 30
FIRST_WORD = "guest=1"


def hello(effort: Effort, place: Place) -> dict[str, Any]:
    """Measure from the request to fork until core has the worker's HELLO, in ms."""
    spawned, greeted = [], []
    disk = str(place.disk("disk.raw"))
    with tempfile.TemporaryDirectory(prefix="cv-") as run, FakeCore(Path(run)) as core, \
            NurseryProcess(Path(run)) as nursery:
        for number in range(effort.forks):
            began = time.monotonic()
            report = nursery.spawn(core.run_dir, "blk", {"path": disk}, generation=number + 1)
            spawned.append((time.monotonic() - began) * 1000)
            if not core.router.poll(SECONDS * 1000):
                raise RuntimeError(f"no HELLO within {SECONDS} s")
            greeted.append((time.monotonic() - began) * 1000)
            core.told(ToCore.HELLO)
            core.told(ToCore.READY)
            kill(report["pid"])
            while nursery.told()["k"] != FromNursery.EXITED:
                pass
    return {"forked_ms": summary(spawned), "hello_ms": summary(greeted)}


def hello_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    return [Row("nursery fork → Hello", *show_times(found["hello_ms"]),
                f"of which the fork {found['forked_ms']['p50']:.1f} ms")]


def memory(effort: Effort, place: Place) -> dict[str, Any]:
    """Measure the proportional memory of every process of VMs with so many workers, guest RAM apart, in KiB.

    The workers are the random number generator's and, beyond the first, one per disk.
    """
    return {str(count): _memory(place, count) for count in effort.workers}


def footprint(effort: Effort, place: Place) -> dict[str, Any]:
    """Measure the proportional memory of all processes of an idle VM and of QEMU with a disk and an RNG, in KiB.

    Guest RAM, which is a memfd with both, is left out.
    """
    guest, memory = "test=boot end=stay", "memory-backend-memfd,id=ram,size=256M,share=on"
    with place.steer(guest, disks=[place.disk("ours.raw")]) as vmm, \
            start_qemu(guest, place.directory("qemu"), disks=[place.disk("theirs.raw")],
                       extra=["-object", memory, "-machine", "memory-backend=ram"]) as qemu:
        vmm.running.wait_for("test.us=")
        qemu.wait_for("test.us=")
        processes = vmm.client.call("info", processes=True)["processes"]
        theirs = memory_kib(qemu.process.pid)
    ours = sum(one["pss"] - one["pss_shmem"] for one in processes)
    return {"ours": ours, "processes": len(processes), "qemu": theirs["pss"] - theirs["pss_shmem"]}


def footprint_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    ours, theirs = found["ours"] / 1024, found["qemu"] / 1024
    return [Row("PSS of the whole VM, ours : QEMU's", f"{ours / theirs:.2f}", "",
                f"{ours:.0f} MiB in {found['processes']} processes : {theirs:.0f} MiB, without guest RAM")]


def _memory(place: Place, count: int) -> dict[str, Any]:
    place.tell(f"{count} workers")
    disks = [place.disk(f"small{index}.raw", 1 << 20) for index in range(count - 1)]
    with place.steer("test=boot end=stay", disks=disks) as vmm:
        vmm.running.wait_for("test.us=")
        processes = vmm.client.call("info", processes=True)["processes"]
    private = {str(one["pid"]): one["pss"] - one["pss_shmem"] for one in processes}
    workers = sorted(private[str(one["pid"])] for one in processes if one["role"] == "worker")
    found: dict[str, Any] = {one["role"]: private[str(one["pid"])] for one in processes if one["role"] != "worker"}
    return found | {"workers": len(workers), "worker_p50": round(statistics.median(workers)),
                    "worker_max": workers[-1], "all": sum(private.values())}


def memory_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    def mib(kib: float) -> str:
        return f"{kib / 1024:.1f} MiB"

    rows = [Row(f"PSS per worker, {count} of them", mib(one["worker_p50"]), f"max {mib(one['worker_max'])}",
                f"whole VM {mib(one['all'])}, without guest RAM") for count, one in found.items()]
    last = list(found.values())[-1]
    return rows + [Row(f"PSS of {role}", mib(last[role]), "", f"with {last['workers']} workers")
                   for role in ("core", "controlplane", "nursery")]


def boot(effort: Effort, place: Place) -> dict[str, Any]:
    """Measure from the start of the command to the guest's first instruction, and to its first word, in ms.

    Each start is of new processes; their files are in the page cache. QEMU starts the same guest by its firmware.
    """
    entered: list[float] = []
    words: dict[str, list[float]] = {"cellvisor": [], "qemu": []}
    for number, order in enumerate(abba(["cellvisor", "qemu"], effort.boots)):
        place.tell(f"start {number + 1} of {effort.boots}")
        for name in order:
            start = start_cellvisor if name == "cellvisor" else start_qemu
            with start("test=boot end=stay", place.where) as running:
                words[name].append(_first_word(running))
                if name == "cellvisor":
                    entered.append(_first_entry(place, running))
            place.leave()
    return {"first_instruction_ms": summary(entered), "first_word_ms": summary(words["cellvisor"]),
            "qemu_first_word_ms": summary(words["qemu"]), "ratio": ratio(words["cellvisor"], words["qemu"])}


def _first_word(running: Running) -> float:
    while FIRST_WORD not in running.text:
        if running.process.poll() is not None:
            raise RuntimeError(f"the VMM ended: {running.finish().stderr[-500:]}")
        time.sleep(0.0005)
    return (time.monotonic() - running.began) * 1000


def _first_entry(place: Place, running: Running) -> float:
    run = Path((place.where / "run").readlink()) / "cellvisor"
    path = next(entry for entry in run.iterdir() if places.holder(str(entry)) is not None)
    with Client(str(path)) as client:
        first = client.call("info")["core"]["first_entry_ns"]
    return float(first / 1e6 - running.began * 1000)


def boot_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    return [Row("start → first guest instruction", *show_times(found["first_instruction_ms"])),
            Row("start → guest's first word, ours : QEMU's", *show_ratio(found["ratio"]),
                f"{found['first_word_ms']['p50']:.0f} : {found['qemu_first_word_ms']['p50']:.0f} ms")]
