"""What passt needs of its host, who answers the guest there, and which passt processes there are."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cellvisor.ctl.client import Client
from tests.debian import Missing, need
from tests.native import netns

GUEST, GATEWAY, PORT = "10.9.9.2", "10.9.9.1", 7777
LOAD = f"test=net-udp ip={GUEST} host={GATEWAY} port={PORT}"


def _lacking() -> str:
    try:
        need("passt", "passt")
    except Missing as missing:
        return str(missing)
    return ""


lacking = _lacking()
needs_passt = pytest.mark.skipif(bool(lacking), reason=lacking or "passt is there")


def ip(*words: str) -> None:
    """Run ip(8)."""
    subprocess.run([need("ip", "iproute2"), *words], check=True, timeout=60)


def make_route() -> None:
    """Have a default route, to nowhere, from the address that passt gives to guests."""
    ip("link", "set", "lo", "up")
    ip("addr", "add", f"{GUEST}/24", "dev", netns.make_tap("way0"))
    ip("route", "add", "default", "via", GATEWAY)


@contextmanager
def echo() -> Iterator[threading.Event]:
    """Have a UDP port of the host that sends all back, with number 0 once it is set that it is enough."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
        port.bind(("127.0.0.1", PORT))

        def serve() -> None:
            while True:
                data, sender = port.recvfrom(70000)
                if not data:
                    return
                port.sendto(bytes(8) + data[8:] if enough.is_set() else data, sender)

        enough = threading.Event()
        thread = threading.Thread(target=serve, name="echo")
        thread.start()
        try:
            yield enough
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                last.sendto(b"", ("127.0.0.1", PORT))
            thread.join(10)


def passts() -> set[int]:
    """Return the passt processes of this network namespace; zombies do not count."""
    ours, found = os.stat("/proc/thread-self/ns/net").st_ino, set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "comm").read_text().startswith("passt") \
                    and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX" \
                    and os.stat(entry / "ns/net").st_ino == ours:
                found.add(int(entry.name))
        except OSError:
            pass  # it is gone
    return found


def wait_gone() -> None:
    """Wait until there is none."""
    end = time.monotonic() + 30
    while passts():
        assert time.monotonic() < end, "passt outlives its VM"
        time.sleep(0.02)


def helper(client: Client) -> dict[str, Any]:
    """Return what the VM tells of its passt."""
    listed = client.call("info", processes=True)["processes"]
    (found,) = [entry for entry in listed if entry["role"] == "passt"]
    return dict(found)
