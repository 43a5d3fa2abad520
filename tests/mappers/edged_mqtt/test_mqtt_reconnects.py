"""Devices that leave and come back: all at once, in the middle of an image, as another board, or after weeks."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest
from broker_kit import Mosquitto
from engine_kit import until
from mqtt_kit import (
    LINKS,
    SPEC,
    PullingDevice,
    Raw,
    image_of,
    listening,
    mqtt_device,
    raw,
    secrets_of,
)
from mqtt_node import ENGINE, IMAGE_BYTES, Plant, deployed, image_bytes, running

from edged.api import Device, HealthCheck, Phase, SupportsFirmware, SupportsHealth
from edged.domain.job import Job, State
from edged.errors import Reason, Transient
from edged.links import LinkPool, device_env
from edged.testing.node import TestNode, life
from edged.testing.ports import free_port
from edged_mqtt import endpoint, transfer
from edged_mqtt.endpoint import Endpoint


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0")
    plant.device()
    return plant


def _quiet(phase: Phase, done_bytes: int, total_bytes: int) -> None:
    return None


# -- the connection outlives what goes wrong


def test_a_device_that_falls_silent_is_offered_the_image_again_where_it_is(plant: Plant) -> None:
    plant.devices[0].config["silence_s"] = 2.5
    device = PullingDevice(plant.port, "token-of-pump-1")
    asked, silent = device.ask, list[int]()

    def ask() -> None:
        # once it waits for ever, as one whose request was lost
        if silent or device.requests != 7:
            asked()
        else:
            silent.append(device.requests)

    device.ask = ask  # type: ignore[method-assign]

    async def run() -> None:
        async with running(plant, device) as node:
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, device.version) == (State.SUCCEEDED, "2.0.0"), job.detail
            assert silent, "it was not silent"
            assert device.log.count("DOWNLOADING") == 2
            assert device.log.count("connected") == 1, "its connection was closed"

    asyncio.run(run())


def test_a_device_that_asks_once_after_a_cut_has_its_chunk_and_begins_nothing_anew(plant: Plant) -> None:
    """At once, before anybody can have looked at it; and it would take no answer but the next chunk."""
    device = PullingDevice(plant.port, "token-of-pump-1", asks_again=False, resumes=True)
    cuts = [20, 33]

    def cut(chunk: int) -> None:
        if cuts and chunk == cuts[0]:
            del cuts[0]
            assert device._writer is not None
            device._writer.transport.abort()

    device.on_chunk = cut

    async def run() -> None:
        async with running(plant, device) as node:
            job = await deployed(node, "pump@2.0.0")
            assert not cuts, "the connection did not break"
            assert (job.state, device.version) == (State.SUCCEEDED, "2.0.0"), job.detail
            assert bytes(device.flash) == image_bytes("2.0.0")
            assert device.log.count("DOWNLOADING") == 1 and "error: NOT_FOUND" not in device.log
            # what was on its way at each cut comes twice
            assert device.written <= IMAGE_BYTES + 2 * 4096

    asyncio.run(run())


def test_a_device_goes_on_where_it_is_after_a_restart_of_the_node(plant: Plant) -> None:
    """By itself, under the number and in the chunks that it had, which it does not name again."""
    device = PullingDevice(plant.port, "token-of-pump-1", resumes=True, delay_s=0.01)

    async def first() -> None:
        async with running(plant, device) as node:
            await node.want("pump-1", "pump@2.0.0")
            await until(lambda: device._chunk >= 20)

    async def second() -> Job:
        async with life(plant.config, plant.plugins) as node:
            device.start()
            try:
                return await node.ended("pump-1", 60)
            finally:
                await device.stop()

    asyncio.run(first())
    device.chunk_bytes = 0
    job = asyncio.run(second())
    assert (job.state, device.version) == (State.SUCCEEDED, "2.0.0"), job.detail
    assert bytes(device.flash) == image_bytes("2.0.0")
    assert device.log.count("connected") == 2 and device.log.count("DOWNLOADING") == 1
    # what was on its way comes twice
    assert device.written <= IMAGE_BYTES + 4096


def test_a_job_that_is_cancelled_in_the_middle_of_a_message_is_withdrawn_on_the_next_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets_of(tmp_path, monkeypatch, "pump-1")
    port, pool = free_port(), LinkPool(LINKS)

    async def run() -> None:
        image = await image_of(bytes(24 * 1024 * 1024))
        async with listening(pool, port) as link:
            connecting = asyncio.create_task(_connected(stack := AsyncExitStack(), pool, port))
            async with stack:
                await until(lambda: "pump-1" in link._seats)
                async with raw(port) as client:
                    session = await connecting
                    staging = asyncio.create_task(session.stage(image, _quiet))
                    assert b"fw_version" in await client.packet()
                    client.publish("v2/fw/request/1/chunk/0", b"")
                    await client.reader.readexactly(5)
                    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                    await until(lambda: any(one.streaming and one.is_full for one in link._connections))
                    staging.cancel()
                    await asyncio.wait([staging])
                async with raw(port) as client:
                    told = await client.packet()
                    assert told.startswith(b"\0\x18v1/devices/me/attributes") and b'"deleted"' in told
                async with raw(port) as client:
                    client.writer.write(b"\xc0\0")
                    assert await client.packet() == b"", "it was told again"

    asyncio.run(run())


def test_the_end_of_a_cut_off_chunk_is_no_word_that_the_device_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power goes while it reads its last chunk, and it is back before the former connection is cut off."""
    secrets_of(tmp_path, monkeypatch, "pump-1")
    port, pool, chunk = free_port(), LinkPool(LINKS), 250_000

    async def run() -> None:
        image = await image_of(bytes(chunk))
        async with listening(pool, port) as link, AsyncExitStack() as stack:
            connecting = asyncio.create_task(_connected(stack, pool, port, install_s=3600.0, silence_s=60.0))
            await until(lambda: "pump-1" in link._seats)
            async with raw(port) as first:
                session = await connecting
                staging = asyncio.create_task(session.stage(image, _quiet))
                assert b"fw_version" in await first.packet()
                (old,) = link._connections
                old._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                first.writer.transport.pause_reading()  # type: ignore[attr-defined]
                first.publish("v2/fw/request/1/chunk/0", b"%d" % chunk)
                await until(lambda: old.is_full)
                async with raw(port) as second:
                    await until(lambda: session.seat._connection not in (None, old))  # type: ignore[attr-defined]
                    await until(lambda: old.ended.done() and staging.done())
                    with pytest.raises(Transient, match=f"with 0 of {chunk} bytes"):
                        await staging
                    again = asyncio.create_task(session.stage(image, _quiet))
                    assert b'"deleted"' in await second.packet()
                    assert b'"fw_version":"2.0.0"' in await second.packet(), (
                        "a boot is awaited that nobody began"
                    )
                    again.cancel()
                    await asyncio.wait([again])

    asyncio.run(run())


