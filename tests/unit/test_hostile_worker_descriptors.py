"""A worker that lies to a real core by what it does to descriptors: it hurts its own device and nobody else (design 3).

As in test_hostile_worker.py; the lies: tests/fakes/lies_shown.py.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cellvisor.core.store import MAX_PER_DEVICE
from cellvisor.core.wire import places
from cellvisor.core.wire.messages import CoreVerb
from tests.fakes.liar import SPEC
from tests.fakes.real_core import ACTIVATE, Lying, RealCore, booted, kicks, rss
from tests.native.guest import needs_kvm

pytestmark = [pytest.mark.kvm, needs_kvm]
COST = 64  # MiB of memory that all lies together may cost core


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCore]:
    with RealCore(tmp_path_factory.mktemp("core"), (*ACTIVATE, *kicks(SPEC))) as made:
        booted(made)
        yield made


@pytest.fixture
def core(shared: RealCore) -> Iterator[RealCore]:
    yield shared
    with Lying(shared, "good") as good:  # the device can be had again, too
        good.served()
        shared.check()
    assert rss(shared.process.pid) - shared.at_first < COST


@pytest.fixture
def others(core: RealCore) -> Iterator[None]:
    """Nothing that the liar gave core is left once it is gone but what may be stored."""
    descriptors = core.descriptors()
    yield
    core.until(lambda: core.descriptors() <= descriptors + MAX_PER_DEVICE + 8)


@pytest.mark.usefixtures("others")
def test_deposits_are_counted(core: RealCore) -> None:
    with Lying(core, "deposits") as liar:
        liar.served().go()
        assert liar.says() == 10_000 - MAX_PER_DEVICE
        assert core.descriptors() < 400
        core.check()


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("deed", ["replaced", "bad_packets", "connections", "packet_flood"])
def test_floods_and_nonsense(core: RealCore, deed: str) -> None:
    logged = core.log.stat().st_size
    with Lying(core, deed) as liar:
        liar.served().go()
        assert liar.says()
        core.check()
        assert core.descriptors() < 500
    assert core.log.stat().st_size - logged < 20_000


@pytest.mark.parametrize("door", [places.CORE, places.FDS])
def test_who_hangs_up_before_being_let_in_leaves_nothing(core: RealCore, door: str) -> None:
    kind = socket.SOCK_STREAM if door == places.CORE else socket.SOCK_SEQPACKET
    descriptors = core.descriptors()
    for _ in range(300):
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.connect(str(core.where / door))
    core.check()
    core.until(lambda: core.descriptors() <= descriptors + 8)


def test_descriptors_that_take_a_minute_to_close(core: RealCore) -> None:
    with Lying(core, "slow_close") as liar:
        liar.served().go()
        assert liar.says() == "sending"
        assert liar.says() == "some"
        core.check(10)
        liar.go()
        assert liar.says() == "end"
        core.check(10)
        assert core.descriptors() < 800


def test_nothing_can_be_resized(core: RealCore) -> None:
    with Lying(core, "resize") as liar:
        found = liar.says()
    assert found == {"ram": ["EPERM"] * 5 + ["same"], "table": ["EPERM"] * 7 + ["same"],
                     "state": ["EPERM"] * 5 + ["same"]}


def test_garbage_in_the_state(core: RealCore) -> None:
    with Lying(core, "scribble", hang_timeout=1.0) as liar:
        liar.served().go()
        assert liar.says() == "done"
        core.check()
        assert core.devices()["liar"]["pid"] == liar.process.pid
    with Lying(core, "good") as liar:  # core itself still reads it
        liar.served()
        core.check()


@pytest.mark.parametrize("deed", ["full_eventfds", "empty_eventfds"])
def test_eventfds_that_block(core: RealCore, deed: str) -> None:
    """The guest kicks through PCI configuration space, unmasks and masks vectors, and core pings: none waits."""
    with Lying(core, deed, hang_timeout=0.5) as liar:
        liar.served().go()
        assert liar.says()
        core.check(15)
        assert core.ask(CoreVerb.INFO)["state"] == "running"
        core.check(15)
