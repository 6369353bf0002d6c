"""`--event-monitor`: Cloud Hypervisor's records, whoever reads them or not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cellvisor.controlplane.events import EventLog, Monitor
from cellvisor.core.errors import UsageError


def records(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n\n")
    return [json.loads(record) for record in text.split("\n\n")[:-1]]


@pytest.mark.parametrize(("name", "properties", "source", "event", "told"), [
    ("vmm.starting", {}, "vmm", "starting", {}),
    ("vmm.shutdown", {}, "vmm", "shutdown", {}),
    ("vm.booting", {}, "vm", "booting", {}),
    ("vm.pausing", {}, "vm", "pausing", {}),
    ("vm.deleted", {}, "vm", "deleted", {}),
    ("vm.panicked", {}, "guest", "panic", {}),
    ("device.activated", {"device": "_disk0"}, "virtio-device", "activated", {"id": "_disk0"}),
    ("device.reset", {"device": "_disk0"}, "virtio-device", "reset", {"id": "_disk0"}),
    ("device.removed", {"device": "_net1", "bdf": "0000:00:06.0"}, "vm", "device-removed",
     {"id": "_net1", "bdf": "0000:00:06.0"}),
    ("console.pty", {"path": "/dev/pts/1"}, "vm", "console-pty", {"path": "/dev/pts/1"}),
])
def test_names_are_cloud_hypervisors(tmp_path: Path, name: str, properties: dict[str, Any], source: str, event: str,
                                     told: dict[str, Any]) -> None:
    path = tmp_path / "events"
    monitor = Monitor(str(path))
    log = EventLog()
    log.add_sink(monitor.write)
    log.emit("vmm.starting")
    log.emit(name, **properties)
    monitor.close()
    first, record = records(path.read_text())
    assert set(first) == set(record) == {"timestamp", "source", "event", "properties"}
    assert set(record["timestamp"]) == {"secs", "nanos"}
    assert first["timestamp"]["secs"] <= record["timestamp"]["secs"] < 60
    assert (record["source"], record["event"]) == (source, event)
    assert told.items() <= record["properties"].items()


def test_a_reader_that_does_not_read_delays_nobody(tmp_path: Path) -> None:
    take, give = os.pipe()
    monitor = Monitor(f"/proc/self/fd/{give}")
    log = EventLog()
    log.add_sink(monitor.write)
    for number in range(2000):
        log.emit("vm.tick", number=number, text="x" * 100)
    monitor.close()
    os.close(give)
    with open(take) as pipe:
        seen = pipe.read()
    assert '"number": 0' in seen
    assert '"number": 1999' not in seen


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--event-monitor /no/such/dir: No such file"):
        Monitor("/no/such/dir")
