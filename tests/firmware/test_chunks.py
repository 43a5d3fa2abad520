"""The chunk index: its bytes, its bounds, and what it refuses."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged_firmware.chunks import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, ChunkIndex
from edged_firmware.errors import Reason, Refused, Transient

FILES = st.binary(max_size=3000)
SIZES = st.sampled_from([512, 1024, 2048])


def test_the_layout_is_as_written_down() -> None:
    data = b"a" * 512 + b"b" * 100
    encoded = ChunkIndex.build(data, 512).encode()
    head = b"EDGEDIDX" + bytes([1, 1, 0, 0]) + struct.pack(">IQI", 512, 612, 2)
    assert encoded == head + hashlib.sha256(data[:512]).digest() + hashlib.sha256(data[512:]).digest()


@given(FILES, SIZES)
def test_decode_gives_back_what_was_encoded(data: bytes, size: int) -> None:
    index = ChunkIndex.build(data, size)
    assert ChunkIndex.decode(index.encode()) == index
    assert ChunkIndex.decode(bytearray(index.encode())) == index
    assert index.count == -(-len(data) // size)


@given(st.lists(st.binary(max_size=1500), max_size=6), SIZES)
def test_how_the_file_was_cut_does_not_matter(pieces: list[bytes], size: int) -> None:
    assert ChunkIndex.build(iter(pieces), size) == ChunkIndex.build(b"".join(pieces), size)


@given(FILES, SIZES)
def test_every_chunk_of_the_file_passes(data: bytes, size: int) -> None:
    index = ChunkIndex.build(data, size)
    extents = [index.extent(number) for number in range(index.count)]
    assert b"".join(data[offset : offset + length] for offset, length in extents) == data
    for number, (offset, length) in enumerate(extents):
        index.check(number, data[offset : offset + length])


@given(st.binary(min_size=1, max_size=3000), st.data())
def test_a_flipped_bit_in_a_chunk_is_refused(data: bytes, draw: st.DataObject) -> None:
    index = ChunkIndex.build(data, 512)
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    wrong = bytearray(data)
    wrong[bit // 8] ^= 1 << bit % 8
    number = bit // 8 // 512
    offset, length = index.extent(number)
    with pytest.raises(Refused) as raised:
        index.check(number, wrong[offset : offset + length])
    assert raised.value.reason is Reason.CHUNK_MISMATCH
    assert f"chunk {number} (bytes {offset} to {offset + length - 1})" in raised.value.detail


@pytest.mark.parametrize("data", [b"", b"a" * 511, b"a" * 513])
def test_a_chunk_of_another_length_is_refused(data: bytes) -> None:
    with pytest.raises(Refused, match=f"has {len(data)} bytes"):
        ChunkIndex.build(b"a" * 600, 512).check(0, data)


@pytest.mark.parametrize("number", [-2, -1, 2, 10**9])
def test_a_chunk_that_is_not_there_is_an_argument_error(number: int) -> None:
    index = ChunkIndex.build(b"a" * 1024, 512)
    with pytest.raises(ValueError, match="of 2"):
        index.check(number, b"a" * 512)
    with pytest.raises(ValueError, match="of 2"):
        index.extent(number)


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else(data: bytes) -> None:
    with pytest.raises(Refused) as raised:
        ChunkIndex.decode(data)
    assert raised.value.reason is Reason.INDEX_MISMATCH


@given(st.binary(max_size=1500), st.data())
def test_a_changed_index_is_refused_or_is_another_index(data: bytes, draw: st.DataObject) -> None:
    index = ChunkIndex.build(data, 512)
    encoded = bytearray(index.encode())
    bit = draw.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    try:
        changed = ChunkIndex.decode(encoded)
    except Refused as refused:
        assert refused.reason is Reason.INDEX_MISMATCH
    else:
        assert changed != index


def header(**changes: object) -> bytes:
    fields = {
        "magic": b"EDGEDIDX",
        "version": 1,
        "algorithm": 1,
        "reserved": 0,
        "chunk_size": 512,
        "length": 600,
        "count": 2,
    }
    return struct.pack(">8sBBHIQI", *(fields | changes).values()) + bytes(64)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "too short"),
        (header()[:27], "too short"),
        (header(magic=b"EDGEDIMG"), "begins with"),
        (header(version=2), "version 2"),
        (header(algorithm=2), "algorithm 2"),
        (header(reserved=1), "reserved"),
        (header(chunk_size=0), "chunk size 0"),
        (header(chunk_size=256), "chunk size 256"),
        (header(chunk_size=513), "chunk size 513"),
        (header(chunk_size=MAX_CHUNK_BYTES * 2), "chunk size"),
        (header(length=512), "make 1 chunks, not 2"),
        (header(length=1025), "make 3 chunks, not 2"),
        (header(length=2**64 - 1), "chunks, not 2"),
        (header(count=1), "1 digests are announced and 64 bytes"),
        (header(count=2**32 - 1), "announced"),
        (header()[:-1], "63 bytes"),
        (header() + b"x", "65 bytes"),
    ],
)
def test_each_inconsistency_is_named(data: bytes, text: str) -> None:
    assert ChunkIndex.decode(header()).count == 2
    with pytest.raises(Refused, match=text) as raised:
        ChunkIndex.decode(data)
    assert raised.value.reason is Reason.INDEX_MISMATCH


@pytest.mark.parametrize("size", [0, -512, 256, 1000, MAX_CHUNK_BYTES * 2])
def test_chunk_sizes_have_bounds(size: int) -> None:
    with pytest.raises(ValueError, match="chunk size"):
        ChunkIndex.build(b"abc", size)
    ChunkIndex.build(b"abc", MIN_CHUNK_BYTES)
    ChunkIndex.build(b"abc", MAX_CHUNK_BYTES)


def test_fields_that_do_not_fit_together_are_an_argument_error() -> None:
    for length, digests in [(-1, b""), (1, b""), (0, bytes(32)), (512, bytes(31)), (513, bytes(32))]:
        with pytest.raises(ValueError, match=r"digests|chunks"):
            ChunkIndex(512, length, digests)


def test_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 40_000)
    assert ChunkIndex.of_file(tmp_path / "f") == ChunkIndex.build(b"abc" * 40_000, DEFAULT_CHUNK_BYTES)
    with pytest.raises(Transient, match="storage_failed"):
        ChunkIndex.of_file(tmp_path / "none")
