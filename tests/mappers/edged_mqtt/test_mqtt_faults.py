"""Wires that lose, double, flip and swap messages or break, and devices that misbehave: the job ends with the right image, or
with the old one and a reason; and nobody else is slowed down by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from broker_kit import Mosquitto
from mqtt_kit import PullingDevice
from mqtt_node import ENGINE, IMAGE_BYTES, Plant, awaited, deployed, image_bytes, running

from edged.domain.job import Job, State
from edged.engine.observer import Silent
from edged.errors import Reason
from edged.store import twins
from edged.testing.node import TestNode, life
from edged.testing.ports import free_port

Fault = Callable[[int, bytes], list[bytes]]


class Counting(Silent):
    """What mappers count."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()

    def mapper_event(self, source: str, event: str) -> None:
        self.events[event] += 1


def is_chunk(packet: bytes) -> bool:
    return b"/response/" in packet[:64] and b"/chunk/" in packet[:64]


def is_request(packet: bytes) -> bool:
    return b"/request/" in packet[:64] and b"/chunk/" in packet[:64]


def is_offer(packet: bytes) -> bool:
    """No withdrawal, which only names the attributes."""
    return b"/attributes" in packet[:64] and b'"fw_checksum":' in packet


def is_state(packet: bytes) -> bool:
    """What the device says of its download: DOWNLOADING, DOWNLOADED, VERIFIED, UPDATING, UPDATED."""
    return b"/telemetry" in packet[:64] and b'"fw_state"' in packet


def is_report(packet: bytes) -> bool:
    return b"/telemetry" in packet[:64] and b'"interval"' in packet


def is_wish(packet: bytes) -> bool:
    return b"/attributes" in packet[:64] and b'"interval"' in packet


