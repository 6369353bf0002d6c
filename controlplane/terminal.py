"""The user's terminal: raw while the guest has it, and always as it was afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
import tty
from typing import Any


class Terminal:
    """Descriptor `fd`, if it is a terminal that we may use. restore() may be called from anywhere, often."""

    def __init__(self, fd: int = 0) -> None:
        self.fd = fd
        self._saved: list[Any] | None = None

    def settings(self) -> list[Any] | None:
        """Return what restore() puts back after make_raw(): known before, so that it can be recorded before."""
        if self._saved is None and self.is_usable():
            return termios.tcgetattr(self.fd)
        return self._saved

    def inherit(self, settings: list[Any] | None) -> None:
        """Take over from a predecessor, who left the terminal raw; restore() undoes it."""
        self._saved = settings

    def is_usable(self) -> bool:
        """Tell whether it is a terminal and we are in its foreground."""
        try:
            return os.isatty(self.fd) and os.tcgetpgrp(self.fd) == os.getpgrp()
        except OSError:
            return False

    def make_raw(self) -> None:
        """Pass every key on untouched, Ctrl-C included; nothing happens without a usable terminal."""
        if self._saved is None and self.is_usable():
            self._saved = termios.tcgetattr(self.fd)
            tty.setraw(self.fd, termios.TCSANOW)

    def restore(self) -> None:
        """Put back the saved settings."""
        if self._saved is None:
            return
        saved, self._saved = self._saved, None
        before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # we may be in the background by now
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self.fd, termios.TCSANOW, saved)
        signal.signal(signal.SIGTTOU, before)

    def size(self) -> tuple[int, int] | None:
        """Return (columns, rows)."""
        try:
            found = os.get_terminal_size(self.fd)
        except OSError:
            return None
        return found.columns, found.lines
