"""What devices report, on its way to the twins: coalesced, so that a chatty device costs a few commits a second at most.

Knows no protocol. A value that is replaced before it was stored was never stored: a twin holds the newest value, it is no
time series.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from edged.api import Reported
from edged.clock import Clock
from edged.domain.twin import Value
from edged.engine.events import Broadcast
from edged.errors import EdgedError
from edged.store import twins
from edged.store.database import Store, Tx

log = logging.getLogger(__name__)

FLUSH_S = 0.2
RETRY_S = 5.0
MOST_WAITING = 10_000
"""Values that wait for the disk; whoever reports more waits as well."""


class Reports:
    """Takes reported values and stores them in batches, all devices in one transaction."""

    def __init__(self, store: Store, clock: Clock, broadcast: Broadcast) -> None:
        self._store = store
        self._clock = clock
        self._broadcast = broadcast
        self._waiting: dict[tuple[str, str], Reported] = {}
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def put(self, device: str, reported: Reported) -> None:
        """Keep ``reported`` for the next batch; waits where too many wait already."""
        while (device, reported.name) not in self._waiting and len(self._waiting) >= MOST_WAITING:
            self._room.clear()
            await self._room.wait()
        self._waiting[device, reported.name] = reported
        self._filled.set()

    async def run(self) -> None:
        """Store what waits, for ever. What the store cannot take is tried again, unless something newer came."""
        while True:
            await self._filled.wait()
            await self._clock.sleep(FLUSH_S)
            if not await self.flush():
                await self._clock.sleep(RETRY_S)
                self._filled.set()

    async def flush(self) -> bool:
        """Store what waits now; False where the store could not take it, and it waits on."""
        batch, self._waiting = self._waiting, {}
        self._filled.clear()
        self._room.set()
        if not batch:
            return True
        try:
            changed = await self._store.write(lambda tx: _store(tx, batch))
        except EdgedError as exc:
            log.warning("reports not stored", extra={"reason": exc.reason.value, "detail": exc.detail})
            self._waiting = batch | self._waiting
            return False
        for device, values in changed.items():
            for name, value in values.items():
                self._broadcast.send(
                    {"kind": "reported", "device": device, "name": name, "value": value.value}
                )
        return True


def _store(tx: Tx, batch: Mapping[tuple[str, str], Reported]) -> dict[str, dict[str, Value]]:
    by_device: dict[str, list[Reported]] = {}
    for (device, _), reported in batch.items():
        by_device.setdefault(device, []).append(reported)
    return {
        device: twins.set_reported_many(tx, device, values, "device") for device, values in by_device.items()
    }
