"""The layouts declared in core/abi against the kernel's own structs."""

from __future__ import annotations

import pytest

from cellvisor.core._native import _native
from cellvisor.core.abi import pci, virtio


@pytest.mark.parametrize(("layout", "struct"), [
    (virtio.BLK_REQUEST, "virtio_blk_outhdr"),
    (virtio.BLK_SEGMENT, "virtio_blk_discard_write_zeroes"),
    (virtio.CONSOLE_CONFIG, "virtio_console_config"),
    (virtio.CONSOLE_CONTROL, "virtio_console_control"),
    (virtio.PCI_CAP, "virtio_pci_cap"),
])
def test_layout_has_the_size_of_the_kernel_struct(layout, struct):
    assert layout.size == _native.ffi.sizeof(f"struct {struct}")


def test_block_config_ends_where_the_secure_erase_fields_begin():
    ffi = _native.ffi
    assert virtio.BLK_CONFIG.size == ffi.offsetof("struct virtio_blk_config", "write_zeroes_may_unmap") + 4
    packed = virtio.BLK_CONFIG.pack(1, *range(2, 20))
    for index, field in ((0, "capacity"), (2, "seg_max"), (6, "blk_size"), (11, "wce"), (12, "num_queues"),
                         (13, "max_discard_sectors"), (16, "max_write_zeroes_sectors")):
        assert packed[ffi.offsetof("struct virtio_blk_config", field)] == index + 1, field


def test_common_configuration_ends_before_the_optional_registers():
    assert virtio.COMMON_QUEUE_USED + 8 == virtio.COMMON_SIZE
    assert _native.ffi.sizeof("struct virtio_pci_common_cfg") == virtio.COMMON_SIZE
    assert _native.ffi.offsetof("struct virtio_pci_common_cfg", "device_status") == virtio.COMMON_STATUS
    assert _native.ffi.offsetof("struct virtio_pci_cfg_cap", "pci_cfg_data") == virtio.PCI_CAP_DATA


def test_masks_are_masks_and_offsets_are_offsets():
    assert virtio.F_VERSION_1 == 1 << 32
    assert virtio.F_RING_EVENT_IDX == 1 << 29
    assert virtio.BLK_F_RO == 1 << 5
    assert virtio.F_TRANSPORT & virtio.F_VERSION_1
    assert not virtio.F_TRANSPORT & (virtio.BLK_F_WRITE_ZEROES | 1 << 23)
    assert pci.BAR_0 == 0x10
    assert pci.MSIX_ENTRY_CONTROL == 12
