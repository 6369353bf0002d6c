"""PCI configuration space and MSI-X, as linux/pci_regs.h has them (PCI Local Bus 3.0, 6.1, 6.2, 6.8.2).

Registers are byte offsets, the rest are values or masks. Numbers come from the compiler; the few that no
header has are written out with their source.
"""

from __future__ import annotations

from cellvisor.core._native import _native

_lib = _native.lib

# --- Type 0 header ------------------------------------------------------------------------------------
VENDOR_ID: int = _lib.PCI_VENDOR_ID                     # u16
DEVICE_ID: int = _lib.PCI_DEVICE_ID                     # u16
COMMAND: int = _lib.PCI_COMMAND                         # u16
COMMAND_IO: int = _lib.PCI_COMMAND_IO                   #   decode I/O BARs
COMMAND_MEMORY: int = _lib.PCI_COMMAND_MEMORY           #   decode memory BARs
COMMAND_MASTER: int = _lib.PCI_COMMAND_MASTER           #   may do DMA and send messages
COMMAND_PARITY: int = _lib.PCI_COMMAND_PARITY
COMMAND_SERR: int = _lib.PCI_COMMAND_SERR
COMMAND_INTX_DISABLE: int = _lib.PCI_COMMAND_INTX_DISABLE
STATUS: int = _lib.PCI_STATUS                           # u16
STATUS_INTERRUPT: int = _lib.PCI_STATUS_INTERRUPT       #   INTx is asserted inside the function
STATUS_CAP_LIST: int = _lib.PCI_STATUS_CAP_LIST
REVISION_ID: int = _lib.PCI_REVISION_ID                 # u8
CLASS_PROG: int = _lib.PCI_CLASS_PROG                   # u24: interface, subclass, class
CACHE_LINE_SIZE: int = _lib.PCI_CACHE_LINE_SIZE         # u8
LATENCY_TIMER: int = _lib.PCI_LATENCY_TIMER             # u8
HEADER_TYPE: int = _lib.PCI_HEADER_TYPE                 # u8
BAR_0: int = _lib.PCI_BASE_ADDRESS_0                    # six u32
BAR_64: int = _lib.PCI_BASE_ADDRESS_MEM_TYPE_64         #   the next BAR register is the upper half
BAR_PREFETCH: int = _lib.PCI_BASE_ADDRESS_MEM_PREFETCH
SUBSYSTEM_VENDOR_ID: int = _lib.PCI_SUBSYSTEM_VENDOR_ID  # u16
SUBSYSTEM_ID: int = _lib.PCI_SUBSYSTEM_ID               # u16
ROM_ADDRESS: int = _lib.PCI_ROM_ADDRESS                 # u32
CAPABILITY_LIST: int = _lib.PCI_CAPABILITY_LIST         # u8
INTERRUPT_LINE: int = _lib.PCI_INTERRUPT_LINE           # u8, free for the guest
INTERRUPT_PIN: int = _lib.PCI_INTERRUPT_PIN             # u8, 0 none, 1 INTA#

HEADER_SIZE = 0x40           # PCI 3.0, 6.1: device-dependent space begins here
CONVENTIONAL_SIZE = 0x100    # what CF8/CFC reaches; extended space follows up to CONFIG_SIZE
CONFIG_SIZE = 0x1000         # PCIe 7.2.2
BARS = 6
SLOTS = 32

# --- Capabilities -------------------------------------------------------------------------------------
CAP_VENDOR: int = _lib.PCI_CAP_ID_VNDR
CAP_MSIX: int = _lib.PCI_CAP_ID_MSIX

MSIX_FLAGS: int = _lib.PCI_MSIX_FLAGS                   # u16, from the start of the capability
MSIX_FLAGS_QSIZE: int = _lib.PCI_MSIX_FLAGS_QSIZE       #   vectors - 1
MSIX_FLAGS_MASKALL: int = _lib.PCI_MSIX_FLAGS_MASKALL
MSIX_FLAGS_ENABLE: int = _lib.PCI_MSIX_FLAGS_ENABLE
MSIX_TABLE: int = _lib.PCI_MSIX_TABLE                   # u32: offset | BAR
MSIX_PBA: int = _lib.PCI_MSIX_PBA                       # u32: offset | BAR
MSIX_CAP_SIZE: int = _lib.PCI_CAP_MSIX_SIZEOF

MSIX_ENTRY_SIZE: int = _lib.PCI_MSIX_ENTRY_SIZE
MSIX_ENTRY_LOWER: int = _lib.PCI_MSIX_ENTRY_LOWER_ADDR  # u32
MSIX_ENTRY_UPPER: int = _lib.PCI_MSIX_ENTRY_UPPER_ADDR  # u32
MSIX_ENTRY_DATA: int = _lib.PCI_MSIX_ENTRY_DATA         # u32
MSIX_ENTRY_CONTROL: int = _lib.PCI_MSIX_ENTRY_VECTOR_CTRL  # u32
MSIX_ENTRY_MASKED: int = _lib.PCI_MSIX_ENTRY_CTRL_MASKBIT

# --- Configuration mechanism #1 (PCI 3.0, 3.2.2.3.2) ---------------------------------------------------
CONFIG_ADDRESS_PORT = 0xCF8
CONFIG_DATA_PORT = 0xCFC     # four bytes
CONFIG_ENABLE = 1 << 31      # bits 23:16 bus, 15:11 device, 10:8 function, 7:2 register

# --- The host bridge: an Intel 82371 virtual host bridge id that no driver binds to --------------------
HOST_BRIDGE_VENDOR = 0x8086
HOST_BRIDGE_DEVICE = 0x0D57
HOST_BRIDGE_CLASS = 0x060000
