"""What the contract itself does; the rest of it are records and Protocols."""

from __future__ import annotations

import pytest

from edged.api import JsonValue, as_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (False, "false"),
        (None, "null"),
        (7, "7"),
        (12.5, "12.5"),
        ("12.5", "12.5"),
        ("läuft", "läuft"),
        ([1, "ä"], '[1, "ä"]'),
        ({"on": True}, '{"on": true}'),
    ],
)
def test_a_value_has_one_text(value: JsonValue, text: str) -> None:
    assert as_text(value) == text
