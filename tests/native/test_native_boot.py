"""The native guest boots under cellvisor: PVH hand-over, ACPI, CPUs, PCI, time, and every way to end."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.native.conftest import Vm
from tests.native.guest import needs_kvm

pytestmark = [pytest.mark.kvm, needs_kvm]
MIB = 1 << 20


@pytest.mark.parametrize("memory", [64, 256, 5120])
def test_boot_hands_over_memory_module_and_cmdline(vm: Vm, tmp_path: Path, memory: int) -> None:
    module = tmp_path / "module"
    module.write_bytes(b"x" * 12345)
    said = vm("test=boot mark=1", memory=memory, initramfs=module).check()
    assert said.number("module.size") == 12345
    assert memory * MIB - MIB <= said.number("memory.ram") <= memory * MIB
    assert said.values["cmdline"] == "test=boot mark=1"


def test_memory_above_the_hole_begins_at_4_gib(vm: Vm) -> None:
    said = vm("test=boot", memory=5120).check()
    ram = [value for key, value in said.all("memory.").items() if key.isdigit() and value.endswith("type 1")]
    assert any(value.startswith("0x100000000+0x80000000 ") for value in ram), ram


def test_acpi_is_hardware_reduced_and_complete(vm: Vm) -> None:
    said = vm("test=boot", cpus=3).check()
    assert said.number("acpi.hw_reduced") == 1
    assert said.number("acpi.cpus") == 3
    assert said.number("acpi.ecam") == 0xE8000000
    assert said.number("acpi.pm_timer") == 0x608
    assert {"FACP", "APIC", "MCFG"} <= set(said.values["acpi.tables"].split(","))


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_every_cpu_starts_and_works(vm: Vm, cpus: int) -> None:
    assert vm(f"test=smp cpus={cpus}", cpus=cpus).check().number("cpus_online") == cpus


@pytest.mark.parametrize("way", ["cf8", "ecam"])
def test_pci_lists_the_default_devices_in_slot_order(vm: Vm, disk: Path, way: str) -> None:
    said = vm(f"test=pci pci={way}", disks=[disk], console="null").check()
    ids = {int(key.split(".")[0]): value.split()[0] for key, value in said.all("pci.").items() if "bar" not in key}
    assert ids == {0: "8086:d57", 1: "1af4:1043", 2: "1af4:1042", 3: "1af4:1044"}
    assert said.values["pci.2.0.bar0"].split("+")[1] == "0x80000 wide"


def test_a_failing_guest_is_told_apart(vm: Vm) -> None:
    said = vm("test=boot ram=1")
    assert not said.ok
    assert "memory map" in said.reason
    assert said.status == 0  # the guest powered off in order


@pytest.mark.parametrize("how", ["reset", "i8042", "triple"])
def test_boots_are_counted_across_resets(vm: Vm, disk: Path, how: str) -> None:
    said = vm(f"test=blk-boots boots=3 end={how}", disks=[disk]).check()
    assert re.findall(r"^boot=(\d+)", said.text, re.M) == ["1", "2", "3"]


def test_two_resets_keep_every_device_working(vm: Vm, disk: Path) -> None:
    said = vm("test=blk-ops,rng,blk-boots boots=3 end=reset", disks=[disk]).check()
    assert said.text.count("ones_permille=") == 3


def test_sigterm_ends_a_running_vm(vm: Vm) -> None:
    running = vm.start("test=boot end=stay")
    running.wait_for("result=ok")
    running.process.terminate()
    running.process.wait(30)
