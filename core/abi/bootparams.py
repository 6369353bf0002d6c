"""How an x86-64 kernel is entered: the Linux boot protocol, the PVH start info and the ELF fields they need.

Sources: Linux Documentation/arch/x86/boot.rst and zero-page.rst (offsets are those of asm/bootparam.h, which
a test compares), Xen public/arch-x86/hvm/start_info.h and elfnote.h, ELF-64 Object File Format 1.5.
"""

from __future__ import annotations

from typing import Final

# --- Zero page (struct boot_params), byte offsets ------------------------------------------------------
ZERO_PAGE_SIZE: Final = 0x1000
ACPI_RSDP_ADDR: Final = 0x070           # u64
E820_ENTRIES: Final = 0x1E8             # u8
E820_TABLE: Final = 0x2D0               # E820_ENTRY each
E820_MAX: Final = 128
E820_ENTRY: Final = "<QQI"              # address, size, type

# --- Setup header, at the same offsets in the zero page and in a bzImage -------------------------------
HEADER_START: Final = 0x1F1
HEADER_LEAST_END: Final = 0x264         # through init_size: what protocol 2.12 must have
HEADER_MOST_END: Final = 0x290          # where the zero page goes on with something else
SETUP_SECTS: Final = 0x1F1              # u8, 0 means 4
SYSSIZE: Final = 0x1F4                  # u32, protected-mode code in units of 16 bytes
VID_MODE: Final = 0x1FA                 # u16
BOOT_FLAG: Final = 0x1FE                # u16
JUMP: Final = 0x200                     # u16, a short jump: its second byte ends the header
MAGIC: Final = 0x202                    # u32, "HdrS"
VERSION: Final = 0x206                  # u16
TYPE_OF_LOADER: Final = 0x210           # u8
LOADFLAGS: Final = 0x211                # u8
CODE32_START: Final = 0x214             # u32
RAMDISK_IMAGE: Final = 0x218            # u32
RAMDISK_SIZE: Final = 0x21C             # u32
CMD_LINE_PTR: Final = 0x228             # u32
INITRD_ADDR_MAX: Final = 0x22C          # u32, last address that an initramfs may occupy
KERNEL_ALIGNMENT: Final = 0x230         # u32
RELOCATABLE: Final = 0x234              # u8
XLOADFLAGS: Final = 0x236               # u16
CMDLINE_SIZE: Final = 0x238             # u32, without the final NUL
PAYLOAD_OFFSET: Final = 0x248           # u32, from the start of protected-mode code
PAYLOAD_LENGTH: Final = 0x24C           # u32
SETUP_DATA: Final = 0x250               # u64
PREF_ADDRESS: Final = 0x258             # u64
INIT_SIZE: Final = 0x260                # u32, memory the kernel needs to unpack itself

SECTOR: Final = 512
BOOT_FLAG_VALUE: Final = 0xAA55
MAGIC_VALUE: Final = 0x53726448
VERSION_LEAST: Final = 0x020C           # 2.12: xloadflags
VERSION_SPOKEN: Final = 0x020F
LOADER_UNKNOWN: Final = 0xFF
LOADED_HIGH: Final = 1 << 0             # loadflags
XLF_KERNEL_64: Final = 1 << 0           # xloadflags
VID_MODE_NORMAL: Final = 0xFFFF
ENTRY_64: Final = 0x200                 # 64-bit entry, from the load address

# --- Types of memory, the same in e820 and PVH ---------------------------------------------------------
MEMORY_RAM: Final = 1
MEMORY_RESERVED: Final = 2

# --- PVH -----------------------------------------------------------------------------------------------
# magic, version, flags, modules, module list, command line, RSDP, memory map, its entries, reserved
START_INFO: Final = "<IIIIQQQQII"
START_INFO_MAGIC: Final = 0x336EC578
START_INFO_VERSION: Final = 1
MODULE_ENTRY: Final = "<QQQQ"           # address, size, command line, reserved
MEMMAP_ENTRY: Final = "<QQII"           # address, size, type, reserved
NOTE_OWNER: Final = b"Xen\0"
NOTE_PHYS32_ENTRY: Final = 18           # XEN_ELFNOTE_PHYS32_ENTRY

# --- ELF-64 --------------------------------------------------------------------------------------------
ELF_MAGIC: Final = b"\x7fELF"
# type, machine, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum, after the 16 e_ident bytes
ELF_HEADER: Final = "<4sBB10xHHIQQQIHHH"
ELF_CLASS_64: Final = 2
ELF_LITTLE_ENDIAN: Final = 1
ELF_EXEC: Final = 2
ELF_DYN: Final = 3
ELF_X86_64: Final = 62
ELF_SEGMENT: Final = "<IIQQQQQQ"        # type, flags, offset, vaddr, paddr, filesz, memsz, align
ELF_LOAD: Final = 1
ELF_NOTE: Final = 4
ELF_NOTE_HEADER: Final = "<III"         # namesz, descsz, type
