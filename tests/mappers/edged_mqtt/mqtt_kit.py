"""A device that pulls, written from the description of ThingsBoard's device API and the MQTT standards, and the wire to it.

A second implementation: it shares no code with the mapper, and has its own codec. The vendor's client is in
``test_mqtt_vendor.py``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from engine_kit import until

import edged_mqtt
from edged.api import Device, Image, Session
from edged.links import LinkPool, device_env
from edged.testing.faults import Faults, PowerCut
from edged.testing.ports import free_port
from edged_firmware.chunks import ChunkIndex
from edged_firmware.image import Label, MemorySource
from edged_mqtt.config import MqttConfig
from edged_mqtt.endpoint import Endpoint

(SPEC,) = edged_mqtt.edged_mappers()
LINKS = {link.scheme: link for link in edged_mqtt.edged_links()}


def mqtt_device(port: int, name: str = "pump-1", **config: Any) -> Device:
    options: dict[str, Any] = {"report_s": 2.0, "silence_s": 3.0, "install_s": 5.0, "confirm_s": 0.5}
    return Device(
        name,
        "pump",
        edged_mqtt.NAME,
        f"mqtt:listen@127.0.0.1:{port}/{name}",
        config=MqttConfig(**(options | config)),
    )


def _length(count: int) -> bytes:
    out = b""
    while True:
        count, low = divmod(count, 128)
        out += bytes([low | (128 if count else 0)])
        if not count:
            return out


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack(">H", len(data)) + data


@dataclass
class PullingDevice:
    """Connects, reports what it runs, and installs what it is offered.

    ``chunk_bytes`` 0: the whole image at once. ``version`` is what it runs. ``flash`` is the image that it downloaded last,
    byte by byte as it came. ``boots``: it comes up with what it was offered; False: with what it ran before. ``reboots``: it
    loses its connection when it does. ``received`` is all that it was sent, ``chunks`` what those of images
    carried. ``every_s``: it reports ``values`` so often;
    ``repeats``: and what it runs. ``naive``: as the vendor's client it takes whatever comes for the next chunk.
    ``on_whole``: what it does with a whole image in place of installing it. ``retains``: the broker is to keep what it says.
    ``tries_again``: it asks anew after a failure. ``resumes``: after a cut it goes on by itself with the next chunk, and asks
    for no offer. ``hello_s``: it says so late who it is.
    ``next_chunk``: which one it asks for in place of the next. ``effects``: where it loses its power; ``revives``: and
    comes back with its flash as it is, ``falls`` times so far; False: it stays dark.
    """

    port: int
    token: str = "pump-1"
    password: str | None = None
    chunk_bytes: int = 4096
    version: str = "1.0.0"
    title: str = "pump"
    protocol: int = 4
    boots: bool = True
    reboots: bool = False
    prefix: str = ""
    component: str = "fw"
    tls: ssl.SSLContext | None = None
    values: dict[str, Any] = field(default_factory=lambda: {"temperature": 20.5})
    flash: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)
    chunks: bytearray = field(default_factory=bytearray)
    written: int = 0
    requests: int = 0
    log: list[str] = field(default_factory=list)
    shared: dict[str, Any] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    on_chunk: Callable[[int], None] | None = None
    on_whole: Callable[[], None] | None = None
    delay_s: float = 0.0
    every_s: float = 0.0
    asks_again: bool = True
    repeats: bool = False
    naive: bool = False
    tries_again: bool = False
    resumes: bool = False
    hello_s: float = 0.0
    retains: bool = False
    next_chunk: Callable[[int], int] = lambda chunk: chunk
    effects: Faults = field(default_factory=Faults)
    revives: bool = False
    falls: int = 0

    def __post_init__(self) -> None:
        self._writer: asyncio.StreamWriter | None = None
        self._number = 0
        self._round = 0
        self._task: asyncio.Task[None] | None = None
        self._plug = asyncio.Event()
        self._plug.set()
        self.connected = asyncio.Event()
        self._offer: dict[str, Any] = {}
        self._chunk = 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._live())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def unplug(self) -> None:
        self._plug.clear()
        if self._writer is not None:
            self._writer.transport.abort()

    async def plug(self) -> None:
        self._plug.set()

    async def _live(self) -> None:
        while True:
            await self._plug.wait()
            try:
                await self._once()
            except (OSError, asyncio.IncompleteReadError, ssl.SSLError) as exc:
                self.log.append(f"lost: {exc!r:.60}")
            except PowerCut:
                if not self.revives:
                    return
                self._come_back()
            finally:
                self.connected.clear()
                if self._writer is not None:
                    self._writer.transport.abort()
            await asyncio.sleep(0.02)

    async def _once(self) -> None:
        reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls)
        await asyncio.sleep(self.hello_s)
        user = _text(self.token) + (_text(self.password) if self.password is not None else b"")
        flags = 0x02 | 0x80 | (0x40 if self.password is not None else 0)
        properties = b"\0" if self.protocol == 5 else b""
        body = _text("MQTT") + bytes([self.protocol, flags, 0, 60]) + properties + _text("") + user
        self._send(0x10, body)
        first, answer = await self._packet(reader)
        assert first == 0x20
        if answer[1]:
            self.log.append(f"refused: {answer[1]}")
            raise ConnectionRefusedError(f"code {answer[1]}")
        self.connected.set()
        self.log.append("connected")
        for topic in (
            "v1/devices/me/attributes",
            "v1/devices/me/attributes/response/+",
            "v2/+/response/+/chunk/+",
        ):
            self._subscribe(self.prefix + topic)
        self.report(**self.values)
        self.say()
        if self.resumes and len(self.flash) < self._offer.get("size", 0):
            self.ask()
            await self._listen(reader)
        if self._round and not self.asks_again:
            await self._listen(reader)
        keys = ("title", "version", "size", "checksum", "checksum_algorithm")
        wanted = ",".join(f"{self.component}_{key}" for key in keys)
        self.publish("v1/devices/me/attributes/request/1", json.dumps({"sharedKeys": wanted}))
        await self._listen(reader)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        ticker = asyncio.create_task(self._tick())
        try:
            while True:
                first, body = await self._packet(reader)
                if first >> 4 == 3:
                    await self._message(first, body)
        finally:
            ticker.cancel()

    async def _tick(self) -> None:
        while self.every_s:
            await asyncio.sleep(self.every_s)
            self.report(**self.values)
            if self.repeats:
                self.say()

    async def _packet(self, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        first = (await reader.readexactly(1))[0]
        length = shift = 0
        while True:
            byte = (await reader.readexactly(1))[0]
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        body = await reader.readexactly(length)
        self.received += body
        return first, body

    def _send(self, first: int, body: bytes) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(bytes([first]) + _length(len(body)) + body)

    def _subscribe(self, topic: str) -> None:
        self._number += 1
        properties = b"\0" if self.protocol == 5 else b""
        self._send(0x82, struct.pack(">H", self._number) + properties + _text(topic) + b"\1")

    def publish(self, topic: str, payload: str | bytes) -> None:
        self._number = self._number % 65535 + 1
        data = payload.encode() if isinstance(payload, str) else payload
        properties = b"\0" if self.protocol == 5 else b""
        self._send(
            0x32 | self.retains,
            _text(self.prefix + topic) + struct.pack(">H", self._number) + properties + data,
        )

    def report(self, **values: Any) -> None:
        self.publish("v1/devices/me/telemetry", json.dumps(values))

    def say(self, state: str | None = None, **more: Any) -> None:
        kind = self.component
        told: dict[str, Any] = {f"current_{kind}_title": self.title, f"current_{kind}_version": self.version}
        if state is not None:
            told[f"{kind}_state"] = state
            self.log.append(state)
        self.report(**told, **more)

    async def _message(self, first: int, body: bytes) -> None:
        size = struct.unpack(">H", body[:2])[0]
        topic, payload = body[2 : 2 + size].decode(), body[2 + size :]
        if first & 0x06:
            self._send(0x40, payload[:2])
            payload = payload[2:]
        if self.protocol == 5:
            payload = payload[1 + payload[0] :]
        topic = topic.removeprefix(self.prefix)
        if topic == "v1/devices/me/attributes":
            self._given(json.loads(payload))
        elif topic.startswith("v1/devices/me/attributes/response/"):
            self._given(json.loads(payload).get("shared", {}))
        elif topic.startswith(f"v2/{self.component}/response/"):
            self.chunks += payload
            await self._got(topic, payload)
        elif topic.endswith("/error"):
            self.log.append(f"error: {payload.decode()}")

    def _given(self, shared: dict[str, Any]) -> None:
        self.deleted += shared.pop("deleted", [])
        self.shared.update(shared)
        kind = self.component
        if f"{kind}_version" not in shared:
            if shared:
                self.publish("v1/devices/me/attributes", json.dumps(shared))
            return
        if (shared[f"{kind}_title"], shared[f"{kind}_version"]) == (self.title, self.version):
            return
        self._offer = {key.removeprefix(f"{kind}_"): value for key, value in shared.items()}
        self._round += 1
        self._begin()

    def _come_back(self) -> None:
        """The power is there again, and what was in memory is not."""
        self.falls += 1
        self.effects = Faults()
        self._offer, self._chunk = {}, 0
        self.shared.clear()

    def _begin(self) -> None:
        self.effects.effect(
            "device.erase", self.flash.clear, lambda: self.flash.__delitem__(slice(len(self.flash) // 2))
        )
        self._chunk = 0
        self.say("DOWNLOADING")
        self.ask()

    def ask(self) -> None:
        self.requests += 1
        payload = str(self.chunk_bytes) if self.chunk_bytes else ""
        self.publish(
            f"v2/{self.component}/request/{self._round}/chunk/{self.next_chunk(self._chunk)}", payload
        )

    async def _got(self, topic: str, payload: bytes) -> None:
        _, _, _, number, _, index = topic.split("/")
        if int(number) != self._round or (int(index) != self._chunk and not self.naive):
            return  # an answer that comes twice or late
        self.effects.effect(
            "device.chunk",
            lambda: self._program(payload),
            lambda: self._program(payload[: len(payload) // 2]),
        )
        self._chunk += 1
        if self.on_chunk is not None:
            self.on_chunk(self._chunk)
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if (self.naive and len(self.flash) != self._offer["size"]) or (
            len(self.flash) < self._offer["size"] and payload
        ):
            self.ask()
        else:
            self._install()

    def _program(self, data: bytes) -> None:
        self.flash += data
        self.written += len(data)

    def _boot(self) -> None:
        self.version, self.title = self._offer["version"], self._offer["title"]

    def _install(self) -> None:
        if self.on_whole is not None:
            self.on_whole()
            return
        self.say("DOWNLOADED")
        if hashlib.sha256(self.flash).hexdigest() != self._offer["checksum"]:
            self.say("FAILED", **{f"{self.component}_error": "checksum"})
            if self.tries_again:
                self._round += 1
                self._begin()
            return
        self.say("VERIFIED")
        self.say("UPDATING")
        if self.boots:
            self.effects.effect("device.boot", self._boot)
        if self.reboots and self._writer is not None:
            with suppress(OSError):
                self._writer.transport.abort()
            return
        self.say("UPDATED")

    def holds(self, address: int, length: int) -> bytes:
        return bytes(self.flash[address : address + length])


class Raw:
    """A client without a protocol of its own."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def packet(self, takes_s: float = 0.0) -> bytes:
        """The body of the next one. ``takes_s``: it is read in small parts, over so long."""
        async with asyncio.timeout(20):
            await self.reader.readexactly(1)
            length = shift = 0
            while True:
                byte = (await self.reader.readexactly(1))[0]
                length |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            if not takes_s:
                return await self.reader.readexactly(length)
            body = b""
            while len(body) < length:
                body += await self.reader.readexactly(min(-(-length // 20), length - len(body)))
                await asyncio.sleep(takes_s / 20)
            return body

    def publish(self, topic: str, payload: bytes) -> None:
        body = _text(topic) + payload
        self.writer.write(b"\x30" + _length(len(body)) + body)


@asynccontextmanager
async def raw(port: int, token: str = "token-of-pump-1", *, says: bool = True) -> AsyncIterator[Raw]:
    """``says``: what it runs."""
    client = Raw(*await asyncio.open_connection("127.0.0.1", port))
    body = b"\0\4MQTT\4\x82\0\x3c\0\0" + _text(token)
    client.writer.write(bytes([0x10, len(body)]) + body)
    assert await client.packet() == b"\0\0"
    told = {"current_fw_title": "pump", "current_fw_version": "1.0.0"}
    if says:
        client.publish("v1/devices/me/telemetry", json.dumps(told).encode())
    try:
        yield client
    finally:
        client.writer.transport.abort()


async def image_of(data: bytes) -> Image:
    """Of the release pump 2.0.0."""
    index = ChunkIndex.build(data, 4096)
    return await Image.open(MemorySource(data), index, opaque=True, label=Label("pump", "2.0.0"))


def secrets_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        (folder / f"edged_{name}").write_text(f"token-of-{name}\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))


@asynccontextmanager
async def listening(pool: LinkPool, port: int) -> AsyncIterator[Endpoint]:
    """The listener that all sessions of ``pool`` use, held open."""
    async with device_env("holder", pool).link(f"mqtt:listen@127.0.0.1:{port}") as link:
        assert isinstance(link, Endpoint)
        yield link


@asynccontextmanager
async def talking(
    port: int | None = None, begun: str = "", **config: Any
) -> AsyncIterator[tuple[Raw, Session, Counter[str]]]:
    """A device and its session, and what was counted. ``begun``: its note from before the node was started."""
    counted: Counter[str] = Counter()
    port, pool = port or free_port(), LinkPool(LINKS, count=lambda _, event: counted.update([event]))
    if begun:
        await device_env("pump-1", pool).remember("begun", begun)

    async def connected() -> Session:
        return await manager.__aenter__()

    manager = SPEC.connect(mqtt_device(port, **config), device_env("pump-1", pool))
    async with listening(pool, port) as link:
        connecting = asyncio.create_task(connected())
        await until(lambda: "pump-1" in link._seats)
        async with raw(port) as client:
            session = await connecting
            try:
                yield client, session, counted
            finally:
                await manager.__aexit__(None, None, None)
