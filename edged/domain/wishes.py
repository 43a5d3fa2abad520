"""When a device is told a desired property (again). Pure; times are of the monotonic clock, in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edged.api import JsonValue
from edged.domain.twin import Value

FIRST_PAUSE_S: Final = 10.0
LONGEST_PAUSE_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Told:
    """What came of telling a device the wish ``version`` last, at ``at``: ``answer`` is what it reported then, ``refused`` why
    it did not take it (empty: it did). ``times``: how often it was told this wish."""

    version: int
    times: int
    at: float
    answer: JsonValue = None
    refused: str = ""


def is_due(wish: Value, reported: Value | None, told: Told | None, now: float) -> bool:
    """Whether the device should be told ``wish``.

    A wish that it took is not told again while it reports what it answered then, which may be the value rounded to what it
    can hold; nor is one that was taken back. One that it refused, or took and has lost since, is: after a pause that doubles,
    since a value that does not stay must not wear out where it is written to.
    """
    if reported is not None and reported.value == wish.value:
        return False
    if told is None or told.version != wish.version:
        return True
    if wish.value is None or (not told.refused and (reported is None or reported.value == told.answer)):
        return False
    return now >= told.at + pause_s(told.times)


def pause_s(times: int) -> float:
    """From one time to the next."""
    return min(FIRST_PAUSE_S * 2.0 ** min(times - 1, 30), LONGEST_PAUSE_S)


def told(
    wish: Value, before: Told | None, now: float, *, answer: JsonValue = None, refused: str = ""
) -> Told:
    """The record of telling ``wish``, after ``before``."""
    times = before.times + 1 if before is not None and before.version == wish.version else 1
    return Told(wish.version, times, now, answer, refused)
