"""What one device may put into the node's memory, and how much of its talk is listened to."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from pathlib import Path

import pytest
from engine_kit import until
from mqtt_kit import Raw, image_of, secrets_of, talking

from edged.api import Image, Session
from edged.errors import Permanent, Reason
from edged_mqtt import thingsboard as tb

TELEMETRY = "v1/devices/me/telemetry"


@pytest.fixture(autouse=True)
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets_of(tmp_path, monkeypatch, "pump-1")


async def said(client: Raw, **values: object) -> None:
    """Until the node has read it: what comes after it is answered."""
    client.publish(TELEMETRY, json.dumps(values).encode())
    client.publish("v1/devices/me/attributes/request/1", b"")
    while b"v1/devices/me/attributes/response/1" not in await client.packet():
        pass


async def reported(session: Session) -> dict[str, object]:
    found: dict[str, object] = {}
    reports = session.reports()
    try:
        while True:
            async with asyncio.timeout(0.3):
                one = await anext(reports)
            found[one.name] = one.value
    except TimeoutError:
        return found


def test_a_value_or_a_name_that_is_too_large_is_not_kept_and_is_counted() -> None:
    async def run() -> None:
        async with talking() as (client, session, counted):
            large = {"text": "x" * 4097, "list": ["x" * 100] * 50, "n" * 129: 1}
            await said(client, small=1, edge="x" * 4096, **{"n" * 128: 2}, **large)
            found = await reported(session)
            assert found.keys() - {"current_fw_title", "current_fw_version"} == {"small", "edge", "n" * 128}
            assert counted["too_large"] == 3
            # nor is it the word of what it runs
            await said(client, current_fw_version="9" * 4097)
            assert (await session.slots()).slots[0].runs == "1.0.0"  # type: ignore[attr-defined]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        (
            "getSessionLimits",
            {
                "maxPayloadSize": 65536,
                "maxInflightMessages": 100,
                "rateLimits": {"messages": "", "telemetryMessages": "", "telemetryDataPoints": ""},
            },
        ),
        ("getCurrentTime", {"error": "UNSUPPORTED"}),
    ],
)
def test_a_device_that_asks_for_its_limits_is_answered(method: str, answer: object) -> None:
    async def run() -> None:
        async with talking() as (client, _, counted):
            call = {"method": method, "params": {"timeout": 5000}}
            client.publish("v1/devices/me/rpc/request/7", json.dumps(call).encode())
            packet, topic = await client.packet(), b"v1/devices/me/rpc/response/7"
            assert packet[2 : 2 + len(topic)] == topic
            assert json.loads(packet[2 + len(topic) :]) == answer
            assert not counted

    asyncio.run(run())


def test_names_and_values_of_one_device_are_bounded_in_all() -> None:
    async def run() -> None:
        async with talking() as (client, session, counted):
            tracemalloc.start()
            for begin in range(0, 300, 25):
                await said(client, **{f"k{number}": "x" * 4000 for number in range(begin, begin + 25)})
            taken, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert counted["too_many_names"] >= 230
            found = await reported(session)
            assert sum(len(str(value)) for value in found.values()) <= tb.MOST_VALUES_CHARS
            assert taken < 4 * 1024 * 1024

    asyncio.run(run())


def test_many_large_messages_are_too_many_long_before_they_are_too_many_small_ones() -> None:
    async def run() -> None:
        async with talking() as (client, _, counted):
            for _ in range(40):
                client.publish(TELEMETRY, b'{"a":"%b"}' % (b"x" * 100_000))
            await until(lambda: counted["slowed_down"])
            assert counted["too_large"] <= 25, "all of them were read"

    asyncio.run(run())


def test_many_samples_in_few_messages_are_too_many_too() -> None:
    """Each costs the node as much as a message of its own does, but for the parsing."""

    async def run() -> None:
        async with talking() as (client, session, counted):
            for number in range(40):
                samples = ",".join(
                    f'{{"n":{sample}}}' for sample in range(5000 * number, 5000 * number + 5000)
                )
                client.publish(TELEMETRY, f"[{samples}]".encode())
            await until(lambda: counted["slowed_down"])
            assert int(str(session._values["n"])) < 5000 * 15, "all of them were read"  # type: ignore[attr-defined]

    asyncio.run(run())


async def _fetched(client: Raw, session: Session, image: Image, chunk_bytes: int, step: int) -> Permanent:
    """What the download ends with where the device asks for every ``step``-th chunk only."""
    staging = asyncio.create_task(session.stage(image, lambda *_: None))  # type: ignore[attr-defined]
    assert b"fw_version" in await client.packet()
    for chunk in range(0, image.size_bytes // chunk_bytes, step):
        client.publish(f"v2/fw/request/1/chunk/{chunk}", b"%d" % chunk_bytes)
        if (await client.packet()).startswith(b"\0\x0bv2/fw/error"):
            break
    with pytest.raises(Permanent) as caught:
        await staging
    return caught.value


def test_a_device_that_fetches_byte_by_byte_is_stopped_and_told_why() -> None:
    async def run() -> None:
        image = await image_of(bytes(100_000))
        async with talking() as (client, session, counted):
            fault = await _fetched(client, session, image, 1, 1)
            assert fault.reason is Reason.DEVICE_ERROR and "a chunk of 1 bytes; allowed: 64" in fault.detail
            assert counted["chunk_too_small"] == 1

    asyncio.run(run())


def test_what_is_remembered_of_a_download_is_bounded_whatever_the_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tb, "MOST_PIECES", 200)

    async def run() -> None:
        image = await image_of(bytes(100_000))
        async with talking() as (client, session, counted):
            fault = await _fetched(client, session, image, 64, 2)
            assert fault.reason is Reason.DEVICE_ERROR and "200 parts of the image" in fault.detail
            assert counted["scattered_requests"] == 1

    asyncio.run(run())


def test_what_a_download_takes_of_the_memory() -> None:
    tracemalloc.start()
    download = tb.Download(32 * 1024 * 1024, 3)
    for part in range(tb.MOST_PIECES):
        download.ask(64 + 128 * part, 64)
        download.sent(64 + 128 * part, 64)
    with pytest.raises(tb.Misbehaved, match="16384 parts"):
        download.ask(64 + 128 * tb.MOST_PIECES, 64)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 3 * 1024 * 1024


def test_what_a_device_reports_is_kept_within_bounds() -> None:
    values = tb.Values()
    assert all(values.put(f"k{number}", number, 1.0) for number in range(tb.MOST_NAMES))
    assert not values.put("more", 1, 2.0) and "more" not in values
    assert values.put("k0", "again", 2.0) and values["k0"] == "again", "what is there is replaced"
    assert values.told_at("k0") == 2.0 and values.told_at("more") < 0
    values.forget("k1")
    values.forget("k1")
    assert values.put("more", 1, 3.0) and len(values) == tb.MOST_NAMES
    values = tb.Values()
    names = [f"k{number}" for number in range(100)]
    kept = [name for name in names if values.put(name, ["x" * 4000], 1.0)]
    assert len(kept) == tb.MOST_VALUES_CHARS // (4000 + 4 + 2)
    for name in kept:
        values.forget(name)
    assert values.put("k99", ["x" * 4000], 2.0), "what was forgotten leaves its room"
