"""One log line format for every process: time, process, level, text. To stderr and, if set, to one file."""

from __future__ import annotations

import logging
import os
import sys
import time

BURST, EVERY = 50, 5.0  # lines of one kind at once; after that one in so many seconds
UNLIMITED = "cellvisor.guest"  # the guest's own words, which are limited where they come in
LIMIT = 64 << 20  # bytes of a log file: a guest that causes warnings must not fill the disk
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _Collected(logging.FileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is not None and os.fstat(self.stream.fileno()).st_size < LIMIT:
            super().emit(record)


class _Calm(logging.Filter):
    """Keeps lines of one kind rare: a guest or a worker may decide how often there is a reason for them.

    A kind is a logger and a format string. Errors always pass, and each of them is about something that ended.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, object], list[float]] = {}  # room, when that was, left out

    def filter(self, record: logging.LogRecord) -> bool:
        passes: bool | None = getattr(record, "passes", None)  # two handlers ask about each record
        if passes is None:
            exempt = record.levelno >= logging.ERROR or record.name == UNLIMITED
            passes = record.passes = exempt or self._has_room(record)
        return passes

    def _has_room(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        kind = self._kinds.setdefault((record.name, record.msg), [BURST, now, 0])
        kind[0], kind[1] = min(BURST, kind[0] + (now - kind[1]) / EVERY), now
        if kind[0] < 1:
            kind[2] += 1
            return False
        if kind[2] and isinstance(record.args, tuple):
            record.msg, record.args = f"{record.msg} (and %d more like it)", (*record.args, int(kind[2]))
        kind[0], kind[2] = kind[0] - 1, 0
        return True


def setup(process: str, verbosity: int = 0, path: str | None = None) -> logging.Logger:
    """Configure logging for this process.

    `process` names it in each line ("core", "disk0/1"). `verbosity` counts -v flags and is what stderr
    shows; `path` collects INFO and above whatever the verbosity, up to LIMIT bytes (O_APPEND, so processes may
    share it). Lines that repeat are thinned out.
    """
    logger = logging.getLogger("cellvisor")
    logger.handlers.clear()
    logger.propagate = False
    level = _LEVELS[min(verbosity, len(_LEVELS) - 1)]
    form = logging.Formatter(f"%(asctime)s.%(msecs)03d {process} %(levelname)s %(message)s", "%H:%M:%S")
    stderr = logging.StreamHandler(sys.stderr)
    stderr.terminator = "\r\n" if os.isatty(2) else "\n"
    stderr.setLevel(level)
    handlers: list[logging.Handler] = [stderr]
    if path:
        collected = _Collected(path, mode="a")
        collected.setLevel(min(level, logging.INFO))
        handlers.append(collected)
    calm = _Calm()
    for handler in handlers:
        handler.setFormatter(form)
        handler.addFilter(calm)
        logger.addHandler(handler)
    logger.setLevel(min(handler.level for handler in handlers))
    return logger


def get(name: str = "") -> logging.Logger:
    """Return cellvisor's logger, or its child `name`."""
    return logging.getLogger(f"cellvisor.{name}" if name else "cellvisor")
