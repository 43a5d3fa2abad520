"""One download, request by request: sizes, orders, and a device that comes and goes."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_kit import until
from mqtt_kit import Raw, image_of, raw, secrets_of, talking

from edged.api import Image, Phase, Progress, Session
from edged.errors import Reason, Transient
from edged.testing.ports import free_port
from edged_mqtt.thingsboard import Offer, note_of
from edged_mqtt.transfer import MOST_REQUESTS


@pytest.fixture(autouse=True)
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets_of(tmp_path, monkeypatch, "pump-1")


def quiet(phase: Phase, done_bytes: int, total_bytes: int) -> None:
    return None


async def offered(
    client: Raw, session: Session, image: Image, progress: Progress = quiet
) -> asyncio.Task[None]:
    staging = asyncio.create_task(session.stage(image, progress))  # type: ignore[attr-defined]
    assert b"fw_version" in await client.packet()
    return staging


async def fetched(client: Raw, chunk: int, size: bytes, number: int = 1) -> bytes:
    client.publish(f"v2/fw/request/{number}/chunk/{chunk}", size)
    answer = await client.packet()
    topic = f"v2/fw/response/{number}/chunk/{chunk}".encode()
    assert answer[2 : 2 + len(topic)] == topic, answer[:80]
    return answer[2 + len(topic) :]


def says(client: Raw, **values: Any) -> None:
    client.publish("v1/devices/me/telemetry", json.dumps(values).encode())


@pytest.mark.parametrize("size", [b"", b"0"], ids=["none", "zero"])
def test_a_request_without_a_size_is_for_the_whole_image(size: bytes) -> None:
    data = bytes(range(256)) * 400

    async def run() -> None:
        image = await image_of(data)
        async with talking() as (client, session, _):
            staging = await offered(client, session, image)
            assert await fetched(client, 0, size) == data
            assert session._memory.download.sent_bytes == len(data)  # type: ignore[attr-defined]
            says(client, current_fw_title="pump", current_fw_version="2.0.0")
            await staging

    asyncio.run(run())


_OLD = {"current_fw_title": "pump", "current_fw_version": "1.0.0"}
_NEW = {"current_fw_title": "pump", "current_fw_version": "2.0.0"}


@pytest.mark.parametrize(
    "samples",
    [
        [(1, {"fw_state": "UPDATING"}), (2, _NEW)],
        [(2, {**_NEW, "fw_state": "UPDATED"}), (1, {**_OLD, "fw_state": "UPDATING"})],
        [(1, {**_OLD, "fw_state": "UPDATING"}), (2, {"fw_state": "UPDATED"}), (3, _NEW)],
    ],
    ids=["state and version", "newest first", "three"],
)
def test_samples_of_one_message_say_what_they_would_say_one_by_one(
    samples: list[tuple[int, dict[str, str]]],
) -> None:
    async def run() -> None:
        image = await image_of(bytes(5000))
        async with talking() as (client, session, _):
            staging = await offered(client, session, image)
            await fetched(client, 0, b"")
            sent = [{"ts": 1_700_000_000_000 + ts, "values": values} for ts, values in samples]
            client.publish("v1/devices/me/telemetry", json.dumps(sent).encode())
            async with asyncio.timeout(2):
                await staging
            assert (await session.slots()).slots[0].runs == "2.0.0"  # type: ignore[attr-defined]

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(4))
def test_a_device_that_changes_its_mind_gets_what_it_asks_for_last(seed: int) -> None:
    """The chunk that follows is packed before it is asked for: not under another number, and not of another size."""
    chance = random.Random(seed)
    data = chance.randbytes(512 * 1024)

    async def run() -> None:
        image = await image_of(data)
        async with talking() as (client, session, _):
            await offered(client, session, image)
            sizes = {1: 1024, 2: 2048}
            for number, size in sizes.items():
                await fetched(client, 1, b"%d" % size, number)
            number, chunk, payload = 1, 1, b""
            for _ in range(200):
                if chance.random() < 0.6:
                    chunk += 1
                else:
                    number, chunk = chance.choice((1, 2)), chance.randrange(1, 100)
                    payload = chance.choice((b"", b"1024", b"2048", b"4096"))
                sizes[number] = int(payload or sizes[number])
                begin = chunk * sizes[number]
                assert await fetched(client, chunk, payload, number) == data[begin : begin + sizes[number]]

    asyncio.run(run())


def test_a_device_that_fetches_its_chunks_backwards_has_time_to_install() -> None:
    """It has the image whole with its first chunk, and says nothing for longer than it may be silent in a download."""
    data = bytes(range(256)) * 160

    async def run() -> None:
        image = await image_of(data)
        async with talking(silence_s=1.5) as (client, session, counted):
            staging = await offered(client, session, image)
            parts = [await fetched(client, chunk, b"4096") for chunk in reversed(range(10))]
            assert b"".join(reversed(parts)) == data
            await asyncio.sleep(2)
            assert not staging.done() and not counted["silent"]
            says(client, **_NEW)
            await staging

    asyncio.run(run())


def test_a_whole_image_that_is_read_slowly_is_progress_all_the_time() -> None:
    """What has to be told for the engine not to take it for a stall."""
    size, told = 24 * 1024 * 1024, list[int]()

    def progress(phase: Phase, done_bytes: int, total_bytes: int) -> None:
        if phase is Phase.WRITE:
            told.append(done_bytes)

    async def run() -> None:
        image = await image_of(bytes(size))
        async with talking(silence_s=2.5) as (client, session, _):
            staging = await offered(client, session, image, progress)
            client.publish("v2/fw/request/1/chunk/0", b"")
            await client.packet(takes_s=4.0)
            assert session._memory.download.sent_bytes == size  # type: ignore[attr-defined]
            assert len(set(told)) > 20 and told == sorted(told) and told[-1] < size
            says(client, **_NEW)
            await staging

    asyncio.run(run())


def test_a_device_that_reads_a_large_chunk_slowly_is_not_silent() -> None:
    chunk = 150_000

    async def run() -> None:
        image = await image_of(bytes(3 * chunk))
        async with talking(silence_s=4.0) as (client, session, counted):
            _narrow(client, session)
            staging = await offered(client, session, image)
            await fetched(client, 0, b"%d" % chunk)
            client.publish("v2/fw/request/1/chunk/1", b"%d" % chunk)
            await client.packet(takes_s=6.0)
            assert not staging.done() and not counted["silent"]
            await fetched(client, 2, b"%d" % chunk)
            says(client, **_NEW)
            await staging

    asyncio.run(run())


def _narrow(client: Raw, session: Any) -> None:
    """Little of what is sent to it lies anywhere between."""
    ours = session.seat._connection._transport.get_extra_info("socket")
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs = client.writer.transport.get_extra_info("socket")
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.reader._limit = 4096  # type: ignore[attr-defined]


def test_a_device_that_asks_for_much_before_its_offer_is_out_is_read_again_where_the_job_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(topic: str, payload: bytes) -> None:
        await asyncio.get_running_loop().create_future()

    async def run() -> None:
        image = await image_of(bytes(40 * 4096))
        async with talking() as (client, session, _):
            monkeypatch.setattr(session.seat, "send", never)  # type: ignore[attr-defined]
            staging = asyncio.create_task(session.stage(image, quiet))  # type: ignore[attr-defined]
            await until(lambda: session._transfer)  # type: ignore[attr-defined]
            for chunk in range(MOST_REQUESTS):
                client.publish(f"v2/fw/request/1/chunk/{chunk}", b"4096")
            await until(lambda: session._transfer._resting)  # type: ignore[attr-defined]
            staging.cancel()
            await asyncio.wait([staging])
            says(client, **_NEW)
            await until(lambda: session._told.version == "2.0.0")  # type: ignore[attr-defined]

    asyncio.run(run())


# -- a device that comes and goes


async def _cut(client: Raw, staging: asyncio.Task[None]) -> None:
    client.writer.transport.abort()
    with pytest.raises(Transient) as caught:
        await staging
    assert caught.value.reason is Reason.DEVICE_ABSENT


async def _asks_on(client: Raw, session: Session, image: Image, chunk: int) -> asyncio.Task[None]:
    """The device is back, asks for ``chunk`` before anybody looks, and has it, without another offer."""
    client.publish(f"v2/fw/request/1/chunk/{chunk}", b"4096")
    await until(lambda: session._memory.early)  # type: ignore[attr-defined]
    staging = asyncio.create_task(session.stage(image, quiet))  # type: ignore[attr-defined]
    assert b"response/1/chunk/%d" % chunk in (await client.packet())[:40]
    return staging


def test_a_device_that_goes_on_where_it_was_may_come_and_go_as_often_as_it_likes() -> None:
    """It takes one chunk on each connection, and each only once."""
    data, port = random.Random(1).randbytes(20 * 4096), free_port()

    async def run() -> None:
        image = await image_of(data)
        async with talking(port, rounds=1) as (first, session, counted):
            staging = await offered(first, session, image)
            await fetched(first, 0, b"4096")
            await _cut(first, staging)
            for chunk in range(1, 20):
                async with raw(port) as client:
                    staging = await _asks_on(client, session, image, chunk)
                    if chunk < 19:
                        await _cut(client, staging)
                        continue
                    says(client, **_NEW)
                    await staging
        assert not counted

    asyncio.run(run())


@pytest.mark.parametrize("is_another", [False, True])
def test_a_device_in_the_middle_of_an_image_goes_on_after_a_restart_where_it_is_that_image(
    is_another: bool,
) -> None:
    data, told = random.Random(1).randbytes(20 * 4096), list[int]()
    offer = Offer("fw", "pump", "2.0.0", len(data), hashlib.sha256(data).hexdigest(), "SHA256")
    begun = replace(offer, checksum="0" * 64) if is_another else offer

    def tell(phase: Phase, done_bytes: int, total_bytes: int) -> None:
        told.append(done_bytes)

    async def run() -> None:
        image = await image_of(data)
        async with talking(begun=note_of("1", 4096, begun)) as (client, session, _):
            client.publish("v2/fw/request/1/chunk/12", b"")
            await until(lambda: session._memory.early)  # type: ignore[attr-defined]
            staging = asyncio.create_task(session.stage(image, tell))  # type: ignore[attr-defined]
            answer = await client.packet()
            if is_another:
                assert answer == b"\0\x0bv2/fw/errorNOT_FOUND"
                assert b'"fw_version":"2.0.0"' in await client.packet()
                assert await fetched(client, 0, b"4096", 2) == data[:4096] and told[0] == 0
            else:
                assert answer.endswith(data[12 * 4096 : 13 * 4096]) and b"response/1/chunk/12" in answer[:40]
                assert told[0] == 12 * 4096
                for chunk in range(13, 20):
                    assert await fetched(client, chunk, b"") == data[chunk * 4096 : chunk * 4096 + 4096]
                assert session._memory.download.sent_bytes == 8 * 4096  # type: ignore[attr-defined]
                await until(lambda: session._told.awaits == "2.0.0")  # type: ignore[attr-defined]
            says(client, **_NEW)
            await staging

    asyncio.run(run())


def test_what_was_sent_of_a_message_that_broke_off_counts_too() -> None:
    """Or a device that asks for the whole at once, and always leaves in the middle, would be sent it for ever."""
    size, port = 24 * 1024 * 1024, free_port()

    async def run() -> None:
        image = await image_of(bytes(size))
        async with talking(port) as (client, session, _):
            staging = await offered(client, session, image)
            client.publish("v2/fw/request/1/chunk/0", b"")
            await client.reader.readexactly(size // 4)
            await _cut(client, staging)
            assert size // 4 < session._memory.download.sent_bytes < size  # type: ignore[attr-defined]

    asyncio.run(run())


def test_after_a_cut_what_is_left_may_come_in_any_order() -> None:
    """Its last chunk is not the end of the image, where others were not sent."""
    port = free_port()

    async def run() -> None:
        image = await image_of(bytes(30 * 4096))
        async with talking(port, install_s=0.5) as (first, session, _):
            staging = await offered(first, session, image)
            for chunk in range(10):
                await fetched(first, chunk, b"4096")
            await _cut(first, staging)
            async with raw(port) as client:
                staging = await _asks_on(client, session, image, 29)
                for chunk in range(10, 29):
                    await asyncio.sleep(0.05)
                    await fetched(client, chunk, b"4096")
                says(client, **_NEW)
                await staging

    asyncio.run(run())


def test_a_device_that_is_about_to_boot_has_its_time_before_it_is_believed_to_run_the_old_version() -> None:
    """It may take longer to check and to install than to say what it runs."""

    async def run() -> None:
        async with talking(report_s=0.2, install_s=4) as (client, session, _):
            says(client, **_OLD, fw_state="UPDATING")
            assert (await session.slots()).slots[0].runs == "1.0.0"  # type: ignore[attr-defined]
            for _ in range(2):
                says(client, **_OLD, fw_state="UPDATING")
                with pytest.raises(Transient, match="says UPDATING; .* awaited for 4 s") as caught:
                    await session.slots()  # type: ignore[attr-defined]
                assert caught.value.reason is Reason.DEVICE_ABSENT
            await asyncio.sleep(4)
            assert (await session.slots()).slots[0].runs == "1.0.0"  # type: ignore[attr-defined]
            says(client, **_NEW)
            await until(lambda: session._told.version == "2.0.0")  # type: ignore[attr-defined]
            assert (await session.slots()).slots[0].runs == "2.0.0"  # type: ignore[attr-defined]

    asyncio.run(run())
