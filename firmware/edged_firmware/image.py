"""Images: segments of bytes, the canonical container around them, and a reader of verified bytes only.

Every byte that :meth:`Image.read` returns belongs to a chunk that matched the signed index when it was read
from the source; the container's header is read by the same rule. This module parses no vendor format
(``formats``), fetches nothing (``fetch``), and trusts the chunk index that it is given (``trust``).

Container layout, big-endian::

    8  magic "EDGEDIMG"      1  version (1)      1  reserved (0)      2  segment count      4  reserved (0)
    16 x count               8  address, 8  length; sorted, not overlapping, not empty
    then the bytes of the segments, one after another, and nothing more
"""

from __future__ import annotations

import asyncio
import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from edged_firmware.chunks import ChunkIndex
from edged_firmware.durable import storage_error
from edged_firmware.errors import Reason, Refused, Transient
from edged_firmware.facts import ParamValue

MAGIC = b"EDGEDIMG"
VERSION = 1

_HEADER = struct.Struct(">8sBBHI")
_ENTRY = struct.Struct(">QQ")
_ADDRESSES = 2**64
_MAX_SEGMENTS = 2**16 - 1

#: Bytes that are kept or dropped together (at least one chunk), and that are in memory at most. All of the
#: latter is filled in one thread hop where the reading goes straight on: a hop takes as long as SHA-256 over
#: some 200 KiB.
_BLOCK_BYTES = 64 * 1024
_KEPT_BYTES = 1024 * 1024

_Extent = tuple[int, int]
Observe = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of bytes: the address on the device where it begins, and its length in bytes."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class Label:
    """What a release is called, for a device that wants to know what it is offered: the release's name, and what the device
    answers when it runs (``identifies_as``). Both are signed."""

    name: str
    identifies_as: str


def pack(segments: Sequence[tuple[int, bytes]]) -> bytes:
    """The canonical container of ``segments``, which are pairs of address and bytes.

    Raises ValueError where they are not sorted, overlap, or one is empty.
    """
    table = tuple(Segment(address, len(data)) for address, data in segments)
    fault = _table_fault(table)
    if fault:
        raise ValueError(fault)
    head = _HEADER.pack(MAGIC, VERSION, 0, len(table), 0)
    entries = b"".join(_ENTRY.pack(segment.address, segment.length) for segment in table)
    return b"".join((head, entries, *(data for _, data in segments)))


