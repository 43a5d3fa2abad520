"""CAN frames and the time that they take on the wire (ISO 11898-1). Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from edged_can.address import CanAddress

_STUFFED_RUN: Final = 32
"""Of so many random bits about one more is stuffed in: five equal ones in a row are as rare as that."""

# 10.4.2: start of frame, arbitration, control; delimiters, acknowledgement, end of frame, intermission
_BASE_BITS: Final = 47
_EXTENDED_BITS: Final = 67
_FD_ARBITRATION_BITS: Final = 30
_FD_EXTENDED_BITS: Final = 49
_FD_DATA_BITS: Final = 5 + 4 + 21 + 7
_ID_END_BITS: Final = 13
"""Of the bits beside the data these are never stuffed: what follows the checksum."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One data frame: identifier of 11 or 29 (``extended``) bits, up to 8 bytes, or 64 with ``fd``."""

    id: int
    data: bytes
    extended: bool = False
    fd: bool = False


def wire_s(size_bytes: int, bus: CanAddress, *, extended: bool, fd: bool) -> float:
    """Seconds that a frame with ``size_bytes`` of data occupies the bus, with the stuff bits of random data."""
    if fd:
        head = _FD_EXTENDED_BITS if extended else _FD_ARBITRATION_BITS
        body = _stuffed(_FD_DATA_BITS + 8 * size_bytes)
        return head / bus.bitrate + body / (bus.data_bitrate or bus.bitrate)
    bits = (_EXTENDED_BITS if extended else _BASE_BITS) - _ID_END_BITS + 8 * size_bytes
    return (_stuffed(bits) + _ID_END_BITS) / bus.bitrate


def _stuffed(bits: int) -> float:
    return bits * (1 + 1 / _STUFFED_RUN)


def ceiling_bytes_per_s(
    bus: CanAddress, *, extended: bool, fd: bool, frame_bytes: int, overhead: int
) -> float:
    """Payload that a full bus carries in frames of ``frame_bytes``, of which ``overhead`` are the transport's."""
    return (frame_bytes - overhead) / wire_s(frame_bytes, bus, extended=extended, fd=fd)
