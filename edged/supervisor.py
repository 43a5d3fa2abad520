"""Supervised units: mappers and uplinks run apart from the core, back off when they fail, and may give up.

A unit that gives up stops nothing else; its state and last reason stay readable. The core's own tasks (writer, engine) are
not units: they fail fast.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from edged.clock import Clock
from edged.errors import EdgedError, Reason

log = logging.getLogger(__name__)


def is_cancelled() -> bool:
    """Whether somebody wants the present task to end. A plugin may raise ``CancelledError`` though nobody does, and may
    turn one into something else though somebody does."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class UnitState(StrEnum):
    """Where a unit stands."""

    STARTING = "starting"
    RUNNING = "running"
    ABSENT = "absent"
    """It is up, and what it is for is not there."""
    BACKING_OFF = "backing_off"
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """``crashes`` faults of the plugin itself in a row end the unit; errors of the world (any other ``EdgedError`` than
    ``PLUGIN_FAILED``) never do.

    A run of ``healthy_s`` or longer starts the counts anew.
    """

    crashes: int = 5
    first_s: float = 0.5
    longest_s: float = 30.0
    healthy_s: float = 60.0


class Unit:
    """One supervised coroutine function. ``wake`` ends a back-off at once (somebody needs the unit now)."""

    def __init__(
        self, name: str, body: Callable[[Unit], Awaitable[None]], policy: RestartPolicy, clock: Clock
    ) -> None:
        self.name = name
        self.state = UnitState.STARTING
        self.reason: Reason | None = None
        self.detail = ""
        self.restarts = 0
        self._body = body
        self._policy = policy
        self._clock = clock
        self._wake = asyncio.Event()

    def running(self) -> None:
        """Called by the body when it is up. Only a run of ``healthy_s`` makes the back-off start small again."""
        self.state, self.reason, self.detail = UnitState.RUNNING, None, ""

    def absent(self, detail: str) -> None:
        """Called by the body while it waits for what comes by itself."""
        self.state, self.reason, self.detail = UnitState.ABSENT, Reason.DEVICE_ABSENT, detail

    def wake(self) -> None:
        """Somebody needs the unit now: end its back-off, or give a unit that gave up one more try."""
        self._wake.set()

    async def run(self) -> None:
        """Run the body for ever. A body that returns is run again at once. Cancellation goes through."""
        failures = crashes = 0
        while True:
            begun = self._clock.monotonic()
            self.state = UnitState.STARTING
            try:
                await self._body(self)
                if not is_cancelled():
                    failures = crashes = 0
                    continue
                raise asyncio.CancelledError
            except EdgedError as exc:
                failures, crashes = failures + 1, crashes + (exc.reason is Reason.PLUGIN_FAILED)
                self._failed(exc.reason, exc.detail, exc)
            except (Exception, asyncio.CancelledError) as exc:  # noqa: BLE001 - the plugin boundary
                failures, crashes = failures + 1, crashes + 1
                self._failed(Reason.PLUGIN_FAILED, repr(exc), exc)
            if self._clock.monotonic() - begun >= self._policy.healthy_s:
                failures, crashes = min(failures, 1), min(crashes, 1)
            if crashes >= self._policy.crashes:
                await self._give_up()
            else:
                await self._back_off(failures)

    async def _give_up(self) -> None:
        """Rest until somebody asks for the unit; one more crash then sends it back here."""
        self.state = UnitState.GIVEN_UP
        log.error("unit gave up", extra={"unit": self.name, "error": self.detail})
        self._wake.clear()
        await self._wake.wait()
        self._wake.clear()

    def _failed(self, reason: Reason, detail: str, exc: BaseException) -> None:
        if is_cancelled():
            raise asyncio.CancelledError from exc
        self._note(reason, detail)
        if reason is Reason.PLUGIN_FAILED:
            log.warning("unit crashed", extra={"unit": self.name, "error": detail}, exc_info=exc)

    def _note(self, reason: Reason, detail: str) -> None:
        if (reason, detail) != (self.reason, self.detail):
            log.info("unit failed", extra={"unit": self.name, "reason": reason.value, "detail": detail})
        self.reason, self.detail = reason, detail

    async def _back_off(self, failures: int) -> None:
        self.state = UnitState.BACKING_OFF
        self.restarts += 1
        delay = min(self._policy.first_s * 2 ** min(max(failures - 1, 0), 30), self._policy.longest_s)
        # who asked while it ran was heard by the run that failed
        self._wake.clear()
        try:
            async with asyncio.timeout(delay):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()
