"""What may only rise: release counters, versions of signed roles, time. The schema holds it, not only this
code.

A floor outlives the metadata cache, the artifacts and the jobs: it is what makes an old signed release or an
old signed repository useless to whoever replays it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from edged.clock import from_text, to_text
from edged.errors import Reason, Refused
from edged_firmware.trust import Seen, SeenRole

from . import meta
from .database import Tx

__all__ = [
    "Floor",
    "all_floors",
    "counters",
    "get",
    "get_seen",
    "get_time",
    "raise_seen",
    "raise_time",
    "raise_to",
]

_TIME: Final = "time_floor"


@dataclass(frozen=True, slots=True)
class Floor:
    """The highest release counter that ever succeeded on one component of a device, with that release."""

    counter: int
    release: str
    time: datetime


def get(tx: Tx, device: str, component: str) -> int:
    """The floor; 0 where nothing ever succeeded there."""
    row = tx.db.execute(
        "SELECT counter FROM release_floor WHERE device = ? AND component = ?", [device, component]
    ).fetchone()
    return 0 if row is None else int(row["counter"])


def counters(tx: Tx, device: str) -> dict[str, int]:
    """The floors of all components of ``device``."""
    rows = tx.db.execute("SELECT component, counter FROM release_floor WHERE device = ?", [device])
    return {row["component"]: int(row["counter"]) for row in rows}


def all_floors(tx: Tx) -> dict[tuple[str, str], Floor]:
    """All floors by (device, component)."""
    rows = tx.db.execute("SELECT * FROM release_floor ORDER BY device, component")
    return {
        (row["device"], row["component"]): Floor(row["counter"], row["release"], from_text(row["time"]))
        for row in rows
    }


def raise_to(tx: Tx, device: str, component: str, counter: int, release: str) -> int:
    """Raise the floor to ``counter`` where that is higher; returns the floor.

    Belongs into the transaction that sets a job ``succeeded``.
    """
    tx.db.execute(
        "INSERT INTO release_floor (device, component, counter, release, time) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (device, component) DO UPDATE SET"
        " counter = excluded.counter, release = excluded.release, time = excluded.time"
        " WHERE excluded.counter > release_floor.counter",
        [device, component, counter, release, to_text(tx.now)],
    )
    return get(tx, device, component)


def get_seen(tx: Tx) -> dict[str, SeenRole]:
    """The highest version of each role that was ever accepted, for the next trust request."""
    rows = tx.db.execute("SELECT * FROM seen_role ORDER BY role")
    return {row["role"]: SeenRole(row["version"], tuple(json.loads(row["keyids"]))) for row in rows}


def raise_seen(tx: Tx, seen: Seen) -> None:
    """Keep what a trust report has seen.

    Raises ``Refused(METADATA_ROLLBACK)`` where a role would go back while it keeps all its keys (TUF client
    workflow 5.3.11 allows it otherwise): another refresh was faster, and its report stands.
    """
    held = get_seen(tx)
    for role, new in seen.items():
        old = held.get(role)
        if old is not None and new.version < old.version and set(old.keyids) <= set(new.keyids):
            raise Refused(
                Reason.METADATA_ROLLBACK, f"{role}: version {new.version} is below {old.version}, seen before"
            )
        tx.db.execute(
            "INSERT INTO seen_role (role, version, keyids, time) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (role) DO UPDATE SET version = excluded.version, keyids = excluded.keyids,"
            " time = excluded.time",
            [role, new.version, json.dumps(new.keyids), to_text(tx.now)],
        )


def get_time(tx: Tx) -> datetime | None:
    """The newest time that a signature ever proved, or None."""
    text = meta.get(tx, _TIME)
    return None if text is None else from_text(text)


def raise_time(tx: Tx, moment: datetime) -> datetime:
    """Raise the time floor to ``moment`` where that is later; returns the floor."""
    held = get_time(tx)
    if held is not None and held >= moment:
        return held
    meta.put(tx, _TIME, to_text(moment))
    return from_text(to_text(moment))
