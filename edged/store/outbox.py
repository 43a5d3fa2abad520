"""What others must be told, in order and at least once: one log of events, and how far each consumer has
come.

A consumer (an uplink) has a durable cursor. Rows go when all consumers have acknowledged them; a consumer
that is gone cannot fill the disk, because :func:`trim` holds an upper bound. Who watches without a cursor
(``GET /v1/events``) sees what is still there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from edged.api import JsonValue
from edged.clock import from_text, to_text

from . import audit
from .database import Tx

__all__ = [
    "Event",
    "Trimmed",
    "acknowledge",
    "after",
    "cursor",
    "depth",
    "head",
    "lost",
    "put",
    "register",
    "remove",
    "trim",
]


@dataclass(frozen=True, slots=True)
class Event:
    """One row. A receiver deduplicates by ``key``; ``seq`` rises, with gaps, and is never used twice."""

    seq: int
    time: datetime
    kind: str
    device: str | None
    job: str | None
    payload: JsonValue
    key: str


@dataclass(frozen=True, slots=True)
class Trimmed:
    """Rows that a trim removed: ``acknowledged`` had been taken by all, ``dropped`` not by at least one
    consumer.
    """

    acknowledged: int
    dropped: int


def put(tx: Tx, kind: str, device: str | None, job: str | None, payload: JsonValue, key: str) -> int:
    """Add an event and return its number; that of the first where ``key`` is in the log already."""
    held = tx.db.execute("SELECT seq FROM outbox WHERE key = ?", [key]).fetchone()
    if held is not None:
        return int(held["seq"])
    text = json.dumps(payload, allow_nan=False, separators=(",", ":"))
    added = tx.db.execute(
        "INSERT INTO outbox (time, kind, device, job, payload, key) VALUES (?, ?, ?, ?, ?, ?)",
        [to_text(tx.now), kind, device, job, text, key],
    )
    return int(added.lastrowid or 0)


def after(tx: Tx, seq: int, limit: int = 100) -> list[Event]:
    """The events after number ``seq``, in order, at most ``limit``."""
    rows = tx.db.execute("SELECT * FROM outbox WHERE seq > ? ORDER BY seq LIMIT ?", [seq, limit])
    return [
        Event(
            row["seq"],
            from_text(row["time"]),
            row["kind"],
            row["device"],
            row["job"],
            json.loads(row["payload"]),
            row["key"],
        )
        for row in rows
    ]


def head(tx: Tx) -> int:
    """The number of the newest event ever put; 0 where there was none."""
    row = tx.db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox'").fetchone()
    return 0 if row is None else int(row["seq"])


def register(tx: Tx, consumer: str) -> int:
    """Make ``consumer`` known, from the oldest event that is still there; returns its cursor. Idempotent."""
    oldest = tx.db.execute("SELECT min(seq) FROM outbox").fetchone()[0]
    start = head(tx) if oldest is None else oldest - 1
    tx.db.execute(
        "INSERT INTO outbox_consumer (name, seq, updated) VALUES (?, ?, ?) ON CONFLICT (name) DO NOTHING",
        [consumer, start, to_text(tx.now)],
    )
    return cursor(tx, consumer)


def cursor(tx: Tx, consumer: str) -> int:
    """The last event that ``consumer`` acknowledged; 0 where it is not known."""
    row = tx.db.execute("SELECT seq FROM outbox_consumer WHERE name = ?", [consumer]).fetchone()
    return 0 if row is None else int(row["seq"])


def acknowledge(tx: Tx, consumer: str, seq: int) -> int:
    """``consumer`` has everything up to ``seq``; returns its cursor, which never goes back. Makes it known.

    Raises ``ValueError`` for an event that was never put.
    """
    newest = head(tx)
    if seq > newest:
        raise ValueError(f"{consumer} acknowledged event {seq}, the newest is {newest}")
    register(tx, consumer)
    tx.db.execute(
        "UPDATE outbox_consumer SET seq = ?, updated = ? WHERE name = ? AND seq < ?",
        [seq, to_text(tx.now), consumer, seq],
    )
    return cursor(tx, consumer)


def remove(tx: Tx, consumer: str) -> None:
    """Forget a consumer that is configured no longer, so that it holds nothing back."""
    tx.db.execute("DELETE FROM outbox_consumer WHERE name = ?", [consumer])


def depth(tx: Tx) -> dict[str, int]:
    """How many events wait for each consumer."""
    rows = tx.db.execute(
        "SELECT name, (SELECT count(*) FROM outbox AS o WHERE o.seq > c.seq) AS waiting"
        " FROM outbox_consumer AS c ORDER BY name"
    )
    return {row["name"]: row["waiting"] for row in rows}


def lost(tx: Tx) -> dict[str, int]:
    """How many events were dropped before each consumer had them."""
    rows = tx.db.execute("SELECT name, lost FROM outbox_consumer ORDER BY name")
    return {row["name"]: row["lost"] for row in rows}


def trim(tx: Tx, max_rows: int, keep_rows: int = 0) -> Trimmed:
    """Remove what all consumers have, but for the newest ``keep_rows``; then the oldest beyond ``max_rows``.

    Over the bound a tenth more than needed goes, so that a dead consumer costs one audit row (event
    ``outbox_dropped``) for many events. Without any consumer nothing is lost, and nothing goes on record.
    Both bounds are 1 or more, 0 or more.
    """
    acknowledged = _remove_before(tx, _first_wanted(tx, keep_rows))
    held = tx.db.execute("SELECT count(*) FROM outbox").fetchone()[0]
    if held <= max_rows:
        return Trimmed(acknowledged, 0)
    first_kept = _newest(tx, max(1, max_rows - max_rows // 10))
    missed = _count_lost(tx, first_kept)
    removed = _remove_before(tx, first_kept)
    dropped = max(missed.values(), default=0)
    if dropped:
        audit.append(tx, "edged", "outbox_dropped", {"before_seq": first_kept, "dropped": {**missed}})
    return Trimmed(acknowledged + removed - dropped, dropped)


def _first_wanted(tx: Tx, keep_rows: int) -> int:
    """The oldest event that some consumer has not acknowledged or that is among the newest ``keep_rows``."""
    slowest = tx.db.execute("SELECT min(seq) FROM outbox_consumer").fetchone()[0]
    if slowest is None:
        return 0
    return min(int(slowest) + 1, _newest(tx, keep_rows)) if keep_rows else int(slowest) + 1


def _newest(tx: Tx, rows: int) -> int:
    """The number of the oldest of the newest ``rows`` (1 or more) events; 0 where there are fewer."""
    row = tx.db.execute("SELECT seq FROM outbox ORDER BY seq DESC LIMIT 1 OFFSET ?", [rows - 1]).fetchone()
    return 0 if row is None else int(row["seq"])


def _remove_before(tx: Tx, seq: int) -> int:
    return tx.db.execute("DELETE FROM outbox WHERE seq < ?", [seq]).rowcount


def _count_lost(tx: Tx, first_kept: int) -> dict[str, int]:
    """Note on each consumer what it misses of the rows before ``first_kept``; returns the counts by name."""
    rows = tx.db.execute(
        "SELECT name, (SELECT count(*) FROM outbox AS o WHERE o.seq > c.seq AND o.seq < ?) AS missed"
        " FROM outbox_consumer AS c",
        [first_kept],
    )
    missed = {row["name"]: int(row["missed"]) for row in rows if row["missed"]}
    for name, count in missed.items():
        tx.db.execute(
            "UPDATE outbox_consumer SET lost = lost + ?, seq = ? WHERE name = ?",
            [count, first_kept - 1, name],
        )
    return missed
