"""File formats of vendors, turned into segments: pairs of address and bytes, sorted, gaps kept.

This package reads what a publisher hands in; it signs nothing and writes no container (``image.pack``).
All of it blocks. One file per format that needs more than a line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from edged_firmware.durable import storage_error
from edged_firmware.errors import Reason, Refused
from edged_firmware.formats.intel_hex import parse_intel_hex
from edged_firmware.image import Segment

Segments = list[tuple[int, bytes]]

_HEX_SUFFIXES = frozenset({".hex", ".ihex", ".ihx"})
_BIN_SUFFIXES = frozenset({".bin", ".img"})
_HEX_BEGIN = re.compile(rb"\s*:[0-9A-Fa-f]{10,}\s")


class Format(StrEnum):
    """How the bytes of a vendor's file are to be read."""

    AUTO = "auto"
    BIN = "bin"
    HEX = "hex"


def load(source: Path | bytes, format: Format | str = Format.AUTO, base_address: int = 0) -> Segments:
    """The segments of a vendor's file, which is given by its path or by its bytes.

    ``auto`` goes by the file's suffix, then by its first line. ``base_address`` is where a raw binary begins
    on the device; an Intel HEX file names its own addresses, so that it must be 0 there (ValueError).
    Adjacent records make one segment. Raises Refused(IMAGE_INVALID) naming file and line,
    Transient(STORAGE_FAILED) where the file cannot be read, ValueError for a format that is not known.
    """
    wanted = Format(format)
    name = source.name if isinstance(source, Path) else "image"
    data = _read(source) if isinstance(source, Path) else source
    is_hex = (_guess(name, data) if wanted is Format.AUTO else wanted) is Format.HEX
    if not (data.strip() if is_hex else data):
        raise Refused(Reason.IMAGE_INVALID, f"{name}: the file is empty")
    if is_hex and base_address:
        raise ValueError(f"{name}: an Intel HEX file has addresses of its own; a base address is not for it")
    return parse_intel_hex(data, name) if is_hex else [(base_address, data)]


def check_fits(
    segments: Iterable[tuple[int, bytes] | Segment], flash_size_bytes: int, flash_base: int = 0
) -> None:
    """Return if all segments lie in the flash of ``flash_size_bytes`` that begins at ``flash_base``.

    Raises Refused(IMAGE_TOO_LARGE) that names the first address outside.
    """
    end = flash_base + flash_size_bytes
    for address, last in map(_span, segments):
        outside = address if not flash_base <= address < end else end
        if outside <= last:
            raise Refused(
                Reason.IMAGE_TOO_LARGE,
                f"the image has bytes at {outside:#x}; the flash of {flash_size_bytes} bytes goes from"
                f" {flash_base:#x} to {end - 1:#x}",
            )


def _span(segment: tuple[int, bytes] | Segment) -> tuple[int, int]:
    """The first and the last address of ``segment``."""
    if isinstance(segment, Segment):
        return segment.address, segment.address + segment.length - 1
    address, data = segment
    return address, address + len(data) - 1


def _guess(name: str, data: bytes) -> Format:
    suffix = Path(name).suffix.lower()
    if suffix in _HEX_SUFFIXES:
        return Format.HEX
    if suffix in _BIN_SUFFIXES:
        return Format.BIN
    return Format.HEX if _HEX_BEGIN.match(data[:1024]) else Format.BIN


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise storage_error(error, path, 0) from error
