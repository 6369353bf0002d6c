"""A stock Debian guest gets and gives back PCI devices while it runs, as its own ACPI code sees it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError, Conflict, UsageError
from cellvisor.ctl.client import Client
from tests.lab.guest import Linux

pytestmark = [pytest.mark.lab(split=True), pytest.mark.timeout(900)]

SECONDS = 180.0  # the lab is slow; on real hardware all of it takes milliseconds
MIB = 1 << 20


def sparse(path: Path, size: int = 16 * MIB) -> Path:
    """Make an empty raw image."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def client_of(guest: Linux) -> Client:
    """Connect to the guest's VM."""
    def connect() -> Client | None:
        for directory in (guest.folder / "cellvisor").glob("*"):
            with suppress(CellvisorError):
                return Client(str(directory), timeout=SECONDS)
        return None

    client: Client = eventually(connect, "the API")
    return client


def eventually(condition: Callable[[], Any], what: str) -> Any:
    """Wait until `condition` is true and return what it gave."""
    until = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.1)
    return found


def add(client: Client, verb: str = "add-disk", **options: Any) -> dict[str, str]:
    """Add a device and return what Cloud Hypervisor would answer."""
    answer = client.call(verb, **options)
    return {"id": answer["id"], "bdf": answer["bdf"]}


def outcome(client: Client, key: str, timeout: float = SECONDS) -> dict[str, Any]:
    """Wait for the end of the latest operation of a device."""
    answer: dict[str, Any] = client.call("ops", action="wait", id=key, timeout=timeout)
    return answer


def is_done(client: Client, key: str) -> None:
    """Wait until it is done."""
    operation = outcome(client, key)
    assert operation["state"] == "done", operation


def remove(client: Client, key: str, **more: Any) -> None:
    """Remove a device and wait until it is gone."""
    client.call("remove-device", id=key, **more)
    is_done(client, key)


def plug_of(client: Client, key: str) -> str:
    """Return what the machine knows of a device's slot, "" if there is no such device."""
    return next((str(one["plug"]) for one in client.call("devices")["devices"] if one["id"] == key), "")


def slots(guest: Linux) -> list[str]:
    """Return the slots that the guest sees, in hexadecimal."""
    return [line[3:5] for line in guest.run("lspci").splitlines()]


def disk_in(guest: Linux, slot: int) -> str:
    """Return the name of the disk in a slot once the driver has it."""
    where = f"ls /sys/bus/pci/devices/0000:00:{slot:02x}.0/virtio*/block 2>/dev/null"
    name: str = eventually(lambda: guest.try_run(where).output.strip(), f"a disk in slot {slot}")
    return name


def usual(tmp_path: Path) -> Linux:
    """Console, three disks and the rng: the next slot is 6, as in Cloud Hypervisor's usual VM."""
    disks = [sparse(tmp_path / f"disk{number}.raw") for number in range(3)]
    return Linux("cloud", disks=[f"path={disk}" for disk in disks])



def test_pci_device_id_hotplug(tmp_path: Path) -> None:
    image = sparse(tmp_path / "added.raw")
    with usual(tmp_path) as guest, client_of(guest) as client:
        assert add(client, path=str(image), id="far", pci_device_id=20)["bdf"] == "0000:00:14.0"
        assert add(client, "add-rng", id="gap")["bdf"] == "0000:00:06.0"
        for slot, error, message in ((20, Conflict, "Valid PCI device identifier but already used: 20"),
                                     (32, UsageError, "outside the range 0..32"), (0, UsageError, "reserved")):
            with pytest.raises(error, match=message):
                add(client, "add-rng", pci_device_id=slot)
        for key in ("far", "gap"):
            is_done(client, key)
        assert slots(guest)[6:] == ["06", "14"]
        disk_in(guest, 20)


