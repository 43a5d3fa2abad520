"""The twin's rules: how a property changes, and what differs between desired and reported.

A twin property has a name, a JSON value and an optional unit. Its desired and its reported side each have a version of
their own (+1 per change), a time and a source. The delta is computed, never stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from edged.api import JsonValue
from edged.errors import Reason, Refused


@dataclass(frozen=True, slots=True)
class Value:
    """One side (desired or reported) of one property. ``source`` says who set it: operator, uplink name, device, job."""

    value: JsonValue
    version: int
    time: datetime
    source: str
    unit: str | None = None


def change(
    old: Value | None,
    value: JsonValue,
    now: datetime,
    source: str,
    *,
    unit: str | None = None,
    version: int | None = None,
) -> Value:
    """The side after a write of ``value``; the same record where nothing changes, so that a repeat is free.

    ``version`` is a remote writer's own count. Raises ``Refused(STALE_VERSION)`` where it is older than what is stored.
    """
    held = old.version if old else 0
    if version is not None and version < held:
        raise Refused(Reason.STALE_VERSION, f"version {version} is older than the stored version {held}")
    if old is not None and old.value == value and old.unit == unit and (version is None or version == held):
        return old
    return Value(value, version if version is not None and version > held else held + 1, now, source, unit)


def delta(desired: Mapping[str, Value], reported: Mapping[str, Value]) -> dict[str, Value]:
    """The desired properties that the device does not report, or reports with another value."""
    return {
        name: wish
        for name, wish in desired.items()
        if name not in reported or reported[name].value != wish.value
    }
