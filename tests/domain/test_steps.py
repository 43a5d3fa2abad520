"""The table of ``next_step``, row by row, and what holds for every row."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from domain_kit import FALLBACK, NOW, job
from hypothesis import given
from hypothesis import strategies as st

from edged.domain.job import ACTIVE_STATES, END_STATES, SUCCESSORS, Job, State
from edged.domain.steps import Bounds, Do, Facts, Move, View, can_cancel, next_step
from edged.errors import Reason

BLIND = View(slot_count=1, runs_new=None)
ONE_OLD = View(slot_count=1, runs_new=False)
ONE_NEW = View(slot_count=1, runs_new=True)
TWO_OLD = View(slot_count=2, runs_new=False)
TWO_PENDING = View(slot_count=2, runs_new=False, pending=True)
TWO_TRIAL = View(slot_count=2, runs_new=True, confirmed=False)
TWO_OLD_ON_TRIAL = View(slot_count=2, runs_new=False, confirmed=False)
TWO_NEW_OTHER_PENDING = View(slot_count=2, runs_new=True, pending=True)


def facts(**changes: Any) -> Facts:
    fields: dict[str, Any] = {"now": NOW, "image_on_disk": True, "fallback_on_disk": True}
    return Facts(**fields | changes)


def touched(state: State, **changes: Any) -> Job:
    return job(state=state, touched=True, **{"fallback": FALLBACK} | changes)


@pytest.mark.parametrize(
    ("row", "seen", "expected"),
    [
        (job(), facts(image_on_disk=False), Do.RESOLVE),
        (job(state=State.FETCHING), facts(image_on_disk=False), Do.FETCH),
        (job(state=State.FETCHING), facts(), State.READY),
        (job(state=State.READY), facts(image_on_disk=False), Do.FETCH),
        (job(state=State.READY), facts(), Do.ASK_DEVICE),
        (job(state=State.READY), facts(device=ONE_NEW), State.VERIFYING),
        (job(state=State.READY), facts(device=TWO_TRIAL), State.VERIFYING),
        (job(state=State.READY), facts(device=TWO_NEW_OTHER_PENDING), State.STAGING),
        (job(state=State.READY), facts(device=BLIND), Do.SECURE_FALLBACK),
        (job(state=State.READY), facts(device=ONE_OLD), Do.SECURE_FALLBACK),
        (
            job(state=State.READY, fallback=FALLBACK),
            facts(device=BLIND, fallback_on_disk=False),
            Do.FETCH_FALLBACK,
        ),
        (job(state=State.READY, fallback=FALLBACK), facts(device=BLIND), State.STAGING),
        (
            job(state=State.READY, no_fallback=True),
            facts(device=BLIND, fallback_on_disk=False),
            State.STAGING,
        ),
        (job(state=State.READY), facts(device=TWO_OLD), State.STAGING),
        (touched(State.STAGING), facts(), Do.ASK_DEVICE),
        (touched(State.STAGING), facts(device=BLIND, image_on_disk=False), Do.FETCH),
        (touched(State.STAGING), facts(device=BLIND), Do.STAGE),
        (touched(State.ACTIVATING), facts(), Do.ASK_DEVICE),
        (touched(State.ACTIVATING), facts(device=BLIND), Do.ACTIVATE),
        (touched(State.ACTIVATING), facts(device=TWO_OLD), Do.STAGE),
        (touched(State.ACTIVATING), facts(device=TWO_OLD, image_on_disk=False), Do.FETCH),
        (touched(State.ACTIVATING), facts(device=TWO_OLD, staged=True), Do.ACTIVATE),
        (touched(State.ACTIVATING, trial_boots=1), facts(device=TWO_PENDING, staged=True), Do.ACTIVATE),
        (touched(State.ACTIVATING, trial_boots=1), facts(device=TWO_TRIAL), State.VERIFYING),
        (touched(State.ACTIVATING, trial_boots=1), facts(device=TWO_OLD, staged=True), Do.ACTIVATE),
        (touched(State.ACTIVATING), facts(device=TWO_NEW_OTHER_PENDING), Do.STAGE),
        (touched(State.ACTIVATING), facts(device=TWO_NEW_OTHER_PENDING, staged=True), Do.ACTIVATE),
        (
            touched(State.ACTIVATING, trial_boots=3),
            facts(device=TWO_OLD),
            (State.REVERTING, Reason.DEVICE_REVERTED),
        ),
        (
            touched(State.ACTIVATING, trial_boots=3),
            facts(device=BLIND),
            (State.REVERTING, Reason.ATTEMPTS_EXHAUSTED),
        ),
        (touched(State.VERIFYING), facts(), Do.ASK_DEVICE),
        (touched(State.VERIFYING), facts(device=BLIND), Do.CHECK_HEALTH),
        (touched(State.VERIFYING), facts(device=TWO_TRIAL), Do.CHECK_HEALTH),
        (touched(State.VERIFYING), facts(device=TWO_NEW_OTHER_PENDING), State.STAGING),
        (job(state=State.VERIFYING), facts(device=TWO_NEW_OTHER_PENDING), State.STAGING),
        (touched(State.VERIFYING), facts(device=TWO_NEW_OTHER_PENDING, image_on_disk=False), Do.FETCH),
        (touched(State.VERIFYING), facts(device=TWO_OLD), (State.REVERTING, Reason.DEVICE_REVERTED)),
        (job(state=State.VERIFYING), facts(device=TWO_OLD), (State.FAILED, Reason.DEVICE_REVERTED)),
        (touched(State.REVERTING), facts(), Do.ASK_DEVICE),
        (touched(State.REVERTING), facts(device=TWO_TRIAL), Do.REVERT),
        (touched(State.REVERTING), facts(device=TWO_PENDING), Do.REVERT),
        (touched(State.REVERTING, trial_boots=1), facts(device=TWO_OLD_ON_TRIAL), Do.REVERT),
        (
            touched(State.REVERTING, reason=Reason.IMAGE_INVALID),
            facts(device=TWO_OLD_ON_TRIAL),
            (State.FAILED, Reason.IMAGE_INVALID),
        ),
        (
            touched(State.REVERTING, reason=Reason.HEALTH_FAILED),
            facts(device=TWO_OLD),
            (State.REVERTED, Reason.HEALTH_FAILED),
        ),
        (
            touched(State.REVERTING, reason=Reason.CANCELLED),
            facts(device=TWO_OLD),
            (State.REVERTED, Reason.CANCELLED),
        ),
        (
            touched(State.REVERTING, reason=Reason.HASH_MISMATCH),
            facts(device=TWO_OLD),
            (State.FAILED, Reason.HASH_MISMATCH),
        ),
        (
            touched(State.REVERTING, reason=Reason.ATTEMPTS_EXHAUSTED, trial_boots=1),
            facts(device=TWO_OLD),
            (State.REVERTED, Reason.ATTEMPTS_EXHAUSTED),
        ),
        (
            touched(State.REVERTING, reason=Reason.VERIFY_FAILED, trial_boots=1),
            facts(device=TWO_OLD),
            (State.FAILED, Reason.VERIFY_FAILED),
        ),
        (touched(State.REVERTING, reason=Reason.VERIFY_FAILED), facts(device=TWO_PENDING), Do.REVERT),
        (touched(State.REVERTING), facts(device=BLIND), Do.STAGE_FALLBACK),
        (touched(State.REVERTING), facts(device=BLIND, fallback_on_disk=False), Do.FETCH_FALLBACK),
        (
            touched(State.REVERTING, fallback=None, reason=Reason.VERIFY_FAILED),
            facts(device=BLIND),
            (State.FAILED, Reason.VERIFY_FAILED),
        ),
    ],
)
def test_table(row: Job, seen: Facts, expected: Do | State | tuple[State, Reason]) -> None:
    step = next_step(row, seen)
    match expected:
        case Do():
            assert step is expected
        case State():
            assert isinstance(step, Move) and step.to is expected
        case (state, reason):
            assert isinstance(step, Move) and (step.to, step.reason) == (state, reason)


@pytest.mark.parametrize("state", sorted(ACTIVE_STATES))
@pytest.mark.parametrize("is_touched", [False, True])
def test_every_stop_leads_back_or_out(state: State, is_touched: bool) -> None:
    """Cancellation, deadline and step bound: an end before the first change, the way back after it."""
    row = job(state=state, touched=is_touched, fallback=FALLBACK)
    late = facts(now=row.deadline)
    step = next_step(row, late)
    assert isinstance(step, Move)
    if state is State.REVERTING:
        assert (step.to, step.reason) == (State.FAILED, Reason.REVERT_FAILED)
    elif is_touched:
        assert (step.to, step.reason) == (State.REVERTING, Reason.DEADLINE_PASSED)
    else:
        assert (step.to, step.reason) == (State.FAILED, Reason.DEADLINE_PASSED)


def test_cancelling() -> None:
    queued = next_step(job(cancel=Reason.CANCELLED), facts())
    staging = next_step(touched(State.STAGING, cancel=Reason.CANCELLED), facts())
    reverting = next_step(touched(State.REVERTING, cancel=Reason.CANCELLED), facts())
    assert isinstance(queued, Move) and queued.to is State.CANCELLED
    assert isinstance(staging, Move) and (staging.to, staging.reason) == (State.REVERTING, Reason.CANCELLED)
    assert reverting is Do.ASK_DEVICE


def test_without_a_way_back_a_cancellation_waits_for_the_end() -> None:
    row = touched(State.STAGING, cancel=Reason.CANCELLED, fallback=None, no_fallback=True)
    assert not can_cancel(row)
    assert next_step(row, facts(device=BLIND)) is Do.STAGE


def test_reverting_has_as_many_steps_again() -> None:
    bounds = Bounds(max_steps=10)
    assert isinstance(next_step(touched(State.STAGING, steps=10), facts(bounds=bounds)), Move)
    assert next_step(touched(State.REVERTING, steps=19), facts(bounds=bounds)) is Do.ASK_DEVICE
    last = next_step(touched(State.REVERTING, steps=20), facts(bounds=bounds))
    assert isinstance(last, Move) and last.reason is Reason.REVERT_FAILED


views = st.one_of(
    st.none(),
    st.builds(
        View,
        slot_count=st.sampled_from([1, 2]),
        runs_new=st.sampled_from([None, False, True]),
        confirmed=st.booleans(),
        pending=st.booleans(),
    ),
)
rows = st.builds(
    job,
    state=st.sampled_from(sorted(State)),
    touched=st.booleans(),
    cancel=st.sampled_from([None, Reason.CANCELLED, Reason.SUPERSEDED]),
    fallback=st.sampled_from([None, FALLBACK]),
    no_fallback=st.booleans(),
    trial_boots=st.integers(0, 4),
    steps=st.integers(0, 500),
    deadline=st.sampled_from([NOW, NOW + timedelta(days=1)]),
)


def _is_possible(row: Job) -> bool:
    """``touched`` comes with staging and stays."""
    before = {State.QUEUED, State.FETCHING, State.READY, State.CANCELLED}
    after = {State.STAGING, State.ACTIVATING, State.REVERTING, State.REVERTED}
    return not (row.touched and row.state in before) and not (not row.touched and row.state in after)


@given(
    row=rows.filter(_is_possible),
    image=st.booleans(),
    fallback=st.booleans(),
    staged=st.booleans(),
    view=views,
)
def test_every_step_is_legal(row: Job, image: bool, fallback: bool, staged: bool, view: View | None) -> None:
    """Ended rows rest; moves follow the picture of states; a touched device is never simply left; nothing is erased
    before the image, and on one slot the fallback, are on disk; with two slots only what this session staged is booted,
    and nothing is judged while another image is pending."""
    step = next_step(row, facts(image_on_disk=image, fallback_on_disk=fallback, staged=staged, device=view))
    if row.state in END_STATES:
        assert step is None
        return
    assert step is not None
    if isinstance(step, Move):
        assert step.to in SUCCESSORS[row.state]
        assert step.to is not State.CANCELLED or not row.touched
        assert step.to is not State.FAILED or not row.touched or row.state is State.REVERTING
        if step.to is State.STAGING:
            assert image and view is not None
            assert view.slot_count > 1 or row.no_fallback or (row.fallback is not None and fallback)
    if step is Do.STAGE:
        assert image
    if step is Do.STAGE_FALLBACK:
        assert row.fallback is not None and fallback
    if step is Do.ACTIVATE:
        assert row.trial_boots < Bounds().max_trial_boots
        assert view is not None and (staged or view.slot_count == 1)
    if step is Do.CHECK_HEALTH:
        assert view is not None and not (view.slot_count > 1 and view.pending)
