"""Requests that may have killed their worker are replayed one at a time; three deaths alone prove one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cellvisor.core.ring.queue import Chain, Queue
from cellvisor.core.ring.state import StateMap, create_state
from cellvisor.devices.poison import Quarantine, absolve
from tests.fakes.driver import FakeDriver, FakeGuest


class Machine:
    """Two queues of eight and the incarnations that serve them. Requests are (queue, first byte)."""

    def __init__(self) -> None:
        self.guest = FakeGuest()
        self.state_fd = create_state([8, 8])
        self.state = StateMap(self.state_fd)
        self.drivers = [FakeDriver(8, guest=self.guest) for _ in range(2)]
        self.refused: list[tuple[int, bytes]] = []
        self.queues: list[Queue] = []
        self.again: list[int] = []
        self.quarantine: Quarantine | None = None

    def offer(self, index: int, *names: bytes) -> None:
        for name in names:
            self.drivers[index].add([name], [1])
        self.drivers[index].offer()

    def born(self, *, suspect: bool) -> None:
        """Be the next incarnation, up to where the loop begins."""
        for queue in self.queues:
            queue.close()
        self.queues = [driver.queue(index, epoch=1, state=self.state) for index, driver in enumerate(self.drivers)]
        recovered = [(queue, queue.recover()) for queue in self.queues]
        self.again, self.quarantine = [], None
        if suspect:
            self.quarantine = Quarantine(recovered, self.again.append, self.refuse)
        else:
            absolve(recovered)

    def refuse(self, queue: Queue, chain: Chain) -> None:
        self.refused.append((queue.index, chain.read()))
        queue.complete(chain, 0)
        queue.publish()

    def harvest(self, index: int) -> list[Chain]:
        return self.queues[index].harvest()

    def begin(self, index: int) -> list[Chain]:
        """Harvest and begin all that a device is given."""
        chains = self.harvest(index)
        for chain in chains:
            self.queues[index].begin(chain)
        return chains

    def finish(self, index: int, chain: Chain) -> None:
        self.queues[index].complete(chain, 0)
        self.queues[index].publish()

    def close(self) -> None:
        for queue in self.queues:
            queue.close()
        for driver in self.drivers:
            driver.close()
        self.state.close()
        os.close(self.state_fd)
        self.guest.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    made.born(suspect=False)
    yield made
    made.close()


def names(chains: list[Chain]) -> list[bytes]:
    return [chain.read() for chain in chains]


def test_those_that_had_begun_run_alone_oldest_first_then_the_rest(machine: Machine) -> None:
    machine.offer(0, b"a", b"b", b"c")
    machine.offer(1, b"x", b"y")
    first = machine.harvest(0)
    machine.queues[0].begin(first[2])
    machine.queues[0].begin(first[1])
    other = machine.harvest(1)
    machine.queues[1].begin(other[0])
    machine.born(suspect=True)
    machine.offer(1, b"z")
    order = []
    for index in (1, 0, 0):
        assert machine.again.pop() == index
        both = [machine.begin(0), machine.begin(1)]
        (alone,) = [chain for chains in both for chain in chains]
        order.append(alone.read())
        assert machine.harvest(0) == machine.harvest(1) == []
        assert machine.quarantine is not None
        assert not machine.quarantine.is_over
        machine.finish(0 if both[0] else 1, alone)
    assert order == [b"x", b"b", b"c"]
    assert machine.quarantine is not None
    assert machine.quarantine.is_over
    assert names(machine.harvest(0)) == [b"a"]
    assert names(machine.harvest(1)) == [b"y", b"z"]
    assert machine.refused == []


def test_three_lonely_deaths_are_proof(machine: Machine) -> None:
    machine.offer(0, b"a", b"poison", b"c")
    first = machine.harvest(0)
    machine.queues[0].begin(first[0])
    machine.finish(0, first[0])
    machine.queues[0].begin(first[1])  # death 1
    for _ in range(2):  # deaths 2 and 3
        machine.born(suspect=True)
        assert machine.refused == []
        assert names(machine.begin(0)) == [b"poison"]
    machine.born(suspect=True)
    assert machine.refused == [(0, b"poison")]
    assert names(machine.begin(0)) == [b"c"]
    assert len(machine.drivers[0].used()) == 2


def test_company_is_no_proof(machine: Machine) -> None:
    """Several in execution at each death: nobody is blamed for those, only for deaths alone."""
    machine.offer(0, b"poison", b"innocent")
    machine.begin(0)
    machine.born(suspect=True)
    assert names(machine.begin(0)) == [b"poison"]
    for deaths in range(1, 4):
        machine.born(suspect=True)
        assert machine.refused == ([] if deaths < 3 else [(0, b"poison")])
        if deaths < 3:
            assert names(machine.begin(0)) == [b"poison"]
    assert names(machine.begin(0)) == [b"innocent"]


def test_kills_from_outside_count_for_nothing(machine: Machine) -> None:
    machine.offer(0, b"unlucky")
    machine.begin(0)
    for _ in range(10):
        machine.born(suspect=False)
        assert names(machine.begin(0)) == [b"unlucky"]
    machine.born(suspect=True)  # and now by itself: once
    assert machine.refused == []
    assert names(machine.begin(0)) == [b"unlucky"]


def test_a_queue_that_is_lost_does_not_stop_the_others(machine: Machine) -> None:
    machine.offer(0, b"a")
    machine.offer(1, b"x")
    machine.begin(0)
    machine.begin(1)
    machine.born(suspect=True)
    assert machine.quarantine is not None
    assert names(machine.begin(0)) == [b"a"]
    machine.quarantine.drop(0)
    assert names(machine.begin(1)) == [b"x"]
    machine.quarantine.drop(1)
    assert machine.quarantine.is_over


def test_nothing_had_begun(machine: Machine) -> None:
    machine.offer(0, b"a", b"b")
    machine.harvest(0)
    machine.born(suspect=True)
    assert machine.quarantine is not None
    assert machine.quarantine.is_over
    assert names(machine.harvest(0)) == [b"a", b"b"]
