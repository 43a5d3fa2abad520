"""Jobs, and the history of each. A job moves by compare-and-set; nothing here decides where to.

One device and component has at most one job that is not ended; the schema holds that, not only this code.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from itertools import takewhile

from edged.clock import from_text, to_text
from edged.domain.job import SUCCESSORS, Fallback, Job, State, Waiting
from edged.errors import Reason, Transient

from .database import Tx

__all__ = [
    "Conflict",
    "Entry",
    "active_devices",
    "active_for",
    "add",
    "advance",
    "checkpoint",
    "count_by_state_and_reason",
    "devices_with",
    "due",
    "find",
    "forget",
    "get",
    "history",
    "last_for",
    "newest_of",
    "next_due_at",
    "postpone",
    "prune",
]


class Conflict(Transient):
    """Somebody else was first: read the row again and decide anew. Reason ``STALE_VERSION``."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.STALE_VERSION, detail)


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a job's history. ``from_state`` is None for the first."""

    seq: int
    job: str
    time: datetime
    from_state: State | None
    to_state: State
    reason: Reason | None
    event: str
    detail: str


def add(tx: Tx, job: Job) -> None:
    """Store a new job and the first line of its history (event ``created``).

    Raises :class:`Conflict` where the device's component has an active job, or the run exists already;
    ``ValueError`` where the job is ended or not new.
    """
    if job.state.ended or job.revision:
        raise ValueError(f"job {job.id} is not new: {job.state}, revision {job.revision}")
    active = active_for(tx, job.device, job.component)
    if active is not None:
        raise Conflict(f"{job.device}: job {active.id} for {active.component} is {active.state}")
    if _run_exists(tx, job):
        raise Conflict(f"{job.device}: desired version {job.desired_version} has a run {job.run} already")
    tx.db.execute(_INSERT, _to_row(job))
    _remember(tx, None, job, "created", job.source)


def get(tx: Tx, job_id: str) -> Job | None:
    """The job, or None."""
    return _one(tx.db.execute("SELECT * FROM job WHERE id = ?", [job_id]))


def find(
    tx: Tx, *, device: str | None = None, states: Collection[State] | None = None, limit: int = 100
) -> list[Job]:
    """Jobs of ``device`` (None: all) in one of ``states`` (None: any), newest first, at most ``limit``."""
    wanted = None if states is None else json.dumps(sorted(states))
    query = _FIND if device is None else _FIND_OF
    rows = tx.db.execute(query, {"device": device, "states": wanted, "limit": limit})
    return [_job(row) for row in rows]


def due(
    tx: Tx,
    now: datetime,
    limit: int = 100,
    besides: Collection[str] = (),
    longest_wait: timedelta = timedelta(days=36_500),
) -> list[Job]:
    """Active jobs that do not wait, or whose wait is over at ``now``, leaving out the devices ``besides``.

    Who is due for longest comes first, so that many that wait in vain hold up nobody. A wait of more than
    ``longest_wait`` is over as well: the clock was set back since.
    """
    rows = tx.db.execute(
        "SELECT * FROM job WHERE state NOT IN ('succeeded', 'failed', 'cancelled', 'reverted')"
        " AND (waiting_until IS NULL OR waiting_until <= ? OR waiting_until > ?)"
        " AND device NOT IN (SELECT value FROM json_each(?))"
        " ORDER BY coalesce(waiting_until, created), seq LIMIT ?",
        [to_text(now), to_text(now + longest_wait), json.dumps(sorted(besides)), limit],
    )
    return [_job(row) for row in rows]


def active_devices(tx: Tx) -> frozenset[str]:
    """The devices that have a job that is not ended."""
    rows = tx.db.execute(
        "SELECT DISTINCT device FROM job WHERE state NOT IN ('succeeded', 'failed', 'cancelled', 'reverted')"
    )
    return frozenset(row["device"] for row in rows)


