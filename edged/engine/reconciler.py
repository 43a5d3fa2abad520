"""Wishes to jobs: applies ``domain.reconcile`` to a device, in one transaction."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from edged.api import JsonValue
from edged.config import EngineSettings
from edged.domain.job import ACTIVE_STATES, SILENT, Job
from edged.domain.reconcile import DRIFT, FIRMWARE, CancelJob, LeftAlone, MakeJob, reconcile
from edged.engine.ids import ulid
from edged.errors import Permanent, Reason
from edged.store import audit, jobs, outbox, twins
from edged.store.database import Tx

_JUST_NOW = timedelta(minutes=2)


def reconcile_device(tx: Tx, device: str, settings: EngineSettings, *, is_back: bool = False) -> Job | None:
    """Compare ``device``'s desired and reported firmware and do what follows; returns the job made or changed.

    ``is_back``: the device was just seen, so that a job that waits for an absent device is due.
    """
    active = jobs.active_for(tx, device, FIRMWARE)
    match _decide(tx, device, active, settings):
        case MakeJob() as wish:
            return _make(tx, device, wish, settings)
        case CancelJob() as wish:
            return cancel(tx, wish.job, wish.reason, "engine")
    # only for a port that was not there: a device that is there and does not answer keeps its back-off
    waiting = active.waiting if active else None
    was_gone = waiting and waiting.reason is Reason.DEVICE_ABSENT and not waiting.detail.startswith(SILENT)
    if is_back and active and was_gone:
        return jobs.advance(tx, active, replace(active, waiting=None, attempts=0), "device is back")
    return None


def left_alone(tx: Tx, device: str, settings: EngineSettings) -> LeftAlone | None:
    """Why nothing is done about a device that runs something else than it should; None where it is as it should be, or a
    job is or was made for that."""
    found = _decide(tx, device, jobs.active_for(tx, device, FIRMWARE), settings)
    return found if isinstance(found, LeftAlone) else None


def _decide(
    tx: Tx, device: str, active: Job | None, settings: EngineSettings
) -> MakeJob | CancelJob | LeftAlone | None:
    twin = twins.get(tx, device)
    desired = twin.desired.get(FIRMWARE)
    last, times = None, tuple[datetime, ...]()
    if desired is not None and active is None:
        last = jobs.last_for(tx, device, FIRMWARE, desired.version)
        times = jobs.newest_of(tx, device, FIRMWARE, desired.version, DRIFT, settings.max_runs)
    return reconcile(desired, twin.reported.get(FIRMWARE), active, last, times, tx.now, settings.max_runs)


def retry(tx: Tx, job: Job, actor: str, settings: EngineSettings) -> Job:
    """A new run of an ended job.

    Raises ``Permanent(UNSUPPORTED)`` where it has not ended, or another wish came after it.
    """
    desired = twins.get(tx, job.device).desired.get(job.component)
    if not job.state.ended:
        raise Permanent(Reason.UNSUPPORTED, f"job {job.id} is {job.state}; only an ended job can be retried")
    if desired is None or desired.version != job.desired_version:
        raise Permanent(Reason.SUPERSEDED, f"{job.device} should run something else by now; use edged deploy")
    last = jobs.last_for(tx, job.device, job.component, job.desired_version)
    run = (last.run if last else job.run) + 1
    return _make(
        tx, job.device, MakeJob(job.release, job.desired_version, run, actor), settings, retry_of=job.id
    )


def cancel(tx: Tx, job: Job, reason: Reason, actor: str) -> Job:
    """Ask for the end of an active job; it goes back first where the device was changed. Idempotent."""
    if job.cancel is not None or job.state.ended:
        return job
    saved = jobs.advance(tx, job, replace(job, cancel=reason, waiting=None), "cancel requested", actor)
    audit.append(tx, actor, "job.cancel", {"job": job.id, "device": job.device, "reason": reason.value})
    return saved


def clock_was_set(tx: Tx, step: timedelta, settings: EngineSettings) -> list[Job]:
    """Move deadline and wait of every active job by ``step``; returns the jobs. One that was made just now has the new time
    already.

    An earlier life may have made a deadline by a clock that was right: none comes nearer by a step back but where it is
    farther away than a new one were, and none goes farther than that.
    """
    moved, farthest = [], tx.now + timedelta(seconds=settings.deadline_s)
    for job in jobs.find(tx, states=ACTIVE_STATES, limit=-1):
        if not tx.now - _JUST_NOW <= job.created <= tx.now:
            waiting = job.waiting and replace(job.waiting, until=job.waiting.until + step)
            deadline = min(max(job.deadline, job.deadline + step), farthest)
            later = replace(job, deadline=deadline, waiting=waiting)
            moved.append(jobs.advance(tx, job, later, "clock was set", f"by {step.total_seconds():.0f} s"))
    audit.append(tx, "engine", "clock.set", {"by_s": round(step.total_seconds()), "jobs": len(moved)})
    return moved


def _make(
    tx: Tx, device: str, wish: MakeJob, settings: EngineSettings, *, retry_of: str | None = None
) -> Job:
    job = Job(
        id=ulid(tx.now),
        device=device,
        component=FIRMWARE,
        release=wish.release,
        desired_version=wish.desired_version,
        run=wish.run,
        source=wish.source,
        created=tx.now,
        updated=tx.now,
        deadline=tx.now + timedelta(seconds=settings.deadline_s),
        retry_of=retry_of,
    )
    jobs.add(tx, job)
    data: dict[str, JsonValue] = {
        "job": job.id,
        "device": device,
        "release": job.release,
        "run": job.run,
        "source": job.source,
    }
    audit.append(tx, wish.source, "job.created", data)
    outbox.put(tx, "job", device, job.id, {**data, "state": job.state.value}, f"{job.id}:0")
    return job
