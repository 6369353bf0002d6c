"""A device that is only tried refuses what the real one would, and leaves no mark."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire.options import build
from cellvisor.devices.backends.disk import Disk
from cellvisor.devices.trial import TrialHost
from cellvisor.devices.virtio.blk import Blk
from cellvisor.devices.virtio.console import Console
from cellvisor.devices.virtio.rng import Rng


def attempt(cls: Any, **options: Any) -> Any:
    return cls(build(cls.Options, options), TrialHost("dev0", ()))


def test_a_lock_is_asked_for_and_not_taken(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    tried = attempt(Blk, path=str(image))
    real = Disk(str(image))
    with pytest.raises(CellvisorError, match=f"in use by .*pid {os.getpid()}"):
        attempt(Blk, path=str(image), readonly=True)
    real.close()
    tried.close()


def test_a_member_of_a_group_needs_no_page(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    attempt(Blk, path=str(tmp_path / "image"), rate_limit_group="g").close()


@pytest.mark.parametrize("mode", ["off", "null", "pty", "tty"])
def test_consoles_without_a_path(mode: str) -> None:
    attempt(Console, mode=mode).close()


def test_a_file_is_neither_made_nor_emptied(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_text("kept")
    for path in (old, tmp_path / "new"):
        attempt(Console, file=str(path)).close()
    assert (old.read_text(), os.listdir(tmp_path)) == ("kept", ["old"])


def test_a_socket_is_neither_made_nor_removed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(tmp_path / "stale"))
    for name in ("stale", "new"):
        attempt(Console, socket=str(tmp_path / name)).close()
    assert os.listdir(tmp_path) == ["stale"]


def test_nothing_is_read_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    ours = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    os.write(ours, b"x")
    attempt(Rng, src=str(tmp_path / "pipe")).close()
    assert os.read(ours, 2) == b"x"
    os.close(ours)