def next_due_at(
    tx: Tx, now: datetime, besides: Collection[str] = (), longest_wait: timedelta = timedelta(days=36_500)
) -> datetime | None:
    """When the next active job is due, leaving out the devices ``besides``: ``now`` where one is by then, None where no job
    is active. ``longest_wait`` as for :func:`due`.
    """
    found = tx.db.execute(
        "SELECT min(CASE WHEN waiting_until <= :horizon THEN waiting_until ELSE :now END) FROM job"
        " WHERE state NOT IN ('succeeded', 'failed', 'cancelled', 'reverted')"
        " AND device NOT IN (SELECT value FROM json_each(:besides))",
        {
            "now": to_text(now),
            "horizon": to_text(now + longest_wait),
            "besides": json.dumps(sorted(besides)),
        },
    ).fetchone()[0]
    return None if found is None else from_text(found)


def active_for(tx: Tx, device: str, component: str) -> Job | None:
    """The one job of the device's component that is not ended, or None."""
    return _one(
        tx.db.execute(
            "SELECT * FROM job WHERE device = ? AND component = ?"
            " AND state NOT IN ('succeeded', 'failed', 'cancelled', 'reverted')",
            [device, component],
        )
    )


def last_for(tx: Tx, device: str, component: str, desired_version: int) -> Job | None:
    """The newest run for this desired version, ended or not, or None."""
    return _one(
        tx.db.execute(
            "SELECT * FROM job WHERE device = ? AND component = ? AND desired_version = ?"
            " ORDER BY run DESC LIMIT 1",
            [device, component, desired_version],
        )
    )


def newest_of(
    tx: Tx, device: str, component: str, desired_version: int, source: str, limit: int
) -> tuple[datetime, ...]:
    """When the newest runs for this desired version were made, as far back as they are all of ``source``; at most
    ``limit``."""
    rows = tx.db.execute(
        "SELECT source, created FROM job WHERE device = ? AND component = ? AND desired_version = ?"
        " ORDER BY run DESC LIMIT ?",
        [device, component, desired_version, limit],
    )
    return tuple(from_text(row["created"]) for row in takewhile(lambda row: row["source"] == source, rows))


def devices_with(tx: Tx, source: str) -> frozenset[str]:
    """The devices that have a job of ``source``, ended or not."""
    rows = tx.db.execute("SELECT DISTINCT device FROM job WHERE source = ?", [source])
    return frozenset(row["device"] for row in rows)


def last_touched(tx: Tx, device: str, component: str) -> Job | None:
    """The newest job that changed the device, ended or not, or None."""
    return _one(
        tx.db.execute(
            "SELECT * FROM job WHERE device = ? AND component = ? AND touched = 1 ORDER BY seq DESC LIMIT 1",
            [device, component],
        )
    )


def advance(tx: Tx, old: Job, new: Job, event: str, detail: str = "") -> Job:
    """Replace ``old`` by ``new`` and write a line of history; returns what is stored.

    The store sets ``revision`` (``old.revision + 1``) and ``updated`` (the transaction's time) itself. The
    history has ``new``'s reason, or what it waits for.

    Raises :class:`Conflict` where the row is no longer at ``old.revision``, ``ValueError`` where
    ``domain.job`` does not allow the change: a state that is no successor, an ended job, another job's
    identity, an end
    without a reason.
    """
    _check_change(old, new)
    stored = replace(new, revision=old.revision + 1, updated=tx.now)
    _compare_and_set(tx, old, stored)
    _remember(tx, old.state, stored, event, detail)
    return stored


def checkpoint(tx: Tx, old: Job, done_bytes: int, total_bytes: int) -> Job:
    """:func:`advance` for progress alone: the attempts start anew and no history is written (a page is no
    event).
    """
    if old.state.ended:
        raise ValueError(f"job {old.id} is ended: {old.state}")
    stored = replace(
        old,
        done_bytes=done_bytes,
        total_bytes=total_bytes,
        attempts=0,
        revision=old.revision + 1,
        updated=tx.now,
    )
    _compare_and_set(tx, old, stored)
    return stored


def postpone(tx: Tx, old: Job, new: Job) -> Job:
    """:func:`advance` for a wait that goes on for the same reason: no history is written, however long it takes."""
    _check_change(old, new)
    stored = replace(new, revision=old.revision + 1, updated=tx.now)
    _compare_and_set(tx, old, stored)
    return stored


