"""The table of a device that speaks SMP, checked key by key; how a setting's bytes become a value."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from edged.api import JsonValue
from edged.tables import key, list_of, named_tables, one_of, printable, read, seconds, text, whole
from edged_uart.config import BAUD

PROTOCOL: Final = "smp"
ALL: Final = "*"
LINE_BYTES: Final = 127
"""The longest line that the specification allows, with its two first bytes and the newline."""
MOST_WINDOW: Final = 32
SETTLING_BOOTS: Final = 2
"""So many resets it takes to leave an image."""

_NUMBERS: Final = {
    "int8": "<b", "int16": "<h", "int32": "<i", "int64": "<q",
    "uint8": "<B", "uint16": "<H", "uint32": "<I", "uint64": "<Q",
    "float32": "<f", "float64": "<d", "bool": "<?",
}  # fmt: skip
_TYPES: Final = ("text", "bytes", *_NUMBERS)


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting of the device as a property. Numbers are little-endian; ``bytes`` are told in hex."""

    type: str = key("text", one_of(*_TYPES))
    unit: str | None = key(None, printable())

    def value(self, data: bytes) -> JsonValue:
        """What ``data`` means. Raises ValueError where it is not of this type."""
        if self.type == "bytes":
            return data.hex()
        if self.type == "text":
            return data.rstrip(b"\0").decode()
        (number,) = self._unpacked(data)
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{number} is no value")
        return cast(JsonValue, number)

    def data(self, value: JsonValue) -> bytes:
        """The bytes for ``value``. Raises ValueError where it cannot be of this type."""
        if self.type in ("bytes", "text"):
            if not isinstance(value, str):
                raise ValueError(f"found {value!r}; allowed: a text")
            return bytes.fromhex(value) if self.type == "bytes" else value.encode()
        if isinstance(value, bool) != (self.type == "bool") or not isinstance(value, int | float):
            raise ValueError(f"found {value!r}; allowed: {self.type}")
        try:
            return struct.pack(_NUMBERS[self.type], value)
        except (struct.error, OverflowError) as error:
            raise ValueError(f"found {value!r}; allowed: {self.type}") from error

    def _unpacked(self, data: bytes) -> tuple[Any, ...]:
        try:
            return struct.unpack(_NUMBERS[self.type], data)
        except struct.error as error:
            raise ValueError(f"{len(data)} bytes are no {self.type}") from error


@dataclass(frozen=True, slots=True)
class SmpConfig:
    """How to talk to one device.

    - ``framing``: ``"console"``, ``"raw"`` or ``"cobs"``; ``line_bytes``: longest line of the console, with its frame.
    - ``reset``: ``"dtr"``: the port's DTR and RTS lines reset a device that does not answer for ``boot_s``, at first
      or after its trial boot; ``"none"``: only its own watchdog can.
    - ``window``: requests on their way during an upload (0: by the device's parameters).
    - ``boot_loader``: ``"tells"``: it has to tell a mode in which it goes back from what was not confirmed; ``"reverts"``:
      it is known to, though it does not tell.
    - ``answer_s``: longest time for one answer. ``erase_s``: for the first one of an upload.
    - ``quiet_s``: nothing is sent for so long after a reset, since a boot loader may take bytes for a call for recovery.
      ``boot_s``: from then on until the device answers, with the swap of its slots.
    - ``poll_s``: between two looks at the properties (0: none). ``statistics``: groups that are reported (``"*"``: all).
      ``settings``: those that are reported and may be desired.
    """

    baud: int = key(115200, BAUD)
    framing: str = key("console", one_of("console", "raw", "cobs"))
    line_bytes: int = key(LINE_BYTES, whole(16, 4096))
    reset: str = key("none", one_of("none", "dtr"))
    window: int = key(0, whole(0, MOST_WINDOW))
    boot_loader: str = key("tells", one_of("tells", "reverts"))
    answer_s: float = key(2.0, seconds(0.05, 60))
    erase_s: float = key(25.0, seconds(1, 600))
    quiet_s: float = key(1.0, seconds(0, 60))
    boot_s: float = key(45.0, seconds(1, 600))
    poll_s: float = key(60.0, seconds(0, 86400))
    statistics: tuple[str, ...] = key(
        (ALL,), list_of(text(".+", "a name"), f"names of groups, or [{ALL!r}] for all")
    )
    settings: Mapping[str, Setting] = named_tables(Setting)


def parse_smp(values: Mapping[str, object]) -> SmpConfig:
    """The table of a device that speaks SMP. Raises ValueError: a line for each fault, with key, what was found, what is
    allowed."""
    return read(SmpConfig, values)


def longest_call_s(config: object) -> float:
    """See :attr:`edged.api.MapperSpec.longest_call_s`: to leave an image takes two boots."""
    assert isinstance(config, SmpConfig)
    return config.answer_s + SETTLING_BOOTS * (config.quiet_s + config.boot_s)
