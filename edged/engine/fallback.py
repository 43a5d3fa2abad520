"""What a device's flash, as it was read out, says about images; and how much of it is worth keeping."""

from __future__ import annotations

from edged.api import Image

ERASED = 0xFF
_ERASE_BYTES = 4096
"""A read-out is kept in multiples of this: no smaller than the page or sector that writing to its end erases."""


def is_blank(flash: bytes) -> bool:
    """Nothing was ever programmed."""
    return flash.count(ERASED) == len(flash)


async def holds(flash: bytes, base: int, image: Image) -> bool:
    """Does ``flash``, which begins at address ``base``, hold every byte of ``image``?"""
    for number, segment in enumerate(image.segments):
        start = segment.address - base
        if start < 0 or flash[start : start + segment.length] != await image.read(number, 0, segment.length):
            return False
    return True


def worth_keeping(flash: bytes, base: int, image: Image) -> bytes:
    """All of ``flash`` that is programmed, and all that ``image`` will overwrite; not the erased rest, which would be written
    again, page by page, on the way back."""
    overwritten = max(segment.address + segment.length for segment in image.segments) - base
    end = max(len(flash.rstrip(bytes([ERASED]))), overwritten)
    return flash[: -(-end // _ERASE_BYTES) * _ERASE_BYTES]