class ByteSource(Protocol):
    """Where an image's file comes from. What it gives is not trusted."""

    async def read_at(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``.

        Raises Refused(LENGTH_MISMATCH) where there are fewer, Transient where they cannot be had now.
        """
        ...


@runtime_checkable
class BlockingSource(ByteSource, Protocol):
    """A source that a thread can read: then one thread hop does the reading and the verifying."""

    @property
    def executor(self) -> Executor | None:
        """Where ``read_blocking`` is to run, None: the loop's own. Raises ValueError when closed."""
        ...

    def read_blocking(self, offset: int, length: int) -> bytes:
        """As ``read_at``."""
        ...


class MemorySource:
    """A file that is in memory."""

    executor: Executor | None = None

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read_at(self, offset: int, length: int) -> bytes:
        """As :class:`ByteSource`."""
        return self.read_blocking(offset, length)

    def read_blocking(self, offset: int, length: int) -> bytes:
        """As :class:`BlockingSource`."""
        return _whole(self._data[offset : offset + length], "the image", offset, length)


class FileSource:
    """A regular file, open from ``async with`` to its end, with one thread that does all that may block.

    Several tasks may read at once. Raises Transient(STORAGE_FAILED) on entry or on a read that the system
    refuses, ValueError on a read while it is not open. Reads under way at the end are finished first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._executor: Executor | None = None

    @property
    def executor(self) -> Executor:
        """As :class:`BlockingSource`."""
        if self._executor is None:
            raise ValueError(f"{self._path} is not open")
        return self._executor

    async def __aenter__(self) -> Self:
        if self._executor is not None:
            raise ValueError(f"{self._path} is open already")
        self._executor = ThreadPoolExecutor(1, "edged-file")
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._open)
        except (Transient, asyncio.CancelledError):
            self._release()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.wrap_future(self._release())

    async def read_at(self, offset: int, length: int) -> bytes:
        """As :class:`ByteSource`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.executor, self.read_blocking, offset, length)

    def read_blocking(self, offset: int, length: int) -> bytes:
        """As :class:`BlockingSource`; only in ``executor``."""
        try:
            data = _pread(self._fd, length, offset)
        except OSError as error:
            raise storage_error(error, self._path, 0) from error
        return _whole(data, str(self._path), offset, length)

    def _release(self) -> Future[None]:
        """Close the file after all that its thread still has to do, a late opening included."""
        executor, self._executor = self.executor, None
        closed = executor.submit(self._close)
        executor.shutdown(wait=False)
        return closed

    def _open(self) -> None:
        try:
            # O_NONBLOCK: a pipe in place of the file must not hang the opener.
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise storage_error(error, self._path, 0) from error
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self._close()
            raise Transient(Reason.STORAGE_FAILED, f"{self._path} is not a regular file")

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Image:
    """The verified reader over one image file; made by :meth:`open`.

    - ``segments``: the runs of bytes to install, sorted by address.
    - ``size_bytes``: their total length.
    - ``length``: bytes of the file.
    - ``opaque``: True where the vendor's file passes through as one segment at address 0.
    - ``params``: the flash protocol's parameters, as the release's facts were signed; empty for a flash that was read out.
    - ``label``: what the release is called; None for a flash that was read out.

    Several tasks may read at once. It holds at most 1 MiB of the file in memory.
    """

    def __init__(
        self,
        reader: _VerifiedFile,
        segments: tuple[Segment, ...],
        begin: int,
        *,
        opaque: bool,
        params: Mapping[str, ParamValue],
        label: Label | None,
    ) -> None:
        self._reader = reader
        self._begins = _begins(segments, begin)
        self.segments = segments
        self.size_bytes = sum(segment.length for segment in segments)
        self.length = reader.index.length
        self.opaque = opaque
        self.params = params
        self.label = label

    @classmethod
    async def open(
        cls,
        source: ByteSource,
        index: ChunkIndex,
        opaque: bool = False,
        observe: Observe | None = None,
        params: Mapping[str, ParamValue] | None = None,
        label: Label | None = None,
    ) -> Image:
        """Read the segment table (or take the file as one segment, where ``opaque``).

        ``observe`` is called on the event loop with the seconds that each chunk took to verify. The source
        stays the caller's, and open, for as long as the image is read. Raises Refused(IMAGE_INVALID) where
        the container is not one, and what :meth:`read` raises.
        """
        reader = _VerifiedFile(source, index, observe)
        if opaque:
            segments, begin = _opaque(index.length), 0
        else:
            segments, begin = await _read_table(reader)
        return cls(reader, segments, begin, opaque=opaque, params=params or {}, label=label)

    async def read(self, segment: int | Segment, offset: int, length: int) -> bytes:
        """``length`` verified bytes from ``offset`` of ``segment``, its number or the segment itself.

        Raises Refused(CHUNK_MISMATCH) where a chunk is not what was signed, Refused(LENGTH_MISMATCH) where
        the source is too short, Transient where it cannot be read now, and ValueError for what is not inside
        the segment.
        """
        return await self._reader.read(self._place(segment, offset, length), length)

    def at_hand(self, segment: int | Segment, offset: int, length: int) -> bytes | None:
        """The same verified bytes at once, where they are in memory and in one piece, else None. Raises ValueError as
        :meth:`read`."""
        return self._reader.at_hand(self._place(segment, offset, length), length)

    def _place(self, segment: int | Segment, offset: int, length: int) -> int:
        """Where in the file the ``length`` bytes at ``offset`` of ``segment`` begin. Raises ValueError."""
        number = self._number(segment)
        whole = self.segments[number].length
        if offset < 0 or length < 0 or offset + length > whole:
            raise ValueError(
                f"{length} bytes at {offset} are not inside the {whole} bytes of segment {number}"
            )
        return self._begins[number] + offset

    def _number(self, segment: int | Segment) -> int:
        if isinstance(segment, Segment):
            return self.segments.index(segment)
        if not 0 <= segment < len(self.segments):
            raise ValueError(f"segment {segment} of {len(self.segments)}")
        return segment


