"""What a process must not load: the cost of a worker is its imports, and `--help` answers at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.lint.source import ROOT, python_files

HEAVY = ("asyncio", "uvloop", "rich", "h11", "multiprocessing", "concurrent", "ssl", "http")


def modules(folder: str) -> list[str]:
    """Return the modules of a package, by their files."""
    return [source.module for source in python_files(ROOT, folder) if not source.path.endswith("__main__.py")]


def loaded(code: str) -> set[str]:
    """Run `code` in a fresh interpreter and return the names of all modules that it has loaded."""
    tail = "\nimport sys\nsys.stderr.write('\\nLOADED ' + ' '.join(sys.modules) + '\\n')\n"
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=120,
                          cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rsplit("LOADED ", 1)[1].split())


def heavy(names: set[str], *forbidden: str) -> list[str]:
    """Return which of `forbidden` packages are among the loaded modules."""
    return sorted(name for name in forbidden if any(entry.split(".")[0] == name or entry == name for entry in names))


def test_workers_and_nursery_load_nothing_heavy() -> None:
    chain = ["cellvisor.devices.nursery", "cellvisor.devices.worker", "cellvisor.devices.catalog"]
    chain += [name for folder in ("devices/virtio", "devices/vfio", "devices/backends") for name in modules(folder)]
    names = loaded("\n".join(f"import {name}" for name in chain))
    assert heavy(names, *HEAVY) == []
    foreign = ("cellvisor.controlplane", "cellvisor.ctl", "cellvisor.core.machine", "cellvisor.core.kvm")
    assert heavy(names, *foreign) == []


def test_core_loads_nothing_heavy() -> None:
    chain = [source.module for source in python_files(ROOT, "core")
             if not source.path.endswith(("__main__.py", "build_native.py"))]
    names = loaded("\n".join(f"import {name}" for name in chain))
    assert heavy(names, *HEAVY, "cellvisor.devices", "cellvisor.controlplane", "cellvisor.ctl") == []


def test_controlplane_loads_neither_tables_nor_the_other_processes() -> None:
    names = loaded("\n".join(f"import {name}" for name in modules("controlplane")))
    foreign = ("cellvisor.ctl", "cellvisor.devices", "cellvisor.core.machine", "cellvisor.core.kvm")
    assert heavy(names, "rich", *foreign) == []


@pytest.mark.parametrize("words", [["--help"], ["info", "--help"]], ids=" ".join)
def test_help_loads_neither_rich_nor_zmq(words: list[str]) -> None:
    names = loaded(
        f"import sys\nsys.argv = ['cellvisor', *{words!r}]\nfrom cellvisor.ctl.cli import main\n"
        "try:\n    status = main()\nexcept SystemExit as end:\n    status = end.code\nassert not status, status")
    assert heavy(names, *HEAVY, "zmq", "msgpack", "cffi") == []


def test_the_check_sees_what_is_loaded() -> None:
    names = loaded("import asyncio\nimport cellvisor.core.machine")
    assert heavy(names, "asyncio", "rich", "cellvisor.core.machine") == ["asyncio", "cellvisor.core.machine"]
    with pytest.raises(AssertionError, match="boom"):
        loaded("raise SystemExit('boom')")
