"""Build the DSDT body: the devices that cannot be probed, and what the guest does when the GED fires.

ACPI 6.5, 5.6.9 (GED), 6.2.13 (_PRT), 7.4.2 (_Sx); PCI Firmware 3.3, 4.5 and 4.6.5 (_OSC, _DSM).
"""

from __future__ import annotations

from cellvisor.core.abi import acpi as abi
from cellvisor.core.acpi import aml, hotplug, resources
from cellvisor.core.acpi.aml import ARG, LOCAL, device, if_, method, name, ref
from cellvisor.core.acpi.config import AcpiConfig
from cellvisor.core.mem import layout

PRESENT_AND_WORKING = 0xF
PCI_CONFIG_PORT = 0xCF8
PCI_CONFIG_PORTS = 8


def dsdt_body(config: AcpiConfig) -> bytes:
    """Return the AML of the DSDT, without its table header."""
    devices = [
        hotplug.pci_controller(), _root_bridge(config), _reserved(), _rtc(), _power_button(), _event_device(),
        _processors(config),
    ]
    if config.com1:
        devices.append(_com1())
    soft_off = name("\\_S5", aml.package(abi.S5_TYPE, abi.S5_TYPE, 0, 0))
    return aml.scope("\\_SB", *devices) + soft_off


def _root_bridge(config: AcpiConfig) -> bytes:
    after_config = PCI_CONFIG_PORT + PCI_CONFIG_PORTS
    window = resources.template(
        resources.bus_numbers(0, 0),
        resources.io(PCI_CONFIG_PORT, PCI_CONFIG_PORT, PCI_CONFIG_PORTS),
        resources.io_window(0, PCI_CONFIG_PORT - 1),
        resources.io_window(after_config, 0xFFFF),
        resources.memory32_window(layout.MMIO32, layout.MMIO32_END - layout.MMIO32),
        resources.memory64_window(*config.mmio64),
    )
    routing = [
        aml.package(slot << 16 | 0xFFFF, pin, 0, layout.intx_gsi(slot, pin))
        for slot in range(layout.PCI_SLOTS)
        for pin in range(4)
    ]
    return device(
        "PC00",
        name("_HID", aml.eisa_id("PNP0A08")),
        name("_CID", aml.eisa_id("PNP0A03")),
        name("_UID", 0),
        name("_SEG", 0),
        name("_BBN", 0),
        name("_CRS", window),
        name("_PRT", aml.package(*routing)),
        _host_bridge_osc(),
        _host_bridge_dsm(),
        hotplug.bridge_slots(),
    )


def _host_bridge_osc() -> bytes:
    # The guest gets the PCIe capability structures and nothing else: native hotplug would bypass ours.
    status, control = ref("CDW1"), ref("CDW3")
    fail = aml.or_(status, abi.OSC_FAILURE_REVISION, status)
    return method(
        "_OSC", 4,
        aml.create_field("dword", ARG[3], 0, "CDW1"),
        if_(
            aml.equal(ARG[0], aml.to_uuid(abi.OSC_PCI_UUID)),
            aml.create_field("dword", ARG[3], 8, "CDW3"),
            if_(aml.logical_not(aml.equal(ARG[1], 1)), fail),
            aml.and_(control, abi.OSC_PCIE_CAPABILITY, LOCAL[0]),
            if_(
                aml.logical_not(aml.equal(control, LOCAL[0])),
                aml.or_(status, abi.OSC_MASKED, status),
            ),
            aml.store(LOCAL[0], control),
        ),
        aml.else_(aml.or_(status, abi.OSC_FAILURE_UUID, status)),
        aml.return_(ARG[3]),
        serialized=True,
    )


def _host_bridge_dsm() -> bytes:
    # Function 0 lists the functions: itself and "preserve the boot configuration", whose answer 0 is yes.
    functions = bytes([1 | 1 << abi.DSM_PRESERVE_BOOT_CONFIG])
    return method(
        "_DSM", 4,
        if_(
            aml.equal(ARG[0], aml.to_uuid(abi.DSM_PCI_UUID)),
            if_(aml.equal(ARG[2], 0), aml.return_(aml.buffer(functions))),
            if_(aml.equal(ARG[2], abi.DSM_PRESERVE_BOOT_CONFIG), aml.return_(0)),
        ),
        aml.return_(aml.buffer(b"\0")),
        serialized=True,
    )


def _reserved() -> bytes:
    # Linux uses ECAM only if some device has claimed it, and must put no BAR over the register pages.
    return device(
        "MBRD",
        name("_HID", aml.eisa_id("PNP0C02")),
        name("_UID", 0),
        name("_CRS", resources.template(
            resources.memory32_fixed(layout.ECAM, layout.ECAM_SIZE),
            resources.memory32_fixed(layout.GED, layout.MEMORY_HOTPLUG + layout.REGISTER_PAGE - layout.GED),
            resources.io(layout.PORT_PM, layout.PORT_PM, 0x10),
        )),
    )


def _com1() -> bytes:
    return device(
        "COM1",
        name("_HID", aml.eisa_id("PNP0501")),
        name("_UID", 0),
        name("_DDN", "COM1"),
        name("_CRS", resources.template(
            resources.io(layout.PORT_COM1, layout.PORT_COM1, 8),
            resources.interrupt(layout.GSI_COM1, edge=True),
        )),
    )


def _rtc() -> bytes:
    # No interrupt: the clock tells the time and wakes nobody.
    return device(
        "RTC",
        name("_HID", aml.eisa_id("PNP0B00")),
        name("_CRS", resources.template(resources.io(layout.PORT_RTC, layout.PORT_RTC, 2))),
    )


def _power_button() -> bytes:
    return device("PWRB", name("_HID", aml.eisa_id("PNP0C0C")), name("_UID", 0))


def _event_device() -> bytes:
    handlers = [
        if_(aml.and_(LOCAL[0], abi.EVENT_PCI), aml.call("\\_SB.PHPR.PSCN")),
        if_(aml.and_(LOCAL[0], abi.EVENT_POWER_BUTTON), aml.notify("\\_SB.PWRB", abi.NOTIFY_POWER_BUTTON)),
    ]
    # A read takes the events seen so far; what comes meanwhile is found by the next turn.
    return device(
        "GED",
        name("_HID", "ACPI0013"),
        name("_UID", 0),
        name("_CRS", resources.template(resources.interrupt(layout.GSI_GED))),
        aml.op_region("GEDR", aml.SYSTEM_MEMORY, layout.GED, 1),
        aml.field("GEDR", aml.BYTE_ACCESS, ("GDAT", 8), rule=aml.WRITE_AS_ZEROS),
        method(
            "_EVT", 1,
            aml.store(ref("GDAT"), LOCAL[0]),
            aml.while_(LOCAL[0], *handlers, aml.store(ref("GDAT"), LOCAL[0])),
            serialized=True,
        ),
    )


def _processors(config: AcpiConfig) -> bytes:
    return b"".join(
        device(
            f"C{number:03X}",
            name("_HID", "ACPI0007"),
            name("_UID", number),
            name("_STA", PRESENT_AND_WORKING if number < config.boot_vcpus else 0),
        )
        for number in range(config.max_vcpus)
    )
