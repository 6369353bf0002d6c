"""The guest itself, shown right under QEMU: each test passes there, and fails when what it checks is broken."""

from __future__ import annotations

import re
import socket
import time
import zlib
from pathlib import Path

import pytest

from tests.debian import Missing, need
from tests.native.guest import GuestResult, build, parse
from tests.native.qemu import run_qemu, start_qemu

try:
    need("qemu-system-x86_64", "qemu-system-x86")
    _lacking = ""
except Missing as missing:
    _lacking = str(missing)
pytestmark = pytest.mark.skipif(bool(_lacking), reason=_lacking)

# DMA to the device's own BAR, or to the local APIC, upsets QEMU itself.
QEMU_SKIPS = "skip=address-bar,rings-bar,address-lapic"
CONSOLE = ["-device", "virtio-serial-pci,disable-legacy=on", "-device", "virtconsole,chardev=con"]


def blk(cmdline: str, tmp_path: Path, disk: Path, **options: object) -> GuestResult:
    """Run one test with one disk and expect success."""
    return run_qemu(cmdline, tmp_path, disks=[disk], **options).check()  # type: ignore[arg-type]


def test_build_is_cached_and_has_the_pvh_note() -> None:
    elf = build()
    assert build() == elf
    assert b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0" in elf.read_bytes()


def test_parse_takes_the_last_value_and_the_reason() -> None:
    result = parse("a=1\r\na=2\r\nnoise\nresult=fail reason=x = y\n")
    assert (result.values, result.ok, result.reason) == ({"a": "2"}, False, "x = y")


@pytest.mark.parametrize("memory", [64, 256, 5120])
def test_boot_reports_memory_and_module(tmp_path: Path, memory: int) -> None:
    module = tmp_path / "module"
    module.write_bytes(b"x" * 12345)
    said = run_qemu("test=boot", tmp_path, memory=memory, initramfs=module).check()
    assert said.number("module.size") == 12345
    assert memory - 2 < said.number("memory.ram") >> 20 <= memory
    assert "APIC" in said.values["acpi.tables"]


def test_boot_fails_when_the_memory_size_is_not_the_expected_one(tmp_path: Path) -> None:
    said = run_qemu("test=boot ram=268435456", tmp_path, memory=64)
    assert not said.ok
    assert "memory map" in said.reason


def test_unknown_test_and_exceptions_end_in_a_failure(tmp_path: Path) -> None:
    assert run_qemu("test=none", tmp_path).reason == "unknown test none"
    assert "exception 14" in run_qemu("test=script script=fill,0xffff800000000000,1,1", tmp_path).reason


@pytest.mark.parametrize("how", ["irq=msix", "irq=intx", "irq=poll", "irq=msix idle=spin"])
@pytest.mark.parametrize("ring", ["", "indirect=0", "event_idx=0 segs=3", "qsize=16 indirect=0 event_idx=0"])
def test_blk_write_verifies_every_block(tmp_path: Path, disk: Path, how: str, ring: str) -> None:
    said = blk(f"test=blk-write count=300 depth=4 reads=20 flush=37 {how} {ring}", tmp_path, disk)
    assert said.number("requests") == 300
    assert said.number("verified.0") > 150
    assert said.number("errors") == 0


def test_blk_verify_finds_what_another_boot_wrote_and_one_flipped_byte(tmp_path: Path, disk: Path) -> None:
    load = "count=200 depth=1 span=2M seed=9"
    written = blk(f"test=blk-write {load}", tmp_path, disk)
    again = blk(f"test=blk-verify {load}", tmp_path, disk)
    assert again.number("verified.0") == written.number("verified.0") > 100
    blocks = disk.read_bytes()[:2 << 20]
    block = next(index for index in range(512) if any(blocks[index * 4096:(index + 1) * 4096]))
    assert int.from_bytes(blocks[block * 4096:block * 4096 + 8], "little") == block
    with disk.open("r+b") as file:
        file.seek(block * 4096 + 1000)
        file.write(bytes([blocks[block * 4096 + 1000] ^ 1]))
    broken = run_qemu(f"test=blk-verify {load}", tmp_path, disks=[disk])
    assert broken.reason.startswith(f"corrupt: block {block} ")


def test_blk_write_notices_a_disk_that_forgets(tmp_path: Path, disk: Path) -> None:
    said = run_qemu("test=blk-write count=50 depth=2", tmp_path, disks=[disk], extra=[
        "-blockdev", "driver=null-co,size=67108864,read-zeroes=on,node-name=null",
        "-device", "virtio-blk-pci,disable-legacy=on,drive=null,addr=0x10"])
    assert said.check().ok  # the first disk is a good one
    said = run_qemu("test=blk-write count=50 depth=2 disk=1", tmp_path, disks=[disk], extra=[
        "-blockdev", "driver=null-co,size=67108864,read-zeroes=on,node-name=null",
        "-device", "virtio-blk-pci,disable-legacy=on,drive=null,addr=0x10"])
    assert said.reason.startswith("corrupt: block")


def test_blk_operations_and_masked_vectors(tmp_path: Path, disk: Path) -> None:
    said = blk("test=blk-ops,msix,blk-info", tmp_path, disk)
    assert said.values["serial"] == "disk0"
    assert said.number("sectors") == (64 << 20) // 512
    assert said.number("delivered") == 1


def test_a_moved_bar_keeps_its_queues(tmp_path: Path, disk: Path) -> None:
    assert blk("test=blk-move,blk-write count=100", tmp_path, disk).number("moved_requests") == 32


