"""virtio-rng and virtio-console under cellvisor."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.native.conftest import Vm
from tests.native.guest import needs_kvm

pytestmark = [pytest.mark.kvm, needs_kvm]


@pytest.mark.parametrize("how", ["irq=msix", "irq=intx", "irq=poll"])
def test_rng_is_random(vm: Vm, how: str) -> None:
    assert vm(f"test=rng bytes=20000 bs=1000 {how}").check().number("bytes") >= 20000


def test_rng_reads_its_source(vm: Vm) -> None:
    assert vm("test=rng", extra=["--rng", "src=/dev/zero"]).reason.startswith("not random")


def test_console_writes_to_a_file(vm: Vm, tmp_path: Path) -> None:
    path = tmp_path / "console.txt"
    vm("test=console text=hello_from_hvc0 repeat=3", console=f"file={path}").check()
    assert path.read_text() == "hello from hvc0\n" * 3


def test_console_echoes_through_a_socket(vm: Vm, tmp_path: Path) -> None:
    path = Path(vm.where / "c")
    running = vm.start("test=console lines=2", console=f"socket={path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        deadline = time.monotonic() + 60
        while client.connect_ex(str(path)):
            assert time.monotonic() < deadline, running.text
            time.sleep(0.02)
        client.sendall(b"one\ntwo words\n")
        got = b""
        while not got.endswith(b"TWO WORDS\n"):
            got += client.recv(100)
        said = running.finish().check()
    assert (said.values["line.0"], said.values["line.1"]) == ("ONE", "TWO WORDS")
