"""Watching one transfer: progress, checkpoints, stalls and speed. Knows no protocol and stores nothing itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from edged.api import Phase
from edged.clock import Clock
from edged.errors import Reason, Transient
from edged.sessions import let_go

T = TypeVar("T")
TICK_S = 0.2
OBSERVED_BYTES = 4096
"""What the time of a write is told for: small enough for the smallest parts, and the same for all of them."""


class Interrupted(Exception):
    """The transfer was cancelled on request. Not an error of the device: somebody wants the job looked at."""


async def unless(stop: asyncio.Event, call: Coroutine[Any, Any, T]) -> T:
    """Await ``call``. Raises :class:`Interrupted` when ``stop`` was set: the call was cancelled then."""
    task, stopping = asyncio.create_task(call), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Interrupted
        return task.result()
    finally:
        stopping.cancel()
        task.cancel()
        await asyncio.wait([task, stopping])


@dataclass(frozen=True, slots=True)
class Status:
    """A transfer as a person wants to see it. ``bytes_per_s`` is of the present phase."""

    phase: Phase
    done_bytes: int
    total_bytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Progress is committed when both ``size_bytes`` and ``interval_s`` of link time have passed: at most 4 % of a transfer
    is then spent on commits, even on an SD card."""

    size_bytes: int
    interval_s: float


class Meter:
    """The ``Progress`` that a mapper reports to, and :meth:`watch`, which awaits the mapper's call."""

    def __init__(
        self,
        clock: Clock,
        stall_s: float,
        checkpoints: Checkpoints,
        *,
        image_bytes: int = 0,
        observe_write: Callable[[float], None] | None = None,
    ) -> None:
        self._clock = clock
        self._stall_s = stall_s
        self._checkpoints = checkpoints
        self._image_bytes = image_bytes
        self._observe_write = observe_write
        now = clock.monotonic()
        self._status = Status(Phase.COMPARE, 0, 0, 0.0)
        self._phase_began, self._phase_from = now, 0
        self._moved = now
        self._saved_bytes, self._saved_at = 0, now
        self._chunk_from, self._chunk_began = 0, now
        self.written_bytes = 0
        self.reached_bytes = 0
        self.read_bytes = 0
        self.write_seconds = 0.0

    @property
    def status(self) -> Status:
        return self._status

    def __call__(self, phase: Phase, done_bytes: int, total_bytes: int) -> None:
        now = self._clock.monotonic()
        before = self._status
        # a mapper's mistake is raised where the mapper is, not where its numbers are used
        phase, done_bytes, total_bytes = Phase(phase), int(done_bytes), int(total_bytes)
        if phase is not before.phase or done_bytes < before.done_bytes:
            # a phase begins with what the device has already: only what is moved from here on is speed
            self._phase_began, self._phase_from = now, done_bytes
            self._chunk_began, self._chunk_from = now, done_bytes
            before = Status(phase, done_bytes, total_bytes, 0.0)
        moved = done_bytes - before.done_bytes
        elapsed = now - self._phase_began
        speed = (done_bytes - self._phase_from) / elapsed if elapsed > 0 else 0.0
        self._status = Status(phase, done_bytes, total_bytes, speed)
        if moved or phase is not before.phase:
            self._moved = now
        if phase is Phase.WRITE:
            self.written_bytes += moved
            # a mapper counts all of the image, or only what is left to write: what remains is the same in both
            self.reached_bytes = max(self.reached_bytes, self._image_bytes - (total_bytes - done_bytes))
            self.write_seconds = elapsed if moved else self.write_seconds
            self._observe_chunk(now, done_bytes)
        elif phase is not Phase.ERASE:
            self.read_bytes += moved

    def _observe_chunk(self, now: float, done_bytes: int) -> None:
        moved = done_bytes - self._chunk_from
        if self._observe_write and moved >= OBSERVED_BYTES:
            # a mapper may tell of its progress in larger steps
            self._observe_write((now - self._chunk_began) * OBSERVED_BYTES / moved)
            self._chunk_began, self._chunk_from = now, done_bytes

    async def watch(
        self,
        call: Coroutine[Any, Any, T],
        *,
        checkpoint: Callable[[int], Awaitable[None]],
        tick: Callable[[Status], None],
        stop: asyncio.Event,
    ) -> T:
        """Await ``call`` while it reports to this meter.

        ``checkpoint`` is awaited with the bytes of the image that the device has, when a checkpoint is due; ``tick`` is
        called a few times a second. Raises :class:`Interrupted` when ``stop`` was set: the call was cancelled then.
        Raises ``Transient(STALLED)`` where nothing moved for the stall time, and whatever the call raises.
        """
        self._moved = self._clock.monotonic()
        task = asyncio.create_task(call)
        stopping = asyncio.create_task(stop.wait())
        try:
            while not task.done() and not stop.is_set():
                await asyncio.wait([task, stopping], timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
                if not task.done():
                    tick(self._status)
                    self._check_stall()
                    await self._save_if_due(checkpoint)
            if not task.done():
                raise Interrupted
            return task.result()
        finally:
            stopping.cancel()
            # the wire is somebody else's only when the mapper has really let go of it
            await let_go(task)

    def _check_stall(self) -> None:
        still = self._clock.monotonic() - self._moved
        if still >= self._stall_s:
            status = self._status
            raise Transient(
                Reason.STALLED,
                f"no byte for {still:.0f} s at {status.done_bytes} of {status.total_bytes} ({status.phase})",
            )

    async def _save_if_due(self, checkpoint: Callable[[int], Awaitable[None]]) -> None:
        status, now = self._status, self._clock.monotonic()
        if status.phase is not Phase.WRITE:
            return
        if (
            self.reached_bytes - self._saved_bytes >= self._checkpoints.size_bytes
            and now - self._saved_at >= self._checkpoints.interval_s
        ):
            await checkpoint(self.reached_bytes)
            self._saved_bytes, self._saved_at = self.reached_bytes, now
