"""A guest that attacks: one device may need a reset, but no process ends, grows or fills a log, and all others work.

ROWS lists the classes of attack that the devices and registers of today have to stand, and the tests of each.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.mem import layout
from cellvisor.core.virtio import transport
from tests.fakes.real_core import rss
from tests.native import cellvisor
from tests.native.conftest import Vm
from tests.native.guest import make_disk, needs_kvm
from tests.native.steer import Steer, steer

ROOT = Path(__file__).resolve().parents[2]
GROWTH = 24  # MiB that a process may grow by
LOGGED = 200_000  # bytes that an attack may have written down

NATIVE, HOSTILE = "native/test_native_hostile.py", "native/test_hostile_guest.py"
NET = "native/test_net_hostile.py"
PCI, REGISTERS = "unit/test_virtio_pci_hostile.py", "unit/test_virtio_pci_registers.py"
RING = "unit/test_ring_hostile.py"
ROWS: dict[str, tuple[str, ...]] = {
    "queue registers changed after DRIVER_OK": (
        f"{NATIVE}::test_bad_rings_end_in_needs_reset_and_a_reset_heals",  # live-registers, queue-sizes
        f"{REGISTERS}::test_queue_registers_are_frozen_by_enable_and_by_driver_ok",
        f"{REGISTERS}::test_queue_sizes_that_make_no_sense_are_ignored", f"{HOSTILE}::test_a_second_cpu"),
    "I/O completes after a reset": (
        f"{NATIVE}::test_bad_rings_end_in_needs_reset_and_a_reset_heals",  # reset-in-flight
        "unit/test_devices_rng_console.py::test_rng_that_was_reset_forgets_what_waits",
        f"{HOSTILE}::test_resets_with_requests_in_flight"),
    "descriptor loops, next out of range, chains longer than the queue": (
        f"{RING}::test_hostile_ring", f"{RING}::test_work_is_bounded_by_the_queue_size",
        f"{NATIVE}::test_bad_rings_end_in_needs_reset_and_a_reset_heals",
        "contract/test_catalog.py::test_hostile_rings_end_in_needs_reset"),
    "avail.idx jumps, head beyond the queue": (
        f"{RING}::test_hostile_ring", f"{NATIVE}::test_bad_rings_end_in_needs_reset_and_a_reset_heals"),
    "unbounded outstanding requests": (f"{HOSTILE}::test_one_head_again_and_again", f"{RING}::test_hostile_ring"),
    "lengths and addresses at every edge": (
        f"{RING}::test_hostile_ring", f"{RING}::test_any_ring_is_served_or_refused",
        f"{NATIVE}::test_bad_rings_end_in_needs_reset_and_a_reset_heals"),
    "notify with a bad queue number": (f"{HOSTILE}::test_every_value_into_the_doorbell",),
    "header of the wrong length, split anywhere": (
        "unit/test_devices_blk.py::test_request_without_header_or_status_breaks_the_rules",
        "unit/test_devices_blk.py::test_any_split_of_header_data_and_status"),
    "source and destination of different length": ("unit/test_devices_blk.py::test_refused_requests_change_nothing",),
    "frames and commands of the wrong length, offloads that lie": (
        f"{NET}::test_frames_and_commands_that_make_no_sense",),
    "DMA to anything but RAM": (
        f"{NATIVE}::test_bad_rings_end_in_needs_reset_and_a_reset_heals",  # *-bar, *-lapic, *-ecam
        "unit/test_memory_view.py::test_pieces_cross_ranges_and_at_does_not"),
    "cached translation across a change of regions": (
        f"{NATIVE}::test_moving_a_live_bar_moves_its_doorbells", f"{PCI}::test_two_devices_with_wandering_bars"),
    "register accesses of every size and offset": (
        f"{NATIVE}::test_every_access_to_every_bar", f"{NATIVE}::test_every_access_to_configuration_space",
        f"{NATIVE}::test_every_port", f"{PCI}::test_every_access_to_bar_0", f"{PCI}::test_every_access_to_config_space",
        f"{PCI}::test_every_access_to_the_config_ports", f"{HOSTILE}::test_every_register_of_the_board",
        f"{HOSTILE}::test_garbage_in_the_msix_table"),
    "selectors of the hotplug registers": (
        "unit/test_slots.py::test_no_guest_gets_rid_of_a_device_by_itself",
        "unit/test_slots.py::test_other_widths_do_nothing", f"{HOSTILE}::test_every_register_of_the_board"),
    "FIFOs of the legacy devices": (
        "unit/test_board_serial.py::test_any_access_is_safe",
        "unit/test_board_serial.py::test_receive_is_bounded_and_says_when_there_is_room",
        "unit/test_board_legacy.py::test_any_cmos_write_is_safe",
        "unit/test_board_legacy.py::test_keyboard_ports_take_any_size"),
    "host formats": (f"{HOSTILE}::test_a_raw_disk_stays_raw",),
    "SCSI passthrough, other types of request": ("unit/test_devices_blk.py::test_refused_requests_change_nothing",),
    "growth of logs and serial output": (
        f"{HOSTILE}::test_floods_of_output", "unit/test_board_serial.py::test_flood_is_bounded_and_counted",
        "unit/test_board_legacy.py::test_debug_console_is_bounded", f"{HOSTILE}::test_resets_without_end",
        f"{HOSTILE}::test_config_writes_without_end"),
    "double fetch": (f"{HOSTILE}::test_a_second_cpu", f"{NET}::test_a_second_cpu"),
    "a malicious back end": ("unit/test_hostile_worker.py", "unit/test_hostile_worker_descriptors.py"),
    "wrap-around of ring arithmetic": ("unit/test_ring_crash.py::test_kill_at_every_store", "unit/test_model_ring.py"),
}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_its_tests(row: str) -> None:
    for where in ROWS[row]:
        file, _, name = where.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not name or name in names, f"{row}: there is no {where}"


def processes(vmm: Steer) -> dict[str, int]:
    listed = {str(one["role"]): int(one["pid"])
              for one in vmm.client.call("info", processes=True)["processes"] if one["role"] != "worker"}
    return listed | {one["id"]: int(one["pid"]) for one in vmm.client.call("devices")["devices"]}


@contextmanager
def besieged(vm: Vm, cmdline: str, **options: Any) -> Iterator[Steer]:
    """Run an attack to its end; afterwards the same processes live, none has grown, and the log is short."""
    with steer(vm, f"{cmdline} end=stay", **{"console": "null", **options}) as vmm:
        before = processes(vmm)
        at_first = {name: rss(pid) for name, pid in before.items()}
        log = next((Path(cellvisor.runtime_dir(vm.where)) / "cellvisor").glob("*/log"))
        yield vmm
        text = vmm.running.wait_for("result=", 200)
        assert "result=ok" in text, text[-2000:]
        assert processes(vmm) == before
        assert vmm.client.call("ping")["pid"]
        lost = {"device.died", "device.parked", "vm.crashed", "device.expelled"} & {
            event["event"] for event in vmm.events(0)}
        assert not lost
        grown = {name: rss(pid) - at_first[name] for name, pid in before.items()}
        assert max(grown.values()) < GROWTH, grown
        assert log.stat().st_size < LOGGED


pytestmark = [pytest.mark.kvm, needs_kvm]
SERVED = "blk-ops,rng"  # what the guest does after its attack


@pytest.mark.parametrize("kind", ["blk", "rng", "console"])
@pytest.mark.parametrize("registers", [0, 1])
def test_a_second_cpu(vm: Vm, disk: Path, kind: str, registers: int) -> None:
    """It rewrites descriptors, tables, the ring, headers and registers while they are being read."""
    attack = f"test=race,{SERVED} type={kind} ms=2000 registers={registers} seed={os.getpid()}"
    with besieged(vm, attack, disks=[disk], cpus=2) as vmm:
        pass
    assert "race.flips=0\n" not in vmm.running.text


def test_one_head_again_and_again(vm: Vm, disk: Path) -> None:
    with besieged(vm, f"test=resubmit,{SERVED} type=blk count=3000", disks=[disk]):
        pass


def test_every_value_into_the_doorbell(vm: Vm, disk: Path) -> None:
    with besieged(vm, f"test=notify,{SERVED} type=blk", disks=[disk]):
        pass


@pytest.mark.parametrize("kind", ["blk", "rng"])
def test_resets_without_end(vm: Vm, disk: Path, kind: str) -> None:
    with besieged(vm, f"test=toggle,{SERVED} type={kind} count=300", disks=[disk]):
        pass


def test_resets_with_requests_in_flight(vm: Vm, disk: Path) -> None:
    again = ",".join(["hostile"] * 40)
    with besieged(vm, f"test={again},{SERVED} type=blk case=reset-in-flight", disks=[disk]):
        pass


@pytest.mark.parametrize("port", [0x3F8, 0xE9])
def test_floods_of_output(vm: Vm, disk: Path, port: int) -> None:
    """More would take too long; the unit tests in ROWS send gigabytes' worth."""
    with besieged(vm, f"test=flood,{SERVED} bytes=20K port={port:#x}", disks=[disk]) as vmm:
        pass
    assert vmm.running.text.count("flooded=20480") == 1


