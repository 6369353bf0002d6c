"""L2: a stock Debian kernel under `cellvisor run`, with an agent that runs commands in it.

    new --start()--> booting --@@ready--> up --poweroff() / exit of the VMM--> ended
                        ^                  |
                        +---- a reset -----+   await_agent() again

Runs wherever KVM can run Linux: in L1, or directly on a machine with hardware KVM.
"""

from __future__ import annotations

import itertools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.lab import initramfs, vmms

BOOT_SECONDS = 400.0  # 15 to 60 on an idle machine; other work on it must not fail a test
HERE = Path(__file__).parent


class GuestError(AssertionError):
    """The guest or its VMM did not do what a test needs; carries the ends of all logs."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command in the guest gave."""

    status: int
    output: str


def kernels() -> Path:
    """Return the folder of guest kernels, building it where it is not part of the machine."""
    given = os.environ.get("CELLVISOR_LAB_GUESTS")
    if given:
        return Path(given)
    from tests.lab import image

    return image.guests()


class Linux:
    """One guest; a context manager that leaves no process and no file behind.

    `disks` are texts as for --disk; `args` go to the VMM as they are; `files` are added to the initramfs
    ("init" replaces the agent's); `cmdline` is appended. `agent` is the console used for commands.
    """

    def __init__(self, flavour: str = "cloud", *, image: str = "vmlinux", cpus: int = 1, memory: str = "512M",
                 disks: Sequence[str] = (), cmdline: str = "", args: Sequence[str] = (), agent: str = "hvc0",
                 files: dict[str, bytes] | None = None,
                 vmm: Callable[[vmms.Machine], list[str]] = vmms.cellvisor) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="guest-"))
        source = kernels() / flavour
        own = initramfs.overlay({"init": (HERE / "l2-init.sh").read_bytes(), **(files or {})})
        initrd = self.folder / "initrd"
        initrd.write_bytes((source / "initrd").read_bytes() + own)
        self.machine = vmms.Machine(
            kernel=source / image, initrd=initrd, cpus=cpus, memory=memory, disks=tuple(disks),
            cmdline=f"console=ttyS0 quiet panic=-1 lab_agent={agent} {cmdline}".strip(),
            socket=self.folder / "agent", serial_log=self.folder / "serial", agent=agent, args=tuple(args))
        self._vmm = vmm
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._pending = b""
        self._nonces = itertools.count(1)
        self._began = time.monotonic()
        self.boot_seconds = 0.0

    def __enter__(self) -> Linux:
        try:
            self.start()
            self.await_agent()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Start the VMM; await_agent() follows."""
        self._began = time.monotonic()
        with (self.folder / "vmm.log").open("wb") as log:
            self._process = subprocess.Popen(self._vmm(self.machine), stdin=subprocess.DEVNULL, stdout=log,
                                             stderr=log, env=self.environment, start_new_session=True)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of this VM's commands: a run directory of its own, which also marks its processes."""
        return {**os.environ, "XDG_RUNTIME_DIR": str(self.folder)}

    def ctl(self, verb: str, *arguments: str, timeout: float = 120) -> str:
        """Run `cellvisor VERB` on this VM and return what it prints; its status must be 0."""
        done = subprocess.run([vmms.cellvisor_command(), verb, *arguments], capture_output=True, text=True,
                              env=self.environment, timeout=timeout, check=False)
        if done.returncode:
            raise GuestError(f"cellvisor {verb} gave status {done.returncode}: {done.stderr}\n{self.logs()}")
        return done.stdout

    def processes(self) -> dict[int, str]:
        """Return {pid: command line} of every process of this VM, orphans included, zombies not."""
        mark, found = f"XDG_RUNTIME_DIR={self.folder}".encode(), {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
                except OSError:
                    continue  # ended meanwhile
        return found

    def await_end(self, timeout: float = 30) -> None:
        """Wait until none of the VM's processes is left, and see that its run directory is gone."""
        until = time.monotonic() + timeout
        while left := self.processes():
            if time.monotonic() > until:
                raise GuestError(f"still there after the VM ended: {left}\n{self.logs()}")
            time.sleep(0.1)
        rest = [str(path) for path in (self.folder / "cellvisor").rglob("*")]
        if rest:
            raise GuestError(f"left in the run directory: {rest}")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The VMM's first process."""
        assert self._process is not None, "the guest was not started"
        return self._process

    def await_agent(self, timeout: float = BOOT_SECONDS) -> float:
        """Wait until the agent greets, at start or after a reset; return the guest's uptime in seconds."""
        until = time.monotonic() + timeout
        if self._socket is None:
            self._socket = self._connect(until)
        greeting = self._read_until(re.compile(rb"@@ready ([0-9.]+)\r?\n"), until, "the agent's greeting")
        self.boot_seconds = time.monotonic() - self._began
        return float(greeting[1])

    def run(self, command: str, timeout: float = 60, check: bool = True) -> str:
        """Run one line of shell in the guest and return its output. With `check` its status must be 0."""
        result = self.try_run(command, timeout)
        if check and result.status:
            raise GuestError(f"{command!r} gave status {result.status} in the guest:\n{result.output}")
        return result.output

    def try_run(self, command: str, timeout: float = 60) -> Result:
        """Run one line of shell in the guest and return its status and output."""
        if "\n" in command:
            raise ValueError("the agent reads one line at a time")
        nonce = f"{next(self._nonces)}.{os.getpid()}"
        self.type(f"{nonce} {command}\n")
        pattern = re.compile(b"@@" + re.escape(nonce.encode()) + rb" (\d+)\r?\n")
        found = self._read_until(pattern, time.monotonic() + timeout, repr(command))
        before = found.string[:found.start()]
        return Result(int(found[1]), before.decode(errors="replace").replace("\r\n", "\n"))

    def type(self, text: str) -> None:
        """Send text to the agent's console as it is."""
        assert self._socket is not None
        try:
            self._socket.sendall(text.encode())
        except OSError as error:
            raise GuestError(f"the agent's console is gone ({error})\n{self.logs()}") from None

    def poweroff(self, timeout: float = 60) -> int:
        """Power the guest off from inside and return the VMM's exit status."""
        self.type(f"{next(self._nonces)} poweroff -f\n")
        return self.wait(timeout)

    def reboot(self, timeout: float = BOOT_SECONDS) -> None:
        """Reboot the guest from inside and wait until its agent is back."""
        self.type(f"{next(self._nonces)} reboot -f\n")
        self.await_agent(timeout)

    def wait(self, timeout: float = 60) -> int:
        """Wait for the VMM to exit; return its status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the VMM did not exit within {timeout:.0f} s\n{self.logs()}") from None

    def serial(self) -> str:
        """Return what the guest wrote to ttyS0."""
        return _text(self.machine.serial_log)

    def logs(self) -> str:
        """Return the ends of everything this guest and its VMM said."""
        unread = self._pending.decode(errors="replace")
        said = {"VMM": _text(self.folder / "vmm.log"), "serial": self.serial(), "agent": unread}
        state = "not started" if self._process is None else f"exit status {self._process.poll()}"
        spent = {pid: _cpu_seconds(pid) for pid in self.processes()}
        state += f", {time.monotonic() - self._began:.0f} s since its start, CPU seconds spent {spent}"
        return f"--- VMM: {state}\n" + "".join(
            f"--- {name}\n" + "\n".join(text.splitlines()[-40:]) + "\n" for name, text in said.items() if text)

    def close(self) -> None:
        """End the VMM with SIGTERM, then SIGKILL, and remove the guest's files."""
        if self._socket is not None:
            self._socket.close()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _connect(self, until: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        while True:
            try:
                sock.connect(str(self.machine.socket))
                return sock
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    sock.close()
                    raise GuestError(f"no console to talk to\n{self.logs()}") from None
                time.sleep(0.05)

    def _read_until(self, pattern: re.Pattern[bytes], until: float, what: str) -> re.Match[bytes]:
        assert self._socket is not None
        while not (found := pattern.search(self._pending)):
            left = until - time.monotonic()
            ready = left > 0 and select.select([self._socket], [], [], left)[0]
            if not ready:
                raise GuestError(f"timed out waiting for {what}\n{self.logs()}")
            data = self._socket.recv(65536)
            if not data:
                raise GuestError(f"the console closed while waiting for {what}\n{self.logs()}")
            self._pending += data
        self._pending = self._pending[found.end():]
        return found


def _cpu_seconds(pid: int) -> float:
    """Return what a process used so far: a starved one and one that hangs look alike otherwise."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
