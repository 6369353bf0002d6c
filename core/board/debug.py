"""Debug ports: text on 0xe9 (Bochs) and 0x402 (firmware), boot stage codes on 0x80. Most of it ends in C."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from cellvisor.core.board.bus import ByteDevice

CONSOLE_PORT: Final = 0xE9
FIRMWARE_PORT: Final = 0x402
STAGE_PORT: Final = 0x80
PRESENT: Final = 0xE9  # what a read gives, by which guests detect the port

MAX_LINE: Final = 1024
BURST: Final = 1 << 20  # bytes that may come at once,
RATE: Final = 64 << 10  # and bytes a second after that: a guest must not fill the host's log
MAX_STAGES: Final = 64


class DebugConsole(ByteDevice):
    """Collects text and calls `sink(line)`, without line ends. What exceeds the rate is dropped."""

    def __init__(self, sink: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> None:
        self._sink = sink
        self._now = now
        self._line = bytearray()
        self._room = float(BURST)
        self._last = now()
        self.dropped = 0

    def read8(self, offset: int) -> int:
        """Return the byte that says the port is there."""
        return PRESENT

    def write8(self, offset: int, value: int) -> None:
        """Take one character."""
        self.feed(bytes((value,)))

    def feed(self, data: bytes) -> None:
        """Take what C collected."""
        now = self._now()
        self._room = min(float(BURST), self._room + (now - self._last) * RATE)
        self._last = now
        kept = data[:int(self._room)]
        self._room -= len(kept)
        self.dropped += len(data) - len(kept)
        for piece in kept.splitlines(keepends=True):
            self._line += piece
            if piece[-1] in b"\r\n" or len(self._line) >= MAX_LINE:
                self.flush()

    def flush(self) -> None:
        """Hand out a line that has no end yet."""
        while self._line:
            text = bytes(self._line[:MAX_LINE])
            del self._line[:MAX_LINE]
            line = text.decode("utf-8", "replace").rstrip("\r\n")
            if line:
                self._sink("".join(c if c.isprintable() or c == "\t" else "?" for c in line))


class StageLog(ByteDevice):
    """The last 64 codes written to port 0x80 with the time of each, CLOCK_MONOTONIC in ns."""

    def __init__(self, now: Callable[[], int] = time.monotonic_ns) -> None:
        self._now = now
        self._stages: deque[tuple[int, int]] = deque(maxlen=MAX_STAGES)
        self._last = 0

    def read8(self, offset: int) -> int:
        """Return the last code."""
        return self._last

    def write8(self, offset: int, value: int) -> None:
        """Note a code."""
        self._last = value
        self._stages.append((self._now(), value))

    def stages(self) -> list[tuple[int, int]]:
        """Return (ns, code), oldest first."""
        return list(self._stages)
