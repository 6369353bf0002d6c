"""What the lab is made of. Whatever is named here is part of the image's key: a change builds a new image.

L1 is a Debian machine that QEMU emulates, AMD's SVM included; L2 is the guest under test, a stock kernel.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

SUITE = "bookworm"
PYTHON = "3.11"  # bookworm's
IMAGE_BYTES = 3 << 30  # sparse; what is not used is room for the tests' disks
BUILD_BYTES = 4 << 30  # what a build needs at most while it runs

# QEMU is in the image for VFIO's sake and to compare with: the same guest, the same lab.
L1_PACKAGES = (
    "acpica-tools", "busybox-static", "e2fsprogs", "fio", "iperf3", "iproute2", "kmod", "passt", "pciutils", "procps",
    "python3", "qemu-system-x86",
)
L1_LEFT_OUT = ("/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*", "/usr/share/qemu/*-*.fd")
# pip and setuptools install out-of-tree devices in there, without a network.
PYTHON_PACKAGES = (
    "cffi", "h11", "hypothesis", "msgpack", "pip", "pytest", "pytest-timeout", "pyzmq", "rich", "setuptools",
    "uvloop", "wheel",
)

# To reach the root file system. ext4 asks for crc32c by a soft dependency, which is not followed here.
L1_BOOT_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
L1_MODULES = (
    *L1_BOOT_MODULES, "virtio_console", "virtio_net", "virtio_rng", "9p", "9pnet_virtio", "bridge", "dummy",
    "e1000e", "fuse", "kvm", "kvm_amd", "kvm_intel", "loop", "macvtap", "nbd", "null_blk", "nvme", "overlay",
    "tap", "tun", "veth", "vfio", "vfio_iommu_type1", "vfio_pci", "vhost_net", "vhost_vsock", "virtiofs",
    "vsock_loopback",
)
L2_MODULES = (
    "virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon", "virtio_mem",
    "virtio_pmem", "nd_virtio", "nd_pmem", "virtiofs", "vsock", "vmw_vsock_virtio_transport",
    "crc32c_generic", "ext4", "nvme", "msr", "fuse", "button", "evdev",
)
# The cloud flavour lacks what no cloud has.
FLAVOURS: dict[str, tuple[str, ...]] = {"cloud": (), "amd64": ("e1000e",)}


def key() -> str:
    """Return twelve characters that change when the image has to be built anew."""
    from tests.lab import image, initramfs

    digest = hashlib.sha256()
    for module in (sys.modules[__name__], image, initramfs):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:12]


def cache() -> Path:
    """Return the folder of what is built once ($CELLVISOR_LAB_CACHE, else .lab of the checkout)."""
    return Path(os.environ.get("CELLVISOR_LAB_CACHE") or CHECKOUT / ".lab")
