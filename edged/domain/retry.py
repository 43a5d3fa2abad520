"""When to try again. The job row remembers; nothing else in the daemon retries."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from edged.domain.job import Waiting
from edged.errors import Reason, Transient

PATIENT = frozenset(
    {Reason.DEVICE_ABSENT, Reason.DEVICE_BUSY, Reason.LINK_BUSY, Reason.FETCH_FAILED, Reason.DISK_FULL}
)
"""Waiting for the world, not failing at the work: bounded by the job's deadline, not by its attempts."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Back-off doubles from ``first_s`` up to ``longest_s``; ``max_attempts`` failures in a row without progress end it."""

    max_attempts: int = 8
    first_s: float = 1.0
    longest_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Again:
    """Try again after the wait; ``attempts`` is the new count of failures since the last progress."""

    attempts: int
    waiting: Waiting


@dataclass(frozen=True, slots=True)
class Exhausted:
    """The bound is reached; ``attempts`` failures in a row."""

    attempts: int


def decide(
    policy: RetryPolicy,
    attempts: int,
    error: Transient,
    now: datetime,
    *,
    progressed: bool,
    waited: Reason | None = None,
) -> Again | Exhausted:
    """What follows a transient ``error`` when ``attempts`` failures came before it.

    ``progressed``: this try got further than any before, so that the count starts anew. ``waited``: what the wait before
    this try was for; a wait for the world was no failure at the work, so that the first failure after it counts as the
    first. Patient reasons wait at most ``longest_s`` each and never exhaust.
    """
    anew = progressed or (waited in PATIENT and error.reason not in PATIENT)
    count = 1 if anew else attempts + 1
    if count >= policy.max_attempts and error.reason not in PATIENT:
        return Exhausted(count)
    delay = min(policy.first_s * 2 ** min(count - 1, 30), policy.longest_s)
    return Again(count, Waiting(error.reason, now + timedelta(seconds=delay), error.detail))
