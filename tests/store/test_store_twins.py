from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import START, HandClock, raw, read, write

from edged.api import JsonValue, Reported
from edged.domain.twin import Value
from edged.errors import Reason, Refused
from edged.store import twins

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "edged.db"


def test_nothing_was_said_of_it(path: Path) -> None:
    assert read(path, lambda tx: twins.get(tx, "uno")) == twins.Twin()
    assert read(path, twins.all) == {}


def test_both_sides_have_versions_of_their_own(path: Path) -> None:
    write(
        path,
        lambda tx: twins.set_desired(tx, "uno", "led", True, "operator"),
        lambda tx: twins.set_desired(tx, "uno", "led", False, "operator"),
        lambda tx: twins.set_reported(tx, "uno", "led", True, "device"),
        lambda tx: twins.set_reported(tx, "uno", "t", 20.5, "device", unit="Cel"),
        lambda tx: twins.set_reported(tx, "mega", "t", 1, "device", time=START - timedelta(hours=1)),
    )
    twin = read(path, lambda tx: twins.get(tx, "uno"))
    assert twin.desired == {"led": Value(False, 2, START, "operator")}
    assert twin.reported == {
        "led": Value(True, 1, START, "device"),
        "t": Value(20.5, 1, START, "device", "Cel"),
    }
    both = read(path, twins.all)
    assert both["uno"] == twin
    assert both["mega"].reported["t"].time == START - timedelta(hours=1)


def test_a_repeat_writes_nothing(path: Path) -> None:
    clock = HandClock()
    (first,) = write(path, lambda tx: twins.set_desired(tx, "uno", "led", True, "operator"), clock=clock)
    clock.moment += timedelta(hours=1)

    changes = write(
        path,
        lambda tx: (
            tx.db.conn.total_changes,
            twins.set_desired(tx, "uno", "led", True, "cloud"),
            tx.db.conn.total_changes,
        ),
        clock=clock,
    )
    before, again, after = changes[0]
    assert again == first
    assert before == after


def test_a_stale_version_of_a_cloud_is_refused(path: Path) -> None:
    write(path, lambda tx: twins.set_desired(tx, "uno", "led", True, "cloud", version=7))
    with pytest.raises(Refused) as caught:
        write(path, lambda tx: twins.set_desired(tx, "uno", "led", False, "cloud", version=6))
    assert caught.value.reason is Reason.STALE_VERSION
    twin = read(path, lambda tx: twins.get(tx, "uno"))
    assert twin.desired["led"] == Value(True, 7, START, "cloud")


def test_many_values_at_once_tell_what_changed(path: Path) -> None:
    first = [Reported("a", 1), Reported("b", 2, "V"), Reported("a", 3)]
    (changed, again) = write(
        path,
        lambda tx: twins.set_reported_many(tx, "uno", first, "device"),
        lambda tx: twins.set_reported_many(tx, "uno", [Reported("a", 3), Reported("b", 2)], "device"),
    )
    assert {name: (v.value, v.version) for name, v in changed.items()} == {"a": (3, 2), "b": (2, 1)}
    assert {name: (v.unit, v.version) for name, v in again.items()} == {"b": (None, 2)}


def test_what_json_has_no_word_for_is_no_value(path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write(path, lambda tx: twins.set_reported(tx, "uno", "t", float("nan"), "device"))


def test_the_schema_takes_only_json_and_known_sides(path: Path) -> None:
    write(path, lambda tx: twins.set_reported(tx, "uno", "t", 1, "device"))
    with raw(path) as conn:
        with pytest.raises(Exception, match="CHECK"):
            conn.execute("UPDATE twin SET value = 'nan'")
        with pytest.raises(Exception, match="CHECK"):
            conn.execute("UPDATE twin SET side = 'wished'")


def test_a_twin_can_be_forgotten(path: Path) -> None:
    steps = [
        lambda tx: twins.set_reported(tx, "uno", "t", 1, "device"),
        lambda tx: twins.set_desired(tx, "uno", "t", 1, "operator"),
        lambda tx: twins.set_desired(tx, "mega", "t", 1, "operator"),
        lambda tx: twins.forget(tx, "uno"),
    ]
    assert write(path, *steps)[-1] == 2
    assert list(read(path, twins.all)) == ["mega"]


@settings(max_examples=40, deadline=None)
@given(value=JSON)
def test_any_json_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: JsonValue) -> None:
    path = tmp_path_factory.mktemp("twin") / "edged.db"
    _, found, again = write(
        path,
        lambda tx: twins.set_reported(tx, "uno", "v", value, "device"),
        lambda tx: twins.get(tx, "uno").reported["v"],
        lambda tx: twins.set_reported(tx, "uno", "v", value, "device"),
    )
    assert found.value == value
    assert again.version == 1
