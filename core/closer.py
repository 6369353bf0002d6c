"""Closes descriptors that other processes gave us, in threads: close(2) may last as long as their giver likes.

A socket with SO_LINGER, a file of a FUSE server, a packet in flight that carries such: the last one to let go waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import suppress

MAX_WAITING = 300  # descriptors of one giver that wait to be closed
PATIENCE = 0.25  # seconds that they may be more: a thread that got no CPU time is not the giver's fault
YIELD = 0.001  # seconds


class _Queue(deque[int]):
    crowded = 0.0  # since when it has been too long


class Closer:
    """One thread per giver while there is something to close. The threads do not keep the process alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[object, _Queue] = {}

    def close(self, whose: object, *fds: int) -> bool:
        """Close `fds` soon; returns False when descriptors of the same giver do not close and pile up."""
        if not fds:
            return True
        with self._lock:
            queue = self._queues.get(whose)
            is_new = queue is None
            if queue is None:
                queue = self._queues[whose] = _Queue()
            queue.extend(fds)
            is_crowded = len(queue) > MAX_WAITING
        if is_new:
            threading.Thread(target=self._work, args=(whose, queue), name="closer", daemon=True).start()
        if not is_crowded:
            queue.crowded = 0.0
            return True
        queue.crowded = queue.crowded or time.monotonic()
        if time.monotonic() - queue.crowded > PATIENCE:
            return False
        time.sleep(YIELD)  # the thread needs the interpreter, too
        return True

    def _work(self, whose: object, queue: _Queue) -> None:
        while True:
            with self._lock:
                if not queue:
                    del self._queues[whose]
                    return
                fd = queue[0]  # stays counted while it is being closed
            with suppress(OSError):  # closed all the same (close(2))
                os.close(fd)
            with self._lock:
                queue.popleft()
