"""What the tests of SMP share: images, devices, sessions."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import cbor2
from engine_kit import QUICK, Publisher
from smp_server import SmpServer, body_of, make_image, untouched
from uart_kit import LINKS, MAPPERS

from edged.api import Device, Image
from edged.config import (
    Config,
    DeviceSettings,
    EngineSettings,
    HealthSettings,
    Model,
    Storage,
    TrustSettings,
)
from edged.config import Node as NodeSettings
from edged.domain.job import Job
from edged.links import LinkPool, device_env
from edged.plugins import discover
from edged.testing.conformance import Subject
from edged.testing.faults import Faults
from edged.testing.node import TestNode, life
from edged_firmware.chunks import ChunkIndex
from edged_firmware.formats import mcuboot
from edged_firmware.image import MemorySource
from edged_uart.smp_session import SmpSession

SPEC = MAPPERS["uart-smp"]
BODY_BYTES = 6000
FACTORY = make_image((1, 0, 0), body_of(BODY_BYTES, 1))
SECOND = make_image((2, 0, 0), body_of(BODY_BYTES, 2))
THIRD = make_image((3, 0, 0), body_of(BODY_BYTES, 3))
BRISK = {"answer_s": 2, "erase_s": 10, "quiet_s": 0.1, "boot_s": 10}
"""Times for a device that answers at once, on a machine that may be late with it."""


STATE, MARK, UPLOAD, RESET = (0, 1, 0), (2, 1, 0), (2, 1, 1), (2, 0, 5)
"""Operation, group and command."""
PIECE_BYTES = 256


def identifies_as(image: bytes) -> str:
    return mcuboot.parse(image).hash.hex()


async def opaque(image: bytes, *, damaged_at: int | None = None) -> Image:
    index = ChunkIndex.build(image, 512)
    if damaged_at is not None:
        image = image[:damaged_at] + bytes([image[damaged_at] ^ 1]) + image[damaged_at + 1 :]
    return await Image.open(MemorySource(image), index, opaque=True)


def device(port: Path | str, **config: object) -> Device:
    return Device(
        id="node",
        model="node",
        mapper=SPEC.name,
        address=f"serial:{port}",
        config=SPEC.parse_config({**BRISK, **config}),
    )


@asynccontextmanager
async def connected(to: Device) -> AsyncIterator[SmpSession]:
    async with SPEC.connect(to, device_env(to.id, LinkPool(LINKS))) as session:
        assert isinstance(session, SmpSession)
        yield session


def subject(server: SmpServer, **config: object) -> Subject:
    """For the conformance kit."""

    async def unplug() -> None:
        server.unplug()

    async def plug() -> None:
        server.plug()

    async def mute() -> None:
        server.from_device = lambda data: b""

    async def unmute() -> None:
        server.from_device = untouched

    async def mark_other() -> None:
        server.pending = True

    def holds(address: int, length: int) -> bytes:
        return bytes(server.slots[1][address : address + length])

    return Subject(
        spec=SPEC,
        links=LINKS,
        device=device(server.port, poll_s=0.2, answer_s=1, **config),
        first=[(0, SECOND)],
        second=[(0, THIRD)],
        sent=lambda: bytes(server.received),
        holds=holds,
        written=lambda: server.counts.stored,
        unit_bytes=384,
        unplug=unplug,
        plug=plug,
        mark_other=mark_other,
        mute=mute,
        unmute=unmute,
    )


class BadWire:
    """A wire on which one byte of so many is lost, doubled, flipped, or followed by another; ``hits`` counts them."""

    def __init__(self, seed: int, one_in: int, *faults: str) -> None:
        self._thrown = random.Random(seed)
        self._one_in = one_in
        self._faults = faults or ("lost", "doubled", "flipped", "noise")
        self.hits = 0

    def __call__(self, data: bytes) -> bytes:
        out = bytearray()
        for byte in data:
            hit = self._thrown.random() * self._one_in < 1
            self.hits += hit
            out += self._disturbed(byte) if hit else bytes([byte])
        return bytes(out)

    def _disturbed(self, byte: int) -> bytes:
        match self._thrown.choice(self._faults):
            case "lost":
                return b""
            case "doubled":
                return bytes([byte, byte])
            case "flipped":
                return bytes([byte ^ 1 << self._thrown.randrange(8)])
            case _:
                return bytes([byte, self._thrown.randrange(256)])


@dataclass(frozen=True)
class Heard:
    """A request of ours."""

    command: tuple[int, int, int]
    sequence: int


class OtherClient:
    """Somebody else on the line of ``server``: ``between`` is called before each request of ours, with its command and sequence
    number, and may :meth:`ask`. All that the device answers is heard by all. ``asked`` counts."""

    def __init__(self, server: SmpServer, between: Callable[[OtherClient, Heard], None]) -> None:
        self.server = server
        self.asked = 0
        self._between = between
        self._answer = server._answer
        server._answer = self._hear  # type: ignore[method-assign]

    def _hear(self, message: bytes) -> None:
        op, _, _, group, sequence, number = struct.unpack_from(">BBHHBB", message)
        self._between(self, Heard((op & 7, group, number), sequence))
        self._answer(message)

    def ask(self, command: tuple[int, int, int], body: dict[str, object], sequence: int = 0) -> None:
        op, group, number = command
        payload = cbor2.dumps(body)
        self.asked += 1
        head = struct.pack(">BBHHBB", 1 << 3 | op, 0, len(payload), group, sequence, number)
        self._answer(head + payload)

    def piece(self, image: bytes, offset: int) -> None:
        """A piece of ``image``."""
        first = {} if offset else {"len": len(image), "sha": hashlib.sha256(image).digest()}
        self.ask(UPLOAD, {"off": offset, "data": image[offset : offset + PIECE_BYTES], **first})


@dataclass
class Node:
    """A node with one device that speaks SMP, and a repository with the ``images`` of ``fw``, by version."""

    folder: Path
    port: Path | str
    images: dict[str, bytes]
    health: HealthSettings | None = None
    config: dict[str, object] = field(default_factory=dict)
    watch: bool = False
    engine: EngineSettings = QUICK
    scheme: str = "serial"
    publisher: Publisher = field(init=False)

    def __post_init__(self) -> None:
        self.publisher = Publisher(self.folder / "publisher")
        self.publisher.base.mkdir(parents=True)
        self.publisher.init()
        for version, image in self.images.items():
            self.publisher.add(version, image, name="fw", models=("node",), protocol="smp")
        self.publisher.publish()

    @property
    def settings(self) -> Config:
        return Config(
            node=NodeSettings(id="node-1", state_dir=self.folder / "state"),
            trust=TrustSettings(repository=str(self.publisher.repo), root=self.publisher.root),
            engine=self.engine,
            storage=Storage(report_interval_s=0.2),
            model=(Model(id="node", health=self.health),),
            device=(
                DeviceSettings(
                    id="dev-1",
                    model="node",
                    mapper=SPEC.name,
                    address=f"{self.scheme}:{self.port}",
                    watch=self.watch,
                    config={**BRISK, **self.config},
                ),
            ),
        )

    @asynccontextmanager
    async def life(self, faults: Faults | None = None) -> AsyncIterator[TestNode]:
        async with life(self.settings, discover(), faults=faults) as node:
            yield node

    async def deploy(self, version: str, timeout_s: float = 60.0) -> Job:
        async with self.life() as node:
            await node.want("dev-1", f"fw@{version}")
            return await node.ended("dev-1", timeout_s)


VERSION_IS = HealthSettings(kind="property", query="image.version", pattern="^2", timeout_s=20)
IN_VAIN_S = 0.5
"""For so long a check of what is not well goes on."""