def history(tx: Tx, job_id: str) -> list[Entry]:
    """What happened to the job, in order."""
    rows = tx.db.execute("SELECT * FROM job_history WHERE job = ? ORDER BY seq", [job_id])
    return [
        Entry(
            seq=row["seq"],
            job=row["job"],
            time=from_text(row["time"]),
            from_state=None if row["from_state"] is None else State(row["from_state"]),
            to_state=State(row["to_state"]),
            reason=_reason(row["reason"]),
            event=row["event"],
            detail=row["detail"],
        )
        for row in rows
    ]


def prune(tx: Tx, before: datetime) -> int:
    """Remove jobs, with their history, that ended before ``before``; returns how many.

    Of each device's component the last job stays, and the last that says what runs there (succeeded or
    reverted).
    """
    return tx.db.execute(
        "DELETE FROM job WHERE state IN ('succeeded', 'failed', 'cancelled', 'reverted') AND updated < ?"
        " AND seq NOT IN (SELECT max(seq) FROM job GROUP BY device, component)"
        " AND seq NOT IN (SELECT max(seq) FROM job WHERE state IN ('succeeded', 'reverted')"
        " GROUP BY device, component)",
        [to_text(before)],
    ).rowcount


def forget(tx: Tx, device: str) -> int:
    """Remove the ended jobs of a device that is configured no longer; returns how many.

    Nothing pins what it ran any more. Its release floors stay.
    """
    return tx.db.execute(
        "DELETE FROM job WHERE device = ? AND state IN ('succeeded', 'failed', 'cancelled', 'reverted')",
        [device],
    ).rowcount


def count_by_state_and_reason(tx: Tx) -> dict[tuple[State, Reason | None], int]:
    """How many jobs are in each state, by what they wait for or ended for."""
    rows = tx.db.execute(
        "SELECT state, coalesce(waiting_reason, reason) AS why, count(*) AS jobs FROM job GROUP BY 1, 2"
    )
    return {(State(row["state"]), _reason(row["why"])): row["jobs"] for row in rows}


_FIND = """
SELECT * FROM job WHERE (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
ORDER BY seq DESC LIMIT :limit
"""
# "device = :device OR :device IS NULL" would use no index, and thousands of devices ask at start
_FIND_OF = """
SELECT * FROM job WHERE device = :device AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
ORDER BY seq DESC LIMIT :limit
"""
_INSERT = """
INSERT INTO job (
    id, device, component, release, desired_version, run, source, created, updated, deadline,
    state, revision, attempts, steps, trial_boots, touched, cancel,
    waiting_reason, waiting_until, waiting_detail, reason, detail,
    verified, fallback, no_fallback, done_bytes, total_bytes, retry_of
) VALUES (
    :id, :device, :component, :release, :desired_version, :run, :source, :created, :updated, :deadline,
    :state, :revision, :attempts, :steps, :trial_boots, :touched, :cancel,
    :waiting_reason, :waiting_until, :waiting_detail, :reason, :detail,
    :verified, :fallback, :no_fallback, :done_bytes, :total_bytes, :retry_of
)
"""
_UPDATE = """
UPDATE job SET
    updated = :updated, deadline = :deadline, state = :state, revision = :revision,
    attempts = :attempts, steps = :steps, trial_boots = :trial_boots, touched = :touched, cancel = :cancel,
    waiting_reason = :waiting_reason, waiting_until = :waiting_until, waiting_detail = :waiting_detail,
    reason = :reason, detail = :detail, verified = :verified, fallback = :fallback,
    no_fallback = :no_fallback, done_bytes = :done_bytes, total_bytes = :total_bytes
WHERE id = :id AND revision = :expected
"""