class _VerifiedFile:
    """Reads the covered file in blocks of whole chunks, and keeps the blocks that were used last."""

    def __init__(self, source: ByteSource, index: ChunkIndex, observe: Observe | None) -> None:
        self.index = index
        self._source = source
        self._observe = observe
        self._block_bytes = max(index.chunk_size, _BLOCK_BYTES)
        self._keep = _KEPT_BYTES // self._block_bytes
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._straight_on = -1  # the number after the block that was loaded last
        self._loading = asyncio.Lock()

    async def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``, which lie inside the file."""
        parts: list[bytes] = []
        end = offset + length
        while offset < end:
            number, skip = divmod(offset, self._block_bytes)
            stop = min(end - offset + skip, self._block_bytes)
            block = self._kept(number) or await self._load(number, skip, stop)
            parts.append(block[skip:stop])
            offset += stop - skip
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def at_hand(self, offset: int, length: int) -> bytes | None:
        """The same where it lies in one block that is kept, else None."""
        number, skip = divmod(offset, self._block_bytes)
        block = self._kept(number) if skip + length <= self._block_bytes else None
        return None if block is None else block[skip : skip + length]

    def _kept(self, number: int) -> bytes | None:
        block = self._blocks.get(number)
        if block is not None:
            self._blocks.move_to_end(number)
        return block

    async def _load(self, number: int, skip: int, stop: int) -> bytes:
        """Block ``number``, of which the bytes from ``skip`` to ``stop`` are wanted."""
        # One at a time: it bounds the memory, and who waited finds the block that the one before has loaded.
        async with self._loading:
            block = self._kept(number)
            if block is not None:
                return block
            try:
                return await self._load_blocks(number)
            except Refused:
                # What shares the block must not cost the chunks that are wanted: they may be good.
                return await self._load_wanted(number, skip, stop)

    async def _load_blocks(self, number: int) -> bytes:
        """Block ``number``; it is kept, as are those after it where the reading goes straight on."""
        extents = self._extents(number)
        while len(self._blocks) > self._keep - len(extents):
            self._blocks.popitem(last=False)
        blocks = await self._verified(extents)
        self._straight_on = number + len(blocks)
        # The wanted block goes in last: it is the one used last.
        for later, block in reversed(list(enumerate(blocks, number))):
            self._blocks[later] = block
        return blocks[0]

    def _extents(self, number: int) -> list[_Extent]:
        """Offset and length of each block to load when ``number`` is missing."""
        ahead = number == self._straight_on and isinstance(self._source, BlockingSource)
        begin = number * self._block_bytes
        end = min(self.index.length, begin + self._block_bytes * (self._keep if ahead else 1))
        return [(at, min(self._block_bytes, end - at)) for at in range(begin, end, self._block_bytes)]

    async def _load_wanted(self, number: int, skip: int, stop: int) -> bytes:
        """Block ``number``, filled only where the chunks lie that hold ``skip`` to ``stop``; never kept."""
        size = self.index.chunk_size
        begin = number * self._block_bytes
        first = skip - skip % size
        last = min(stop + -stop % size, self.index.length - begin)
        (chunks,) = await self._verified([(begin + first, last - first)])
        return bytes(first) + chunks

    async def _verified(self, extents: list[_Extent]) -> list[bytes]:
        """The bytes of each extent, which is whole chunks; fewer where one after the first is not good."""
        loop = asyncio.get_running_loop()
        read: Callable[[int, int], bytes]
        if isinstance(self._source, BlockingSource):
            read, executor = self._source.read_blocking, self._source.executor
        else:
            data, executor = await self._source.read_at(*extents[0]), None
            read = partial(_given, data)
        blocks, spent = await loop.run_in_executor(executor, self._read_and_check, read, extents, loop.time)
        if self._observe:
            for seconds in spent:
                self._observe(seconds)
        return blocks

    def _read_and_check(
        self, read: Callable[[int, int], bytes], extents: list[_Extent], clock: Callable[[], float]
    ) -> tuple[list[bytes], list[float]]:
        """The blocks, and the seconds that the check of each chunk took."""
        blocks: list[bytes] = []
        spent: list[float] = []
        for offset, length in extents:
            try:
                block = _whole(read(offset, length), "the source", offset, length)
                spent += self._check(offset, block, clock)
            except (Refused, Transient):
                if not blocks:
                    raise
                break
            blocks.append(block)
        return blocks, spent

    def _check(self, offset: int, block: bytes, clock: Callable[[], float]) -> list[float]:
        """Return if each chunk of ``block`` matches; it begins where a chunk does."""
        size, view, spent = self.index.chunk_size, memoryview(block), []
        begun = clock()
        for number, at in enumerate(range(0, len(block), size), offset // size):
            self.index.check(number, view[at : at + size])
            ended = clock()
            spent.append(ended - begun)
            begun = ended
        return spent


def _given(data: bytes, offset: int, length: int) -> bytes:
    return data


async def _read_table(reader: _VerifiedFile) -> tuple[tuple[Segment, ...], int]:
    """The container's segments, and the offset in the file where the first one's bytes begin."""
    if reader.index.length < _HEADER.size:
        raise _invalid(f"{reader.index.length} bytes are too short for a header of {_HEADER.size}")
    count = _parse_header(await reader.read(0, _HEADER.size))
    begin = _HEADER.size + count * _ENTRY.size
    if begin > reader.index.length:
        raise _invalid(f"{reader.index.length} bytes are too short for a table of {count} segments")
    table = await reader.read(_HEADER.size, begin - _HEADER.size)
    segments = tuple(Segment(*entry) for entry in _ENTRY.iter_unpack(table))
    fault = _table_fault(segments) or _length_fault(segments, begin, reader.index.length)
    if fault:
        raise _invalid(fault)
    return segments, begin


def _parse_header(head: bytes) -> int:
    """The number of segments. Raises Refused(IMAGE_INVALID)."""
    magic, version, reserved, count, reserved_too = _HEADER.unpack(head)
    if magic != MAGIC:
        raise _invalid(f"it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise _invalid(f"version {version} is not known, only {VERSION}")
    if reserved or reserved_too:
        raise _invalid(f"the reserved fields are {reserved} and {reserved_too}, not 0")
    assert isinstance(count, int)
    return count


def _table_fault(segments: Sequence[Segment]) -> str | None:
    if not 1 <= len(segments) <= _MAX_SEGMENTS:
        return f"{len(segments)} segments; there must be 1 to {_MAX_SEGMENTS}"
    free = 0
    for number, segment in enumerate(segments):
        if segment.length < 1:
            return f"segment {number} at {segment.address:#x} is empty"
        if segment.address < free:
            return (
                f"segment {number} at {segment.address:#x} begins before {free:#x}, the end of the one before"
            )
        free = segment.address + segment.length
    return f"the last segment ends beyond address {_ADDRESSES - 1:#x}" if free > _ADDRESSES else None


def _length_fault(segments: Sequence[Segment], begin: int, length: int) -> str | None:
    expected = begin + sum(segment.length for segment in segments)
    return None if expected == length else f"header and segments make {expected} bytes, the file has {length}"


def _opaque(length: int) -> tuple[Segment, ...]:
    if length < 1:
        raise _invalid("the file is empty")
    return (Segment(0, length),)


def _begins(segments: Sequence[Segment], begin: int) -> tuple[int, ...]:
    """Per segment the offset in the file where its bytes begin."""
    begins = []
    for segment in segments:
        begins.append(begin)
        begin += segment.length
    return tuple(begins)


def _pread(fd: int, length: int, offset: int) -> bytes:
    """Up to ``length`` bytes; fewer only at the end of the file."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _whole(data: bytes, where: str, offset: int, length: int) -> bytes:
    if len(data) != length:
        text = f"{where}: {len(data)} bytes instead of {length} at offset {offset}"
        raise Refused(Reason.LENGTH_MISMATCH, text)
    return data


def _invalid(text: str) -> Refused:
    return Refused(Reason.IMAGE_INVALID, f"image container: {text}")
