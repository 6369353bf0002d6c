"""Network cards that come and go, with taps by name and by descriptor, and what is refused in one line."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError
from tests.fakes import ch_remote
from tests.native import netns
from tests.native.conftest import Vm
from tests.native.guest import build, needs_kvm
from tests.native.hotplug import Steered, eventually, starting
from tests.native.netns import DATA, STOP, Peer, frame

pytestmark = [pytest.mark.kvm, needs_kvm, netns.needs_tap, pytest.mark.usefixtures("network")]


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    """Start the guest of tests/guest/hotplug.c with some words."""
    yield from starting(vm)


def open_tap(name: str, *, flags: int = netns.IFF_TAP | netns.IFF_NO_PI | netns.IFF_VNET_HDR) -> int:
    """Open a queue of a tap, inheritable as a shell's would be."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, netns.TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    os.set_inheritable(fd, True)
    return fd


def test_card_comes_and_goes(start: Callable[..., Steered]) -> None:
    vm = start("removals=3")
    netns.make_tap()
    before = vm.footprint()
    for _ in range(2):
        bdf = vm.add("tap=tap0,id=lan", "add-net")["bdf"]
        vm.done("lan")
        assert vm.running.wait_for(f"in.{int(bdf[8:10], 16)}=1af4:1041")
        assert vm.client.call("info")["config"]["net"][0]["tap"] == "tap0"
        with pytest.raises(CellvisorError, match="set-link: id=__rng is not a network card but rng"):
            vm.client.call("set-link", id="__rng", link="up")
        vm.remove("lan")
        vm.done("lan")
        assert vm.footprint() == before
        os.close(open_tap("tap0"))  # nobody holds it


NET_REFUSALS = [
    ("tap=busy", "tap=busy: is used by another process"),
    ("tap=lo", "tap=lo: is not a tap"),
    ("tap=tap0,num_queues=4", "tap=tap0: is not a tap, or has a single queue"),
    ("tap=new0,ip=10.0.0.1", "ip=10.0.0.1 without mask"),
    ("tap=new0,ip=10.0.0.1,mask=255.0.255.0", "mask=255.0.255.0 is not a mask for ip=10.0.0.1"),
    ("tap=new0,ip=224.0.0.1,mask=255.0.0.0", "ip=224.0.0.1 is the address of a group"),
    ("tap=new0,mac=01:00:00:00:00:01", "mac=01:00:00:00:00:01 is not the address of one card"),
    ("tap=new0,mtu=1279", "mtu=1279 is below 1280"),
    ("tap=new0,bw_size=1", "bw_size=1 needs bw_refill_time"),
    ("fd=[7]", "a number means nothing here"),
]


@pytest.mark.parametrize(("options", "message"), NET_REFUSALS)
def test_refusals_leave_nothing(start: Callable[..., Steered], options: str, message: str) -> None:
    netns.make_tap()
    busy = open_tap("busy")
    vm = start()
    before = vm.footprint()
    with pytest.raises(CellvisorError, match=message) as caught:
        vm.add(options, "add-net")
    assert "\n" not in str(caught.value)
    assert vm.footprint() == before
    names = {name for _, name in socket.if_nameindex()}
    assert names == {"lo", "tap0", "busy"}
    os.close(busy)


class Machine:
    """A process with an HTTP socket, in the test's network namespace; `more` flags, in which {directory} is known."""

    def __init__(self, directory: str, fds: tuple[int, ...] = (), more: tuple[str, ...] = ()) -> None:
        self.directory = Path(directory)
        self.socket = f"{directory}/http"
        command = [str(Path(sys.executable).with_name("cellvisor")), "run", "--api-socket", self.socket, "--name", "vm",
                   *(word.format(directory=directory) for word in more)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=fds,
                                        text=True, env=dict(os.environ, XDG_RUNTIME_DIR=directory))

    def put(self, verb: str, body: dict[str, Any] | None = None, *fds: int) -> Any:
        answer = ch_remote.call(self.socket, "PUT", verb, None if body is None else json.dumps(body), fds)
        return json.loads(answer) if answer else None

    def create(self, test: str) -> None:
        self.put("vm.create", {
            "payload": {"kernel": str(build()), "cmdline": f"test={test}"}, "memory": {"size": 256 << 20},
            "console": {"mode": "Off"}, "serial": {"mode": "File", "file": f"{self.directory}/serial"}})

    def said(self, text: str) -> None:
        """Wait until the guest has said it."""
        path = self.directory / "serial"
        eventually(lambda: path.exists() and text in path.read_text(errors="replace"), text, 60)


