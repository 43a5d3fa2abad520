"""Mapper ``lamp``: firmware for a lamp that can be asked for its version and for each byte of its one slot."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import cast

from edged import api
from edged.errors import Permanent, Reason, Transient
from edged_uart.link import SerialLink

PAGE_BYTES = 64


class LampSession:
    traits = api.SessionTraits(ceiling_bytes_per_s=100_000)

    def __init__(self, link: SerialLink) -> None:
        self._link, self._numbers = link, itertools.count(time.time_ns())

    async def identify(self) -> api.Identity:
        return api.Identity(*await self._ask("identify"))

    async def reports(self) -> AsyncIterator[api.Reported]:
        while True:
            yield api.Reported("app_version", (await self._ask("version"))[0])
            await asyncio.sleep(5)

    async def slots(self) -> api.Slots:
        return api.Slots((api.Slot("flash", active=True, runs=(await self._ask("version"))[0]),))

    async def stage(self, image: api.Image, progress: api.Progress) -> None:
        pages = [(n, at) for n, part in enumerate(image.segments) for at in range(0, part.length, PAGE_BYTES)]
        for phase in (api.Phase.WRITE, api.Phase.VERIFY):
            for done, (number, offset) in enumerate(pages, 1):
                start, length = image.segments[number].address, image.segments[number].length
                data = await image.read(number, offset, min(PAGE_BYTES, length - offset))
                if await self._read(start + offset, len(data)) != data:
                    if phase is api.Phase.VERIFY:
                        raise Permanent(Reason.VERIFY_FAILED, f"other bytes at {start + offset:#x}")
                    await self._ask(f"write {start + offset} {data.hex()}")
                progress(phase, done * PAGE_BYTES, len(pages) * PAGE_BYTES)

    async def activate(self) -> None:
        await self._ask("boot")

    async def read_flash(self, address: int, length: int, progress: api.Progress) -> bytes:
        found = b""
        while len(found) < length:
            found += await self._read(address + len(found), min(PAGE_BYTES, length - len(found)))
            progress(api.Phase.READ_OUT, len(found), length)
        return found

    async def _read(self, address: int, length: int) -> bytes:
        return bytes.fromhex((await self._ask(f"read {address} {length}"))[0])

    async def _ask(self, request: str) -> list[str]:
        await self._link.send(f"{(asked := next(self._numbers))} {request}\n".encode())
        while answer := await self._link.receive(lambda data: data.find(b"\n") + 1 or len(data) + 1, 2):
            number, *words = answer.decode().split()
            if number == str(asked):
                return words
        raise Transient(Reason.NO_RESPONSE, f"no answer to {request!r}")


@asynccontextmanager
async def connect(device: api.Device, env: api.Env) -> AsyncIterator[api.Session]:
    async with env.link(device.address) as link:
        yield LampSession(cast(SerialLink, link))


@api.hookimpl
def edged_mappers() -> Iterable[api.MapperSpec]:
    schemes = frozenset({"serial", "socket"})
    return [api.MapperSpec("lamp", connect, flash_protocols=frozenset({"lamp"}), schemes=schemes)]
