"""The body of an SMP message: one CBOR map (RFC 8949) with texts for keys, and no tag anywhere.

cbor2 makes objects of tags, whatever that costs: one compiles a pattern, one makes a number of thousands of digits, one
refers to itself. SMP has none. So the heads of all items are looked at before anything is decoded: what is left then takes
time and memory in proportion to its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import cbor2

MOST_ITEMS: Final = 4096
MOST_DEPTH: Final = 16

_BYTES, _TEXT, _ARRAY, _MAP, _TAG, _OTHER = range(2, 8)
"""Major types (RFC 8949, 3.1); 0 and 1 are whole numbers."""
_WHOLE_NUMBERS: Final = (0, 1)
_ONE_BYTE_MORE: Final = 24
_EIGHT_BYTES_MORE: Final = 27
_INDEFINITE: Final = 31


@dataclass(slots=True)
class _Open:
    """Something of several items whose end has not come. ``left``: so many items until then, None: a break ends it."""

    major: int
    left: int | None
    is_key_next: bool = True

    def take(self, major: int, argument: int | None) -> None:
        """One more item begins. Raises ValueError where it has no place here."""
        if major == _TAG:
            raise ValueError("a tag")
        if self.major in (_BYTES, _TEXT) and (major != self.major or argument is None):
            raise ValueError("a string in pieces of another kind")
        if self.major == _MAP and self.is_key_next and major != _TEXT:
            raise ValueError("a key that is no text")
        self.is_key_next = not self.is_key_next
        if self.left is not None:
            self.left -= 1

    def end(self) -> None:
        """A break. Raises ValueError where none may be."""
        if self.left is not None or (self.major == _MAP and not self.is_key_next):
            raise ValueError("a break in the middle")
        self.left = 0


def decode(data: bytes) -> dict[str, Any]:
    """The map that is the whole of ``data``. Raises ValueError where there is none."""
    _check(data)
    try:
        body = cbor2.loads(data)
    except cbor2.CBORError as error:
        raise ValueError(str(error)) from error
    if not isinstance(body, dict):
        raise ValueError("no map")
    return body


def _check(data: bytes) -> None:
    at, nest = 0, [_Open(_ARRAY, 1)]
    for _ in range(MOST_ITEMS):
        major, argument, at = _head(data, at)
        if major == _OTHER and argument is None:
            nest[-1].end()
        else:
            nest[-1].take(major, argument)
            if major in (_ARRAY, _MAP) or (major in (_BYTES, _TEXT) and argument is None):
                items = argument if argument is None or major == _ARRAY else 2 * argument
                nest.append(_Open(major, items))
            elif major in (_BYTES, _TEXT) and argument is not None:
                at += argument
        while nest and nest[-1].left == 0:
            nest.pop()
        if not nest:
            break
        if len(nest) > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} levels")
    if nest:
        raise ValueError(f"more than {MOST_ITEMS} items")
    if at != len(data):
        raise ValueError("it does not end with its only item")


def _head(data: bytes, at: int) -> tuple[int, int | None, int]:
    """Major type and argument (None: indefinite length, or a break) of the item at ``at``, and where its head ends."""
    if at >= len(data):
        raise ValueError("it is cut")
    major, short = data[at] >> 5, data[at] & 0x1F
    if short < _ONE_BYTE_MORE:
        return major, short, at + 1
    if short == _INDEFINITE and major not in _WHOLE_NUMBERS:
        return major, None, at + 1
    if short > _EIGHT_BYTES_MORE:
        raise ValueError(f"a head of {data[at]:#04x}")
    end = at + 1 + (1 << short - _ONE_BYTE_MORE)
    if end > len(data):
        raise ValueError("it is cut")
    return major, int.from_bytes(data[at + 1 : end], "big"), end