def _check_change(old: Job, new: Job) -> None:
    if _identity(old) != _identity(new):
        raise ValueError(
            f"job {old.id}: its identity cannot change, was {_identity(old)}, is {_identity(new)}"
        )
    if old.state.ended or (old.state is not new.state and new.state not in SUCCESSORS[old.state]):
        raise ValueError(f"job {old.id} cannot go from {old.state} to {new.state}")
    if new.state.ended and new.state is not State.SUCCEEDED and new.reason is None:
        raise ValueError(f"job {old.id} cannot be {new.state} without a reason")
    if old.touched and not new.touched:
        raise ValueError(f"job {old.id} has touched the device, which cannot be taken back")


def _identity(job: Job) -> tuple[object, ...]:
    return (
        job.id,
        job.device,
        job.component,
        job.release,
        job.desired_version,
        job.run,
        job.source,
        job.created,
        job.retry_of,
    )


def _compare_and_set(tx: Tx, old: Job, stored: Job) -> None:
    changed = tx.db.execute(_UPDATE, {**_to_row(stored), "expected": old.revision}).rowcount
    if changed != 1:
        raise Conflict(f"job {old.id} is no longer at revision {old.revision}")


def _remember(tx: Tx, from_state: State | None, job: Job, event: str, detail: str) -> None:
    reason = job.waiting.reason if job.waiting is not None else job.reason
    tx.db.execute(
        "INSERT INTO job_history (job, time, from_state, to_state, reason, event, detail)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [job.id, to_text(tx.now), from_state, job.state, reason, event, detail],
    )


def _run_exists(tx: Tx, job: Job) -> bool:
    found = tx.db.execute(
        "SELECT 1 FROM job WHERE device = ? AND component = ? AND desired_version = ? AND run = ?",
        [job.device, job.component, job.desired_version, job.run],
    ).fetchone()
    return found is not None


def _to_row(job: Job) -> dict[str, object]:
    waiting = job.waiting
    return {
        "id": job.id,
        "device": job.device,
        "component": job.component,
        "release": job.release,
        "desired_version": job.desired_version,
        "run": job.run,
        "source": job.source,
        "created": to_text(job.created),
        "updated": to_text(job.updated),
        "deadline": to_text(job.deadline),
        "state": job.state,
        "revision": job.revision,
        "attempts": job.attempts,
        "steps": job.steps,
        "trial_boots": job.trial_boots,
        "touched": int(job.touched),
        "cancel": job.cancel,
        "waiting_reason": None if waiting is None else waiting.reason,
        "waiting_until": None if waiting is None else to_text(waiting.until),
        "waiting_detail": "" if waiting is None else waiting.detail,
        "reason": job.reason,
        "detail": job.detail,
        "verified": job.verified,
        "fallback": None if job.fallback is None else json.dumps(asdict(job.fallback), sort_keys=True),
        "no_fallback": int(job.no_fallback),
        "done_bytes": job.done_bytes,
        "total_bytes": job.total_bytes,
        "retry_of": job.retry_of,
    }


def _one(rows: sqlite3.Cursor) -> Job | None:
    row = rows.fetchone()
    return None if row is None else _job(row)


def _reason(text: str | None) -> Reason | None:
    return None if text is None else Reason(text)


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"],
        device=row["device"],
        component=row["component"],
        release=row["release"],
        desired_version=row["desired_version"],
        run=row["run"],
        source=row["source"],
        created=from_text(row["created"]),
        updated=from_text(row["updated"]),
        deadline=from_text(row["deadline"]),
        state=State(row["state"]),
        revision=row["revision"],
        attempts=row["attempts"],
        steps=row["steps"],
        trial_boots=row["trial_boots"],
        touched=bool(row["touched"]),
        cancel=_reason(row["cancel"]),
        waiting=_waiting(row),
        reason=_reason(row["reason"]),
        detail=row["detail"],
        verified=row["verified"],
        fallback=None if row["fallback"] is None else Fallback(**json.loads(row["fallback"])),
        no_fallback=bool(row["no_fallback"]),
        done_bytes=row["done_bytes"],
        total_bytes=row["total_bytes"],
        retry_of=row["retry_of"],
    )


def _waiting(row: sqlite3.Row) -> Waiting | None:
    if row["waiting_until"] is None:
        return None
    return Waiting(Reason(row["waiting_reason"]), from_text(row["waiting_until"]), row["waiting_detail"])
