"""What may be said on the socket, and what may not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import Reason
from edged.helper.protocol import (
    CURES,
    MOST_DETAIL_CHARS,
    Refusal,
    Request,
    Verb,
    Why,
    is_version,
    parse,
    refused,
)

ROOT = Path(__file__).parents[2]


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_all_that_can_be_asked() -> None:
    assert parse(line(verb="status")) == Request(Verb.STATUS)
    assert parse(line(verb="rollback")) == Request(Verb.ROLLBACK)
    assert parse(line(verb="reboot")) == Request(Verb.REBOOT)
    assert parse(line(version="1.2.0", verb="upgrade")) == Request(Verb.UPGRADE, "1.2.0")
    assert [verb.value for verb in Verb] == ["status", "upgrade", "rollback", "reboot"]


@pytest.mark.parametrize(
    "text",
    [
        b"", b"null", b"[]", b'"status"', b"1", b"{}", b"{", b'{"verb": "status"} {}', b'{"verb": null}',
        b'{"verb": ["status"]}',
        b'{"verb": "Status"}', b'{"verb": "install"}', b'{"verb": "status", "version": "1"}',
        b'{"verb": "status", "path": "/x"}',
        b'{"verb": "rollback", "version": "1.0"}', b'{"verb": "upgrade"}', b'{"verb": "upgrade", "version": 1}',
        b'{"verb": "upgrade", "version": ["1.0"]}', b'{"verb": "upgrade", "version": "1.0", "options": "--force"}',
        b"\xff\xfe", b"[" * 1000, b'{"a":' * 200, b'{"verb": "status"}\x00', b"NaN", b"9" * 1000,
    ],
)  # fmt: skip
def test_whatever_else_is_refused(text: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        parse(text)
    assert caught.value.why is Why.REQUEST_INVALID
    assert len(json.loads(refused(caught.value.why, caught.value.detail))["detail"]) <= MOST_DETAIL_CHARS


@given(st.binary(max_size=1024))
def test_any_bytes_are_a_request_or_a_refusal(text: bytes) -> None:
    try:
        found = parse(text)
    except Refusal as exc:
        assert exc.why is Why.REQUEST_INVALID
    else:
        assert found.verb is not Verb.UPGRADE or is_version(found.version)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(["verb", "version", "path", ""]), JSON | st.sampled_from([*Verb]), max_size=4
    )
)
def test_any_object_is_a_request_or_a_refusal(fields: dict[str, Any]) -> None:
    try:
        found = parse(json.dumps(fields).encode())
    except Refusal as exc:
        assert exc.why is Why.REQUEST_INVALID
    else:
        assert set(fields) == ({"verb", "version"} if found.verb is Verb.UPGRADE else {"verb"})


@pytest.mark.parametrize(
    "text", ["1", "0.1.0", "1:2.3-4", "1.0~rc1", "1.0+deb12u1", "2026.01.02", "0.1.0~a+b.c-1"]
)
def test_versions(text: str) -> None:
    assert is_version(text)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "1 ", " 1", "1\n", "a", "v1", "-1", "1.0-", "1.0+", "1.0~", "1.0.", "1/2", "../1", "1=2", "1*", "1?",
        "1;reboot", "1$(x)",
        "1\x00", "1,2", ":1", "1:", "1:2:3", "é1", "١.0", "1" * 100, None, 1, True, ["1"], b"1",
    ],
)  # fmt: skip
def test_what_apt_or_a_file_name_would_read_otherwise_is_none(text: object) -> None:
    assert not is_version(text)


@given(st.text(max_size=80))
def test_a_version_has_no_character_that_means_something_elsewhere(text: str) -> None:
    if is_version(text):
        assert re.fullmatch(r"[0-9A-Za-z.+~:-]+", text) and text[0].isdecimal() and text[-1].isalnum()


# -- words


def test_every_reason_has_its_row_and_its_cure() -> None:
    page = (ROOT / "docs/node-upgrade.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE)
    assert [(why.value, CURES[why]) for why in Why] == [row for row in told if row[0] in list(Why)]
    assert set(CURES) == set(Why)


def test_the_same_thing_has_the_daemon_s_word() -> None:
    shared = {why.name for why in Why} & {reason.name for reason in Reason}
    assert shared >= {
        "NO_FALLBACK",
        "HASH_MISMATCH",
        "FETCH_FAILED",
        "DISK_FULL",
        "HEALTH_FAILED",
        "REVERT_FAILED",
    }
    assert all(Why[name].value == Reason[name].value for name in shared)
