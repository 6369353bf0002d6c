"""The tables as a guest parses them, and as ACPICA's compiler and interpreter judge them."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from cellvisor.core.abi import acpi as abi
from cellvisor.core.acpi.config import AcpiConfig
from cellvisor.core.acpi.tables import build_tables
from cellvisor.core.mem import layout
from tests.debian import need

MMIO64 = layout.mmio64_window(5 << 30)


def config(boot: int = 2, most: int = 4, *, com1: bool = True) -> AcpiConfig:
    return AcpiConfig(boot_vcpus=boot, max_vcpus=most, mmio64=MMIO64, com1=com1)


def tables(block: bytes, base: int = layout.ACPI_TABLES) -> dict[str, bytes]:
    """Follow RSDP, XSDT and FADT as a guest does, checking each checksum."""
    rsdp = block[:36]
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) & 0xFF == 0
    assert sum(rsdp) & 0xFF == 0
    found: dict[str, bytes] = {}

    def take(gpa: int) -> bytes:
        start = gpa - base
        size = struct.unpack_from("<I", block, start + 4)[0]
        raw = block[start:start + size]
        assert len(raw) == size
        assert sum(raw) & 0xFF == 0
        assert raw[10:16] == b"CELLVI"
        found[raw[:4].decode()] = raw
        return raw

    xsdt = take(struct.unpack_from("<Q", rsdp, 24)[0])
    for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
        take(gpa)
    take(struct.unpack_from("<Q", found["FACP"], 140)[0])
    return found


def iasl(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([need("iasl", "acpica-tools"), *arguments], cwd=cwd, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def evaluate(directory: Path, *commands: str) -> str:
    """Load the DSDT into ACPICA's interpreter and run commands of its debugger."""
    tool = need("acpiexec", "acpica-tools")
    done = subprocess.run([tool, "-b", ";".join((*commands, "quit")), "DSDT.dat"], cwd=directory,
                          capture_output=True, text=True, timeout=60, check=False)
    text = done.stdout + done.stderr
    assert not re.search(r"ACPI (BIOS )?(Error|Warning)|Exception", text), text
    return text


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("acpi")
    for name, raw in tables(build_tables(config())).items():
        (directory / f"{name}.dat").write_bytes(raw)
    return directory


@pytest.mark.parametrize("name", ["DSDT", "FACP", "APIC", "MCFG", "XSDT"])
def test_iasl_finds_nothing_to_say(unpacked: Path, tmp_path: Path, name: str) -> None:
    raw = (unpacked / f"{name}.dat").read_bytes()
    (tmp_path / "table.dat").write_bytes(raw)
    text = iasl("-d", "table.dat", cwd=tmp_path)
    assert not re.search(r"error|warning|invalid|unknown", text, re.IGNORECASE), text
    source = (tmp_path / "table.dsl").read_text()
    assert "Invalid" not in source
    assert "Unknown" not in source
    if name != "XSDT":
        text = iasl("-oa", "-p", "again", "table.dsl", cwd=tmp_path)
        assert "0 Errors, 0 Warnings, 0 Remarks" in text
    if name == "DSDT":
        # Byte for byte what the reference compiler makes of the same source, but for who compiled it.
        assert (tmp_path / "again.aml").read_bytes()[36:] == raw[36:]


@pytest.mark.parametrize("shape", [config(1, 1), config(1, 64), config(64, 64), config(1, 1, com1=False)])
def test_every_shape_compiles_and_fits(tmp_path: Path, shape: AcpiConfig) -> None:
    block = build_tables(shape)
    assert len(block) <= layout.ACPI_TABLES_END - layout.ACPI_TABLES
    found = tables(block)
    (tmp_path / "DSDT.dat").write_bytes(found["DSDT"])
    iasl("-d", "DSDT.dat", cwd=tmp_path)
    assert "0 Errors, 0 Warnings, 0 Remarks" in iasl("-p", "again", "DSDT.dsl", cwd=tmp_path)
    assert ("COM1" in (tmp_path / "DSDT.dsl").read_text()) is shape.com1


def test_fadt_registers() -> None:
    fadt = tables(build_tables(config()))["FACP"]
    assert len(fadt) == 276
    assert (fadt[8], fadt[131]) == (6, 3)
    flags = struct.unpack_from("<I", fadt, 112)[0]
    for bit in (1 << 20, 1 << 10, 1 << 8):
        assert flags & bit
    port = struct.pack("<BBBBQ", 1, 8, 0, 1, 0x600)
    assert fadt[116:128] == fadt[244:256] == fadt[256:268] == port
    assert fadt[128] == 1
    assert fadt[208:220] == struct.pack("<BBBBQ", 1, 32, 0, 3, 0x608)
    assert fadt[268:276] == b"CELLVISR"


def test_madt_lists_every_vcpu() -> None:
    madt = tables(build_tables(config(2, 5)))["APIC"]
    assert madt[8] == 5
    assert struct.unpack_from("<I", madt, 36)[0] == layout.LAPIC
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at:at + madt[at + 1]])
        at += madt[at + 1]
    x2apics = [struct.unpack("<BBHIII", entry) for entry in entries if entry[0] == 9]
    assert [(apic, flags, uid) for _, _, _, apic, flags, uid in x2apics] == [
        (0, 1, 0), (1, 1, 1), (2, 2, 2), (3, 2, 3), (4, 2, 4)]
    assert [struct.unpack("<BBBBII", entry) for entry in entries if entry[0] == 1] == [
        (1, 12, 0, 0, layout.IOAPIC, 0)]
    assert [struct.unpack("<BBBBIH", entry) for entry in entries if entry[0] == 2] == [(2, 10, 0, 4, 4, 0)]


