"""Facts: what is read back is what was signed, and each field refuses what it must."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged_firmware.errors import Reason, Refused
from edged_firmware.facts import (
    COUNTER_MAX,
    FlashFacts,
    ReleaseFacts,
    ReleaseRef,
    Requirement,
    SignedTarget,
    VerifiedRelease,
)

FACTS = ReleaseFacts(
    name="blink",
    version="1.2.0+rc.1",
    models=("uno", "nano"),
    hardware_ids=("1E 95 0F",),
    release_counter=7,
    requires=(Requirement("radio", 3),),
    flash=FlashFacts("stk500v1", {"baud": 115200, "reset": True, "note": "slow"}),
    identifies_as="1.2.0",
    chunk_index="blink/1.2.0+rc.1/chunks",
    format="segments",
    source_sha256="ab" * 32,
)


def test_what_was_signed_is_read_back_through_json() -> None:
    custom = json.loads(json.dumps(FACTS.to_custom()))
    assert ReleaseFacts.from_custom(custom) == FACTS
    release = VerifiedRelease(
        FACTS,
        SignedTarget("blink/1.2.0+rc.1/image", 10, "cd" * 32),
        SignedTarget(FACTS.chunk_index, 20, "ef" * 32),
    )
    assert VerifiedRelease.from_json(json.loads(json.dumps(release.to_json()))) == release
    assert release.index.url_path == f"blink/1.2.0+rc.1/{'ef' * 32}.chunks"
    assert isinstance(hash(release), int)


def test_keys_of_a_later_publisher_are_left_alone() -> None:
    custom: dict[str, Any] = FACTS.to_custom()
    custom["edged"]["sbom"] = {"nested": [1, None]}
    custom["edged"]["flash"]["later"] = 1
    custom["other"] = "tool"
    assert ReleaseFacts.from_custom(custom) == FACTS


def test_optional_fields_have_defaults() -> None:
    custom: dict[str, Any] = FACTS.to_custom()
    for name in ("hardware_ids", "requires", "flash", "identifies_as"):
        del custom["edged"][name]
    facts = ReleaseFacts.from_custom(custom)
    assert (facts.hardware_ids, facts.requires, facts.flash) == ((), (), FlashFacts())
    assert facts.identifies_as == facts.version


BAD: list[tuple[str, object]] = [
    ("facts_version", 2),
    ("facts_version", True),
    ("facts_version", "1"),
    ("facts_version", None),
    ("name", "Blink"),
    ("name", "../x"),
    ("name", "a" * 65),
    ("name", "blink\n"),
    ("name", 5),
    ("version", ""),
    ("version", "1/2"),
    ("version", "1@2"),
    ("models", []),
    ("models", "uno"),
    ("models", ["uno", 3]),
    ("models", None),
    ("hardware_ids", ["\x00"]),
    ("hardware_ids", ["x" * 129]),
    ("release_counter", 0),
    ("release_counter", -1),
    ("release_counter", True),
    ("release_counter", 1.0),
    ("release_counter", COUNTER_MAX + 1),
    ("release_counter", None),
    ("requires", [{"component": "radio"}]),
    ("requires", [{"component": "RADIO!", "counter": 1}]),
    ("requires", [["radio", 1]]),
    ("requires", {}),
    ("flash", []),
    ("flash", {"protocol": "a b"}),
    ("flash", {"params": {"x": 1.5}}),
    ("flash", {"params": {"x": None}}),
    ("flash", {"params": [1]}),
    ("identifies_as", ""),
    ("identifies_as", "é"),
    ("chunk_index", "/etc/passwd"),
    ("chunk_index", "a/../b"),
    ("chunk_index", "a//b"),
    ("chunk_index", "a%2fb"),
    ("chunk_index", ""),
    ("chunk_index", None),
    ("format", "elf"),
    ("format", ["segments"]),
    ("source_sha256", "AB" * 32),
    ("source_sha256", "ab" * 31),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_field_is_refused_by_name(name: str, value: object) -> None:
    custom: dict[str, Any] = copy.deepcopy(FACTS.to_custom())
    custom["edged"][name] = value
    with pytest.raises(Refused) as refusal:
        ReleaseFacts.from_custom(custom)
    assert refusal.value.reason is Reason.FACTS_INVALID
    assert refusal.value.detail.startswith(name)
    assert len(refusal.value.detail) < 250


@pytest.mark.parametrize("custom", [{}, {"edged": None}, {"edged": []}, {"edged": {1: 2}}, {"edged": {}}])
def test_no_facts_at_all_are_refused(custom: dict[str, object]) -> None:
    with pytest.raises(Refused, match="facts_invalid"):
        ReleaseFacts.from_custom(custom)


@pytest.mark.parametrize(
    "text", ["", "blink", "@1", "blink@", "a@b@c", "a/b@1", "..@1", "blink@../x", "blink@1 "]
)
def test_a_reference_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        ReleaseRef.parse(text)


@given(
    st.from_regex(r"[a-z0-9][a-z0-9._-]{0,63}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9.+~_-]{0,63}", fullmatch=True),
)
def test_a_reference_is_read_back_from_its_text(name: str, version: str) -> None:
    ref = ReleaseRef(name, version)
    assert ReleaseRef.parse(str(ref)) == ref
    assert ".." not in ref.image_path.split("/")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(FACTS.to_custom()["edged"])), JSON)  # type: ignore[call-overload]
def test_whatever_json_stands_in_a_field_only_refused_is_raised(name: str, value: object) -> None:
    custom: dict[str, Any] = copy.deepcopy(FACTS.to_custom())
    custom["edged"][name] = value
    try:
        facts = ReleaseFacts.from_custom(custom)
    except Refused as refusal:
        assert refusal.reason is Reason.FACTS_INVALID
    else:
        assert ReleaseFacts.from_custom(facts.to_custom()) == facts


@pytest.mark.parametrize(
    ("path", "length", "sha256"),
    [
        ("a/../b", 1, "ab" * 32),
        ("a", -1, "ab" * 32),
        ("a", True, "ab" * 32),
        ("a", 1, ""),
        ("a", 1, "zz" * 32),
    ],
)
def test_a_signed_target_must_be_whole(path: str, length: int, sha256: str) -> None:
    with pytest.raises(Refused):
        SignedTarget(path, length, sha256)
