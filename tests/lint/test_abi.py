"""Kernel numbers come from the compiler; what is declared by hand agrees with the kernel's headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lint.abi import differing, header_numbers, literals, retyped
from tests.lint.source import PACKAGES, ROOT, Source, python_files

INCLUDE = Path("/usr/include/linux")
UART = {
    "RBR": "UART_RX", "THR": "UART_TX", "DLL": "UART_DLL", "IER": "UART_IER", "DLM": "UART_DLM", "IIR": "UART_IIR",
    "FCR": "UART_FCR", "LCR": "UART_LCR", "MCR": "UART_MCR", "LSR": "UART_LSR", "MSR": "UART_MSR", "SCR": "UART_SCR",
    "IER_RECEIVE": "UART_IER_RDI", "IER_TRANSMIT": "UART_IER_THRI", "IER_LINE": "UART_IER_RLSI",
    "IER_MODEM": "UART_IER_MSI", "IIR_LINE": "UART_IIR_RLSI", "IIR_RECEIVE": "UART_IIR_RDI",
    "IIR_TIMEOUT": "UART_IIR_RX_TIMEOUT", "IIR_TRANSMIT": "UART_IIR_THRI", "IIR_MODEM": "UART_IIR_MSI",
    "IIR_NONE": "UART_IIR_NO_INT", "FCR_ENABLE": "UART_FCR_ENABLE_FIFO", "FCR_CLEAR_RECEIVE": "UART_FCR_CLEAR_RCVR",
    "LCR_DLAB": "UART_LCR_DLAB", "MCR_DTR": "UART_MCR_DTR", "MCR_RTS": "UART_MCR_RTS", "MCR_OUT1": "UART_MCR_OUT1",
    "MCR_OUT2": "UART_MCR_OUT2", "MCR_LOOP": "UART_MCR_LOOP", "LSR_DATA": "UART_LSR_DR",
    "LSR_OVERRUN": "UART_LSR_OE", "LSR_HOLDING_EMPTY": "UART_LSR_THRE", "LSR_EMPTY": "UART_LSR_TEMT",
    "MSR_RING_ENDED": "UART_MSR_TERI", "MSR_CTS": "UART_MSR_CTS", "MSR_DSR": "UART_MSR_DSR", "MSR_RI": "UART_MSR_RI",
    "MSR_DCD": "UART_MSR_DCD",
}


def test_no_kernel_number_is_typed() -> None:
    assert [line for source in python_files(ROOT, *PACKAGES) for line in retyped(source)] == []


def test_serial_registers_agree_with_the_header() -> None:
    source = Source("core/abi/serial.py", (ROOT / "core/abi/serial.py").read_text())
    numbers = header_numbers(INCLUDE / "serial_reg.h")
    declared = {name for _, name, _ in literals(source)}
    unknown = {name: theirs for name, theirs in UART.items() if name not in declared or theirs not in numbers}
    assert unknown == {}
    assert differing(source, numbers, UART) == []


@pytest.mark.parametrize("path", sorted(path.name for path in (ROOT / "core/abi").glob("*.py")))
def test_same_names_have_the_headers_values(path: str) -> None:
    headers = [INCLUDE / name for name in ("pci_regs.h", "serial_reg.h", "virtio_config.h", "virtio_ids.h",
                                           "virtio_pci.h", "virtio_ring.h", "kvm.h", "elf.h")]
    source = Source(f"core/abi/{path}", (ROOT / "core/abi" / path).read_text())
    assert differing(source, header_numbers(*headers), {}) == []


def test_planted_faults_are_found(tmp_path: Path) -> None:
    header = tmp_path / "x.h"
    header.write_text("#define UART_LSR 5 /* line status */\n# define PCI_BAR\t0x10\n#define TEXT \"x\"\n")
    numbers = header_numbers(header)
    assert numbers == {"UART_LSR": 5, "PCI_BAR": 16}
    source = Source("core/abi/x.py", "LSR: Final = 6\nPCI_BAR = 0x10\nclass C:\n    KVM_RUN = 0xAE80\n    OTHER = 1\n")
    assert differing(source, numbers, {"LSR": "UART_LSR"}) == ["core/abi/x.py:1: LSR is 0x6, the header says 0x5"]
    assert len(retyped(source)) == 1
    assert "KVM_RUN" in retyped(source)[0]
