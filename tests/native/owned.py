"""VMs whose controlplane, nursery or core is killed: started, found again, and counted to the last process."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import struct
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire import places
from cellvisor.ctl.client import Client
from tests.native.cellvisor import processes
from tests.native.guest import GuestResult, Running, build, parse

SHELL = """
import fcntl, os, subprocess, sys, termios, time
os.setsid()
terminal = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
log = open(sys.argv[2], "a")
subprocess.run(sys.argv[3:], stdin=terminal, stdout=terminal, stderr=log)
time.sleep(60)
"""
CRASH_RUN = Path(__file__).parents[1] / "fakes" / "crash_run.py"


def wait_for(condition: Callable[[], Any], what: str | Callable[[], str], seconds: float = 60.0) -> Any:
    """Return the first true value of `condition`; fails when time runs out, saying `what` was waited for."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what if isinstance(what, str) else what()}")


class OwnedVm:
    """A VM `web` in a directory of its own, controlplane included only at first. Use it as a context manager.

    `plan` is a CRASH_PLAN (tests/fakes/crash_run.py). `terminal`: a shell runs it in the foreground of a terminal.
    """

    def __init__(self, where: Path, cmdline: str, disks: Sequence[Path | str] = (), *extra: str,
                 plan: Sequence[str] | None = None, environ: dict[str, str] | None = None,
                 terminal: bool = False) -> None:
        self.where = where
        self.runtime = tempfile.mkdtemp(prefix="cv-")
        self.path = os.path.join(self.runtime, "cellvisor", "web")
        self.environ = {**os.environ, "XDG_RUNTIME_DIR": self.runtime, **(environ or {})}
        program = [str(Path(sys.executable).with_name("cellvisor"))]
        if plan is not None:
            (where / "plan").write_text("\n".join(plan))
            self.environ["CRASH_PLAN"] = str(where / "plan")
            program = [sys.executable, str(CRASH_RUN)]
        serial = where / "serial.txt"
        command = [*program, "run", "--name", "web", "--kernel", str(build()), "--cmdline", cmdline, "--serial",
                   f"file={serial}", "--console", "null", "--memory", "size=64M", *extra]
        for disk in disks:
            command += ["--disk", f"path={disk}" if isinstance(disk, Path) else disk]
        self._terminal = self._inside = -1
        if terminal:
            self._terminal, self._inside = os.openpty()
            os.set_blocking(self._terminal, False)
            # The shell must outlive it: with a session's leader its terminal goes away.
            command = [sys.executable, "-c", SHELL, os.ttyname(self._inside), str(where / "vmm.log"), *command]
        else:
            command.append("-v")
        self.running = Running(command, serial, where / "vmm.log", self.environ)
        if terminal:
            wait_for(lambda: Path(self.path, "pilot").exists(), "the VM")

    # ---- its terminal

    def is_cooked(self) -> bool:
        """Tell whether the terminal takes lines and echoes them."""
        flags = termios.tcgetattr(self._terminal)[3]
        return bool(flags & termios.ICANON and flags & termios.ECHO)

    def type(self, line: bytes) -> bytes:
        """Type a line; returns what the shell gets of it, after whoever else reads the terminal had time to."""
        os.write(self._terminal, line)
        time.sleep(0.5)
        waiting = struct.unpack("i", fcntl.ioctl(self._inside, termios.FIONREAD, bytes(4)))[0]
        return os.read(self._inside, waiting) if waiting else b""

    def screen(self) -> bytes:
        """Return what came to the terminal since the last call."""
        try:
            return os.read(self._terminal, 1 << 16)
        except BlockingIOError:
            return b""

    # ---- its processes

    def processes(self) -> dict[int, str]:
        """Return pid -> command line of every process of it; zombies do not count."""
        found = processes(self.runtime)
        if self._terminal >= 0:
            found.pop(self.running.process.pid, None)  # the shell
        return found

    def pids(self, role: str, device: str = "") -> list[int]:
        """Return the processes of a role as the controlplane tells them."""
        told = self.call("info", processes=True)["processes"]
        return [one["pid"] for one in told if one["role"] == role and device in ("", one.get("device"))]

    def kill_controlplane(self) -> None:
        """SIGKILL whoever steers it now."""
        words = dict(line.split() for line in Path(self.path, "pilot").read_text().splitlines())
        os.kill(int(words["pid"]), signal.SIGKILL)
        if int(words["pid"]) == self.running.process.pid:
            self.running.process.wait()

    # ---- its API

    def call(self, verb: str, /, **args: Any) -> Any:
        """Ask it. Raises what it answers."""
        with Client(self.path + "/", timeout=5.0) as client:
            return client.call(verb, **args)

    def answers(self) -> dict[str, Any] | None:
        """Return the answer to ping, None without one."""
        try:
            with Client(self.path + "/", timeout=0.5) as client:
                return dict(client.call("ping"))
        except CellvisorError:
            return None

    def wait_adopted(self, generation: int = 2) -> float:
        """Wait until the controlplane of that generation answers; returns how long adopting took, in ms."""

        def event() -> Any:
            if self.answers() is None:
                return None
            return next((one for one in self.call("events")["events"] if one["event"] == "vmm.adopted"
                         and one["properties"]["generation"] >= generation), None)

        return float(wait_for(event, lambda: f"controlplane {generation}: {self._log()}")["properties"]["ms"])

    def wait_event(self, name: str, seconds: float = 60.0, **properties: Any) -> dict[str, Any]:
        """Wait for an event that has these properties and return all of them."""

        def seen() -> Any:
            try:
                events = self.call("events")["events"]
            except CellvisorError:
                return None
            return [one["properties"] for one in events if one["event"] == name and
                    properties.items() <= one["properties"].items()]

        return dict(wait_for(seen, lambda: f"{name} {properties}: {self._log()}", seconds)[0])

    # ---- its end

    def finish(self, seconds: float = 120.0, *, tidy: bool = True) -> GuestResult:
        """Wait for the guest's verdict and for the last process; fails unless both are as they should be.

        Not `tidy`: who would have removed the directory may have been killed over it; the name must be free.
        """
        text = self.running.text
        until = time.monotonic() + seconds
        while not re.search(r"\nresult=.*\n", text) and time.monotonic() < until:
            time.sleep(0.02)
            text = self.running.text
        result = parse(text, None, self._log())
        if not result.ok:
            pytest.fail(f"guest: {result.reason or 'no result'}\n{text}\n--- stderr\n{self._log()}", pytrace=False)
        self.wait_gone(tidy=tidy)
        return result

    def wait_gone(self, seconds: float = 20.0, *, tidy: bool = True) -> None:
        """Wait until no process is left of it, nor its directory."""
        wait_for(lambda: not self.processes(), lambda: f"the end of {self.processes()}: {self._log()}", seconds)
        assert not os.path.exists(self.path) or not (tidy or places.holder(self.path)), os.listdir(self.path)

    def _log(self) -> str:
        return self.running.log.read_text(errors="replace")[-6000:]

    def __enter__(self) -> OwnedVm:
        return self

    def __exit__(self, *exc: object) -> None:
        for _ in range(5):  # who is left starts others
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
            if self._terminal >= 0:
                self.running.process.kill()
            self.running.process.wait()
            if not self.processes():
                break
            time.sleep(0.1)
        if self._terminal >= 0:
            os.close(self._terminal)
            os.close(self._inside)
        shutil.rmtree(self.runtime, ignore_errors=True)
