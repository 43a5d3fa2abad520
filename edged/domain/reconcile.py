"""Level-triggered: compare what a device should run with what it runs, and say whether a job is to be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from edged.api import JsonValue
from edged.domain.job import Job, State
from edged.domain.twin import Value
from edged.errors import Reason

FIRMWARE = "firmware"
DRIFT = "drift"
"""The source of a job that brings a device back."""
DRIFT_WINDOW = timedelta(days=1)
"""Within this time ``max_runs`` jobs bring a device back; then a person has to look."""


@dataclass(frozen=True, slots=True)
class MakeJob:
    """A new job for the desired version; ``run`` counts the jobs of one desired version."""

    release: str
    desired_version: int
    run: int
    source: str


@dataclass(frozen=True, slots=True)
class CancelJob:
    """The active job is for a wish that was taken back or changed before the device was touched."""

    job: Job
    reason: Reason = Reason.SUPERSEDED


@dataclass(frozen=True, slots=True)
class LeftAlone:
    """The device runs something else than it should and is not brought back any more: it was, ``runs`` times lately."""

    release: str
    runs: int
    reason: Reason = Reason.RUNS_EXHAUSTED

    @property
    def detail(self) -> str:
        hours = DRIFT_WINDOW.total_seconds() / 3600
        return f"was brought back to {self.release} {self.runs} times within {hours:.0f} h and came back with another version"


def release_of(value: JsonValue) -> str | None:
    """``NAME@VERSION`` of a firmware property's value, None where it is null or not of that form."""
    if not isinstance(value, dict):
        return None
    name, version = value.get("name"), value.get("version")
    return f"{name}@{version}" if isinstance(name, str) and isinstance(version, str) else None


def firmware_value(release: str) -> JsonValue:
    """The inverse of :func:`release_of`, as it stands in the twin."""
    name, _, version = release.partition("@")
    return {"name": name, "version": version}


def reconcile(
    desired: Value | None,
    reported: Value | None,
    active: Job | None,
    last: Job | None,
    brought_back: Sequence[datetime],
    now: datetime,
    max_runs: int,
) -> MakeJob | CancelJob | LeftAlone | None:
    """One device, one component.

    ``active`` is its unfinished job, ``last`` the newest ended job for the present desired version. An end state latches
    until desired changes or an operator retries; but a device that *succeeded* and then comes back with another
    version is brought back, at most ``max_runs`` times within :data:`DRIFT_WINDOW`. ``brought_back``: when that was done
    since somebody asked for this version last.
    """
    wanted = release_of(desired.value) if desired else None
    if active is not None:
        stale = desired is None or active.desired_version != desired.version
        return CancelJob(active) if stale and not active.touched and active.cancel is None else None
    if desired is None or wanted is None:
        return None
    if reported is not None and release_of(reported.value) == wanted:
        return None
    if last is None:
        return MakeJob(wanted, desired.version, 1, desired.source)
    if last.state is not State.SUCCEEDED:
        return None
    # what lies in the future was counted by a clock that was wrong
    runs = sum(now - DRIFT_WINDOW < time <= now for time in brought_back)
    if runs >= max_runs:
        return LeftAlone(wanted, runs)
    return MakeJob(wanted, desired.version, last.run + 1, DRIFT)
