"""``next_step``: the one decision of the engine, as a pure function of a job's row and the facts of this turn.

The engine does what it says, commits, and asks again. Nothing here knows how a step is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import TypeAlias

from edged.domain.job import Job, State
from edged.errors import Reason


class Do(Enum):
    """A step with effects. Each is idempotent: a power cut before its commit repeats it."""

    RESOLVE = auto()
    """Verify the release's metadata and admit it."""
    FETCH = auto()
    """Bring the image and its index to this node's disk."""
    ASK_DEVICE = auto()
    """Lease the session and ask the device what it is and what it runs."""
    SECURE_FALLBACK = auto()
    """Find what the device runs, and keep it on disk."""
    FETCH_FALLBACK = auto()
    """Bring the recorded fallback to this node's disk."""
    STAGE = auto()
    """Send the image, or find that the device holds it."""
    ACTIVATE = auto()
    """Boot what was staged."""
    CHECK_HEALTH = auto()
    """Judge the running image; healthy: confirm it."""
    REVERT = auto()
    """Two slots: tell the device to go back."""
    STAGE_FALLBACK = auto()
    """One slot: flash the fallback and boot it."""


@dataclass(frozen=True, slots=True)
class Move:
    """A change of state without an effect on the world. ``reason`` is the cause of a refusal, a revert or a failure."""

    to: State
    event: str
    reason: Reason | None = None
    detail: str = ""


Step: TypeAlias = Do | Move


@dataclass(frozen=True, slots=True)
class Bounds:
    """What ends a job that goes nowhere."""

    max_steps: int = 200
    max_trial_boots: int = 3


@dataclass(frozen=True, slots=True)
class View:
    """What the device says in this turn. ``runs_new`` is None where it cannot tell."""

    slot_count: int
    runs_new: bool | None
    confirmed: bool = True
    pending: bool = False

    @property
    def kept_old(self) -> bool:
        """Two slots: it runs what it ran before the job, and the next reset does not change that."""
        return self.slot_count > 1 and self.runs_new is False and not self.pending


@dataclass(frozen=True, slots=True)
class Facts:
    """What ``next_step`` may look at besides the row. ``device`` is None until it was asked in this turn.

    ``staged``: the session that is held now has staged the image. What another one staged may have been replaced since.
    """

    now: datetime
    image_on_disk: bool
    fallback_on_disk: bool
    device: View | None = None
    staged: bool = False
    bounds: Bounds = Bounds()


def next_step(job: Job, facts: Facts) -> Step | None:
    """The next step, or None where the job has ended.

    In this order: an ended job; the bounds and the operator's wish, which win over progress; then the state.
    """
    if job.state.ended:
        return None
    return _stop(job, facts) or _by_state(job, facts)


def _stop(job: Job, facts: Facts) -> Move | None:
    """Cancellation, deadline and step bound: before the first change an end, after it the way back."""
    cause = _cause_to_stop(job, facts)
    if cause is None:
        return None
    reason, detail = cause
    if job.state is State.REVERTING:
        return Move(State.FAILED, "gave up reverting", Reason.REVERT_FAILED, f"{reason}: {detail}")
    if job.touched:
        return Move(State.REVERTING, "revert", reason, detail)
    cancelled = reason in (Reason.CANCELLED, Reason.SUPERSEDED)
    return Move(State.CANCELLED if cancelled else State.FAILED, "ended", reason, detail)


def _cause_to_stop(job: Job, facts: Facts) -> tuple[Reason, str] | None:
    reverting = job.state is State.REVERTING
    if job.cancel is not None and not reverting and can_cancel(job):
        return (
            job.cancel,
            "before the device was changed" if not job.touched else "after the device was changed",
        )
    # reverting is the way to safety: it has as many steps again as the way there
    if job.steps >= facts.bounds.max_steps * (2 if reverting else 1):
        return Reason.STEPS_EXHAUSTED, f"{job.steps} steps"
    if facts.now >= job.deadline:
        return Reason.DEADLINE_PASSED, f"deadline {job.deadline.isoformat()}"
    return None


def can_cancel(job: Job) -> bool:
    """False where stopping now would leave a one-slot device between two images with nothing to go back to."""
    return not (job.touched and job.no_fallback)


