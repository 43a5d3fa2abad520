"""Images: the container's rules, and that nothing but verified bytes is ever read."""

from __future__ import annotations

import asyncio
import os
import struct
import threading
from collections.abc import Coroutine
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged_firmware.chunks import ChunkIndex
from edged_firmware.errors import EdgedError, Reason, Refused, Transient
from edged_firmware.image import ByteSource, FileSource, Image, MemorySource, Segment, pack

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


async def open_packed(file: bytes, size: int = 512, opaque: bool = False) -> Image:
    return await Image.open(MemorySource(file), ChunkIndex.build(file, size), opaque)


class PlainSource:
    """A source that only ``read_at`` reads, and that remembers what was asked."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[tuple[int, int]] = []

    async def read_at(self, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        await asyncio.sleep(0)
        return self.data[offset : offset + length]


class SpySource(MemorySource):
    """A source for threads that remembers what was asked, and can be told to give something else."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.asked: list[tuple[int, int]] = []

    def read_blocking(self, offset: int, length: int) -> bytes:
        self.asked.append((offset, length))
        return super().read_blocking(offset, length)


@st.composite
def packed_segments(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    address, segments = 0, []
    for data in draw(st.lists(st.binary(min_size=1, max_size=900), min_size=1, max_size=4)):
        address += draw(st.integers(0, 2**20))
        segments.append((address, data))
        address += len(data)
    return segments


def test_the_layout_is_as_written_down() -> None:
    packed = pack([(0x0800_0000, b"abc"), (0x0800_1000, b"de")])
    head = b"EDGEDIMG" + bytes([1, 0]) + struct.pack(">HI", 2, 0)
    table = struct.pack(">QQQQ", 0x0800_0000, 3, 0x0800_1000, 2)
    assert packed == head + table + b"abcde"


@given(packed_segments(), st.data())
def test_a_read_is_the_slice(segments: list[tuple[int, bytes]], draw: st.DataObject) -> None:
    async def scenario() -> None:
        image = await open_packed(pack(segments))
        assert image.segments == tuple(Segment(address, len(data)) for address, data in segments)
        assert image.size_bytes == sum(len(data) for _, data in segments)
        assert image.length == len(pack(segments))
        for number, (_, data) in enumerate(segments):
            offset = draw.draw(st.integers(0, len(data)))
            length = draw.draw(st.integers(0, len(data) - offset))
            assert await image.read(number, offset, length) == data[offset : offset + length]
            assert await image.read(image.segments[number], 0, len(data)) == data

    run(scenario())


@given(packed_segments(), st.booleans(), st.booleans(), st.data())
def test_a_flipped_bit_in_the_file_is_never_read(
    segments: list[tuple[int, bytes]], opaque: bool, plain: bool, draw: st.DataObject
) -> None:
    file = pack(segments)
    index = ChunkIndex.build(file, 512)
    bit = draw.draw(st.integers(0, len(file) * 8 - 1))
    wrong = bytearray(file)
    wrong[bit // 8] ^= 1 << bit % 8
    source: ByteSource = PlainSource(bytes(wrong)) if plain else MemorySource(bytes(wrong))
    bad_chunk = bit // 8 // 512

    async def scenario() -> None:
        try:
            image = await Image.open(source, index, opaque)
        except Refused as refused:
            assert refused.reason is Reason.CHUNK_MISMATCH
            assert bad_chunk == 0 and not opaque
            return
        await every_byte_is_right_or_refused(image, segments if not opaque else [(0, file)])

    async def every_byte_is_right_or_refused(image: Image, expected: list[tuple[int, bytes]]) -> None:
        at = 0 if opaque else 16 + 16 * len(expected)
        for number, (_, data) in enumerate(expected):
            for offset in range(0, len(data), 100):
                length = min(100, len(data) - offset)
                touched = range((at + offset) // 512, (at + offset + length - 1) // 512 + 1)
                if bad_chunk in touched:
                    with pytest.raises(Refused, match="chunk_mismatch"):
                        await image.read(number, offset, length)
                else:
                    # A good chunk is to be had, whatever its neighbours are.
                    assert await image.read(number, offset, length) == data[offset : offset + length]
            at += len(data)

    run(scenario())


@given(packed_segments(), st.data())
def test_a_flipped_bit_in_the_index_never_gives_a_byte(
    segments: list[tuple[int, bytes]], draw: st.DataObject
) -> None:
    file = pack(segments)
    encoded = bytearray(ChunkIndex.build(file, 512).encode())
    bit = draw.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8

    async def scenario() -> None:
        image = await Image.open(MemorySource(file), ChunkIndex.decode(encoded), False)
        for number, (_, data) in enumerate(segments):
            assert await image.read(number, 0, len(data)) == data
        pytest.fail("an index with a flipped bit was good for the whole file")

    with pytest.raises(Refused):
        run(scenario())


@given(st.binary(max_size=200))
def test_garbage_with_a_right_index_is_refused(file: bytes) -> None:
    with pytest.raises(Refused) as raised:
        run(open_packed(file))
    assert raised.value.reason is Reason.IMAGE_INVALID


def container(table: list[tuple[int, int]], payload: int, **changes: object) -> bytes:
    fields = {"magic": b"EDGEDIMG", "version": 1, "r1": 0, "count": len(table), "r2": 0}
    head = struct.pack(">8sBBHI", *(fields | changes).values())
    return head + b"".join(struct.pack(">QQ", *entry) for entry in table) + bytes(payload)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (b"", "too short for a header"),
        (container([(0, 4)], 4, magic=b"EDGEDIDX"), "begins with"),
        (container([(0, 4)], 4, version=2), "version 2"),
        (container([(0, 4)], 4, r1=1), "reserved"),
        (container([(0, 4)], 4, r2=1), "reserved"),
        (container([], 0), "0 segments"),
        (container([(0, 4)], 4, count=3), "table of 3"),
        (container([(0, 0)], 0), "is empty"),
        (container([(8, 4), (0, 4)], 8), "begins before"),
        (container([(0, 4), (3, 4)], 8), "begins before"),
        (container([(2**64 - 3, 4)], 4), "beyond address"),
        (container([(0, 4)], 3), "make 36 bytes, the file has 35"),
        (container([(0, 4)], 5), "make 36 bytes, the file has 37"),
        (container([(0, 2**63), (2**63, 2**63)], 4), "the file has"),
    ],
)
def test_each_fault_of_a_container_is_named(file: bytes, text: str) -> None:
    with pytest.raises(Refused, match=text) as raised:
        run(open_packed(file))
    assert raised.value.reason is Reason.IMAGE_INVALID


@pytest.mark.parametrize(
    "segments",
    [[], [(0, b"")], [(4, b"a"), (0, b"b")], [(0, b"ab"), (1, b"c")], [(-1, b"a")], [(2**64, b"a")]],
)
def test_pack_takes_sorted_segments_that_are_not_empty(segments: list[tuple[int, bytes]]) -> None:
    with pytest.raises(ValueError, match="segment"):
        pack(segments)


def test_an_opaque_file_is_one_segment_at_zero() -> None:
    file = os.urandom(5000)

    async def scenario() -> None:
        image = await open_packed(file, opaque=True)
        assert image.opaque
        assert image.segments == (Segment(0, 5000),)
        assert (image.size_bytes, image.length) == (5000, 5000)
        assert await image.read(0, 0, 5000) == file

    run(scenario())
    with pytest.raises(Refused, match="empty"):
        run(open_packed(b"", opaque=True))


@pytest.mark.parametrize(
    ("segment", "offset", "length"),
    [(1, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 0, -1), (0, 0, 5), (0, 4, 1), (0, 5, 0), (Segment(0, 5), 0, 1)],
)
def test_what_is_not_inside_is_an_argument_error(segment: int | Segment, offset: int, length: int) -> None:
    async def scenario() -> None:
        image = await open_packed(pack([(0, b"abcd")]))
        with pytest.raises(ValueError):
            await image.read(segment, offset, length)

    run(scenario())


@pytest.mark.parametrize("plain", [True, False])
def test_a_short_source_is_a_length_mismatch_and_gives_what_is_whole(plain: bool) -> None:
    file = os.urandom(2000)
    source: ByteSource = PlainSource(file[:1500]) if plain else MemorySource(file[:1500])

    async def scenario() -> None:
        image = await Image.open(source, ChunkIndex.build(file, 512), True)
        assert await image.read(0, 0, 1024) == file[:1024]
        with pytest.raises(Refused) as raised:
            await image.read(0, 0, 1025)
        assert raised.value.reason is Reason.LENGTH_MISMATCH

    run(scenario())


def test_a_chunk_is_verified_again_when_it_is_read_again_from_the_source() -> None:
    file = bytearray(os.urandom(2 * 1024 * 1024))
    index = ChunkIndex.build(bytes(file), 4096)

    class Changing:
        async def read_at(self, offset: int, length: int) -> bytes:
            return bytes(file[offset : offset + length])

    async def scenario() -> None:
        image = await Image.open(Changing(), index, True)
        first = await image.read(0, 0, 100)
        file[50] ^= 1
        assert await image.read(0, 0, 100) == first
        for offset in range(4096, len(file), 65536):
            await image.read(0, offset, 100)
        with pytest.raises(Refused, match="chunk_mismatch"):
            await image.read(0, 0, 100)
        file[50] ^= 1
        assert await image.read(0, 0, 100) == first

    run(scenario())


@pytest.mark.parametrize("plain", [True, False])
def test_reading_straight_on_reads_each_byte_once_and_memory_is_bounded(plain: bool) -> None:
    file = os.urandom(3 * 1024 * 1024 + 77)
    source = PlainSource(file) if plain else SpySource(file)

    async def scenario() -> None:
        image = await Image.open(source, ChunkIndex.build(file, 4096), True)
        read = [await image.read(0, at, min(3000, len(file) - at)) for at in range(0, len(file), 3000)]
        assert b"".join(read) == file
        kept = image._reader._blocks.values()
        assert sum(len(block) for block in kept) <= 1024 * 1024

    run(scenario())
    assert sum(length for _, length in source.asked) == len(file)
    if not plain:
        assert len({offset // (512 * 1024) for offset, _ in source.asked}) <= 7


def test_what_is_at_hand_is_what_was_read_and_verified() -> None:
    file = bytearray(os.urandom(200_000))
    index = ChunkIndex.build(file, 4096)
    file[70_000] ^= 1
    source = SpySource(bytes(file))

    async def scenario() -> None:
        image = await Image.open(source, index, True)
        assert image.at_hand(0, 100, 200) is None, "nothing was read"
        await image.read(0, 0, 1)
        assert image.at_hand(0, 100, 200) == file[100:300]
        assert image.at_hand(0, 0, 65536) == file[:65536]
        assert image.at_hand(0, 65535, 2) is None, "not all of it was read"
        with pytest.raises(Refused):
            await image.read(0, 69_999, 2)
        assert image.at_hand(0, 69_999, 2) is None, "a chunk that is not what was signed"
        await image.read(0, 131_072, 1)
        assert image.at_hand(0, 131_000, 100) is None, "it lies in two blocks"
        with pytest.raises(ValueError, match="not inside"):
            image.at_hand(0, 199_999, 2)

    run(scenario())


def test_one_byte_here_and_there_reads_no_more_than_a_block_each() -> None:
    file = os.urandom(4 * 1024 * 1024)
    source = SpySource(file)

    async def scenario() -> None:
        image = await Image.open(source, ChunkIndex.build(file, 512), True)
        for at in (3_000_000, 10, 2_000_000, 20, 3_000_001):
            assert await image.read(0, at, 1) == file[at : at + 1]

    run(scenario())
    assert [length for _, length in source.asked] == [65536] * 3


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 700_000), st.integers(0, 200_000)), max_size=12), st.booleans())
def test_tasks_that_read_at_once_each_get_their_own(reads: list[tuple[int, int]], plain: bool) -> None:
    file = os.urandom(1000) * 900
    source: ByteSource = PlainSource(file) if plain else MemorySource(file)

    async def scenario() -> None:
        image = await Image.open(source, ChunkIndex.build(file, 8192), True)
        got = await asyncio.gather(*(image.read(0, *read) for read in reads))
        assert got == [file[offset : offset + length] for offset, length in reads]

    run(scenario())