def script(vm: Vm, *lines: str) -> Path:
    path = vm.where / "script"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_config_writes_without_end(vm: Vm, disk: Path) -> None:
    """Each one is a message to the worker, which nobody waits for."""
    flood = script(vm, "test blk-info", "set at 2.config", "loop 5000", "w8 $at 1", "w32 $at+32 0x33333333", "end")
    with besieged(vm, f"test=script,{SERVED}", disks=[disk], initramfs=flood):
        pass


def test_garbage_in_the_msix_table(vm: Vm, disk: Path) -> None:
    """Under a live device, whose interrupts are enabled meanwhile."""
    lines = ["test blk-ops", f"set at 2.bar0+{transport.MSIX_TABLE}"]
    for garbage in (0, 0xFFFFFFFF, 0xFEE00FFC, 0xDEADBEEF, 0xFEE0000C, 0x33333333):
        lines += [f"w{width} $at+{offset} {garbage}" for offset in range(0, 40, 4) for width in (8, 16, 32, 64)
                  if offset % 16 != 8]  # the data's delivery mode could stop this CPU
    with besieged(vm, f"test=script,{SERVED}", disks=[disk], initramfs=script(vm, *lines)):
        pass


# After each access to the UART the guest must be able to speak again.
SPEAK = ("out8 0x3fb 3", "out8 0x3fc 11", "out8 0x3f9 0", "out8 0x3fa 0")
VALUES = {8: (0, 0xFF, 0x55), 16: (0, 0xFFFF, 0x3333), 32: (0, 0xFFFFFFFF, 0x33333333), 64: (0, (1 << 64) - 1)}


