"""Mapper ``lamp``: firmware for a lamp that can be asked for its version and for the CRC-32 of any bytes of its one slot."""

import asyncio
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from edged import api
from edged.errors import Permanent, Reason, Transient
from edged_uart.link import SerialLink

PAGE_BYTES = 64


class LampSession:
    traits = api.SessionTraits(ceiling_bytes_per_s=100_000)

    def __init__(self, link: SerialLink) -> None:
        self._link = link

    async def identify(self) -> api.Identity:
        return api.Identity(*(await self._ask("identify")).split())

    async def reports(self) -> AsyncIterator[api.Reported]:
        while True:
            yield api.Reported("app_version", await self._ask("version"))
            await asyncio.sleep(5)

    async def slots(self) -> api.Slots:
        return api.Slots((api.Slot("flash", active=True, runs=await self._ask("version")),))

    async def stage(self, image: api.Image, progress: api.Progress) -> None:
        pages = [(part, at) for part in image.segments for at in range(0, part.length, PAGE_BYTES)]
        for phase in (api.Phase.WRITE, api.Phase.VERIFY):
            for done, (part, at) in enumerate(pages, 1):
                data = await image.read(part, at, min(PAGE_BYTES, part.length - at))
                if await self._ask(f"crc {part.address + at} {len(data)}") != f"{zlib.crc32(data):08x}":
                    if phase is api.Phase.VERIFY:
                        raise Permanent(Reason.VERIFY_FAILED, f"other bytes at {part.address + at:#x}")
                    await self._ask(f"write {part.address + at} {data.hex()}")
                progress(phase, done * PAGE_BYTES, len(pages) * PAGE_BYTES)

    async def activate(self) -> None:
        await self._ask("boot")

    async def _ask(self, request: str) -> str:
        await self._link.send(f"{(asked := time.monotonic_ns())} {request}\n".encode())
        while answer := await self._link.receive(lambda data: data.find(b"\n") + 1 or len(data) + 1, 2):
            number, _, text = answer.decode().strip().partition(" ")
            if number == str(asked):
                return text
        raise Transient(Reason.NO_RESPONSE, f"no answer to {request!r}")


@asynccontextmanager
async def connect(device: api.Device, env: api.Env) -> AsyncIterator[api.Session]:
    async with env.link(device.address) as link:
        yield LampSession(cast(SerialLink, link))


@api.hookimpl
def edged_mappers() -> list[api.MapperSpec]:
    return [api.MapperSpec("lamp", connect, flash_protocols={"lamp"}, schemes={"serial", "socket"})]