def test_a_cancelled_reader_does_not_disturb_the_others() -> None:
    file = os.urandom(300_000)

    async def scenario() -> None:
        image = await Image.open(PlainSource(file), ChunkIndex.build(file, 4096), True)
        tasks = [asyncio.create_task(image.read(0, 0, 300_000)) for _ in range(6)]
        for task in tasks[::2]:
            await asyncio.sleep(0)
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert done[1::2] == [file] * 3
        assert all(isinstance(result, asyncio.CancelledError) for result in done[::2])

    run(scenario())


def test_each_chunk_that_was_verified_is_observed_on_the_loop() -> None:
    file = os.urandom(100_000)
    seen: list[float] = []

    def observe(seconds: float) -> None:
        asyncio.get_running_loop()
        seen.append(seconds)

    async def scenario() -> None:
        image = await Image.open(MemorySource(file), ChunkIndex.build(file, 4096), True, observe)
        await image.read(0, 0, 100_000)

    run(scenario())
    assert len(seen) == 25
    assert all(0 <= seconds < 5 for seconds in seen)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_file_is_read_and_closed(tmp_path: Path) -> None:
    data = os.urandom(100_000)
    (tmp_path / "f").write_bytes(pack([(0, data)]))
    index = ChunkIndex.of_file(tmp_path / "f", 4096)

    async def scenario() -> None:
        before = descriptors()
        async with FileSource(tmp_path / "f") as source:
            image = await Image.open(source, index, False)
            assert await image.read(0, 0, len(data)) == data
            assert await source.read_at(0, 8) == b"EDGEDIMG"
            with pytest.raises(Refused, match="length_mismatch"):
                await source.read_at(image.length - 1, 2)
            with pytest.raises(ValueError, match="open already"):
                await source.__aenter__()
        assert descriptors() == before
        with pytest.raises(ValueError, match="not open"):
            await source.read_at(0, 1)
        with pytest.raises(ValueError, match="not open"):
            await (await Image.open(source, index, True)).read(0, 0, 1)
        async with source:
            assert await source.read_at(0, 8) == b"EDGEDIMG"

    run(scenario())
    for thread in threading.enumerate():
        if thread.name.startswith("edged-file"):
            thread.join(10)
            assert not thread.is_alive()


