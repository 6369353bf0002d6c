"""A stock Debian guest on taps of the host: cards come and go, TCP carries on while their processes are killed."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.ctl.client import Client
from tests.fakes import ch_remote
from tests.lab.guest import Linux
from tests.lab.hotplug import MIB, Killer, add, client_of, device, eventually, is_done, remove, sparse
from tests.lab.net import CARE, MAC, configure
from tests.native import netns

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]
SIZE = 6 * MIB


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Linux, Client]]:
    """A guest with console, two disks, one card and the rng, and its VM, in a network namespace of their own."""
    folder = tmp_path_factory.mktemp("guest")
    disks = [f"path={sparse(folder / f'disk{number}.raw')}" for number in (0, 1)]
    card = f"tap=chtap0,ip=10.88.0.1,mask=255.255.255.0,mac={MAC % 1},id=net0,{CARE}"
    with netns.namespace(), Linux("cloud", disks=disks, args=["--net", card]) as guest:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        client = client_of(guest)
        try:
            yield guest, client
        finally:
            client.close()


def links(guest: Linux) -> int:
    return len(guest.run("ip -o link").splitlines())


def test_net_hotplug(vm: tuple[Linux, Client]) -> None:
    guest, client = vm
    configure(guest, 0)
    assert links(guest) == 2
    more = f"ip=10.88.1.1,mask=255.255.255.0,mac={MAC % 2}"
    wanted = {"tap": "chtap1", **dict(word.split("=") for word in more.split(","))}
    assert add(client, "add-net", id="test0", **wanted) == {"id": "test0", "bdf": "0000:00:06.0"}
    is_done(client, "test0")
    eventually(lambda: links(guest) == 3, "the third link")
    configure(guest, 1)
    remove(client, "test0")
    eventually(lambda: links(guest) == 2, "two links")
    assert add(client, "add-net", id="test1", **wanted) == {"id": "test1", "bdf": "0000:00:06.0"}
    is_done(client, "test1")
    eventually(lambda: links(guest) == 3, "the third link")
    configure(guest, 1)
    guest.reboot()
    configure(guest, 1)
    assert links(guest) == 3
    remove(client, "test1")
    assert links(guest) == 2
    assert not [name for _, name in socket.if_nameindex() if name == "chtap1"], "a tap that was made goes too"
    configure(guest, 0)


def test_link_goes_and_returns(vm: tuple[Linux, Client]) -> None:
    guest, client = vm
    name = guest.run(f"grep -l {MAC % 1} /sys/class/net/*/address | cut -d/ -f5").strip()
    for state, carrier in (("down", "0"), ("up", "1")):
        client.call("set-link", id="net0", link=state)
        eventually(lambda carrier=carrier: guest.run(f"cat /sys/class/net/{name}/carrier").strip() == carrier, state)
    eventually(lambda: guest.try_run("ping -c 1 -W 5 10.88.0.1").status == 0, "an answer to a ping")


def converse(guest: Linux, server: socket.socket, digest: str) -> None:
    """Have the guest send its file, send it back, and compare both."""
    guest.run("nc 10.88.0.1 5001 </tmp/data >/tmp/back 2>/tmp/nc.log &")
    conversation, _ = server.accept()
    with conversation:
        conversation.settimeout(300)
        got = bytearray()
        while len(got) < SIZE:
            piece = conversation.recv(1 << 16)
            assert piece, f"the connection ended after {len(got)} bytes: {guest.run('cat /tmp/nc.log')}"
            got += piece
        conversation.sendall(got)
        conversation.shutdown(socket.SHUT_WR)
        guest.run("while pidof nc >/dev/null; do sleep 0.2; done", 300)
    assert hashlib.md5(got).hexdigest() == digest
    assert guest.run("md5sum </tmp/back").split()[0] == digest


def digest_of_file(guest: Linux) -> str:
    """Make the file that the guest sends."""
    guest.run(f"head -c {SIZE} /dev/urandom >/tmp/data")
    return guest.run("md5sum </tmp/data").split()[0]


def test_rate_limiter_net(vm: tuple[Linux, Client]) -> None:
    """6 MiB each way with 1 MiB a second, the first of which is there at once: less than the lab can do."""
    guest, client = vm
    digest = digest_of_file(guest)
    client.call("set-rate-limit", id="net0", bw_size=MIB, bw_refill_time=1000)
    began = time.monotonic()
    with socket.create_server(("10.88.0.1", 5001)) as server:
        server.settimeout(300)
        converse(guest, server, digest)
    took = time.monotonic() - began
    client.call("set-rate-limit", id="net0", bw_size=0)
    assert took >= 9.9
    assert client.call("counters")["net0"]["throttled"] > 0


def test_tcp_carries_on_through_kills(vm: tuple[Linux, Client]) -> None:
    """What was sent arrives whole, both ways, whatever became of segments on the way."""
    guest, client = vm
    digest = digest_of_file(guest)
    with socket.create_server(("10.88.0.1", 5001)) as server, Killer(client, "net0") as killer:
        server.settimeout(300)
        while killer.kills < 20:
            converse(guest, server, digest)
    eventually(lambda: device(client, "net0")["state"] == "serving", "the last one killed")
    assert guest.run("dmesg | grep -iE 'virtio.*(error|not a head)|warning:|bug:|hung task'; true") == ""


def macvtap() -> tuple[int, int]:
    """Make a macvtap beside a macvlan of the host, 10.88.2.1; return two of its queues."""
    for command in ("link add dummy0 type dummy", "link set dummy0 up",
                    "link add host0 link dummy0 type macvlan mode bridge", "addr add 10.88.2.1/24 dev host0",
                    "link set host0 up", f"link add mv0 link dummy0 address {MAC % 3} type macvtap mode bridge",
                    "link set mv0 up"):
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no macvtap here: ip {command}: {done.stderr.strip()}")
    node = f"/dev/tap{socket.if_nametoindex('mv0')}"
    eventually(lambda: os.path.exists(node), node)
    return os.open(node, os.O_RDWR), os.open(node, os.O_RDWR)


def test_macvtap_hotplug(tmp_path: Path) -> None:
    """A card by two descriptors comes while the guest boots, and is still there after a reboot."""
    disks = [f"path={sparse(tmp_path / f'disk{number}.raw')}" for number in (0, 1)]
    place = str(tmp_path / "http")
    guest = Linux("cloud", disks=disks, args=["--api-socket", place], cpus=2)
    with netns.namespace():
        queues = macvtap()
        try:
            guest.start()
            eventually(lambda: os.path.exists(place), "the API")
            said = ch_remote.call(place, "PUT", "vm.add-net",
                                  json.dumps({"mac": MAC % 3, "num_queues": 4, "fds": None}), queues)
            assert json.loads(said or "") == {"id": "_net2", "bdf": "0000:00:05.0"}
            guest.await_agent()
            configure(guest, 2)
            assert links(guest) == 2
            guest.reboot()
            configure(guest, 2)
            assert links(guest) == 2
        finally:
            guest.close()
            for queue in queues:
                os.close(queue)
