"""Requests that may have killed their worker: replayed one at a time, oldest first; a proven killer is refused.

    begun with others --death--> absolved, replayed alone --death--> 1 --death--> 2 --death--> 3: refused
                                        +-- completed --> the next one ... the last --> the doors open
`starts` of a head outlives its workers (design 3); only one that began alone is counted, so three is proof.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from cellvisor.core.ring.queue import Chain, Queue

LONELY_DEATHS = 3

Recovered = Sequence[tuple[Queue, list[Chain]]]


def absolve(recovered: Recovered) -> None:
    """Replay everything as usual: the predecessor was killed, stopped or replaced from outside."""
    for queue, chains in recovered:
        for chain in chains:
            if chain.starts:
                queue.absolve(chain)
        queue.requeue(chains)


class Quarantine:
    """Replays what had begun when the predecessor killed itself. `again(index)` has a queue served soon,
    `refuse(queue, chain)` completes a killer as failed. Until `is_over` no queue fetches anything new."""

    def __init__(self, recovered: Recovered, again: Callable[[int], None],
                 refuse: Callable[[Queue, Chain], None]) -> None:
        self._again = again
        begun = [(queue, chain) for queue, chains in recovered for chain in chains if chain.starts]
        begun.sort(key=lambda one: (one[1].counter, one[0].index))
        suspects = {(queue.index, chain.head) for queue, chain in begun}
        self._rest = {queue.index: (queue, [chain for chain in chains if (queue.index, chain.head) not in suspects])
                      for queue, chains in recovered}
        if len(begun) > 1:  # any of them may have done it
            for queue, chain in begun:
                queue.absolve(chain)
        elif begun and begun[0][1].starts >= LONELY_DEATHS:
            refuse(*begun.pop())
        self._waiting = deque(begun)
        self._alone: tuple[Queue, Chain] | None = None
        self.is_over = False
        for queue, _ in recovered:
            queue.held, queue.on_complete = True, self._completed
        self._next()

    def _completed(self, chain: Chain) -> None:
        if self._alone is not None and chain is self._alone[1]:
            self._next()

    def _next(self) -> None:
        if not self._waiting:
            self._open()
            return
        self._alone = queue, chain = self._waiting.popleft()
        queue.requeue([chain])
        self._again(queue.index)

    def _open(self) -> None:
        self._alone, self.is_over = None, True
        for queue, chains in self._rest.values():
            queue.held, queue.on_complete = False, None
            queue.requeue(chains)
            self._again(queue.index)

    def drop(self, index: int) -> None:
        """Go on without queue `index`: its driver broke a rule."""
        self._rest.pop(index, None)
        self._waiting = deque((queue, chain) for queue, chain in self._waiting if queue.index != index)
        if self._alone is not None and self._alone[0].index == index:
            self._next()