@pytest.mark.parametrize("size", [250_000, 1_000_000], ids=["at once", "in parts"])
def test_a_device_that_stops_reading_in_the_middle_of_a_message_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    secrets_of(tmp_path, monkeypatch, "pump-1")
    counted: Counter[str] = Counter()
    port, pool = free_port(), LinkPool(LINKS, count=lambda _, event: counted.update([event]))

    async def run() -> None:
        image = await image_of(bytes(size))
        async with listening(pool, port) as link, AsyncExitStack() as stack:
            connecting = asyncio.create_task(_connected(stack, pool, port, silence_s=0.5))
            await until(lambda: "pump-1" in link._seats)
            async with raw(port) as client:
                session = await connecting
                staging = asyncio.create_task(session.stage(image, _quiet))
                assert b"fw_version" in await client.packet()
                (connection,) = link._connections
                sock = connection._transport.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                client.writer.transport.pause_reading()  # type: ignore[attr-defined]
                client.publish("v2/fw/request/1/chunk/0", b"%d" % size)
                async with asyncio.timeout(20):
                    with pytest.raises(Transient, match="it read nothing of what it was sent") as caught:
                        await staging
                assert caught.value.reason is Reason.NO_RESPONSE and counted["silent"] == 1
                await until(lambda: not link._connections)

    asyncio.run(run())


def _later(title: str) -> list[dict[str, str]]:
    return [{"current_fw_version": "1.4.0"}, {"current_fw_title": title}, {"self_test": "passed"}]


