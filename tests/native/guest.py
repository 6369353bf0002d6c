"""Build the freestanding guest of tests/guest, start a VMM with it, read what it says.

The guest writes key=value lines to its serial port and ends with result=ok or result=fail reason=...
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import pytest

from tests.debian import need

SOURCES = Path(__file__).resolve().parent.parent / "guest"
BUILD = SOURCES / "build"
CFLAGS = [
    "-m64", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-strict-aliasing",
    "-fno-stack-protector", "-fno-tree-loop-distribute-patterns", "-fno-asynchronous-unwind-tables",
    "-fcf-protection=none", "-fno-pic", "-mcmodel=small", "-mno-red-zone", "-mgeneral-regs-only", "-mpopcnt",
]
LDFLAGS = [
    "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments", "-Wl,-z,noexecstack",
    "-Wl,-T,guest.ld",
]

HAVE_KVM = os.access("/dev/kvm", os.R_OK | os.W_OK)
needs_kvm = pytest.mark.skipif(not HAVE_KVM, reason="/dev/kvm is missing or not ours to open")


def build() -> Path:
    """Return the guest's ELF file, compiling it unless these very sources were compiled before."""
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h", ".S", ".ld"))
    digest = hashlib.sha256(" ".join((*CFLAGS, *LDFLAGS)).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    elf = BUILD / f"guest-{digest.hexdigest()[:16]}.elf"
    if elf.exists():
        return elf
    BUILD.mkdir(exist_ok=True)
    fresh = elf.with_suffix(f".{os.getpid()}")  # two processes may build at once: each its own, the last one stays
    code = [path.name for path in files if path.suffix in (".c", ".S")]
    command = [need("gcc", "gcc"), *CFLAGS, *LDFLAGS, *code, "-o", str(fresh)]
    done = subprocess.run(command, cwd=SOURCES, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the guest does not compile:\n{done.stderr}")
    fresh.replace(elf)
    for old in BUILD.glob("guest-*.elf"):
        if old != elf and old.stat().st_mtime < time.time() - 3600:
            old.unlink(missing_ok=True)
    return elf


@dataclass(frozen=True, slots=True)
class GuestResult:
    """What the guest said. `ok` is its own verdict, `status` the exit status of the VMM (None: it was killed)."""

    ok: bool
    reason: str
    values: Mapping[str, str]
    text: str
    status: int | None
    stderr: str
    seconds: float

    def number(self, key: str) -> int:
        """Return a value as an integer. Raises KeyError if the guest did not report it."""
        return int(self.values[key].split()[0], 0)

    def all(self, prefix: str) -> dict[str, str]:
        """Return the values whose key begins with `prefix`, by the rest of the key."""
        return {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}

    def check(self) -> GuestResult:
        """Return self if the guest was content and the VMM ended well; else fail with everything that was said."""
        if not self.ok or self.status != 0:
            pytest.fail(f"guest: {self.reason or 'no result'}; exit status {self.status}\n--- serial\n{self.text}"
                        f"\n--- stderr\n{self.stderr[-8000:]}", pytrace=False)
        return self


def parse(text: str, status: int | None = 0, stderr: str = "", seconds: float = 0.0) -> GuestResult:
    """Read the guest's output; of a key that comes twice the last value counts."""
    values: dict[str, str] = {}
    result, reason = "", ""
    for line in text.replace("\r", "").splitlines():
        key, found, value = line.partition("=")
        if not found or " " in key:
            continue
        if key == "result":
            result, _, reason = value.partition(" reason=")
        else:
            values[key] = value
    return GuestResult(result == "ok", reason, values, text, status, stderr, seconds)


class Running:
    """A VMM with the guest in it. Use it as a context manager: on leaving, whatever still runs is ended."""

    def __init__(self, command: Sequence[str], serial: Path, log: Path, env: Mapping[str, str] | None = None) -> None:
        self.command = list(command)
        self.serial = serial
        self.log = log
        self.began = time.monotonic()
        serial.unlink(missing_ok=True)
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
                                            env=dict(env) if env else None)

    @property
    def text(self) -> str:
        """All that the guest has said so far."""
        return self.serial.read_text(errors="replace") if self.serial.exists() else ""

    def wait_for(self, wanted: str, timeout: float = 60.0) -> str:
        """Wait until the guest has said `wanted`, to the end of the line, and return all it said.

        Fails when the VMM ends or time runs out.
        """
        deadline = time.monotonic() + timeout
        while "\n" not in "".join((text := self.text).partition(wanted)[1:]):
            if self.process.poll() is not None and wanted not in self.text:
                pytest.fail(f"the VMM ended before the guest said {wanted!r}\n{text}\n{self._stderr()}", pytrace=False)
            if time.monotonic() > deadline:
                pytest.fail(f"no {wanted!r} in {timeout} s\n{text}\n{self._stderr()}", pytrace=False)
            time.sleep(0.02)
        return text

    def finish(self, timeout: float = 120.0) -> GuestResult:
        """Wait for the end and return the result; a VMM that does not end in time is stopped (status None)."""
        status: int | None
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            status = None
        return parse(self.text, status, self._stderr(), time.monotonic() - self.began)

    def stop(self) -> None:
        """End the VMM: SIGTERM, and SIGKILL if that does not help within 10 s."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _stderr(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def __enter__(self) -> Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()


def make_disk(path: Path, size: int = 64 << 20) -> Path:
    """Create a sparse raw disk."""
    with path.open("wb") as disk:
        disk.truncate(size)
    return path


def have(program: str) -> bool:
    """Say whether a program is installed."""
    return shutil.which(program) is not None