def port_lines(first: int, last: int, avoid: int = -1) -> list[str]:
    lines = []
    for port in range(first - 3, last + 3):
        for width in (8, 16, 32):
            for value in VALUES[width]:
                touches = range(port, port + width // 8)
                if avoid in touches and (value >> 8 * (avoid - port) & 0xFF) in (1, 0x34, 0xFE):
                    continue
                lines += [f"out{width} {port:#x} {value}", *(SPEAK if first == layout.PORT_COM1 else ())]
            lines.append(f"in{width} {port:#x}")
            lines += SPEAK if first == layout.PORT_COM1 else ()
    return lines


def page_lines(page: int) -> list[str]:
    offsets = [*range(0x21), *range(0xFF8, 0x1000)]
    return [f"{what}{width} {page + offset:#x}{value}" for offset in offsets for width in (8, 16, 32, 64)
            for what, value in (("r", ""), *(("w", f" {value}") for value in VALUES[width]))]


BLOCKS: dict[str, list[str]] = {
    "serial": port_lines(layout.PORT_COM1, layout.PORT_COM1 + 8),
    "rtc": port_lines(layout.PORT_RTC, layout.PORT_RTC + 2),
    "pm": port_lines(layout.PORT_PM, layout.PORT_PM + 12, avoid=layout.PORT_PM),
    "i8042": port_lines(0x60, 0x65, avoid=0x64),
    "ged": page_lines(layout.GED),
    "pci-hotplug": page_lines(layout.PCI_HOTPLUG),
    "cpu-hotplug": page_lines(layout.CPU_HOTPLUG),
    "memory-hotplug": page_lines(layout.MEMORY_HOTPLUG),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_register_of_the_board(vm: Vm, disk: Path, block: str) -> None:
    sweep = script(vm, *BLOCKS[block])
    with besieged(vm, f"test=script,{SERVED}", disks=[disk], initramfs=sweep) as vmm:
        pass
    assert f"script.lines={len(BLOCKS[block]) + 1}\n" in vmm.running.text


def test_a_raw_disk_stays_raw(vm: Vm) -> None:
    """An image whose first bytes say qcow2, with a backing file and another size, is as long as its file."""
    disk = make_disk(vm.where / "disk.raw", 8 << 20)
    with disk.open("r+b") as image:
        image.write(b"QFI\xfb\0\0\0\x03" + (0x70).to_bytes(8, "big") + (11).to_bytes(4, "big") + bytes(4)
                    + (1 << 40).to_bytes(8, "big") + bytes(64) + b"/etc/passwd")
    said = vm("test=blk-info", disks=[disk]).check()
    assert said.number("sectors") == (8 << 20) // 512
