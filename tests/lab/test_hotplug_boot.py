"""Devices that come and go around the boots of a stock Debian guest, which Linux's hotplug code then has to settle."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cellvisor.core.errors import Conflict
from tests.lab.guest import Linux
from tests.lab.hotplug import (
    MIB,
    SECONDS,
    USUAL,
    add,
    client_of,
    device,
    disk_in,
    eventually,
    is_done,
    outcome,
    remove,
    slots,
    sparse,
    usual,
)

pytestmark = [pytest.mark.lab(split=True), pytest.mark.timeout(900)]


def test_disk_hotplug_and_reboot(tmp_path: Path) -> None:
    image = sparse(tmp_path / "added.raw")
    with usual(tmp_path) as guest, client_of(guest) as client:
        assert add(client, path=str(image), id="test0") == {"id": "test0", "bdf": "0000:00:06.0"}
        is_done(client, "test0")
        guest.type("0 reboot -f\n")
        added = add(client, "add-rng")
        guest.await_agent()
        is_done(client, added["id"])
        assert slots(guest) == [*USUAL, "06", "07"]
        assert int(guest.run(f"cat /sys/block/{disk_in(guest, 6)}/size")) * 512 == 16 * MIB
        remove(client, "test0")
        guest.reboot()
        assert slots(guest) == [*USUAL, "07"]
        assert guest.poweroff() == 0


def test_hotplug_while_the_guest_boots(tmp_path: Path) -> None:
    guest = usual(tmp_path)
    try:
        guest.start()
        with client_of(guest) as client:
            keys = []
            while len(keys) < 12:
                keys.append(add(client, "add-rng")["id"])
                time.sleep(0.5)
            guest.await_agent()
            for key in keys:
                is_done(client, key)
            assert [f"{number:02x}" for number in range(6 + len(keys))] == slots(guest)
            assert {device(client, key)["plug"] for key in keys} <= {"enumerated", "bound"}
    finally:
        guest.close()


def test_hotplug_without_a_driver_for_it() -> None:
    with Linux("cloud", cmdline="acpiphp.disable=1") as guest, client_of(guest) as client:
        assert add(client, "add-rng", id="test0")["bdf"] == "0000:00:03.0"
        assert outcome(client, "test0", 5)["state"] == "guest-notified"
        client.call("remove-device", id="test0", timeout=2)
        assert outcome(client, "test0")["state"] == "timed-out"
        assert client.call("ops", action="cancel", id="test0")["state"] == "cancelled"
        guest.run("true")


@pytest.mark.slow
def test_hotplug_of_every_slot() -> None:
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
            eventually(lambda key=key: not device(client, key), f"{key} to be gone")
        assert slots(guest) == ["00", "01", "02"]
