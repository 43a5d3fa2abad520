"""What the tests of the store share: a clock that is set by hand, records with defaults, one-shot calls."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from edged.domain.job import Job
from edged.store import Store, Tx

T = TypeVar("T")
START = datetime(2026, 1, 1, tzinfo=UTC)


class HandClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.moment = START

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return (self.moment - START).total_seconds()

    async def sleep(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)
        await asyncio.sleep(0)


def make_job(job_id: str = "j1", **fields: Any) -> Job:
    defaults: dict[str, Any] = {
        "device": "uno",
        "component": "firmware",
        "release": "blink@1.0",
        "desired_version": 1,
        "run": 1,
        "source": "operator",
        "created": START,
        "updated": START,
        "deadline": START + timedelta(days=1),
    }
    return Job(id=job_id, **{**defaults, **fields})


def write(path: Path, *steps: Callable[[Tx], Any], clock: HandClock | None = None) -> list[Any]:
    """Open the store, run each step in a transaction of its own, close it."""

    async def main() -> list[Any]:
        async with Store.open(path, clock or HandClock()) as store:
            return [await store.write(step) for step in steps]

    return asyncio.run(main())


def read(path: Path, fn: Callable[[Tx], T]) -> T:
    async def main() -> T:
        async with Store.open(path, HandClock()) as store:
            return await store.read(fn)

    return asyncio.run(main())


@contextlib.contextmanager
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection past the store, as an intruder or another program has it; commits at once."""
    conn = sqlite3.connect(path, isolation_level=None, timeout=5)
    try:
        yield conn
    finally:
        conn.close()
