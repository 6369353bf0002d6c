"""cellvisor: a virtual machine monitor for Linux KVM in which every device is a process."""

from __future__ import annotations

__version__ = "0.1.0"
