"""The chunk index: one SHA-256 per chunk of a file, so that each part can be trusted by itself.

The index covers the whole target file from byte 0, a container's header included: one rule serves containers
and pass-through files alike. It is itself a signed TUF target. This module decides; it opens no file except
in :meth:`ChunkIndex.of_file`, and it does not verify the signature over the index.

Layout, big-endian::

    8  magic "EDGEDIDX"      1  version (1)      1  algorithm (1 = SHA-256)      2  reserved (0)
    4  chunk size, bytes     8  length of the covered file, bytes                4  count
    32 x count               digests, FIPS 180-4
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from edged_firmware.durable import storage_error
from edged_firmware.errors import Reason, Refused

MAGIC = b"EDGEDIDX"
VERSION = 1
SHA256 = 1
DIGEST_BYTES = 32
MIN_CHUNK_BYTES = 512
#: A reader holds a few chunks at a time: this bounds its memory.
MAX_CHUNK_BYTES = 256 * 1024
DEFAULT_CHUNK_BYTES = 16 * 1024

_HEADER = struct.Struct(">8sBBHIQI")
_MAX_COUNT = 2**32 - 1
_SMALL_IMAGE_BYTES = 1 << 20
_SMALL_CHUNK_BYTES = 4096
_LARGE_CHUNK_BYTES = 65536
_READ_BYTES = 1024 * 1024

Data = bytes | bytearray | memoryview


def default_chunk_size(size_bytes: int) -> int:
    """Bytes of a chunk of an image of ``size_bytes``, where its maker names none."""
    return _SMALL_CHUNK_BYTES if size_bytes < _SMALL_IMAGE_BYTES else _LARGE_CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class ChunkIndex:
    """Digests of a file's chunks.

    - ``chunk_size``: bytes per chunk, a power of two from 512 to 256 KiB; the last chunk may be shorter.
    - ``length``: bytes of the covered file.
    - ``digests``: 32 bytes per chunk, one after another.

    Raises ValueError where the three do not fit together.
    """

    chunk_size: int
    length: int
    digests: bytes

    def __post_init__(self) -> None:
        fault = _chunk_size_fault(self.chunk_size) or _count_fault(self)
        if fault:
            raise ValueError(fault)

    @property
    def count(self) -> int:
        """Number of chunks."""
        return len(self.digests) // DIGEST_BYTES

    @classmethod
    def build(cls, data: Data | Iterable[bytes], chunk_size: int = DEFAULT_CHUNK_BYTES) -> ChunkIndex:
        """The index over ``data``: the whole file, or its bytes in pieces of any size.

        Raises ValueError for a chunk size out of bounds.
        """
        fault = _chunk_size_fault(chunk_size)
        if fault:
            raise ValueError(fault)
        length, digests = 0, bytearray()
        pieces = (data,) if isinstance(data, Data) else data
        for chunk in _recut(pieces, chunk_size):
            length += len(chunk)
            digests += hashlib.sha256(chunk).digest()
        return cls(chunk_size, length, bytes(digests))

    @classmethod
    def of_file(cls, path: Path, chunk_size: int = DEFAULT_CHUNK_BYTES) -> ChunkIndex:
        """The index over the file at ``path``; blocks. Raises Transient(STORAGE_FAILED) and ValueError."""
        try:
            with path.open("rb", buffering=0) as file:
                return cls.build(iter(lambda: file.read(_READ_BYTES), b""), chunk_size)
        except OSError as error:
            raise storage_error(error, path, 0) from error

    def encode(self) -> bytes:
        """The bytes of the index as they are signed and stored."""
        head = _HEADER.pack(MAGIC, VERSION, SHA256, 0, self.chunk_size, self.length, self.count)
        return head + self.digests

    @classmethod
    def decode(cls, data: Data) -> ChunkIndex:
        """Parse ``data`` strictly; where anything does not fit, raises Refused(INDEX_MISMATCH)."""
        if len(data) < _HEADER.size:
            raise _mismatch(f"{len(data)} bytes are too short for a header of {_HEADER.size}")
        magic, version, algorithm, reserved, chunk_size, length, count = _HEADER.unpack_from(data)
        fault = _header_fault(magic, version, algorithm, reserved)
        if fault:
            raise _mismatch(fault)
        digests = bytes(data[_HEADER.size :])
        if len(digests) != count * DIGEST_BYTES:
            raise _mismatch(f"{count} digests are announced and {len(digests)} bytes of them are there")
        try:
            return cls(chunk_size, length, digests)
        except ValueError as error:
            raise _mismatch(str(error)) from error

    def extent(self, number: int) -> tuple[int, int]:
        """Offset and length in bytes of chunk ``number`` (from 0). Raises ValueError where there is none."""
        if not 0 <= number < self.count:
            raise ValueError(f"chunk {number} of {self.count}")
        offset = number * self.chunk_size
        return offset, min(self.chunk_size, self.length - offset)

    def check(self, number: int, data: Data) -> None:
        """Return if ``data`` is chunk ``number`` (from 0), whole; else raise Refused(CHUNK_MISMATCH).

        Raises ValueError where there is no such chunk.
        """
        begin = number * DIGEST_BYTES
        signed = self.digests[begin : begin + DIGEST_BYTES] if number >= 0 else b""
        if hashlib.sha256(data).digest() != signed:
            raise self._chunk_fault(number, len(data))

    def _chunk_fault(self, number: int, length: int) -> Refused:
        offset, expected = self.extent(number)
        text = "is not what the signed index says" if length == expected else f"has {length} bytes"
        where = f"chunk {number} (bytes {offset} to {offset + expected - 1})"
        return Refused(Reason.CHUNK_MISMATCH, f"{where} {text}")


def _recut(pieces: Iterable[Data], size: int) -> Iterator[Data]:
    """The same bytes in chunks of ``size``, the last one shorter."""
    rest = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        if rest:
            missing = size - len(rest)
            rest += view[:missing]
            view = view[missing:]
        if len(rest) == size:
            yield bytes(rest)
            rest.clear()
        whole = len(view) - len(view) % size
        for at in range(0, whole, size):
            yield view[at : at + size]
        rest += view[whole:]
    if rest:
        yield bytes(rest)


def _chunk_size_fault(chunk_size: int) -> str | None:
    if MIN_CHUNK_BYTES <= chunk_size <= MAX_CHUNK_BYTES and chunk_size.bit_count() == 1:
        return None
    return f"chunk size {chunk_size} is not a power of two from {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES}"


def _count_fault(index: ChunkIndex) -> str | None:
    if index.length < 0 or len(index.digests) % DIGEST_BYTES:
        return f"length {index.length} or {len(index.digests)} bytes of digests cannot be"
    expected = -(-index.length // index.chunk_size)
    if expected != index.count or expected > _MAX_COUNT:
        return (
            f"{index.length} bytes in chunks of {index.chunk_size} make {expected} chunks, not {index.count}"
        )
    return None


def _header_fault(magic: bytes, version: int, algorithm: int, reserved: int) -> str | None:
    if magic != MAGIC:
        return f"it begins with {magic!r}, not {MAGIC!r}"
    if version != VERSION:
        return f"version {version} is not known, only {VERSION}"
    if algorithm != SHA256:
        return f"algorithm {algorithm} is not known, only {SHA256} (SHA-256)"
    if reserved != 0:
        return f"the reserved field is {reserved}, not 0"
    return None


def _mismatch(text: str) -> Refused:
    return Refused(Reason.INDEX_MISMATCH, f"chunk index: {text}")
