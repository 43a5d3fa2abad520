"""Property values to and from the records of data identifiers. Pure."""

from __future__ import annotations

import math
import struct
from typing import Final

from edged.api import JsonValue, Reported
from edged.errors import Permanent, Reason, Transient
from edged_can.config import Property

_CODES: Final = {
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "f32": "f",
    "f64": "d",
    "bool": "?",
}


class WrongType(Transient):
    """What the device answered is no value of the type that the property is configured with; PROTOCOL_ERROR."""


def decode(prop: Property, record: bytes) -> Reported:
    """What the device says. Raises :class:`WrongType` where the record has another length than its type."""
    return Reported(prop.name, _value(prop, record), prop.unit or None)


def encode(prop: Property, value: JsonValue) -> bytes:
    """The record for a desired value. Raises Permanent(REQUEST_INVALID) where the type cannot hold it."""
    try:
        return _record(prop, value)
    except (ValueError, OverflowError, struct.error) as error:
        text = f"{prop.name}: found {value!r}; allowed: {_range(prop)}"
        raise Permanent(Reason.REQUEST_INVALID, text) from error


def holds(prop: Property, record: bytes, value: JsonValue) -> bool:
    """Whether ``record`` is what the type can hold of ``value``: numbers are rounded to it, and a text may be filled up.

    Raises as :func:`encode`.
    """
    return record == encode(prop, value) or (prop.type == "text" and _value(prop, record) == value)


def text_of(record: bytes) -> str:
    """An identification as text: printable ASCII without padding, else hexadecimal digits."""
    stripped = record.strip(b"\x00\xff \t\r\n")
    text = stripped.decode("ascii", "replace")
    return text if text.isascii() and text.isprintable() else record.hex()


def _value(prop: Property, record: bytes) -> JsonValue:
    if prop.type == "text":
        return record.rstrip(b"\x00 ").decode("utf-8", "replace")
    if prop.type == "hex":
        return record.hex()
    layout = _layout(prop)
    if len(record) != layout.size:
        found = f"{prop.name}: the device answered {len(record)} bytes, {prop.type} has {layout.size}"
        raise WrongType(Reason.PROTOCOL_ERROR, found)
    (raw,) = layout.unpack(record)
    if prop.type == "bool":
        return bool(raw)
    if _is_raw(prop, raw):
        return int(raw)
    scaled = raw * prop.scale + prop.offset
    # JSON has no word for the others
    return round(scaled, 12) if math.isfinite(scaled) else None


def _record(prop: Property, value: JsonValue) -> bytes:
    if prop.type == "text" and isinstance(value, str):
        return value.encode()
    if prop.type == "hex" and isinstance(value, str):
        return bytes.fromhex(value)
    is_text = prop.type in ("text", "hex")
    if is_text or not isinstance(value, int | float) or (prop.type == "bool") != isinstance(value, bool):
        raise ValueError("another type")
    if prop.type == "bool" or _is_raw(prop, value):
        return _layout(prop).pack(value)
    raw = (value - prop.offset) / prop.scale
    return _layout(prop).pack(raw if prop.type[0] == "f" else round(raw))


def _is_raw(prop: Property, value: object) -> bool:
    """A whole number that is not scaled: it may have more digits than a floating-point number keeps."""
    return isinstance(value, int) and prop.scale == 1 and prop.offset == 0


def _layout(prop: Property) -> struct.Struct:
    little = prop.type.endswith("le")
    return struct.Struct(("<" if little else ">") + _CODES[prop.type.removesuffix("le")])


def _range(prop: Property) -> str:
    if prop.type in ("text", "hex", "bool"):
        return {"text": "a text", "hex": "hexadecimal digits", "bool": "true or false"}[prop.type]
    name = prop.type.removesuffix("le")
    if name[0] == "f":
        return "a number"
    bits = int(name[1:])
    low, high = (0, 2**bits - 1) if name[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    ends = sorted((low * prop.scale + prop.offset, high * prop.scale + prop.offset))
    return f"a number from {ends[0]:g} to {ends[1]:g}"
