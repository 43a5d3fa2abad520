"""Raw binaries and Intel HEX files as segments, and the check against a device's flash."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from intelhex import IntelHex

from edged_firmware.errors import Reason, Refused, Transient
from edged_firmware.formats import check_fits, load
from edged_firmware.image import Segment, pack

END = ":00000001FF\n"


def record(address: int, data: bytes, kind: int = 0) -> str:
    body = bytes([len(data), address >> 8, address & 0xFF, kind]) + data
    return f":{(body + bytes([-sum(body) & 0xFF])).hex().upper()}\n"


def test_a_raw_binary_is_one_segment(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b":not hex")
    assert load(tmp_path / "a.bin") == [(0, b":not hex")]
    assert load(tmp_path / "a.bin", "bin", 0x0800_0000) == [(0x0800_0000, b":not hex")]
    assert load(b" \n") == [(0, b" \n")]
    assert load(b"\x00\x01", base_address=16) == [(16, b"\x00\x01")]


def test_adjacent_records_merge_and_gaps_stay() -> None:
    text = record(0x10, b"abc") + record(0x20, b"xy") + record(0x13, b"de") + END
    assert load(text.encode()) == [(0x10, b"abcde"), (0x20, b"xy")]
    assert load(text.replace("\n", "\r\n").lower().encode(), "hex") == [(0x10, b"abcde"), (0x20, b"xy")]


def test_extended_addresses_and_the_start_address() -> None:
    text = record(0, b"\x08\x00", 4) + record(0xFFFE, b"ab") + record(0, b"\x08\x01", 4) + record(0, b"cd")
    text += record(0, b"\x08\x00\x01\x01", 5) + END
    assert load(text.encode()) == [(0x0800_FFFE, b"abcd")]
    assert load((record(0, b"\x10\x00", 2) + record(4, b"a") + END).encode()) == [(0x10004, b"a")]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.binary(min_size=1, max_size=300)), min_size=1, max_size=5),
    st.integers(0, 2**32 - 2**16),
)
def test_what_the_library_writes_is_read_back(parts: list[tuple[int, bytes]], base: int) -> None:
    segments, address, file = [], base, IntelHex()
    for gap, data in parts:
        segments.append((address + gap, data))
        file.puts(address + gap, data)
        address += gap + len(data)
    text = io.StringIO()
    file.write_hex_file(text)
    assert load(text.getvalue().encode()) == segments
    pack(segments)


GOOD = record(0, b"abcd")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (GOOD + GOOD.replace("61", "62") + END, "line 2", "checksum"),
        (GOOD + record(2, b"zz") + END, "line 2", "overlap"),
        (GOOD + record(4, b"zz"), "line 2", "without an end-of-file record"),
        (GOOD + END[:7], "line 2", "without an end-of-file record"),
        (GOOD + END + record(4, b"z"), "line 3", "more after"),
        (GOOD + END + END, "line 3", "more after"),
        (GOOD + "hello world\n" + END, "line 2", "invalid record"),
        (GOOD + ":zz\n" + END, "line 2", "invalid record"),
        (GOOD + ":0000\n" + END, "line 2", "invalid record"),
        (GOOD + ":10000000AA56\n" + END, "line 2", "length"),
        (GOOD + record(0, b"", 9) + END, "line 2", "type"),
        (GOOD + ":00000001FE\n", "line 2", "checksum"),
        (GOOD + record(0, b"\x08", 4) + END, "line 2", "Extended"),
        ("\xff\xfe" + GOOD + END, "line 1", "invalid record"),
        (END, "", "no data"),
    ],
)
def test_each_fault_of_a_hex_file_names_file_and_line(
    tmp_path: Path, text: str, line: str, words: str
) -> None:
    path = tmp_path / "app.hex"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(Refused) as raised:
        load(path)
    assert raised.value.reason is Reason.IMAGE_INVALID
    assert "app.hex" in raised.value.detail
    assert line in raised.value.detail
    assert words in raised.value.detail


@pytest.mark.parametrize(
    ("name", "data"), [("a.hex", b""), ("a.bin", b""), ("a", b""), ("a.hex", b"\r\n \n")]
)
def test_an_empty_file_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Refused, match=f"image_invalid: {name}: the file is empty"):
        load(tmp_path / name)


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(":0123456789ABCDEF\n", max_size=60).map(str.encode)))
def test_garbage_as_hex_is_refused_and_nothing_else(data: bytes) -> None:
    try:
        load(data + b"\n" + GOOD.encode() + END.encode(), "hex")
    except Refused as refused:
        assert refused.reason is Reason.IMAGE_INVALID


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base address"):
        load((GOOD + END).encode(), "hex", 4)
    with pytest.raises(ValueError, match="elf"):
        load(b"x", "elf")
    with pytest.raises(Transient, match="storage_failed"):
        load(tmp_path / "none.hex")


def test_what_fits_fits() -> None:
    check_fits([(0, b"abcd"), (6, b"xy")], 8)
    check_fits([Segment(0x0800_0000, 8)], 8, 0x0800_0000)
    check_fits([], 0)


@pytest.mark.parametrize(
    ("segments", "size", "base", "outside"),
    [
        ([(0, b"abcd"), (6, b"xyz")], 8, 0, "0x8;"),
        ([(100, b"a")], 8, 0, "0x64;"),
        ([Segment(0x0800_0000, 9)], 8, 0x0800_0000, "0x8000008;"),
        ([Segment(0, 4)], 8, 0x0800_0000, "0x0;"),
        ([Segment(0x07FF_FFFF, 2)], 8, 0x0800_0000, "0x7ffffff;"),
        ([(0, b"a")], 0, 0, "0x0;"),
    ],
)
def test_what_does_not_fit_is_named(
    segments: list[tuple[int, bytes] | Segment], size: int, base: int, outside: str
) -> None:
    with pytest.raises(Refused) as raised:
        check_fits(segments, size, base)
    assert raised.value.reason is Reason.IMAGE_TOO_LARGE
    assert f"bytes at {outside}" in raised.value.detail
