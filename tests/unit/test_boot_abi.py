"""The declared boot protocol against the kernel's own headers."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from cellvisor.core.abi import bootparams as abi
from tests.debian import need

FIELDS = {
    "acpi_rsdp_addr": abi.ACPI_RSDP_ADDR, "e820_entries": abi.E820_ENTRIES, "e820_table": abi.E820_TABLE,
    "hdr": abi.HEADER_START, "hdr.setup_sects": abi.SETUP_SECTS, "hdr.syssize": abi.SYSSIZE,
    "hdr.vid_mode": abi.VID_MODE, "hdr.boot_flag": abi.BOOT_FLAG, "hdr.jump": abi.JUMP, "hdr.header": abi.MAGIC,
    "hdr.version": abi.VERSION, "hdr.type_of_loader": abi.TYPE_OF_LOADER, "hdr.loadflags": abi.LOADFLAGS,
    "hdr.code32_start": abi.CODE32_START, "hdr.ramdisk_image": abi.RAMDISK_IMAGE,
    "hdr.ramdisk_size": abi.RAMDISK_SIZE, "hdr.cmd_line_ptr": abi.CMD_LINE_PTR,
    "hdr.initrd_addr_max": abi.INITRD_ADDR_MAX, "hdr.kernel_alignment": abi.KERNEL_ALIGNMENT,
    "hdr.relocatable_kernel": abi.RELOCATABLE, "hdr.xloadflags": abi.XLOADFLAGS,
    "hdr.cmdline_size": abi.CMDLINE_SIZE, "hdr.payload_offset": abi.PAYLOAD_OFFSET,
    "hdr.payload_length": abi.PAYLOAD_LENGTH, "hdr.setup_data": abi.SETUP_DATA,
    "hdr.pref_address": abi.PREF_ADDRESS, "hdr.init_size": abi.INIT_SIZE,
    "hdr.handover_offset": abi.HEADER_LEAST_END, "edd_mbr_sig_buffer": abi.HEADER_MOST_END,
}
NUMBERS = {
    "sizeof(struct boot_params)": abi.ZERO_PAGE_SIZE,
    "sizeof(struct boot_e820_entry)": struct.calcsize(abi.E820_ENTRY),
    "E820_MAX_ENTRIES_ZEROPAGE": abi.E820_MAX, "LOADED_HIGH": abi.LOADED_HIGH,
    "XLF_KERNEL_64": abi.XLF_KERNEL_64, "sizeof(Elf64_Phdr)": struct.calcsize(abi.ELF_SEGMENT),
    "sizeof(Elf64_Nhdr)": struct.calcsize(abi.ELF_NOTE_HEADER), "PT_LOAD": abi.ELF_LOAD,
    "PT_NOTE": abi.ELF_NOTE, "EM_X86_64": abi.ELF_X86_64, "ET_EXEC": abi.ELF_EXEC, "ET_DYN": abi.ELF_DYN,
    "offsetof(Elf64_Ehdr, e_shentsize)": struct.calcsize(abi.ELF_HEADER),
}


def test_offsets_and_sizes_are_the_headers(tmp_path: Path) -> None:
    wanted = {f"offsetof(struct boot_params, {name})": value for name, value in FIELDS.items()} | NUMBERS
    lines = "".join(f'printf("%lu\\n", (unsigned long)({expression}));\n' for expression in wanted)
    source = tmp_path / "abi.c"
    source.write_text("#include <stddef.h>\n#include <stdio.h>\n#include <asm/bootparam.h>\n"
                      f"#include <linux/elf.h>\nint main(void) {{\n{lines}return 0;\n}}\n")
    subprocess.run([need("gcc", "gcc"), "-o", tmp_path / "abi", source], check=True)
    printed = subprocess.run([tmp_path / "abi"], capture_output=True, text=True, check=True).stdout.split()
    assert dict(zip(wanted, map(int, printed), strict=True)) == wanted


def test_pvh_structures_have_the_sizes_of_the_interface() -> None:
    assert struct.calcsize(abi.START_INFO) == 56
    assert struct.calcsize(abi.MODULE_ENTRY) == 32
    assert struct.calcsize(abi.MEMMAP_ENTRY) == 24
