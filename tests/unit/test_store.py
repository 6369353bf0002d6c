"""Core's store of descriptors: which processes it knows by their pidfds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from cellvisor.core.closer import Closer
from cellvisor.core.store import Store


@pytest.fixture
def store() -> Iterator[Store]:
    made = Store(Closer())
    yield made
    made.close()


def test_living_processes_are_known_by_their_pidfds(store: Store) -> None:
    with subprocess.Popen(["sleep", "1000"]) as one, subprocess.Popen(["sleep", "1000"]) as other:
        for device, role, process in (("lan", "passt", one), ("wan", "passt", other)):
            store.deposit(device, f"process:{role}", os.pidfd_open(process.pid))
        store.deposit("lan", "passt", os.pidfd_open(other.pid))
        assert store.processes() == [{"device": "lan", "role": "passt", "pid": one.pid},
                                     {"device": "wan", "role": "passt", "pid": other.pid}]
        one.kill()
        one.wait()
        assert [entry["device"] for entry in store.processes()] == ["wan"]
        store.drop("wan")
        assert store.processes() == []
        other.kill()


@pytest.mark.parametrize("name", ["process:", "process:a b", "process:\x1b[2J", "processes:a"])
def test_a_role_is_one_word(store: Store, name: str) -> None:
    store.deposit("lan", name, os.pidfd_open(os.getpid()))
    assert store.processes() == []


def test_what_is_no_pidfd_is_no_process(store: Store) -> None:
    store.deposit("lan", "process:passt", os.open("/dev/null", os.O_RDONLY))
    assert store.processes() == []
