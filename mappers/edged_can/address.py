"""Addresses of CAN buses: ``can:CHANNEL`` and ``can:INTERFACE@CHANNEL[@BITRATE[/DATA_BITRATE]][?KEY=VALUE...]``. Pure.

``can:can0`` is the kernel's own interface. Any other is named as python-can names it: ``can:slcan@/dev/ttyUSB0@500000``,
``can:pcan@PCAN_USBBUS1@250000``, ``can:virtual@bench``. A second bit rate is that of the data phase and makes it CAN FD.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl

SCHEME: Final = "can"
SOCKETCAN: Final = "socketcan"
DEFAULT_BITRATE: Final = 500_000

Option = str | int | bool

_BITRATES: Final = range(5_000, 1_000_001)
_DATA_BITRATES: Final = range(5_000, 15_000_001)
_SHAPE: Final = re.compile(
    r"(?:(?P<interface>[a-z][a-z0-9_-]*)@)?(?P<channel>[^@?]+)"
    r"(?:@(?P<bitrate>\d+)(?:/(?P<data_bitrate>\d+))?)?(?:\?(?P<options>.*))?"
)
_NETWORK_INTERFACE: Final = re.compile(r"[A-Za-z0-9_.:-]{1,15}")
_KERNELS: Final = re.compile(r"v?can\d+")
"""Where the interface should be, somebody forgot ``socketcan@`` before it."""
_CLASSIC_ONLY: Final = frozenset({"slcan", "pcan"})
"""python-can wants a table of timings from these for CAN FD, not two bit rates."""
_OPTION: Final = re.compile(r"[a-z][a-z0-9_]*")
_WORDS: Final[dict[str, bool]] = {"true": True, "false": False}
_ALLOWED: Final = (
    "allowed: can:NAME for an interface of the kernel, or can:INTERFACE@CHANNEL@BITRATE[/DATA_BITRATE], such as "
    "can:slcan@/dev/ttyUSB0@500000"
)


@dataclass(frozen=True, slots=True)
class CanAddress:
    """A bus. Bit rates in bit/s; ``data_bitrate`` 0: classic CAN only. ``options`` go to python-can as they are."""

    interface: str
    channel: str
    bitrate: int = DEFAULT_BITRATE
    data_bitrate: int = 0
    options: tuple[tuple[str, Option], ...] = ()

    @property
    def fd(self) -> bool:
        return self.data_bitrate > 0

    @property
    def place(self) -> str:
        """The bus itself, at whatever speed it is said to be."""
        options = "&".join(f"{key}={value}" for key, value in self.options)
        return f"{self}?{options}" if options else str(self)

    def __str__(self) -> str:
        name = self.channel if self.interface == SOCKETCAN else f"{self.interface}@{self.channel}"
        return f"{SCHEME}:{name}"


def parse_address(rest: str) -> CanAddress:
    """The bus that the part of an address after ``can:`` names. Raises ValueError for anything else."""
    found = _SHAPE.fullmatch(rest) if rest.isprintable() else None
    if found is None or _KERNELS.fullmatch(found["interface"] or ""):
        raise ValueError(_ALLOWED)
    interface = found["interface"] or SOCKETCAN
    if interface == SOCKETCAN and not _NETWORK_INTERFACE.fullmatch(found["channel"]):
        raise ValueError(_ALLOWED)
    if found["data_bitrate"] and interface in _CLASSIC_ONLY:
        raise ValueError(f"allowed: no data bit rate: CAN FD is not supported on {interface}")
    return CanAddress(
        interface,
        found["channel"],
        _bit_rate(found["bitrate"], DEFAULT_BITRATE, _BITRATES, "a bit rate"),
        _bit_rate(found["data_bitrate"], 0, _DATA_BITRATES, "a data bit rate"),
        _options(found["options"] or ""),
    )


def _bit_rate(text: str | None, default: int, allowed: range, what: str) -> int:
    if text is None:
        return default
    if int(text) not in allowed:
        raise ValueError(f"allowed: {what} from {allowed[0]} to {allowed[-1]} bit/s")
    return int(text)


def _options(text: str) -> tuple[tuple[str, Option], ...]:
    found = parse_qsl(text, keep_blank_values=True)
    if text and (not found or not all(_OPTION.fullmatch(key) for key, _ in found)):
        raise ValueError("allowed after '?': KEY=VALUE&KEY=VALUE, options of python-can's interface")
    return tuple((key, _value(value)) for key, value in found)


def _value(text: str) -> Option:
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    return _WORDS.get(text, text)
