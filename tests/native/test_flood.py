"""Thousands of connections to the API's sockets: nobody is let down, and who dies of them is replaced."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cellvisor.core.wire import places
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.hotplug import Steered, eventually, starting

pytestmark = [pytest.mark.kvm, needs_kvm]

CONNECTIONS = 2000
CELLVISOR = str(Path(sys.executable).with_name("cellvisor"))


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    yield from starting(vm)


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """Have room for our own ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard == resource.RLIM_INFINITY or hard > CONNECTIONS + 500
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def connect(stack: contextlib.ExitStack, vm: Steered, number: int) -> None:
    """Connect to the sockets of questions and of events in turn, and keep it."""
    sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    sock.setblocking(False)

    def is_in() -> bool:
        try:
            sock.connect(f"{vm.client.path}/{(places.API, places.EVENTS)[number % 2]}")
        except BlockingIOError:  # so many wait to be accepted
            return False
        return True

    eventually(is_in, "room at the door")


def plugs(vm: Steered) -> None:
    """Have the guest take a device and give it back."""
    vm.add("id=one", "add-rng")
    vm.done("one")
    vm.remove("one")
    vm.done("one")


def test_two_thousand_connections(start: Callable[..., Steered]) -> None:
    vm = start("removals=3", program=("prlimit", "--nofile=1024:", CELLVISOR))  # what a login usually has
    before, pid = vm.footprint(), vm.client.call("ping")["pid"]
    with contextlib.ExitStack() as stack:
        for number in range(CONNECTIONS):
            connect(stack, vm, number)
        with vm.another_client() as other:
            assert other.call("ping")["pid"] == pid
        assert vm.client.call("ping")["pid"] == pid
        fds = len(os.listdir(f"/proc/{pid}/fd"))
        assert fds > CONNECTIONS, "they are there"
        plugs(vm)
    eventually(lambda: vm.count() == before, "what was opened for them to be closed")
    plugs(vm)


def test_a_controlplane_out_of_descriptors_has_a_successor(start: Callable[..., Steered]) -> None:
    """libzmq aborts the process when it cannot accept; the guest, core and the devices do not notice."""
    vm = start("removals=3")
    kept = {one["role"]: one["pid"] for one in vm.processes() if one["role"] in ("core", "nursery")}
    pid = vm.client.call("ping")["pid"]
    most = len(os.listdir(f"/proc/{pid}/fd")) + 50
    with contextlib.ExitStack() as stack:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
        with contextlib.suppress(ConnectionError, FileNotFoundError):
            for number in range(CONNECTIONS):
                connect(stack, vm, number)
        vm.reconnect()
        assert vm.client.call("ping")["pid"] != pid
    assert {one["role"]: one["pid"] for one in vm.processes() if one["role"] in kept} == kept
    assert vm.client.call("info")["state"] == "Running"
    plugs(vm)
