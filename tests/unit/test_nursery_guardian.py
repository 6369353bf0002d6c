"""The nursery's guardian: a successor is started when the controlplane dies, and not for ever when that dies too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cellvisor.core.wire.reactor import Reactor
from cellvisor.devices import guardian
from cellvisor.devices.guardian import ATTEMPTS, IN_CHARGE, Guardian


class Scene:
    """A guardian with its loop; a successor writes a line to `log` and ends with the status that `status` holds."""

    def __init__(self, where: Path) -> None:
        self.log, self.status = where / "log", where / "status"
        self.log.touch()
        self.status.write_text("1")
        script = (f"import os, sys, time\nlog = open({str(self.log)!r}, 'a')\n"
                  "print(os.environ['CELLVISOR_BEGAN_NS'], file=log, flush=True)\n"
                  f"status = open({str(self.status)!r}).read()\n"
                  "time.sleep(60) if status == 'stay' else sys.exit(int(status))")
        self.reactor = Reactor()
        self.needless = 0
        self.guardian = Guardian(self.reactor, [sys.executable, "-c", script], self._count)
        self.controlplane = subprocess.Popen(["sleep", "60"])

    def _count(self) -> None:
        self.needless += 1

    def started(self) -> list[int]:
        return [int(line) for line in self.log.read_text().splitlines()]

    def until(self, condition: Callable[[], object], seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            self.reactor.turn(0.05)

    def turn_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.reactor.turn(0.05)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(guardian, "RETRY_SECONDS", 0.05)
    made = Scene(tmp_path)
    yield made
    made.guardian.close()
    made.reactor.close()
    made.controlplane.kill()
    made.controlplane.wait()


def test_nobody_is_started_while_it_lives(scene: Scene) -> None:
    scene.guardian.watch(os.pidfd_open(scene.controlplane.pid))
    scene.turn_for(0.3)
    assert scene.started() == []


def test_a_successor_follows_and_knows_since_when(scene: Scene) -> None:
    scene.status.write_text("stay")
    scene.guardian.watch(os.pidfd_open(scene.controlplane.pid))
    before = time.monotonic_ns()
    scene.controlplane.kill()
    scene.until(scene.started)
    moment, = scene.started()
    assert before < moment < time.monotonic_ns()
    scene.guardian.connected(scene.guardian._successor_pid)
    os.kill(scene.guardian._successor_pid, 9)  # the next one follows that one
    scene.until(lambda: len(scene.started()) == 2)
    os.kill(scene.guardian._successor_pid, 9)


def test_it_gives_up_after_some_attempts(scene: Scene) -> None:
    scene.guardian.watch(os.pidfd_open(scene.controlplane.pid))
    scene.controlplane.kill()
    scene.until(lambda: len(scene.started()) == ATTEMPTS)
    scene.turn_for(0.5)
    assert len(scene.started()) == ATTEMPTS
    scene.guardian.connected(os.getpid())  # somebody adopted it by hand: that one is watched, with new attempts
    assert scene.guardian._attempts == 0


def test_somebody_in_charge_ends_it(scene: Scene) -> None:
    scene.status.write_text(str(IN_CHARGE))
    scene.guardian.watch(os.pidfd_open(scene.controlplane.pid))
    scene.controlplane.kill()
    scene.until(lambda: scene.needless)
    scene.turn_for(0.3)
    assert (len(scene.started()), scene.needless) == (1, 1)


def test_who_connects_and_is_gone_already_is_followed(scene: Scene) -> None:
    scene.status.write_text(str(IN_CHARGE))
    scene.controlplane.kill()
    scene.controlplane.wait()
    scene.guardian.connected(scene.controlplane.pid)
    scene.until(scene.started)


def test_without_a_command_line_nobody_is_started(tmp_path: Path) -> None:
    reactor = Reactor()
    alone = Guardian(reactor, json.loads("[]"), lambda: None)
    with subprocess.Popen(["true"]) as process:
        alone.watch(os.pidfd_open(process.pid))
    reactor.turn(1.0)
    assert alone._successor == -1
    alone.close()
    reactor.close()
