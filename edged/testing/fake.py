"""A device that does not exist, and its mapper: one slot or two, with a boot loader that never breaks.

It is strict where real devices are: it boots only an application that is whole (length and CRC), it reverts an image that was
not confirmed, it keeps count of what it was sent, and its flash survives the daemon (and, with ``file``, the process).

Addresses are ``fake:BUS/NAME``. Devices on one bus share its link.
"""

from __future__ import annotations

import asyncio
import json
import re
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from edged.api import (
    Desired,
    Device,
    Env,
    Health,
    HealthCheck,
    Identity,
    Image,
    JsonValue,
    Label,
    Link,
    LinkSpec,
    MapperSpec,
    Phase,
    Progress,
    Reported,
    Session,
    SessionTraits,
    Slot,
    Slots,
    hookimpl,
)
from edged.errors import Permanent, Reason, Transient

ERASED = 0xFF
_APP = struct.Struct(">8s16sBII")
_MAGIC = b"FAKEAPP1"


def fake_app(version: str, size_bytes: int = 2048, *, healthy: bool = True) -> bytes:
    """An application for a fake device: header (magic, version, health, length, CRC-32), then bytes that differ by version."""
    body = bytes((index * 7 + sum(version.encode())) & 0xFF for index in range(size_bytes - _APP.size))
    return _APP.pack(_MAGIC, version.encode(), healthy, len(body), zlib.crc32(body)) + body


@dataclass(frozen=True, slots=True)
class App:
    """What a slot's bytes are, where they are an application that is whole."""

    version: str
    healthy: bool


def read_app(flash: bytes | bytearray) -> App | None:
    """The application at the begin of ``flash``, None where it is not whole."""
    magic, version, healthy, length, crc = _APP.unpack_from(flash)
    body = flash[_APP.size : _APP.size + length]
    if magic != _MAGIC or len(body) != length or zlib.crc32(body) != crc:
        return None
    return App(version.rstrip(b"\0").decode(), bool(healthy))


class Effects(Protocol):
    """Where the power may be cut; see :class:`edged.testing.faults.Faults`."""

    def effect(self, name: str, apply: Callable[[], None], torn: Callable[[], None] | None = None) -> None:
        """Do ``apply``; ``torn`` is the same, half done."""
        ...


class Steady:
    """The power stays on."""

    def effect(self, name: str, apply: Callable[[], None], torn: Callable[[], None] | None = None) -> None:
        apply()


@dataclass(slots=True)
class Counts:
    """What a device was made to do. ``received`` are the image bytes that came over the wire."""

    pages_written: int = 0
    pages_read: int = 0
    received: int = 0
    boots: int = 0
    trial_boots: int = 0