@pytest.mark.parametrize(
    ("said", "healthy"),
    [
        (_later("pump"), True),
        ([*_later("pump")[:2], {"current_fw_title": "valve"}, {"self_test": "passed"}], False),
        ([{"current_fw_version": "1.3.0"}, *_later("pump")[1:]], False),
    ],
    ids=["the same", "another title", "another version"],
)
@pytest.mark.parametrize(
    "looked", [False, True], ids=["looked before it left", "looked at the version alone"]
)
def test_version_and_title_may_come_in_two_messages_during_the_health_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[dict[str, str]], healthy: bool, looked: bool
) -> None:
    secrets_of(tmp_path, monkeypatch, "pump-1")
    port, pool = free_port(), LinkPool(LINKS)
    check = HealthCheck("property", "self_test=passed", "self_test")

    async def say(client: Raw, **values: str) -> None:
        client.publish("v1/devices/me/telemetry", json.dumps(values).encode())
        client.publish("v1/devices/me/attributes/request/1", b"")
        while b"attributes/response/1" not in await client.packet():
            pass

    async def run() -> None:
        async with listening(pool, port) as link, AsyncExitStack() as stack:
            connecting = asyncio.create_task(_connected(stack, pool, port))
            await until(lambda: "pump-1" in link._seats)
            async with raw(port) as client:
                session = await connecting
                await say(client, current_fw_title="pump", current_fw_version="1.4.0")
                assert (await session.slots()).slots[0].runs == "1.4.0"
            await until(lambda: not link._connections)
            async with raw(port, says=False) as client:
                if looked:
                    await say(client, current_fw_version="1.4.0")
                    assert (await session.slots()).slots[0].runs == "1.4.0"
                assert isinstance(session, SupportsHealth)
                checking = asyncio.create_task(session.check_health(check))
                for values in said:
                    await say(client, **values)
                found = await checking
                assert found.healthy is healthy
                assert healthy or found.evidence.endswith("by now")

    asyncio.run(run())


async def _connected(
    stack: AsyncExitStack, pool: LinkPool, port: int, name: str = "pump-1", **config: Any
) -> SupportsFirmware:
    device = mqtt_device(port, name, **config)
    session = await stack.enter_async_context(SPEC.connect(device, device_env(name, pool)))
    assert isinstance(session, SupportsFirmware)
    return session


# -- many at once


