"""Questions to several VMs at once, each in a thread of its own, so that no VM can stall another's answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from cellvisor.core.errors import CellvisorError, TryAgain

Answer = TypeVar("Answer")


class Errand(Generic[Answer]):
    """Runs `work` in a thread that does not keep the process from ending."""

    def __init__(self, work: Callable[[], Answer]) -> None:
        self._work = work
        self._answer: Answer | CellvisorError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._answer = self._work()
        except CellvisorError as error:
            self._answer = error
        except Exception as error:  # what a VM answers may be anything
            self._answer = CellvisorError(f"{type(error).__name__}: {error}")

    def wait(self, until: float) -> bool:
        """Wait until it is done or CLOCK_MONOTONIC says `until`; tell whether it is done."""
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def answer(self) -> Answer:
        """Return what `work` returned, once it is done. Raises the CellvisorError that it ended with."""
        if isinstance(self._answer, CellvisorError):
            raise self._answer
        if self._answer is None:
            raise TryAgain("no answer yet", code="no-answer")
        return self._answer


def ask_all(names: Iterable[str], ask: Callable[[str], Answer], patience: float) -> dict[str, Answer | CellvisorError]:
    """Return what `ask` says of each name; an error for those that say nothing for `patience` seconds."""
    errands = {name: Errand(lambda name=name: ask(name)) for name in names}  # type: ignore[misc]
    until = time.monotonic() + patience
    found: dict[str, Answer | CellvisorError] = {}
    for name, errand in errands.items():
        try:
            found[name] = errand.answer() if errand.wait(until) else TryAgain(f"no answer within {patience:g} s",
                                                                              code="no-answer")
        except CellvisorError as error:
            found[name] = error
    return found
