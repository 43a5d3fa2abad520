"""What the tests of the serial mapper share: boards, images, sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import intelhex
import pytest

import edged_uart
from edged.api import Device, Image, Phase
from edged.links import LinkPool, device_env
from edged.testing.avr import STK500BOOT_2560, Board, SimulatedAvr, build_app, missing_packages
from edged.testing.conformance import Subject
from edged_firmware.chunks import ChunkIndex
from edged_firmware.image import MemorySource, pack
from edged_uart.session import UartSession

Segments = list[tuple[int, bytes]]
ANSWER_S = 4.0
"""A simulator that shares two cores with other tests is slow to answer at times; a real board is not."""

needs_avr = pytest.mark.skipif(bool(missing_packages()), reason=f"not installed: {missing_packages()}")
MAPPERS = {spec.name: spec for spec in edged_uart.edged_mappers()}
LINKS = {spec.scheme: spec for spec in edged_uart.edged_links()}


def app(board: Board, version: str, filler_bytes: int = 2000, *, healthy: bool = True) -> Path:
    return build_app(
        version=version, filler_bytes=filler_bytes, mcu=board.mcu, baud=board.baud, healthy=healthy
    )


def segments(hex_file: Path) -> Segments:
    image = intelhex.IntelHex(str(hex_file))
    return [(start, bytes(image.tobinarray(start=start, end=end - 1))) for start, end in image.segments()]


async def verified(parts: Segments) -> Image:
    file = pack(parts)
    return await Image.open(MemorySource(file), ChunkIndex.build(file, 512))


def device(avr: SimulatedAvr, **config: object) -> Device:
    board = avr.board
    name = "uart-stk500v2" if board is STK500BOOT_2560 else "uart-stk500"
    return Device(
        id="board",
        model="board",
        mapper=name,
        address=f"serial:{avr.port}",
        hardware_ids=(f"avr:{board.signature.hex()}",),
        flash_size_bytes=board.boot_at,
        config=MAPPERS[name].parse_config({"baud": board.baud, "answer_s": ANSWER_S, **config}),
    )


@asynccontextmanager
async def connected(to: Device) -> AsyncIterator[UartSession]:
    env = device_env(to.id, LinkPool(LINKS))
    async with MAPPERS[to.mapper].connect(to, env) as session:
        assert isinstance(session, UartSession)
        yield session


def subject(avr: SimulatedAvr) -> Subject:
    to = device(avr)

    async def unplug() -> None:
        await asyncio.to_thread(avr.unplug)

    async def plug() -> None:
        await asyncio.to_thread(avr.plug)

    async def mute() -> None:
        avr.stand_still()

    async def unmute() -> None:
        avr.go_on()

    def holds(address: int, length: int) -> bytes:
        return avr.flash()[address : address + length]

    return Subject(
        spec=MAPPERS[to.mapper],
        links=LINKS,
        device=to,
        first=segments(app(avr.board, "1.2.0")),
        second=segments(app(avr.board, "1.3.0")),
        sent=avr.tapped,
        holds=holds,
        written=lambda: avr.stats().pages_written * avr.board.page_bytes,
        unit_bytes=avr.board.page_bytes,
        unplug=unplug,
        plug=plug,
        mute=mute,
        unmute=unmute,
    )


class Watched:
    """A progress that remembers, and may be waited for."""

    def __init__(self) -> None:
        self.seen: list[tuple[Phase, int, int]] = []
        self._half = asyncio.Event()

    def __call__(self, phase: Phase, done_bytes: int, total_bytes: int) -> None:
        self.seen.append((phase, done_bytes, total_bytes))
        if phase is Phase.WRITE and 2 * done_bytes >= total_bytes:
            self._half.set()

    async def half_written(self) -> None:
        await self._half.wait()

    def bytes_of(self, phase: Phase) -> int:
        return max((done for seen, done, _ in self.seen if seen is phase), default=0)
