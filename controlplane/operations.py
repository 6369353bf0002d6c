"""What was asked of the guest and what became of it: every add and remove is an operation with an outcome.

    requested --> guest-notified --> done
        |            |    ^  |
        |            |    |  +--> timed-out   (retried, or the guest answers late after all)
        |            |    +---------+
        +------------+--> refused(reason) | cancelled
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from cellvisor.controlplane.events import EventLog
from cellvisor.core.errors import CellvisorError, Conflict, NotFound

KEPT = 512
# Verbs that a device answers by itself: whoever asked learns the end.
STEPS = ("resize-disk", "set-rate-limit", "swap-disk")


class OpState(StrEnum):
    REQUESTED = "requested"
    NOTIFIED = "guest-notified"
    DONE = "done"
    REFUSED = "refused"
    TIMED_OUT = "timed-out"
    CANCELLED = "cancelled"


FINAL = frozenset({OpState.DONE, OpState.REFUSED, OpState.CANCELLED})
ENDED = FINAL | {OpState.TIMED_OUT}  # nobody need wait any longer
LEGAL: Mapping[OpState, frozenset[OpState]] = {
    OpState.REQUESTED: ENDED | {OpState.NOTIFIED},
    OpState.NOTIFIED: ENDED,
    OpState.TIMED_OUT: FINAL | {OpState.NOTIFIED},
    **{state: frozenset() for state in FINAL},
}


@dataclass(slots=True)
class Operation:
    """One add or remove. `asked`: seconds since the epoch; `times`: ms since then, by state and by what was seen
    of the guest (enumerated, bound)."""

    id: str
    verb: str
    device: str
    bdf: str
    state: OpState = OpState.REQUESTED
    reason: str = ""
    asked: float = field(default_factory=time.time)
    times: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        return self.state in FINAL

    def as_wire(self) -> dict[str, Any]:
        return {"id": self.id, "verb": self.verb, "device": self.device, "bdf": self.bdf, "state": str(self.state),
                "reason": self.reason, "asked": self.asked, "times": dict(self.times)}


class Operations:
    """The latest operations, oldest first; every change is an event `operation.<state>`."""

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self._kept: collections.OrderedDict[str, Operation] = collections.OrderedDict()
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._count = 0

    def begin(self, verb: str, device: str, bdf: str) -> Operation:
        """Note that something was asked for."""
        self._count += 1
        operation = Operation(f"op{self._count}", verb, device, bdf)
        self._kept[operation.id] = operation
        if len(self._kept) > KEPT:
            old = next((one.id for one in self._kept.values() if one.is_over), "")
            self._kept.pop(old, None)
        self._tell(operation)
        return operation

    @contextlib.contextmanager
    def step(self, verb: str, device: str, bdf: str) -> Iterator[Operation]:
        """Note something that ends with the block: done, or refused with the error that it raises."""
        operation = self.begin(verb, device, bdf)
        try:
            yield operation
        except BaseException as error:
            known = isinstance(error, CellvisorError)
            self.move(operation, OpState.REFUSED if known else OpState.CANCELLED, str(error) if known else "it ended")
            raise
        self.move(operation, OpState.DONE)

    def move(self, operation: Operation, state: OpState, reason: str = "") -> None:
        """Change the state. Raises Conflict for a change that the picture above does not have."""
        if state not in LEGAL[operation.state]:
            raise Conflict(f"{operation.id}: is {operation.state}, so it cannot become {state}")
        operation.state, operation.reason = state, reason
        self.mark(operation, str(state))
        self._tell(operation)
        for waiter in self._waiting.pop(operation.id, ()):
            if not waiter.done():
                waiter.set_result(None)

    @staticmethod
    def mark(operation: Operation, what: str) -> None:
        """Note when something was first seen."""
        operation.times.setdefault(what, round((time.monotonic() - operation.began) * 1000, 3))

    def _tell(self, operation: Operation) -> None:
        more = {"reason": operation.reason} if operation.reason else {}
        self._events.emit(f"operation.{operation.state}", id=operation.id, verb=operation.verb,
                          device=operation.device, bdf=operation.bdf, **more)

    def listed(self) -> list[Operation]:
        """Return what is kept, oldest first."""
        return list(self._kept.values())

    def latest(self, device: str, verb: str = "") -> Operation | None:
        """Return a device's latest operation (of one kind, if `verb` begins with it)."""
        for operation in reversed(self._kept.values()):
            if operation.device == device and operation.verb.startswith(verb):
                return operation
        return None

    def get(self, key: str) -> Operation:
        """Return the operation with this id, or else the latest of the device with this id. Raises NotFound."""
        found = self._kept.get(key) or self.latest(key)
        if found is None:
            raise NotFound(f"no operation {key[:80]!r}, nor one of a device of that name", hint="see `cellvisor ops`")
        return found

    async def wait(self, key: str, timeout: float, seen: str = "") -> Operation:
        """Return the operation when it has ended or, with `seen`, is in another state; or after `timeout` s."""
        operation = self.get(key)
        until = time.monotonic() + timeout
        while operation.state not in ENDED and (not seen or operation.state == seen):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(operation.id, set()).add(waiter)
            try:
                await asyncio.wait_for(waiter, max(0.0, until - time.monotonic()))
            except TimeoutError:
                break
            finally:
                self._waiting.get(operation.id, set()).discard(waiter)
        return operation

    # ---- to outlive the process

    def as_state(self) -> dict[str, Any]:
        """Return all that restore() needs, as plain data."""
        return {"count": self._count, "kept": [one.as_wire() for one in self._kept.values()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what as_state() described; times of marks to come count from the original request."""
        self._count = int(state["count"])
        now = time.time()
        for entry in state["kept"]:
            one = Operation(**{**entry, "state": OpState(entry["state"])})
            one.began = time.monotonic() - max(0.0, now - one.asked)
            self._kept[one.id] = one
            if one.verb in STEPS and not one.is_over:
                self.move(one, OpState.REFUSED, "the controlplane died before it had the answer")