def test_hundreds_of_devices_that_come_back_at_once_are_all_served_and_never_too_many_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power went and came back; there is less room for those who have not said yet who they are than there are devices."""
    count, room = 200, 40
    names = [f"pump-{number}" for number in range(count)]
    secrets_of(tmp_path, monkeypatch, *names)
    monkeypatch.setattr(endpoint, "STRANGERS", room)
    counted: Counter[str] = Counter()
    port, data = free_port(), bytes(range(256)) * 64

    async def run() -> None:
        pool = LinkPool(LINKS, count=lambda _, event: counted.update([event]))
        devices = [PullingDevice(port, f"token-of-{name}", values={}, hello_s=0.1) for name in names]
        async with listening(pool, port) as link, AsyncExitStack() as stack:
            watch = asyncio.create_task(_most(link))
            tasks = [
                asyncio.create_task(_connected(stack, pool, port, name, silence_s=60, report_s=60))
                for name in names
            ]
            await until(lambda: len(link._seats) == count)
            for device in devices:
                device.start()
            try:
                async with asyncio.timeout(120):
                    sessions = await asyncio.gather(*tasks)
                    for device in devices:
                        assert device._writer is not None
                        device._writer.transport.abort()
                    await until(lambda: all(device.log.count("connected") >= 2 for device in devices))
                    images = [await image_of(data) for _ in names]
                    await asyncio.gather(
                        *(
                            session.stage(image, _quiet)
                            for session, image in zip(sessions, images, strict=True)
                        )
                    )
            finally:
                watch.cancel()
                await asyncio.wait([watch])
                for device in devices:
                    await device.stop()
            assert all(device.log.count("connected") >= 2 for device in devices), "they did not come back"
            assert all((device.version, bytes(device.flash)) == ("2.0.0", data) for device in devices)
            assert 1 < most[0] <= room and counted["connection_refused"], "there was room for all"
            assert not counted["login_refused"] and not counted["two_sessions"]

    most = [0]

    async def _most(link: Endpoint) -> None:
        while True:
            most[0] = max(most[0], len(link._strangers))
            await asyncio.sleep(0)

    asyncio.run(run())


# -- another board with the same credential


def _boards(plant: Plant) -> tuple[PullingDevice, PullingDevice]:
    """What the plant expects behind the credential, and what it does not."""
    plant.hardware_ids = ("rev-c",)
    plant.devices[0].config["hardware_key"] = "board"
    token = "token-of-pump-1"
    return (
        PullingDevice(plant.port, token, values={"board": "rev-c"}),
        PullingDevice(plant.port, token, values={"board": "rev-d"}),
    )


def test_a_board_that_was_swapped_while_it_was_away_is_given_nothing(plant: Plant) -> None:
    right, wrong = _boards(plant)

    async def run() -> None:
        async with running(plant, right) as node:
            await right.stop()
            wrong.start()
            try:
                job = await deployed(node, "pump@2.0.0")
                assert (job.state, job.reason) == (State.FAILED, Reason.HARDWARE_MISMATCH), job.detail
                assert "rev-d" in job.detail and not wrong.written
            finally:
                await wrong.stop()

    asyncio.run(run())


@pytest.mark.parametrize("takes_over", [False, True], ids=["after it left", "while it is there"])
def test_a_board_that_is_swapped_in_the_middle_goes_on_with_nothing(plant: Plant, takes_over: bool) -> None:
    """It asks for the very chunk that the other one would have asked for, under the same number."""
    right, wrong = _boards(plant)
    swapped = asyncio.Event()
    right.delay_s = 0.01
    say = wrong.say

    def swap(chunk: int) -> None:
        if chunk == 10:
            swapped.set()

    def go_on(state: str | None = None, **more: Any) -> None:
        say(state, **more)
        wrong._round, wrong._chunk, wrong._offer = 1, 10, {"size": IMAGE_BYTES}
        wrong.ask()

    right.on_chunk, wrong.say = swap, go_on  # type: ignore[method-assign]

    async def run() -> None:
        async with running(plant, right) as node:
            await node.want("pump-1", "pump@2.0.0")
            await swapped.wait()
            if takes_over:
                right._plug.clear()
            else:
                await right.stop()
            wrong.start()
            try:
                job = await node.ended("pump-1", 30)
                assert job.reason is not None and job.state is not State.SUCCEEDED
                assert "rev-d" in job.detail, job.detail
                assert wrong.log.count("connected") and not wrong.written, "the other board was given bytes"
                assert not wrong.flash
            finally:
                await wrong.stop()

    asyncio.run(run())


# -- after weeks


def test_a_job_waits_for_weeks_for_a_device_that_sleeps_where_its_deadline_lets_it(plant: Plant) -> None:
    """As docs/mqtt.md says: by ``engine.deadline_s``; the clock is the test's."""
    weeks_ago = datetime.now(UTC) - timedelta(days=45)
    later = [timedelta()]
    device = PullingDevice(plant.port, "token-of-pump-1")

    def passed() -> float:
        return later[0].total_seconds()

    async def waits(node: TestNode) -> Job:
        await node.want("pump-1", "pump@2.0.0")
        await until_job(node, lambda job: job.waiting is not None and not job.state.ended)
        later[0] += timedelta(days=30)
        node.engine.device_changed("pump-1")
        return await until_job(node, lambda job: job.state.ended or job.waiting is not None)

    async def run() -> None:
        plant.engine = attrs.evolve(ENGINE, deadline_s=40 * 86_400)
        async with running(plant, device, now=lambda: weeks_ago + later[0], passed=passed) as node:
            await device.unplug()
            job = await waits(node)
            assert not job.state.ended and job.waiting is not None, job.detail
            assert job.waiting.reason is Reason.DEVICE_ABSENT
            await device.plug()
            job = await node.ended("pump-1")
            assert (job.state, device.version) == (State.SUCCEEDED, "2.0.0"), job.detail

    asyncio.run(run())
    later[0], plant.folder = timedelta(), plant.folder / "second"
    again = PullingDevice(plant.port, "token-of-pump-1")

    async def too_late() -> None:
        plant.engine = attrs.evolve(ENGINE, deadline_s=20 * 86_400)
        async with running(plant, again, now=lambda: weeks_ago + later[0], passed=passed) as node:
            await again.unplug()
            await waits(node)
            job = await node.ended("pump-1")
            assert (job.state, job.reason) == (State.FAILED, Reason.DEADLINE_PASSED), job.detail

    asyncio.run(too_late())


