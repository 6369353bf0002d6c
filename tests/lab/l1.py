"""L1: one emulated Debian machine, and a connection to the agent in it.

    new --start()--> booting --hello--> ready --close() / its death--> ended

Parameters are measured ones: a single vCPU, for nested SVM corrupts L1's kernel under multi-threaded TCG with
two; an uncompressed kernel, for unpacking one takes seconds here.
"""

from __future__ import annotations

import atexit
import base64
import json
import queue
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.debian import need
from tests.lab import image, initramfs, tree

BOOT_SECONDS = 180
HANGS_AFTER = 180.0  # seconds without a heartbeat, which comes every 10
MEMORY_MIB = 4096
PORT_NAME = "cellvisor.lab"
HERE = Path(__file__).parent


class Died(RuntimeError):
    """L1 ended or hangs; the message carries the end of its console."""


class Hung(Died):
    """L1 executes nothing any more, the agent's heartbeat included: nested SVM under TCG loses its timer at times."""


class Job:
    """One command in L1. Iterate over it for ("out", text), ("said", line) and at last ("exit", status)."""

    def __init__(self, machine: L1, number: int) -> None:
        self._machine = machine
        self.number = number
        self.events: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def next(self, timeout: float) -> tuple[str, Any]:
        """Return the next event. Raises Hung; Died if L1 ended, or this job said nothing for `timeout` seconds."""
        until = time.monotonic() + timeout
        while True:
            try:
                kind, value = self.events.get(timeout=1.0)
                break
            except queue.Empty:
                if self._machine.silence > HANGS_AFTER:
                    raise Hung(f"L1's heart stopped {HANGS_AFTER:.0f} s ago\n{self._machine.console()}") from None
                if time.monotonic() > until:
                    raise Died(f"L1 said nothing for {timeout:.0f} s\n{self._machine.console()}") from None
        if kind == "died":
            raise Died(f"L1 ended\n{self._machine.console()}")
        return kind, value

    def say(self, line: str) -> None:
        """Send a line to the job's channel."""
        self._machine.send({"id": self.number, "say": line})

    def signal(self, number: int) -> None:
        """Send a signal to the job's process group."""
        self._machine.send({"id": self.number, "signal": number})


