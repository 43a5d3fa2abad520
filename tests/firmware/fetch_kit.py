"""Servers for the download tests: an honest one with ranges, and hostile ones, all on the loopback."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from edged_firmware.chunks import ChunkIndex
from edged_firmware.part_file import Expected

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def expected(data: bytes) -> Expected:
    return Expected(len(data), hashlib.sha256(data).hexdigest())


def index_of(data: bytes, size: int = 4096) -> ChunkIndex:
    return ChunkIndex.build(data, size)


@asynccontextmanager
async def serve(handler: Handler) -> AsyncIterator[str]:
    """The address of a server that gives every GET to ``handler``."""

    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(request)

    app = web.Application()
    app.router.add_get("/{tail:.*}", handle)
    # The newer library takes the time-out for the runner, the older one for the site.
    patience: dict[str, Any] = {"shutdown_timeout": 0.1}
    newer = "shutdown_timeout" in inspect.signature(web.BaseRunner.__init__).parameters
    runner = web.AppRunner(app, access_log=None, **(patience if newer else {}))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, **({} if newer else patience))
    await site.start()
    server = site._server
    assert isinstance(server, asyncio.Server)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()


class Seen:
    """An honest server for one file, by the library's own FileResponse, that notes what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[dict[str, str]] = []

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(dict(request.headers))
        return web.FileResponse(self.path)

    @property
    def ranges(self) -> list[str | None]:
        return [headers.get("Range") for headers in self.requests]


class Sending:
    """A server that streams ``data`` in pieces, with ranges, an entity tag and a way to go wrong.

    ``stop_after``: bytes of a body after which the connection is dropped. ``hold_after``: bytes of a body
    after which nothing more comes. ``tag``: the entity tag; a request whose If-Range names another gets the
    whole file.
    """

    def __init__(self, data: bytes, piece: int = 1000, pause_s: float = 0.0) -> None:
        self.data = data
        self.piece = piece
        self.pause_s = pause_s
        self.tag = '"one"'
        self.stop_after: int | None = None
        self.hold_after: int | None = None
        self.ranges: list[str | None] = []
        self.if_ranges: list[str | None] = []
        self.statuses: list[int] = []

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        self.if_ranges.append(request.headers.get("If-Range"))
        if asked and request.headers.get("If-Range", self.tag) == self.tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            where = f"bytes {start}-{len(self.data) - 1}/{len(self.data)}"
            response = web.StreamResponse(status=206, headers={"Content-Range": where})
        else:
            start, response = 0, web.StreamResponse()
        response.headers["ETag"] = self.tag
        response.content_length = len(self.data) - start
        self.statuses.append(response.status)
        await response.prepare(request)
        await self._send(request, response, start)
        return response

    async def _send(self, request: web.Request, response: web.StreamResponse, start: int) -> None:
        for at in range(start, len(self.data), self.piece):
            if self.stop_after is not None and at - start >= self.stop_after:
                assert request.transport is not None
                request.transport.close()
                return
            if self.hold_after is not None and at - start >= self.hold_after:
                await asyncio.sleep(60)
            await response.write(self.data[at : at + self.piece])
            if self.pause_s:
                await asyncio.sleep(self.pause_s)


def streaming(*pieces: bytes, status: int = 200, **headers: str) -> Handler:
    """A handler that sends ``pieces`` without saying how long they are together."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(
            status=status, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )
        response.enable_chunked_encoding()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    return handler


def answering(status: int, body: bytes = b"", **headers: str) -> Handler:
    """A handler with a fixed answer."""

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(
            status=status, body=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
        )

    return handler
