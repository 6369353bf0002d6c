"""What a VM costs: its processes with their proportional memory, and how long each step of the boot took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cellvisor.core.errors import UsageError


def memory_kib(pid: int) -> dict[str, int]:
    """Return {"pss", "pss_shmem"} of a process in KiB, {} if it is gone.

    Guest RAM is shared memory: it counts in `pss`, divided among those who map it, and is told apart in
    `pss_shmem`.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup") as lines:
            words = {line.split()[0]: line.split() for line in lines}
    except OSError:
        return {}
    found = {"pss": words.get("Pss:"), "pss_shmem": words.get("Pss_Shmem:")}
    return {key: int(value[1]) for key, value in found.items() if value}


def process(role: str, pid: int, parent: int, **more: Any) -> dict[str, Any]:
    """Describe one process of the VM."""
    return {"role": role, "pid": pid, "parent": parent, **memory_kib(pid), **more}


class Stages:
    """Moments of the boot, in ns of CLOCK_MONOTONIC, which is one clock for all processes."""

    def __init__(self, began: int) -> None:
        self._began = began
        self._found: list[tuple[str, int]] = []

    def add(self, name: str, moment: int) -> None:
        """Record `name`, the first time it is seen since boot; at most 256 of them."""
        if len(self._found) < 256 and all(name != known for known, _ in self._found):
            self._found.append((name, moment))

    def as_wire(self) -> list[dict[str, Any]]:
        """Return [{"name", "ms"}] since the command was started, in order of time."""
        ordered: Sequence[tuple[str, int]] = sorted(self._found, key=lambda entry: entry[1])
        return [{"name": name, "ms": round((moment - self._began) / 1e6, 3)} for name, moment in ordered]


def write(path: str, body: dict[str, Any]) -> None:
    """Write the report as JSON. Raises UsageError naming the flag."""
    try:
        with open(path, "w") as file:
            json.dump(body, file, indent=2, default=str)
            file.write("\n")
    except OSError as error:
        raise UsageError(f"--report {path}: {error.strerror}") from None