def test_pci_bar_reprogramming_after_hotplug(tmp_path: Path) -> None:
    image = sparse(tmp_path / "added.raw")
    with usual(tmp_path) as guest, client_of(guest) as client:
        add(client, path=str(image), id="test0")
        is_done(client, "test0")
        disk = disk_in(guest, 6)
        device = "/sys/bus/pci/devices/0000:00:06.0"
        guest.run(f"dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>/dev/null; cat /tmp/data >/dev/{disk}; sync")
        guest.run(f"echo 1 > {device}/remove")
        assert "06" not in slots(guest)
        guest.run("echo 1 > /sys/bus/pci/rescan")
        disk = disk_in(guest, 6)
        guest.run(f"head -c 262144 /dev/{disk} | cmp - /tmp/data")
        remove(client, "test0")


def test_hotplug_loops(tmp_path: Path) -> None:
    image = sparse(tmp_path / "added.raw")
    with usual(tmp_path) as guest, client_of(guest) as client:
        for turn in range(10):
            assert add(client, path=str(image), id="test0")["bdf"] == "0000:00:06.0", turn
            disk = disk_in(guest, 6)
            guest.run(f"dd if=/dev/zero of=/dev/{disk} bs=64k count=2 conv=fsync 2>/dev/null")
            remove(client, "test0")
        assert slots(guest) == ["00", "01", "02", "03", "04", "05"]
        assert guest.run("dmesg | grep -ciE 'acpi.*error|warning:|bug:' || true").strip() == "0"


def test_hotplug_under_load(tmp_path: Path) -> None:
    image = sparse(tmp_path / "added.raw")
    with usual(tmp_path) as guest, client_of(guest) as client:
        add(client, path=str(image), id="test0")
        disk = disk_in(guest, 6)
        guest.run(f"(while dd if=/dev/zero of=/dev/{disk} bs=64k count=64 conv=fsync; do :; done) >/dev/null 2>&1 &")
        time.sleep(1)
        remove(client, "test0")
        assert "06" not in slots(guest)
        guest.run("true")


def test_hotplug_of_a_parked_device(tmp_path: Path) -> None:
    """Nobody serves the disk while the guest writes to it: it still leaves, and hotplug goes on for others."""
    image = sparse(tmp_path / "added.raw")
    with usual(tmp_path) as guest, client_of(guest) as client:
        add(client, path=str(image), id="test0", restart_budget=0)
        disk = disk_in(guest, 6)
        guest.run(f"(while dd if=/dev/zero of=/dev/{disk} bs=64k count=64 conv=fsync; do :; done) >/dev/null 2>&1 &")
        time.sleep(1)
        worker = next(one["pid"] for one in client.call("devices")["devices"] if one["id"] == "test0")
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: any(one["id"] == "test0" and one["state"] == "parked"
                               for one in client.call("devices")["devices"]), "the device to be given up")
        remove(client, "test0")
        assert add(client, "add-rng", id="next")["bdf"] == "0000:00:06.0"
        is_done(client, "next")


def test_hotplug_without_a_driver_for_it(tmp_path: Path) -> None:
    with Linux("cloud", cmdline="acpiphp.disable=1") as guest, client_of(guest) as client:
        assert add(client, "add-rng", id="test0")["bdf"] == "0000:00:03.0"
        assert outcome(client, "test0", 5)["state"] == "guest-notified"
        client.call("remove-device", id="test0", timeout=2)
        assert outcome(client, "test0")["state"] == "timed-out"
        assert client.call("ops", action="cancel", id="test0")["state"] == "cancelled"
        guest.run("true")


def test_hotplug_eject_that_nobody_asked_for(tmp_path: Path) -> None:
    image = sparse(tmp_path / "added.raw")
    with usual(tmp_path) as guest, client_of(guest) as client:
        add(client, path=str(image), id="test0")
        disk_in(guest, 6)
        guest.run("echo 0 > /sys/bus/pci/slots/6/power")
        said = [one for one in client.call("events")["events"] if one["event"] == "eject.unexpected"]
        assert [one["properties"]["device"] for one in said] == ["test0"]
        disk_in(guest, 6)  # the guest was told to look again
        remove(client, "test0")





