"""The C code under AddressSanitizer, UBSan and ThreadSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.debian import need
from tests.fakes.sanitized import environment

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "core" / "_native"
TESTS = ("test_ring.py", "test_ring_hostile.py", "test_ring_crash.py", "test_recovery_ring.py", "test_memory_view.py",
         "test_kvm.py", "test_devices_limiter.py")
TWICE = """
import tests.fakes.sanitized
from cellvisor.core._native._native import lib
queue = lib.cv_queue_new(8)
lib.cv_queue_free(queue)
lib.cv_queue_free(queue)
"""


def run(*command: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def sanitized() -> dict[str, str]:
    return environment()


def test_a_mistake_is_seen(sanitized: dict[str, str]) -> None:
    done = run(sys.executable, "-c", TWICE, **sanitized)
    assert done.returncode != 0
    assert "attempting double-free" in done.stderr


@pytest.mark.parametrize("name", TESTS)
def test_addresses_and_arithmetic(sanitized: dict[str, str], name: str) -> None:
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.fakes.sanitized",
               f"tests/unit/{name}", **sanitized)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A driver and a device on one ring, two threads of a program (tests/guest/host/ring_race.c)."""
    program = str(tmp_path_factory.mktemp("race") / "ring_race")
    sources = [ROOT / "tests" / "guest" / "host" / "ring_race.c", *(NATIVE / f"{name}.c" for name in ("ring", "chain",
                                                                                                     "memory"))]
    # ThreadSanitizer does not model fences: they order wake-ups here, and a lost one is told by the program.
    done = run(need("gcc", "gcc"), "-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-fsanitize=thread", "-Wno-tsan",
               f"-I{NATIVE}", *map(str, sources), "-lpthread", "-o", program, **os.environ)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize("indirect", [0, 1])
@pytest.mark.parametrize("event_idx", [0, 1])
def test_no_race_and_no_lost_wakeup_on_a_ring(race: str, event_idx: int, indirect: int) -> None:
    done = run(race, "200000", str(event_idx), str(indirect), **os.environ)
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert "requests=200000 " in done.stdout
