"""Twin, retry, reconciling, admission, reasons: tables and properties."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from domain_kit import NOW, job
from hypothesis import given
from hypothesis import strategies as st

from edged.api import Device, Identity, Segment, Slot
from edged.domain import admission, reasons
from edged.domain.job import State
from edged.domain.reconcile import (
    DRIFT_WINDOW,
    CancelJob,
    LeftAlone,
    MakeJob,
    firmware_value,
    reconcile,
    release_of,
)
from edged.domain.retry import Again, Exhausted, RetryPolicy, decide
from edged.domain.twin import Value, change, delta
from edged.errors import Reason, Refused, Transient
from edged_firmware.facts import FlashFacts, ReleaseFacts, Requirement

values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


# -- twin


@given(st.lists(values, min_size=1, max_size=12))
def test_versions_rise_by_one_per_change_and_only_then(history: list[Any]) -> None:
    side: Value | None = None
    for value in history:
        before = side
        side = change(side, value, NOW, "operator")
        if before is not None and before.value == value:
            assert side is before
        else:
            assert side.version == (before.version if before else 0) + 1
            assert side.value == value


def test_a_stale_version_is_refused_and_a_newer_one_taken() -> None:
    held = Value(1, 7, NOW, "cloud")
    with pytest.raises(Refused) as caught:
        change(held, 2, NOW, "cloud", version=6)
    assert caught.value.reason is Reason.STALE_VERSION
    assert change(held, 2, NOW, "cloud", version=9).version == 9
    assert change(held, 1, NOW, "cloud", version=7) is held


@given(st.dictionaries(st.sampled_from("abc"), values), st.dictionaries(st.sampled_from("abc"), values))
def test_delta_is_what_differs(desired: dict[str, Any], reported: dict[str, Any]) -> None:
    wishes = {name: Value(value, 1, NOW, "operator") for name, value in desired.items()}
    held = {name: Value(value, 4, NOW, "device") for name, value in reported.items()}
    found = delta(wishes, held)
    assert set(found) == {name for name in desired if name not in reported or reported[name] != desired[name]}
    assert delta(wishes, {**held, **wishes}) == {}


# -- retry


@given(st.integers(0, 50), st.booleans(), st.sampled_from(sorted(Reason)))
def test_waits_are_bounded_and_grow(attempts: int, progressed: bool, reason: Reason) -> None:
    policy = RetryPolicy(max_attempts=8, first_s=1, longest_s=60)
    verdict = decide(policy, attempts, Transient(reason), NOW, progressed=progressed)
    if isinstance(verdict, Exhausted):
        assert attempts + 1 >= 8 and not progressed
        return
    assert isinstance(verdict, Again)
    wait = verdict.waiting.until - NOW
    assert timedelta(seconds=1) <= wait <= timedelta(seconds=60)
    assert verdict.waiting.reason is reason
    assert verdict.attempts == (1 if progressed else attempts + 1)


def test_an_absent_device_is_waited_for_and_a_failing_one_is_not() -> None:
    policy = RetryPolicy(max_attempts=3)
    absent = decide(policy, 1000, Transient(Reason.DEVICE_ABSENT), NOW, progressed=False)
    failing = decide(policy, 2, Transient(Reason.NO_RESPONSE), NOW, progressed=False)
    hiccup = Transient(Reason.NO_RESPONSE)
    back = decide(policy, 1000, hiccup, NOW, progressed=False, waited=Reason.DEVICE_ABSENT)
    assert isinstance(back, Again) and back.attempts == 1, (
        "the first failure after a wait for the world is the first"
    )
    again = decide(policy, 2, hiccup, NOW, progressed=False, waited=Reason.NO_RESPONSE)
    assert isinstance(again, Exhausted)
    assert isinstance(absent, Again)
    assert isinstance(failing, Exhausted)


# -- reconciling

WISH = Value(firmware_value("blink@2.0.0"), 3, NOW, "operator")
HAS = Value(firmware_value("blink@2.0.0"), 8, NOW, "health")
OTHER = Value(firmware_value("blink@1.0.0"), 8, NOW, "health")


@pytest.mark.parametrize(
    ("desired", "reported", "active", "last", "expected"),
    [
        (None, None, None, None, None),
        (WISH, HAS, None, None, None),
        (WISH, None, None, None, MakeJob("blink@2.0.0", 3, 1, "operator")),
        (WISH, OTHER, None, None, MakeJob("blink@2.0.0", 3, 1, "operator")),
        # an end state latches ...
        (WISH, OTHER, None, job(state=State.FAILED, desired_version=3), None),
        (WISH, OTHER, None, job(state=State.REVERTED, desired_version=3), None),
        (WISH, OTHER, None, job(state=State.CANCELLED, desired_version=3), None),
        # ... but a device that succeeded and comes back with another version is brought back, so many times
        (
            WISH,
            OTHER,
            None,
            job(state=State.SUCCEEDED, desired_version=3),
            MakeJob("blink@2.0.0", 3, 2, "drift"),
        ),
        # an active job for the wish is left alone, one for an old wish is cancelled before the first change only
        (WISH, OTHER, job(desired_version=3), None, None),
        (WISH, OTHER, job(desired_version=2), None, CancelJob(job(desired_version=2))),
        (WISH, OTHER, job(desired_version=2, touched=True, state=State.STAGING), None, None),
        (WISH, OTHER, job(desired_version=2, cancel=Reason.CANCELLED), None, None),
        (None, OTHER, job(desired_version=2), None, CancelJob(job(desired_version=2))),
        (Value(None, 4, NOW, "operator"), OTHER, None, None, None),
    ],
)
def test_reconcile(desired: Any, reported: Any, active: Any, last: Any, expected: Any) -> None:
    assert reconcile(desired, reported, active, last, (), NOW, max_runs=3) == expected


HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("hours_ago", "expected"),
    [
        ((), MakeJob("blink@2.0.0", 3, 10, "drift")),
        ((1, 2), MakeJob("blink@2.0.0", 3, 10, "drift")),
        ((1, 2, 3), LeftAlone("blink@2.0.0", 3)),
        ((0, 0, 23), LeftAlone("blink@2.0.0", 3)),
        # long ago is forgotten, and so is what a wrong clock wrote
        ((1, 2, 24), MakeJob("blink@2.0.0", 3, 10, "drift")),
        ((-9000, -9000, -9000), MakeJob("blink@2.0.0", 3, 10, "drift")),
    ],
)
def test_a_device_is_brought_back_so_many_times_within_a_day(
    hours_ago: tuple[int, ...], expected: Any
) -> None:
    last = job(state=State.SUCCEEDED, desired_version=3, run=9)
    times = [NOW - hours * HOUR for hours in hours_ago]
    assert reconcile(WISH, OTHER, None, last, times, NOW, max_runs=3) == expected
    assert reconcile(WISH, HAS, None, last, times, NOW, max_runs=3) is None
    failed = replace(last, state=State.REVERTED)
    assert reconcile(WISH, OTHER, None, failed, times, NOW, max_runs=3) is None


@given(st.lists(st.integers(0, 40), max_size=40), st.integers(1, 4))
def test_drift_is_bounded_within_a_day_and_never_given_up_for_good(
    pauses_h: list[int], max_runs: int
) -> None:
    now, made = NOW, list[datetime]()
    for pause_h in pauses_h:
        now += pause_h * HOUR
        last = job(state=State.SUCCEEDED, desired_version=3, run=1 + len(made))
        lately = made[-max_runs:]
        found = reconcile(WISH, OTHER, None, last, lately, now, max_runs)
        full = len(lately) == max_runs and now - lately[0] < DRIFT_WINDOW
        assert isinstance(found, LeftAlone) == full
        if isinstance(found, MakeJob):
            made.append(now)
    for first, later in zip(made, made[max_runs:], strict=False):
        assert later - first >= DRIFT_WINDOW


def test_firmware_value_round_trip() -> None:
    assert release_of(firmware_value("blink@1.2.0")) == "blink@1.2.0"
    assert release_of(None) is None
    assert release_of({"name": "blink"}) is None
    assert release_of({"name": 1, "version": 2}) is None


# -- admission

FACTS = ReleaseFacts(
    name="blink",
    version="2.0.0",
    models=("uno",),
    hardware_ids=("avr:1e950f",),
    release_counter=5,
    requires=(Requirement("radio", 3),),
    flash=FlashFacts("stk500v1"),
    identifies_as="2.0.0",
    chunk_index="blink/2.0.0/chunks",
    format="segments",
    source_sha256="0" * 64,
)
DEVICE = Device("pump-1", "uno", "uart-stk500", "serial:/dev/ttyUSB0", ("avr:1e950f",), 0, 32256)
KNOWN = admission.Admission(DEVICE, 5, {"radio": 3}, frozenset({"stk500v1"}))


def test_admitted() -> None:
    admission.admit(FACTS, KNOWN)


@pytest.mark.parametrize(
    ("slot", "expected"),
    [
        (None, None),
        (Slot("a", True), None),
        (Slot("a", True, runs="4.2.0"), True),
        (Slot("a", True, runs="4.1.0"), False),
        (Slot("a", True, runs="4.2.0", runs_name=FACTS.name), True),
        (Slot("a", True, runs="4.2.0", runs_name="another"), False),
        (Slot("a", True, runs_name=FACTS.name), None),
    ],
)
def test_a_version_of_another_name_is_another_release(slot: Slot | None, expected: bool | None) -> None:
    assert admission.runs(replace(FACTS, identifies_as="4.2.0"), slot) is expected


@pytest.mark.parametrize(
    ("facts", "known", "reason"),
    [
        (replace(FACTS, models=("mega",)), KNOWN, Reason.MODEL_MISMATCH),
        (replace(FACTS, hardware_ids=("avr:1e9801",)), KNOWN, Reason.HARDWARE_MISMATCH),
        (replace(FACTS, flash=FlashFacts("smp")), KNOWN, Reason.PROTOCOL_MISMATCH),
        (FACTS, replace(KNOWN, floor=6), Reason.COUNTER_LOWER),
        (FACTS, replace(KNOWN, component_counters={"radio": 2}), Reason.REQUIRES_UNMET),
        (FACTS, replace(KNOWN, component_counters={}), Reason.REQUIRES_UNMET),
    ],
)
def test_not_admitted(facts: ReleaseFacts, known: admission.Admission, reason: Reason) -> None:
    with pytest.raises(Refused) as caught:
        admission.admit(facts, known)
    assert caught.value.reason is reason
    assert "pump-1" in caught.value.detail or "blink" in caught.value.detail


def test_the_device_that_answers_must_be_the_one_that_is_meant() -> None:
    admission.check_identity(DEVICE, FACTS.hardware_ids, Identity("avr:1e950f"))
    with pytest.raises(Refused) as caught:
        admission.check_identity(DEVICE, FACTS.hardware_ids, Identity("avr:1e9801"))
    assert caught.value.reason is Reason.HARDWARE_MISMATCH
    admission.check_identity(replace(DEVICE, hardware_ids=()), (), Identity("anything"))


@given(st.integers(0, 40_000), st.integers(1, 40_000))
def test_what_leaves_the_flash_is_refused(address: int, length: int) -> None:
    fits = address + length <= 32256
    try:
        admission.check_bounds(DEVICE, (Segment(address, length),))
    except Refused as exc:
        assert not fits and exc.reason is Reason.IMAGE_TOO_LARGE
    else:
        assert fits


# -- reasons


@pytest.mark.parametrize("reason", sorted(Reason))
def test_every_reason_has_a_kind_and_an_exit_code(reason: Reason) -> None:
    refused = reasons.kind(reason) is reasons.Kind.REFUSED
    assert reasons.exit_code(reason) == (3 if refused else 1)
    assert not reasons.cure(reason).endswith(".")


def test_success_is_zero() -> None:
    assert reasons.exit_code(None) == 0