def test_hotplug_of_a_console(tmp_path: Path) -> None:
    with usual(tmp_path) as guest, client_of(guest) as client:
        assert add(client, "add-console", mode="file", file=str(tmp_path / "said"), id="extra")["bdf"] == "0000:00:06.0"
        is_done(client, "extra")
        name = eventually(lambda: guest.try_run("ls /sys/bus/pci/devices/0000:00:06.0/virtio*/tty 2>/dev/null"
                                                " || ls /dev | grep hvc1").output.strip(), "a second hvc")
        assert re.search(r"hvc\d", name)
        remove(client, "extra")


def test_disk_hotplug(tmp_path: Path) -> None:
    image = sparse(tmp_path / "added.raw")
    with usual(tmp_path) as guest, client_of(guest) as client:
        assert slots(guest) == ["00", "01", "02", "03", "04", "05"]
        wanted = {"path": str(image), "id": "test0", "readonly": True}
        assert add(client, **wanted) == {"id": "test0", "bdf": "0000:00:06.0"}
        is_done(client, "test0")
        assert "06" in slots(guest)
        disk = disk_in(guest, 6)
        assert int(guest.run(f"cat /sys/block/{disk}/size")) * 512 == 16 * MIB
        assert "16+0 records out" in guest.run(f"dd if=/dev/{disk} of=/dev/null bs=1M 2>&1")
        assert guest.try_run(f"dd if=/dev/zero of=/dev/{disk} bs=4k count=1 conv=fsync").status != 0
        remove(client, "test0")
        assert "06" not in slots(guest)
        assert guest.try_run(f"test -e /sys/block/{disk}").status != 0
        assert add(client, **wanted) == {"id": "test0", "bdf": "0000:00:06.0"}
        is_done(client, "test0")
        guest.reboot()
        assert int(guest.run(f"cat /sys/block/{disk_in(guest, 6)}/size")) * 512 == 16 * MIB
        remove(client, "test0")
        guest.reboot()
        assert slots(guest) == ["00", "01", "02", "03", "04", "05"]
        assert guest.poweroff() == 0


def test_hotplug_while_the_guest_boots(tmp_path: Path) -> None:
    guest = usual(tmp_path)
    try:
        guest.start()
        with client_of(guest) as client:
            keys = []
            until = time.monotonic() + SECONDS
            while len(keys) < 12 and time.monotonic() < until:
                keys.append(add(client, "add-rng")["id"])
                time.sleep(0.5)
            guest.await_agent()
            for key in keys:
                is_done(client, key)
            assert [f"{number:02x}" for number in range(6 + len(keys))] == slots(guest)
            assert {plug_of(client, key) for key in keys} <= {"enumerated", "bound"}
    finally:
        guest.close()


def test_hotplug_while_paused(tmp_path: Path) -> None:
    with usual(tmp_path) as guest, client_of(guest) as client:
        client.call("pause")
        assert add(client, "add-rng", id="test0")["bdf"] == "0000:00:06.0"
        assert outcome(client, "test0", 1)["state"] == "guest-notified"
        client.call("resume")
        is_done(client, "test0")
        assert "06" in slots(guest)
        remove(client, "test0")


@pytest.mark.slow
def test_hotplug_of_every_slot(tmp_path: Path) -> None:
    with Linux("cloud") as guest, client_of(guest) as client:
        keys = [add(client, "add-rng")["id"] for _ in range(29)]
        with pytest.raises(Conflict, match="all 31 are taken"):
            add(client, "add-rng")
        for key in keys:
            is_done(client, key)
        assert len(slots(guest)) == 32
        for key in keys:
            client.call("remove-device", id=key, timeout=SECONDS * 5)
        for key in keys:
            eventually(lambda key=key: plug_of(client, key) == "", f"{key} to be gone")
        assert slots(guest) == ["00", "01", "02"]
