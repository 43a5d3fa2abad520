"""A mapper's own table of the configuration as a frozen record: each key with its default and with what is allowed. Pure.

    @dataclass(frozen=True, slots=True)
    class LampConfig:
        answer_s: float = key(1.0, seconds(0.05, 60))
        colour: str = key("white", one_of("white", "red"))

    MapperSpec("lamp", connect, parse_config=partial(read, LampConfig))

``connect`` finds the record in ``device.config``; a link's ``open`` in ``env.config``. Every fault of a table is one line
of the ValueError: the key, what was found, what is allowed; reading goes on after each, so that all are told at once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

T = TypeVar("T")

_RULE: Final = "rule"
_MOST_SHOWN: Final = 200
"""So many characters of a value are shown: a table may hold a whole file by mistake."""


@dataclass(frozen=True, slots=True)
class Rule:
    """``allowed`` is that in words, as in "allowed: a whole number from 1 to 9"; ``holds`` says whether a value is one."""

    allowed: str
    holds: Callable[[Any], bool]

    def __or__(self, other: str | int) -> Rule:
        """This, or one value beside it, such as the one that says "none"."""
        word = {"": "empty", "False": "false"}.get(str(other), str(other))
        return Rule(f"{self.allowed}, or {word}", lambda value: _is(value, other) or self.holds(value))

    def read(self, value: object, path: str, default: Any, faults: list[str]) -> Any:
        """``value`` where it is allowed, a list as a tuple; else ``default`` and one more fault."""
        if not self.holds(value):
            faults.append(_fault(path, value, self.allowed))
            return default
        return tuple(value) if isinstance(value, list) else value


class _Reader(Protocol):
    def read(self, value: object, path: str, default: Any, faults: list[str]) -> Any: ...


def whole(low: int, high: int) -> Rule:
    """A whole number within these bounds."""
    return Rule(
        f"a whole number from {low} to {high}", lambda value: _is_whole(value) and low <= value <= high
    )


def number(low: float, high: float, what: str = "a number") -> Rule:
    """A number within these bounds."""
    return Rule(
        f"{what} from {low:g} to {high:g}",
        lambda value: (_is_whole(value) or isinstance(value, float)) and low <= value <= high,
    )


def seconds(low: float, high: float) -> Rule:
    """A time within these bounds."""
    return number(low, high, "a number of seconds")


def flag() -> Rule:
    """True or false."""
    return Rule("true or false", lambda value: isinstance(value, bool))


def one_of(*choices: str | int) -> Rule:
    """One of these."""
    return Rule(
        " or ".join(map(repr, choices)),
        lambda value: any(_is(value, choice) for choice in choices),
    )


def text(pattern: str, allowed: str) -> Rule:
    """A text that matches all of ``pattern``, which ``allowed`` says in words."""
    fits = re.compile(pattern).fullmatch
    return Rule(allowed, lambda value: isinstance(value, str) and fits(value) is not None)


def printable(most: int = 255) -> Rule:
    """A text without control characters, of at most so many."""
    return Rule(
        f"a text of at most {most} characters",
        lambda value: isinstance(value, str) and len(value) <= most and (value.isprintable() or not value),
    )


def some_of(*choices: str) -> Rule:
    """A list of some of these."""
    return Rule(
        f"a list of {', '.join(map(repr, choices))}, each once",
        lambda value: (
            isinstance(value, list) and all(one in choices for one in value) and len(set(value)) == len(value)
        ),
    )


def list_of(rule: Rule, allowed: str) -> Rule:
    """A list of what ``rule`` allows; ``allowed`` names several of it."""
    return Rule(f"a list of {allowed}", lambda value: isinstance(value, list) and all(map(rule.holds, value)))


def key(default: Any, rule: Rule) -> Any:
    """A key of a record, that is a field of a dataclass, with its default and what is allowed."""
    return field(default=default, metadata={_RULE: rule})


def table(default: Any) -> Any:
    """A key with a table of its own: ``default`` is a record."""
    return field(default=default, metadata={_RULE: _Table()})


def tables(record: type[Any], *, required: Collection[str] = ()) -> Any:
    """A key with a list of tables, a tuple of ``record``s in the end; each has to have the ``required`` keys."""
    return field(default=(), metadata={_RULE: _Tables(record, required)})


def named_values(name: Rule, value: Rule, allowed: str) -> Any:
    """A key with a table of values by name; ``allowed`` says both in words."""
    rule = Rule(
        f"a table of {allowed}",
        lambda values: (
            isinstance(values, Mapping)
            and all(name.holds(one) and value.holds(each) for one, each in values.items())
        ),
    )
    return field(default_factory=dict, hash=False, metadata={_RULE: rule})


def named_tables(record: type[Any]) -> Any:
    """A key with a table of tables by name, a mapping of ``record``s in the end."""
    return field(default_factory=dict, hash=False, metadata={_RULE: _NamedTables(record)})


def read(record: type[T], values: Mapping[str, object], *, without: Collection[str] = ()) -> T:
    """What a table holds, as a ``record``. Raises ValueError: a line for each fault.

    ``without`` are keys of the record that this table has not.
    """
    faults: list[str] = []
    found = _read(record(), values, "", faults, without)
    refuse(faults)
    return found


def refuse(faults: Iterable[str]) -> None:
    """Raises ValueError with a line for each of ``faults``; nothing where there is none."""
    if told := "\n".join(faults):
        raise ValueError(told)


@dataclass(frozen=True, slots=True)
class _Table:
    def read(self, value: object, path: str, default: Any, faults: list[str]) -> Any:
        return _read(default, value, path, faults)


@dataclass(frozen=True, slots=True)
class _Tables:
    record: type[Any]
    required: Collection[str]

    def read(self, value: object, path: str, default: Any, faults: list[str]) -> Any:
        if not isinstance(value, list):
            faults.append(_fault(path, value, "a list of tables"))
            return default
        return tuple(self._one(one, f"{path}[{number}]", faults) for number, one in enumerate(value))

    def _one(self, values: object, path: str, faults: list[str]) -> Any:
        found = _read(self.record(), values, path, faults)
        if isinstance(values, Mapping):
            missing = [each for each in self.required if each not in values]
            faults += [f"{path}.{each}: found nothing; this key is required" for each in missing]
        return found


@dataclass(frozen=True, slots=True)
class _NamedTables:
    record: type[Any]

    def read(self, value: object, path: str, default: Any, faults: list[str]) -> Any:
        if not isinstance(value, Mapping) or "" in value:
            faults.append(_fault(path, value, "a table of tables by name"))
            return default
        return {name: _read(self.record(), one, f"{path}.{name}", faults) for name, one in value.items()}


def _rules_of(record: type[Any]) -> dict[str, _Reader]:
    """The keys of ``record`` and what each allows."""
    return {each.name: each.metadata[_RULE] for each in dataclasses.fields(record)}


def _read(default: T, values: object, path: str, faults: list[str], without: Collection[str] = ()) -> T:
    """``default`` with what ``values`` say, key by key; a key with a fault keeps its default."""
    if not isinstance(values, Mapping):
        faults.append(_fault(path, values, "a table"))
        return default
    rules = {name: rule for name, rule in _rules_of(type(default)).items() if name not in without}
    found = {}
    for name, value in values.items():
        here = f"{path}.{name}" if path else str(name)
        if name in rules:
            found[name] = rules[name].read(value, here, getattr(default, name), faults)
        else:
            faults.append(f"{here}: found an unknown key; allowed: {', '.join(sorted(rules))}")
    return dataclasses.replace(default, **found)  # type: ignore[type-var]


def _fault(path: str, value: object, allowed: str) -> str:
    return f"{path}: found {repr(value)[:_MOST_SHOWN]}; allowed: {allowed}"


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is(value: object, other: str | int) -> bool:
    """The same, where true is not 1."""
    return type(value) is type(other) and value == other
