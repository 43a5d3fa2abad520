"""Rows for the tests of the pure rules."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from edged.domain.job import Fallback, Job

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
FALLBACK = Fallback("a" * 64, "b" * 64, opaque=False, release="blink@1.0.0")


def job(**changes: Any) -> Job:
    """A job in its first state, with ``changes``."""
    fields: dict[str, Any] = {
        "id": "01ARZ3NDEKTSV4RRFFQ69G5FAV",
        "device": "pump-1",
        "component": "firmware",
        "release": "blink@2.0.0",
        "desired_version": 1,
        "run": 1,
        "source": "operator",
        "created": NOW,
        "updated": NOW,
        "deadline": NOW + timedelta(days=7),
    }
    return Job(**fields | changes)
