"""Devices on a real broker, Debian's mosquitto: plain, with TLS through a bridge, restarted in the middle, and with messages
that it kept."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from broker_kit import Mosquitto
from mqtt_kit import LINKS, SPEC, PullingDevice, mqtt_device
from mqtt_node import Authority, Plant, awaited, deployed, image_bytes, vendor_device

from edged.config import LinkSettings
from edged.domain.job import State
from edged.errors import EdgedError, Reason, Transient
from edged.links import LinkPool, device_env
from edged.testing.conformance import Subject
from edged.testing.node import life
from edged_mqtt import broker as subject
from edged_mqtt.broker import Broker, open_broker
from edged_mqtt.config import BrokerAddress, BrokerConfig, parse_link
from edged_mqtt.wire import Credential, Proof, Seat

FIRST = [(0, bytes(range(256)) * 64)]
SECOND = [(0, bytes(range(255, -1, -1)) * 64)]


def _on_broker(port: int, name: str) -> Any:
    return replace(mqtt_device(port, name), address=f"mqtt:127.0.0.1:{port}/devices/{name}")


def test_conformance(edged_conformance: Any, tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)

    async def run() -> None:
        devices = [
            PullingDevice(broker.port, chunk_bytes=1024, every_s=0.1, repeats=True, prefix=f"devices/{name}/")
            for name in ("pump-1", "pump-2")
        ]
        device = devices[0]
        for one in devices:
            one.start()
        subject = Subject(
            spec=SPEC,
            links=LINKS,
            device=_on_broker(broker.port, "pump-1"),
            first=FIRST,
            second=SECOND,
            sent=lambda: bytes(device.chunks),
            holds=device.holds,
            written=lambda: device.written,
            unit_bytes=1024,
            unplug=device.unplug,
            plug=device.plug,
            neighbour=_on_broker(broker.port, "pump-2"),
        )
        try:
            async with asyncio.timeout(60):
                await edged_conformance(subject)
        finally:
            for one in devices:
                await one.stop()

    with broker.running():
        asyncio.run(run())


@pytest.mark.parametrize("chunk", [4096, 16384, 65536, 0])
def test_the_vendors_client_goes_through_a_bridge_to_updated(tmp_path: Path, chunk: int) -> None:
    """A small mosquitto for the device, which bridges to the node's below a prefix; between the two, and to the device, TLS. (A
    listener's mount_point does not serve: Debian 12's mosquitto 2.0.11 does not take it off again, eclipse-mosquitto#2244.)
    """
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0")
    authority = Authority(tmp_path)
    certificate, key = authority.issue("broker")
    tls = f"allow_anonymous true\ncertfile {certificate}\nkeyfile {key}"
    broker = Mosquitto(tmp_path, tls)
    folder = tmp_path / "pump"
    folder.mkdir()
    bridge = Mosquitto(
        folder,
        tls,
        bridge=f"connection node\naddress 127.0.0.1:{broker.port}\nbridge_cafile {authority.ca}\n"
        'topic # both 1 "" devices/pump-1/\ntry_private true',
    )
    plant.device(address=f"mqtt:127.0.0.1:{broker.port}/devices/pump-1")
    plant.links.append(
        LinkSettings(address=f"mqtt:127.0.0.1:{broker.port}", config={"tls": True, "ca": str(authority.ca)})
    )

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node, AsyncExitStack() as stack:
            await awaited(node)
            client = await stack.enter_async_context(
                vendor_device(
                    bridge.port, tls=True, ca=str(authority.ca), username="any", chunk=chunk, subscribe=True
                )
            )
            first = await deployed(node, "pump@1.0.0")
            assert first.state is State.SUCCEEDED, first.detail
            job = await deployed(node, "pump@2.0.0")
            assert job.state is State.SUCCEEDED, job.detail
            digest = hashlib.sha256(image_bytes("2.0.0")).hexdigest()
            assert await client.until(lambda line: line.startswith("received")) == (
                f"received 200000 {digest} 2.0.0"
            )
            assert await client.until(lambda line: line.startswith("updated")) == "updated pump 2.0.0"

    with broker.running(), bridge.running():
        asyncio.run(run())


def test_what_a_broker_retained_is_no_device(tmp_path: Path) -> None:
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", size=20_000)
    broker = Mosquitto(tmp_path)
    plant.device(address=f"mqtt:127.0.0.1:{broker.port}/devices/pump-1")
    device = PullingDevice(broker.port, prefix="devices/pump-1/", retains=True)

    async def run() -> None:
        device.start()
        await device.connected.wait()
        async with asyncio.timeout(20):
            while "current_fw_version" not in await asyncio.to_thread(_retained, broker):
                await asyncio.sleep(0.05)
        await device.stop()
        async with life(plant.config, plant.plugins) as node:
            await awaited(node)
            await node.want("pump-1", "pump@1.0.0")
            async with asyncio.timeout(20):
                while not (jobs := await node.jobs("pump-1")) or jobs[0].waiting is None:
                    await asyncio.sleep(0.02)
            assert jobs[0].waiting.reason is Reason.DEVICE_ABSENT
            device.start()
            try:
                assert (await node.ended("pump-1")).state is State.SUCCEEDED, "a live message was not heard"
            finally:
                await device.stop()

    with broker.running():
        asyncio.run(run())


def _retained(broker: Mosquitto) -> str:
    """What the broker gives to whoever subscribes now."""
    asked = ["mosquitto_sub", "-p", str(broker.port), "-t", "devices/#", "-W", "1", "--retained-only"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout


def test_a_device_that_says_that_it_runs_another_version_is_brought_back(tmp_path: Path) -> None:
    """A spare in its place, behind a broker: nobody sees that the connection is another."""
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0", size=20_000)
    broker = Mosquitto(tmp_path)
    plant.device(address=f"mqtt:127.0.0.1:{broker.port}/devices/pump-1")
    device, spare = (PullingDevice(broker.port, prefix="devices/pump-1/") for _ in range(2))

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node:
            await awaited(node)
            device.start()
            for version in ("1.0.0", "2.0.0"):
                assert (await deployed(node, f"pump@{version}")).state is State.SUCCEEDED
            await device.stop()
            spare.start()
            async with asyncio.timeout(20):
                while len(await node.jobs("pump-1")) < 3:
                    await asyncio.sleep(0.05)
            job = await node.ended("pump-1")
            assert (job.source, job.state) == ("drift", State.SUCCEEDED), job.detail
            assert spare.version == "2.0.0"
            assert len(await node.jobs("pump-1")) == 3, "it was noticed more than once"
        await spare.stop()

    with broker.running():
        asyncio.run(run())


def test_two_nodes_with_one_name_throw_each_other_out_less_and_less_often(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    counts = Counter[str]()

    async def run() -> None:
        address = f"mqtt:127.0.0.1:{broker.port}"
        table = parse_link({"client_id": "edged-1"}, address.removeprefix("mqtt:"))
        async with AsyncExitStack() as stack:
            for _ in range(2):
                pool = LinkPool(LINKS, {address: table}, count=lambda source, event: counts.update([event]))
                await stack.enter_async_context(device_env("one", pool).link(address))
            await asyncio.sleep(6)
        # each is thrown out after 0.5, 1 and 2 s of waiting, and would be every half second
        assert 4 <= counts["broker_lost"] <= 8

    with broker.running():
        asyncio.run(run())


def test_a_broker_that_restarts_in_the_middle_costs_one_download_more_at_most(tmp_path: Path) -> None:
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0")
    broker = Mosquitto(tmp_path)
    plant.device(address=f"mqtt:127.0.0.1:{broker.port}/devices/pump-1", silence_s=4)
    device = PullingDevice(broker.port, prefix="devices/pump-1/", delay_s=0.01)

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node:
            await awaited(node)
            device.start()
            try:
                first = await deployed(node, "pump@1.0.0")
                assert first.state is State.SUCCEEDED, first.detail
                await node.want("pump-1", "pump@2.0.0")
                async with asyncio.timeout(20):
                    while device.written < 20 * 4096:
                        await asyncio.sleep(0.01)
                broker.stop()
                await asyncio.sleep(0.3)
                broker.start()
                job = await node.ended("pump-1", 60)
                assert (job.state, device.version) == (State.SUCCEEDED, "2.0.0"), job.detail
                assert device.log.count("connected") >= 2, "the broker did not go"
                assert bytes(device.flash) == image_bytes("2.0.0")
                assert device.written <= 2 * 200_000
            finally:
                await device.stop()

    with broker.running():
        asyncio.run(run())


@pytest.mark.parametrize("largest", [0, 3 * 1024 * 1024], ids=["as it is", "as the table says"])
def test_a_large_image_goes_through_a_broker_at_once_where_the_table_says_so(
    tmp_path: Path, largest: int
) -> None:
    plant, size = Plant(tmp_path / "plant"), 2_500_000
    plant.publish("1.0.0", "2.0.0", size=size)
    broker = Mosquitto(tmp_path)
    link = f"mqtt:127.0.0.1:{broker.port}"
    plant.device(address=f"{link}/devices/pump-1")
    if largest:
        plant.links.append(LinkSettings(address=link, config={"largest_message_bytes": largest}))
    device = PullingDevice(broker.port, prefix="devices/pump-1/", chunk_bytes=0, every_s=0.2, repeats=True)

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node:
            await awaited(node)
            device.start()
            try:
                first = await deployed(node, "pump@1.0.0")
                assert first.state is State.SUCCEEDED, first.detail
                job = await deployed(node, "pump@2.0.0")
                if largest:
                    assert (job.state, device.version) == (State.SUCCEEDED, "2.0.0"), job.detail
                    assert bytes(device.flash) == image_bytes("2.0.0", size)
                    assert device.requests == 1
                else:
                    assert job.state is State.REVERTED, job.detail
                    assert f"asked for {size} bytes at once; allowed: 1048576" in job.detail
                    assert not device.written
            finally:
                await device.stop()

    with broker.running():
        asyncio.run(run())


# -- the broker's connection alone


class Env:
    """What a link is given."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.faulty = ""
        self.log = logging.LoggerAdapter(logging.getLogger("test"), {})

    def count(self, event: str) -> None:
        self.counted[event] += 1
        if event == self.faulty:
            self.faulty = ""
            raise RuntimeError(f"a fault at {event}")


