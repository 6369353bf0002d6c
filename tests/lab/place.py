"""Where Linux guests can run: right here on hardware KVM, or in the nested lab. Says why, for people."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Place:
    """`direct`: this very machine runs them (`inside`: it is L1 itself). `why` completes a sentence."""

    direct: bool
    why: str
    inside: bool = False


def find() -> Place:
    """Decide. CELLVISOR_LAB=nested|direct overrides; raises ValueError for any other value."""
    if os.environ.get("CELLVISOR_IN_LAB") == "1":
        return Place(True, "this is the lab's L1", inside=True)
    wish = os.environ.get("CELLVISOR_LAB", "")
    if wish not in ("", "nested", "direct"):
        raise ValueError(f"CELLVISOR_LAB={wish!r}: write nested or direct")
    if wish:
        return Place(wish == "direct", f"CELLVISOR_LAB={wish} says so")
    if not re.search(r"\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text()):
        what = "its /dev/kvm is kvm_pvm, which interprets a kernel instruction by instruction"
        return Place(False, what if Path("/sys/module/kvm_pvm").exists() else "its processor offers no VMX or SVM")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return Place(False, "/dev/kvm is missing" if not Path("/dev/kvm").exists() else "/dev/kvm is not ours to open")
    return Place(True, "it has hardware KVM")
