"""A lamp on a TCP port of this machine, as behind a terminal server: each line is answered by one with its number."""

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edged.testing.fake import FakeDevice
from edged.testing.ports import free_port


class SimulatedLamp:
    """``device`` is the hardware: its flash, and counts of what was done to it."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.port = free_port()
        self._mute = False

    @property
    def address(self) -> str:
        return f"socket:127.0.0.1:{self.port}"

    async def plug(self) -> None:
        """Listen, on the same port each time."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def unplug(self) -> None:
        """Hang up, and listen no more."""
        assert self._server is not None
        self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def mute(self) -> None:
        """Hear, and answer nothing."""
        self._mute = True

    async def unmute(self) -> None:
        self._mute = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while line := await reader.readline():
                number, verb, *arguments = line.decode().split()
                answer = self._answer(verb, arguments)
                if not self._mute:
                    writer.write(f"{number} {answer}\n".encode())
        except OSError:
            pass
        finally:
            self._open.discard(writer)
            writer.close()

    def _answer(self, verb: str, arguments: list[str]) -> str:
        device = self.device
        match verb, arguments:
            case "identify", []:
                return f"{device.hardware_id} {device.name}"
            case "version", []:
                return device.app.version if device.app else "none"
            case "crc", [address, length]:
                return f"{zlib.crc32(device.read(0, int(address), int(length))):08x}"
            case "write", [address, data]:
                device.write_page(int(address), bytes.fromhex(data))
                return "done"
            case "boot", []:
                device.boot()
                return "done"
        return "what?"


@asynccontextmanager
async def simulated_lamp(device: FakeDevice) -> AsyncIterator[SimulatedLamp]:
    """A lamp that is plugged in."""
    lamp = SimulatedLamp(device)
    await lamp.plug()
    try:
        yield lamp
    finally:
        await lamp.unplug()