def test_mcfg_covers_bus_0_only() -> None:
    assert tables(build_tables(config()))["MCFG"][44:] == struct.pack("<QHBB4x", layout.ECAM, 0, 0, 0)


def test_soft_off_and_preserved_boot_configuration(unpacked: Path) -> None:
    text = evaluate(unpacked, r"evaluate \_S5")
    numbers = [int(value, 16) for value in re.findall(r"\[Integer\] = ([0-9A-F]+)", text)]
    assert numbers == [5, 5, 0, 0]
    dsm = "E5C937D0"
    uuid = "(D0 37 C9 E5 53 35 7A 4D 91 17 EA 4D 19 C3 43 4D)"
    assert dsm in abi.DSM_PCI_UUID
    text = evaluate(unpacked, rf"evaluate \_SB.PC00._DSM {uuid} 1 5 [0]")
    assert "[Integer] = 0000000000000000" in text
    text = evaluate(unpacked, rf"evaluate \_SB.PC00._DSM {uuid} 1 0 [0]")
    assert re.search(r"Buffer\] Length 01 =\s+(0000: )?21", text), text


def osc_result(unpacked: Path, buffer: str, revision: int = 1, uuid: str = "") -> tuple[int, int]:
    uuid = uuid or "(5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66)"
    text = evaluate(unpacked, rf"evaluate \_SB.PC00._OSC {uuid} {revision} 3 ({buffer})")
    raw = bytes.fromhex("".join(re.findall(r"0000: ((?:[0-9A-F]{2} )+)", text)[-1].split()))
    return struct.unpack("<I4xI", raw[:12])


def test_osc_grants_the_pcie_capability_alone(unpacked: Path) -> None:
    asked_all = "00 00 00 00 00 00 00 00 1F 00 00 00"
    assert osc_result(unpacked, asked_all) == (abi.OSC_MASKED, abi.OSC_PCIE_CAPABILITY)
    asked_it = "00 00 00 00 00 00 00 00 10 00 00 00"
    assert osc_result(unpacked, asked_it) == (0, abi.OSC_PCIE_CAPABILITY)
    assert osc_result(unpacked, asked_it, revision=2)[0] == abi.OSC_FAILURE_REVISION
    other = "(00 11 22 33 44 55 66 77 88 99 AA BB CC DD EE FF)"
    assert osc_result(unpacked, asked_all, uuid=other) == (abi.OSC_FAILURE_UUID, 0x1F)


def test_every_slot_and_pin_is_routed(unpacked: Path) -> None:
    text = evaluate(unpacked, r"evaluate \_SB.PC00._PRT")
    numbers = [int(value, 16) for value in re.findall(r"\[Integer\] = ([0-9A-F]+)", text)]
    routes = [tuple(numbers[at:at + 4]) for at in range(0, len(numbers), 4)]
    assert routes == [(slot << 16 | 0xFFFF, pin, 0, layout.intx_gsi(slot, pin))
                      for slot in range(32) for pin in range(4)]
    assert {route[3] for route in routes} == set(range(5, 13))


def test_ged_interrupt_is_level_active_high_exclusive(unpacked: Path) -> None:
    dsdt = (unpacked / "DSDT.dat").read_bytes()
    # Extended interrupt: consumer, no edge, no active-low, not shared; one line, number 13.
    assert dsdt.count(bytes([0x89, 6, 0, 0x01, 1, layout.GSI_GED, 0, 0, 0])) == 1
    # COM1: the same, but edge.
    assert dsdt.count(bytes([0x89, 6, 0, 0x03, 1, layout.GSI_COM1, 0, 0, 0])) == 1


def test_ged_event_loop_ends_when_the_register_is_empty(unpacked: Path) -> None:
    text = evaluate(unpacked, r"evaluate \_SB.GED._EVT 13")
    assert r"No object was returned from evaluation of \_SB.GED._EVT" in text


def test_ged_notifies_the_power_button(unpacked: Path, tmp_path: Path) -> None:
    # The interpreter's registers are plain memory: patch the loop into one turn to see the event dispatched.
    iasl("-d", "-p", str(tmp_path / "DSDT"), "DSDT.dat", cwd=unpacked)
    source = (tmp_path / "DSDT.dsl").read_text()
    once = re.sub(r"Local0 = GDAT [^\n]*\n(\s*)While \(Local0\)", r"Local0 = 8\n\1While (Local0)", source)
    once = re.sub(r"(Notify \(PWRB[^\n]*\n\s*\}\n\s*)Local0 = GDAT[^\n]*", r"\1Local0 = 0", once)
    assert once.count("GDAT") == source.count("GDAT") - 2
    (tmp_path / "once.dsl").write_text(once)
    iasl("-p", "DSDT", "once.dsl", cwd=tmp_path)
    (tmp_path / "DSDT.aml").rename(tmp_path / "DSDT.dat")
    text = evaluate(tmp_path, r"evaluate \_SB.GED._EVT 13")
    assert re.search(r"PWRB.*0x80|Notify.*PWRB.*80", text), text
