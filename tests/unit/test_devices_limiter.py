"""Token buckets against a clock of the test's own, and a disk that is held up by them."""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellvisor.core.abi import virtio
from cellvisor.core.errors import UsageError
from cellvisor.core.wire import budget
from cellvisor.devices.backends.limiter import Limiter
from cellvisor.devices.virtio.blk import Blk
from tests.fakes.host import Rig


class Clock:
    now = 100.0  # seconds

    def __call__(self) -> int:
        return round(self.now * 1e9)


def limiter(**limits: int) -> tuple[Limiter, Clock]:
    clock = Clock()
    made = Limiter(clock=clock)
    made.set(limits)
    return made, clock


def taken(one: Limiter, size: int = 1) -> int:
    """Take until it says to wait."""
    count = 0
    while not one.take(size):
        count += 1
        assert count < 10_000
    return count


def test_a_bucket_its_refill_and_its_burst() -> None:
    one, clock = limiter(ops_size=10, ops_refill_time=1000, ops_one_time_burst=5)
    assert taken(one) == 15
    assert one.take(1) == pytest.approx(0.1)
    for seconds, count in ((0.1, 1), (0.5, 5), (1.0, 10), (3600.0, 10)):
        clock.now += seconds + 1e-9
        assert taken(one) == count


def test_what_is_larger_than_the_bucket_is_paid_off() -> None:
    one, clock = limiter(bw_size=1000, bw_refill_time=1000)
    assert one.take(5000) == 0
    assert one.take(1) == pytest.approx(4.001)
    assert one.take(0) == 0, "a flush has no bytes"
    clock.now += 4.5
    assert one.take(5000) == 0
    assert one.take(1) == pytest.approx(4.501)
    clock.now += 3600
    assert one.take(1 << 62) == 0
    assert one.take(1) == 60.0, "it looks again, others may have changed the limits"


def test_the_tighter_limit_holds_and_none_is_none() -> None:
    one, _ = limiter(bw_size=100, bw_refill_time=1000, ops_size=1000, ops_refill_time=1000)
    assert taken(one, 50) == 2
    one.set({})
    assert one.idle
    assert [one.take(1 << 40) for _ in range(5)] == [0] * 5
    one.set({"ops_size": 3, "ops_refill_time": 50}, empty=True)
    assert one.take(1) == pytest.approx(0.05 / 3, rel=0.01)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000), st.integers(1, 2000), st.lists(st.integers(0, 20_000), min_size=5, max_size=60))
def test_the_rate_is_never_exceeded(size: int, refill: int, costs: list[int]) -> None:
    one, clock = limiter(bw_size=size, bw_refill_time=refill)
    began, before = clock.now, 0
    for cost in costs:
        while wait := one.take(cost):
            assert 0.001 <= wait <= 60
            clock.now += wait + 1e-6
        allowed = size + (clock.now - began) * size * 1000 / refill
        assert not cost or before <= allowed + 1, "a request began although those before it were not paid for"
        before += cost


@pytest.mark.parametrize(("limits", "message"), [
    ({"bw_size": 5}, "bw_size=5 needs bw_refill_time"),
    ({"ops_refill_time": 5}, "ops_refill_time=5 needs ops_size"),
    ({"ops_one_time_burst": 5}, "ops_one_time_burst=5 needs ops_size"),
])
def test_halves_of_a_limit_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        limiter(**limits)


def test_a_group_shares_one_budget(tmp_path: Path) -> None:
    """Processes that are killed at any moment while they take; what they took together is what one may take."""
    page = budget.create({"ops_size": 1000, "ops_refill_time": 3_600_000, "ops_one_time_burst": 500})
    children = []
    for _ in range(3):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            one = Limiter(page)
            while not one.take(4096):
                os.write(writing, b".")
            os._exit(0)
        os.close(writing)
        children.append((pid, reading))
    os.read(children[0][1], 1)
    os.kill(children[0][0], signal.SIGKILL)
    count = 1
    for pid, reading in children:
        with open(reading, "rb") as pipe:
            count += len(pipe.read())
        os.waitpid(pid, 0)
    assert 1490 <= count <= 1503, "each may get the last token, the killed one may have taken one for nothing"
    mine = Limiter(page)
    assert not mine.idle
    assert mine.take(1) > 1
    mine.set({})
    assert mine.take(1) == 0
    with mmap.mmap(page, budget.SIZE) as seen:
        assert set(budget.get(seen).values()) == {0}
    mine.close()
    os.close(page)


