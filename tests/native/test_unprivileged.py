"""What an ordinary user gets: a network by passt or on a tap made for him, and one line about what he may not do."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire.control import TEXT
from tests.native import netns, ordinary
from tests.native.cellvisor import runtime_dir
from tests.native.conftest import Vm
from tests.native.guest import GuestResult, Running, needs_kvm
from tests.native.hotplug import Steered
from tests.native.netns import Peer, check_echoes
from tests.native.passts import LOAD, helper, ip, needs_passt, passts, wait_gone
from tests.native.steer import steer

pytestmark = [pytest.mark.kvm, needs_kvm, netns.needs_tap]


def options(vm: Vm, *flags: str, kvm: str = "666") -> dict[str, Any]:
    """Return how to start the user's VM."""
    ordinary.own(runtime_dir(vm.where))
    return {"program": ordinary.command(vm.where, kvm=kvm), "extra": flags}


def refused(running: Running, what: str) -> str:
    """Return the one line that a refused VM ends with; nothing of it may be left."""
    said = running.finish()
    lines = [line for line in said.stderr.splitlines() if line.startswith("cellvisor:")]
    assert (said.status, len(lines)) == (2, 1), said.stderr
    assert what in lines[0]
    assert not said.text, "the guest ran"
    return lines[0]


def make_tap(name: str, *words: str, user: int = ordinary.USER) -> str:
    """Make a tap for a user, as the README says."""
    ip("tuntap", "add", name, "mode", "tap", "user", str(user), *words)
    return name


@needs_passt
def test_passt_needs_no_privilege(vm: Vm, routed: threading.Event) -> None:
    with steer(vm, f"{LOAD} count=100M", **options(vm, "--net", "mtu=1500")) as vmm:
        vmm.running.wait_for("back=64")
        told = helper(vmm.client)
        assert {told["pid"]} == passts()
        assert told["device"] == vmm.device("net")["id"]
        for pid in (told["pid"], vmm.pid("core")):
            (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid")]
            assert set(line.split()[1:]) == {str(ordinary.USER)}
        assert told["pss"] > 0
        routed.set()
        assert vmm.running.finish().check().number("lost") == 0
    wait_gone()


def test_a_tap_made_for_the_user_needs_no_privilege(vm: Vm, network: None) -> None:
    make_tap("mine0")
    with suppress(OSError):  # a kernel without IPv6; nobody but the peer speaks on it
        Path("/proc/sys/net/ipv6/conf/mine0/disable_ipv6").write_text("1")
    ip("link", "set", "mine0", "up")
    with Peer("mine0") as peer:
        said: GuestResult = vm.start("test=net-send count=200", **options(vm, "--net", "tap=mine0")).finish()
    check_echoes(said, peer, 200)


CARDS = [
    ("tap=new0", "tap=new0: does not exist, and making it needs CAP_NET_ADMIN",
     "(sudo ip tuntap add new0 mode tap user $USER && sudo ip link set new0 up; without tap= the guest is on passt)"),
    ("tap=new0,num_queues=4", "tap=new0: does not exist, and making it needs CAP_NET_ADMIN",
     "(sudo ip tuntap add new0 mode tap user $USER multi_queue && "),
    ("tap=theirs0", "tap=theirs0: belongs to somebody else",
     "(one of your own: sudo ip tuntap add NAME mode tap user $USER && sudo ip link set NAME up; without tap= "),
    ("tap=down0", "tap=down0: it is down: changing that needs CAP_NET_ADMIN", "(sudo ip link set down0 up)"),
    ("tap=mine0,mtu=9000", "mtu=9000: changing that needs CAP_NET_ADMIN", "(sudo ip link set mine0 mtu 9000)"),
    ("tap=mine0,ip=10.0.0.1,mask=255.0.0.0", "ip=10.0.0.1: changing that needs CAP_NET_ADMIN",
     "(sudo ip addr add 10.0.0.1/8 dev mine0, and leave ip= and mask= out)"),
    ("tap=mine0,ip=fd00::1,mask=ffff::", "ip=fd00::1: changing that needs CAP_NET_ADMIN",
     "(sudo ip addr add fd00::1/16 dev mine0, and leave ip= and mask= out)"),
    ("tap=mine0,host_mac=02:00:00:00:00:77", "host_mac=02:00:00:00:00:77: changing that needs CAP_NET_ADMIN",
     "(sudo ip link set mine0 address 02:00:00:00:00:77, and leave host_mac= out)"),
    ("ip=10.0.0.1,mask=255.0.0.0", "ip=10.0.0.1: a new tap needs CAP_NET_ADMIN",
     "and write tap=tap0 instead; without ip= the guest is on passt)"),
    ("host_mac=02:00:00:00:00:77", "host_mac=02:00:00:00:00:77: a new tap needs CAP_NET_ADMIN",
     "and write tap=tap0 instead; without host_mac= the guest is on passt)"),
    ("tap=", "tap=: a new tap needs CAP_NET_ADMIN", "(sudo ip tuntap add tap0 mode tap user $USER && "),
]


@pytest.mark.parametrize(("card", "what", "advice"), CARDS)
def test_what_only_root_may_is_one_line_that_says_what_to_do(
        vm: Vm, network: None, card: str, what: str, advice: str) -> None:
    make_tap("theirs0", user=ordinary.USER + 1)
    make_tap("down0")
    ip("link", "set", make_tap("mine0"), "up")
    before = sorted(name for _, name in socket.if_nameindex())
    line = refused(vm.start("test=boot", **options(vm, "--net", card)), f"cellvisor: _net0: {what} (")
    assert advice in line
    assert sorted(name for _, name in socket.if_nameindex()) == before
    assert os.listdir(Path(runtime_dir(vm.where)) / "cellvisor") == []


def test_a_dry_run_says_it_too(vm: Vm, network: None) -> None:
    make_tap("theirs0", user=ordinary.USER + 1)
    make_tap("down0")
    ip("link", "set", make_tap("mine0"), "up")
    before = sorted(name for _, name in socket.if_nameindex())
    with contextlib.closing(Steered(vm, vm.start("test=hotplug", console="null", **options(vm))).client) as client:
        for card, what, advice in CARDS:
            said = []
            for verb, args in (("validate", {"verb": "add-net"}), ("add-net", {})):
                with pytest.raises(CellvisorError) as caught:
                    client.call(verb, **args, **{TEXT: f"id=lan,{card}"})
                said.append(caught.value.as_wire())
            assert said[0] == said[1]
            assert str(said[0]["message"]).startswith(f"lan: {what} (") and advice in str(said[0]["message"])
            assert sorted(name for _, name in socket.if_nameindex()) == before
        assert client.call("validate", verb="add-net", **{TEXT: "tap=mine0"})["type"] == "net"
        client.call("shutdown")


@pytest.mark.parametrize("mode", ["600", "440"])
def test_kvm_without_permission(vm: Vm, mode: str) -> None:
    line = refused(vm.start("test=boot", **options(vm, kvm=mode)), "cellvisor: /dev/kvm: Permission denied (")
    assert "(sudo setfacl -m u:$USER:rw /dev/kvm)" in line
    assert os.listdir(Path(runtime_dir(vm.where)) / "cellvisor") == []


def test_a_runtime_directory_that_cannot_be_written(vm: Vm) -> None:
    given = options(vm)
    place = runtime_dir(vm.where)
    os.chown(place, 0, 0)
    line = refused(vm.start("test=boot", **given), f"cellvisor: XDG_RUNTIME_DIR={place}: cannot make run directory ")
    assert f"{place}/cellvisor: Permission denied (set it to a directory of yours)" in line
    assert os.listdir(place) == []
