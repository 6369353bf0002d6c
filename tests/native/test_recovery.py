"""Devices whose process dies under load: the guest sees a pause, no error, nothing lost, nothing twice."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.hotplug import eventually
from tests.native.steer import Steer, steer

pytestmark = [pytest.mark.kvm, needs_kvm]
OFTEN = "restart_budget=10000,restart_backoff=[0]"
LOAD = "test=blk-write reads=30 depth=32 span=8M flush=50 progress_ms=100"


def kill_often(vmm: Steer, kind: str, times: int, seed: int, most: float = 0.2) -> None:
    """Kill the device's process again and again, at random moments after it came back."""
    moments = random.Random(seed)
    for _ in range(times):
        time.sleep(moments.uniform(0, most))
        vmm.signal(kind)
        vmm.wait("device.restarted")


@pytest.mark.parametrize("how", ["irq=msix", "irq=intx", "event_idx=0 indirect=0", "qsize=32"])
def test_a_disk_that_is_killed_loses_nothing(vm: Vm, disk: Path, how: str) -> None:
    with steer(vm, f"{LOAD} duration_ms=6000 {how}", disks=[f"path={disk},{OFTEN}"]) as vmm:
        vmm.running.wait_for("progress=")
        kill_often(vmm, "blk", 8, seed=1)
        said = vmm.running.finish().check()
    assert said.number("errors") == 0
    assert said.number("verified.0") > 100


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_successors_that_die_at_once(vm: Vm, disk: Path) -> None:
    """Killed as soon as it is seen, at whatever step of its start or its recovery it is."""
    moments = random.Random(7)
    with steer(vm, f"{LOAD} duration_ms=6000", disks=[f"path={disk},{OFTEN}"]) as vmm:
        vmm.running.wait_for("progress=")
        nursery, others = vmm.pid("nursery"), {int(vmm.device("rng")["pid"])}
        vmm.mark()
        killed = 0
        while killed < 40:
            for pid in set(children(nursery)) - others:
                time.sleep(moments.uniform(0, 0.03))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
                others.add(pid)
        vmm.wait("device.restarted")
        assert vmm.device()["generation"] >= 40
        said = vmm.running.finish().check()
    assert said.number("errors") == 0


def test_worker_and_nursery_die_together(vm: Vm, disk: Path) -> None:
    with steer(vm, f"{LOAD} duration_ms=6000", disks=[f"path={disk},{OFTEN}"]) as vmm:
        vmm.running.wait_for("progress=")
        for worker_first in (True, False):
            nursery = vmm.pid("nursery")
            if not worker_first:
                os.kill(nursery, signal.SIGKILL)
            vmm.signal("blk")
            if worker_first:
                os.kill(nursery, signal.SIGKILL)
            vmm.wait("device.restarted")
        said = vmm.running.finish().check()
    assert said.number("errors") == 0


def test_a_successor_stays_quiet_while_the_vm_is_paused(vm: Vm, disk: Path) -> None:
    with steer(vm, f"{LOAD} duration_ms=6000", disks=[f"path={disk},{OFTEN}"]) as vmm:
        vmm.running.wait_for("progress=")
        for _ in range(2):
            vmm.client.call("pause")
            vmm.signal("blk")
            vmm.wait("device.restarted")
            before = disk.read_bytes()
            time.sleep(0.3)
            assert disk.read_bytes() == before
            vmm.signal("blk")  # and once more, before it ever served
            vmm.wait("device.restarted")
            vmm.client.call("resume")
        vmm.signal("blk")  # the pause may come while the successor starts
        vmm.client.call("pause")
        vmm.client.call("resume")
        said = vmm.running.finish().check()
    assert said.number("errors") == 0


def test_a_reset_of_a_paused_vm_leaves_it_paused(vm: Vm, disk: Path) -> None:
    with steer(vm, f"{LOAD} duration_ms=1000", disks=[disk]) as vmm:
        vmm.running.wait_for("progress=")
        vmm.client.call("pause")
        vmm.client.call("reset")
        info = vmm.client.call("info")
        assert (info["state"], info["core"]["state"]) == ("Paused", "paused")
        vmm.client.call("resume")
        assert vmm.client.call("info")["state"] == "Running"
        said = vmm.running.finish().check()
    assert said.text.count("test=blk-write") == 2


def _is_writing(vmm: Steer, boots: int) -> bool:
    """Tell whether the guest has come to write in the latest of so many boots."""
    parts = vmm.running.text.split("test=blk-write")[1:]
    return len(parts) == boots and "progress=" in parts[-1]