def test_a_page_that_somebody_wrecked_can_be_set_anew() -> None:
    page = budget.create({"ops_size": 1, "ops_refill_time": 1})
    one = Limiter(page)
    for junk in (b"\xff", b"\x7f", b"\x01"):
        os.pwrite(page, junk * budget.SIZE, 0)
        assert [0 <= one.take(size) <= 60 for size in (0, 1, 1 << 62, 1 << 40)] == [True] * 4
    with pytest.raises(OSError, match="Operation not permitted"):
        os.ftruncate(page, 0)
    one.set({"ops_size": 1, "ops_refill_time": 3_600_000})
    assert [bool(one.take(1)) for _ in range(3)] == [False, True, True]
    one.close()
    os.close(page)
    short = os.memfd_create("short")
    with pytest.raises(UsageError, match="its page has 0 bytes, not 4096"):
        Limiter(short)
    os.close(short)


Make = Callable[..., Rig]
SLOW = {"ops_size": 2, "ops_refill_time": 3_600_000}
READ = virtio.BLK_REQUEST.pack(virtio.BLK_T_IN, 0, 0)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    rigs: list[Rig] = []

    def make(generation: int = 1, store: dict[str, int] | None = None, **options: Any) -> Rig:
        rigs.append(Rig(Blk, {"path": str(tmp_path / "image"), "readonly": True, **options}, generation=generation,
                        store=store))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.close()


def offer(rig: Rig, count: int) -> list[int]:
    heads = [rig.drivers[0].add([READ], [512, 1]) for _ in range(count)]
    rig.kick()
    return heads


def test_a_disk_serves_what_it_may_in_order(make: Make) -> None:
    rig = make(ops_size=4, ops_refill_time=40)
    heads = offer(rig, 20)
    used = [head for head, _ in rig.drivers[0].used()]
    assert used == heads[: len(used)]
    assert len(used) < 20
    began = time.process_time()
    rig.until(lambda: used.extend(head for head, _ in rig.drivers[0].used()) or len(used) == 20, 60)
    assert used == heads
    assert time.process_time() - began < 5, "it waits on a timer"
    assert rig.device.counters()["throttled"] > 0


def test_other_limits_hold_at_once(make: Make) -> None:
    rig = make(**SLOW)
    assert len(offer(rig, 6)) == 6
    assert len(rig.drivers[0].used()) == 2
    rig.device.call("limit", {"ops_size": 3, "ops_refill_time": 3_600_000})
    rig.until(lambda: rig.host.kicked == set())
    assert len(rig.drivers[0].used()) == 3
    with pytest.raises(UsageError):
        rig.device.call("limit", {"ops_size": 3})
    rig.device.call("limit", {})
    rig.until(lambda: rig.host.kicked == set())
    assert len(rig.drivers[0].used()) == 1


def test_a_successor_begins_without_tokens(make: Make) -> None:
    rig = make(generation=2, **SLOW)
    offer(rig, 1)
    assert rig.drivers[0].used() == []


def test_reset_and_pause_while_held_up(make: Make) -> None:
    rig = make(**SLOW)
    offer(rig, 5)
    rig.device.on_pause()
    assert rig.host.reactor._due == {}
    rig.kick()
    assert rig.host.reactor._due
    rig.device.on_reset()
    assert rig.host.reactor._due == {}
    rig.device.call("limit", {})
    assert rig.host.kicked == set(), "nothing is kept of what the driver took back"


def test_two_disks_of_a_group(make: Make) -> None:
    page = budget.create({"ops_size": 4, "ops_refill_time": 3_600_000})
    rigs = [make(store={budget.GROUP: os.dup(page)}, rate_limit_group="g") for _ in range(2)]
    served = [len(offer(rig, 3)) and len(rig.drivers[0].used()) for rig in rigs]
    assert served == [3, 1]
    with mmap.mmap(page, budget.SIZE) as seen:
        budget.put(seen, {"ops_size": 1, "ops_refill_time": 3_600_000})
    rigs[1].device.call("limit", {})
    rigs[1].until(lambda: rigs[1].host.kicked == set())
    assert len(rigs[1].drivers[0].used()) == 1
    os.close(page)


@pytest.mark.parametrize(("options", "message"), [
    ({"rate_limit_group": "g"}, "rate_limit_group=g: nobody gave its page"),
    ({"rate_limit_group": "g", "ops_size": 5}, "ops_size=5 beside rate_limit_group=g"),
])
def test_no_member_of_a_group(make: Make, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**options)