async def until_job(node: TestNode, found: Any) -> Job:
    async with asyncio.timeout(20):
        while True:
            jobs = await node.jobs("pump-1")
            if jobs and found(jobs[0]):
                return jobs[0]
            await asyncio.sleep(0.01)


# -- for ever


def _leaves_half_way(device: PullingDevice) -> None:
    def leave(chunk: int) -> None:
        if chunk == 3:
            assert device._writer is not None
            device._writer.transport.abort()

    device.on_chunk = leave


def _fails_and_leaves(device: PullingDevice) -> None:
    def fail() -> None:
        device.say("FAILED", fw_error="checksum")
        assert device._writer is not None
        device._writer.close()

    device.on_whole = fail


def _leaves_with_the_whole(device: PullingDevice) -> None:
    async def away() -> None:
        await device.unplug()
        await asyncio.sleep(0.6)
        await device.plug()

    def install() -> None:
        device.say("UPDATING")
        tasks.append(asyncio.create_task(away()))

    tasks: list[asyncio.Task[None]] = []
    device.on_whole = install


@pytest.mark.parametrize(
    ("does", "reason", "text"),
    [
        (_leaves_half_way, Reason.DEVICE_ERROR, "bytes of an image of 200000"),
        (_fails_and_leaves, Reason.VERIFY_FAILED, "it says FAILED: 'checksum', 3 times"),
        (
            _leaves_with_the_whole,
            Reason.DEVICE_REVERTED,
            "pump 2.0.0 whole 3 times, left, and runs pump 1.0.0",
        ),
    ],
    ids=["half", "failed", "whole"],
)
def test_a_device_that_leaves_each_time_is_not_sent_the_image_for_ever(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, does: Any, reason: Reason, text: str
) -> None:
    """That it was away uses up no attempt; what it was sent counts over all of its connections."""
    monkeypatch.setattr(transfer, "BOOT_S", 0.2)
    device = PullingDevice(plant.port, "token-of-pump-1", chunk_bytes=65_536)

    async def run() -> None:
        async with running(plant, device) as node:
            does(device)
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, job.reason) == (State.REVERTED, reason), job.detail
            assert text in job.detail
            assert device.written <= 4 * IMAGE_BYTES and device.log.count("connected") >= 3
            # a new job begins anew
            device.on_chunk = device.on_whole = None
            await node.want("pump-1", "pump@1.0.0")
            again = await deployed(node, "pump@2.0.0")
            assert (again.state, device.version) == (State.SUCCEEDED, "2.0.0"), again.detail

    asyncio.run(run())


# -- the wire itself


def test_a_session_ends_where_its_broker_is_not_read_any_more_and_the_next_one_is_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = ["broker_lost"]

    def count(source: str, event: str) -> None:
        if event in faulty:
            faulty.remove(event)
            raise RuntimeError("a fault of the reader")

    async def run() -> None:
        pool = LinkPool(LINKS, count=count)
        described = _on_broker(broker.port)
        device = PullingDevice(broker.port, prefix="devices/pump-1/", every_s=0.05, repeats=True)
        device.start()
        try:
            async with device_env("holder", pool).link(f"mqtt:127.0.0.1:{broker.port}"):
                async with SPEC.connect(described, device_env("pump-1", pool)) as session:
                    broker.stop()
                    with pytest.raises(Transient, match="not read any more") as caught:
                        async with asyncio.timeout(20):
                            async for _ in session.reports():
                                pass
                    assert caught.value.reason is Reason.LINK_LOST
                broker.start()
                async with (
                    asyncio.timeout(30),
                    SPEC.connect(described, device_env("pump-1", pool)) as session,
                ):
                    assert isinstance(session, SupportsFirmware)
                    assert (await session.slots()).slots[0].runs == "1.0.0"
        finally:
            await device.stop()

    with Mosquitto(tmp_path).running() as broker:
        asyncio.run(run())


def _on_broker(port: int) -> Device:
    return replace(mqtt_device(port), address=f"mqtt:127.0.0.1:{port}/devices/pump-1")