def _by_state(job: Job, facts: Facts) -> Step:
    match job.state:
        case State.QUEUED:
            return Do.RESOLVE
        case State.FETCHING:
            return Move(State.READY, "image on disk") if facts.image_on_disk else Do.FETCH
        case State.READY | State.STAGING if not facts.image_on_disk:
            return Do.FETCH
        case State.READY:
            return _ready(job, facts)
        case State.STAGING:
            return Do.STAGE if facts.device else Do.ASK_DEVICE
        case State.ACTIVATING:
            return _activating(job, facts)
        case State.VERIFYING:
            return _verifying(job, facts)
        case _:
            return _reverting(job, facts)


def _ready(job: Job, facts: Facts) -> Step:
    device = facts.device
    if device is None:
        return Do.ASK_DEVICE
    if device.runs_new and not device.pending:
        return Move(State.VERIFYING, "runs already")
    if device.slot_count < 2 and not job.no_fallback:
        if job.fallback is None:
            return Do.SECURE_FALLBACK
        if not facts.fallback_on_disk:
            return Do.FETCH_FALLBACK
    return Move(State.STAGING, "staging")


def _activating(job: Job, facts: Facts) -> Step:
    device = facts.device
    if device is None:
        return Do.ASK_DEVICE
    if device.slot_count > 1 and device.runs_new and not device.pending:
        return Move(State.VERIFYING, "runs on trial")
    # The old image after a trial boot was committed: it was tried and left while we were off, or the power went before
    # it was booted at all. Nobody can tell, so it is booted again; the bound keeps that from going on for ever.
    if job.trial_boots >= facts.bounds.max_trial_boots:
        reverted = device.slot_count > 1 and not device.pending
        reason = Reason.DEVICE_REVERTED if reverted else Reason.ATTEMPTS_EXHAUSTED
        return Move(State.REVERTING, "revert", reason, f"{job.trial_boots} trial boots")
    if device.slot_count > 1 and not facts.staged:
        # it runs an application meanwhile, and others may have written to its free slot
        return Do.STAGE if facts.image_on_disk else Do.FETCH
    return Do.ACTIVATE


def _verifying(job: Job, facts: Facts) -> Step:
    device = facts.device
    if device is None:
        return Do.ASK_DEVICE
    if device.runs_new is False:
        detail = "the device runs another image than the one it was told to boot"
        if job.touched:
            return Move(State.REVERTING, "revert", Reason.DEVICE_REVERTED, detail)
        return Move(State.FAILED, "ended", Reason.DEVICE_REVERTED, detail)
    if device.slot_count > 1 and device.pending:
        # the next reset boots another image: what runs would be judged well, and not stay
        return Move(State.STAGING, "another image is pending") if facts.image_on_disk else Do.FETCH
    return Do.CHECK_HEALTH


def _reverting(job: Job, facts: Facts) -> Step:
    device = facts.device
    if device is None:
        return Do.ASK_DEVICE
    if device.slot_count > 1:
        # an old image on trial is one that the mapper went back to, and has not confirmed yet
        if device.kept_old and (device.confirmed or not job.trial_boots):
            if _never_ran(job):
                return Move(State.FAILED, "ended", job.reason, job.detail)
            return Move(State.REVERTED, "reverted", job.reason, job.detail)
        return Do.REVERT
    if job.fallback is None:
        detail = f"{job.detail}; there is no fallback to go back to".lstrip("; ")
        return Move(State.FAILED, "ended", job.reason, detail)
    return Do.STAGE_FALLBACK if facts.fallback_on_disk else Do.FETCH_FALLBACK


_IT_RAN = frozenset({Reason.HEALTH_FAILED, Reason.DEVICE_REVERTED})
_NOT_WANTED = frozenset({Reason.CANCELLED, Reason.SUPERSEDED})


def _never_ran(job: Job) -> bool:
    """Two slots: did the device not get to the new image at all? Then nothing was left, and nothing reverted.

    One that the boot loader threw away was to be booted, and did not run.
    """
    if job.reason is Reason.VERIFY_FAILED:
        return True
    return job.trial_boots == 0 and job.reason not in _IT_RAN | _NOT_WANTED
