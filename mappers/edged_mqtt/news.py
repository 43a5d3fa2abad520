"""That something happened, for one who waits for it."""

from __future__ import annotations

import asyncio


class News:
    """An event with a deadline, without a task or a context for each wait."""

    __slots__ = ("_loop", "_there", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._there = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._there = True
        if self._waiter is not None:
            _end(self._waiter)

    async def wait(self, deadline: float | None) -> bool:
        """Wait for the next news; False where the deadline, of the loop's clock, came first. News that came before the call
        count."""
        if not self._there:
            waiter = self._waiter = self._loop.create_future()
            timer = None if deadline is None else self._loop.call_at(deadline, _end, waiter)
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        there, self._there = self._there, False
        return there


def _end(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
