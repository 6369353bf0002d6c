"""Closes descriptors that other processes gave us, in threads: close(2) may last as long as their giver likes.

A socket with SO_LINGER, a file of a FUSE server, a packet in flight that carries such: the last one to let go waits.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress


class Closer:
    """One thread per giver while there is something to close. The threads do not keep the process alive."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[object, deque[int]] = {}

    def close(self, whose: object, *fds: int) -> int:
        """Close `fds` soon; returns how many of the same giver are waiting, these included."""
        if not fds:
            return 0
        with self._lock:
            queue = self._queues.get(whose)
            is_new = queue is None
            if queue is None:
                queue = self._queues[whose] = deque()
            queue.extend(fds)
            count = len(queue)
        if is_new:
            threading.Thread(target=self._work, args=(whose, queue), name="closer", daemon=True).start()
        return count

    def _work(self, whose: object, queue: deque[int]) -> None:
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
