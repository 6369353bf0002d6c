"""Waiting, without blocking, until every one of several workers has answered, is gone, or time is up."""

from __future__ import annotations

from collections.abc import Callable

from cellvisor.core.wire.reactor import Reactor


class Barrier:
    """Calls `then(late)` once: with nobody when all have answered, else with who has not after `seconds`."""

    def __init__(self, reactor: Reactor, waited_for: set[str], answer: str, seconds: float,
                 then: Callable[[set[str]], None]) -> None:
        self._reactor, self._waited_for, self.answer = reactor, set(waited_for), answer
        self._seconds, self._then = seconds, then
        self._timer: int | None = None
        self._over = False

    def start(self) -> None:
        """Begin; may call `then` at once."""
        self._timer = self._reactor.after(self._seconds, self._finish)
        self._look()

    def answered(self, name: str, what: str) -> None:
        """`name` said `what`; other answers than the one waited for do not count."""
        if what == self.answer:
            self.gone(name)

    def gone(self, name: str) -> None:
        """`name` will not answer any more."""
        self._waited_for.discard(name)
        self._look()

    def _look(self) -> None:
        if not self._waited_for:
            self._finish()

    def _finish(self) -> None:
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._reactor.cancel(self._timer)
        self._then(set(self._waited_for))