class Guest:
    """Remembers what it hears, and fails at ``bad``."""

    def __init__(self, bad: bytes = b"") -> None:
        self.heard_all: list[tuple[str, bytes]] = []
        self.bad = bad
        self.news = asyncio.Event()

    def seated(self, seat: Seat) -> None:
        assert not self.heard_all

    def arrived(self) -> None:
        self.news.set()

    def left(self, why: str) -> None:
        assert why

    def over(self, fault: EdgedError) -> None:
        raise AssertionError(fault)

    def heard(self, topic: str, payload: bytes, meaning: object = None) -> bool:
        self.heard_all.append((topic, payload))
        self.news.set()
        if payload == self.bad:
            raise RuntimeError("a fault of the guest")
        return True

    async def until(self, count: int) -> list[tuple[str, bytes]]:
        async with asyncio.timeout(20):
            while len(self.heard_all) < count:
                self.news.clear()
                await self.news.wait()
        return self.heard_all


TOKEN = Credential(Proof.TOKEN, "pump")
TELEMETRY = "v1/devices/me/telemetry"
CHUNK = "v2/fw/request/1/chunk/0"


@asynccontextmanager
async def connected(port: int, client_id: str = "") -> AsyncIterator[tuple[Broker, Env]]:
    env = Env()
    address, config = BrokerAddress("127.0.0.1", port), BrokerConfig(client_id=client_id)
    async with open_broker(address, config, env) as broker:  # type: ignore[arg-type]
        yield broker, env


