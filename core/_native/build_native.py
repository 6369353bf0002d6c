"""Build the C extension: own types and functions from *.h here, kernel numbers from kernel.cdef."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent
HEADERS = ["memory.h", "ring.h", "vcpu.h", "file.h", "eventfd.h", "budget.h"]
KERNEL_HEADERS = ["if.h", "if_link.h", "if_tun.h", "kvm.h", "pci_regs.h", "rtnetlink.h", "sockios.h", "virtio_blk.h",
                  "virtio_config.h", "virtio_console.h", "virtio_ids.h", "virtio_net.h", "virtio_pci.h",
                  "virtio_ring.h"]
SOURCES = ["memory.c", "chain.c", "ring.c", "vcpu.c", "kvm.c", "file.c", "eventfd.c", "budget.c"]


def declarations() -> str:
    """Return the headers as cdef text: they are plain C, only preprocessor lines must go."""
    text = (HERE / "kernel.cdef").read_text()
    for name in HEADERS:
        for line in (HERE / name).read_text().splitlines():
            keep = not line.startswith("#") or (line.startswith("#define ") and len(line.split()) >= 3)
            text += line + "\n" if keep else ""
    return text


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "cellvisor.core._native._native",
    "#include <sys/prctl.h>\n#include <sys/socket.h>\n" +
    "".join(f"#include <linux/{name}>\n" for name in KERNEL_HEADERS) +
    "".join(f'#include "{name}"\n' for name in HEADERS),
    sources=[f"src/cellvisor/core/_native/{name}" for name in SOURCES],
    include_dirs=["src/cellvisor/core/_native"],
    extra_compile_args=["-O2", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
                        "-Wno-missing-field-initializers", "-Wno-cast-function-type", "-std=gnu11"],
    py_limited_api=True,
)
