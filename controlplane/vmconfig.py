"""A VM as it is ordered: by flags, or by the VmConfig JSON of vm.create (Cloud Hypervisor's)."""

from __future__ import annotations

from dataclasses import dataclass

from cellvisor.controlplane.config import Cpus, Memory, Payload, Serial
from cellvisor.controlplane.inventory import Wanted


@dataclass(frozen=True, slots=True)
class Order:
    """What to boot, with which devices; they get ids and slots when the VM is created."""

    payload: Payload
    cpus: Cpus
    memory: Memory
    serial: Serial
    wanted: tuple[Wanted, ...]
