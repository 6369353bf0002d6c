"""Operations that wait for the guest: which device each is about, and until when it may take.

It may have answered before we have noted that it was told; then the note comes first all the same.
"""

from __future__ import annotations

import asyncio

from cellvisor.controlplane.operations import Operation, Operations, OpState


class Pending:
    """By device: `adding` until the guest knows it, `leaving` until it is gone."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self.adding: dict[str, Operation] = {}
        self.leaving: dict[str, Operation] = {}
        self.timers: dict[str, asyncio.TimerHandle] = {}  # by operation

    def notified(self, operation: Operation, timeout: float) -> None:
        """The guest has been told, and may take `timeout` seconds; it may have answered already."""
        if operation.state in (OpState.REQUESTED, OpState.TIMED_OUT):
            self._operations.move(operation, OpState.NOTIFIED)
        if operation.state is OpState.NOTIFIED:
            self._disarm(operation)
            loop = asyncio.get_running_loop()
            self.timers[operation.id] = loop.call_later(timeout, self._silent, operation, timeout)

    def end(self, operation: Operation, state: OpState, reason: str = "") -> None:
        """It is over, if it was not before."""
        self._disarm(operation)
        if operation.state is OpState.REQUESTED:
            self._operations.move(operation, OpState.NOTIFIED)
        if not operation.is_over:
            self._operations.move(operation, state, reason)

    def _silent(self, operation: Operation, timeout: float) -> None:
        self.timers.pop(operation.id, None)
        if operation.state is OpState.NOTIFIED:
            self._operations.move(operation, OpState.TIMED_OUT, f"the guest did nothing about it in {timeout:g} s")

    def _disarm(self, operation: Operation) -> None:
        timer = self.timers.pop(operation.id, None)
        if timer is not None:
            timer.cancel()
