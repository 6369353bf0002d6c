"""Where every request ends, however it came: each request id is answered once.

While a request is being served and, if it changes something, for a while after, the same request gets the same answer
and another one under that id is refused. Errors are values here, so that they can be given out again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, Internal
from cellvisor.core.wire.control import Request, repeats

REMEMBERED = 1024

Serve = Callable[[Request], Awaitable[Any]]


class Desk:
    """Serves requests with `serve`, which may raise CellvisorError."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self._answers: dict[str, tuple[Request, asyncio.Task[Any]]] = {}  # oldest first
        self._unnamed: set[asyncio.Task[Any]] = set()

    async def ask(self, request: Request, *, remember: bool = True) -> Any:
        """Return the answer or the CellvisorError. Going away while waiting does not stop what was begun.

        `remember` is False for a request whose id means nothing.
        """
        try:
            return await asyncio.shield(self._once(request) if remember else self._now(request))
        except CellvisorError as error:
            return error

    def close(self) -> None:
        """Give up what is still being served."""
        for task in [*self._unnamed, *(task for _, task in self._answers.values())]:
            task.cancel()

    def _now(self, request: Request) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(self._guarded(request))
        self._unnamed.add(task)
        task.add_done_callback(self._unnamed.discard)
        return task

    def _once(self, request: Request) -> asyncio.Task[Any]:
        """Return the task that serves this request id, started now or earlier."""
        known = self._answers.get(request.id)
        if known is not None:
            if known[0] != request:
                raise Conflict(f"id {request.id!r} was used for another request", hint="use a new one")
            return known[1]
        task = asyncio.get_running_loop().create_task(self._guarded(request))
        self._answers[request.id] = (request, task)
        if repeats(request.verb, request.args):  # the answer may be big, and asking again does no harm
            task.add_done_callback(lambda _: self._answers.pop(request.id, None))
        if len(self._answers) > REMEMBERED:
            for key, (_, old) in self._answers.items():
                if old.done():
                    del self._answers[key]
                    break
        return task

    async def _guarded(self, request: Request) -> Any:
        try:
            return await self._serve(request)
        except CellvisorError as error:
            return error
        except Exception as error:
            log.get("api").exception("serving %s", request.verb)
            return Internal(f"{request.verb}: {type(error).__name__}: {error}")
