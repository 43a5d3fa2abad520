"""Wires that lose, double, flip and swap messages or break, and devices that misbehave: the job ends with the right image, or
with the old one and a reason; and nobody else is slowed down by it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from mqtt_kit import PullingDevice, free_port
from mqtt_node import ENGINE, IMAGE_BYTES, Plant, deployed, image_bytes

from edged.domain.job import Job, State
from edged.engine.observer import Silent
from edged.errors import Reason
from edged.testing.node import TestNode, life

Fault = Callable[[int, bytes], list[bytes]]


class Counting(Silent):
    """What mappers count."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()

    def mapper_event(self, source: str, event: str) -> None:
        self.events[event] += 1


class Wire:
    """Between device and node: hands chunks on as ``fault`` says, and cuts the connection at the packets in ``cuts``.

    ``fault`` is given the number of the chunk message and the packet, and returns what goes on.
    """

    def __init__(self, node_port: int, fault: Fault | None = None, cuts: Sequence[int] = ()) -> None:
        self.port = free_port()
        self.chunks = self.fired = 0
        self._node_port = node_port
        self._fault = fault
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
            far_reader, far = await asyncio.open_connection("127.0.0.1", self._node_port)
        except OSError:
            writer.transport.abort()
            return
        up = asyncio.create_task(self._raw(reader, far))
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            await self._down(far_reader, writer)
        up.cancel()
        for one in (writer, far):
            one.transport.abort()

    async def _raw(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.transport.abort()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            packet = await reader.readexactly(1)
            length = shift = 0
            while True:
                byte = await reader.readexactly(1)
                packet += byte
                length |= (byte[0] & 127) << shift
                shift += 7
                if byte[0] < 128:
                    break
            packet += await reader.readexactly(length)
            self._packets += 1
            if self._packets == self._next_cut:
                self._next_cut = next(self._cuts, 0)
                self.fired += 1
                return
            for one in self._faulty(packet):
                writer.write(one)

    def _faulty(self, packet: bytes) -> list[bytes]:
        if self._fault is None or b"/response/" not in packet[:64] or b"/chunk/" not in packet[:64]:
            return [packet]
        self.chunks += 1
        found = self._fault(self.chunks, packet)
        self.fired += found != [packet]
        return found


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0")
    plant.device(silence_s=0.6, install_s=2.0)
    return plant


@asynccontextmanager
async def running(plant: Plant, *devices: PullingDevice, counting: Counting) -> AsyncIterator[TestNode]:
    async with life(plant.config, plant.plugins, observer=counting) as node:
        for device in devices:
            device.start()
        try:
            first = await deployed(node, "pump@1.0.0")
            assert first.state is State.SUCCEEDED, first.detail
            yield node
        finally:
            for device in devices:
                await device.stop()


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


@pytest.mark.parametrize(
    ("fault", "begins"),
    [(lost, 3), (doubled, 1), (flipped, 2), (Swapped(), 2)],
    ids=["lost", "doubled", "flipped", "swapped"],
)
def test_a_wire_with_one_fault_delivers(plant: Plant, fault: Fault, begins: int) -> None:
    wire, counting = Wire(plant.port, fault), Counting()
    device = PullingDevice(wire.port, "token-of-pump-1", tries_again=True)

    async def run() -> None:
        async with wire.up(), running(plant, device, counting=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert wire.fired, "the fault did not fire"
            assert job.state is State.SUCCEEDED, job.detail
            right(job, device)
            # an image for each time that it began: at first, and where edged saw it fall silent, or it said that it failed
            begun = device.log.count("DOWNLOADING")
            assert begins <= begun <= 1 + counting.events["silent"] + counting.events["device_failed"]
            assert device.written <= begun * IMAGE_BYTES

    asyncio.run(run())


def test_a_wire_that_always_flips_ends_with_the_old_image(plant: Plant) -> None:
    wire, counting = (
        Wire(plant.port, lambda number, packet: [packet[:-1] + bytes([packet[-1] ^ 1])]),
        Counting(),
    )
    device = PullingDevice(wire.port, "token-of-pump-1", tries_again=True, chunk_bytes=65536)

    async def run() -> None:
        async with wire.up(), running(plant, device, counting=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, job.reason) == (State.REVERTED, Reason.VERIFY_FAILED), job.detail
            assert "'checksum', 3 times" in job.detail
            right(job, device)
            assert counting.events["device_failed"] == 3
            assert device.written <= 4 * IMAGE_BYTES

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_a_connection_that_breaks_anywhere_ends_right(plant: Plant, seed: int) -> None:
    dice = random.Random(seed)
    cuts = sorted(dice.sample(range(3, 120), 4))
    wire, counting = Wire(plant.port, cuts=cuts), Counting()
    device = PullingDevice(wire.port, "token-of-pump-1", reboots=bool(seed % 2), protocol=4 + seed % 2)

    async def run() -> None:
        async with wire.up(), running(plant, device, counting=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert wire.fired >= 2, "the connection did not break"
            assert job.state is State.SUCCEEDED, job.detail
            right(job, device)

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_a_wire_with_many_faults_never_makes_a_wrong_image_good(plant: Plant, seed: int) -> None:
    dice = random.Random(seed)

    def fault(number: int, packet: bytes) -> list[bytes]:
        match dice.randrange(60):
            case 0:
                return []
            case 1:
                return [packet, packet]
            case 2:
                at = dice.randrange(40, len(packet)) if len(packet) > 41 else len(packet) - 1
                return [packet[:at] + bytes([packet[at] ^ 1 << dice.randrange(8)]) + packet[at + 1 :]]
            case _:
                return [packet]

    wire, counting = Wire(plant.port, fault), Counting()
    device = PullingDevice(wire.port, "token-of-pump-1", tries_again=True, naive=bool(seed % 2))

    async def run() -> None:
        async with wire.up(), running(plant, device, counting=counting) as node:
            job = await deployed(node, "pump@2.0.0", timeout_s=120)
            assert wire.fired, "no fault fired"
            right(job, device)

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
    ],
    ids=["same_download", "endless_requests", "payload_too_large"],
)
def test_who_asks_too_much_is_stopped_and_counted_and_others_go_on(
    plant: Plant, options: dict[str, Any], event: str, text: str
) -> None:
    counting = Counting()
    plant.devices[0].config["largest_chunk_bytes"] = 100_000
    plant.device("pump-2")
    rude = PullingDevice(plant.port, "token-of-pump-1", **options)
    good = PullingDevice(plant.port, "token-of-pump-2", version="1.0.0")

    async def run() -> None:
        async with running(plant, rude, good, counting=counting) as node:
            await deployed(node, "pump@1.0.0", "pump-2")
            jobs = await asyncio.gather(deployed(node, "pump@2.0.0"), deployed(node, "pump@2.0.0", "pump-2"))
            assert (jobs[0].state, jobs[0].reason) == (State.REVERTED, Reason.DEVICE_ERROR), jobs[0].detail
            assert text in jobs[0].detail
            assert counting.events[event] >= 1
            assert rude.version == "1.0.0" and rude.written <= 4 * IMAGE_BYTES
            assert jobs[1].state is State.SUCCEEDED and good.version == "2.0.0"
            assert any(line.startswith("error: ") for line in rude.log), "it was not told"

    asyncio.run(run())


def test_a_client_that_a_duplicate_sends_round_for_ever_is_stopped(plant: Plant) -> None:
    """As the vendor's does: it has more bytes than the image, and never as many."""
    wire, counting = Wire(plant.port, doubled), Counting()
    device = PullingDevice(wire.port, "token-of-pump-1", naive=True)

    async def run() -> None:
        async with wire.up(), running(plant, device, counting=counting) as node:
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
        async with wire.up(), running(plant, device, counting=counting) as node:
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
        async with running(plant, device, counting=counting):
            device._offer = {"size": 1}
            before = device.log.count("connected")
            device.ask()
            async with asyncio.timeout(10):
                while "error: NOT_FOUND" not in device.log:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert device.log.count("connected") == before, "it asked once, and was thrown out"
            for _ in range(20):
                device.ask()
            async with asyncio.timeout(10):
                while device.log.count("connected") == before:
                    await asyncio.sleep(0.01)
            assert counting.events["not_offered"] == 1
            assert not device.written

    asyncio.run(run())


def test_a_device_that_goes_on_by_itself_after_a_cut_is_let_in(plant: Plant) -> None:
    counting = Counting()
    device = PullingDevice(plant.port, "token-of-pump-1", asks_again=False)
    cuts: list[int] = []
    say = device.say

    def cut(chunk: int) -> None:
        if chunk == 20 and not cuts:
            cuts.append(chunk)
            assert device._writer is not None
            device._writer.transport.abort()

    def resume(state: str | None = None, **more: Any) -> None:
        say(state, **more)
        if cuts and state is None and len(device.flash) < IMAGE_BYTES:
            device.ask()

    device.on_chunk, device.say = cut, resume  # type: ignore[method-assign]

    async def run() -> None:
        async with running(plant, device, counting=counting) as node:
            job = await deployed(node, "pump@2.0.0")
            assert cuts, "the connection did not break"
            assert job.state is State.SUCCEEDED, job.detail
            right(job, device)
            assert not counting.events["not_offered"]

    asyncio.run(run())


def test_two_devices_with_one_credential_never_pass_for_one(plant: Plant) -> None:
    counting = Counting()
    one = PullingDevice(plant.port, "token-of-pump-1", delay_s=0.02)
    two = PullingDevice(plant.port, "token-of-pump-1", delay_s=0.02)

    async def run() -> None:
        async with running(plant, one, counting=counting) as node:
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
