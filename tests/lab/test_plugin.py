"""A device type that lives outside of the tree: install its package, name it, boot with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.lab.guest import Linux
from tests.lab.recipe import CHECKOUT

pytestmark = pytest.mark.lab


def test_installed_package_is_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A copy, for building leaves its traces beside the sources.
    source = shutil.copytree(CHECKOUT / "deploy/example-device", tmp_path / "example-device")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps",
                    "--no-build-isolation", "--disable-pip-version-check", "--root-user-action=ignore",
                    "--target", str(tmp_path / "site"), str(source)], check=True)
    beside = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{':' + beside if beside else ''}")
    with Linux("cloud", args=["--device-type", "pattern,start=65"]) as guest:
        available = guest.run("cat /sys/class/misc/hw_random/rng_available").split()
        assert available == ["virtio_rng.0", "virtio_rng.1"]
        guest.run("echo virtio_rng.1 > /sys/class/misc/hw_random/rng_current")
        data = guest.run("dd if=/dev/hwrng bs=16 count=1 2>/dev/null | od -An -tu1").split()
        numbers = [int(word) for word in data]
        assert len(numbers) == 16
        assert all((after - before) % 256 == 1 for before, after in pairwise(numbers))
        assert guest.poweroff() == 0
