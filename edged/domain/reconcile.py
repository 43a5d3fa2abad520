"""Level-triggered: compare what a device should run with what it runs, and say whether a job is to be made."""

from __future__ import annotations

from dataclasses import dataclass

from edged.api import JsonValue
from edged.domain.job import Job, State
from edged.domain.twin import Value
from edged.errors import Reason

FIRMWARE = "firmware"


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
    max_runs: int,
) -> MakeJob | CancelJob | None:
    """One device, one component.

    ``active`` is its unfinished job, ``last`` the newest ended job for the present desired version. An end state latches
    until desired changes or an operator retries; but a device that *succeeded* and then comes back with another
    version is brought back, at most ``max_runs`` times per desired version.
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
    drifted = last.state is State.SUCCEEDED and last.run < max_runs
    return MakeJob(wanted, desired.version, last.run + 1, "drift") if drifted else None