async def say(port: int, *messages: tuple[str, bytes]) -> None:
    async with aiomqtt.Client("127.0.0.1", port) as client:
        for topic, payload in messages:
            await client.publish(topic, payload, qos=1)


def test_a_fault_at_one_message_does_not_end_the_connection_of_all(tmp_path: Path) -> None:
    broken: list[dict[str, Any]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: broken.append(context))
        async with connected(broker.port) as (link, env):
            bad, good = Guest(bad=b"bad"), Guest()
            async with link.seat("a", TOKEN, bad), link.seat("b", TOKEN, good):
                await say(
                    broker.port,
                    (f"a/{TELEMETRY}", b"bad"),
                    (f"a/{TELEMETRY}", b"1"),
                    (f"b/{TELEMETRY}", b"2"),
                )
                assert await bad.until(2) == [(TELEMETRY, b"bad"), (TELEMETRY, b"1")]
                assert await good.until(1) == [(TELEMETRY, b"2")]
                assert not env.counted

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())
    assert [str(context["exception"]) for context in broken] == ["a fault of the guest"]


def test_what_goes_to_the_broker_does_not_wait_for_more(tmp_path: Path) -> None:
    """Nagle's algorithm would keep an answer back until the one before was acknowledged."""

    async def run() -> None:
        async with connected(broker.port) as (link, _):
            assert link._client is not None
            held = link._client._client.socket()
            assert isinstance(held, socket.socket) and held.getpeername()[1] == broker.port
            assert held.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())


