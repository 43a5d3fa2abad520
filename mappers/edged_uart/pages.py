"""Which pages of flash an image touches, and which bytes of the image each of them holds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edged.api import Image, Segment

ERASED = 0xFF


@dataclass(frozen=True, slots=True)
class Piece:
    """``length`` bytes of segment ``segment`` from its ``offset``; they stand at ``at`` in the page."""

    segment: int
    offset: int
    length: int
    at: int


@dataclass(frozen=True, slots=True)
class Page:
    """One page at the byte address ``address``; what no piece covers is left erased."""

    address: int
    size: int
    pieces: tuple[Piece, ...]

    async def content(self, image: Image) -> bytes:
        """The whole page, ``size`` bytes. Raises what :meth:`Image.read` raises."""
        content = bytearray([ERASED]) * self.size
        for piece in self.pieces:
            data = await image.read(piece.segment, piece.offset, piece.length)
            content[piece.at : piece.at + piece.length] = data
        return bytes(content)

    def agrees(self, held: bytes, wanted: bytes) -> bool:
        """Are the image's bytes the same in both? What the image does not cover does not count."""
        return held == wanted or all(
            held[piece.at : piece.at + piece.length] == wanted[piece.at : piece.at + piece.length]
            for piece in self.pieces
        )


def plan(segments: Sequence[Segment], size: int, *, from_start: bool) -> list[Page]:
    """The pages of ``size`` bytes that ``segments`` touch, by address; a shared page is one page.

    ``from_start``: every page from address 0 on, also those that no segment touches.
    """
    pieces: dict[int, list[Piece]] = {}
    for number, segment in enumerate(segments):
        offset = 0
        while offset < segment.length:
            page, at = divmod(segment.address + offset, size)
            length = min(size - at, segment.length - offset)
            pieces.setdefault(page, []).append(Piece(number, offset, length, at))
            offset += length
    pages = range(max(pieces) + 1) if from_start else sorted(pieces)
    return [Page(page * size, size, tuple(pieces.get(page, ()))) for page in pages]
