"""What the serial mapper decides without a port: pages, frames, lines, configuration."""

from __future__ import annotations

import asyncio
from functools import reduce
from operator import xor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uart_kit import MAPPERS, verified

from edged.api import Reported, Segment
from edged.errors import Permanent, Reason
from edged_uart.config import UartConfig
from edged_uart.link import port_path, split_baud
from edged_uart.pages import plan
from edged_uart.session import parse_report
from edged_uart.stk500v2 import checksum, frame, frame_end, frame_start


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, bytes]]:
    """Segments that are sorted and do not overlap, often two in one page."""
    parts, free = [], 0
    for _ in range(draw(st.integers(1, 4))):
        address = free + draw(st.integers(0, 300))
        data = draw(st.binary(min_size=1, max_size=400))
        parts.append((address, data))
        free = address + len(data)
    return parts


@given(layouts(), st.sampled_from([64, 128, 256]), st.booleans())
def test_pages_hold_each_byte_of_the_image_once_and_nothing_else(
    parts: list[tuple[int, bytes]], size: int, from_start: bool
) -> None:
    async def paint() -> bytearray:
        image = await verified(parts)
        flash = bytearray(b"\xff" * 4096)
        pages = plan(image.segments, size, from_start=from_start)
        assert len({page.address for page in pages}) == len(pages)
        for page in pages:
            assert page.address % size == 0
            flash[page.address : page.address + size] = await page.content(image)
        if from_start:
            assert [page.address for page in pages] == [number * size for number in range(len(pages))]
        return flash

    wanted = bytearray(b"\xff" * 4096)
    for address, data in parts:
        wanted[address : address + len(data)] = data
    assert asyncio.run(paint()) == wanted


def test_what_the_image_does_not_cover_does_not_count() -> None:
    page = plan([Segment(address=130, length=4)], 128, from_start=False)[0]
    held = b"\xaa" * 128
    wanted = bytearray(b"\xff" * 128)
    wanted[2:6] = held[2:6]
    assert page.agrees(held, bytes(wanted))
    assert not page.agrees(held, b"\xff" * 128)


@given(st.integers(0, 255), st.binary(min_size=1, max_size=275), st.binary(max_size=40))
def test_a_frame_is_found_behind_noise_and_in_pieces(sequence: int, body: bytes, noise: bytes) -> None:
    whole = frame(sequence, body)
    assert checksum(whole) == 0 == reduce(xor, whole)
    noise = noise.replace(b"\x1b", b"")
    got = bytearray(noise + whole + b"\x1b")
    assert (frame_start(got), frame_end(got)) == (len(noise), len(noise + whole))
    for end in range(len(whole)):
        assert frame_end(bytearray(noise + whole[:end])) > len(noise) + end


@given(st.binary(max_size=2000))
def test_no_input_makes_the_framing_fail_or_wait_for_more_than_a_frame(noise: bytes) -> None:
    got = bytearray(noise)
    assert frame_start(got) <= len(got)
    assert frame_end(got) <= frame_start(got) + 281


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("uptime=12", Reported("uptime", 12)),
        ("t=-3.5", Reported("t", -3.5)),
        ("t=1.0e3", Reported("t", 1000.0)),
        ("door.open=true", Reported("door.open", True)),
        ("last=null", Reported("last", None)),
        ("version=1.2.0", Reported("version", "1.2.0")),
        ("text= a b ", Reported("text", "a b")),
        ("x=nan", Reported("x", "nan")),
        ("empty=", Reported("empty", "")),
        ("edged-app demo 1.2.0 ready", None),
        ("=1", None),
        ("a b=1", None),
        ("", None),
    ],
)
def test_lines_and_properties(line: str, wanted: Reported | None) -> None:
    assert parse_report(line) == wanted


def test_port_names() -> None:
    assert port_path("/dev/ttyUSB0") == "/dev/ttyUSB0"
    assert port_path("by-id/usb-x") == "/dev/serial/by-id/usb-x"
    for bad in ("ttyUSB0", "by-id/../../etc", "", "/dev/ttyUSB0@57600"):
        with pytest.raises(Permanent) as caught:
            port_path(bad)
        assert caught.value.reason is Reason.CONFIG_INVALID


@pytest.mark.parametrize(
    ("address", "port", "baud"),
    [
        ("serial:/dev/ttyUSB0", "serial:/dev/ttyUSB0", None),
        ("serial:/dev/ttyUSB0@57600", "serial:/dev/ttyUSB0", 57600),
        ("serial:by-id/a@b@9600", "serial:by-id/a@b", 9600),
        ("serial:by-id/a@b", "serial:by-id/a@b", None),
        ("serial:/dev/ttyUSB0@", "serial:/dev/ttyUSB0@", None),
        ("serial:/dev/ttyUSB0@٣", "serial:/dev/ttyUSB0@٣", None),
        ("@9600", "@9600", None),
    ],
)
def test_an_address_may_name_a_rate(address: str, port: str, baud: int | None) -> None:
    assert split_baud(address) == (port, baud)


@pytest.mark.parametrize(
    ("mapper", "table", "words"),
    [
        ("uart-stk500", {"bauds": 9600}, ["bauds", "allowed", "baud"]),
        ("uart-stk500", {"baud": 12}, ["baud", "12", "1200"]),
        ("uart-stk500", {"baud": True}, ["baud", "True"]),
        ("uart-stk500", {"baud": "9600"}, ["baud", "'9600'"]),
        ("uart-stk500", {"erase": "page"}, ["erase", "unknown key"]),
        ("uart-stk500", {"page_bytes": 100}, ["page_bytes", "100", "128"]),
        ("uart-stk500", {"reset": "rts"}, ["reset", "'rts'", "'dtr'"]),
        ("uart-stk500", {"answer_s": 0}, ["answer_s", "0.05"]),
        ("uart-stk500v2", {"erase": "never"}, ["erase", "'never'", "'from_start'"]),
        ("uart-stk500v2", {"reset": "none"}, ["reset", "from_start"]),
    ],
)
def test_configuration_is_refused_with_key_value_and_what_is_allowed(
    mapper: str, table: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=words[0]) as caught:
        MAPPERS[mapper].parse_config(table)
    assert all(word in str(caught.value) for word in words)


def test_configuration_that_is_good() -> None:
    assert MAPPERS["uart-stk500"].parse_config({}) == UartConfig()
    wanted = UartConfig(baud=57600, app_baud=9600, reset="none", page_bytes=64, answer_s=2, boot_s=0)
    assert (
        MAPPERS["uart-stk500"].parse_config(
            {
                "baud": 57600,
                "app_baud": 9600,
                "reset": "none",
                "page_bytes": 64,
                "answer_s": 2,
                "boot_s": 0,
            }
        )
        == wanted
    )
    assert MAPPERS["uart-stk500v2"].parse_config({"reset": "none", "erase": "page"})
