"""Resets, signals, pause and a dead worker: seen from inside one Linux guest and from its processes."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import disk
from tests.lab.guest import GuestError, Linux

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Linux]:
    """One guest for all tests that leave it running."""
    path = disk.make(tmp_path_factory.mktemp("disks") / "disk.img")
    with Linux("cloud", disks=[f"path={path}"], args=["-v"]) as guest:
        yield guest


def _boot_id(guest: Linux) -> str:
    return guest.run("cat /proc/sys/kernel/random/boot_id").strip()


# "reboot" goes through the reset register of the FADT, port 0x64, or a shutdown of the processor.
@pytest.mark.parametrize("how", ["acpi", "kbd", "triple"])
def test_reset_keeps_core_and_workers(shared: Linux, how: str) -> None:
    before, boot = shared.processes(), _boot_id(shared)
    shared.run(f"echo {how} > /sys/kernel/reboot/type; echo 1 > /sys/kernel/reboot/force; true")
    assert shared.run("cat /sys/kernel/reboot/type").strip() == how
    shared.reboot()
    assert _boot_id(shared) != boot
    assert shared.processes() == before
    disk.write_and_read(shared, kib=256)
    assert shared.run("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c").strip() == "64"


def test_reset_by_request(shared: Linux) -> None:
    before, boot = shared.processes(), _boot_id(shared)
    shared.ctl("reset")
    shared.await_agent()
    assert _boot_id(shared) != boot
    assert shared.processes() == before


def test_pause_stops_everything_and_resume_goes_on(shared: Linux) -> None:
    uptime = float(shared.run("cut -d' ' -f1 /proc/uptime"))
    shared.ctl("pause")
    ticks = _vcpu_ticks(shared)
    with pytest.raises(GuestError, match="timed out"):
        shared.try_run("echo too-early", timeout=5)
    assert _vcpu_ticks(shared) - ticks < 20, "the core still burns CPU time while paused"
    shared.ctl("resume")
    # The line typed meanwhile was kept and runs now; its answer comes before the next one's.
    assert float(shared.run("cut -d' ' -f1 /proc/uptime").split()[-1]) > uptime
    disk.write_and_read(shared, kib=256)
    text = shared.run("dmesg | grep -E 'lockup|stall|hung'; true")
    assert text == ""


def _vcpu_ticks(guest: Linux) -> int:
    core = next(pid for pid, command in guest.processes().items() if "cellvisor.core" in command)
    fields = Path(f"/proc/{core}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_nmi_reaches_every_vcpu(shared: Linux) -> None:
    def received() -> list[int]:
        words = shared.run("grep NMI: /proc/interrupts").split()
        return [int(word) for word in words if word.isdecimal()]

    before = received()
    shared.ctl("nmi")
    assert received() == [count + 1 for count in before]
    assert "NMI received for unknown reason" in shared.run("dmesg | grep -i nmi")


def test_power_button_reaches_the_guest(shared: Linux) -> None:
    shared.run("modprobe -a button evdev")
    assert "Power Button" in shared.run("cat /proc/bus/input/devices")
    shared.run("head -c 24 /dev/input/event0 > /tmp/event 2>/dev/null &")
    assert shared.run("wc -c < /tmp/event").strip() == "0"
    shared.ctl("power-button")
    # struct input_event: 16 bytes of time, type EV_KEY, code KEY_POWER, value 1.
    shared.run("for i in $(seq 50); do [ -s /tmp/event ] && break; sleep 0.1; done")
    assert shared.run("od -An -tu2 -j16 /tmp/event").split()[:3] == ["1", "116", "1"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_everything(number: signal.Signals, status: int) -> None:
    with Linux("cloud") as guest:
        assert len(guest.processes()) >= 5  # controlplane, core, nursery, console, rng
        os.kill(guest.process.pid, number)
        assert guest.wait() == status
        guest.await_end()


def test_dead_worker_never_hangs_the_vm() -> None:
    with Linux("cloud", args=["-v"]) as guest:
        before = guest.processes()
        pid = next(int(found[1]) for found in re.finditer(r"device=__rng .*?pid=(\d+)", guest.logs()))
        os.kill(pid, signal.SIGKILL)
        assert guest.run("echo still here").strip() == "still here"
        until = time.monotonic() + 60
        while not re.search(r"device\.(restarted|failed) +device=__rng", said := guest.ctl("events")):
            assert time.monotonic() < until, said
            time.sleep(0.5)
        assert re.search(r"device\.died +device=__rng", said)
        assert set(before) - set(guest.processes()) == {pid}
        if "device.restarted" in said:
            assert guest.run("dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c").strip() == "256"
        assert guest.poweroff() == 0
        guest.await_end()
