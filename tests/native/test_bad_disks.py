"""Disks that cannot be added: each is refused with its key and value, over ZeroMQ and HTTP, and nothing is left."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError
from cellvisor.ctl.client import Client
from cellvisor.devices.backends.disk import Disk
from tests.native.conftest import Vm
from tests.native.guest import make_disk, needs_kvm
from tests.native.hotplug import Steered, eventually, starting

pytestmark = [pytest.mark.kvm, needs_kvm]
MIB = 1 << 20


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    yield from starting(vm)


def rows(where: Path) -> Iterator[tuple[dict[str, Any], int, str]]:
    """Yield what is asked for, the status, and what the message must say."""
    odd, empty, pipe, locked, fine = (where / name for name in ("odd", "empty", "pipe", "locked", "fine"))
    odd.write_bytes(b"x" * 777)
    empty.touch()
    os.mkfifo(pipe)
    make_disk(locked, MIB)
    make_disk(fine, MIB)
    yield {"path": f"{where}/nope", "id": "mine", "pci_device_id": 9}, 400, f"path={where}/nope: No such file"
    yield {"path": f"{where}"}, 400, f"path={where}: Is a directory"
    yield {"path": f"{pipe}"}, 400, f"path={pipe} is neither a file nor a block device"
    yield {"path": f"{odd}"}, 400, f"path={odd}: size 777 is not a multiple of 512"
    yield {"path": f"{empty}"}, 400, f"path={empty}: size 0"
    yield {"path": f"{locked}"}, 400, f"path={locked} is in use by "
    yield {"path": f"{locked}", "readonly": True}, 400, f"path={locked} is in use by "
    for options, status, message in (
            ({"path": ""}, 400, "path= is not a file name"),
            ({"path": None}, 400, "path is missing"),
            ({"colour": "red"}, 400, "add-disk: unknown key 'colour'"),
            ({"id": "_disk0"}, 409, "id=_disk0 is used"),
            ({"id": "__x"}, 400, "id=__x begins with two underscores"),
            ({"id": "a/b"}, 400, "id='a/b' cannot name a device"),
            ({"pci_device_id": 0}, 400, "pci_device_id=0 is reserved for the host bridge"),
            ({"pci_device_id": 32}, 400, "pci_device_id=32 is outside the range 0..32"),
            ({"pci_device_id": 2}, 409, "Valid PCI device identifier but already used: 2"),
            ({"bw_size": -1}, 400, "bw_size=-1 is out of range"),
            ({"bw_size": 2**63}, 400, "bw_size=9223372036854775808 is out of range"),
            ({"bw_size": "5X", "bw_refill_time": 1}, 400, "bw_size=5X is not a size"),
            ({"bw_size": 5}, 400, "bw_size=5 needs bw_refill_time"),
            ({"ops_refill_time": 5}, 400, "ops_refill_time=5 needs ops_size"),
            ({"ops_one_time_burst": 5}, 400, "ops_one_time_burst=5 needs ops_size"),
            ({"ops_size": 5, "ops_refill_time": 86400001}, 400, "ops_refill_time=86400001 is above 86400000"),
            ({"rate_limiter_config": {"ops": {"size": 5}}}, 400, "ops_size=5 needs ops_refill_time"),
            ({"rate_limiter_config": {"iops": {}}}, 400, "rate_limiter_config: unknown key 'iops'"),
            ({"rate_limiter_config": {"ops": {"rate": 1}}}, 400, "unknown key 'ops_rate'"),
            ({"rate_limit_group": "nope"}, 400, "rate_limit_group=nope is not a rate limit group of this VM"),
            ({"rate_limit_group": "g", "ops_size": 5, "ops_refill_time": 5}, 400, "ops_size=5 beside"),
            ({"num_queues": 0}, 400, "num_queues=0 is below 1"),
            ({"queue_size": 100}, 400, "queue_size=100 is not a power of two"),
            ({"queue_affinity": [{"queue_index": 4, "host_cpus": [0]}]}, 400, "queue 4 of 1 queues"),
            ({"image_type": "qcow2"}, 400, "image_type=qcow2 is not raw"),
            ({"serial": "x" * 21}, 400, "has 21 bytes, at most 20")):
        yield {"path": f"{fine}", **options}, status, message


def test_each_is_refused_and_leaves_nothing(start: Callable[..., Steered], disk: Path, tmp_path: Path) -> None:
    socket = tmp_path / "http.sock"
    vm = start("removals=99", disks=[disk], extra=["--api-socket", str(socket), "--rate-limit-group", "id=g"])
    asked = list(rows(tmp_path))
    messages = set()
    holder = Disk(str(tmp_path / "locked"))
    with contextlib.closing(holder), Client(str(socket)) as http:
        http.call("ping")
        before, devices = vm.footprint(), vm.devices()
        for over, client in (("zmq", vm.client), ("http", http)):
            for options, status, message in asked:
                with pytest.raises(CellvisorError) as refused:
                    client.call("add-disk", **options)
                text = str(refused.value)
                assert (refused.value.status, message in text, "\n" in text) == (status, True, False), (over, text)
                messages.add(message)
                eventually(lambda: vm.count() == before, f"what {options} left")
        assert len(messages) > 28
        assert vm.devices() == devices
    for options, bdf in ((f"path={vm.disk},id=mine,pci_device_id=9", 9), (f"path={tmp_path}/fine", 4)):
        assert vm.add(options)["bdf"] == f"0000:00:{bdf:02x}.0", "names and slots are free"