@pytest.fixture
def machine() -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def start(fds: tuple[int, ...] = (), more: tuple[str, ...] = ()) -> Machine:
        made.append(Machine(tempfile.mkdtemp(prefix="cv-"), fds, more))
        eventually(lambda: os.path.exists(made[-1].socket) or made[-1].process.poll() is not None, "the API")
        return made[-1]

    yield start
    for one in made:
        with suppress(OSError, ch_remote.Failed):
            one.put("vmm.shutdown")
        one.process.wait(30)
        assert one.process.stderr is not None
        one.process.stderr.close()
        shutil.rmtree(one.directory)


NET = {"tap": None, "ip": None, "mask": None, "mac": "52:54:00:12:34:56", "host_mac": None, "mtu": None, "iommu": False,
       "num_queues": 2, "queue_size": 256, "vhost_user": False, "vhost_socket": None, "vhost_mode": "Client",
       "id": "lan", "fds": None, "rate_limiter_config": None, "pci_segment": 0, "offload_tso": True,
       "offload_ufo": True, "offload_csum": True}  # as ch-remote spells it out


def give_tap(vm: Machine) -> None:
    """Add the card `lan` on a fresh tap0 whose descriptor only the VM has then."""
    netns.make_tap()
    tap = open_tap("tap0")
    assert vm.put("vm.add-net", NET, tap) is None, "there was no guest yet"
    os.close(tap)


def test_descriptors_come_over_http_and_stay_for_the_next_boot(machine: Callable[..., Machine]) -> None:
    vm = machine()
    vm.create("net-receive")
    give_tap(vm)
    with pytest.raises(OSError, match="busy"):
        open_tap("tap0")
    vm.put("vm.boot")
    vm.said("ready=1")
    vm.put("vm.shutdown")
    (vm.directory / "serial").unlink()
    with Peer() as peer:
        vm.put("vm.boot")
        vm.said("ready=1")
        for number in (1, 2):
            peer.send(frame(DATA, number))
        peer.send(frame(STOP, 0))
        assert vm.process.wait(60) == 0
    vm.said("received=2")


def test_descriptors_outlive_who_took_them(machine: Callable[..., Machine]) -> None:
    vm = machine()
    vm.create("net-receive")
    give_tap(vm)
    vm.put("vm.boot")
    vm.said("ready=1")
    vm.process.kill()

    def card() -> dict[str, Any]:
        with suppress(OSError, EOFError, ch_remote.Failed):
            listed = json.loads(ch_remote.call(vm.socket, "GET", "vm.devices") or "")["devices"]
            return next((one for one in listed if one["id"] == "lan" and one["state"] == "serving"), {})
        return {}

    os.kill(int(eventually(card, "a successor")["pid"]), signal.SIGKILL)
    eventually(lambda: card().get("generation") == 2, "the next process")
    with Peer() as peer:
        peer.send(frame(DATA, 1))
        peer.send(frame(STOP, 0))
    vm.said("received=1")
    eventually(lambda: not os.listdir(vm.directory / "cellvisor"), "the end of the VM")


@pytest.mark.parametrize("verb", ["vm.remove-device", "vm.delete"])
def test_descriptors_of_a_card_that_never_was_are_closed(machine: Callable[..., Machine], verb: str) -> None:
    vm = machine()
    vm.create("hotplug")
    give_tap(vm)
    vm.put(verb, {"id": "lan"} if verb == "vm.remove-device" else None)

    os.close(eventually(lambda: free_tap("tap0"), "the tap"))


@pytest.mark.parametrize("how", ["at start", "over http"])
def test_descriptors_are_gone_with_their_card(machine: Callable[..., Machine], how: str) -> None:
    netns.make_tap()
    tap = open_tap("tap0")
    given = ("--net", f"fd={tap},id=lan") if how == "at start" else ()
    if given:
        vm = machine((tap,), ("--kernel", str(build()), "--cmdline", "test=hotplug removals=99", "--console", "off",
                              "--serial", "file={directory}/serial", *given))
    else:
        vm = machine()
        vm.create("hotplug removals=99")
        vm.put("vm.boot")
    os.close(tap)
    vm.said("listening=1")

    def held() -> dict[str, int]:
        """Return how many descriptors each process has."""
        listed = json.loads(ch_remote.call(vm.socket, "GET", "vm.info?processes=true") or "")["processes"]
        return {one["role"]: len(os.listdir(f"/proc/{one['pid']}/fd")) for one in listed}

    def is_there(device: str) -> bool:
        listed = json.loads(ch_remote.call(vm.socket, "GET", "vm.devices") or "")["devices"]
        return any(one["id"] == device for one in listed)

    def cycle() -> None:
        queue = eventually(lambda: free_tap("tap0"), "the tap to be nobody's")
        vm.put("vm.add-net", NET, queue)
        os.close(queue)
        vm.put("vm.remove-device", {"id": "lan"})
        eventually(lambda: not is_there("lan"), "its end")

    if given:
        with pytest.raises(OSError, match="busy"):
            open_tap("tap0")
        vm.put("vm.remove-device", {"id": "lan"})
        eventually(lambda: not is_there("lan"), "its end")
    cycle()
    before = held()  # some may still be about to be closed, not five
    assert before.keys() >= {"controlplane", "core", "nursery"}
    for _ in range(5):
        cycle()
    eventually(lambda: all(number <= before[role] for role, number in held().items()), f"not more than {before}")