def test_levels_of_a_prefix_may_look_like_those_of_the_protocol(tmp_path: Path) -> None:
    topics = ["v2/fw/request/v2/chunk/0", "v2/sw/request/1/chunk/7", TELEMETRY, "v1/devices/me/rpc/request/1"]

    async def run() -> None:
        async with connected(broker.port) as (link, _), AsyncExitStack() as stack:
            for prefix in ("line/v2/fw/pump", "v2/fw/request", "x/v1/devices/me", "plain"):
                guest = Guest()
                await stack.enter_async_context(link.seat(prefix, TOKEN, guest))
                await say(broker.port, *((f"{prefix}/{topic}", b"1") for topic in topics))
                assert await guest.until(len(topics)) == [(topic, b"1") for topic in topics], prefix

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())


def test_what_the_broker_kept_waits_for_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as soon as the broker is there, before any session has its seat."""

    async def run() -> None:
        async with connected(broker.port, "node-1") as (link, _), link.seat("a", TOKEN, Guest()):
            pass
        await say(
            broker.port,
            *((f"a/{TELEMETRY}", b"%d" % number) for number in range(3)),
            (f"a/{CHUNK}", b"64"),
        )
        async with connected(broker.port, "node-1") as (link, env):
            await held(link, "a", 4)
            guest = Guest()
            async with link.seat("a", TOKEN, guest) as seat:
                assert guest.heard_all == [
                    *((TELEMETRY, b"%d" % number) for number in range(3)),
                    (CHUNK, b"64"),
                ]
                assert seat.present
            # and what is too old is not said of a device that may be gone
            await say(broker.port, (f"a/{TELEMETRY}", b"old"))
            await held(link, "a", 1)
            monkeypatch.setattr(subject, "HELD_S", -1.0)
            guest = Guest()
            async with link.seat("a", TOKEN, guest):
                assert not guest.heard_all
            # nor does it fill the memory
            monkeypatch.setattr(subject, "HELD_S", 60.0)
            monkeypatch.setattr(subject, "MOST_HELD_BYTES", 1000)
            await say(broker.port, *((f"a/{TELEMETRY}", bytes(200)) for _ in range(4)))
            async with asyncio.timeout(20):
                while env.counted["dropped"] < 2:
                    await asyncio.sleep(0.01)
            await held(link, "a", 2)

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())


def test_what_one_device_says_before_its_session_leaves_room_for_what_others_do(tmp_path: Path) -> None:
    async def run() -> None:
        async with connected(broker.port, "node-1") as (link, env):
            for name in ("bad", "good"):
                async with link.seat(name, TOKEN, Guest()):
                    pass
            much = [(f"bad/{TELEMETRY}", bytes(60_000))] * 80
            await say(broker.port, *much, (f"good/{TELEMETRY}", b"1"), (f"bad/{TELEMETRY}", b"2"))
            await held(link, "bad", 2)
            assert env.counted["dropped"] == 79
            guest = Guest()
            async with link.seat("good", TOKEN, guest):
                assert guest.heard_all == [(TELEMETRY, b"1")]
            async with link.seat("bad", TOKEN, Guest()):
                pass
            assert not link._held._messages and not link._held._sizes and not link._held._bytes

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())


async def held(link: Broker, prefix: str, count: int) -> None:
    async with asyncio.timeout(20):
        while len(link._held._messages.get(prefix, ())) != count:
            await asyncio.sleep(0.01)


def test_where_nothing_is_read_any_more_sessions_end_and_the_next_ones_are_heard(tmp_path: Path) -> None:
    """A fault in what reads the connection of all devices."""

    async def run() -> None:
        async with connected(broker.port) as (link, env):
            guest, faults = Guest(), list[EdgedError]()
            guest.over = faults.append  # type: ignore[method-assign]
            async with link.seat("a", TOKEN, guest) as seat:
                await say(broker.port, (f"a/{TELEMETRY}", b"1"))
                await guest.until(1)
                env.faulty = "broker_lost"
                broker.stop()
                async with asyncio.timeout(20):
                    while not faults:
                        await asyncio.sleep(0.01)
                assert isinstance(faults[0], Transient) and faults[0].reason is Reason.LINK_LOST
                assert "not read any more: RuntimeError('a fault at broker_lost')" in faults[0].detail
                assert not seat.present
            broker.start()
            # the same link: others may use it still
            async with link.seat("a", TOKEN, guest := Guest()) as seat:
                async with asyncio.timeout(20):
                    while not seat.present:
                        await say(broker.port, (f"a/{TELEMETRY}", b"2"))
                        await asyncio.sleep(0.1)
                assert guest.heard_all[0] == (TELEMETRY, b"2")

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())


def test_what_is_told_comes_before_what_is_sent_later(tmp_path: Path) -> None:
    """A withdrawal behind the next offer would withdraw that."""

    async def run() -> None:
        async with (
            connected(broker.port) as (link, _),
            link.seat("a", TOKEN, guest := Guest()) as seat,
            aiomqtt.Client("127.0.0.1", broker.port) as device,
        ):
            await device.subscribe("a/told")
            await device.subscribe("a/sent")
            await device.publish(f"a/{TELEMETRY}", b"1", qos=1)
            await guest.until(1)
            seat.tell("told", b"")
            await seat.send("sent", b"")
            async with asyncio.timeout(20):
                found = [str((await anext(device.messages)).topic) for _ in range(2)]
            assert found == ["a/told", "a/sent"]

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())


def test_a_session_that_begins_while_the_connection_is_made_anew_hears_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the subscriptions of those that were there before, and the moment when all is well again."""
    begun, go_on, subscribe = asyncio.Event(), asyncio.Event(), aiomqtt.Client.subscribe

    async def late(self: aiomqtt.Client, *args: Any, **options: Any) -> Any:
        found = await subscribe(self, *args, **options)
        begun.set()
        await go_on.wait()
        return found

    async def run() -> None:
        async with connected(broker.port) as (link, _), link.seat("a", TOKEN, Guest()):
            monkeypatch.setattr(aiomqtt.Client, "subscribe", late)
            broker.stop()
            broker.start()
            await asyncio.wait_for(begun.wait(), 20)
            guest = Guest()
            async with link.seat("b", TOKEN, guest):
                go_on.set()
                async with asyncio.timeout(20):
                    while link._client is None:
                        await asyncio.sleep(0.01)
                await say(broker.port, (f"b/{TELEMETRY}", b"1"))
                await guest.until(1)

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())


def test_a_session_whose_subscription_the_broker_does_not_answer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "CONNECT_S", 2.5)

    async def run() -> None:
        async with connected(broker.port) as (link, _):
            broker.freeze()
            with pytest.raises(Transient, match="timed out") as caught:
                async with link.seat("a", TOKEN, Guest()):
                    raise AssertionError("it is deaf")
            assert caught.value.reason is Reason.LINK_LOST and not link._seats

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())


def test_a_broker_that_takes_no_farewell_does_not_keep_the_link_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs, and so much is on its way to it that nothing more fits in."""
    monkeypatch.setattr(subject, "CONNECT_S", 1.5)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(30):
            async with connected(broker.port) as (link, _), link.seat("a", TOKEN, guest := Guest()) as seat:
                await say(broker.port, (f"a/{TELEMETRY}", b"1"))
                await guest.until(1)
                broker.freeze()
                with pytest.raises(Transient, match="timed out"):
                    for _ in range(64):
                        await seat.send("x", bytes(subject.LARGE_BYTES))
                begun = loop.time()
            assert loop.time() - begun >= 1.5, "it took the farewell"

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())
