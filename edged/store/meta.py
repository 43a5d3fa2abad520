"""Single facts about this node, by key: its id, what mappers remember, and whatever else has no table of its own."""

from __future__ import annotations

from collections.abc import Callable

from .database import Tx

__all__ = ["get", "node_id", "put"]

_NODE_ID = "node_id"


def get(tx: Tx, key: str) -> str | None:
    """The value, or None."""
    row = tx.db.execute("SELECT value FROM meta WHERE key = ?", [key]).fetchone()
    return None if row is None else str(row["value"])


def put(tx: Tx, key: str, value: str) -> None:
    """Keep ``value`` under ``key``."""
    tx.db.execute(
        "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        [key, value],
    )


def node_id(tx: Tx, make: Callable[[], str]) -> str:
    """The id of this node: what ``make`` returns at the first call ever, the same from then on."""
    found = get(tx, _NODE_ID)
    if found is None:
        found = make()
        put(tx, _NODE_ID, found)
    return found
