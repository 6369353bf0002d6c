"""The queue over a fake driver: chains, order, notification, wrap, reset, states of design 3."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cellvisor.core.errors import Internal, RingError
from cellvisor.core.ring.queue import Queue, QueueConfig
from tests.fakes.driver import FakeDriver, FakeGuest


@pytest.fixture(params=[True, False], ids=["event-idx", "flags"])
def driver(request: pytest.FixtureRequest) -> Iterator[FakeDriver]:
    made = FakeDriver(8, event_idx=request.param)
    yield made
    made.close()


def serve(queue: Queue, payload: bytes = b"") -> int:
    chains = queue.harvest()
    for chain in chains:
        queue.complete(chain, chain.write(payload))
    queue.publish()
    return len(chains)


def test_chain_has_its_parts_in_order(driver: FakeDriver) -> None:
    queue = driver.queue()
    head = driver.add([b"ab", b"cde"], [4, 2])
    driver.offer()
    [chain] = queue.harvest()
    assert (chain.head, chain.readable_size, chain.writable_size) == (head, 5, 6)
    assert [bytes(view) for view in chain.readable] == [b"ab", b"cde"]
    assert chain.read() == b"abcde"
    assert chain.read(2, 1) == b"bc"
    assert chain.read(9, 4) == b"e"
    assert chain.write(b"012345678") == 6
    assert chain.write(b"XY", 3) == 2
    queue.complete(chain, 6)
    queue.publish()
    assert driver.used() == [(head, 6)]
    assert driver.data(head) == b"012XY5"


def test_indirect_and_direct_chains(driver: FakeDriver) -> None:
    queue = driver.queue()
    one = driver.add([b"a", b"b"], [3], indirect=True)
    two = driver.add([b"q"], [1])
    driver.offer()
    chains = queue.harvest()
    assert [chain.head for chain in chains] == [one, two]
    assert chains[0].read() == b"ab"
    assert chains[0].writable_size == 3


def test_direct_descriptors_before_an_indirect_one(driver: FakeDriver) -> None:
    # Allowed, and the write flag of the reference means nothing (virtio 1.2, 2.7.5.3.2).
    queue = driver.queue()
    driver.write(0x9000, b"headtail")
    driver.put_desc(driver.desc, 0x9000, 4, 1, 1)
    driver.put_desc(driver.desc + 16, 0xA000, 16, 4 | 2, 0)
    driver.put_desc(0xA000, 0x9004, 4, 0, 0)
    driver.raw_offer(0)
    assert queue.harvest()[0].read() == b"headtail"


def test_completions_in_any_order(driver: FakeDriver) -> None:
    queue = driver.queue()
    heads = [driver.add([bytes([i])], [1]) for i in range(4)]
    driver.offer()
    chains = queue.harvest()
    for i in (2, 0):
        queue.complete(chains[i], 1)
    queue.publish()
    for i in (3, 1):
        queue.complete(chains[i], 1)
    queue.publish()
    assert [head for head, _ in driver.used()] == [heads[i] for i in (2, 0, 3, 1)]


def test_limit_and_more(driver: FakeDriver) -> None:
    queue = driver.queue()
    for _ in range(5):
        driver.add([b"x"])
    driver.offer()
    assert len(queue.harvest(2)) == 2
    assert queue.more
    assert len(queue.harvest(3)) == 3
    assert not queue.more


def test_kick_is_asked_for_after_an_empty_harvest() -> None:
    driver = FakeDriver(8, event_idx=True, start=0xFFFD)
    queue = resumed_at(driver, 0xFFFD)
    for _ in range(10):
        assert queue.harvest() == []
        driver.add([b"x"])
        assert driver.offer()
        driver.add([b"x"])
        assert not driver.offer()
        assert serve(queue) == 2
        driver.used()
    driver.close()


def resumed_at(driver: FakeDriver, position: int) -> Queue:
    """Make a queue whose used_next is `position`."""
    driver.queue(epoch=1).close()
    assert driver.state is not None
    driver.state.area(0)[1].used_next = position
    queue = driver.queue(epoch=1)
    assert queue.recover() == []
    driver.interrupts()
    return queue


def test_interrupts_only_when_wanted(driver: FakeDriver) -> None:
    queue = driver.queue()
    for wanted in (True, False, True):
        driver.want_interrupts(wanted)
        driver.add([b"x"])
        driver.add([b"y"])
        driver.offer()
        serve(queue)
        assert driver.interrupts() == int(wanted)
        driver.used()
    queue.publish()
    assert driver.interrupts() == 0


@pytest.mark.parametrize("position", [0, 1, 6, 7, 0x7FFF, 0x8000, 0xFFF8, 0xFFFE, 0xFFFF])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_event_idx_at_every_wrap_position(position: int, batch: int) -> None:
    driver = FakeDriver(8, event_idx=True, start=position)
    queue = resumed_at(driver, position)
    for _ in range(20 // batch):
        for _ in range(batch):
            driver.add([b"x"])
        driver.offer()
        assert serve(queue) == batch
        assert driver.interrupts() == 1
        assert len(driver.used()) == batch
    driver.close()


def test_three_times_around_the_index() -> None:
    driver = FakeDriver(64)
    queue = driver.queue()
    total = 0
    driver.want_interrupts(False)
    while total < 3 * 65536:
        heads = [driver.add_at([(0x100, 8, False)]) for _ in range(64)]
        driver.offer()
        for chain in queue.harvest():
            queue.complete(chain)
        queue.publish()
        assert [head for head, _ in driver.used()] == heads
        total += 64
    driver.close()


def test_buffer_across_adjacent_ranges_is_cut_in_two() -> None:
    guest = FakeGuest(1 << 20, [(0, 0x80000, 0x80000), (0x80000, 0x80000, 0)])
    driver = FakeDriver(8, guest=guest)
    queue = driver.queue()
    guest.write(0x7FFFC, b"abcdefgh")
    driver.add_at([(0x7FFFC, 8, False), (0x7FFFE, 4, True)])
    driver.offer()
    [chain] = queue.harvest()
    assert [bytes(view) for view in chain.readable] == [b"abcd", b"efgh"]
    assert [len(view) for view in chain.writable] == [2, 2]
    assert (chain.readable_size, chain.writable_size) == (8, 4)
    chain.write(b"WXYZ")
    assert guest.read(0x7FFFC, 8) == b"abWXYZgh"
    driver.close()
    guest.close()


def test_indirect_table_across_ranges() -> None:
    guest = FakeGuest(1 << 20, [(0, 0x80000, 0x80000), (0x80000, 0x80000, 0)])
    driver = FakeDriver(8, guest=guest)
    queue = driver.queue()
    for i in range(4):
        guest.write(0x100 + i, bytes([65 + i]))
        driver.put_desc(0x7FFE8 + 16 * i, 0x100 + i, 1, 0 if i == 3 else 1, i + 1)
    driver.put_desc(driver.desc, 0x7FFE8, 64, 4, 0)
    driver.raw_offer(0)
    assert queue.harvest()[0].read() == b"ABCD"
    driver.close()
    guest.close()


def test_range_table_that_shrinks_takes_the_ring_away() -> None:
    driver = FakeDriver(8)
    queue = driver.queue()
    driver.add([b"x"])
    driver.offer()
    driver.guest.table.publish([(0x100000, 0x1000, 0x100000)])
    with pytest.raises(RingError, match="descriptor table"):
        queue.harvest()
    driver.close()


def test_completed_twice_is_our_mistake(driver: FakeDriver) -> None:
    queue = driver.queue()
    driver.add([b"x"], [4])
    driver.offer()
    [chain] = queue.harvest()
    with pytest.raises(Internal, match="takes 4"):
        queue.complete(chain, 5)
    queue.complete(chain)
    with pytest.raises(Internal, match="not outstanding"):
        queue.complete(chain)
    queue.publish()
    with pytest.raises(Internal, match="not outstanding"):
        queue.complete(chain)


def test_after_a_reset_old_chains_go_nowhere(driver: FakeDriver) -> None:
    old = driver.queue(epoch=1)
    driver.add([b"x"], [4])
    driver.offer()
    [chain] = old.harvest()
    old.release()
    old.complete(chain)
    old.publish()
    assert driver.used() == []
    driver.put16(driver.avail + 2, 0)
    driver.avail_idx = 0
    new = driver.queue(epoch=2)
    assert not new.resumed
    driver.raw_offer(chain.head)
    [again] = new.harvest()
    assert again.head == chain.head
    with pytest.raises(Internal, match="earlier activation"):
        new.complete(chain)
    new.complete(again, 0)


def test_successor_takes_over(driver: FakeDriver) -> None:
    first = driver.queue(epoch=7)
    for i in range(4):
        driver.add([bytes([i])], [4])
    driver.offer()
    chains = first.harvest()
    first.complete(chains[1], 3)
    first.progress(chains[2], 2)
    first.begin(chains[3])
    first.sending(chains[0])
    with pytest.raises(Internal, match="being sent"):
        first.sending(chains[2])
    first.close()
    second = driver.queue(epoch=7)
    assert second.resumed
    with pytest.raises(Internal, match="before recover"):
        second.harvest()
    again = second.recover()
    assert [(chain.head, chain.resume, chain.starts) for chain in again] == [
        (chains[2].head, 2, 0), (chains[3].head, 0, 1)]
    assert driver.used() == [(chains[0].head, 0), (chains[1].head, 3)]
    assert driver.interrupts() == 1
    driver.add([b"new"])
    driver.offer()
    second.requeue(again)
    assert [chain.head for chain in second.harvest(2)] == [chain.head for chain in again]
    [new] = second.harvest()
    for chain in (*again, new):
        second.complete(chain)
    second.publish()
    assert len(driver.used()) == 3
    third = driver.queue(epoch=8)
    assert not third.resumed
    assert third.recover() == []


def test_together_is_one_commit(driver: FakeDriver) -> None:
    queue = driver.queue()
    for _ in range(3):
        driver.add([], [4])
    driver.offer()
    chains = queue.harvest()
    with pytest.raises(Internal):
        queue.publish_together([(chains[0], 1), (chains[0], 1)])
    queue.publish_together([(chains[2], 4), (chains[0], 3)])
    assert driver.used() == [(chains[2].head, 4), (chains[0].head, 3)]
    assert driver.interrupts() == 1


@pytest.mark.parametrize(("change", "text"), [
    ({"size": 3}, "size 3"), ({"size": 0}, "size 0"), ({"size": 16}, "size 16"), ({"size": 65535}, "size"),
    ({"desc": 0x1008}, "misaligned"), ({"avail": 0x2001}, "misaligned"), ({"used": 0x3002}, "misaligned"),
    ({"desc": 0x400000}, "descriptor table"), ({"desc": 0x3FFFF0}, "descriptor table"),
    ({"avail": 0x3FFFF0}, "available ring"), ({"used": 0x3FFFC0}, "used ring"),
    ({"used": 0xFFFFFFFFFFFFFFF0}, "used ring"), ({"desc": 0xFFFFFFFFFFFFFFF0}, "descriptor table"),
])
def test_rings_must_be_in_ram_and_aligned(change: dict[str, int], text: str) -> None:
    driver = FakeDriver(8)
    values = {"size": 8, "desc": 0x1000, "avail": 0x2000, "used": 0x3000} | change
    driver.queue().close()
    assert driver.state is not None
    with pytest.raises(RingError, match=text):
        Queue(0, driver.state, driver.guest.memory, QueueConfig(**values))
    driver.close()


def test_no_descriptor_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        driver = FakeDriver(8)
        serve(driver.queue())
        driver.close()
    assert len(os.listdir("/proc/self/fd")) == before