def test_a_machine_reset_during_recovery(vm: Vm, disk: Path) -> None:
    with steer(vm, f"{LOAD} duration_ms=2000", disks=[f"path={disk},{OFTEN}"]) as vmm:
        for boots in (1, 2, 3):
            eventually(lambda boots=boots: _is_writing(vmm, boots), f"progress of boot {boots}")
            vmm.signal("blk")
            vmm.client.call("reset")
        vmm.wait("device.restarted")
        said = vmm.running.finish().check()
    assert said.number("errors") == 0
    assert said.text.count("test=blk-write") == 4


def test_a_driver_s_reset_while_nobody_serves(vm: Vm, disk: Path, tmp_path: Path) -> None:
    """Its status stays non-zero until a successor, past the fence, has taken the reset over."""
    status = "1.common+20"
    script = tmp_path / "script"
    script.write_text(f"test blk-info\nsay ready\nsleep 1000000\nw8 {status} 0\nr8 {status}\nunlike 0\nsay waiting\n"
                      f"wait8 {status} 0xff 0 20000\nsay reset\ntest blk-info\n")
    with steer(vm, "test=script", initramfs=script, disks=[f"path={disk}"]) as vmm:
        vmm.running.wait_for("say=ready")
        nursery = vmm.pid("nursery")
        os.kill(nursery, signal.SIGSTOP)
        try:
            vmm.signal("blk")
            assert "say=reset" not in vmm.running.wait_for("say=waiting")
        finally:
            os.kill(nursery, signal.SIGCONT)
        vmm.running.wait_for("say=reset")
        vmm.running.finish().check()


def test_an_rng_that_is_killed(vm: Vm) -> None:
    with steer(vm, "test=rng bytes=100M bs=4096", extra=["--rng", f"src=/dev/urandom,{OFTEN}"]) as vmm:
        kill_often(vmm, "rng", 8, seed=2)
        assert vmm.running.process.poll() is None
        vmm.running.stop()


LINES = 60000


def numbered(text: str) -> str:
    return "".join(f"{number:07d}{text}\n" for number in range(LINES))


def while_it_writes(vmm: Steer, size: Callable[[], int], seed: int) -> int:
    """Kill the console's process while the output grows; returns how often."""
    moments, kills = random.Random(seed), 0
    while size() < LINES * 20 and kills < 40:
        vmm.signal("console")
        vmm.wait("device.restarted")
        kills += 1
        time.sleep(moments.uniform(0, 0.05))
    return kills


def test_a_console_s_file_has_every_byte_once(vm: Vm, tmp_path: Path) -> None:
    path = tmp_path / "out"
    with steer(vm, f"test=console text=hello_from_hvc0 repeat={LINES} numbered=1",
               console=f"file={path},{OFTEN}") as vmm:
        kills = while_it_writes(vmm, lambda: path.stat().st_size, seed=3)
        vmm.running.finish().check()
    assert kills > 5
    assert path.read_text() == numbered("hello from hvc0")


def test_a_user_s_open_pty_does_not_hang_up(vm: Vm) -> None:
    """Each line comes once and in order. A kill may cost the one write that found the pty full (ARCHITECTURE.md)."""
    # It stays on for a second: what a pty's user has not read when its VM ends is lost.
    load = f"test=console,script text=hello_from_hvc0 repeat={LINES} numbered=1 script=sleep,1000000"
    with steer(vm, load, console=f"pty,{OFTEN}") as vmm:
        path = next(event["properties"]["path"] for event in vmm.events() if event["event"] == "console.pty")
        user = os.open(path, os.O_RDWR | os.O_NOCTTY)
        got = bytearray()

        def read() -> None:
            while b"%07d" % (LINES - 1) not in got[-100:]:
                data = os.read(user, 65536)
                if not data:
                    return
                got.extend(data)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        kills = while_it_writes(vmm, lambda: len(got), seed=4)
        reader.join(30)
        assert not reader.is_alive()
        vmm.running.finish().check()
        os.close(user)
    assert kills > 5
    lines = got.decode().replace("\r", "").splitlines(keepends=True)
    whole = [int(line[:7]) for line in lines if re.fullmatch(r"\d{7}hello from hvc0\n", line)]
    assert all(later > earlier for earlier, later in itertools.pairwise(whole))
    assert whole[-1] == LINES - 1
    assert LINES - whole[0] - len(whole) <= 2 * kills  # a torn line spoils the next one, too
