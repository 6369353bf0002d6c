"""The terminal is raw while the guest has it, and as it was afterwards, however the VM ended."""

from __future__ import annotations

import json
import os
import pty
import signal
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cellvisor.core.wire import places
from cellvisor.ctl.client import Client

RUN = Path(__file__).parents[1] / "fakes" / "control_run.py"


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


def is_raw(fd: int) -> bool:
    return not termios.tcgetattr(fd)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)


@pytest.mark.parametrize("end", ["shutdown", "SIGTERM", "SIGTERM twice", "core killed"])
def test_raw_and_back(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("CELLVISOR_FAKE", json.dumps({"do": ["deaf"] if "twice" in end else []}))
    (tmp_path / "kernel").write_bytes(b"kernel")
    pid, master = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, str(RUN), "--kernel", str(tmp_path / "kernel"), "--name", "t"])
    try:
        before = termios.tcgetattr(master)
        assert not is_raw(master)
        wait_for(lambda: "t" in places.running())
        with Client("t") as client:
            wait_for(lambda: client.call("info")["state"] == "Running")
            assert is_raw(master)
            if end == "shutdown":
                client.call("shutdown")
            elif end == "core killed":
                processes = client.call("info", processes=True)["processes"]
                os.kill(next(one["pid"] for one in processes if one["role"] == "core"), signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGTERM)
            if "twice" in end:
                time.sleep(0.5)
                os.kill(pid, signal.SIGTERM)
            assert client.wait_gone(30)
        wait_for(lambda: not is_raw(master))
        assert termios.tcgetattr(master)[:6] == before[:6]
    finally:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(master)  # not before: it would be a SIGHUP
    assert status == {"shutdown": 0, "core killed": 1}.get(end, 143)
