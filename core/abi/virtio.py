"""Virtio: transport registers, feature bits, and what the block and console devices need (virtio 1.2).

Names drop their VIRTIO_ prefix. *_F_* are masks (1 << bit), not bit numbers. Numbers come from the
compiler (linux/virtio_*.h); layouts are struct.Struct, their sizes checked against the headers in the tests.
"""

from __future__ import annotations

from struct import Struct

from cellvisor.core._native import _native

_lib = _native.lib


def _mask(name: str) -> int:
    bit: int = getattr(_lib, name)
    return 1 << bit


# --- Identity (4.1.2, 5) --------------------------------------------------------------------------------
PCI_VENDOR = 0x1AF4
PCI_DEVICE_BASE = 0x1040     # + virtio id
ID_NET: int = _lib.VIRTIO_ID_NET
ID_BLOCK: int = _lib.VIRTIO_ID_BLOCK
ID_CONSOLE: int = _lib.VIRTIO_ID_CONSOLE
ID_RNG: int = _lib.VIRTIO_ID_RNG
ID_BALLOON: int = _lib.VIRTIO_ID_BALLOON
ID_CLOCK: int = _lib.VIRTIO_ID_CLOCK
ID_VSOCK: int = _lib.VIRTIO_ID_VSOCK
ID_IOMMU: int = _lib.VIRTIO_ID_IOMMU
ID_MEM: int = _lib.VIRTIO_ID_MEM
ID_FS: int = _lib.VIRTIO_ID_FS
ID_PMEM: int = _lib.VIRTIO_ID_PMEM
ID_WATCHDOG: int = _lib.VIRTIO_ID_WATCHDOG

# --- device_status (2.1) --------------------------------------------------------------------------------
S_ACKNOWLEDGE: int = _lib.VIRTIO_CONFIG_S_ACKNOWLEDGE
S_DRIVER: int = _lib.VIRTIO_CONFIG_S_DRIVER
S_DRIVER_OK: int = _lib.VIRTIO_CONFIG_S_DRIVER_OK
S_FEATURES_OK: int = _lib.VIRTIO_CONFIG_S_FEATURES_OK
S_NEEDS_RESET: int = _lib.VIRTIO_CONFIG_S_NEEDS_RESET
S_FAILED: int = _lib.VIRTIO_CONFIG_S_FAILED

# --- Reserved feature bits (6) --------------------------------------------------------------------------
F_RING_INDIRECT_DESC = _mask("VIRTIO_RING_F_INDIRECT_DESC")
F_RING_EVENT_IDX = _mask("VIRTIO_RING_F_EVENT_IDX")
F_VERSION_1 = _mask("VIRTIO_F_VERSION_1")
F_ACCESS_PLATFORM = _mask("VIRTIO_F_ACCESS_PLATFORM")
F_RING_PACKED = _mask("VIRTIO_F_RING_PACKED")
F_IN_ORDER = _mask("VIRTIO_F_IN_ORDER")
F_ORDER_PLATFORM = _mask("VIRTIO_F_ORDER_PLATFORM")
F_SR_IOV = _mask("VIRTIO_F_SR_IOV")
F_NOTIFICATION_DATA = 1 << 38                            # virtio 1.2, 6; newer headers only
F_NOTIF_CONFIG_DATA = 1 << 39                            # virtio 1.2, 6; newer headers only
F_RING_RESET = _mask("VIRTIO_F_RING_RESET")
F_TRANSPORT = (1 << 50) - (1 << 24)                      # 24..41 the transport's, 42..49 reserved (2.2)

# --- Split ring (2.7) -----------------------------------------------------------------------------------
DESC_F_NEXT: int = _lib.VRING_DESC_F_NEXT
DESC_F_WRITE: int = _lib.VRING_DESC_F_WRITE
DESC_F_INDIRECT: int = _lib.VRING_DESC_F_INDIRECT
USED_F_NO_NOTIFY: int = _lib.VRING_USED_F_NO_NOTIFY
AVAIL_F_NO_INTERRUPT: int = _lib.VRING_AVAIL_F_NO_INTERRUPT

