"""A KVM VM: memory slots, interrupt lines, doorbells. One object per incarnation of the machine.

A guest reset throws the VM away and makes a new one (linux/kvm.h; Documentation/virt/kvm/api.rst).
"""

from __future__ import annotations

import contextlib
import os
import stat

from cellvisor.core._native import _native
from cellvisor.core.errors import Internal, UsageError
from cellvisor.core.mem import layout

lib, ffi = _native.lib, _native.ffi
KVM_DEVICE = "/dev/kvm"
API_VERSION = 12


def check(result: int, what: str) -> int:
    """Return `result` of a native call, or raise Internal naming what failed."""
    if result < 0:
        raise Internal(f"{what}: {os.strerror(-result)}")
    return result


class Kvm:
    """/dev/kvm, opened once per core."""

    def __init__(self, path: str = KVM_DEVICE) -> None:
        """Open and check. Raises UsageError saying what the user can do."""
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            hint = "load kvm_intel or kvm_amd, or enable it in the firmware"
            if isinstance(error, PermissionError):
                hint = _how_to_open(path)
            raise UsageError(f"{path}: {error.strerror}", hint=hint) from None
        version = check(lib.cv_ioctl(self.fd, lib.KVM_GET_API_VERSION, 0), "KVM_GET_API_VERSION")
        if version != API_VERSION:
            raise UsageError(f"{path}: API version {version}, not {API_VERSION}", hint="update the kernel")
        self.run_size = check(lib.cv_ioctl(self.fd, lib.KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE")
        for name in ("KVM_CAP_IMMEDIATE_EXIT", "KVM_CAP_IOEVENTFD_ANY_LENGTH"):
            if not self.extension(getattr(lib, name)):
                raise UsageError(f"{path}: lacks {name}", hint="Linux 4.13 or newer has it")
        self.phys_bits = min(int(lib.cv_phys_bits()), layout.DEFAULT_PHYS_BITS)
        self.tsc_deadline = bool(self.extension(lib.KVM_CAP_TSC_DEADLINE_TIMER))

    def extension(self, number: int) -> int:
        """Return KVM_CHECK_EXTENSION of `number`; 0 means no."""
        return int(lib.cv_ioctl(self.fd, lib.KVM_CHECK_EXTENSION, number))

    def close(self) -> None:
        """Close /dev/kvm."""
        os.close(self.fd)


def _how_to_open(path: str) -> str:
    """Say how this user gets to open it: through the group that may, if there is one."""
    import grp  # not for who is not refused

    status = os.stat(path)
    if status.st_gid and status.st_mode & stat.S_IWGRP:
        with contextlib.suppress(KeyError):
            return f"sudo usermod -aG {grp.getgrgid(status.st_gid).gr_name} $USER, and log in again"
    return f"sudo setfacl -m u:$USER:rw {path}"


class Vm:
    """One KVM VM with its in-kernel interrupt controllers."""

    def __init__(self, kvm: Kvm) -> None:
        self.kvm = kvm
        self.fd = check(lib.cv_ioctl(kvm.fd, lib.KVM_CREATE_VM, 0), "KVM_CREATE_VM")
        os.set_inheritable(self.fd, False)
        identity = ffi.new("uint64_t *", layout.KVM_IDENTITY_MAP)
        check(lib.cv_ioctl(self.fd, lib.KVM_SET_TSS_ADDR, layout.KVM_TSS), "KVM_SET_TSS_ADDR")
        check(lib.cv_ioctl(self.fd, lib.KVM_SET_IDENTITY_MAP_ADDR, int(ffi.cast("uintptr_t", identity))),
              "KVM_SET_IDENTITY_MAP_ADDR")
        check(lib.cv_ioctl(self.fd, lib.KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP")
        self._slots: dict[int, int] = {}  # gpa -> slot

    def add_memory(self, gpa: int, size: int, host: int, *, readonly: bool = False) -> None:
        """Show `size` bytes at host address `host` to the guest at `gpa`."""
        slot = next(number for number in range(len(self._slots) + 1) if number not in self._slots.values())
        flags = lib.KVM_MEM_READONLY if readonly else 0
        check(lib.cv_vm_set_region(self.fd, slot, flags, gpa, size, host), f"memory slot at {gpa:#x}+{size:#x}")
        self._slots[gpa] = slot

    @property
    def memory_slots(self) -> int:
        """Return how many slots KVM has."""
        return len(self._slots)

    def remove_memory(self, gpa: int) -> None:
        """Take the slot at `gpa` away."""
        slot = self._slots.pop(gpa)
        check(lib.cv_vm_set_region(self.fd, slot, 0, gpa, 0, 0), f"removing memory slot at {gpa:#x}")

    def irq_line(self, gsi: int, level: bool) -> None:
        """Drive IOAPIC pin `gsi`."""
        check(lib.cv_vm_irq_line(self.fd, gsi, int(level)), f"KVM_IRQ_LINE {gsi}")

    def assign_doorbell(self, eventfd: int, gpa: int) -> None:
        """Signal `eventfd` on any write at `gpa` without leaving the kernel (length 0: any width)."""
        check(lib.cv_vm_ioeventfd(self.fd, eventfd, gpa, 0, 0), f"ioeventfd at {gpa:#x}")

    def deassign_doorbell(self, eventfd: int, gpa: int) -> None:
        """Undo assign_doorbell."""
        flags = lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        check(lib.cv_vm_ioeventfd(self.fd, eventfd, gpa, 0, flags), f"ioeventfd at {gpa:#x}")

    def assign_irqfd(self, eventfd: int, gsi: int) -> None:
        """Raise `gsi` whenever `eventfd` is written; a count that is pending fires at once."""
        check(lib.cv_vm_irqfd(self.fd, eventfd, gsi, 0), f"irqfd for gsi {gsi}")

    def deassign_irqfd(self, eventfd: int, gsi: int) -> None:
        """Undo assign_irqfd; what is written from now on stays in the eventfd."""
        check(lib.cv_vm_irqfd(self.fd, eventfd, gsi, lib.KVM_IRQFD_FLAG_DEASSIGN), f"irqfd for gsi {gsi}")

    def set_routes(self, routes: dict[int, tuple[int, int]]) -> None:
        """Route gsi -> (message address, data); the IOAPIC's pins keep theirs."""
        table = ffi.new("struct cv_msi_route[]", max(1, len(routes)))
        for entry, (gsi, (address, data)) in zip(table, routes.items(), strict=False):
            entry.gsi, entry.address, entry.data = gsi, address, data
        check(lib.cv_vm_set_routes(self.fd, layout.IOAPIC_PINS, table, len(routes)), "KVM_SET_GSI_ROUTING")

    def close(self) -> None:
        """Close the VM; its vCPUs must be closed too before KVM lets go of it."""
        os.close(self.fd)