def free_tap(name: str) -> int:
    """Open the only queue of a tap; 0 while somebody has it."""
    try:
        return open_tap(name)
    except OSError:
        return 0


def test_wrong_descriptors_are_refused(machine: Callable[..., Machine]) -> None:
    netns.make_tap()
    vm = machine()
    vm.create("hotplug")
    vm.put("vm.boot")
    vm.said("listening=1")
    null, tun = os.open(os.devnull, os.O_RDWR), os.open("/dev/net/tun", os.O_RDWR)
    bare, plain = open_tap("bare0", flags=netns.IFF_TAP | netns.IFF_NO_PI), open_tap("plain0")
    tap = open_tap("tap0")
    for fds, more, message in (
            ((null,), {}, "not a tap"), ((tun,), {}, "not a tap"), ((bare,), {}, "not a tap with a vnet header"),
            ((plain, null), {}, "2 different descriptors for num_queues=2"),
            ((plain, plain), {"num_queues": 4}, "plain0 has a single queue"),
            ((plain, tap), {"num_queues": 4}, "of different interfaces: plain0, tap0"),
            ((plain,), {"tap": "tap0"}, "tap=tap0 does not go with fd"),
            ((), {"fds": [5]}, "a number means nothing here")):
        with pytest.raises(ch_remote.Failed) as tried:
            vm.put("vm.validate", {"verb": "add-net", **NET, **more}, *fds)
        with pytest.raises(ch_remote.Failed, match=message) as caught:
            vm.put("vm.add-net", {**NET, **more}, *fds)
        assert caught.value.status in (400, 409)
        said = [(one.value.status, re.sub(r"\d+(?=[],])", "N", one.value.body or "")) for one in (tried, caught)]
        assert said[0] == said[1]  # but for the numbers that the descriptors have in the VM's process
    assert vm.put("vm.validate", {"verb": "add-net", **NET}, plain)["id"] == "lan"
    assert vm.put("vm.add-net", NET, plain)["id"] == "lan"
    for fd in (null, tun, bare, plain, tap):
        os.close(fd)


def test_the_command_line_sends_descriptors(machine: Callable[..., Machine]) -> None:
    netns.make_tap()
    tap = open_tap("tap0")
    vm = machine()
    vm.create("hotplug")
    vm.put("vm.boot")
    vm.said("listening=1")

    def add(options: str, where: str) -> tuple[int, str]:
        command = [str(Path(sys.executable).with_name("cellvisor")), "add-net", where, options, "--no-wait"]
        done = subprocess.run(command, pass_fds=(tap,), capture_output=True, text=True, timeout=60,
                              env=dict(os.environ, XDG_RUNTIME_DIR=str(vm.directory)), check=False)
        return done.returncode, done.stdout + done.stderr

    assert add("fd=99", vm.socket) == (2, "cellvisor: fd=99: is not open (open it in the shell: 3<>/dev/tap5)\n")
    status, said = add(f"fd=[{tap}]", "vm")
    assert status == 2
    assert "descriptors cannot come this way (start the VM with --api-socket" in said
    assert add(f"id=lan,fd=[{tap}]", vm.socket) == (0, "lan 0000:00:02.0: requested\n")
    os.close(tap)


def test_an_inherited_descriptor_is_a_flag(machine: Callable[..., Machine]) -> None:
    netns.make_tap()
    tap = open_tap("tap0")
    with Peer() as peer:
        vm = machine((tap,), ("--kernel", str(build()), "--cmdline", "test=net-send count=50", "--console", "off",
                              "--net", f"fd={tap}"))
        assert vm.process.wait(60) == 0
    assert len(peer.seen) == 50
    os.close(tap)


def test_a_closed_descriptor_is_named(machine: Callable[..., Machine]) -> None:
    vm = machine(more=("--kernel", str(build()), "--console", "off", "--net", "fd=77"))
    _, said = vm.process.communicate(timeout=60)
    assert vm.process.returncode == 2
    assert said.splitlines() == ["cellvisor: _net0: fd=77: Bad file descriptor "
                                 "(they are descriptors of the process that starts the VM)"]
