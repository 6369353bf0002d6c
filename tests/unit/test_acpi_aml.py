"""The AML encoder against encodings from the specification, the reference compiler and its interpreter."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from cellvisor.core.acpi import aml, resources
from cellvisor.core.acpi.aml import ARG, LOCAL, ref
from cellvisor.core.acpi.tables import table
from cellvisor.core.errors import Internal
from tests.debian import need


@pytest.mark.parametrize(("value", "encoded"), [
    (0, "00"), (1, "01"), (2, "0a02"), (0xFF, "0aff"), (0x100, "0b0001"), (0xFFFF, "0bffff"),
    (0x10000, "0c00000100"), (0xFFFFFFFF, "0cffffffff"), (1 << 32, "0e0000000001000000"),
    (2**64 - 1, "0effffffffffffffff"),
])
def test_integers_take_the_fewest_bytes(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize(("path", "encoded"), [
    ("STA", b"STA_"), ("\\_SB", b"\\_SB_"), ("\\", b"\\\0"), ("^PWRB", b"^PWRB"), ("^^A", b"^^A___"),
    ("\\_SB.PC00", b"\\\x2e_SB_PC00"), ("A.B.C", b"\x2f\x03A___B___C___"),
])
def test_names(path: str, encoded: bytes) -> None:
    assert ref(path) == encoded


@pytest.mark.parametrize("path", ["TOOLONG", "lower", "1ABC", "A..B", "A.", "\\^A", "A B"])
def test_names_that_are_none(path: str) -> None:
    with pytest.raises(Internal, match="AML name"):
        ref(path)


@pytest.mark.parametrize(("size", "encoded"), [
    (0, "01"), (62, "3f"), (63, "4104"), (4093, "4f ff"), (4094, "810001"), (0xFFFFF - 3, "8fffff"),
    (0xFFFFF - 2, "c1000001"), (0xFFFFFFF - 4, "cfffffff"),
])
def test_package_lengths_count_themselves(size: int, encoded: str) -> None:
    assert aml.length_of(size) == bytes.fromhex(encoded)


def test_package_length_that_is_too_long() -> None:
    with pytest.raises(Internal, match="too long"):
        aml.length_of(1 << 28)


def test_field_lengths_do_not_count_themselves() -> None:
    assert aml.length_of(63, counts_itself=False).hex() == "3f"
    assert aml.length_of(64, counts_itself=False).hex() == "4004"


def test_identifiers() -> None:
    assert aml.eisa_id("PNP0A08").hex() == "0c41d00a08"
    assert aml.to_uuid("33DB4D5B-1FF7-401C-9657-7441C03DD766")[4:].hex() == "5b4ddb33f71f1c4096577441c03dd766"
    for wrong in ("ACPI0007", "pnp0a08", "PNP0A0G"):
        with pytest.raises(Internal):
            aml.eisa_id(wrong)


def test_values_that_have_no_encoding() -> None:
    for value in (-1, 1 << 64):
        with pytest.raises(Internal):
            aml.integer(value)
    with pytest.raises(Internal):
        aml.string("Grüße")
    with pytest.raises(Internal):
        resources.memory32_window(0xC0000000, 0)
    with pytest.raises(Internal):
        aml.package(*range(256))


def sample() -> bytes:
    """One SSDT in the style of a hotplug controller, with every operator of the encoder in it."""
    template = resources.template(
        resources.bus_numbers(0, 0), resources.io(0xCF8, 0xCF8, 8), resources.io_window(0xD00, 0xFFFF),
        resources.memory32_fixed(0xE8000000, 0x100000), resources.memory32_fixed(0x1000, 16, writable=False),
        resources.memory32_window(0xC0000000, 0x28000000),
        resources.memory64_window(1 << 32, 1 << 40, resources.PREFETCHABLE),
        resources.interrupt(13), resources.interrupt(4, 5, edge=True, active_low=True, shared=True, wake=True),
        resources.register(aml.SYSTEM_IO, 8, 0x600, 1),
    )
    count = aml.while_(
        aml.less(LOCAL[0], 10),
        aml.increment(LOCAL[0]),
        aml.if_(aml.equal(aml.and_(LOCAL[0], 1), 0), aml.continue_()),
        aml.if_(aml.greater(LOCAL[0], 7), aml.break_()),
        aml.add(LOCAL[1], LOCAL[0], LOCAL[1]),
    )
    walk = (
        aml.store(aml.package(10, 20, 0x3000, "four"), LOCAL[2]),
        aml.store(aml.deref(aml.index(LOCAL[2], 2)), LOCAL[3]),
        aml.if_(aml.logical_not(aml.equal(aml.size_of(LOCAL[2]), 4)), aml.return_(0)),
        aml.return_(aml.or_(LOCAL[3], LOCAL[1])),
    )
    edit = (
        aml.name("BUFF", aml.buffer(b"\0" * 24)),
        aml.create_field("dword", ref("BUFF"), 0, "DWRD"),
        aml.create_field("qword", ref("BUFF"), 8, "QWRD"),
        aml.create_field("word", ref("BUFF"), 16, "WORD"),
        aml.create_field("byte", ref("BUFF"), 18, "BYT0"),
        aml.create_field("bit", ref("BUFF"), 8 * 19 + 3, "BIT3"),
        aml.store(0x11223344, ref("DWRD")),
        aml.subtract(aml.shift_left(1, 40), 1, ref("QWRD")),
        aml.shift_right(ARG[0], 4, ref("WORD")),
        aml.not_(0, ref("BYT0")),
        aml.store(aml.ONES, ref("BIT3")),
        aml.return_(ref("BUFF")),
    )
    arithmetic = (
        aml.multiply(ARG[0], 3, LOCAL[0]),
        aml.xor(LOCAL[0], 0xFF, LOCAL[0]),
        aml.find_set_right_bit(aml.shift_left(1, 5), LOCAL[1]),
        aml.decrement(LOCAL[1]),
        aml.if_(
            aml.logical_and(LOCAL[0], aml.logical_or(aml.ZERO, LOCAL[1])),
            aml.return_(aml.concatenate(LOCAL[0], LOCAL[1])),
        ),
        aml.else_(aml.return_(aml.to_integer("17"))),
    )
    controller = aml.device(
        "PHPR",
        aml.name("_HID", aml.eisa_id("PNP0A06")),
        aml.name("_CRS", template),
        aml.mutex("BLCK"),
        aml.event("EVNT"),
        aml.op_region("PCST", aml.SYSTEM_MEMORY, 0xFED01000, 16),
        aml.field("PCST", aml.DWORD_ACCESS, ("PCIU", 32), ("PCID", 32), ("", 8), ("B0EJ", 24), ("PSEG", 32),
                  rule=aml.WRITE_AS_ZEROS, lock=True),
        aml.method("PCEJ", 2,
                   aml.acquire("BLCK"), aml.store(ARG[1], ref("PSEG")),
                   aml.shift_left(1, ARG[0], ref("B0EJ")),
                   aml.release("BLCK"), aml.return_(0), serialized=True),
        aml.method("PCNT", 0, aml.sleep(1), aml.notify("S001", 3), aml.call("PCEJ", 1, 0), serialized=True),
        aml.device("S001", aml.name("_ADR", 0x10000), aml.method("_EJ0", 1, aml.call("PCEJ", 1, 0))),
        aml.alias("_HID", "HIDA"),
    )
    return aml.scope("\\_SB", controller) + b"".join((
        aml.method("CNT", 0, aml.store(0, LOCAL[0]), aml.store(0, LOCAL[1]), count, *walk),
        aml.method("EDIT", 1, *edit, serialized=True),
        aml.method("ARIT", 1, *arithmetic),
        aml.name("BIG", aml.package(*range(255))),
        aml.name("TEXT", "hello"),
    ))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("aml")
    (made / "sample.dat").write_bytes(table(b"SSDT", 2, sample()))
    return made


def test_the_reference_compiler_agrees_byte_for_byte(directory: Path) -> None:
    iasl = need("iasl", "acpica-tools")
    for command in ([iasl, "-d", "sample.dat"], [iasl, "-oa", "-of", "-p", "again", "sample.dsl"]):
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "0 Errors" in done.stdout
    assert (directory / "again.aml").read_bytes()[36:] == sample()


def execute(directory: Path, command: str, file: str = "sample.dat") -> str:
    done = subprocess.run([need("acpiexec", "acpica-tools"), "-b", f"{command};quit", file],
                          cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    text = done.stdout + done.stderr
    assert not re.search(r"ACPI (BIOS )?(Error|Warning)|Exception", text), text
    return text


def test_packages_of_any_number_of_elements(directory: Path) -> None:
    body = aml.name("LONG", aml.var_package(*range(1000, 1300))) + aml.method(
        "LAST", 0, aml.return_(aml.deref(aml.index(ref("LONG"), 299))))
    (directory / "long.dat").write_bytes(table(b"SSDT", 2, body))
    assert "[Integer] = 0000000000000513" in execute(directory, r"evaluate \LAST", "long.dat")


def test_loops_packages_and_references_compute(directory: Path) -> None:
    # 1 + 3 + 5 + 7, then 0x3000 or that
    assert "[Integer] = 0000000000003010" in execute(directory, r"evaluate \CNT")


def test_buffer_fields_write_where_they_say(directory: Path) -> None:
    text = execute(directory, r"evaluate \EDIT 0x1230")
    raw = bytes.fromhex("".join(re.findall(r"00[01]0: ((?:[0-9A-F]{2} )+)", text)))
    assert raw.hex() == "44332211" + "00000000" + "ffffffffff000000" + "2301" + "ff" + "08" + "00000000"


def test_arithmetic(directory: Path) -> None:
    text = execute(directory, r"evaluate \ARIT 0x10")
    raw = bytes.fromhex("".join(re.findall(r"0000: ((?:[0-9A-F]{2} )+)", text)))
    assert raw == (0x30 ^ 0xFF).to_bytes(8, "little") + (5).to_bytes(8, "little")
    assert "[Integer] = 0000000000000011" in execute(directory, r"evaluate \ARIT 0x55")


def test_mutex_regions_and_notify_run(directory: Path) -> None:
    text = execute(directory, r"evaluate \_SB.PHPR.PCNT")
    assert re.search(r"S001.*0x03|Notify.*S001", text), text