class Wire:
    """Between a device and node or broker: hands messages on as ``fault`` says, and cuts the connection in the middle of the
    packets to the device in ``cuts``.

    ``fault`` is given the number of the message, among those that are ``on``, and the packet; it returns what goes on.
    """

    def __init__(
        self,
        far_port: int,
        fault: Fault | None = None,
        cuts: Sequence[int] = (),
        on: Callable[[bytes], bool] = is_chunk,
    ) -> None:
        self.port = free_port()
        self.seen = self.fired = 0
        self._far_port = far_port
        self._fault = fault
        self._on = on
        self._cuts = iter(cuts)
        self._next_cut = next(self._cuts, 0)
        self._packets = 0

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Wire]:
        server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)
        try:
            yield self
        finally:
            server.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._far_port)
        except OSError:
            writer.transport.abort()
            return
        ways = [self._pump(reader, far, is_up=True), self._pump(far_reader, writer, is_up=False)]
        pumps = [asyncio.create_task(way) for way in ways]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            for one in (writer, far):
                one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_up: bool) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                packet = await _packet(reader)
                self._packets += not is_up
                if not is_up and self._packets == self._next_cut:
                    self._next_cut = next(self._cuts, 0)
                    self.fired += 1
                    writer.write(packet[: len(packet) // 2])
                    return
                for one in self._faulty(packet):
                    writer.write(one)

    def _faulty(self, packet: bytes) -> list[bytes]:
        if self._fault is None or not self._on(packet):
            return [packet]
        self.seen += 1
        found = self._fault(self.seen, packet)
        self.fired += found != [packet]
        return found


async def _packet(reader: asyncio.StreamReader) -> bytes:
    packet = await reader.readexactly(1)
    length = shift = 0
    while True:
        byte = await reader.readexactly(1)
        packet += byte
        length |= (byte[0] & 127) << shift
        shift += 7
        if byte[0] < 128:
            return packet + await reader.readexactly(length)


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0")
    plant.device(silence_s=0.6, install_s=10.0)
    return plant


def never_silent(plant: Plant) -> None:
    """What is counted is of a device that answers all the time: it is not to be offered the image again in between."""
    plant.devices[0].config["silence_s"] = 20.0


@pytest.fixture(params=["endpoint", "broker"])
def way(request: pytest.FixtureRequest, plant: Plant, tmp_path: Path) -> Iterator[tuple[int, str]]:
    """The plant's device at the node's own endpoint and at a broker: the port, and what its topics begin with."""
    if request.param == "endpoint":
        yield plant.port, ""
        return
    broker = Mosquitto(tmp_path)
    plant.devices.clear()
    plant.device(address=f"mqtt:127.0.0.1:{broker.port}/devices/pump-1", silence_s=0.6, install_s=10.0)
    with broker.running():
        yield broker.port, "devices/pump-1/"


def right(job: Job, device: PullingDevice) -> None:
    """The right image, or the old one and a reason; never a wrong image that is called good."""
    if job.state is State.SUCCEEDED:
        assert (device.version, bytes(device.flash)) == ("2.0.0", image_bytes("2.0.0")), job.detail
    else:
        assert job.state is State.REVERTED and device.version == "1.0.0", (job.state, job.detail)
        assert job.reason is not None and job.detail


def lost(number: int, packet: bytes) -> list[bytes]:
    return [] if number in (5, 40) else [packet]


def doubled(number: int, packet: bytes) -> list[bytes]:
    return [packet, packet] if number in (3, 20) else [packet]


def flipped(number: int, packet: bytes) -> list[bytes]:
    return [packet[:-7] + bytes([packet[-7] ^ 0x10]) + packet[-6:]] if number == 9 else [packet]


class Swapped:
    """Two chunks change places. A device that asks for one at a time has to ask for both: the first is kept back."""

    def __init__(self) -> None:
        self.kept = b""

    def __call__(self, number: int, packet: bytes) -> list[bytes]:
        if number == 6:
            self.kept = packet
            return []
        if number == 7:
            return [packet, self.kept]
        return [packet]


class Eager(PullingDevice):
    """Asks for two chunks at a time, and takes them as they come."""

    def _begin(self) -> None:
        self.next_chunk = lambda chunk: chunk
        super()._begin()
        self.next_chunk = lambda chunk: chunk + 1
        self.ask()

    def ask(self) -> None:
        if self.next_chunk(self._chunk) * self.chunk_bytes < self._offer["size"]:
            super().ask()


@pytest.mark.parametrize(
    ("kind", "fault", "begins"),
    [
        (PullingDevice, lost, 3),
        (PullingDevice, doubled, 1),
        (PullingDevice, flipped, 2),
        (PullingDevice, Swapped, 2),
        (Eager, Swapped, 2),
    ],
    ids=["lost", "doubled", "flipped", "swapped", "swapped of two that were asked for"],
)
def test_a_wire_with_one_fault_delivers(
    plant: Plant, way: tuple[int, str], kind: type[PullingDevice], fault: Any, begins: int
) -> None:
    (port, prefix), naive = way, kind is Eager
    if fault in (doubled, flipped) or naive:
        never_silent(plant)
    wire, counting = Wire(port, Swapped() if fault is Swapped else fault), Counting()
    device = kind(wire.port, "token-of-pump-1", prefix=prefix, tries_again=True, naive=naive)

    async def run() -> None:
        async with wire.up(), running(plant, device, observer=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert wire.fired, "the fault did not fire"
            assert job.state is State.SUCCEEDED, job.detail
            right(job, device)
            # an image for each time that it began: at first, and where edged saw it fall silent, or it said that it failed
            begun = device.log.count("DOWNLOADING")
            assert begins <= begun <= 1 + counting.events["silent"] + counting.events["device_failed"]
            assert device.written <= begun * IMAGE_BYTES
            if fault is flipped or naive:
                assert counting.events["device_failed"] == 1, "the device did not see it"

    asyncio.run(run())


def lose(*numbers: int) -> Fault:
    return lambda number, packet: [] if number in numbers else [packet]


def double(*numbers: int) -> Fault:
    return lambda number, packet: [packet, packet] if number in numbers else [packet]


def late(which: int) -> Fault:
    """After the next one of its kind; where there is none it is lost."""
    kept: list[bytes] = []

    def fault(number: int, packet: bytes) -> list[bytes]:
        if number == which:
            kept.append(packet)
            return []
        found = [packet, *kept]
        kept.clear()
        return found

    return fault


MESSAGES = {
    "request lost": (is_request, lose(5, 30)),
    "request doubled": (is_request, double(1, 3, 20)),
    "request late": (is_request, late(6)),
    "offer lost": (is_offer, lose(1)),
    "offer doubled": (is_offer, double(1)),
    "offer late": (is_offer, late(1)),
    "DOWNLOADING lost": (is_state, lose(1)),
    "DOWNLOADED lost": (is_state, lose(2)),
    "DOWNLOADED late": (is_state, late(2)),
    "UPDATING lost": (is_state, lose(4)),
    "UPDATING late": (is_state, late(4)),
    "UPDATED lost": (is_state, lose(5)),
    "states doubled": (is_state, double(1, 2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_that_is_lost_doubled_or_late_changes_nothing(
    plant: Plant, way: tuple[int, str], name: str
) -> None:
    """A device that says now and then how it is, where one of its states is hit; edged offers again what nobody asks for."""
    (port, prefix), (on, fault) = way, MESSAGES[name]
    wire, counting = Wire(port, fault, on=on), Counting()
    talks: dict[str, Any] = {"every_s": 0.3, "repeats": True} if on is is_state else {}
    device = PullingDevice(wire.port, "token-of-pump-1", prefix=prefix, tries_again=True, **talks)

    async def run() -> None:
        async with wire.up(), running(plant, device, observer=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert wire.fired, "the fault did not fire"
            assert job.state is State.SUCCEEDED, job.detail
            right(job, device)

    asyncio.run(run())


def test_a_device_that_only_says_again_what_it_runs_is_silent_in_its_download(plant: Plant) -> None:
    """Its request was lost, and it waits; that it is there is no news of the download."""
    wire, counting = Wire(plant.port, lose(5), on=is_request), Counting()
    device = PullingDevice(wire.port, "token-of-pump-1", every_s=0.2, repeats=True)

    async def run() -> None:
        async with wire.up(), running(plant, device, observer=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert wire.fired and job.state is State.SUCCEEDED, job.detail
            right(job, device)
            assert counting.events["silent"] >= 1

    asyncio.run(run())


class Patient(PullingDevice):
    """Passes over what it cannot read."""

    async def _message(self, first: int, body: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError):
            await super()._message(first, body)


class Obedient(Patient):
    """Does what its shared attributes say, where it can read them, and reports it."""

    def _given(self, shared: dict[str, Any]) -> None:
        super()._given(shared)
        self.values |= {name: shared[name] for name in self.values.keys() & shared.keys()}


def turn(before: bytes, after: bytes, *which: int) -> Fault:
    """One bit of ``before``, in the messages ``which``: of all where there are none."""
    assert sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1

    def fault(number: int, packet: bytes) -> list[bytes]:
        if which and number not in which:
            return [packet]
        assert packet.count(before) == 1, packet
        return [packet.replace(before, after)]

    return fault


DIGEST = hashlib.sha256(image_bytes("2.0.0")).hexdigest().encode()
OTHER_DIGEST = bytes([DIGEST[0] ^ 1]) + DIGEST[1:]

# what is hit, and how the job ends where that is not well: why, and a part of what it says
TURNED: dict[str, tuple[Callable[[bytes], bool], Fault, Reason | None, str]] = {
    "request: chunk": (is_request, turn(b"/chunk/5", b"/chunk/7", 6), None, ""),
    "request: number": (is_request, turn(b"/request/1/", b"/request/3/", 6), None, ""),
    "request: component": (is_request, turn(b"v2/fw/", b"v2/gw/", 6), None, ""),
    "request: size": (is_request, turn(b"4096", b"4097", 6), None, ""),
    "request: no size": (is_request, turn(b"4096", b"4p96", 6), Reason.DEVICE_ERROR, "b'4p96' is no number"),
    "offer: size": (is_offer, turn(b":200000,", b":220000,", 1), None, ""),
    "offer: checksum": (is_offer, turn(DIGEST, OTHER_DIGEST, 1), Reason.VERIFY_FAILED, "'checksum', 3 times"),
    "offer: version": (
        is_offer,
        turn(b'"2.0.0"', b'"2.0.1"', 1),
        Reason.DEVICE_REVERTED,
        "runs pump 2.0.1, not pump 2.0.0",
    ),
    "offer: title": (
        is_offer,
        turn(b'"pump"', b'"qump"', 1),
        Reason.DEVICE_REVERTED,
        "runs qump 2.0.0, not pump 2.0.0",
    ),
    "offer: key": (is_offer, turn(b"fw_version", b"fw_wersion", 1), None, ""),
    "offer: JSON": (is_offer, turn(b'"SHA256"}', b'"SHA256"|', 1), None, ""),
    "DOWNLOADING": (is_state, turn(b'"DOWNLOADING"', b'"DOWNLOADINF"', 1), None, ""),
    "DOWNLOADED": (is_state, turn(b'"DOWNLOADED"', b'"DOWNLOADEE"', 2), None, ""),
    "UPDATED": (is_state, turn(b'"UPDATED"', b'"UPDATEE"', 5), None, ""),
    "UPDATED: JSON": (is_state, turn(b'"UPDATED"}', b'"UPDATED"|', 5), None, ""),
    "UPDATED: version": (
        is_state,
        turn(b'"2.0.0"', b'"2.0.1"', 5),
        Reason.DEVICE_REVERTED,
        "runs pump 2.0.1, not pump 2.0.0",
    ),
}


@pytest.mark.parametrize("name", TURNED)
def test_a_bit_that_is_turned_ends_with_the_right_image_or_a_reason(plant: Plant, name: str) -> None:
    """In what the device asks for, in what it is offered, and in what it says of its firmware."""
    on, fault, reason, text = TURNED[name]
    if on is is_state or reason is not None:
        never_silent(plant)
    wire, counting = Wire(plant.port, fault, on=on), Counting()
    # one whose last word was lost says again what it runs
    device = Patient(
        wire.port, "token-of-pump-1", tries_again=True, every_s=0.3, repeats=name == "UPDATED: JSON"
    )

    async def run() -> None:
        async with wire.up(), running(plant, device, observer=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert wire.fired == 1, "the fault did not fire"
            assert (job.state is State.SUCCEEDED, job.reason) == (reason is None, reason), job.detail
            assert text in (job.detail or "")
            right(job, device)
            assert device.written <= 4 * IMAGE_BYTES

    asyncio.run(run())


def flip_last(which: int) -> Fault:
    """In the payload's last byte, which makes no JSON of it."""
    return lambda number, packet: [packet[:-1] + bytes([packet[-1] ^ 1])] if number == which else [packet]


PROPERTIES = {
    f"{what} {how}": (on, fault)
    for what, on in (("report", is_report), ("wish", is_wish))
    for how, fault in (
        ("lost", lose(1)),
        ("doubled", double(1)),
        ("late", late(1)),
        ("flipped", flip_last(1)),
    )
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_property_gets_there_whatever_happens_to_one_message(
    plant: Plant, way: tuple[int, str], name: str
) -> None:
    """A device that says now and then how it is, and is told a second time what it did not hear."""
    (port, prefix), (on, fault), config = way, PROPERTIES[name], plant.config
    brisk = attrs.evolve(config, storage=attrs.evolve(config.storage, report_interval_s=0.2))
    wire, later, armed = Wire(port, fault, on=lambda packet: armed and on(packet)), 0.0, False
    values = {"temperature": 20.5, "interval": 1}
    device = Obedient(wire.port, "token-of-pump-1", prefix=prefix, every_s=0.1, values=values)

    async def reported(node: TestNode, value: int) -> None:
        nonlocal later
        async with asyncio.timeout(20):
            while await node.reported("pump-1", "interval") != value or device.values["interval"] != value:
                await asyncio.sleep(0.02)
                # what it did not take is told again after some seconds
                later += 0.1

    async def run() -> None:
        nonlocal armed
        async with wire.up(), life(brisk, plant.plugins, passed=lambda: later) as node:
            await awaited(node)
            device.start()
            try:
                await reported(node, 1)
                armed = True
                for value in (5, 7):
                    await node.store.write(
                        lambda tx, value=value: twins.set_desired(tx, "pump-1", "interval", value, "operator")
                    )
                    node.sessions["pump-1"].refresh()
                    await reported(node, value)
                assert wire.fired, "the fault did not fire"
                twin = await node.store.read(lambda tx: twins.get(tx, "pump-1"))
                assert twin.reported["temperature"].value == 20.5 and set(twin.desired) == {"interval"}
            finally:
                await device.stop()

    asyncio.run(run())


def test_a_device_that_keeps_its_old_value_is_not_said_to_have_the_new_one(
    plant: Plant, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers once, with what it has: the twin tells that, and the operator is told that the wish was not taken."""

    class Stubborn(PullingDevice):
        def _given(self, shared: dict[str, Any]) -> None:
            super()._given(shared)
            if "interval" in shared:
                self.report(interval=1)

    device = Stubborn(plant.port, "token-of-pump-1", values={"interval": 1})

    async def run() -> None:
        async with running(plant, device) as node:
            await node.store.write(lambda tx: twins.set_desired(tx, "pump-1", "interval", 5, "operator"))
            node.sessions["pump-1"].refresh()
            async with asyncio.timeout(20):
                while "interval is 1 still" not in str([vars(record) for record in caplog.records]):
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
            assert await node.reported("pump-1", "interval") == 1

    asyncio.run(run())


def test_a_wire_that_always_flips_ends_with_the_old_image(plant: Plant) -> None:
    wire, counting = (
        Wire(plant.port, lambda number, packet: [packet[:-1] + bytes([packet[-1] ^ 1])]),
        Counting(),
    )
    device = PullingDevice(wire.port, "token-of-pump-1", tries_again=True, chunk_bytes=65536)

    async def run() -> None:
        async with wire.up(), running(plant, device, observer=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, job.reason) == (State.REVERTED, Reason.VERIFY_FAILED), job.detail
            assert "'checksum', 3 times" in job.detail
            right(job, device)
            assert counting.events["device_failed"] == 3
            assert device.written <= 4 * IMAGE_BYTES

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_a_connection_that_breaks_anywhere_ends_right(plant: Plant, way: tuple[int, str], seed: int) -> None:
    dice, (port, prefix) = random.Random(seed), way
    cuts = sorted(dice.sample(range(3, 120), 4))
    wire, counting = Wire(port, cuts=cuts), Counting()
    device = PullingDevice(
        wire.port, "token-of-pump-1", prefix=prefix, reboots=bool(seed % 2), protocol=4 + seed % 2
    )

    async def run() -> None:
        async with wire.up(), running(plant, device, observer=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert wire.fired >= 2, "the connection did not break"
            begun = device.log.count("DOWNLOADING")
            assert begun >= 2 and device.written > IMAGE_BYTES, "it did not break in the middle of the image"
            assert job.state is State.SUCCEEDED, job.detail
            right(job, device)
            assert begun <= 1 + wire.fired + counting.events["silent"]
            assert device.written <= begun * IMAGE_BYTES

    asyncio.run(run())


# of each kind of message, how many are hit of the first ones
KINDS: dict[str, tuple[Callable[[bytes], bool], int, int]] = {
    "chunk": (is_chunk, 3, 40),
    "request": (is_request, 3, 40),
    "offer": (is_offer, 1, 1),
    "state": (is_state, 2, 4),
}


class Many:
    """Faults on every kind of message, where ``seed`` says; ``hit`` counts them by kind, and which were "flipped"."""

    def __init__(self, seed: int) -> None:
        self.hit: Counter[str] = Counter()
        self._dice = {kind: random.Random(f"{seed} {kind}") for kind in KINDS}
        self._at = {
            kind: self._dice[kind].sample(range(1, most + 1), count)
            for kind, (_, count, most) in KINDS.items()
        }
        self._seen: Counter[str] = Counter()
        self._kept: dict[str, bytes] = {}

    def __call__(self, number: int, packet: bytes) -> list[bytes]:
        kind = next((kind for kind, (on, _, _) in KINDS.items() if on(packet)), "")
        self._seen[kind] += 1
        if self._seen[kind] in self._at.get(kind, ()):
            self.hit[kind] += 1
            return self._spoilt(kind, packet)
        kept = self._kept.pop(kind, b"")
        return [packet, kept] if kept else [packet]

    def _spoilt(self, kind: str, packet: bytes) -> list[bytes]:
        dice = self._dice[kind]
        match dice.randrange(6):
            case 0:
                return []
            case 1:
                return [packet, packet]
            case 2:
                self._kept[kind] = packet
                return []
            case _:
                self.hit["flipped"] += 1
                # anywhere behind the length of it all, which is the wire's own
                at = dice.randrange(2 + (packet[1] > 127), len(packet))
                return [packet[:at] + bytes([packet[at] ^ 1 << dice.randrange(8)]) + packet[at + 1 :]]


# 2 breaks a message's frame, 3 and 4 a request for good; 5 and 7 make a wrong image, which the device sees
@pytest.mark.parametrize("seed", [2, 3, 4, 5, 7])
def test_a_wire_with_many_faults_never_makes_a_wrong_image_good(plant: Plant, seed: int) -> None:
    many = Many(seed)
    wire, counting = Wire(plant.port, many, on=lambda packet: packet[0] >> 4 == 3), Counting()
    device = Patient(
        wire.port, "token-of-pump-1", tries_again=True, naive=bool(seed % 2), every_s=0.3, repeats=True
    )

    async def run() -> None:
        async with wire.up(), running(plant, device, observer=counting) as node:
            job = await deployed(node, "pump@2.0.0", timeout_s=120)
            assert many.hit["offer"] and many.hit["request"] and many.hit["chunk"], "not all were hit"
            assert many.hit["flipped"], "nothing was flipped"
            right(job, device)
            assert device.written <= 4 * IMAGE_BYTES

    asyncio.run(run())


# -- devices that misbehave


def _same_chunk(chunk: int) -> int:
    return 0


def _behind_the_end(chunk: int) -> int:
    return 10_000


@pytest.mark.parametrize(
    ("options", "event", "text"),
    [
        ({"naive": True, "next_chunk": _same_chunk}, "same_download", "bytes of an image of 200000"),
        ({"naive": True, "next_chunk": _behind_the_end}, "endless_requests", "behind the end of the image"),
        ({"chunk_bytes": 150_000}, "payload_too_large", "asked for 150000 bytes at once; allowed: 100000"),
        ({"chunk_bytes": "4k"}, "bad_request", "chunk size b'4k' is no number"),
    ],
    ids=["same_download", "endless_requests", "payload_too_large", "bad_request"],
)
def test_who_asks_too_much_is_stopped_and_counted_and_others_go_on(
    plant: Plant, options: dict[str, Any], event: str, text: str
) -> None:
    counting = Counting()
    plant.devices[0].config["largest_chunk_bytes"] = 100_000
    plant.device("pump-2")
    rude = PullingDevice(plant.port, "token-of-pump-1", **options)
    good = PullingDevice(plant.port, "token-of-pump-2", version="1.0.0")
    asked: list[int] = []
    good.on_chunk = lambda _: asked.append(rude.requests)

    async def run() -> None:
        async with running(plant, rude, good, observer=counting) as node:
            await deployed(node, "pump@1.0.0", "pump-2")
            jobs = await asyncio.gather(deployed(node, "pump@2.0.0"), deployed(node, "pump@2.0.0", "pump-2"))
            assert (jobs[0].state, jobs[0].reason) == (State.REVERTED, Reason.DEVICE_ERROR), jobs[0].detail
            assert text in jobs[0].detail
            assert counting.events[event] >= 1
            assert rude.version == "1.0.0" and rude.written <= 4 * IMAGE_BYTES
            assert jobs[1].state is State.SUCCEEDED and good.version == "2.0.0"
            # whoever asks for too much is not served more often than those beside it
            assert len(asked) == -(-IMAGE_BYTES // good.chunk_bytes)
            assert max(after - before for before, after in itertools.pairwise(asked)) <= 8
            assert any(line.startswith("error: ") for line in rude.log), "it was not told"

    asyncio.run(run())


def test_a_client_that_a_duplicate_sends_round_for_ever_is_stopped(plant: Plant) -> None:
    """As the vendor's does: it has more bytes than the image, and never as many."""
    never_silent(plant)
    wire, counting = Wire(plant.port, doubled), Counting()
    device = PullingDevice(wire.port, "token-of-pump-1", naive=True)

    async def run() -> None:
        async with wire.up(), running(plant, device, observer=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_ERROR), job.detail
            assert wire.fired and counting.events["endless_requests"] == 1
            right(job, device)

    asyncio.run(run())


def test_a_device_that_hangs_uses_up_its_attempts(plant: Plant) -> None:
    counting = Counting()
    plant.engine = attrs.evolve(ENGINE, max_attempts=3)
    wire = Wire(plant.port, lambda number, packet: [packet] if number % 8 else [])
    device = PullingDevice(wire.port, "token-of-pump-1")

    async def run() -> None:
        async with wire.up(), running(plant, device, observer=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, job.reason) == (State.REVERTED, Reason.ATTEMPTS_EXHAUSTED), job.detail
            assert "silent for 0.6 s, with" in job.detail
            right(job, device)
            assert counting.events["silent"] >= 3

    asyncio.run(run())


def test_a_chunk_that_nobody_offered_is_not_given(plant: Plant) -> None:
    counting = Counting()
    device = PullingDevice(plant.port, "token-of-pump-1")

    async def run() -> None:
        async with running(plant, device, observer=counting):
            device._offer = {"size": 1}
            before = device.log.count("connected")
            device.ask()
            async with asyncio.timeout(20):
                while "error: NOT_FOUND" not in device.log:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert device.log.count("connected") == before, "it asked once, and was thrown out"
            for _ in range(20):
                device.ask()
            async with asyncio.timeout(20):
                while device.log.count("connected") == before:
                    await asyncio.sleep(0.01)
            assert counting.events["not_offered"] == 1
            assert not device.written

    asyncio.run(run())


def test_a_device_that_goes_on_by_itself_after_a_cut_is_let_in(plant: Plant) -> None:
    never_silent(plant)
    counting = Counting()
    device = PullingDevice(plant.port, "token-of-pump-1", resumes=True)
    cuts: list[int] = []

    def cut(chunk: int) -> None:
        if chunk == 20 and not cuts:
            cuts.append(chunk)
            assert device._writer is not None
            device._writer.transport.abort()

    device.on_chunk = cut

    async def run() -> None:
        async with running(plant, device, observer=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert cuts and device.log.count("connected") == 2, "the connection did not break"
            assert job.state is State.SUCCEEDED, job.detail
            right(job, device)
            assert not counting.events["not_offered"] and not counting.events["stray_request"]
            assert device.log.count("DOWNLOADING") == 1 and device.written <= IMAGE_BYTES + 4096

    asyncio.run(run())


def test_two_devices_with_one_credential_never_pass_for_one(plant: Plant) -> None:
    counting = Counting()
    one = PullingDevice(plant.port, "token-of-pump-1", delay_s=0.02)
    two = PullingDevice(plant.port, "token-of-pump-1", delay_s=0.02)

    async def run() -> None:
        async with running(plant, one, observer=counting) as node:
            await node.want("pump-1", "pump@2.0.0")
            await asyncio.sleep(0.3)
            two.start()
            try:
                job = await node.ended("pump-1", 90)
                winner = one if one.version == "2.0.0" else two
                right(job, winner)
                assert counting.events["two_sessions"] >= 1
            finally:
                await two.stop()

    asyncio.run(run())
