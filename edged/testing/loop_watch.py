"""Does the event loop turn? A thread looks, and its own turns are the measure: a machine that is busy is late with both."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_TURN_S = 0.05


@asynccontextmanager
async def loop_turns(limit_s: float) -> AsyncIterator[None]:
    """Raises ``AssertionError`` at the end of the block where one call held the loop for ``limit_s`` seconds, and shows where
    it stood then."""
    watch = _Watch(limit_s)
    beats = asyncio.create_task(watch.beat())
    thread = threading.Thread(target=watch.look, name="loop watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        beats.cancel()
        watch.done.set()
        await asyncio.to_thread(thread.join)
    assert not watch.held_at, f"the event loop was held for {limit_s:g} s and longer, here:\n{watch.held_at}"


class _Watch:
    def __init__(self, limit_s: float) -> None:
        self.done = threading.Event()
        self.held_at = ""
        self._turns = round(limit_s / _TURN_S)
        self._loop = threading.get_ident()
        self._beats = 0

    async def beat(self) -> None:
        while True:
            self._beats += 1
            await asyncio.sleep(_TURN_S / 2)

    def look(self) -> None:
        seen = held = 0
        while not self.done.wait(_TURN_S):
            seen, held = self._beats, held + 1 if self._beats == seen else 0
            if held >= self._turns and not self.held_at:
                self.held_at = "".join(traceback.format_stack(sys._current_frames()[self._loop]))