@dataclass(slots=True)
class FakeDevice:
    """The hardware. With two slots, ``active`` runs; an image that is ``pending`` is booted on trial, and left at the next
    boot where it was not confirmed."""

    name: str
    hardware_id: str = "fake:1"
    slot_count: int = 1
    size_bytes: int = 16 * 1024
    page_bytes: int = 256
    reads_back: bool = True
    tells: bool = True
    effects: Effects = field(default_factory=Steady)
    file: Path | None = None
    slots: list[bytearray] = field(default_factory=list)
    active: int = 0
    confirmed: bool = True
    pending: bool = False
    absent: bool = False
    properties: dict[str, JsonValue] = field(default_factory=dict)
    applied: list[Desired] = field(default_factory=list)
    offered: list[Desired] = field(default_factory=list)
    takes: Callable[[Desired], JsonValue] = lambda desired: desired.value
    flashed_with: dict[str, object] = field(default_factory=dict)
    flashed_as: Label | None = None
    counts: Counts = field(default_factory=Counts)
    tap: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.slots = [bytearray([ERASED]) * self.size_bytes for _ in range(self.slot_count)]
        if self.file is not None and self.file.exists():
            self._load(json.loads(self.file.read_text()))

    def install(self, image: bytes) -> None:
        """As it leaves the factory: ``image`` in the active slot."""
        self.slots[self.active][: len(image)] = image
        self._save()

    @property
    def app(self) -> App | None:
        """What runs."""
        return read_app(self.slots[self.active])

    @property
    def spare(self) -> int:
        """The slot that may be written."""
        return 1 - self.active if self.slot_count > 1 else 0

    def write_page(self, offset: int, data: bytes) -> None:
        """Write one page of the spare slot. Torn: its first half is new, the rest erased."""
        self.tap += data
        self.counts.received += len(data)
        half = data[: len(data) // 2] + bytes([ERASED]) * (len(data) - len(data) // 2)
        self.effects.effect(
            "device.page", lambda: self._store(offset, data), lambda: self._store(offset, half)
        )

    def read(self, slot: int, offset: int, length: int) -> bytes:
        self.counts.pages_read += -(-length // self.page_bytes)
        return bytes(self.slots[slot][offset : offset + length])

    def boot(self) -> None:
        """Reset. Two slots: try what is pending, or leave what was not confirmed."""
        self.effects.effect("device.boot", self._boot)

    def mark_pending(self) -> None:
        self.effects.effect("device.pending", lambda: self._set(pending=True))

    def confirm(self) -> None:
        self.effects.effect("device.confirm", lambda: self._set(confirmed=True))

    def _store(self, offset: int, data: bytes) -> None:
        self.slots[self.spare][offset : offset + len(data)] = data
        self.counts.pages_written += 1
        self._save()

    def _set(self, *, pending: bool | None = None, confirmed: bool | None = None) -> None:
        self.pending = self.pending if pending is None else pending
        self.confirmed = self.confirmed if confirmed is None else confirmed
        self._save()

    def _boot(self) -> None:
        self.counts.boots += 1
        if self.slot_count == 1:
            return
        if self.pending:
            self.pending = False
            if read_app(self.slots[self.spare]) is not None:
                self.active, self.confirmed = self.spare, False
                self.counts.trial_boots += 1
        elif not self.confirmed:
            self.active, self.confirmed = self.spare, True
        self._save()

    def _save(self) -> None:
        if self.file is not None:
            state = {"active": self.active, "confirmed": self.confirmed, "pending": self.pending}
            text = json.dumps(state | {"slots": [slot.hex() for slot in self.slots]})
            tmp = self.file.with_suffix(".tmp")
            tmp.write_text(text)
            tmp.replace(self.file)

    def _load(self, state: Mapping[str, object]) -> None:
        slots = state["slots"]
        assert isinstance(slots, list)
        self.slots = [bytearray.fromhex(slot) for slot in slots]
        self.active = int(str(state["active"]))
        self.confirmed, self.pending = bool(state["confirmed"]), bool(state["pending"])


class FakeLink:
    """The shared wire. ``bytes_per_s`` 0: as fast as it goes. ``lost``: everything on it fails until it is set back."""

    def __init__(self, address: str, bus: Bus) -> None:
        self.address = address
        self.exclusive = bus.exclusive
        self.bus = bus

    async def carry(self, name: str, size_bytes: int) -> FakeDevice:
        """Move ``size_bytes`` over the wire to or from the device ``name``, which is returned.

        Raises ``Transient`` where the wire is lost or the device does not answer.
        """
        await asyncio.sleep(size_bytes / self.bus.bytes_per_s if self.bus.bytes_per_s else 0)
        if self.bus.lost:
            raise Transient(Reason.LINK_LOST, f"{self.address} was unplugged")
        device = self.bus.devices.get(name)
        if device is None or device.absent:
            raise Transient(Reason.NO_RESPONSE, f"{name} does not answer on {self.address}")
        return device


@dataclass(slots=True)
class Bus:
    """One fake wire and who is on it."""

    devices: dict[str, FakeDevice] = field(default_factory=dict)
    bytes_per_s: float = 0
    exclusive: bool = False
    lost: bool = False
    opened: int = 0


@dataclass(frozen=True, slots=True)
class FakeConfig:
    """A device's ``[device.config]``: what to make where the bus has no such device yet (a daemon in a process of its own)."""

    make: Mapping[str, object]


class FakeSession:
    """Speaks to one device. One slot: pages from the verified prefix on. Two slots: the spare one, then trial and confirm."""

    def __init__(self, link: FakeLink, name: str, device: Device) -> None:
        self._link = link
        self._name = name
        self._device = device
        hardware = link.bus.devices[name]
        self.traits = SessionTraits(
            ceiling_bytes_per_s=link.bus.bytes_per_s or 1e9, slot_count=hardware.slot_count
        )

    async def _hardware(self, size_bytes: int = 1) -> FakeDevice:
        return await self._link.carry(self._name, size_bytes)

    async def identify(self) -> Identity:
        hardware = await self._hardware()
        return Identity(hardware.hardware_id, serial_number=hardware.name)

    async def reports(self) -> AsyncIterator[Reported]:
        uptime = 0
        while True:
            hardware = await self._hardware()
            if hardware.app is not None:
                yield Reported("app_version", hardware.app.version)
            yield Reported("uptime", uptime, "s")
            # as they are now: while one is being taken, a wish or a test may give the device another
            for name, value in tuple(hardware.properties.items()):
                yield Reported(name, value)
            uptime += 1
            await asyncio.sleep(0.02)

    async def apply(self, desired: Desired) -> Reported:
        hardware = await self._hardware()
        hardware.applied.append(desired)
        hardware.properties[desired.name] = hardware.takes(desired)
        return Reported(desired.name, hardware.properties[desired.name])

    def offer(self, desired: Sequence[Desired]) -> None:
        self._link.bus.devices[self._name].offered = list(desired)

    async def slots(self) -> Slots:
        hardware = await self._hardware()
        if hardware.slot_count == 1:
            runs = hardware.app.version if hardware.app and hardware.tells else None
            return Slots((Slot("only", active=True, runs=runs),))
        return Slots(tuple(self._slot(hardware, number) for number in range(2)))

    def _slot(self, hardware: FakeDevice, number: int) -> Slot:
        app = read_app(hardware.slots[number])
        active = number == hardware.active
        return Slot(
            name="ab"[number],
            active=active,
            runs=app.version if app else "",
            confirmed=hardware.confirmed if active else False,
            pending=hardware.pending and not active,
            bootable=app is not None,
        )

    async def stage(self, image: Image, progress: Progress) -> None:
        hardware = await self._hardware()
        hardware.flashed_with = dict(image.params)
        hardware.flashed_as = image.label
        pages = _pages(image, self._device.flash_base, hardware.page_bytes)
        total = sum(length for _, _, _, length in pages)
        begin = await self._prefix(image, pages, total, progress)
        done = sum(length for _, _, _, length in pages[:begin])
        progress(Phase.WRITE, done, total)
        for segment, offset, address, length in pages[begin:]:
            data = await image.read(segment, offset, length)
            (await self._hardware(length)).write_page(address, data)
            done += length
            progress(Phase.WRITE, done, total)
        await self._read_back(image, pages[begin:], progress)

    async def _prefix(
        self, image: Image, pages: list[tuple[int, int, int, int]], total: int, progress: Progress
    ) -> int:
        """How many pages the device holds already; asks the device, never a memory of ours."""
        same = 0
        for segment, offset, address, length in pages:
            hardware = await self._hardware(length)
            if not hardware.reads_back and hardware.slot_count == 1:
                return 0
            if hardware.read(hardware.spare, address, length) != await image.read(segment, offset, length):
                break
            same += 1
            progress(Phase.COMPARE, sum(page[3] for page in pages[:same]), total)
        return same

    async def _read_back(
        self, image: Image, pages: list[tuple[int, int, int, int]], progress: Progress
    ) -> None:
        total, done = sum(length for _, _, _, length in pages), 0
        for segment, offset, address, length in pages:
            hardware = await self._hardware(length)
            if not hardware.reads_back:
                return
            if hardware.read(hardware.spare, address, length) != await image.read(segment, offset, length):
                raise Permanent(Reason.VERIFY_FAILED, f"{self._name} holds other bytes at {address:#x}")
            done += length
            progress(Phase.VERIFY, done, total)

    async def activate(self) -> None:
        hardware = await self._hardware()
        if hardware.slot_count > 1 and not hardware.pending:
            hardware.mark_pending()
        hardware.boot()

    async def check_health(self, check: HealthCheck) -> Health:
        app = (await self._hardware()).app
        evidence = f"version={app.version}" if app and app.healthy else "silence"
        return Health(re.search(check.pattern, evidence) is not None, evidence)


class FakeReadBackSession(FakeSession):
    """A device whose flash can be read."""

    async def read_flash(self, address: int, length: int, progress: Progress) -> bytes:
        hardware = await self._hardware(length)
        progress(Phase.READ_OUT, length, length)
        return hardware.read(hardware.active, address - self._device.flash_base, length)


class FakeTrialSession(FakeSession):
    """A device with two slots."""

    async def confirm(self) -> None:
        (await self._hardware()).confirm()

    async def revert(self) -> None:
        hardware = await self._hardware()
        if not hardware.confirmed:
            hardware.boot()


def _pages(image: Image, base: int, page_bytes: int) -> list[tuple[int, int, int, int]]:
    """(segment, offset, offset in flash, length) of each page of the image."""
    return [
        (number, offset, segment.address - base + offset, min(page_bytes, segment.length - offset))
        for number, segment in enumerate(image.segments)
        for offset in range(0, segment.length, page_bytes)
    ]


class FakePlugin:
    """Mapper ``fake`` and links ``fake:``, with buses of its own. Register an instance; keep it to reach the devices."""

    def __init__(self) -> None:
        self.buses: dict[str, Bus] = {}

    def bus(self, name: str) -> Bus:
        return self.buses.setdefault(name, Bus())

    def add(self, bus: str, device: FakeDevice) -> FakeDevice:
        """Put ``device`` on ``bus``; its address is ``fake:BUS/NAME``."""
        self.bus(bus).devices[device.name] = device
        return device

    @hookimpl
    def edged_mappers(self) -> Iterable[MapperSpec]:
        return [
            MapperSpec(
                name="fake",
                connect=self._connect,
                parse_config=parse_config,
                flash_protocols=frozenset({"fake"}),
                probe=self._probe,
                flash_params=frozenset({"erase"}),
                schemes=frozenset({"fake"}),
                probe_disturbs=False,
            )
        ]

    @hookimpl
    def edged_links(self) -> Iterable[LinkSpec]:
        return [LinkSpec("fake", self._open)]

    @asynccontextmanager
    async def _open(self, rest: str, env: Env) -> AsyncIterator[Link]:
        bus = self.bus(rest)
        if bus.lost:
            raise Transient(Reason.DEVICE_ABSENT, f"fake:{rest} is not there")
        bus.opened += 1
        try:
            yield FakeLink(f"fake:{rest}", bus)
        finally:
            bus.opened -= 1

    @asynccontextmanager
    async def _connect(self, device: Device, env: Env) -> AsyncIterator[Session]:
        bus_name, name = _split(device.address)
        self._make(bus_name, name, device.config)
        async with env.link(f"fake:{bus_name}") as link:
            assert isinstance(link, FakeLink)
            hardware = await link.carry(name, 1)
            if hardware.slot_count > 1:
                yield FakeTrialSession(link, name, device)
            elif hardware.reads_back:
                yield FakeReadBackSession(link, name, device)
            else:
                yield FakeSession(link, name, device)

    def _make(self, bus: str, name: str, config: object) -> None:
        if isinstance(config, FakeConfig) and config.make and name not in self.bus(bus).devices:
            self.add(bus, _made(name, config.make))

    async def _probe(self, address: str, env: Env) -> Identity | None:
        bus_name, name = _split(address)
        async with env.link(f"fake:{bus_name}") as link:
            assert isinstance(link, FakeLink)
            hardware = await link.carry(name, 1)
            return Identity(hardware.hardware_id, serial_number=hardware.name)


_MAKE: dict[str, type] = {
    "slot_count": int,
    "size_bytes": int,
    "page_bytes": int,
    "reads_back": bool,
    "file": str,
}


def parse_config(table: Mapping[str, object]) -> FakeConfig:
    """Keys of ``FakeDevice`` to make one in the daemon's own process, and ``app``: the version that it leaves the factory
    with. Raises ``ValueError``."""
    allowed = _MAKE | {"app": str}
    for key, value in table.items():
        if key not in allowed:
            raise ValueError(f"{key}: found an unknown key; allowed: {', '.join(sorted(allowed))}")
        if not isinstance(value, allowed[key]):
            raise ValueError(f"{key}: found {value!r}; allowed: {allowed[key].__name__}")
    return FakeConfig(dict(table))


def _made(name: str, make: Mapping[str, object]) -> FakeDevice:
    options = {key: value for key, value in make.items() if key in _MAKE and key != "file"}
    file = make.get("file")
    device = FakeDevice(name, file=Path(str(file)) if file else None, **options)  # type: ignore[arg-type]
    if "app" in make and device.app is None:
        device.install(fake_app(str(make["app"])))
    return device


def _split(address: str) -> tuple[str, str]:
    bus, slash, name = address.removeprefix("fake:").partition("/")
    if not slash or not bus or not name:
        raise Permanent(Reason.CONFIG_INVALID, f"{address}: write fake:BUS/NAME")
    return bus, name
