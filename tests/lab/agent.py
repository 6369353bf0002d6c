"""In L1: run commands for the host over a virtio-serial port, as JSON lines. A plain program, no package.

host -> L1                                       L1 -> host
  {"id", "run": [argv], "env", "cwd", "channel"}     {"id", "out": text} ... {"id", "exit": status}
  {"id", "say": line}   to the job's channel         {"id", "said": line}   from the job's channel
  {"id", "signal": number}                           {"hello": uptime}      once, at start
  {"id", "put": path, "data": base64}                {"id", "exit": 0}
                                                     {"beat": uptime}       every BEAT_SECONDS: L1 does not hang

When the host closes its end, L1 powers off: a killed host leaves no machine behind.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

PORT_NAME = "cellvisor.lab"
BEAT_SECONDS = 10.0


class Agent:
    """All jobs of one L1. The main thread reads requests; two threads per job read what it says."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._jobs: dict[int, subprocess.Popen[bytes]] = {}
        self._channels: dict[int, socket.socket] = {}

    def send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            while data:
                data = data[self._port.write(data):]

    def serve(self) -> None:
        self.send({"hello": _uptime()})
        threading.Thread(target=self._beat, daemon=True).start()
        for line in iter(self._port.readline, b""):
            try:
                self._handle(json.loads(line))
            except (ValueError, KeyError) as error:
                print(f"agent: bad request {line[:200]!r}: {error!r}", file=sys.stderr)

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self.send({"beat": _uptime()})

    def _handle(self, request: dict[str, Any]) -> None:
        job = int(request["id"])
        if "run" in request:
            self._start(job, request)
        elif "say" in request and job in self._channels:
            self._channels[job].sendall(request["say"].encode() + b"\n")
        elif "signal" in request and job in self._jobs:
            os.killpg(self._jobs[job].pid, request["signal"])
        elif "put" in request:
            Path(request["put"]).parent.mkdir(parents=True, exist_ok=True)
            Path(request["put"]).write_bytes(base64.b64decode(request["data"]))
            self.send({"id": job, "exit": 0})

    def _start(self, job: int, request: dict[str, Any]) -> None:
        environment = {**os.environ, **request.get("env", {})}
        pass_fds: tuple[int, ...] = ()
        theirs = None
        if request.get("channel"):
            ours, theirs = socket.socketpair()
            self._channels[job] = ours
            pass_fds = (theirs.fileno(),)
            environment["CELLVISOR_LAB_CHANNEL"] = str(theirs.fileno())
        try:
            process = subprocess.Popen(
                request["run"], env=environment, cwd=request["cwd"], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=pass_fds, start_new_session=True)
        except OSError as error:
            self._channels.pop(job, None)
            self.send({"id": job, "out": f"{error}\n"})
            self.send({"id": job, "exit": 127})
            return
        finally:
            if theirs is not None:
                theirs.close()
        self._jobs[job] = process
        threading.Thread(target=self._watch, args=(job, process), daemon=True).start()

    def _watch(self, job: int, process: subprocess.Popen[bytes]) -> None:
        listener = None
        if job in self._channels:
            listener = threading.Thread(target=self._listen, args=(job, self._channels[job]), daemon=True)
            listener.start()
        assert process.stdout is not None
        output = process.stdout.fileno()
        while data := os.read(output, 65536):
            self.send({"id": job, "out": data.decode(errors="replace")})
        if listener is not None:
            listener.join()
        status = process.wait()
        self._jobs.pop(job, None)
        self._channels.pop(job, None)
        self.send({"id": job, "exit": status})

    def _listen(self, job: int, channel: socket.socket) -> None:
        with channel.makefile("rb") as lines:
            for line in lines:
                self.send({"id": job, "said": line.decode().rstrip("\n")})


def _uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def _open_port() -> Port:
    for name in Path("/sys/class/virtio-ports").glob("*/name"):
        if name.read_text().strip() == PORT_NAME:
            return Port(os.open(f"/dev/{name.parent.name}", os.O_RDWR))
    raise SystemExit(f"agent: no virtio port named {PORT_NAME}")


class Port:
    """A character device with a buffered reader and an unbuffered writer, which one file object cannot be."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._reader = os.fdopen(os.dup(fd), "rb")

    def readline(self) -> bytes:
        return self._reader.readline()

    def write(self, data: bytes) -> int:
        return os.write(self._fd, data)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Agent(_open_port()).serve()
