"""Stock Debian kernels boot to userspace with every device in a process of its own, and power off properly."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from tests.lab import disk
from tests.lab.guest import Linux, kernels

# Each boot is a test of its own, so they spread over the machines of the lab.
pytestmark = pytest.mark.lab(split=True)

MIB = 1 << 20
EVERY = tuple(itertools.product(("cloud", "amd64"), (1, 4), ("256M", "5G"), ("vmlinux", "bzImage")))
# Five boots in which every pair of values meets; the rest runs with the slow tests.
PAIRS = {
    ("cloud", 1, "256M", "vmlinux"), ("cloud", 4, "5G", "bzImage"), ("amd64", 1, "5G", "bzImage"),
    ("amd64", 4, "256M", "bzImage"), ("amd64", 4, "5G", "vmlinux"),
}
# QEMU's emulated SVM does not intercept XSETBV, so L1's KVM never learns XCR0 and CPUID leaf 0xd keeps the
# size of the legacy area. Seen under QEMU in the same L1 too; the trace that follows belongs to it.
KNOWN = re.compile(r"XSAVE consistency problem.*?---\[ end trace [^\n]*", re.DOTALL)
BAD = re.compile(r"ACPI (BIOS )?(Error|Warning|Exception)|ACPI: .*(error|invalid)|WARNING:|BUG:|Call Trace|"
                 r"[Ff]irmware [Bb]ug|Oops|soft lockup|hung task|rcu: .*stall|irq \d+: nobody cared")


def _parameters() -> list[object]:
    return [pytest.param(*case, marks=() if case in PAIRS else pytest.mark.slow) for case in EVERY]


def complaints(guest: Linux) -> list[str]:
    """Return the lines of the guest's kernel log that should not be there."""
    # Filtered in the guest first: each 16 bytes over hvc0 cost a round trip.
    pattern = "ACPI.*[Ee]rror|ACPI.*[Ww]arning|ACPI.*[Ee]xception|ACPI.*invalid|WARNING:|BUG|Call Trace|[Bb]ug|" \
              "Oops|lockup|hung task|stall|nobody cared|XSAVE consistency|end trace|cut here"
    text = KNOWN.sub("", guest.run(f"dmesg | grep -E '{pattern}'; true"))
    return [line for line in text.splitlines() if BAD.search(line)]


def check_processor_and_memory(guest: Linux, cpus: int, mebibytes: int) -> None:
    """The guest has all its vCPUs, and its memory less what the kernel keeps."""
    assert int(guest.run("nproc")) == cpus
    found = re.search(r"MemTotal:\s+(\d+) kB", guest.run("grep MemTotal /proc/meminfo"))
    assert found is not None
    total = int(found[1]) // 1024
    assert mebibytes * 0.75 < total <= mebibytes, f"MemTotal is {total} MiB of {mebibytes}"


def check_devices(guest: Linux) -> None:
    """Console, disk and rng are in their slots, bound to their drivers, with MSI-X."""
    functions = dict(line.split(" ", 1) for line in guest.run("lspci").splitlines())
    assert set(functions) == {"00:00.0", "00:01.0", "00:02.0", "00:03.0"}
    assert functions["00:00.0"].startswith("0600")
    assert functions["00:01.0"].endswith("1af4:1043")
    assert functions["00:02.0"].endswith("1af4:1042")
    assert functions["00:03.0"].endswith("1af4:1044")
    drivers = guest.run("for d in /sys/bus/virtio/devices/*; do basename $(readlink $d/driver); done").split()
    assert sorted(drivers) == ["virtio_blk", "virtio_console", "virtio_rng"]
    assert int(guest.run("grep -c MSI /proc/interrupts")) >= 6


def check_rng_and_serial(guest: Linux) -> None:
    """The RNG gives what it is asked for, fresh each time; both consoles carry text."""
    assert "virtio_rng" in guest.run("cat /sys/class/misc/hw_random/rng_current")
    first, second = (guest.run("dd if=/dev/hwrng bs=32 count=1 2>/dev/null | sha256sum") for _ in range(2))
    assert first != second
    assert guest.run("dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c").strip() == "256"
    guest.run("echo from-the-guest-to-ttyS0 > /dev/ttyS0")
    assert "from-the-guest-to-ttyS0" in guest.serial()


@pytest.mark.parametrize(("flavour", "cpus", "memory", "image"), _parameters())
def test_boot(flavour: str, cpus: int, memory: str, image: str, tmp_path: Path) -> None:
    path = disk.make(tmp_path / "disk.img")
    with Linux(flavour, image=image, cpus=cpus, memory=memory, disks=[f"path={path}"]) as guest:
        version = (kernels() / flavour / "version").read_text().strip()
        assert f"Linux version {version} " in guest.run("cat /proc/version")
        check_processor_and_memory(guest, cpus, 256 if memory == "256M" else 5 * 1024)
        check_devices(guest)
        check_rng_and_serial(guest)
        digest = disk.write_and_read(guest)
        assert complaints(guest) == []
        assert guest.poweroff() == 0
        guest.await_end()
    assert disk.digest_on_host(path) == digest


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [2, 8])
def test_boot_with_more_vcpus(cpus: int) -> None:
    with Linux("cloud", cpus=cpus, memory="1G") as guest:
        check_processor_and_memory(guest, cpus, 1024)
        assert guest.run("grep -c ^processor /proc/cpuinfo").strip() == str(cpus)
        assert complaints(guest) == []
        assert guest.poweroff() == 0


def test_boot_without_msi(tmp_path: Path) -> None:
    """With pci=nomsi every interrupt is a level-triggered INTx line through _PRT and the IOAPIC."""
    path = disk.make(tmp_path / "disk.img")
    with Linux("cloud", cmdline="pci=nomsi", disks=[f"path={path}"]) as guest:
        interrupts = guest.run("grep -E 'virtio|MSI' /proc/interrupts")
        assert "MSI" not in interrupts
        assert len(re.findall(r"IO-APIC +\d+-fasteoi +virtio\d", interrupts)) >= 1
        digest = disk.write_and_read(guest)
        assert guest.run("dd if=/dev/hwrng bs=64 count=4 2>/dev/null | wc -c").strip() == "256"
        assert complaints(guest) == []
        assert guest.poweroff() == 0
    assert disk.digest_on_host(path) == digest
