"""What recovery adds to a queue: writes noted before they are done, counters that never come twice, the held door."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from cellvisor.core.errors import Internal, RingError
from cellvisor.core.ring.queue import Chain, Queue
from cellvisor.core.ring.state import StateMap, create_state
from tests.fakes.build_faults import native
from tests.fakes.driver import FakeDriver, FakeGuest

SIZE = 8192


class Ring:
    """One queue of four over a state memfd; `again()` is the next incarnation."""

    def __init__(self, guest: FakeGuest) -> None:
        self.guest = guest
        self.driver = FakeDriver(4, guest=guest)
        self.fd = create_state([4])
        self.state = StateMap(self.fd, guest.native)
        self.queue = self.driver.queue(epoch=3, state=self.state)

    def request(self, data: bytes) -> Chain:
        self.driver.add([data])
        self.driver.offer()
        (chain,) = self.queue.harvest()
        return chain

    def again(self) -> list[Chain]:
        self.queue.close()
        self.queue = self.driver.queue(epoch=3, state=self.state)
        return self.queue.recover()

    def close(self) -> None:
        self.queue.close()
        self.driver.close()
        self.state.close()
        os.close(self.fd)
        self.guest.close()


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring(FakeGuest())
    yield made
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe of one page whose writing end does not wait."""
    ends = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for end in ends:
        os.close(end)


def test_progress_is_what_was_written(ring: Ring, pipe: tuple[int, int]) -> None:
    text = os.urandom(SIZE)
    chain = ring.request(text)
    assert ring.queue.write(chain, pipe[1], chain.read()) == chain.resume == 4096
    with pytest.raises(BlockingIOError):
        ring.queue.write(chain, pipe[1], chain.read(-1, 4096))
    (after,) = ring.again()
    assert after.resume == 4096
    got = os.read(pipe[0], SIZE)
    assert ring.queue.write(after, pipe[1], after.read(-1, after.resume)) == 4096
    assert got + os.read(pipe[0], SIZE) == text


def test_nobody_reads(ring: Ring, pipe: tuple[int, int]) -> None:
    chain = ring.request(b"x")
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        ring.queue.write(chain, writer, b"x")
    os.close(writer)
    assert chain.resume == 0
    (after,) = ring.again()
    assert after.resume == 0


def test_only_what_is_executing_is_written(ring: Ring, pipe: tuple[int, int]) -> None:
    chain = ring.request(b"x")
    ring.queue.complete(chain)
    with pytest.raises(Internal, match="not being executed"):
        ring.queue.write(chain, pipe[1], b"x")
    ring.queue.close()
    assert ring.queue.write(chain, pipe[1], b"x") == 1  # a late one of a reset device goes nowhere
    with pytest.raises(BlockingIOError):
        os.read(pipe[0], 1)


def test_killed_before_and_after_the_write(pipe: tuple[int, int]) -> None:
    """Killed before the note: nothing noted, nothing written. Killed once the call is made: noted and written."""
    module = native()
    for points, written in ((0, b""), (1, b"hello")):
        ring = Ring(FakeGuest(native=module))
        chain = ring.request(b"hello")
        module.lib.cv_fault_arm(points)
        if points:
            ring.queue.write(chain, pipe[1], b"hello")
        else:
            with pytest.raises((Internal, OSError, RingError)):
                ring.queue.write(chain, pipe[1], b"hello")
        module.lib.cv_fault_arm(-1)
        (after,) = ring.again()
        assert after.resume == len(written)
        try:
            assert os.read(pipe[0], 16) == written
        except BlockingIOError:
            assert not written
        ring.close()


def test_no_counter_comes_twice_in_an_activation(ring: Ring) -> None:
    seen = []
    for _ in range(3):
        for _ in range(2):
            chain = ring.request(b"x")
            seen.append(chain.counter)
            ring.queue.complete(chain)
            ring.queue.publish()
            ring.driver.used()
        assert ring.again() == []
    assert len(set(seen)) == len(seen)
    assert seen == sorted(seen)


def test_a_held_queue_gives_only_what_was_given_back(ring: Ring) -> None:
    chain = ring.request(b"a")
    ring.driver.add([b"b"])
    ring.driver.offer()
    ring.queue.held = True
    assert ring.queue.harvest() == []
    ring.queue.requeue([chain])
    assert ring.queue.harvest() == [chain]
    ring.queue.held = False
    assert [one.read() for one in ring.queue.harvest()] == [b"b"]


def test_absolved_is_never_begun(ring: Ring) -> None:
    chain = ring.request(b"a")
    ring.queue.begin(chain)
    (after,) = ring.again()
    assert after.starts == 1
    ring.queue.absolve(after)
    (after,) = ring.again()
    assert after.starts == 0


def test_the_queue_is_told_of_completions(ring: Ring) -> None:
    done: list[Chain] = []
    queue: Queue = ring.queue
    queue.on_complete = done.append
    chain = ring.request(b"a")
    queue.complete(chain)
    assert done == [chain]
