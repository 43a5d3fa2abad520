"""What the tests of the CAN mapper share: controllers on a bus, devices that mean them, images, sessions."""

from __future__ import annotations

import itertools
import os
import select
import threading
import tty
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any

import can
from engine_kit import until
from uds_server import BASE, SECRET, Controller, OnBus, Wire, Wiring, make_app

import edged_can
from edged.api import Device, Image, MapperSpec, Phase, Progress
from edged.links import LinkPool, device_env
from edged.testing.conformance import Subject
from edged_can.session import UdsSession
from edged_firmware.chunks import ChunkIndex
from edged_firmware.image import MemorySource, pack

Segments = list[tuple[int, bytes]]
(SPEC,) = edged_can.edged_mappers()
LINKS = {spec.scheme: spec for spec in edged_can.edged_links()}
CRC = {"check": {"routine": 0xFF01, "parameters": ["crc32"], "per": "image", "ok": "00"}}
_numbers = itertools.count()


def bus_name() -> str:
    """A bus of python-can's ``virtual`` that nobody else uses."""
    return f"test-{os.getpid()}-{next(_numbers)}"


def virtual(name: str, **options: Any) -> can.BusABC:
    return can.Bus(interface="virtual", channel=name, ignore_config=True, **options)


@contextmanager
def on_bus(
    name: str, controller: Controller, wiring: Wiring | None = None, wire: Wire | None = None
) -> Iterator[OnBus]:
    with OnBus(controller, virtual(name), wiring, wire) as server:
        yield server


def device(address: str, device_id: str = "ecu", wiring: Wiring | None = None, **config: Any) -> Device:
    """The device that means the controller with ``wiring``; the secret is the credential ``ecu``.

    ``answer_s`` is for tests in which nothing is lost. Where something is, it is what each loss costs.
    """
    wiring = wiring or Wiring()
    table = {
        "request_id": wiring.receives,
        "response_id": wiring.sends,
        "extended_ids": wiring.extended,
        "answer_s": 5,
        "boot_s": 2.0,
        "settle_s": 0,
        "security": {"algorithm": "xor", "credential": "ecu"},
        **CRC,
        **config,
    }
    if wiring.own is not None and wiring.tester is not None:
        table |= {"target_address": wiring.own, "source_address": wiring.tester}
    return Device(
        id=device_id,
        model="ecu",
        mapper="can-uds",
        address=address,
        hardware_ids=("uds:ECU-7",),
        flash_base=BASE,
        flash_size_bytes=0x10000,
        config=SPEC.parse_config(table),
    )


def secret(monkeypatch: Any, folder: Any, text: str = f"hex:{SECRET.hex()}") -> None:
    """Where the daemon finds the credential ``ecu``."""
    (folder / "edged_ecu").write_text(text)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))


async def verified(parts: Segments) -> Image:
    file = pack(parts)
    return await Image.open(MemorySource(file), ChunkIndex.build(file, 512))


def fresh() -> MapperSpec:
    """The mapper as a daemon has it that has just started."""
    (spec,) = edged_can.edged_mappers()
    return spec


@asynccontextmanager
async def connected(
    to: Device, pool: LinkPool | None = None, spec: MapperSpec | None = None
) -> AsyncIterator[UdsSession]:
    """A session, of a mapper of its own where none is given: it remembers no keys that a device refused to another."""
    env = device_env(to.id, pool or LinkPool(LINKS))
    async with (spec or fresh()).connect(to, env) as session:
        assert isinstance(session, UdsSession)
        yield session


def quiet(phase: Phase, done_bytes: int, total_bytes: int) -> None:
    return None


def on_write(call: Callable[[int, int], object]) -> Progress:
    """Has ``call`` told of the bytes that were written."""

    def progress(phase: Phase, done_bytes: int, total_bytes: int) -> None:
        if phase is Phase.WRITE:
            call(done_bytes, total_bytes)

    return progress


class Unpluggable:
    """A wire that can be pulled: nothing gets through while it is out."""

    def __init__(self) -> None:
        self.out = False

    def __call__(self, way: str, frame: bytes) -> list[bytes]:
        return [] if self.out else [frame]


def carried(requests: list[bytes]) -> bytes:
    """What whole requests carry, joined: a block of TransferData begins with its service and its counter."""
    return b"".join(request[2:] if request[:1] == b"\x36" else request for request in requests)


def subject(server: OnBus, to: Device, neighbour: Device, wire: Unpluggable) -> Subject:
    async def unplug() -> None:
        wire.out = True

    async def plug() -> None:
        wire.out = False

    return Subject(
        spec=SPEC,
        links=LINKS,
        device=to,
        first=make_app("1.2.0"),
        second=make_app("1.3.0"),
        sent=lambda: carried(server.controller.heard),
        holds=server.controller.held,
        written=lambda: server.controller.counts.written,
        unit_bytes=server.controller.longest_block - 2,
        unplug=unplug,
        plug=plug,
        mute=unplug,
        unmute=plug,
        neighbour=neighbour,
    )


class SlcanAdapter:
    """A serial CAN adapter (LAWICEL's protocol) behind a pseudo terminal, on a bus of python-can's ``virtual``.

    ``unplug`` closes the terminal. ``damage`` may change a line on its way to the computer.
    """

    def __init__(self, bus: str) -> None:
        self._bus = virtual(bus)
        self._master, slave = os.openpty()
        tty.setraw(slave)
        os.set_blocking(self._master, False)
        self.port = os.ttyname(slave)
        self._slave = slave
        self._stop = threading.Event()
        self.damage: Callable[[bytes], bytes] = lambda line: line
        self.opened = 0
        self._threads = [threading.Thread(target=body, daemon=True) for body in (self._down, self._up)]

    def __enter__(self) -> SlcanAdapter:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.unplug()
        for thread in self._threads:
            thread.join()
        self._bus.shutdown()

    def unplug(self) -> None:
        with ExitStack() as stack:
            for fd in (self._slave, self._master):
                stack.callback(_close, fd)
        self._slave = self._master = -1

    def _down(self) -> None:
        """Lines from the computer."""
        line = bytearray()
        # closed by unplug(): a bad descriptor, or none
        with suppress(OSError, ValueError):
            while not self._stop.is_set():
                if not select.select([self._master], [], [], 0.05)[0]:
                    continue
                for byte in os.read(self._master, 256):
                    if byte == 0x0D:
                        self._command(bytes(line))
                        line.clear()
                    else:
                        line.append(byte)

    def _command(self, line: bytes) -> None:
        kind = line[:1]
        self.opened += kind == b"O"
        if kind not in (b"t", b"T"):
            return
        width = 3 if kind == b"t" else 8
        size = int(line[1 + width : 2 + width])
        data = bytes.fromhex(line[2 + width : 2 + width + 2 * size].decode())
        self._bus.send(
            can.Message(arbitration_id=int(line[1 : 1 + width], 16), data=data, is_extended_id=kind == b"T")
        )

    def _up(self) -> None:
        """Frames to the computer."""
        with suppress(OSError):
            while not self._stop.is_set():
                message = self._bus.recv(0.05)
                if message is None:
                    continue
                name = (
                    f"T{message.arbitration_id:08X}"
                    if message.is_extended_id
                    else f"t{message.arbitration_id:03X}"
                )
                line = f"{name}{len(message.data)}{message.data.hex().upper()}\r".encode()
                os.write(self._master, self.damage(line))


def _close(fd: int) -> None:
    with suppress(OSError):
        os.close(fd)


async def soon(holds: Callable[[], bool]) -> None:
    await until(holds)
