"""Rings of a hostile or broken driver: each ends in RingError, after bounded work, and touches RAM only."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from struct import pack

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellvisor.core.errors import Internal, RingError
from cellvisor.core.ring.queue import Queue
from cellvisor.core.ring.state import StateMap, create_state
from tests.fakes.driver import INDIRECT, NEXT, WRITE, FakeDriver, FakeGuest

SIZE = 8
RAM = 1 << 20
# Two ranges that touch, a hole, and one more: gpa 0x60000..0x80000 is no RAM.
RANGES = [(0, 0x40000, 0x40000), (0x40000, 0x20000, 0), (0x80000, 0x40000, 0x80000)]
TABLE = 0x8000
FILL = 0x100


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    guest = FakeGuest(RAM, RANGES)
    made = FakeDriver(SIZE, guest=guest)
    yield made
    made.close()
    guest.close()


def direct(driver: FakeDriver, *entries: tuple[int, int, int, int]) -> None:
    for i, (addr, length, flags, following) in enumerate(entries):
        driver.put_desc(driver.desc + 16 * i, addr, length, flags, following)
    driver.raw_offer(0)


def indirect(driver: FakeDriver, *entries: tuple[int, int, int, int], length: int = -1,
             flags: int = 0) -> None:
    for i, entry in enumerate(entries):
        driver.put_desc(TABLE + 16 * i, *entry)
    direct(driver, (TABLE, 16 * len(entries) if length < 0 else length, INDIRECT | flags, 0))


def long_mixed_chain(driver: FakeDriver) -> None:
    for i in range(SIZE):
        driver.put_desc(TABLE + 16 * i, FILL, 1, 0 if i == SIZE - 1 else NEXT, i + 1)
    direct(driver, (FILL, 1, NEXT, 1), (TABLE, 16 * SIZE, INDIRECT, 0))


def table_into_the_hole(driver: FakeDriver) -> None:
    driver.put_desc(0x5FFF0, FILL, 1, NEXT, 1)
    direct(driver, (0x5FFF0, 32, INDIRECT, 0))


def head_twice(driver: FakeDriver) -> None:
    direct(driver, (FILL, 1, 0, 0))
    driver.raw_offer(0)


def shared_tail(driver: FakeDriver) -> None:
    for i in range(SIZE):
        driver.put_desc(driver.desc + 16 * i, FILL, 1, NEXT if i < SIZE - 1 else 0, min(i + 1, SIZE - 1))
    driver.raw_offer(0, 1, 2)


CASES: dict[str, tuple[str, Callable[[FakeDriver], None]]] = {
    "self loop": ("longer than the queue", lambda d: direct(d, (FILL, 1, NEXT, 0))),
    "loop of two": ("longer than the queue", lambda d: direct(d, (FILL, 1, NEXT, 1), (FILL, 1, NEXT, 0))),
    "next past the table": ("descriptor 8 is outside", lambda d: direct(d, (FILL, 1, NEXT, SIZE))),
    "next 0xffff": ("descriptor 65535", lambda d: direct(d, (FILL, 1, NEXT, 0xFFFF))),
    "indirect self loop": ("longer than", lambda d: indirect(d, (FILL, 1, NEXT, 0))),
    "indirect loop of two": ("longer than", lambda d: indirect(d, (FILL, 1, NEXT, 1), (FILL, 1, NEXT, 0))),
    "indirect next past its table": ("descriptor 2 is", lambda d: indirect(
        d, (FILL, 1, NEXT, 1), (FILL, 1, NEXT, 2))),
    "nested indirect": ("inside an indirect", lambda d: indirect(d, (TABLE, 16, INDIRECT, 0))),
    "indirect with next": ("followed by", lambda d: indirect(d, (FILL, 1, 0, 0), flags=NEXT)),
    "indirect size 0": ("table of 0 bytes", lambda d: indirect(d, (FILL, 1, 0, 0), length=0)),
    "indirect size 15": ("table of 15 bytes", lambda d: indirect(d, (FILL, 1, 0, 0), length=15)),
    "indirect size 17": ("table of 17 bytes", lambda d: indirect(d, (FILL, 1, 0, 0), length=17)),
    "indirect size huge": ("table of 4294967280", lambda d: indirect(d, (FILL, 1, 0, 0), length=0xFFFFFFF0)),
    "indirect chain of size+1": ("table of 144 bytes", lambda d: indirect(
        d, *[(FILL, 1, NEXT, i + 1) for i in range(SIZE)], (FILL, 1, 0, 0))),
    "direct plus indirect of size+1": ("longer than", long_mixed_chain),
    "indirect table in the hole": ("0x70000 is not RAM", lambda d: direct(d, (0x70000, 16, INDIRECT, 0))),
    "indirect table runs into the hole": ("0x60000 is not RAM", table_into_the_hole),
    "indirect table at the end of the address space": ("not RAM", lambda d: direct(
        d, (0xFFFFFFFFFFFFFFF0, 32, INDIRECT, 0))),
    "buffer in the hole": ("0x70000 is not RAM", lambda d: direct(d, (0x70000, 1, 0, 0))),
    "buffer runs into the hole": ("0x60000 is not RAM", lambda d: direct(d, (0x5FFFF, 2, 0, 0))),
    "buffer past RAM": ("0xc0000 is not RAM", lambda d: direct(d, (0xBFFFF, 2, 0, 0))),
    "buffer wraps 2^64": ("not RAM", lambda d: direct(d, (0xFFFFFFFFFFFFFFFF, 2, 0, 0))),
    "buffer of 4 GiB - 1": ("not RAM", lambda d: direct(d, (FILL, 0xFFFFFFFF, WRITE, 0))),
    "buffer of length 0": ("length 0", lambda d: direct(d, (FILL, 0, 0, 0))),
    "writable length 0": ("length 0", lambda d: direct(d, (FILL, 1, NEXT, 1), (FILL, 0, WRITE, 0))),
    "readable after writable": ("follows a writable", lambda d: direct(
        d, (FILL, 1, WRITE | NEXT, 1), (FILL, 1, 0, 0))),
    "head of queue size": ("head 8 is outside", lambda d: d.raw_offer(SIZE)),
    "head 0xffff": ("head 65535", lambda d: d.raw_offer(0xFFFF)),
    "head twice": ("head 0 was offered", head_twice),
    "avail jumps by size+1": ("9 ahead", lambda d: d.put16(d.avail + 2, SIZE + 1)),
    "avail jumps by 0x8000": ("32768 ahead", lambda d: d.put16(d.avail + 2, 0x8000)),
    "avail jumps back": ("65535 ahead", lambda d: d.put16(d.avail + 2, 0xFFFF)),
    "chains share descriptors": ("shares descriptors", shared_tail),
}


@pytest.mark.parametrize("name", CASES)
def test_hostile_ring(driver: FakeDriver, name: str) -> None:
    text, spoil = CASES[name]
    queue = driver.queue()
    spoil(driver)
    with pytest.raises(RingError, match=text):
        queue.harvest()
    with pytest.raises(RingError, match=text):
        queue.harvest()
    assert driver.used() == []


def test_indirect_needs_its_feature() -> None:
    driver = FakeDriver(SIZE, indirect=False)
    queue = driver.queue()
    indirect(driver, (FILL, 1, 0, 0))
    with pytest.raises(RingError, match="not accepted"):
        queue.harvest()
    driver.close()


def test_chain_of_more_than_4_gib() -> None:
    guest = FakeGuest(1 << 33)
    driver = FakeDriver(SIZE, guest=guest)
    queue = driver.queue()
    direct(driver, (FILL, 0xC0000000, NEXT, 1), (FILL, 0x40000000, 0, 0))
    with pytest.raises(RingError, match="chain of 0x100000000 bytes"):
        queue.harvest()
    driver.close()
    guest.close()


def test_longest_chains_pass(driver: FakeDriver) -> None:
    queue = driver.queue()
    direct(driver, *[(FILL, 1, NEXT if i < SIZE - 1 else 0, i + 1) for i in range(SIZE)])
    assert queue.harvest()[0].readable_size == SIZE
    other = FakeDriver(SIZE)
    indirect(other, *[(FILL, 1, NEXT if i < SIZE - 1 else 0, i + 1) for i in range(SIZE)])
    assert other.queue().harvest()[0].readable_size == SIZE
    other.close()


def test_work_is_bounded_by_the_queue_size() -> None:
    """1024 heads that all lead into one tail of 1024: refused after at most two passes over the ring."""
    driver = FakeDriver(1024)
    queue = driver.queue()
    for i in range(1024):
        driver.put_desc(driver.desc + 16 * i, FILL, 1, NEXT if i < 1023 else 0, min(i + 1, 1023))
    driver.raw_offer(*range(1024))
    with pytest.raises(RingError, match="shares"):
        queue.harvest()
    driver.close()


def test_each_chain_is_cut_at_most_at_every_range(driver: FakeDriver) -> None:
    queue = driver.queue()
    direct(driver, *[(0x3FFFF, 2, NEXT if i < SIZE - 1 else 0, i + 1) for i in range(SIZE)])
    assert len(queue.harvest()[0].readable) == 2 * SIZE
    many = [(i * 0x1000, 0x1000, (63 - i) * 0x1000) for i in range(64)]
    guest = FakeGuest(1 << 20, many)
    other = FakeDriver(4, guest=guest)
    with pytest.raises(RingError, match="too many pieces"):
        queue = other.queue()
        direct(other, *[(0, 0x40000, NEXT if i < 3 else 0, i + 1) for i in range(4)])
        queue.harvest()
    other.close()
    guest.close()


def check_views(driver: FakeDriver, queue: Queue) -> None:
    for chain in queue.harvest():
        assert chain.readable_size == sum(map(len, chain.readable))
        assert chain.writable_size == sum(map(len, chain.writable))
        assert len(chain.readable) + len(chain.writable) <= 4 * SIZE
        chain.read()
        chain.write(bytes(min(chain.writable_size, 64)))
        queue.complete(chain, chain.writable_size)
    queue.publish()


ADDRESSES = st.sampled_from([0, FILL, TABLE, 0x3FFF8, 0x5FFF0, 0x5FFFF, 0x60000, 0xBFFFF, 2**64 - 1, 2**63])
DESCRIPTORS = st.tuples(ADDRESSES, st.sampled_from([0, 1, 8, 16, 32, 128, 0x20000, 0xFFFFFFFF]),
                        st.integers(0, 7), st.integers(0, SIZE))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.lists(DESCRIPTORS, min_size=SIZE, max_size=SIZE),
       second=st.lists(DESCRIPTORS, min_size=4, max_size=4), heads=st.lists(st.integers(0, SIZE), max_size=SIZE),
       jump=st.integers(0, 65535) | st.none())
def test_any_ring_is_served_or_refused(driver: FakeDriver, table: list[tuple[int, int, int, int]],
                                       second: list[tuple[int, int, int, int]], heads: list[int],
                                       jump: int | None) -> None:
    driver.avail_idx = 0
    queue = driver.queue()
    for i, entry in enumerate(table):
        driver.put_desc(driver.desc + 16 * i, *entry)
    for i, entry in enumerate(second):
        driver.put_desc(TABLE + 16 * i, *entry)
    driver.raw_offer(*heads)
    if jump is not None:
        driver.put16(driver.avail + 2, jump)
    with contextlib.suppress(RingError):
        check_views(driver, queue)


@pytest.mark.parametrize("seed", range(20))
def test_noise_in_the_whole_guest(seed: int) -> None:
    chance = random.Random(seed)
    driver = FakeDriver(SIZE)
    queue = driver.queue()
    for _ in range(50):
        noise = chance.randbytes(6 + 8 * SIZE)
        driver.write(driver.desc, chance.randbytes(16 * SIZE))
        driver.write(driver.avail, noise[:6 + 2 * SIZE])
        driver.write(driver.used_ring, noise)
        driver.put16(driver.avail + 2, (chance.randrange(4)))
        try:
            check_views(driver, queue)
        except RingError:
            queue = driver.queue()
    driver.close()


# ---- what a predecessor may have left in the state memfd

@pytest.mark.parametrize(("state", "pos", "counter", "text"), [
    (6, 0, 0, "in state 6"), (255, 0, 0, "in state 255"),
    (4, 100, 1, "position 100"), (5, 0x8000, 1, "position 32768"),
    (1, 0, 2**63, "counter 0x8000000000000000"), (3, 0, 2**64 - 1, "counter"),
])
def test_bad_state_is_refused_before_anything_is_stored(state: int, pos: int, counter: int, text: str) -> None:
    driver = FakeDriver(SIZE)
    driver.queue(epoch=3).close()
    assert driver.state is not None
    _, area = driver.state.area(0)
    area.heads[0] = {"state": 3, "counter": 7}
    area.heads[5] = {"state": state, "pos": pos, "counter": counter}
    queue = driver.queue(epoch=3)
    with pytest.raises(RingError, match=text):
        queue.recover()
    assert driver.used() == []
    assert area.heads[0].state == 3
    driver.close()


def test_two_heads_at_one_used_position_are_refused() -> None:
    driver = FakeDriver(SIZE)
    driver.queue(epoch=3).close()
    assert driver.state is not None
    _, area = driver.state.area(0)
    area.used_next = 4
    area.heads[1] = {"state": 4, "pos": 3}
    area.heads[2] = {"state": 4, "pos": 3}
    with pytest.raises(RingError, match="position 3"):
        driver.queue(epoch=3).recover()
    driver.close()


def test_state_of_other_rings_is_refused() -> None:
    driver = FakeDriver(SIZE)
    driver.queue(epoch=3).close()
    assert driver.state is not None
    entry, _ = driver.state.area(0)
    entry.avail += 2
    with pytest.raises(RingError, match="other rings"):
        driver.queue(epoch=3)
    driver.close()


@pytest.mark.parametrize("seed", range(30))
def test_noise_in_the_state_is_recovered_or_refused(seed: int) -> None:
    chance = random.Random(seed)
    driver = FakeDriver(SIZE)
    for _ in range(8):
        driver.add([b"x"], indirect=True)
    driver.offer()
    driver.queue(epoch=3).close()
    assert driver.state is not None
    _, area = driver.state.area(0)
    for head in range(SIZE):
        area.heads[head] = {"state": chance.choice((0, 0, 1, 2, 3, 4, 5)), "starts": chance.randrange(256),
                            "pos": chance.randrange(-8, 8) & 0xFFFF, "used_len": chance.randrange(1 << 32),
                            "counter": chance.randrange(1 << 62)}
    queue = driver.queue(epoch=3)
    try:
        for chain in queue.recover():
            queue.complete(chain)
        check_views(driver, queue)
    except RingError:
        pass
    driver.close()


@pytest.mark.parametrize(("offset", "value"), [
    (0, 0), (4, 99), (24, 4096), (28, 1), (28, 65), (28, 0xFFFFFFFF), (32, 64), (36, 0xFFFFFFFF),
    (128 + 30, 3), (128 + 30, 0xFFFF), (128 + 32, 0), (128 + 32, 0xFFFFFFF0),
])
def test_bad_state_header_is_refused(offset: int, value: int) -> None:
    fd = create_state([8, 16], 100)
    width = "<H" if offset == 128 + 30 else "<I"
    os.pwrite(fd, pack(width, value), offset)
    with pytest.raises(Internal, match="state memfd"):
        StateMap(fd)
    os.close(fd)


def test_private_area_of_a_liar() -> None:
    fd = create_state([8], 100)
    with StateMap(fd) as state:
        state._store("private_current", 1 << 32 | 0x7FFFFFFF << 1)
        with pytest.raises(Internal, match="private state"):
            state.load_private()
    os.close(fd)
