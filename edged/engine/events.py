"""Live events for whoever watches now. What must not be lost is in the outbox; this is the fast lane beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from edged.api import JsonValue

Event = dict[str, JsonValue]
_KEPT = 256


class Broadcast:
    """Fan-out to any number of watchers. A slow watcher loses the oldest events, never the daemon's time."""

    def __init__(self) -> None:
        self._watchers: set[asyncio.Queue[Event]] = set()

    def send(self, event: Event) -> None:
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    @contextmanager
    def watch(self) -> Iterator[asyncio.Queue[Event]]:
        """A queue of the events from now on."""
        queue: asyncio.Queue[Event] = asyncio.Queue(_KEPT)
        self._watchers.add(queue)
        try:
            yield queue
        finally:
            self._watchers.discard(queue)
