"""iperf3 between a guest, which is its client, and the host's end of its card: what arrives, and when."""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.debian import need
from tests.lab.guest import Linux
from tests.lab.hotplug import eventually
from tests.lab.net import Counts

LISTENS = f":{5201:04X} 00000000:0000 0A"  # its port in /proc/net/tcp
PATIENCE = 120.0  # seconds that a slow machine may need for a run beyond the run's own
STEP = 0.5        # seconds of an interval
BEGUN = 16 << 10  # bytes: more than it takes to agree on a run
PIECE = 64 << 10  # bytes: more than what is sent once more after a death

# Out is from the guest.
WAYS = {"out": "", "in": "--reverse", "both": "--bidir"}

Interval = tuple[float, float, int]  # from, to in seconds of the run, bytes that arrived


@dataclass(frozen=True, slots=True)
class Said:
    """What both ends say of a run that ended well."""

    guest: dict[str, Any]
    host: dict[str, Any]

    def arrivals(self) -> list[list[Interval]]:
        """Return what arrived in each interval of each stream; whoever receives it says so."""
        streams: list[list[Interval]] = []
        for said in (self.guest, self.host):
            for number, _ in enumerate(said["start"]["connected"]):
                parts = [interval["streams"][number] for interval in said["intervals"]]
                if not parts[0]["sender"]:
                    streams.append([(part["start"], part["end"], part["bytes"]) for part in parts])
        return streams

    def datagrams(self, place: str, *, sender: bool) -> dict[str, int]:
        """Return the counts of the datagrams that "guest" or "host" sent, or got: `packets` is the highest number."""
        streams: list[dict[str, Any]] = [stream["udp"] for stream in getattr(self, place)["end"]["streams"]]
        return next(stream for stream in streams if stream["sender"] == sender)


class Iperf:
    """One run of `seconds` in one of WAYS over the host's `tap`, which has `address`; `options` are the client's.

        with: both ends started, the first bytes through --> clock(), carries_on() --> result()
    """

    def __init__(self, guest: Linux, tap: str, address: str, way: str, seconds: int, options: str = "") -> None:
        self.seconds = seconds
        self._guest, self._tap, self._way = guest, tap, way
        self._command = f"iperf3 -c {address} -t {seconds} {WAYS[way]} {options} -i {STEP} -J"
        self._log = guest.folder / "iperf3.json"
        self._server: subprocess.Popen[bytes] | None = None
        self._began = 0.0

    def __enter__(self) -> Iperf:
        program = need("iperf3", "iperf3")
        with self._log.open("wb") as log:
            self._server = subprocess.Popen([program, "-4", "-s", "-1", "-J", "-i", str(STEP)], stdout=log, stderr=log,
                                            stdin=subprocess.DEVNULL)
        try:
            eventually(lambda: LISTENS in Path("/proc/thread-self/net/tcp").read_text(), "iperf3's server")
            before = Counts.of_host(self._tap)
            self._guest.run("rm -f /tmp/iperf.*")
            self._guest.run(f"({self._command} >/tmp/iperf.json 2>&1; echo $? >/tmp/iperf.status) >/dev/null 2>&1 &")
            eventually(lambda: self._moved(before) > BEGUN or self._status(), "iperf3's first bytes")
            self._began = time.monotonic()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._stop()

    def clock(self) -> float:
        """Return for how many seconds it has run: a little less than iperf3 would say."""
        return time.monotonic() - self._began

    def wait_for(self, second: float) -> None:
        """Sleep until a second of the run."""
        time.sleep(max(0.0, second - self.clock()))

    def carries_on(self) -> tuple[float, float] | None:
        """Wait until bytes move wherever they should; returns from when to when, or None if the run ends before."""
        since = self.clock() + 1.0  # no interval that began before
        self.wait_for(since)
        before = Counts.of_host(self._tap)
        eventually(lambda: self._moved(before) > PIECE or self.clock() > self.seconds, "bytes to move")
        until = self.clock() + 1.0
        self.wait_for(until)
        return (since, until) if until < self.seconds else None

    def result(self) -> Said:
        """Wait for the end, which must be a good one at both ends, and return what they say."""
        end = self._began + self.seconds + PATIENCE
        while not (status := self._status()):
            assert time.monotonic() < end, f"iperf3 does not end\n{self._failure()}"
            time.sleep(0.2)
        assert status == "0", self._failure()
        assert self._server is not None
        assert self._server.wait(PATIENCE) == 0, self._failure()
        said = Said(json.loads(self._guest.run("cat /tmp/iperf.json")), json.loads(self._log.read_text()))
        assert "error" not in said.guest
        assert "error" not in said.host
        return said

    def _moved(self, before: Counts) -> int:
        """Return how many bytes the guest has sent and got since then: of two ways the lesser."""
        now = Counts.of_host(self._tap)
        moved = {"out": now.received - before.received, "in": now.sent - before.sent}
        return min(moved.values()) if self._way == "both" else moved[self._way]

    def _status(self) -> str:
        return self._guest.try_run("cat /tmp/iperf.status 2>/dev/null").output.strip()

    def _failure(self) -> str:
        guest = self._guest.try_run("tail -n 40 /tmp/iperf.json").output
        return f"guest: {guest}\nhost: {self._log.read_text()[-2000:]}"

    def _stop(self) -> None:
        if self._server is not None and self._server.poll() is None:
            self._server.kill()
            self._server.wait()