class L1:
    """One L1 machine; a context manager. Safe to run several side by side."""

    def __init__(self, *, name: str = "L1", qemu_args: Sequence[str] = (), cmdline: str = "") -> None:
        self.name = name
        self._qemu_args = list(qemu_args)
        self._cmdline = cmdline
        self._folder = Path(tempfile.mkdtemp(prefix="cellvisor-lab-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._jobs: dict[int, Job] = {}
        self._hello = threading.Event()
        self._dead = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._last = 0
        self._heard = time.monotonic()
        self.boot_seconds = 0.0

    def __enter__(self) -> L1:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Boot and wait for the agent. Raises Died, Missing."""
        atexit.register(self.close)
        image.l1()  # the first time this takes minutes, which are no part of the boot
        began = time.monotonic()
        port = self._folder / "agent"
        command = [*self.command(), "-display", "none", "-serial", f"file:{self._console}",
                   "-chardev", f"socket,id=agent,path={port},server=on,wait=off",
                   "-device", "virtio-serial-pci,max_ports=2",
                   "-device", f"virtserialport,chardev=agent,name={PORT_NAME}"]
        with (self._folder / "qemu.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                             start_new_session=True)
        self._socket = self._connect(port, began + BOOT_SECONDS)
        threading.Thread(target=self._read, args=(self._socket,), daemon=True).start()
        while not self._hello.wait(0.05):
            if self._closed.is_set():
                self.close()  # again, for it was closed before there was a process to end
            if self._dead.is_set() or self._process.poll() is not None:
                raise Died(f"L1 ended while booting\n{self.console()}")
            if time.monotonic() > began + BOOT_SECONDS:
                raise Died(f"L1 did not boot within {BOOT_SECONDS} s\n{self.console()}")
        self.boot_seconds = time.monotonic() - began

    def command(self) -> list[str]:
        """Return QEMU's command line, less the serial port and the agent's port."""
        parts = image.l1()
        qemu, setpriv = need("qemu-system-x86_64", "qemu-system-x86"), need("setpriv", "util-linux")
        initrd = self._folder / "initrd"
        own = initramfs.overlay({"init": (HERE / "l1-boot.sh").read_bytes()})
        initrd.write_bytes(parts.initrd.read_bytes() + own)
        disk = tree.pack(self._folder / "tree.tar")
        return [
            # Killed with the thread that started it, should that end without close().
            setpriv, "--pdeathsig", "KILL", qemu,
            "-accel", "tcg,thread=multi,tb-size=512", "-M", "q35,kernel-irqchip=off", "-cpu", "max,-xsave",
            "-smp", "1", "-m", str(MEMORY_MIB), "-no-reboot", "-nodefaults", "-no-user-config",
            "-kernel", str(parts.vmlinux), "-initrd", str(initrd),
            "-append", f"console=ttyS0 quiet loglevel=3 panic=-1 {self._cmdline}",
            # snapshot: what a test writes goes to an unlinked file and is gone with the machine.
            "-drive", f"file={parts.root},format=raw,if=virtio,cache=unsafe,snapshot=on",
            "-drive", f"file={disk},format=raw,if=virtio,cache=unsafe,read-only=on",
            "-device", "virtio-rng-pci", *self._qemu_args,
        ]

    def run(self, argv: Sequence[str], *, env: dict[str, str] | None = None, cwd: str = "/cellvisor",
            timeout: float = 600, output: Callable[[str], object] | None = None) -> tuple[int, str]:
        """Run a command to its end; return its status and all it said. `output` gets pieces as they come.

        Raises Died when L1 ends or the command says nothing for `timeout` seconds.
        """
        job = self.job(argv, env=env, cwd=cwd)
        said: list[str] = []
        while True:
            kind, value = job.next(timeout)
            if kind == "exit":
                return int(value), "".join(said)
            if kind == "out":
                said.append(value)
                if output is not None:
                    output(value)

    def job(self, argv: Sequence[str], *, env: dict[str, str] | None = None, cwd: str = "/cellvisor",
            channel: bool = False) -> Job:
        """Start a command. With `channel` it gets a socket of lines, its number in CELLVISOR_LAB_CHANNEL."""
        job = self._new_job()
        self.send({"id": job.number, "run": list(argv), "env": env or {}, "cwd": cwd, "channel": channel})
        return job

    def put(self, path: str, data: bytes) -> None:
        """Write a file in L1."""
        job = self._new_job()
        self.send({"id": job.number, "put": path, "data": base64.b64encode(data).decode()})
        job.next(60)

    def send(self, message: dict[str, Any]) -> None:
        """Send one request to the agent. Raises Died."""
        try:
            assert self._socket is not None
            with self._lock:
                self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise Died(f"L1 is gone ({error})\n{self.console()}") from None

    def console(self, lines: int = 40) -> str:
        """Return the end of L1's console and of QEMU's own output."""
        text = ""
        for path in (self._console, self._folder / "qemu.log"):
            if path.exists() and (tail := path.read_text(errors="replace").splitlines()[-lines:]):
                text += "\n".join([f"--- {self.name} {path.name}", *tail, ""])
        return text or f"--- {self.name}'s console is empty\n"

    def close(self) -> None:
        """End the machine and remove its files; safe to call twice and from another thread."""
        self._closed.set()
        atexit.unregister(self.close)
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _console(self) -> Path:
        return self._folder / "console"

    def _new_job(self) -> Job:
        with self._lock:
            self._last += 1
            job = self._jobs[self._last] = Job(self, self._last)
        if self._dead.is_set():
            job.events.put(("died", None))
        return job

    def _connect(self, path: Path, until: float) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        while True:
            try:
                sock.connect(str(path))
                return sock
            except OSError:
                assert self._process is not None
                if self._process.poll() is not None or time.monotonic() > until:
                    sock.close()
                    raise Died(f"QEMU did not start\n{self.console()}") from None
                time.sleep(0.02)

    def _read(self, sock: socket.socket) -> None:
        try:
            with sock.makefile("rb") as lines:
                for line in lines:
                    self._take(json.loads(line))
        except (OSError, ValueError):
            pass  # closed under us, or cut in the middle of a line
        self._dead.set()
        for job in list(self._jobs.values()):
            job.events.put(("died", None))

    @property
    def silence(self) -> float:
        """Return for how many seconds nothing was heard of it."""
        return time.monotonic() - self._heard

    def _take(self, message: dict[str, Any]) -> None:
        self._heard = time.monotonic()
        if "beat" in message:
            return
        if "hello" in message:
            self._hello.set()
            return
        job = self._jobs.get(message.pop("id"))
        if job is None:
            return
        for kind, value in message.items():
            job.events.put((kind, value))
            if kind == "exit":
                self._jobs.pop(job.number, None)


def chatter(job: Job, timeout: float) -> Iterator[tuple[str, Any]]:
    """Yield a job's events up to its exit."""
    kind = ""
    while kind != "exit":
        kind, value = job.next(timeout)
        yield kind, value
