"""One log line format for every process: time, process, level, text. To stderr and, if set, to one file."""

from __future__ import annotations

import logging
import os
import sys

LIMIT = 64 << 20  # bytes of a log file: a guest that causes warnings must not fill the disk
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _Collected(logging.FileHandler):
    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is not None and os.fstat(self.stream.fileno()).st_size < LIMIT:
            super().emit(record)


def setup(process: str, verbosity: int = 0, path: str | None = None) -> logging.Logger:
    """Configure logging for this process.

    `process` names it in each line ("core", "disk0/1"). `verbosity` counts -v flags and is what stderr
    shows; `path` collects INFO and above whatever the verbosity, up to LIMIT bytes (O_APPEND, so processes may
    share it).
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
    for handler in handlers:
        handler.setFormatter(form)
        logger.addHandler(handler)
    logger.setLevel(min(handler.level for handler in handlers))
    return logger


def get(name: str = "") -> logging.Logger:
    """Return cellvisor's logger, or its child `name`."""
    return logging.getLogger(f"cellvisor.{name}" if name else "cellvisor")
