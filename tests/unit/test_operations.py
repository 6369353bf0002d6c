"""Operations: legal changes only, an event for each, waiting, and what outlives the process."""

from __future__ import annotations

import asyncio
from itertools import product
from typing import Any

import pytest

from cellvisor.controlplane.events import EventLog
from cellvisor.controlplane.operations import KEPT, LEGAL, Operation, Operations, OpState
from cellvisor.core.errors import Conflict, NotFound

PATHS: dict[OpState, tuple[OpState, ...]] = {
    OpState.REQUESTED: (), OpState.NOTIFIED: (OpState.NOTIFIED,), OpState.DONE: (OpState.NOTIFIED, OpState.DONE),
    OpState.REFUSED: (OpState.REFUSED,), OpState.TIMED_OUT: (OpState.NOTIFIED, OpState.TIMED_OUT),
    OpState.CANCELLED: (OpState.NOTIFIED, OpState.CANCELLED),
}


@pytest.fixture
def operations() -> Operations:
    return Operations(EventLog())


def told(operations: Operations) -> list[tuple[str, dict[str, Any]]]:
    return [(event.name, event.properties) for event in operations._events.since(0)]


def test_every_change_is_an_event(operations: Operations) -> None:
    one = operations.begin("add-disk", "data", "0000:00:06.0")
    operations.move(one, OpState.NOTIFIED)
    operations.move(one, OpState.REFUSED, "because")
    about = {"id": "op1", "verb": "add-disk", "device": "data", "bdf": "0000:00:06.0"}
    assert told(operations) == [("operation.requested", about), ("operation.guest-notified", about),
                                ("operation.refused", {**about, "reason": "because"})]
    assert list(one.times) == ["guest-notified", "refused"]
    assert 0 <= one.times["guest-notified"] <= one.times["refused"]


@pytest.mark.parametrize(("old", "new"), list(product(OpState, OpState)))
def test_only_what_the_picture_has_is_legal(operations: Operations, old: OpState, new: OpState) -> None:
    one = operations.begin("remove-device", "data", "")
    for state in PATHS[old]:
        operations.move(one, state)
    assert one.state is old
    drawn = {
        OpState.REQUESTED: {"guest-notified", "done", "refused", "cancelled", "timed-out"},
        OpState.NOTIFIED: {"done", "refused", "cancelled", "timed-out"},
        OpState.TIMED_OUT: {"guest-notified", "done", "refused", "cancelled"},
    }.get(old, set())
    assert (new in LEGAL[old]) is (str(new) in drawn)
    if new in LEGAL[old]:
        operations.move(one, new)
        assert one.state is new
    else:
        with pytest.raises(Conflict, match=f"is {old}, so it cannot become {new}"):
            operations.move(one, new)


def test_found_by_operation_or_device(operations: Operations) -> None:
    first = operations.begin("add-disk", "data", "")
    second = operations.begin("remove-device", "data", "")
    assert operations.get("op1") is first
    assert operations.get("data") is second
    assert operations.latest("data", "add") is first
    for key in ("op3", "nope"):
        with pytest.raises(NotFound, match=key):
            operations.get(key)


def test_waiting(operations: Operations) -> None:
    async def run() -> None:
        one = operations.begin("add-disk", "data", "")
        assert (await operations.wait("op1", 0)).state is OpState.REQUESTED
        ended = [asyncio.create_task(operations.wait("data", 30)) for _ in range(3)]
        stepped = asyncio.create_task(operations.wait("op1", 30, seen="requested"))
        await asyncio.sleep(0)
        operations.move(one, OpState.NOTIFIED)
        assert (await stepped).state is OpState.NOTIFIED
        await asyncio.sleep(0)
        assert not any(task.done() for task in ended)
        operations.move(one, OpState.TIMED_OUT)
        assert [(await task).state for task in ended] == [OpState.TIMED_OUT] * 3
        assert (await operations.wait("op1", 30)).state is OpState.TIMED_OUT
        assert not operations._waiting

    asyncio.run(run())


def test_old_ones_are_forgotten_but_not_pending_ones(operations: Operations) -> None:
    pending = operations.begin("add-disk", "pending", "")
    for number in range(KEPT + 50):
        operations.move(operations.begin("add-disk", f"d{number}", ""), OpState.DONE)
    assert len(operations.listed()) <= KEPT + 1
    assert operations.get("pending") is pending
    with pytest.raises(NotFound):
        operations.get("d0")


def test_they_outlive_the_process(operations: Operations) -> None:
    one = operations.begin("add-disk", "data", "0000:00:06.0")
    operations.move(one, OpState.NOTIFIED)
    operations.begin("remove-device", "old", "")
    again = Operations(EventLog())
    again.restore(operations.as_state())
    assert [entry.as_wire() for entry in again.listed()] == [entry.as_wire() for entry in operations.listed()]
    found = again.get("op1")
    assert isinstance(found, Operation)
    again.move(found, OpState.DONE)
    assert again.begin("add-rng", "x", "").id == "op3"


def test_what_ends_at_once_is_an_operation_too(operations: Operations) -> None:
    with operations.step("resize-disk", "data", ""):
        pass
    with pytest.raises(Conflict), operations.step("resize-disk", "data", "") as refused:
        raise Conflict("no room")
    with pytest.raises(asyncio.CancelledError), operations.step("resize-disk", "data", ""):
        raise asyncio.CancelledError
    assert [one.state for one in operations.listed()] == [OpState.DONE, OpState.REFUSED, OpState.CANCELLED]
    assert refused.reason == "no room"
    operations.begin("resize-disk", "data", "")
    again = Operations(EventLog())
    again.restore(operations.as_state())
    assert (again.get("op4").state, again.get("op4").reason) == (
        OpState.REFUSED, "the controlplane died before it had the answer")
