"""One job's row, and the only way to change it: row, history, audit, outbox and what hangs on them in ONE transaction."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from edged.api import JsonValue
from edged.domain.job import Job
from edged.domain.retry import PATIENT
from edged.engine.events import Broadcast
from edged.engine.observer import Observer
from edged.store import audit, jobs, outbox
from edged.store.database import Store, Tx

log = logging.getLogger(__name__)

Effect = Callable[[Tx], object]


MOST_DETAIL = 1000
"""Characters of a detail that are kept: a plugin's text may be of any length, and the audit trail is for ever."""


def fit(text: str) -> str:
    """``text`` as it can be stored and be shown: not too long, and nothing that has no encoding."""
    cut = text if len(text) <= MOST_DETAIL else f"{text[:MOST_DETAIL]}…"
    return cut.encode("utf-8", "replace").decode()


def _fitting(job: Job) -> Job:
    waiting = replace(job.waiting, detail=fit(job.waiting.detail)) if job.waiting else None
    return replace(job, detail=fit(job.detail), waiting=waiting)


class Ledger:
    """``job`` is the row as it was committed last, with what was counted since; ``row`` is it without that. ``sign`` signs
    the audit head when the job ends."""

    def __init__(
        self, job: Job, store: Store, sign: Callable[[bytes], bytes], broadcast: Broadcast, observer: Observer
    ) -> None:
        self.job = self.row = job
        self._store = store
        self._sign = sign
        self._broadcast = broadcast
        self._observer = observer

    async def commit(self, new: Job, event: str, *effects: Effect, detail: str = "") -> None:
        """Replace the row by ``new``; ``effects`` happen with it or not at all.

        Raises ``jobs.Conflict`` where somebody else changed the row; nothing is written then.
        """
        old, new, detail = self.job, _fitting(new), fit(detail)

        def change(tx: Tx) -> Job:
            saved = jobs.advance(tx, old, new, event, detail)
            data = summary(saved, event, detail)
            audit.append(tx, "engine", f"job.{event.replace(' ', '_')}", data)
            outbox.put(tx, "job", saved.device, saved.id, data, f"{saved.id}:{saved.revision}")
            for effect in effects:
                effect(tx)
            if saved.state.ended:
                audit.sign_head(tx, self._sign)
            return saved

        self.job = self.row = await self._store.write(change)
        self._broadcast.send(summary(self.job, event, detail))
        log.info("job %s", event, extra=log_fields(self.job, detail))
        if self.job.state.ended:
            self._observer.job_ended(self.job.state, self.job.reason)

    async def wait(self, new: Job, detail: str) -> None:
        """Commit that the job waits. A patient wait that goes on is told once: a device that is away for weeks must not
        fill the audit trail. Raises ``jobs.Conflict``."""
        row, why = self.row, new.waiting
        told = row.waiting is not None and why is not None and row.waiting.reason is why.reason
        if why is None or why.reason not in PATIENT or row.state is not new.state or not told:
            await self.commit(new, "waiting", detail=detail)
            return
        old, fitting = self.job, _fitting(new)
        self.job = self.row = await self._store.write(lambda tx: jobs.postpone(tx, old, fitting))

    async def checkpoint(self, done_bytes: int) -> None:
        """Commit progress alone. Raises ``jobs.Conflict``."""
        old = self.job
        self.job = self.row = await self._store.write(
            lambda tx: jobs.checkpoint(tx, old, done_bytes, old.total_bytes)
        )

    async def reload(self) -> bool:
        """Take the row as somebody else left it; False where nothing is to be done with it."""
        job_id = self.job.id
        fresh = await self._store.read(lambda tx: jobs.get(tx, job_id))
        if fresh is None:
            return False
        self.job = self.row = fresh
        return not fresh.state.ended


def summary(job: Job, event: str, detail: str) -> dict[str, JsonValue]:
    """What audit, outbox and watchers are told of a change."""
    return {
        "kind": "job",
        "event": event,
        "job": job.id,
        "device": job.device,
        "component": job.component,
        "release": job.release,
        "state": job.state.value,
        "reason": job.reason.value if job.reason else None,
        "waiting": job.waiting.reason.value if job.waiting else None,
        "detail": detail,
    }


def log_fields(job: Job, detail: str) -> dict[str, object]:
    """The fields of a log line about ``job``."""
    return {
        "job": job.id,
        "device": job.device,
        "release": job.release,
        "state": job.state.value,
        "reason": job.reason.value if job.reason else "",
        "detail": detail,
    }
