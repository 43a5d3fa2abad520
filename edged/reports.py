"""What devices report, on its way to the twins: coalesced, so that a chatty device does not wear the disk out. A commit of
one value is some 12 KiB on the disk, its journal's share included; one a second would be a gigabyte a day.

Knows no protocol. A value that is replaced before it was stored was never stored: a twin holds the newest value, it is no
time series.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping

from edged.api import JsonValue, Reported
from edged.clock import Clock
from edged.domain.reconcile import FIRMWARE
from edged.domain.twin import Value, delta
from edged.engine.events import Broadcast
from edged.errors import EdgedError
from edged.store import twins
from edged.store.database import Store, Tx

log = logging.getLogger(__name__)

FLUSH_S = 0.2
"""Values that come within so long after the first go together."""
RETRY_S = 5.0
MOST_WAITING = 10_000
"""Values that wait for the disk; whoever reports more waits as well."""
MOST_NAMES = 256
"""Properties of one device; one that makes up new names for ever must not fill the disk."""
MOST_BYTES = 65_536
MOST_DEPTH = 32
"""Of one value, as JSON."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/ -]{0,126}")


class Reports:
    """Takes reported values and stores them in batches, all devices in one transaction.

    ``interval_s``: so long from one batch to the next, at least; what comes after a longer silence is stored at once.
    ``behind`` is called with a device that reports other values than it should have, those wishes, and all that it reports.
    """

    def __init__(self, store: Store, clock: Clock, broadcast: Broadcast, interval_s: float) -> None:
        self._store = store
        self._clock = clock
        self._broadcast = broadcast
        self._interval_s = interval_s
        self.behind: Callable[[str, Mapping[str, Value], Mapping[str, Value]], None] = lambda *_: None
        self._due = 0.0
        self._waiting: dict[tuple[str, str], Reported] = {}
        self._left_out: set[str] = set()
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def put(self, device: str, reported: Reported) -> None:
        """Keep ``reported`` for the next batch; waits where too many wait already. What no twin can hold is left out."""
        fault = _fault(reported)
        if fault:
            self._leave_out(device, fault)
            return
        while (device, reported.name) not in self._waiting and len(self._waiting) >= MOST_WAITING:
            self._room.clear()
            await self._room.wait()
        self._waiting[device, reported.name] = reported
        self._filled.set()

    def _leave_out(self, device: str, fault: str) -> None:
        """Once for each device: a broken sensor must not fill the log."""
        if device not in self._left_out:
            self._left_out.add(device)
            log.warning("report left out", extra={"device": device, "detail": fault})

    async def run(self) -> None:
        """Store what waits, for ever. What the store cannot take is tried again, unless something newer came."""
        while True:
            await self._filled.wait()
            await self._clock.sleep(max(FLUSH_S, self._due - self._clock.monotonic()))
            self._due = self._clock.monotonic() + self._interval_s
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
            changed, behind = await self._store.write(lambda tx: _store(tx, batch))
        except EdgedError as exc:
            log.warning("reports not stored", extra={"reason": exc.reason.value, "detail": exc.detail})
            self._waiting = batch | self._waiting
            return False
        for device, values in changed.items():
            for name, value in values.items():
                self._broadcast.send(
                    {"kind": "reported", "device": device, "name": name, "value": value.value}
                )
        for device, (wishes, reported) in behind.items():
            self.behind(device, wishes, reported)
        return True


def _fault(reported: Reported) -> str:
    """Why no twin can hold ``reported``; empty where one can. Whatever a mapper makes up ends here."""
    if not isinstance(reported.name, str) or not _NAME.fullmatch(reported.name):
        return f"{reported.name!r:.100} is no name of a property"
    if reported.name == FIRMWARE or reported.name.startswith(f"{FIRMWARE}."):
        return f"{reported.name}: what a device runs is not reported, it is asked and proved"
    if reported.unit is not None and not (isinstance(reported.unit, str) and reported.unit.isprintable()):
        return f"{reported.name}: {reported.unit!r:.100} is no unit"
    try:
        # encoded: a lone surrogate is text that nobody could be shown
        text = json.dumps(reported.value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        return f"{reported.name}: {exc}"
    if len(text) > MOST_BYTES or not _is_flat(reported.value, MOST_DEPTH):
        return f"{reported.name}: found {len(text)} bytes of JSON; allowed: {MOST_BYTES}, {MOST_DEPTH} levels deep"
    return ""


def _is_flat(value: JsonValue, levels: int) -> bool:
    """Whether ``value`` has no more levels of lists and objects: one that nobody could read again ends every start."""
    if not isinstance(value, list | dict):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_is_flat(one, levels - 1) for one in inner)


def _within(tx: Tx, device: str, values: list[Reported]) -> list[Reported]:
    """``values`` without the names that are one too many."""
    known = set(twins.get(tx, device).reported)
    kept = []
    for one in values:
        if one.name in known or len(known) < MOST_NAMES:
            known.add(one.name)
            kept.append(one)
    return kept


def _store(
    tx: Tx, batch: Mapping[tuple[str, str], Reported]
) -> tuple[dict[str, dict[str, Value]], dict[str, tuple[Mapping[str, Value], Mapping[str, Value]]]]:
    """What changed; and of those devices that are not as they should be, what they should have, and all that they report."""
    by_device: dict[str, list[Reported]] = {}
    for (device, _), reported in batch.items():
        by_device.setdefault(device, []).append(reported)
    changed = {
        device: twins.set_reported_many(tx, device, _within(tx, device, values), "device")
        for device, values in by_device.items()
    }
    found = {device: twins.get(tx, device) for device in by_device}
    behind = {device: (delta(twin.desired, twin.reported), twin.reported) for device, twin in found.items()}
    return changed, {device: (wishes, reported) for device, (wishes, reported) in behind.items() if wishes}