@pytest.mark.parametrize("op", ["randread", "write"])
def test_blk_bench_reports_latency(tmp_path: Path, disk: Path, op: str) -> None:
    said = blk(f"test=blk-bench op={op} count=500 depth=8", tmp_path, disk)
    assert said.number("writes" if op == "write" else "reads") == 500
    order = [said.number(f"lat_{what}_ns") for what in ("min", "p50", "p99", "max")]
    assert order == sorted(order)
    assert order[0] > 0
    assert said.number("iops") > 0


def test_several_queues_are_driven_by_several_cpus(tmp_path: Path, disk: Path) -> None:
    said = blk("test=smp,blk-write smp=1 queues=2 count=200 depth=4", tmp_path, disk, cpus=2, queues=2)
    assert said.number("cpus_online") == 2
    assert said.number("requests") == 400
    assert said.number("verified.0") > 100
    assert said.number("verified.1") > 100


def test_rng_is_random(tmp_path: Path) -> None:
    assert run_qemu("test=rng bytes=8192", tmp_path).check().number("bytes") == 8192


def test_rng_notices_a_source_of_zeroes(tmp_path: Path) -> None:
    said = run_qemu("test=rng dev=1", tmp_path, extra=[
        "-object", "rng-random,filename=/dev/zero,id=zero",
        "-device", "virtio-rng-pci,disable-legacy=on,rng=zero,addr=0x10"])
    assert said.reason.startswith("not random")


def test_console_writes_and_echoes(tmp_path: Path) -> None:
    path = str(tmp_path / "con")
    with start_qemu("test=console text=hello_host lines=2", tmp_path, extra=[
            "-chardev", f"socket,id=con,path={path},server=on,wait=off", *CONSOLE]) as running, \
            socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        deadline = time.monotonic() + 30
        while client.connect_ex(path):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        client.sendall(b"one\ntwo words\n")
        got = b""
        while not got.endswith(b"TWO WORDS\n"):
            got += client.recv(100)
        said = running.finish().check()
    assert re.search(rb"ONE\nTWO WORDS\n$", got)
    assert (said.values["line.0"], said.values["line.1"]) == ("ONE", "TWO WORDS")


def test_script_reads_writes_and_expects(tmp_path: Path, disk: Path) -> None:
    script = tmp_path / "script"
    script.write_text("alloc buf 4096\nw64 $buf 0x1122334455667788  # a comment\nr16 $buf+2\nexpect 0x5566\n"
                      "set n 0\nloop 3\nset n $n+2\nend\nset last $n\nexpect 6\ncr32 1 0\nexpect 0x10421af4\n"
                      "r16 1.common+18\nexpect 1\ntest blk-info\nsay done\n")
    said = run_qemu("test=script", tmp_path, disks=[disk], initramfs=script).check()
    assert said.values["script.3"] == "0x5566"
    assert said.values["say"] == "done"
    assert said.values["serial"] == "disk0"
    wrong = run_qemu("test=script script=set,last,5;expect,6", tmp_path)
    assert wrong.reason == "script line 2: expect 0x6, saw 0x5"


@pytest.mark.parametrize("kind", ["blk", "rng", "console"])
def test_hostile_rings_are_survived(tmp_path: Path, disk: Path, kind: str) -> None:
    said = run_qemu(f"test=hostile type={kind} settle=200 {QEMU_SKIPS}", tmp_path, disks=[disk], extra=[
        "-chardev", "null,id=con", *CONSOLE]).check()
    outcomes = said.all("hostile.")
    assert len(outcomes) == said.number("cases") == 44
    assert outcomes["loop-self"] == outcomes["next-wild"] == outcomes["head-wild"] == "needs-reset"


def test_sweeps(tmp_path: Path, disk: Path) -> None:
    said = run_qemu("test=sweep,portsweep,blk-ops dense=16 to=0x100", tmp_path, disks=[disk]).check()
    assert said.number("sweep.1") > 1000
    said = run_qemu("test=cfgsweep,blk-ops slot=1 limit=256", tmp_path, disks=[disk]).check()
    assert said.number("cfgsweep.1") > 2000


@pytest.mark.parametrize("how", ["reset", "i8042", "triple"])
def test_boots_are_counted_across_resets(tmp_path: Path, disk: Path, how: str) -> None:
    said = blk(f"test=blk-boots boots=3 end={how}", tmp_path, disk)
    assert re.findall(r"^boot=(\d+)", said.text, re.M) == ["1", "2", "3"]


def test_tcg_runs_the_same_guest(tmp_path: Path, disk: Path) -> None:
    said = run_qemu("test=boot,blk-write,rng count=100 depth=4", tmp_path, disks=[disk], accel="tcg").check()
    assert said.number("requests") == 100


def test_pattern_and_crc_are_what_the_host_computes(tmp_path: Path, disk: Path) -> None:
    blk("test=blk-write count=1 span=512K seed=5", tmp_path, disk)
    block = next(data for index in range(128) if any(data := disk.read_bytes()[index * 4096:(index + 1) * 4096]))
    place, version, seed = (int.from_bytes(block[at:at + 8], "little") for at in (0, 8, 16))
    state = seed ^ place << 20 ^ version << 44
    words = []
    for _ in range(512):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        word = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        words.append(word ^ word >> 31)
    assert block[24:] == b"".join(word.to_bytes(8, "little") for word in words[3:])
    assert zlib.crc32(block)
