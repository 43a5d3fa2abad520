"""When a device is told a wish, and when it is told again."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from edged.api import JsonValue
from edged.domain.twin import Value
from edged.domain.wishes import FIRST_PAUSE_S, LONGEST_PAUSE_S, Told, is_due, pause_s, told


def side(value: JsonValue, version: int = 1) -> Value:
    return Value(value, version, datetime(2026, 1, 1, tzinfo=UTC), "someone")


TAKEN = Told(1, 1, at=100.0, answer=30)
ROUNDED = Told(1, 1, at=100.0, answer=29.9)
REFUSED = Told(1, 1, at=100.0, refused="not now")


@pytest.mark.parametrize(
    ("wish", "reported", "before", "now", "due"),
    [
        (side(30), None, None, 0, True),
        (side(30), side(0), None, 0, True),
        (side(30), side(30), None, 0, False),
        (side(30), side(30), REFUSED, 1e9, False),
        # taken, and reported as it was taken
        (side(30), side(29.9), ROUNDED, 1e9, False),
        (side(30), None, ROUNDED, 1e9, False),
        # taken, and lost since
        (side(30), side(0), TAKEN, 109.9, False),
        (side(30), side(0), TAKEN, 110.0, True),
        # refused
        (side(30), side(0), REFUSED, 109.9, False),
        (side(30), side(0), REFUSED, 110.0, True),
        (side(30), None, REFUSED, 110.0, True),
        # another wish by now
        (side(31, version=2), side(0), REFUSED, 100.0, True),
        (side(31, version=2), side(29.9), ROUNDED, 100.0, True),
        # taken back: told once
        (side(None), side(0), None, 0, True),
        (side(None), side(0), Told(1, 1, at=100.0), 1e9, False),
    ],
)
def test_when_a_wish_is_due(
    wish: Value, reported: Value | None, before: Told | None, now: float, due: bool
) -> None:
    assert is_due(wish, reported, before, now) is due


def test_pauses_double_and_end_somewhere() -> None:
    pauses = [pause_s(times) for times in range(1, 2000)]
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses == sorted(pauses) and pauses[-1] == LONGEST_PAUSE_S


def test_a_new_wish_begins_anew() -> None:
    first = told(side(30), None, 1.0, refused="no")
    again = told(side(30), first, 2.0, answer=30)
    assert (again.times, again.at, again.refused, again.answer) == (2, 2.0, "", 30)
    assert told(side(31, version=2), again, 3.0).times == 1
