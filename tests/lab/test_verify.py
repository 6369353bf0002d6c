"""fio checks every block on Linux's own virtio-blk while the disk's process is killed, stopped and upgraded."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest

from cellvisor.ctl.client import Client
from tests.lab import fio, programs
from tests.lab.guest import Linux
from tests.lab.hotplug import MIB, client_of, device, eventually, sparse

pytestmark = [pytest.mark.lab(split=True), pytest.mark.timeout(900)]

SEED = 3
KILLS, HANGS, UPGRADES = 30, 10, 10
CARE = "restart_budget=1000,restart_backoff=[0],hang_timeout=2"


def _strike(client: Client, what: str) -> None:
    """Hit the disk's process and wait until the next incarnation has served something."""
    before = eventually(lambda: (one := device(client, "data"))["state"] == "serving" and one, "the disk to serve")
    if what == "upgrade":
        assert client.call("upgrade-device", id="data")["upgraded"][0]["generation"] > before["generation"]
    else:
        os.kill(before["pid"], signal.SIGKILL if what == "kill" else signal.SIGSTOP)

    def serves() -> bool:
        now = device(client, "data")
        if now["state"] != "serving" or now["generation"] == before["generation"]:
            return False
        counted = client.call("counters")["data"]  # this incarnation's
        return bool(counted["read_ops"] + counted["write_ops"])

    eventually(serves, f"the disk to go on after a {what}")


@pytest.mark.slow
def test_fio_verifies_through_kills_hangs_and_upgrades(tmp_path: Path) -> None:
    strikes = ["kill"] * KILLS + ["hang"] * HANGS + ["upgrade"] * UPGRADES
    random.Random(SEED).shuffle(strikes)
    disks = [f"path={programs.make(tmp_path / 'fio.img', 'fio')},readonly=on",
             f"path={sparse(tmp_path / 'data.raw', 32 * MIB)},id=data,{CARE}"]
    with Linux("cloud", disks=disks) as guest, client_of(guest) as client:
        programs.install(guest, "vda", "fio")
        fio.verify_until_told(guest, "vdb")
        for what in strikes:
            _strike(client, what)
        assert device(client, "data")["generation"] >= 1 + len(strikes)  # a starved one may count as hanging too
        rounds = fio.finish(guest)
        assert rounds >= 1
        print(f"{rounds} rounds of fio")
        assert guest.poweroff() == 0
