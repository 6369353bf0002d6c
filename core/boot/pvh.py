"""Build what a PVH kernel finds at boot (Xen public/arch-x86/hvm/start_info.h, version 1)."""

from __future__ import annotations

import struct

from cellvisor.core.abi import bootparams as abi
from cellvisor.core.boot.memmap import memory_map, pvh_bytes
from cellvisor.core.mem import layout


def start_info(ram_size: int, rsdp: int, initramfs: tuple[int, int] | None) -> list[tuple[int, bytes]]:
    """Return (gpa, bytes) of the start info, module list and memory map; `initramfs` is (gpa, size)."""
    entries = memory_map(ram_size)
    head = struct.pack(
        abi.START_INFO, abi.START_INFO_MAGIC, abi.START_INFO_VERSION, 0, 1 if initramfs else 0,
        layout.PVH_MODULES if initramfs else 0, layout.CMDLINE, rsdp, layout.PVH_MEMMAP, len(entries), 0,
    )
    pieces = [(layout.PVH_START_INFO, head), (layout.PVH_MEMMAP, pvh_bytes(entries))]
    if initramfs:
        pieces.append((layout.PVH_MODULES, struct.pack(abi.MODULE_ENTRY, *initramfs, 0, 0)))
    return pieces
