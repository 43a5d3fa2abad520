"""The mapper's own table of a device's configuration, checked key by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

_BAUDS: Final = range(1200, 4_000_001)
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
    faults = [fault for key, value in table.items() if (fault := _fault(key, value, known))]
    if faults:
        raise ValueError("\n".join(faults))
    return UartConfig(**dict[str, Any](table))


def _fault(key: str, value: object, known: list[str]) -> str:
    if key not in known:
        return f"{key}: found an unknown key; allowed: {', '.join(known)}"
    allowed, holds = _CHECKS[key]
    is_sound = not isinstance(value, bool) and holds(value)
    return "" if is_sound else f"{key}: found {value!r}; allowed: {allowed}"


def _is_baud(value: object) -> bool:
    return isinstance(value, int) and value in _BAUDS


def _one_of(*choices: str) -> tuple[str, Callable[[object], bool]]:
    return " or ".join(map(repr, choices)), lambda value: value in choices


def _seconds(low: float, high: float) -> tuple[str, Callable[[object], bool]]:
    return (
        f"a number of seconds from {low:g} to {high:g}",
        lambda value: isinstance(value, int | float) and low <= value <= high,
    )


_CHECKS: Final[dict[str, tuple[str, Callable[[object], bool]]]] = {
    "baud": (f"a whole number from {_BAUDS[0]} to {_BAUDS[-1]}", _is_baud),
    "app_baud": (f"0, or a whole number from {_BAUDS[0]} to {_BAUDS[-1]}", lambda v: v == 0 or _is_baud(v)),
    "reset": _one_of("dtr", "none"),
    "page_bytes": (
        f"0 or one of {', '.join(map(str, _PAGES))}",
        lambda v: isinstance(v, int) and v in (0, *_PAGES),
    ),
    "erase": _one_of("from_start", "page"),
    "pacing": _one_of("page", "command"),
    "answer_s": _seconds(0.05, 60),
    "boot_s": _seconds(0, 60),
}
