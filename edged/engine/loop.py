"""The loop: reconcile, claim what is due, run several devices at once, sleep until something happens.

Claiming is by state: a job that a power cut interrupted is simply due again. There is no recovery mode.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from datetime import timedelta

from edged.domain.job import Job
from edged.engine.reconciler import clock_was_set, reconcile_device
from edged.engine.runner import JobRunner, Workshop
from edged.errors import EdgedError
from edged.sessions import Sessions
from edged.store import jobs

log = logging.getLogger(__name__)

_LONGEST_SLEEP_S = 60.0
_STORE_PAUSE_S = 5.0
_LEAST_STEP = timedelta(minutes=1)
"""What the machine's clock is set by; less does not matter to a wait or a deadline."""


class Engine:
    """Runs jobs until it is cancelled. Rows stay as they are then, and the next life goes on from them."""

    def __init__(self, shop: Workshop, sessions: Sessions) -> None:
        self._shop = shop
        self._sessions = sessions
        self._running: dict[str, JobRunner] = {}
        self._dirty: set[str] = {unit.device.id for unit in sessions.all()}
        self._returned: set[str] = set()
        self._orphans: frozenset[str] = frozenset()
        # a second for what the rounding of stored times does
        self._longest_wait = timedelta(seconds=shop.settings.longest_backoff_s + 1)
        self._wake = asyncio.Event()
        self.turns = 0

    @property
    def running(self) -> tuple[Job, ...]:
        return tuple(runner.job for runner in self._running.values())

    def device_changed(self, device: str) -> None:
        """The twin of ``device`` has changed: look whether it wants a job."""
        self._dirty.add(device)
        self._wake.set()

    def device_returned(self, device: str) -> None:
        """The device is there: a job that waits for just that need not wait longer."""
        self._returned.add(device)
        self._dirty.add(device)
        self._wake.set()

    def job_changed(self, job: Job) -> None:
        """Somebody else changed a row: its runner looks at it now."""
        runner = self._running.get(job.device)
        if runner is not None:
            runner.stop.set()
        self._wake.set()

    async def ping(self) -> None:
        """Returns after the loop has taken a whole turn; the watchdog's proof that it lives."""
        turns = self.turns
        while self.turns == turns:
            self._wake.set()
            await asyncio.sleep(0.02)

    async def run(self) -> None:
        await self._find_orphans()
        async with asyncio.TaskGroup() as group:
            while True:
                self._wake.clear()
                pause = await self._turn(group)
                self.turns += 1
                await self._sleep(pause)

    async def _find_orphans(self) -> None:
        """Devices with an unfinished job that nobody configures any more: their jobs rest, and hold up nobody else's."""
        active = await self._shop.store.read(jobs.active_devices)
        self._orphans = active - {unit.device.id for unit in self._sessions.all()}
        for device in sorted(self._orphans):
            log.warning("job rests, its device is not configured", extra={"device": device})

    async def _turn(self, group: asyncio.TaskGroup) -> float:
        """One look at the store; returns the seconds until the next."""
        try:
            await self._follow_the_clock()
            await self._reconcile()
            for job in await self._due():
                self._start(group, job)
            return await self._until_due()
        except EdgedError as exc:
            # the disk is full, locked or damaged: jobs keep their rows, and a later turn tries again
            log.warning("store not usable now", extra={"reason": exc.reason.value, "detail": exc.detail})
            return _STORE_PAUSE_S

    async def _follow_the_clock(self) -> None:
        """The machine's clock was set: move with it what jobs wait for, and when they have to end."""
        clock, settings = self._shop.clock, self._shop.settings
        step = clock.step()
        if abs(step) < _LEAST_STEP:
            return
        moved = await self._shop.store.write(lambda tx: clock_was_set(tx, step, settings))
        clock.follow(step)
        log.warning("clock was set", extra={"by_s": step.total_seconds(), "jobs": len(moved)})
        for job in moved:
            self.job_changed(job)

    async def _reconcile(self) -> None:
        """All devices that changed, in one transaction: thousands may at start."""
        settings, devices = self._shop.settings, sorted(self._dirty)
        if not devices:
            return
        returned = frozenset(self._returned)
        self._dirty.clear()
        self._returned.clear()
        try:
            changed = await self._shop.store.write(
                lambda tx: [
                    reconcile_device(tx, device, settings, is_back=device in returned) for device in devices
                ]
            )
        except EdgedError:
            self._dirty.update(devices)
            self._returned.update(returned)
            raise
        for job in changed:
            if job is not None:
                self.job_changed(job)

    async def _due(self) -> Iterable[Job]:
        now, busy = self._shop.clock.now(), self._running.keys() | self._orphans
        free = self._shop.settings.parallel_jobs - len(self._running)
        if free <= 0:
            return ()
        return await self._shop.store.read(lambda tx: jobs.due(tx, now, free, busy, self._longest_wait))

    def _start(self, group: asyncio.TaskGroup, job: Job) -> None:
        runner = JobRunner(self._shop, self._sessions[job.device], job)
        self._running[job.device] = runner
        task = group.create_task(_run(runner), name=f"job {job.id}")
        task.add_done_callback(lambda _: self._ended(job.device))

    def _ended(self, device: str) -> None:
        del self._running[device]
        self.device_changed(device)

    async def _until_due(self) -> float:
        if len(self._running) >= self._shop.settings.parallel_jobs:
            return _LONGEST_SLEEP_S
        busy = self._running.keys() | self._orphans
        now = self._shop.clock.now()
        due = await self._shop.store.read(lambda tx: jobs.next_due_at(tx, now, busy, self._longest_wait))
        if due is None:
            return _LONGEST_SLEEP_S
        return min(max((due - self._shop.clock.now()).total_seconds(), 0.01), _LONGEST_SLEEP_S)

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass


async def _run(runner: JobRunner) -> None:
    """What a runner lets through is the store's: it cannot say so in the row, so it says it in the log and waits."""
    try:
        await runner.run()
    except EdgedError as exc:
        fields = {"job": runner.job.id, "reason": exc.reason.value, "detail": exc.detail}
        log.warning("job interrupted by the store", extra=fields)
        await asyncio.sleep(_STORE_PAUSE_S)
