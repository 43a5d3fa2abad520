"""Tables of mappers: what each rule allows, and that a fault is one line with its path."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged import tables
from edged.tables import Rule


@dataclass(frozen=True, slots=True)
class Pin:
    number: int = tables.key(0, tables.whole(0, 40))
    pull: str = tables.key("none", tables.one_of("none", "up", "down"))


@dataclass(frozen=True, slots=True)
class Lamp:
    answer_s: float = tables.key(1.0, tables.seconds(0.05, 60))
    colours: tuple[str, ...] = tables.key((), tables.some_of("red", "green"))
    names: tuple[str, ...] = tables.key((), tables.list_of(tables.text("[a-z]+", "a name"), "names"))
    pin: Pin = tables.table(Pin(7, "up"))
    pins: tuple[Pin, ...] = tables.tables(Pin, required=("number",))
    by_name: Mapping[str, Pin] = tables.named_tables(Pin)
    units: Mapping[str, str] = tables.named_values(
        tables.text("[a-z]+", "a name"), tables.printable(8), "names and units"
    )


def faults(values: Mapping[str, object], **options: Any) -> list[str]:
    with pytest.raises(ValueError, match="found") as caught:
        tables.read(Lamp, values, **options)
    return str(caught.value).splitlines()


def test_an_empty_table_is_the_defaults() -> None:
    assert tables.read(Lamp, {}) == Lamp()
    assert hash(Lamp()) == hash(tables.read(Lamp, {"units": {"a": "V"}})), "a record can be a key"


def test_a_whole_table_is_a_record() -> None:
    found = tables.read(
        Lamp,
        {
            "answer_s": 2,
            "colours": ["green"],
            "names": ["a", "b"],
            "pin": {"number": 3},
            "pins": [{"number": 1}, {"number": 2, "pull": "down"}],
            "by_name": {"left": {"number": 9}},
            "units": {"level": "cd"},
        },
    )
    assert found == Lamp(
        2, ("green",), ("a", "b"), Pin(3, "up"), (Pin(1), Pin(2, "down")), {"left": Pin(9)}, {"level": "cd"}
    )


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"answer": 1}, "answer: found an unknown key; allowed: answer_s, by_name, colours"),
        ({"answer_s": "1"}, "answer_s: found '1'; allowed: a number of seconds from 0.05 to 60"),
        ({"colours": ["red", "red"]}, "colours: found ['red', 'red']; allowed: a list of 'red', 'green'"),
        ({"colours": "red"}, "colours: found 'red'; allowed: a list of"),
        ({"colours": [["red"]]}, "colours: found [['red']]; allowed: a list of"),
        ({"names": ["a", 5]}, "names: found ['a', 5]; allowed: a list of names"),
        ({"pin": 5}, "pin: found 5; allowed: a table"),
        ({"pin": {"number": 41}}, "pin.number: found 41; allowed: a whole number from 0 to 40"),
        ({"pin": {"pol": 1}}, "pin.pol: found an unknown key; allowed: number, pull"),
        ({"pins": {}}, "pins: found {}; allowed: a list of tables"),
        ({"pins": [5]}, "pins[0]: found 5; allowed: a table"),
        ({"pins": [{"pull": "up"}]}, "pins[0].number: found nothing; this key is required"),
        ({"by_name": []}, "by_name: found []; allowed: a table of tables"),
        ({"by_name": {"": {}}}, "by_name: found {'': {}}; allowed: a table of tables"),
        ({"by_name": {"a": {"pull": 1}}}, "by_name.a.pull: found 1; allowed: 'none' or 'up' or 'down'"),
        ({"units": {"A": "V"}}, "units: found {'A': 'V'}; allowed: a table of names and units"),
        ({"units": {"a": "V\n"}}, "units: found {'a': 'V\\n'}; allowed"),
    ],
)
def test_a_fault_is_one_line_with_its_path(values: Mapping[str, object], line: str) -> None:
    (found,) = faults(values)
    assert found.startswith(line)


def test_all_faults_are_told_at_once_and_no_fault_is_long() -> None:
    told = faults({"answer_s": "x" * 10_000, "pin": {"number": -1, "pull": 0}, "nonsense": 1})
    assert len(told) == 4 and max(map(len, told)) < 400


def test_a_table_may_have_fewer_keys_than_its_record() -> None:
    assert tables.read(Lamp, {"names": ["a"]}, without={"pin"}).names == ("a",)
    (found,) = faults({"pin": {}}, without={"pin"})
    assert found.startswith("pin: found an unknown key") and " pin," not in found


def test_what_keys_are_together_is_refused_line_by_line() -> None:
    tables.refuse([])
    with pytest.raises(ValueError, match=r"^a: found 1\nb: found 2$"):
        tables.refuse(iter(["a: found 1", "b: found 2"]))


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (tables.whole(1, 9), [1, 9], [0, 10, True, 1.0, "1", None, math.nan]),
        (tables.number(0, 1), [0, 1, 0.5], [-0.1, 1.1, True, math.nan, math.inf, "0"]),
        (tables.flag(), [True, False], [0, 1, "true", None]),
        (tables.one_of("a", "b"), ["a", "b"], ["c", "", None, ["a"]]),
        (tables.one_of(0, 8), [0, 8], [False, 8.0, "8"]),
        (tables.text("a+", "a"), ["a", "aa"], ["", "ab", "a\n", 5, None]),
        (tables.printable(3), ["", "abc", "ä"], ["abcd", "a\x1b", "\n", 5]),
        (tables.text("a", "a") | "", ["", "a"], ["b", False, 0]),
        (tables.whole(1, 9) | False, [False, 1], [0, True, "false"]),
        (tables.whole(1, 9) | 0, [0, 1], [False, 0.0]),
    ],
)
def test_what_rules_allow(rule: Rule, good: list[object], bad: list[object]) -> None:
    assert all(rule.holds(value) for value in good)
    assert not any(rule.holds(value) for value in bad)


def test_an_exception_is_said_in_words() -> None:
    assert (tables.whole(1, 9) | 0).allowed == "a whole number from 1 to 9, or 0"
    assert (tables.whole(1, 9) | False).allowed == "a whole number from 1 to 9, or false"
    assert (tables.text("a", "an a") | "").allowed == "an a, or empty"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["number", "pull", "a"]), inner)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Lamp.__dataclass_fields__, "odd"]), VALUES))
def test_whatever_a_table_holds_it_is_a_record_or_lines(values: dict[str, object]) -> None:
    try:
        assert isinstance(tables.read(Lamp, values), Lamp)
    except ValueError as error:
        assert all(re.match(r"\S.*: found ", line) for line in str(error).splitlines())


def test_the_example_of_the_page_reads_a_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "writing-a-mapper.md").read_text()
    (code,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "edged.tables" in part)
    names: dict[str, Any] = {"MapperSpec": lambda name, connect, parse_config: None, "connect": None}
    exec(code, names)  # noqa: S102 - the page's own words
    with pytest.raises(ValueError, match=re.escape(re.findall(r"`(answer_s: found .*?)`", page)[0])):
        tables.read(names["LampConfig"], {"answer_s": 0})
