"""Desired and reported properties of devices, one row for each side of each property.

How a side changes is ``domain.twin.change``; here it is read, changed and kept in one transaction.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from edged.api import JsonValue, Reported
from edged.clock import from_text, to_text
from edged.domain.twin import Value, change

from .database import Tx

__all__ = ["Side", "Twin", "all", "forget", "get", "set_desired", "set_reported", "set_reported_many"]

Side = Literal["desired", "reported"]


@dataclass(frozen=True, slots=True)
class Twin:
    """Both sides of all properties of one device, by property name."""

    desired: Mapping[str, Value] = field(default_factory=dict)
    reported: Mapping[str, Value] = field(default_factory=dict)


def get(tx: Tx, device: str) -> Twin:
    """The twin of ``device``; empty where nothing was ever said of it."""
    rows = tx.db.execute("SELECT * FROM twin WHERE device = ? ORDER BY name", [device])
    return _twins(rows).get(device, Twin())


def all(tx: Tx) -> dict[str, Twin]:
    """All twins by device, in the order of their names."""
    return _twins(tx.db.execute("SELECT * FROM twin ORDER BY device, name"))


def set_desired(
    tx: Tx,
    device: str,
    name: str,
    value: JsonValue,
    source: str,
    version: int | None = None,
    unit: str | None = None,
) -> Value:
    """Write the desired side of one property and return what is stored now; a repeat changes nothing.

    Raises ``Refused(STALE_VERSION)`` where ``version``, a remote writer's own count, is older than what is
    stored.
    """
    return _set(tx, "desired", device, Reported(name, value, unit), source, tx.now, version)


def set_reported(
    tx: Tx,
    device: str,
    name: str,
    value: JsonValue,
    source: str,
    unit: str | None = None,
    time: datetime | None = None,
) -> Value:
    """Write the reported side of one property and return what is stored now; a repeat changes nothing.

    ``time`` is when it was reported (the transaction's time where it is None).
    """
    return _set(tx, "reported", device, Reported(name, value, unit), source, time or tx.now, None)


def set_reported_many(tx: Tx, device: str, values: Iterable[Reported], source: str) -> dict[str, Value]:
    """:func:`set_reported` for many values, in their order; returns by name those that changed something."""
    changed: dict[str, Value] = {}
    for one in values:
        old = _get(tx, "reported", device, one.name)
        new = _set(tx, "reported", device, one, source, tx.now, None)
        if new != old:
            changed[one.name] = new
    return changed


def forget(tx: Tx, device: str) -> int:
    """Remove the twin of a device that is configured no longer; returns the number of rows."""
    return tx.db.execute("DELETE FROM twin WHERE device = ?", [device]).rowcount


def _set(
    tx: Tx, side: Side, device: str, new: Reported, source: str, time: datetime, version: int | None
) -> Value:
    old = _get(tx, side, device, new.name)
    value = change(old, new.value, time, source, unit=new.unit, version=version)
    if value is old:
        return value
    tx.db.execute(
        "INSERT INTO twin (device, side, name, value, version, time, source, unit)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (device, side, name) DO UPDATE SET value = excluded.value, version = excluded.version,"
        " time = excluded.time, source = excluded.source, unit = excluded.unit",
        [device, side, new.name, _dump(value.value), value.version, to_text(value.time), source, value.unit],
    )
    return value


def _get(tx: Tx, side: Side, device: str, name: str) -> Value | None:
    row = tx.db.execute(
        "SELECT * FROM twin WHERE device = ? AND side = ? AND name = ?", [device, side, name]
    ).fetchone()
    return None if row is None else _value(row)


def _dump(value: JsonValue) -> str:
    """Raises ``ValueError`` for what JSON has no word for (NaN, infinities)."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _value(row: sqlite3.Row) -> Value:
    return Value(json.loads(row["value"]), row["version"], from_text(row["time"]), row["source"], row["unit"])


def _twins(rows: Iterable[sqlite3.Row]) -> dict[str, Twin]:
    sides: dict[str, dict[str, dict[str, Value]]] = {}
    for row in rows:
        device = sides.setdefault(row["device"], {"desired": {}, "reported": {}})
        device[row["side"]][row["name"]] = _value(row)
    return {device: Twin(side["desired"], side["reported"]) for device, side in sides.items()}
