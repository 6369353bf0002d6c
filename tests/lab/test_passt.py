"""A stock Debian guest on passt: an address by DHCP, TCP through the deaths of the card's process and of passt.

The host's side is a network namespace with a route to nowhere; its gateway, seen from the guest, is the host.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from cellvisor.ctl.client import Client
from cellvisor.devices.backends.passt import MTU
from tests.lab.guest import Linux
from tests.lab.hotplug import MIB, Killer, client_of, device, eventually
from tests.native import netns
from tests.native.passts import GATEWAY, GUEST, helper, make_route, passts

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
PORT = 5001
SIZE = 4 * MIB
# What udhcpc(8) calls with "deconfig" and "bound": the address, the way out, the MTU.
SCRIPT = """#!/bin/busybox sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router"
echo "ip=$ip router=$router mtu=$mtu" >/tmp/lease
"""


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Linux, Client]]:
    """A guest with one card on passt, and its VM, in a network namespace of their own."""
    card = f"id=net0,forward=[tcp:{PORT + 1}:22],restart_budget=1000000,restart_backoff=[0]"
    with netns.namespace():
        make_route()
        with Linux("cloud", args=["--net", card], files={"bin/lease": SCRIPT.encode()}) as guest:
            client = client_of(guest)
            try:
                guest.run("modprobe virtio_net && ip link set lo up && ip link set eth0 up")
                yield guest, client
            finally:
                client.close()
            guest.poweroff()
            guest.await_end()
    assert not passts()


def lease(guest: Linux) -> str:
    """Have the guest ask for its address; returns what it was told."""
    guest.run("ip addr flush dev eth0; udhcpc -i eth0 -f -q -n -t 30 -T 2 -s /bin/lease", 120)
    return guest.run("cat /tmp/lease").strip()


def converse(guest: Linux, server: socket.socket, digest: str,
             meanwhile: AbstractContextManager[Any] | None = None) -> None:
    """Have the guest send its file to the gateway, send it back, and compare both.

    `meanwhile` is what happens while the connection stands: Debian 12's passt waits in vain for a lost end of its
    handshake. To a guest that has closed its half it repeats what comes, so that stays open.
    """
    guest.run(f"(cat /tmp/data; exec sleep 1000) | nc {GATEWAY} {PORT} >/tmp/back 2>/tmp/nc.log &")
    conversation, _ = server.accept()
    with conversation:
        conversation.settimeout(300)
        got = bytearray(conversation.recv(1))
        with meanwhile or nullcontext():
            while len(got) < SIZE:
                piece = conversation.recv(1 << 16)
                assert piece, f"the connection ended after {len(got)} bytes: {guest.run('cat /tmp/nc.log')}"
                got += piece
            conversation.sendall(got)
            eventually(lambda: int(guest.run("wc -c </tmp/back")) >= SIZE, "all of it")
        conversation.shutdown(socket.SHUT_WR)
        guest.run("while pidof nc >/dev/null; do sleep 0.1; done; killall sleep", 300)
    assert hashlib.md5(got).hexdigest() == digest
    assert guest.run("md5sum </tmp/back").split()[0] == digest


@pytest.fixture(scope="module")
def digest(vm: tuple[Linux, Client]) -> str:
    """The digest of the file that the guest sends, which has its address by then."""
    guest, _ = vm
    assert lease(guest) == f"ip={GUEST} router={GATEWAY} mtu={MTU}"
    guest.run(f"head -c {SIZE} /dev/urandom >/tmp/data")
    return guest.run("md5sum </tmp/data").split()[0]


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A port of the host."""
    with socket.create_server(("127.0.0.1", PORT)) as one:
        one.settimeout(300)
        yield one


def test_an_address_by_dhcp_and_tcp_both_ways(vm: tuple[Linux, Client], server: socket.socket, digest: str) -> None:
    guest, client = vm
    assert guest.run("cat /sys/class/net/eth0/mtu").strip() == str(MTU)
    converse(guest, server, digest)
    assert helper(client)["device"] == "net0"


def test_a_port_of_the_host_leads_to_the_guest(vm: tuple[Linux, Client], digest: str) -> None:
    guest, _ = vm
    guest.run("(echo of the guest; exec sleep 1000) | nc -l -p 22 >/tmp/got &")
    eventually(lambda: guest.try_run("netstat -ltn | grep -q ':22 '").status == 0, "who listens")
    with socket.create_connection(("127.0.0.1", PORT + 1), 300) as conversation:
        conversation.sendall(b"of the host\n")  # Debian 12's passt lets nobody speak before who connects
        assert conversation.makefile("rb").readline() == b"of the guest\n"
        eventually(lambda: guest.run("cat /tmp/got") == "of the host\n", "what was sent")
    guest.run("killall nc sleep; true")


def test_tcp_carries_on_through_kills_of_the_card(
        vm: tuple[Linux, Client], server: socket.socket, digest: str) -> None:
    guest, client = vm
    before, kills = passts(), 0
    while kills < 5:
        killer = Killer(client, "net0")
        converse(guest, server, digest, killer)
        kills += killer.kills
    eventually(lambda: device(client, "net0")["state"] == "serving", "the last one killed")
    assert passts() == before


def test_another_passt_serves_after_one_was_killed(
        vm: tuple[Linux, Client], server: socket.socket, digest: str) -> None:
    guest, client = vm
    card = device(client, "net0")["pid"]
    for _ in range(2):
        (before,) = passts()
        guest.run(f"nc {GATEWAY} {PORT} </dev/zero >/dev/null 2>&1 &")
        with server.accept()[0] as conversation:
            assert conversation.recv(1)
            os.kill(before, signal.SIGKILL)
            eventually(lambda before=before: passts() - {before}, "another passt")
        guest.run("killall nc")
        eventually(lambda: guest.run("cat /sys/class/net/eth0/carrier").strip() == "1", "the cable")
        assert lease(guest) == f"ip={GUEST} router={GATEWAY} mtu={MTU}"
        converse(guest, server, digest)
        assert {helper(client)["pid"]} == passts() != {before}
    assert device(client, "net0")["pid"] == card
    assert guest.run("dmesg | grep -iE 'virtio.*(error|not a head)|warning:|bug:|hung task'; true") == ""