# --- PCI capabilities (4.1.4): cfg_type values and the layout they share --------------------------------
CAP_COMMON: int = _lib.VIRTIO_PCI_CAP_COMMON_CFG
CAP_NOTIFY: int = _lib.VIRTIO_PCI_CAP_NOTIFY_CFG
CAP_ISR: int = _lib.VIRTIO_PCI_CAP_ISR_CFG
CAP_DEVICE: int = _lib.VIRTIO_PCI_CAP_DEVICE_CFG
CAP_PCI: int = _lib.VIRTIO_PCI_CAP_PCI_CFG
CAP_SHARED_MEMORY: int = _lib.VIRTIO_PCI_CAP_SHARED_MEMORY_CFG
PCI_CAP = Struct("<BBBBBBxxII")    # vndr, next, len, cfg_type, bar, id, offset, length
PCI_CAP_BAR: int = _lib.VIRTIO_PCI_CAP_BAR
PCI_CAP_OFFSET: int = _lib.VIRTIO_PCI_CAP_OFFSET
PCI_CAP_LENGTH: int = _lib.VIRTIO_PCI_CAP_LENGTH
PCI_CAP_DATA: int = _lib.VIRTIO_PCI_NOTIFY_CAP_MULT      # u32: notify_off_multiplier, or pci_cfg_data

# --- Common configuration (4.1.4.3) ---------------------------------------------------------------------
COMMON_DEVICE_FEATURE_SELECT: int = _lib.VIRTIO_PCI_COMMON_DFSELECT  # u32
COMMON_DEVICE_FEATURE: int = _lib.VIRTIO_PCI_COMMON_DF               # u32, read only
COMMON_DRIVER_FEATURE_SELECT: int = _lib.VIRTIO_PCI_COMMON_GFSELECT  # u32
COMMON_DRIVER_FEATURE: int = _lib.VIRTIO_PCI_COMMON_GF               # u32
COMMON_CONFIG_VECTOR: int = _lib.VIRTIO_PCI_COMMON_MSIX              # u16
COMMON_NUM_QUEUES: int = _lib.VIRTIO_PCI_COMMON_NUMQ                 # u16, read only
COMMON_STATUS: int = _lib.VIRTIO_PCI_COMMON_STATUS                   # u8
COMMON_CONFIG_GENERATION: int = _lib.VIRTIO_PCI_COMMON_CFGGENERATION  # u8, read only
COMMON_QUEUE_SELECT: int = _lib.VIRTIO_PCI_COMMON_Q_SELECT           # u16
COMMON_QUEUE_SIZE: int = _lib.VIRTIO_PCI_COMMON_Q_SIZE               # u16
COMMON_QUEUE_VECTOR: int = _lib.VIRTIO_PCI_COMMON_Q_MSIX             # u16
COMMON_QUEUE_ENABLE: int = _lib.VIRTIO_PCI_COMMON_Q_ENABLE           # u16
COMMON_QUEUE_NOTIFY_OFF: int = _lib.VIRTIO_PCI_COMMON_Q_NOFF         # u16, read only
COMMON_QUEUE_DESC: int = _lib.VIRTIO_PCI_COMMON_Q_DESCLO             # u64
COMMON_QUEUE_AVAIL: int = _lib.VIRTIO_PCI_COMMON_Q_AVAILLO           # u64
COMMON_QUEUE_USED: int = _lib.VIRTIO_PCI_COMMON_Q_USEDLO             # u64
COMMON_SIZE = 0x38           # the part without queue_notify_data and queue_reset, which are not offered
NO_VECTOR: int = _lib.VIRTIO_MSI_NO_VECTOR

# --- ISR status (4.1.4.5) -------------------------------------------------------------------------------
ISR_QUEUE = 1                # 4.1.4.5: bit 0; no header names it
ISR_CONFIG: int = _lib.VIRTIO_PCI_ISR_CONFIG

