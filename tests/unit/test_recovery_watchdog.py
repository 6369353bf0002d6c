"""Who is taken for hung, and who is not: core's watchdog over a state memfd that the test plays the worker of."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cellvisor.core.link import Link
from cellvisor.core.ring.state import StateMap, create_state
from cellvisor.core.watchdog import HANG_TICKS, Watchdog
from cellvisor.core.wire.reactor import Reactor

LIMIT = 0.1
TICK = LIMIT / HANG_TICKS


class Worker:
    """A link whose worker answers pings or does not."""

    def __init__(self) -> None:
        self.fd = create_state([8])
        self.state = StateMap(self.fd)
        self.worker = SimpleNamespace(pid=os.getpid())
        self.alive, self.identity = True, "dev0/1/x"
        self.hang_timeout, self.io_timeout = LIMIT, 0.3
        self.ping_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.hung: list[str] = []
        self.reactor = Reactor()
        Watchdog(self.reactor, lambda link, reason: self.hung.append(reason)).watch(cast("Link", self))

    def live(self, ticks: int, *, answer: bool = False, calls: bool = False) -> list[str]:
        """Let ticks pass, however long they take on this machine; returns what the watchdog said meanwhile."""
        self.hung.clear()
        for _ in range(ticks):
            if answer:
                self.state.echo = self.state.ping
            if calls:
                self.state.enter_syscall()
            end = time.monotonic() + TICK
            while time.monotonic() < end:
                self.reactor.turn(TICK / 4)
        return self.hung


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.reactor.close()
    made.state.close()
    os.close(made.fd)
    if made.ping_fd >= 0:
        os.close(made.ping_fd)


def test_who_answers_is_alive(worker: Worker) -> None:
    assert worker.live(30, answer=True) == []
    assert os.eventfd_read(worker.ping_fd) > 3


def test_who_does_not_is_hung_and_told_once(worker: Worker) -> None:
    assert worker.live(30) == ["no sign of life for 0.1 s"]
    assert worker.live(10) == []


def test_the_next_incarnation_is_judged_anew(worker: Worker) -> None:
    assert len(worker.live(20)) == 1
    worker.identity = "dev0/2/y"
    assert worker.live(10, answer=True) == []
    assert len(worker.live(20)) == 1


def test_a_call_to_the_back_end_has_its_own_limit(worker: Worker) -> None:
    worker.state.enter_syscall()
    assert worker.live(10) == []
    assert worker.live(20) == ["its back end has not answered for 0.3 s"]


def test_one_call_after_the_other_is_a_sign_of_life(worker: Worker) -> None:
    assert worker.live(40, calls=True) == []


def test_a_process_stopped_in_a_call_is_hung(worker: Worker) -> None:
    with subprocess.Popen(["sleep", "60"]) as stopped:
        stopped.send_signal(signal.SIGSTOP)
        os.waitpid(stopped.pid, os.WUNTRACED)
        worker.worker.pid = stopped.pid
        worker.state.enter_syscall()
        assert worker.live(12) == ["no sign of life for 0.1 s"]
        stopped.kill()


@pytest.mark.parametrize("limits", [{"hang_timeout": 0.0}, {"io_timeout": 0.0}])
def test_for_ever_is_for_ever(worker: Worker, limits: dict[str, Any]) -> None:
    vars(worker).update(limits)
    worker.state.enter_syscall()
    assert worker.live(60) == []


def test_nobody_serves_and_the_device_goes(worker: Worker) -> None:
    worker.alive = False
    assert worker.live(20) == []
    os.close(worker.ping_fd)
    worker.ping_fd = -1
    worker.alive = True
    assert worker.live(20) == []


def test_a_core_that_stood_still_blames_nobody(worker: Worker) -> None:
    assert worker.live(3, answer=True) == []
    time.sleep(10 * LIMIT)  # core was stopped, the worker was not
    assert worker.live(3, answer=True) == []