def test_what_is_no_file_is_storage_failed_and_nothing_stays_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    async def scenario() -> None:
        before = descriptors()
        for name in ("none", "pipe", "."):
            with pytest.raises(Transient) as raised:
                async with FileSource(tmp_path / name):
                    pass
            assert raised.value.reason is Reason.STORAGE_FAILED
        assert descriptors() == before

    run(scenario())


def test_a_cancelled_opening_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    opening, go_on = threading.Event(), threading.Event()
    real = os.open

    def slow(path: Any, *arguments: Any, **keywords: Any) -> int:
        if Path(path) == tmp_path / "f":
            opening.set()
            go_on.wait(20)
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", slow)

    async def scenario() -> None:
        before = descriptors()
        source = FileSource(tmp_path / "f")
        task = asyncio.create_task(source.__aenter__())
        assert await asyncio.to_thread(opening.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        for _ in range(2000):
            if descriptors() == before:
                return
            await asyncio.sleep(0.01)
        pytest.fail("the file is still open")

    run(scenario())


def test_a_read_that_the_system_refuses_is_transient_and_may_work_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 1000)
    index = ChunkIndex.of_file(tmp_path / "f", 512)

    def fail(*arguments: object) -> bytes:
        raise OSError(5, "Input/output error")

    async def scenario() -> None:
        async with FileSource(tmp_path / "f") as source:
            image = await Image.open(source, index, True)
            with monkeypatch.context() as patch:
                patch.setattr(os, "pread", fail)
                with pytest.raises(EdgedError) as raised:
                    await image.read(0, 0, 10)
            assert isinstance(raised.value, Transient)
            assert raised.value.reason is Reason.STORAGE_FAILED
            assert await image.read(0, 0, 6) == b"abcabc"

    run(scenario())


def test_short_reads_of_the_system_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"0123456789" * 100)
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: real(fd, min(length, 7), offset))

    async def scenario() -> None:
        async with FileSource(tmp_path / "f") as source:
            assert await source.read_at(5, 900) == (b"0123456789" * 100)[5:905]

    run(scenario())


def test_a_memory_source_names_no_thread() -> None:
    executor: Executor | None = MemorySource(b"").executor
    assert executor is None
