"""Intel HEX ("Hexadecimal Object File Format Specification", revision A), by the ``intelhex`` library.

The library reads the records and their checksums; what it lets through is refused here: a file without an
end-of-file record, and anything after it.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING

from edged_firmware.errors import Reason, Refused

if TYPE_CHECKING:
    from intelhex import IntelHex

_END = re.compile(rb":00[0-9A-F]{4}01[0-9A-F]{2}", re.IGNORECASE)


def parse_intel_hex(data: bytes, name: str) -> list[tuple[int, bytes]]:
    """Segments of the Intel HEX text ``data``: (address, bytes), sorted, adjacent records merged.

    ``name`` is the file's, for the text of Refused(IMAGE_INVALID), which also names the line, counted from 1.
    """
    # Read only where a release is made: the daemon need not hold the library.
    from intelhex import HexReaderError, IntelHex

    _check_end(data, name)
    image = IntelHex()
    try:
        image.loadhex(io.StringIO(data.decode("latin-1")))
    except HexReaderError as error:
        raise _invalid(name, f"line {getattr(error, 'line', '?')}: {error}") from error
    segments = _segments(image)
    if not segments:
        raise _invalid(name, "no data records")
    return segments


def _segments(image: IntelHex) -> list[tuple[int, bytes]]:
    return [(begin, bytes(image.tobinarray(start=begin, end=end - 1))) for begin, end in image.segments()]


def _check_end(data: bytes, name: str) -> None:
    """Refuse a file whose last line is not its end-of-file record: it was cut, or more than is read."""
    lines = data.split(b"\n")
    ends = [number for number, line in enumerate(lines, 1) if _END.fullmatch(line.strip())]
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    if not ends:
        raise _invalid(name, f"line {last}: the file ends without an end-of-file record; it was cut")
    if ends[0] != last:
        raise _invalid(name, f"line {ends[0] + 1}: there is more after the end-of-file record")


def _invalid(name: str, text: str) -> Refused:
    return Refused(Reason.IMAGE_INVALID, f"{name}, {text}")
