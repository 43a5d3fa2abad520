"""The only door to time. Everything that decides is handed a ``Clock`` or a plain ``datetime``."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Wall time, monotonic time and waiting."""

    def now(self) -> datetime:
        """The wall clock, timezone-aware UTC. May jump; never use it to measure."""
        ...

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait for ``seconds`` (0 or more)."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class SteadyClock:
    """A clock whose wall time goes on with the monotonic one, whatever the machine's is set to meanwhile.

    For what lasts: a deadline or a wait must not end because a board without a battery was told the time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._begin = clock.now() - timedelta(seconds=clock.monotonic())

    def now(self) -> datetime:
        """Wall time as it was at the start, and what passed since; with all steps that were followed."""
        return self._begin + timedelta(seconds=self._clock.monotonic())

    def monotonic(self) -> float:
        return self._clock.monotonic()

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)

    def step(self) -> timedelta:
        """By how much the machine's clock was set since."""
        return self._clock.now() - self.now()

    def follow(self, step: timedelta) -> None:
        """Take ``step`` into account from now on."""
        self._begin += step


def to_text(moment: datetime) -> str:
    """RFC 3339 in UTC with milliseconds: sorts as text, which the store relies on."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def from_text(text: str) -> datetime:
    """The inverse of :func:`to_text`.

    Raises ``ValueError`` where ``text`` is not RFC 3339.
    """
    return datetime.fromisoformat(text)
