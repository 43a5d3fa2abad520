"""The job: one unit of durable work on one device. The record and its states; what to do next is in ``steps``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final

from edged.errors import Reason
from edged_firmware.facts import ParamValue


class State(StrEnum):
    """Where a job stands. ``WAITING`` is not a state: it is a column beside it (:class:`Waiting`).

    ::

        queued -> fetching -> ready -> staging -> activating -> verifying -> succeeded
        queued | fetching | ready                               -> failed | cancelled
        staging | activating | verifying  -> reverting          -> reverted | failed
        verifying                                               -> staging
    """

    QUEUED = "queued"
    FETCHING = "fetching"
    READY = "ready"
    STAGING = "staging"
    ACTIVATING = "activating"
    VERIFYING = "verifying"
    REVERTING = "reverting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REVERTED = "reverted"

    @property
    def ended(self) -> bool:
        return self in END_STATES


END_STATES = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED, State.REVERTED})
ACTIVE_STATES = frozenset(State) - END_STATES

SUCCESSORS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.FETCHING, State.FAILED, State.CANCELLED}),
    State.FETCHING: frozenset({State.READY, State.FAILED, State.CANCELLED}),
    # ready -> verifying: the device runs the release already, nothing is to be written
    State.READY: frozenset({State.STAGING, State.VERIFYING, State.FAILED, State.CANCELLED}),
    State.STAGING: frozenset({State.ACTIVATING, State.REVERTING}),
    State.ACTIVATING: frozenset({State.VERIFYING, State.REVERTING}),
    # verifying -> staging: the device has two slots, and is about to boot another image than the one that was judged
    State.VERIFYING: frozenset(
        {State.SUCCEEDED, State.STAGING, State.REVERTING, State.FAILED, State.CANCELLED}
    ),
    State.REVERTING: frozenset({State.REVERTED, State.FAILED}),
}


SILENT: Final = "nobody answers: "
"""How the detail of a wait for an absent device begins where its wire is there: only an answer ends it early, not the wire."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why nothing happens now, and until when at the latest."""

    reason: Reason
    until: datetime
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Fallback:
    """What is flashed when the new image is not good; verified on the node's disk before the first erase.

    ``image_sha256`` and ``index_sha256`` name artifacts. ``release`` is ``NAME@VERSION`` where it is known to be one,
    None where the device's flash was read out. ``params`` are the release's signed parameters of the flash protocol,
    ``identifies_as`` is what the device answers when it runs.
    """

    image_sha256: str
    index_sha256: str
    opaque: bool
    release: str | None
    params: Mapping[str, ParamValue] = field(default_factory=dict, hash=False)
    identifies_as: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row of the job table. ``revision`` rises with each change and is what a change compares and sets.

    ``attempts`` counts transient failures since the last progress; ``steps`` all steps of its life; ``trial_boots`` the
    times that the new image was booted. ``touched``: it was committed that the device is about to be changed.
    ``verified`` is ``VerifiedRelease.to_json()`` from the moment that trust accepted the release. ``no_fallback`` is the
    recorded permission to go on without one. ``done_bytes`` of ``total_bytes`` is the last checkpoint, for people:
    resuming asks the device.
    """

    id: str
    device: str
    component: str
    release: str
    desired_version: int
    run: int
    source: str
    created: datetime
    updated: datetime
    deadline: datetime
    state: State = State.QUEUED
    revision: int = 0
    attempts: int = 0
    steps: int = 0
    trial_boots: int = 0
    touched: bool = False
    cancel: Reason | None = None
    waiting: Waiting | None = None
    reason: Reason | None = None
    detail: str = ""
    verified: str | None = None
    fallback: Fallback | None = None
    no_fallback: bool = False
    done_bytes: int = 0
    total_bytes: int = 0
    retry_of: str | None = None
