"""A worker that lies to a real core by what it says: it hurts its own device and nobody else (design 3).

One VM for all: an honest device beside the liar's, whose every generation tells another lie. After each the same core
and the same honest worker must serve the guest, before and after a machine reset. The lies: tests/fakes/lies_told.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire.messages import MAX_MESSAGE, CoreVerb
from tests.fakes import lies_told
from tests.fakes.real_core import ACTIVATE, Lying, RealCore, booted, rss
from tests.native.guest import needs_kvm

pytestmark = [pytest.mark.kvm, needs_kvm]
COST = 64  # MiB of memory that all lies together may cost core


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCore]:
    with RealCore(tmp_path_factory.mktemp("core")) as made:
        booted(made)
        yield made


@pytest.fixture
def core(shared: RealCore) -> Iterator[RealCore]:
    yield shared
    shared.check()
    assert rss(shared.process.pid) - shared.at_first < COST
    assert len(shared.ask(CoreVerb.INFO)["reason"]) == 0


@pytest.mark.parametrize(("deed", "reason"), [
    ("garbage", "message is not msgpack"),
    ("unknown_kind", "unknown kind"),
    ("ready_first", "worker is waiting, not greeted"),
    ("dense_hello", "protocol None"),
])
def test_nonsense_ends_its_speaker(core: RealCore, deed: str, reason: str) -> None:
    with Lying(core, deed) as liar:
        failure = core.expelled()
        assert liar.is_killed()
    assert reason in failure
    assert len(failure) < 400
    assert failure.isprintable()


def test_a_spec_that_cannot_be(tmp_path: Path) -> None:
    """The first HELLO of a device makes its function: each of these is refused, then a good one is not."""
    with RealCore(tmp_path) as core:
        for number in range(len(lies_told.SPECS)):
            with Lying(core, "specs", str(number)) as liar:
                assert core.expelled()
                assert liar.is_killed()
        descriptors = core.descriptors()
        booted(core)
        core.check()
        assert core.descriptors() < descriptors + 20, "what was made for a Spec that is refused is released"


@pytest.mark.parametrize("deed", ["never_speaks", "no_descriptors"])
def test_one_that_does_not_come_up_keeps_nobody(core: RealCore, deed: str) -> None:
    with Lying(core, deed):
        core.check()


def test_a_reason_is_one_printable_line(core: RealCore) -> None:
    with Lying(core, "terminal_codes") as liar:
        liar.served()
        failure = core.expelled()
    assert failure.startswith("?[2J?root logged in")
    assert failure.isprintable()
    assert len(failure) <= 500
    assert "\x1b" not in core.log.read_text()


def test_a_second_hello(core: RealCore) -> None:
    with Lying(core, "second_hello") as liar:
        liar.served().go()
        assert "worker is serving, not waiting" in core.expelled()
        assert liar.is_killed()


def test_floods_of_messages_are_slowed_down(core: RealCore) -> None:
    logged = core.log.stat().st_size
    with Lying(core, "flood") as liar:
        liar.served().go()
        assert liar.says() == "flooding"
        end = time.monotonic() + 4
        while time.monotonic() < end:
            core.check()  # while it goes on
        assert liar.is_alive, "each message was a good one"
    assert core.log.stat().st_size - logged < 100_000


def test_a_flood_of_empty_messages(core: RealCore) -> None:
    with Lying(core, "raw_flood") as liar:
        liar.served().go()
        assert liar.says() == "flooding"
        assert "not msgpack" in core.expelled()
        assert liar.is_killed()


@pytest.mark.parametrize(("deed", "reason"), [
    ("endless_message", "several parts"), ("giant_message", "1099511627776 bytes")])
def test_messages_without_end(core: RealCore, deed: str, reason: str) -> None:
    before = rss(core.process.pid)
    with Lying(core, deed) as liar:
        liar.served().go()
        assert reason in core.expelled()
        assert liar.is_killed()
    assert rss(core.process.pid) - before < 16


@pytest.mark.parametrize(("deed", "reason"), [
    ("giant_reply", "at most"), ("nested_reply", "nested too deeply")])
def test_answers_that_nobody_reads(core: RealCore, deed: str, reason: str) -> None:
    with Lying(core, deed) as liar:
        liar.served()
        with pytest.raises(CellvisorError, match="process died"):
            core.ask(CoreVerb.CALL, device="liar", verb="anything")
        failure = core.expelled()
        assert liar.is_killed()
    assert reason in failure
    assert core.heard < MAX_MESSAGE // 4, "the controlplane reads no more than that at once"


@pytest.mark.parametrize("deed", ["half_messages", "noise", "impostor"])
def test_strangers_and_fragments(core: RealCore, deed: str) -> None:
    descriptors = core.descriptors()
    with Lying(core, deed) as liar:
        liar.served().go()
        assert liar.says()
        core.check()
        assert core.descriptors() < descriptors + 200
    core.until(lambda: core.descriptors() <= descriptors + 8)


def test_silence_ends_in_being_killed(core: RealCore) -> None:
    with Lying(core, "deaf", hang_timeout=1.0) as liar:
        liar.served()
        assert "no sign of life" in core.expelled()
        assert liar.is_killed()


def test_a_worker_that_never_resets(tmp_path: Path) -> None:
    """Nor pauses, nor is watched: the machine's reset and pause end nevertheless, without it."""
    with RealCore(tmp_path, ACTIVATE) as core, Lying(core, "deaf", hang_timeout=0.0) as liar:
        liar.served()
        core.boot()
        assert core.devices()["liar"]["active"]
        assert core.ask(CoreVerb.PAUSE)["late"] == ["liar"]
        core.ask(CoreVerb.RESUME)
        core.check()
        assert "machine reset" in core.expelled()
        assert liar.is_killed()


@pytest.mark.parametrize(("echo", "reason"), [("", "no sign of life"), ("echo", "hung up and lives on")])
def test_who_lets_go_of_everything_is_killed_all_the_same(core: RealCore, echo: str, reason: str) -> None:
    with Lying(core, "lets_go", echo, hang_timeout=1.0) as liar:
        liar.served().go()
        assert liar.says() == "gone"
        assert reason in core.expelled()
        assert liar.is_killed()
