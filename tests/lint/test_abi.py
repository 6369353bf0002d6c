"""Kernel numbers come from the compiler; what is declared by hand agrees with the kernel's headers."""

from __future__ import annotations

from pathlib import Path

from tests.lint.abi import differing, header_names, header_numbers, literals, retyped
from tests.lint.source import ROOT, Source

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


def test_no_kernel_number_is_typed(product: list[Source]) -> None:
    headers = [path for pattern in ("kvm*.h", "vfio*.h", "vhost*.h", "virtio_*.h", "pci_regs.h", "serial_reg.h",
                                    "if_tun.h", "falloc.h", "fs.h", "eventpoll.h", "io_uring.h", "elf.h")
               for path in INCLUDE.glob(pattern)]
    names = header_names(*headers)
    assert {"KVM_RUN", "VIRTIO_F_VERSION_1", "PCI_COMMAND", "VIRTIO_BLK_T_FLUSH"} <= names
    assert [line for source in product for line in retyped(source, names)] == []


def test_serial_registers_agree_with_the_header() -> None:
    source = Source("core/abi/serial.py", (ROOT / "core/abi/serial.py").read_text())
    numbers = header_numbers(INCLUDE / "serial_reg.h")
    declared = {name for _, name, _ in literals(source)}
    unknown = {name: theirs for name, theirs in UART.items() if name not in declared or theirs not in numbers}
    assert unknown == {}
    assert differing(source, numbers, UART) == []


def test_planted_faults_are_found(tmp_path: Path) -> None:
    header = tmp_path / "x.h"
    header.write_text("#define UART_LSR 5 /* line status */\n# define PCI_BAR\t0x10\n#define KVM_RUN _IO(KVMIO, 0x80)\n"
                      "#define GUARD\n")
    numbers = header_numbers(header)
    assert numbers == {"UART_LSR": 5, "PCI_BAR": 16}
    names = header_names(header)
    assert names == {"UART_LSR", "PCI_BAR", "KVM_RUN"}
    source = Source("core/abi/x.py", "LSR: Final = 6\n_PCI_BAR = 0x10\nPCI_BAR: int = lib.PCI_BAR\n"
                                     "class C:\n    KVM_RUN = 0xAE80\n    KVM_TSS = 1\n")
    assert differing(source, numbers, {"LSR": "UART_LSR"}) == ["core/abi/x.py:1: LSR is 0x6, UART_LSR is 0x5"]
    assert [line.split()[1] for line in retyped(source, names)] == ["_PCI_BAR", "KVM_RUN"]
