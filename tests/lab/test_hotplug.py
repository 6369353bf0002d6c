"""A stock Debian guest gets and gives back PCI devices while it runs, as its own ACPI code sees it."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.errors import CellvisorError, Conflict, UsageError
from cellvisor.ctl.client import Client
from tests.lab import fio
from tests.lab.guest import Linux
from tests.lab.hotplug import (
    MIB,
    MOST_PSS,
    SECONDS,
    USUAL,
    Shared,
    add,
    client_of,
    device,
    disk_in,
    eventually,
    footprint,
    has_process,
    is_done,
    outcome,
    pss,
    remove,
    slots,
    sparse,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(tmp_path_factory.mktemp("guest"))
    yield made
    made.close()


def test_disk_hotplug(vm: tuple[Linux, Client], tmp_path: Path) -> None:
    guest, client = vm
    wanted = {"path": str(sparse(tmp_path / "added.raw")), "id": "test0", "readonly": True}
    assert add(client, **wanted) == {"id": "test0", "bdf": "0000:00:06.0"}
    is_done(client, "test0")
    assert slots(guest) == [*USUAL, "06"]
    disk = disk_in(guest, 6)
    assert int(guest.run(f"cat /sys/block/{disk}/size")) * 512 == 16 * MIB
    assert "16+0 records out" in guest.run(f"dd if=/dev/{disk} of=/dev/null bs=1M 2>&1")
    assert guest.try_run(f"dd if=/dev/zero of=/dev/{disk} bs=4k count=1 conv=fsync").status != 0
    remove(client, "test0")
    assert slots(guest) == USUAL
    assert guest.try_run(f"test -e /sys/block/{disk}").status != 0
    assert add(client, **wanted) == {"id": "test0", "bdf": "0000:00:06.0"}
    is_done(client, "test0")
    remove(client, "test0")


def test_pci_device_id(vm: tuple[Linux, Client], tmp_path: Path) -> None:
    guest, client = vm
    image = sparse(tmp_path / "added.raw")
    assert add(client, path=str(image), id="far", pci_device_id=20)["bdf"] == "0000:00:14.0"
    assert add(client, "add-rng", id="gap")["bdf"] == "0000:00:06.0"
    for slot, error, message in ((20, Conflict, "Valid PCI device identifier but already used: 20"),
                                 (32, UsageError, "outside the range 0..32"), (0, UsageError, "reserved")):
        with pytest.raises(error, match=message):
            add(client, "add-rng", pci_device_id=slot)
    for key in ("far", "gap"):
        is_done(client, key)
    assert slots(guest) == [*USUAL, "06", "14"]
    disk_in(guest, 20)
    for key in ("far", "gap"):
        remove(client, key)


def _bars(guest: Linux, slot: int) -> str:
    return guest.run(f"head -n 6 /sys/bus/pci/devices/0000:00:{slot:02x}.0/resource")


def test_pci_bar_reprogramming(vm: tuple[Linux, Client], tmp_path: Path) -> None:
    """Linux forgets a device, gives its addresses to another one, and finds the first again elsewhere."""
    guest, client = vm
    add(client, path=str(sparse(tmp_path / "added.raw")), id="test0")
    disk = disk_in(guest, 6)
    guest.run(f"dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>/dev/null; cat /tmp/data >/dev/{disk}; sync")
    before = _bars(guest, 6)
    where = "/sys/bus/pci/devices/0000:00:06.0"
    guest.run(f"echo 0000:00:06.0 > {where}/driver/unbind")
    # Linux leaves the device's decoders on, which would then answer for the other one too.
    guest.run(f"printf '\\0\\0' | dd of={where}/config bs=1 seek=4 conv=notrunc 2>/dev/null")
    guest.run(f"echo 1 > {where}/remove")
    assert slots(guest) == USUAL
    add(client, path=str(sparse(tmp_path / "other.raw")), id="test1")
    disk_in(guest, 7)
    guest.run("echo 1 > /sys/bus/pci/rescan")
    disk = disk_in(guest, 6)
    assert _bars(guest, 6) != before
    guest.run(f"head -c 262144 /dev/{disk} | cmp - /tmp/data; rm /tmp/data")
    for key in ("test0", "test1"):
        remove(client, key)


def test_counters(vm: tuple[Linux, Client]) -> None:
    guest, client = vm
    before = client.call("counters")["_disk1"]
    assert {"read_bytes", "write_bytes", "read_ops", "write_ops"} <= set(before)
    guest.run("dd if=/dev/zero of=/dev/vdb bs=4k count=64 oflag=direct 2>/dev/null")
    guest.run("dd if=/dev/vdb of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null")
    after = client.call("counters")["_disk1"]
    for kind in ("read", "write"):
        assert after[f"{kind}_bytes"] - before[f"{kind}_bytes"] >= 64 * 4096
        assert after[f"{kind}_ops"] - before[f"{kind}_ops"] >= 64


@pytest.mark.parametrize("turns", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_hotplug_loops(vm: tuple[Linux, Client], tmp_path: Path, turns: int) -> None:
    """What the guest lists as PCI devices and as disks agrees with us after each step, and nothing grows."""
    guest, client = vm
    image = sparse(tmp_path / "added.raw")
    look = "lspci | grep -c ^00:06; ls /sys/bus/pci/devices/0000:00:06.0/virtio*/block 2>/dev/null; ls /sys/block"
    usual = guest.run("ls /sys/block").split()

    def loop(turn: int) -> None:
        assert add(client, path=str(image), id="test0")["bdf"] == "0000:00:06.0", turn
        disk = disk_in(guest, 6)
        guest.run(f"dd if=/dev/zero of=/dev/{disk} bs=64k count=2 conv=fsync 2>/dev/null")
        assert guest.run(look).split() == ["1", disk, *sorted([*usual, disk])], turn
        remove(client, "test0")
        assert guest.run(look).split() == ["0", *usual], turn

    loop(0)  # the first has things loaded that stay
    eventually(lambda: not has_process("test0"), "the end of the first disk's process")
    before, memory = footprint(client), pss(client)
    for turn in range(1, turns):
        loop(turn)
    eventually(lambda: not has_process("test0") and footprint(client) == before, "the end of all that the loops had")
    grown = {role: now - memory[role] for role, now in pss(client).items()}
    assert max(grown.values()) < MOST_PSS, grown


def test_hotplug_under_load(vm: tuple[Linux, Client], tmp_path: Path) -> None:
    guest, client = vm
    add(client, path=str(sparse(tmp_path / "added.raw")), id="test0")
    fio.load(guest, disk_in(guest, 6))
    remove(client, "test0")
    assert fio.ended_with_an_error(guest)


@pytest.mark.parametrize("options", [{"restart_budget": 0}, {"restart_backoff": [600.0]}], ids=["parked", "dead"])
def test_hotplug_of_a_disk_nobody_serves(vm: tuple[Linux, Client], tmp_path: Path, options: dict[str, object]) -> None:
    """It leaves through its drain incarnation while fio writes, and hotplug goes on for others."""
    guest, client = vm
    add(client, path=str(sparse(tmp_path / "added.raw")), id="test0", **options)
    fio.load(guest, disk_in(guest, 6))
    os.kill(device(client, "test0")["pid"], signal.SIGKILL)
    eventually(lambda: device(client, "test0")["state"] != "serving", "the death to be noticed")
    remove(client, "test0")
    assert fio.ended_with_an_error(guest)
    assert add(client, "add-rng", id="next")["bdf"] == "0000:00:06.0"
    is_done(client, "next")
    remove(client, "next")


def test_hotplug_by_two_clients_at_once(vm: tuple[Linux, Client], tmp_path: Path) -> None:
    guest, client = vm
    said: list[str] = []

    def ask(verb: str, **args: object) -> None:
        with client_of(guest) as other:
            try:
                other.call(verb, **args)
                said.append("ok")
            except CellvisorError as error:
                said.append(error.code)

    def race(verb: str, *choices: dict[str, object]) -> list[str]:
        said.clear()
        threads = [threading.Thread(target=ask, args=(verb,), kwargs=one) for one in choices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(said)

    images = [str(sparse(tmp_path / f"added{number}.raw")) for number in range(2)]
    assert race("add-disk", *({"id": "test0", "path": image} for image in images)) == ["conflict", "ok"]
    is_done(client, "test0")
    # The second one asks the guest again, or comes too late.
    assert race("remove-device", *({"id": "test0", "timeout": SECONDS} for _ in range(2))) in (
        ["ok", "ok"], ["not-found", "ok"])
    eventually(lambda: not device(client, "test0"), "the disk to be gone")
    done = [one for one in client.call("ops")["operations"] if one["device"] == "test0"]
    assert [one["state"] for one in done if one["verb"] == "remove-device"][-1] == "done"


def test_hotplug_eject_that_nobody_asked_for(vm: tuple[Linux, Client], tmp_path: Path) -> None:
    guest, client = vm
    add(client, path=str(sparse(tmp_path / "added.raw")), id="test0")
    disk_in(guest, 6)
    guest.run("echo 0 > /sys/bus/pci/slots/6/power")
    said = [one for one in client.call("events")["events"] if one["event"] == "eject.unexpected"]
    assert [one["properties"]["device"] for one in said] == ["test0"]
    disk_in(guest, 6)  # the guest was told to look again
    remove(client, "test0")


def test_hotplug_of_a_console(vm: tuple[Linux, Client], tmp_path: Path) -> None:
    guest, client = vm
    assert add(client, "add-console", mode="file", file=str(tmp_path / "said"), id="extra")["bdf"] == "0000:00:06.0"
    is_done(client, "extra")
    name = eventually(lambda: guest.try_run("ls /sys/bus/pci/devices/0000:00:06.0/virtio*/tty 2>/dev/null"
                                            " || ls /dev | grep hvc1").output.strip(), "a second hvc")
    assert re.search(r"hvc\d", name)
    remove(client, "extra")


def test_hotplug_while_paused(vm: tuple[Linux, Client]) -> None:
    guest, client = vm
    client.call("pause")
    assert add(client, "add-rng", id="test0")["bdf"] == "0000:00:06.0"
    assert outcome(client, "test0", 1)["state"] == "guest-notified"
    client.call("resume")
    is_done(client, "test0")
    assert "06" in slots(guest)
    remove(client, "test0")
