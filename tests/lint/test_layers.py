"""Imports go one way, and each part of the rule can fail."""

from __future__ import annotations

import pytest

from tests.lint.layers import problems
from tests.lint.source import Source


def test_imports_go_one_way(product: list[Source]) -> None:
    assert problems(product) == []


@pytest.mark.parametrize(("path", "line", "reason"), [
    ("core/wire/a.py", "from cellvisor.core.mem import view", "allowed"),
    ("core/wire/a.py", "import cellvisor.core.ring.queue", "allowed"),
    ("core/abi/a.py", "from cellvisor.core.wire.spec import Spec", "allowed"),
    ("core/errors.py", "from cellvisor.core.wire.spec import Spec", "allowed"),
    ("core/mem/a.py", "from cellvisor.core.machine import Machine", "allowed"),
    ("core/mem/a.py", "from cellvisor.core import machine", "allowed"),
    ("core/pci/a.py", "from cellvisor.core.store import Store", "allowed"),
    ("core/machine.py", "from cellvisor.devices.device import Device", "core knows no device"),
    ("core/machine.py", "def f():\n    from cellvisor.ctl import cli", "core knows no device"),
    ("core/board/a.py", "import cellvisor.controlplane.api", "core knows no device"),
    ("core/board/a.py", "import importlib\nimportlib.import_module('cellvisor.devices.worker')", "no device"),
    ("core/newpackage/a.py", "from cellvisor.core.mem import view", "no rule"),
    ("devices/worker.py", "from cellvisor.core.kvm.vm import Vm", "allowed"),
    ("devices/worker.py", "from cellvisor.core.link import Link", "allowed"),
    ("devices/nursery.py", "from cellvisor.controlplane.api import Api", "allowed"),
    ("devices/virtio/blk.py", "from cellvisor.devices.virtio.rng import Rng", "no device file"),
    ("devices/virtio/blk.py", "from cellvisor.devices.virtio import rng", "no device file"),
    ("devices/virtio/blk.py", "from cellvisor.devices.vfio.pci import Vfio", "allowed"),
    ("devices/virtio/blk.py", "from cellvisor.devices.worker import Worker", "allowed"),
    ("devices/backends/disk.py", "from cellvisor.core.ring.queue import Chain", "allowed"),
    ("controlplane/api.py", "from cellvisor.core.mem import view", "allowed"),
    ("controlplane/api.py", "from cellvisor.devices.catalog import load", "allowed"),
    ("ctl/cli.py", "from cellvisor.controlplane.config import parse", "allowed"),
    ("ctl/cli.py", "from cellvisor.core.abi import pci", "allowed"),
    ("core/mem/a.py", "from . import view", "absolute"),
    ("core/mem/a.py", "from core.mem import view", "second copy"),
    ("ctl/cli.py", "import devices", "second copy"),
])
def test_wrong_ways_are_found(path: str, line: str, reason: str) -> None:
    others = [Source(name, "") for name in (
        "core/machine.py", "core/store.py", "core/mem/view.py", "core/abi/pci.py", "devices/virtio/rng.py")]
    found = problems([Source(path, line), *(other for other in others if other.path != path)])
    assert len(found) == 1, found
    assert reason in found[0]


@pytest.mark.parametrize(("path", "line"), [
    ("core/wire/a.py", "import msgpack, zmq\nfrom cellvisor.core.errors import UsageError"),
    ("core/wire/a.py", "from cellvisor.core.wire.spec import Spec"),
    ("core/abi/a.py", "from cellvisor.core._native import _native"),
    ("core/mem/a.py", "from cellvisor.core import log"),
    ("core/virtio/a.py", "from cellvisor.core.pci.root import Root"),
    ("core/machine.py", "from cellvisor.core.link import Link\nfrom cellvisor.core import store"),
    ("devices/virtio/a.py", "from cellvisor.devices.device import Device\nfrom cellvisor.devices.backends import x"),
    ("devices/worker.py", "from cellvisor.devices.catalog import load\nfrom cellvisor.core.ring.queue import Queue"),
    ("controlplane/api.py", "from cellvisor.controlplane import config\nfrom cellvisor.core.wire import control"),
    ("ctl/cli.py", "from cellvisor.ctl.client import Client\nfrom cellvisor import __version__"),
])
def test_right_ways_are_not(path: str, line: str) -> None:
    assert problems([Source(path, line), Source("core/store.py", ""), Source("core/log.py", "")]) == []
