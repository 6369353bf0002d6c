"""Ids and slots: order, one counter, reservations, and messages for what cannot be."""

from __future__ import annotations

import pytest

from cellvisor.controlplane.config import Cpus, Memory, Payload, Serial, VmConfig, check_cpus
from cellvisor.controlplane.inventory import Inventory, Wanted
from cellvisor.controlplane.nurserylink import exit_status, parse_catalog
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, UsageError
from cellvisor.core.wire.budget import KEYS
from tests.fakes.control_nursery import CATALOG

CONSOLE = Wanted("--console", "console", "tty", "__console")
RNG = Wanted("--rng", "rng", "", "__rng")


def disk(text: str) -> Wanted:
    return Wanted("--disk", "disk", text)


@pytest.fixture
def inventory() -> Inventory:
    return Inventory(parse_catalog(CATALOG), ["g", "h"])


def test_usual_vm(inventory: Inventory) -> None:
    added = inventory.add([CONSOLE, disk("path=a"), disk("path=b,id=data"), disk("path=c"), RNG])
    assert [(one.id, one.slot, one.type) for one in added] == [
        ("__console", 1, "console"), ("_disk0", 2, "blk"), ("data", 3, "blk"), ("_disk1", 4, "blk"),
        ("__rng", 5, "rng")]
    later = inventory.add([disk("path=d")])[0]
    assert (later.id, later.bdf) == ("_disk2", "0000:00:06.0")
    assert later.options == {"path": "d", "readonly": False, **dict.fromkeys(KEYS, 0)}
    assert inventory.get("data").slot == 3
    with pytest.raises(NotFound, match="no device 'nope'"):
        inventory.get("nope")


def test_chosen_slots_are_reserved_first(inventory: Inventory) -> None:
    added = inventory.add([CONSOLE, disk("path=a"), disk("path=b,pci_device_id=1"), disk("path=c,pci_device_id=31")])
    assert [one.slot for one in added] == [2, 3, 1, 31]


def test_by_type_name(inventory: Inventory) -> None:
    one = inventory.add([Wanted("--device-type", "blk", "path=x", by_verb=False)])[0]
    assert (one.id, one.verb) == ("_disk0", "disk")
    with pytest.raises(UsageError, match=r"no device type .bkl. .did you mean blk\? known types: blk, console, net"):
        inventory.add([Wanted("--device-type", "bkl", "", by_verb=False)])
    with pytest.raises(UsageError, match="bent cannot be loaded: SyntaxError"):
        inventory.add([Wanted("--device-type", "bent", "", by_verb=False)])


@pytest.mark.parametrize(("texts", "error", "message"), [
    (["path=a,pci_device_id=0"], UsageError, "pci_device_id=0 is reserved"),
    (["path=a,pci_device_id=32"], UsageError, r"pci_device_id=32 is outside the range 0\.\.32"),
    (["path=a,pci_device_id=3", "path=b,pci_device_id=3"], Conflict,
     "Valid PCI device identifier but already used: 3"),
    (["path=a,pci_device_id=1"], Conflict, "already used: 1 .by __console"),
    (["path=a,bw_size=1M"], UsageError, "--disk: bw_size=1048576 needs bw_refill_time"),
    (["path=a,ops_refill_time=5"], UsageError, "--disk: ops_refill_time=5 needs ops_size"),
    (["path=a,ops_size=-1"], UsageError, "ops_size=-1 is out of range"),
    (["path=a,ops_size=1,ops_refill_time=86400001"], UsageError, "ops_refill_time=86400001 is above 86400000"),
    (["path=a,rate_limit_group=f"], UsageError, r"rate_limit_group=f is not a rate .* .groups: g, h"),
    (["path=a,rate_limit_group=g,bw_size=1,bw_refill_time=1"], UsageError, "bw_size=1 beside rate_limit_group=g"),
    (["path=a,id=__x"], UsageError, "id=__x begins with two underscores"),
    (["path=a,id=a/b"], UsageError, "id='a/b' cannot name a device"),
    (["path=a,id=d", "path=b,id=d"], Conflict, "id=d is used"),
    (["readonly=on"], UsageError, "--disk: path is missing"),
    (["path=a,spam=1"], UsageError, "--disk: unknown key 'spam' .known keys: .*path"),
    (["path=a,iommu=on"], UsageError, "iommu=on"),
])
def test_refusals_change_nothing(inventory: Inventory, texts: list[str], error: type[CellvisorError],
                                 message: str) -> None:
    inventory.add([CONSOLE])
    with pytest.raises(error, match=message):
        inventory.add([disk("path=good"), *map(disk, texts)])
    assert list(inventory.devices) == ["__console"]
    assert inventory.add([disk("path=z")])[0].id == "_disk0"


def test_thirty_one_devices_and_no_more(inventory: Inventory) -> None:
    added = inventory.add([disk(f"path={number}") for number in range(31)])
    assert [one.slot for one in added] == list(range(1, 32))
    with pytest.raises(Conflict, match="no free slot"):
        inventory.add([disk("path=more")])


def test_user_ids_do_not_collide_with_made_up_ones(inventory: Inventory) -> None:
    added = inventory.add([disk("path=a"), disk("path=b,id=_disk0")])
    assert [one.id for one in added] == ["_disk1", "_disk0"]


def test_config_json(inventory: Inventory) -> None:
    devices = inventory.add([Wanted("--console", "console", "file=/x", "__console"), disk("path=a"), RNG])
    config = VmConfig(check_cpus(Cpus()), Memory(), Payload("/k"), Serial(mode="pty"), tuple(devices),
                      {"__serial": "/dev/pts/9"})
    body = config.as_json()
    assert body["console"]["mode"] == "File"
    assert body["console"]["file"] == "/x"
    assert body["disks"][0]["path"] == "a"
    assert body["disks"][0]["pci_device_id"] == 2
    assert body["rng"]["src"] == "/dev/urandom"
    assert body["serial"] == {"mode": "Pty", "file": "/dev/pts/9", "socket": None}
    assert config.for_core()["serial"]["file"] is None


@pytest.mark.parametrize(("told", "status"), [
    ("exit 0", 0), ("exit 70", 70), ("signal 9", -9), ("signal x", None), (None, None), (9, None), ("", None)])
def test_exit_status(told: object, status: int | None) -> None:
    assert exit_status(told) == status
