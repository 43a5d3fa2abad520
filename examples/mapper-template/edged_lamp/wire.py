"""The link ``tcp:HOST:PORT``: a connection on which each line that is sent is answered by one line."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

from edged.api import Env
from edged.errors import Reason, Transient


class TcpLink:
    """One connection. Requests are numbered, since one that was cancelled may be answered later."""

    exclusive = True

    def __init__(self, address: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.address, self._reader, self._writer, self._count = address, reader, writer, 0

    async def ask(self, request: str) -> list[str]:
        """The words of the answer. Raises ``Transient(LINK_LOST)``."""
        self._count += 1
        try:
            async with asyncio.timeout(2):
                self._writer.write(f"{self._count} {request}\n".encode())
                while True:
                    number, *words = (await self._reader.readuntil()).decode().split()
                    if number == str(self._count):
                        return words
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Transient(Reason.LINK_LOST, f"{self.address}: {error!r}") from error


@asynccontextmanager
async def open_tcp(rest: str, env: Env) -> AsyncIterator[TcpLink]:
    """The ``open`` of the link's ``LinkSpec``. Raises ``Transient(DEVICE_ABSENT)``."""
    host, _, port = rest.rpartition(":")
    try:
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection(host, int(port))
    except OSError as error:
        raise Transient(Reason.DEVICE_ABSENT, f"tcp:{rest}: {error}") from error
    with closing(writer):
        yield TcpLink(f"tcp:{rest}", reader, writer)
