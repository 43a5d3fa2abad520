"""The mapper's own table of a device's configuration, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from edged.tables import key, one_of, read, refuse, seconds, whole

BAUD: Final = whole(1200, 4_000_000)


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

    baud: int = key(115200, BAUD)
    app_baud: int = key(0, BAUD | 0)
    reset: str = key("dtr", one_of("dtr", "none"))
    page_bytes: int = key(0, one_of(0, 32, 64, 128, 256))
    erase: str = key("from_start", one_of("from_start", "page"))
    pacing: str = key("page", one_of("page", "command"))
    answer_s: float = key(1.0, seconds(0.05, 60))
    boot_s: float = key(2.5, seconds(0, 60))


def parse_v1(values: Mapping[str, object]) -> UartConfig:
    """The table of a board that speaks STK500. Raises ValueError: a line for each fault, with key, what was
    found, what is allowed."""
    return read(UartConfig, values, without={"erase"})


def parse_v2(values: Mapping[str, object]) -> UartConfig:
    """The table of a board that speaks STK500v2. Raises ValueError: a line for each fault, with key, what was
    found, what is allowed."""
    config = read(UartConfig, values, without={"pacing"})
    if config.reset == "none" and config.erase == "from_start":
        refuse(
            [
                "reset: found 'none'; allowed: 'dtr', since a boot loader with erase = 'from_start' has to be started anew "
                "before each write"
            ]
        )
    return config
