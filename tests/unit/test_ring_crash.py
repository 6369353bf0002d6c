"""Every crash: a worker killed before each store to shared memory, and its successors while they recover.

The guest lives on: it sleeps until it is interrupted, the worker sleeps until it is kicked, so a lost wake-up
is a lost request. The design's promise: none lost, none doubled, nothing executed runs again (design 3).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from struct import pack, unpack
from types import ModuleType
from typing import Any

import pytest

from cellvisor.core.errors import Internal
from cellvisor.core.ring.queue import Chain, Queue
from tests.fakes.build_faults import native
from tests.fakes.driver import FakeDriver

SIZE = 8
FREE, FETCHED, SENDING, EXECUTED, PUBLISHING, TOGETHER = range(6)
POSITIONS = (0, 5, 0x7FFE, 0xFFFC, 0xFFFE, 0xFFFF)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    return native()


@dataclass
class World:
    """A guest with `total` numbered requests, at most `batch` outstanding, and its mortal worker.

    `mode` is how the worker serves: "request" (complete, then publish every `every`), "send" (SENDING),
    "lazy" (one chain stays behind each time), "together" (a frame in two buffers) or "bytes" (progress).
    """

    faults: ModuleType
    position: int = 0
    batch: int = 2
    total: int = 6
    event_idx: bool = True
    every: int = 4
    mode: str = "request"
    busy_guest: bool = True
    effects: list[int] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    submitted: int = 0
    deaths: int = 0
    executed_once: set[int] = field(default_factory=set)
    numbers: dict[int, int] = field(default_factory=dict)
    held: list[Chain] = field(default_factory=list)
    frames: int = 0
    parts: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lib = self.faults.lib
        self.lib.cv_fault_arm(-1)
        self.driver = FakeDriver(SIZE, native=self.faults, event_idx=self.event_idx, start=self.position)
        self.driver.queue(epoch=1).close()
        assert self.driver.state is not None
        self.area: Any = self.driver.state.area(0)[1]
        self.area.used_next = self.position

    def close(self) -> None:
        self.lib.cv_fault_arm(-1)
        self.driver.close()

    # ---- the guest

    def submit(self) -> None:
        while self.submitted < self.total and len(self.driver.outstanding) < self.batch:
            number = self.submitted
            self.submitted += 1
            data = number.to_bytes(8, "little")
            indirect = number % 3 != 0 or self.driver.room < 7
            head = self.driver.add([data[:3], data[3:]], [4, 4], indirect=indirect)
            self.numbers[head] = number
        self.driver.offer()

    def reap(self) -> None:
        for head, length in self.driver.used():
            number = self.numbers[head]
            if self.mode == "send" and length == 0:
                assert self.deaths, "only a crash may lose a frame"
            elif self.mode == "together":
                self.parts.append(unpack("<IHH", self.driver.data(head, length)))
            else:
                assert length == 8, f"request {number} came back with {length} bytes"
                assert self.driver.data(head) == answer(number), f"request {number} has another's data"
            self.done.append(number)

    # ---- the worker

    def point(self) -> None:
        if self.lib.cv_fault_point():
            raise Killed

    def attach(self) -> Queue:
        queue = MortalQueue(self)
        before = [(h.state, h.counter, h.pos) for h in self.area.heads[0:SIZE]]
        again = queue.recover()
        self.check_recovery(before, again)
        if self.mode in ("together", "lazy"):
            queue.requeue(again)
            return queue
        for chain in again:
            self.execute(queue, chain)
        queue.publish()
        return queue

    def check_recovery(self, before: list[tuple[int, int, int]], again: list[Chain]) -> None:
        used_next = self.area.used_next
        expected = []
        for head, (state, counter, _) in enumerate(before):
            if state == FETCHED or (state == TOGETHER and self.area.heads[head].state == FETCHED):
                expected.append((counter, head))
        assert [chain.head for chain in again] == [head for _, head in sorted(expected)]
        numbers = [int.from_bytes(chain.read(8), "little") for chain in again]
        assert numbers == sorted(numbers), f"not in the order in which they were offered: {numbers}"
        assert all(self.area.heads[head].state in (FREE, FETCHED) for head in range(SIZE))
        assert self.driver.get16(self.driver.used_ring + 2) == used_next

    def execute(self, queue: Queue, chain: Chain) -> None:
        number = int.from_bytes(chain.read(8), "little")
        if self.mode == "send":
            queue.sending(chain)
            self.effects.append(number)
            self.point()
            chain.write(answer(number))
            queue.complete(chain, 8)
            return
        if self.mode == "bytes":
            for done in range(chain.resume, 4):
                self.effects.append(number * 4 + done)
                self.point()
                queue.progress(chain, done + 1)
        else:
            queue.begin(chain)
            assert number not in self.executed_once, f"request {number} ran again after it was EXECUTED"
            self.effects.append(number)
        self.point()
        chain.write(answer(number))
        self.point()
        queue.complete(chain, 8)
        self.executed_once.add(number)

    def serve(self, queue: Queue) -> None:
        chains = queue.harvest()
        if self.mode == "together":
            for i in range(0, len(chains), 2):
                pair = chains[i:i + 2]
                for part, chain in enumerate(pair):
                    chain.write(pack("<IHH", self.frames, part, len(pair)))
                    self.point()
                self.frames += 1
                queue.publish_together([(chain, 8) for chain in pair])
            return
        if self.mode == "lazy":
            self.held += chains
            chains, self.held = (self.held[1:], self.held[:1]) if self.held[1:] else (self.held, [])
        for count, chain in enumerate(reversed(chains), 1):
            self.execute(queue, chain)
            if count % self.every == 0:
                queue.publish()
        queue.publish()

    # ---- both

    def run(self, kills: list[int], *, only_recovery: bool = False) -> int:
        """Run to the end, dying at the given points one after the other; returns how many were reached."""
        remaining = list(kills)
        self.lib.cv_fault_arm(remaining.pop(0) if remaining else -1)
        queue: Queue | None = None
        self.submit()
        for _ in range(100 * self.total):
            try:
                if queue is None:
                    queue = self.attach()
                    kicked = True  # a successor kicks itself: the kick may have died with its predecessor
                    if only_recovery and self.deaths:
                        self.lib.cv_fault_arm(-1)
                else:
                    kicked = bool(self.driver.kicks()) or bool(self.held)
                if kicked:
                    self.serve(queue)
                interrupted = bool(self.driver.interrupts())
                if interrupted:
                    self.reap()
                    self.submit()
                if not kicked and not interrupted:
                    break
            except (Killed, Internal):
                if not self.lib.cv_fault_dead:
                    raise
                self.deaths += 1
                queue = None
                self.held = []
                if self.busy_guest:
                    # It sees what was published before the crash, and offers those heads again.
                    self.reap()
                    self.submit()
                self.lib.cv_fault_arm(remaining.pop(0) if remaining else -1)
        assert sorted(self.done) == list(range(self.total)), f"kills {kills}: lost or doubled, {self.done}"
        assert not self.driver.outstanding
        self.check_effects()
        return self.deaths

    def check_effects(self) -> None:
        if self.mode == "send":
            assert len(set(self.effects)) == len(self.effects), "a frame was sent twice"
            assert self.total - len(self.effects) <= self.deaths, "more than one frame lost per crash"
        elif self.mode == "bytes":
            assert set(self.effects) == set(range(4 * self.total))
            assert len(self.effects) - 4 * self.total <= self.deaths, "more than one byte doubled per crash"
        elif self.mode == "together":
            whole = [(frame, part, count) for frame, _, count in self.parts if count for part in range(count)]
            assert self.parts == list(dict.fromkeys(whole)), f"frames came in parts or twice: {self.parts}"
        else:
            assert set(self.effects) == set(range(self.total))
            assert len(self.effects) - self.total <= self.deaths


class MortalQueue(Queue):
    """A queue whose worker can also die between publishing and writing the interrupt."""

    def __init__(self, world: World) -> None:
        driver = world.driver
        assert driver.state is not None
        super().__init__(0, driver.state, driver.guest.memory, driver.config, driver.features, driver.call_fd,
                         epoch=1)
        self.world = world

    def _interrupt(self) -> None:
        self.world.point()
        super()._interrupt()


def answer(number: int) -> bytes:
    return (number * 0x0101010101010101 + 0x55).to_bytes(16, "little")[:8]


def run_once(kills: list[int], *, only_recovery: bool = False, **shape: Any) -> int:
    world = World(**shape)
    try:
        return world.run(kills, only_recovery=only_recovery)
    finally:
        world.close()


def every_kill(**shape: Any) -> Iterator[int]:
    """Kill once at each point until the work ends without reaching it."""
    for point in itertools.count():
        if run_once([point], **shape) == 0:
            return
        yield point


def test_without_kills(faults: ModuleType) -> None:
    assert run_once([], faults=faults, total=40) == 0


@pytest.mark.parametrize("event_idx", [True, False], ids=["event-idx", "flags"])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("position", POSITIONS)
def test_kill_at_every_store(faults: ModuleType, position: int, batch: int, event_idx: bool) -> None:
    shape: dict[str, Any] = {"faults": faults, "position": position, "batch": batch, "event_idx": event_idx,
             "total": 2 * batch + 1}
    points = sum(1 for _ in every_kill(**shape))
    assert points > 14 * shape["total"], "fewer points than stores: the fault build is not in use"


@pytest.mark.parametrize("busy_guest", [True, False], ids=["busy", "waiting"])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("position", [0xFFFD, 3])
def test_kill_at_every_store_of_small_publications(
        faults: ModuleType, position: int, every: int, busy_guest: bool) -> None:
    shape: dict[str, Any] = {"faults": faults, "position": position, "batch": 4, "every": every, "total": 6,
             "busy_guest": busy_guest}
    assert sum(1 for _ in every_kill(**shape)) > 80


@pytest.mark.parametrize("mode", ["request", "lazy", "send", "together", "bytes"])
@pytest.mark.parametrize(("position", "batch"), [(0xFFFE, 2), (0xFFFD, 3), (0, 4)])
def test_kill_at_every_store_and_in_recovery(
        faults: ModuleType, position: int, batch: int, mode: str) -> None:
    shape: dict[str, Any] = {"faults": faults, "position": position, "batch": batch, "mode": mode, "total": batch + 1}
    pairs = 0
    for first in itertools.count():
        for second in itertools.count():
            deaths = run_once([first, second], only_recovery=True, **shape)
            if deaths < 2:
                break
            pairs += 1
        if deaths == 0:
            break
    assert pairs > 100


@pytest.mark.parametrize("mode", ["request", "lazy", "send", "together", "bytes"])
def test_kill_and_kill_again(faults: ModuleType, mode: str) -> None:
    """Series of kills, each a few points after the last: recovery of recovery of recovery."""
    for gap in range(1, 30):
        for first in range(0, 60, 7):
            run_once([first] + [gap] * 12, faults=faults, mode=mode, position=0xFFFA, batch=4, total=10,
                     busy_guest=bool(first % 2))
