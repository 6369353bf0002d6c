"""Something kept elsewhere is kept again soon after it changed; what changes meanwhile, once more after that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Keeping:
    """`keep()` keeps it as it is when that is called, which may take a while."""

    def __init__(self, keep: Callable[[], Awaitable[None]]) -> None:
        self._keep = keep
        self._is_stale = False
        self._task: asyncio.Task[None] | None = None

    def changed(self) -> None:
        """Keep it soon."""
        self._is_stale = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._is_stale:
            self._is_stale = False
            await self._keep()

    def cancel(self) -> None:
        """There is nowhere to keep it any more."""
        if self._task is not None:
            self._task.cancel()
