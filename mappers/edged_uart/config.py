"""The mapper's own table of a device's configuration, checked key by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

Check: TypeAlias = "tuple[str, Callable[[object], bool]]"
"""What is allowed, in words, and whether a value is that."""
Checks: TypeAlias = "Mapping[str, Check]"

_PAGES: Final = (32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class UartConfig:
    """How to talk to one board.

    - ``baud``: bits per second of the boot loader; ``app_baud``: of the application (0: the same).
    - ``reset``: ``"dtr"``: the port's DTR and RTS lines reset the board; ``"none"``: it comes to its boot loader by
      itself, such as after a command or a button.
    - ``page_bytes``: flash page of a part that this mapper does not know (0: from the signature).
    - ``erase``: STK500v2 only. ``"from_start"``: the boot loader erases pages counted from 0 since its start
      (stk500boot); ``"page"``: it erases the page that it writes.
    - ``pacing``: STK500 only. ``"page"``: address and page go out in one go where the part has a USART, which
      hears while it sends; ``"command"``: every answer is waited for, as avrdude does.
    - ``answer_s``: longest time for one answer. ``boot_s``: time from a reset to the application's first line.
    """

    baud: int = 115200
    app_baud: int = 0
    reset: str = "dtr"
    page_bytes: int = 0
    erase: str = "from_start"
    pacing: str = "page"
    answer_s: float = 1.0
    boot_s: float = 2.5


def parse_v1(table: Mapping[str, object]) -> UartConfig:
    """The table of a board that speaks STK500. Raises ValueError: a line for each fault, with key, what was
    found, what is allowed."""
    return _parse(table, sorted(_CHECKS.keys() - {"erase"}))


def parse_v2(table: Mapping[str, object]) -> UartConfig:
    """The table of a board that speaks STK500v2. Raises ValueError: a line for each fault, with key, what was
    found, what is allowed."""
    config = _parse(table, sorted(_CHECKS.keys() - {"pacing"}))
    if config.reset == "none" and config.erase == "from_start":
        raise ValueError(
            "reset: found 'none'; allowed: 'dtr', since a boot loader with erase = 'from_start' has to be started anew "
            "before each write"
        )
    return config


def _parse(table: Mapping[str, object], known: list[str]) -> UartConfig:
    check_table(table, {key: _CHECKS[key] for key in known})
    return UartConfig(**dict[str, Any](table))


def check_table(table: Mapping[str, object], checks: Checks) -> None:
    """Raises ValueError, a line for each fault of ``table``: key, what was found, what is allowed."""
    faults = [fault for key, value in table.items() if (fault := _fault(key, value, checks))]
    if faults:
        raise ValueError("\n".join(faults))


def _fault(key: str, value: object, checks: Checks) -> str:
    if key not in checks:
        return f"{key}: found an unknown key; allowed: {', '.join(sorted(checks))}"
    allowed, holds = checks[key]
    is_sound = not isinstance(value, bool) and holds(value)
    return "" if is_sound else f"{key}: found {value!r}; allowed: {allowed}"


def one_of(*choices: str) -> Check:
    """One of these texts."""
    return " or ".join(map(repr, choices)), lambda value: value in choices


def seconds(low: float, high: float) -> Check:
    """A time within these bounds."""
    return (
        f"a number of seconds from {low:g} to {high:g}",
        lambda value: isinstance(value, int | float) and low <= value <= high,
    )


def whole(low: int, high: int) -> Check:
    """A whole number within these bounds."""
    return (
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and low <= value <= high,
    )


BAUD: Final = whole(1200, 4_000_000)

_CHECKS: Final[Checks] = {
    "baud": BAUD,
    "app_baud": (f"0, or {BAUD[0]}", lambda v: v == 0 or BAUD[1](v)),
    "reset": one_of("dtr", "none"),
    "page_bytes": (
        f"0 or one of {', '.join(map(str, _PAGES))}",
        lambda v: isinstance(v, int) and v in (0, *_PAGES),
    ),
    "erase": one_of("from_start", "page"),
    "pacing": one_of("page", "command"),
    "answer_s": seconds(0.05, 60),
    "boot_s": seconds(0, 60),
}
