"""A real terminal: tmux on a server of its own, driven by keys and read as a screen."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.debian import need

SECONDS = 60.0


class Terminal:
    """A shell in a window; the screen is what a person would see."""

    def __init__(self, where: Path, environment: Mapping[str, str], width: int = 120, height: int = 30) -> None:
        self._tmux = (need("tmux", "tmux"), "-S", str(where / "tmux"), "-f", "/dev/null")
        self._env = {**os.environ, **environment, "LC_ALL": "C.UTF-8", "SHELL": "/bin/sh"}
        self._run("new-session", "-d", "-x", str(width), "-y", str(height), "env PS1='$ ' sh")
        self.wait(lambda text: text.startswith("$"))  # by now tmux has set the terminal up

    def _run(self, *arguments: str) -> str:
        return subprocess.run([*self._tmux, *arguments], env=self._env, capture_output=True, text=True, check=True,
                              timeout=SECONDS).stdout

    def type(self, command: Sequence[str]) -> None:
        """Enter a command."""
        self._run("send-keys", "-l", shlex.join(command))
        self.keys("Enter")

    def keys(self, *names: str) -> None:
        """Press keys by tmux's names: q, C-c, Down."""
        self._run("send-keys", *names)

    def resize(self, width: int, height: int) -> None:
        """Change the window."""
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def screen(self) -> str:
        """Return what is to be seen."""
        return self._run("capture-pane", "-p")

    def wait(self, found: Callable[[str], object], seconds: float = SECONDS) -> str:
        """Wait until the screen is as `found` wants it; return it."""
        end = time.monotonic() + seconds
        while not found(text := self.screen()):
            assert time.monotonic() < end, f"not seen in {seconds} s:\n{text}"
            time.sleep(0.05)
        return text

    def settings(self) -> str:
        """Return the terminal's settings (stty -g)."""
        tty = self._run("display-message", "-p", "#{pane_tty}").strip()
        return subprocess.run(["stty", "-g", "-F", tty], capture_output=True, text=True, check=True).stdout

    def child(self) -> int:
        """Return the process that is in the foreground, at the end of the chain of shells."""
        pid = self._run("display-message", "-p", "#{pane_pid}").strip()
        while below := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            pid = below[0]
        return int(pid)

    def close(self) -> None:
        """End the server with all that runs in it."""
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, check=False, timeout=SECONDS)
