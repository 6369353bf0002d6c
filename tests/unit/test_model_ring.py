"""A driver and a mortal device take any steps in any order, with a crash before any store, against a model.

Each request is answered exactly once with its own answer, one that was EXECUTED never runs again, used.idx only rises,
last_avail = used_next + heads not FREE, and after a reset nothing of before is written (design 3).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cellvisor.core.errors import Internal
from cellvisor.core.ring.queue import Chain, Queue
from cellvisor.core.ring.state import StateMap, create_state
from tests.fakes.build_faults import native
from tests.fakes.driver import FakeDriver, FakeGuest

SIZE = 16
FREE = 0
POINTS = st.none() | st.integers(0, 30)  # stores before a crash
SELDOM = st.integers(0, 9).map(lambda number: number == 9)
STARTS = st.sampled_from([0, 1, 7, 0x7FFD, 0xFFF9, 0xFFFE, 0xFFFF])
FAULTS = functools.lru_cache(native)


def answer(number: int) -> bytes:
    return (number * 0x9E3779B97F4A7C15 & (1 << 64) - 1).to_bytes(8, "little")


class RingMachine(RuleBasedStateMachine):
    """`number` of a request by its head while the driver waits for it; `run`: requests that were EXECUTED."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: ModuleType = FAULTS()
        self.lib = self.faults.lib
        self.lib.cv_fault_arm(-1)
        self.guest = FakeGuest(1 << 20, native=self.faults)
        self.state_fd = create_state([SIZE], 64)
        self.state = StateMap(self.state_fd, self.faults)
        self.area: Any = self.state.area(0)[1]
        self.epoch = self.requests = self.used = self.seen = 0
        self.driver: FakeDriver | None = None
        self.queue: Queue | None = None
        self.held: list[Chain] = []
        self.number: dict[int, int] = {}
        self.offered: set[int] = set()
        self.run: set[int] = set()
        self.answered: set[int] = set()
        self.dropped: list[tuple[FakeDriver, int]] = []  # drivers of before a reset and their used.idx then

    # ---- the driver

    @initialize(start=STARTS, event_idx=st.booleans())
    def activate(self, start: int, event_idx: bool) -> None:
        """DRIVER_OK with fresh rings, as if `start` requests had gone through them."""
        self.epoch += 1
        self.driver = FakeDriver(SIZE, guest=self.guest, event_idx=event_idx, start=start, native=self.faults)
        self.driver.queue(epoch=self.epoch, state=self.state).close()
        self.area.used_next = start
        self.used = self.seen = start

    @rule(shapes=st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
          held_back=st.sampled_from([0, 0, 0, 1, 2]))
    def submit(self, shapes: list[tuple[int, bool]], held_back: int) -> None:
        """Add requests and offer all that wait but the last few."""
        assert self.driver is not None
        for parts, indirect in shapes:
            if self.driver.room >= 4:
                self.add(parts, indirect)
        self.offer(max(0, len(self.driver._waiting) - held_back))

    def add(self, parts: int, indirect: bool) -> None:
        assert self.driver is not None
        data = self.requests.to_bytes(8, "little")
        cut = [data[i * 8 // parts:(i + 1) * 8 // parts] for i in range(parts)]
        if parts == 4:
            head = self.driver.add([data], [3, 4, 1], indirect=indirect)
        else:
            head = self.driver.add(cut, [8], indirect=indirect)
        self.number[head] = self.requests
        self.requests += 1

    def offer(self, count: int) -> None:
        assert self.driver is not None
        self.offered |= set(self.driver._waiting[:count])
        self.driver.offer(count)

    @rule()
    def reap(self) -> None:
        assert self.driver is not None
        for head, length in self.driver.used():  # which asserts that it was outstanding
            number = self.number.pop(head)
            assert head in self.offered, f"request {number} was never offered"
            assert number not in self.answered
            assert (length, self.driver.data(head)) == (8, answer(number)), f"request {number}: another's answer"
            self.offered.discard(head)
            self.answered.add(number)
            self.used = self.used + 1 & 0xFFFF

    @rule(start=STARTS, event_idx=st.booleans(), really=SELDOM)
    def reset(self, start: int, event_idx: bool, really: bool) -> None:
        assert self.driver is not None
        if not really:
            return
        self.reap()
        if self.queue is not None:
            self.queue.release()
        self.gone()
        self.dropped.append((self.driver, self.driver.get16(self.driver.used_ring + 2)))
        self.number.clear()
        self.offered.clear()
        self.activate(start, event_idx)

    # ---- the device

    def gone(self) -> None:
        self.lib.cv_fault_arm(-1)
        self.queue = None
        self.held = []

    def mortal(self, action: Callable[[], Any], points: int | None) -> Any:
        """Run device code; None if it was killed meanwhile, before its store number `points`."""
        self.lib.cv_fault_arm(-1 if points is None else points)
        try:
            return action()
        except Internal:
            assert self.lib.cv_fault_dead, "an error without a crash"
            self.gone()
            return None
        finally:
            self.lib.cv_fault_arm(-1)

    @precondition(lambda self: self.queue is not None)
    @rule(really=SELDOM)
    def crash(self, really: bool) -> None:
        if really:
            self.gone()

    @precondition(lambda self: self.queue is None)
    @rule(points=POINTS)
    def recover(self, points: int | None) -> None:
        assert self.driver is not None
        before = {head: self.area.heads[head].counter for head in range(SIZE) if self.area.heads[head].state != FREE}

        def attach() -> list[Chain]:
            assert self.driver is not None
            self.queue = self.driver.queue(epoch=self.epoch, state=self.state)
            return self.queue.recover()

        again = self.mortal(attach, points)
        if again is None:
            return
        numbers = [int.from_bytes(chain.read(8), "little") for chain in again]
        assert not set(numbers) & (self.run | self.answered), "an EXECUTED request runs again"
        counters = [before[chain.head] for chain in again]
        assert counters == sorted(counters), "not in the order in which they were fetched"
        self.held = again

    @precondition(lambda self: self.queue is not None)
    @rule(limit=st.integers(0, 3), points=POINTS)
    def harvest(self, limit: int, points: int | None) -> None:
        queue = self.queue
        assert queue is not None
        self.held += self.mortal(lambda: queue.harvest(limit), points) or []

    @precondition(lambda self: self.queue is not None and self.held)
    @rule(which=st.integers(0, SIZE - 1), points=POINTS)
    def complete(self, which: int, points: int | None) -> None:
        chain = self.held.pop(which % len(self.held))
        number = int.from_bytes(chain.read(8), "little")
        assert self.number[chain.head] == number

        def do() -> bool:
            assert self.queue is not None
            self.queue.begin(chain)
            chain.write(answer(number))
            self.queue.complete(chain, 8)
            return True

        if self.mortal(do, points):
            self.run.add(number)

    @precondition(lambda self: self.queue is not None and self.held)
    @rule(count=st.integers(1, SIZE))
    def complete_some(self, count: int) -> None:
        for _ in range(min(count, len(self.held))):
            self.complete(-1, None)

    @precondition(lambda self: self.queue is not None)
    @rule(count=st.integers(1, SIZE), backwards=st.booleans(), points=st.none() | st.integers(0, 90))
    def serve(self, count: int, backwards: bool, points: int | None) -> None:
        """What a device does at a kick, with a crash anywhere in it."""
        queue = self.queue
        assert queue is not None

        def do() -> bool:
            self.held += queue.harvest()
            chosen = self.held[::-1 if backwards else 1][:count]
            for chain in chosen:
                self.held.remove(chain)
                number = int.from_bytes(chain.read(8), "little")
                queue.begin(chain)
                chain.write(answer(number))
                queue.complete(chain, 8)
                self.run.add(number)
            queue.publish()
            return True

        self.mortal(do, points)

    @precondition(lambda self: self.queue is not None)
    @rule(points=POINTS)
    def publish(self, points: int | None) -> None:
        assert self.queue is not None
        self.mortal(self.queue.publish, points)

    # ---- what always holds

    @invariant()
    def counts_agree(self) -> None:
        if self.driver is None:
            return
        seen = self.driver.get16(self.driver.used_ring + 2)
        assert (seen - self.seen) & 0xFFFF <= SIZE, f"used.idx went from {self.seen} to {seen}"
        self.seen = seen
        assert (seen - self.used) & 0xFFFF <= SIZE, "more was published than was outstanding"
        if self.queue is not None:
            busy = sum(self.area.heads[head].state != FREE for head in range(SIZE))
            assert self.queue._c.last_avail == (self.area.used_next + busy) & 0xFFFF
            assert self.queue._c.used_next == self.area.used_next
        for driver, used in self.dropped:
            assert driver.get16(driver.used_ring + 2) == used, "written to after a reset"

    def teardown(self) -> None:
        """Whatever happened: everything that was offered is answered by a device that is left alone."""
        if self.driver is not None:
            if self.queue is None:
                self.recover(None)
            for _ in range(4):
                self.reap()
                self.offer(SIZE)
                self.harvest(0, None)
                self.complete_some(SIZE)
                self.publish(None)
            self.reap()
            assert not self.number, f"never answered: {sorted(self.number.values())}"
            for driver, _ in self.dropped:
                driver.close()
            self.driver.close()
        self.state.close()
        os.close(self.state_fd)
        self.guest.close()


RingMachine.TestCase.settings = settings(max_examples=400, stateful_step_count=60, deadline=None,
                                         suppress_health_check=list(HealthCheck))
TestRing = RingMachine.TestCase