# --- Block device (5.2) ---------------------------------------------------------------------------------
BLK_F_SIZE_MAX = _mask("VIRTIO_BLK_F_SIZE_MAX")
BLK_F_SEG_MAX = _mask("VIRTIO_BLK_F_SEG_MAX")
BLK_F_RO = _mask("VIRTIO_BLK_F_RO")
BLK_F_BLK_SIZE = _mask("VIRTIO_BLK_F_BLK_SIZE")
BLK_F_FLUSH = _mask("VIRTIO_BLK_F_FLUSH")
BLK_F_TOPOLOGY = _mask("VIRTIO_BLK_F_TOPOLOGY")
BLK_F_CONFIG_WCE = _mask("VIRTIO_BLK_F_CONFIG_WCE")
BLK_F_MQ = _mask("VIRTIO_BLK_F_MQ")
BLK_F_DISCARD = _mask("VIRTIO_BLK_F_DISCARD")
BLK_F_WRITE_ZEROES = _mask("VIRTIO_BLK_F_WRITE_ZEROES")
BLK_T_IN: int = _lib.VIRTIO_BLK_T_IN
BLK_T_OUT: int = _lib.VIRTIO_BLK_T_OUT
BLK_T_SCSI_CMD: int = _lib.VIRTIO_BLK_T_SCSI_CMD
BLK_T_FLUSH: int = _lib.VIRTIO_BLK_T_FLUSH
BLK_T_GET_ID: int = _lib.VIRTIO_BLK_T_GET_ID
BLK_T_DISCARD: int = _lib.VIRTIO_BLK_T_DISCARD
BLK_T_WRITE_ZEROES: int = _lib.VIRTIO_BLK_T_WRITE_ZEROES
BLK_S_OK: int = _lib.VIRTIO_BLK_S_OK
BLK_S_IOERR: int = _lib.VIRTIO_BLK_S_IOERR
BLK_S_UNSUPP: int = _lib.VIRTIO_BLK_S_UNSUPP
BLK_ID_BYTES: int = _lib.VIRTIO_BLK_ID_BYTES
BLK_WRITE_ZEROES_UNMAP: int = _lib.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
BLK_SECTOR = 512             # 5.2.4: whatever blk_size says
BLK_REQUEST = Struct("<IIQ")         # type, reserved, sector
BLK_SEGMENT = Struct("<QII")         # sector, num_sectors, flags: discard and write zeroes
# capacity; size_max, seg_max; cylinders, heads, sectors; blk_size; physical_block_exp, alignment_offset,
# min_io_size, opt_io_size; writeback; num_queues; max_discard_sectors, max_discard_seg,
# discard_sector_alignment; max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap (60 bytes;
# the header's struct goes on with the secure erase fields, which are not offered)
BLK_CONFIG = Struct("<QIIHBBIBBHIBxHIIIIIB3x")

# --- Console device (5.3) -------------------------------------------------------------------------------
CONSOLE_F_SIZE = _mask("VIRTIO_CONSOLE_F_SIZE")
CONSOLE_F_MULTIPORT = _mask("VIRTIO_CONSOLE_F_MULTIPORT")
CONSOLE_F_EMERG_WRITE = _mask("VIRTIO_CONSOLE_F_EMERG_WRITE")
CONSOLE_DEVICE_READY: int = _lib.VIRTIO_CONSOLE_DEVICE_READY
CONSOLE_PORT_ADD: int = _lib.VIRTIO_CONSOLE_PORT_ADD
CONSOLE_PORT_REMOVE: int = _lib.VIRTIO_CONSOLE_PORT_REMOVE
CONSOLE_PORT_READY: int = _lib.VIRTIO_CONSOLE_PORT_READY
CONSOLE_CONSOLE_PORT: int = _lib.VIRTIO_CONSOLE_CONSOLE_PORT
CONSOLE_RESIZE: int = _lib.VIRTIO_CONSOLE_RESIZE
CONSOLE_PORT_OPEN: int = _lib.VIRTIO_CONSOLE_PORT_OPEN
CONSOLE_PORT_NAME: int = _lib.VIRTIO_CONSOLE_PORT_NAME
CONSOLE_CONFIG = Struct("<HHII")     # cols, rows, max_nr_ports, emerg_wr
CONSOLE_CONTROL = Struct("<IHH")     # id, event, value
