"""Desired properties on their way to a device that may lose, refuse or round them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import pytest
from engine_kit import Place, Publisher, until

from edged.api import Desired, JsonValue
from edged.config import Config
from edged.domain.job import State
from edged.domain.wishes import FIRST_PAUSE_S
from edged.errors import Permanent, Reason, Transient
from edged.store import twins
from edged.testing.fake import FakeDevice
from edged.testing.node import TestNode, life


@pytest.fixture
def place(tmp_path: Path, publisher: Publisher) -> Place:
    return Place(tmp_path / "state", publisher)


@pytest.fixture
def device(place: Place) -> FakeDevice:
    return place.device(properties={"interval": 0})


def brisk(place: Place) -> Config:
    config = place.config
    return attrs.evolve(config, storage=attrs.evolve(config.storage, report_interval_s=0.2))


async def wish(node: TestNode, name: str, value: JsonValue) -> None:
    await node.store.write(lambda tx: twins.set_desired(tx, "dev-1", name, value, "operator"))
    node.sessions["dev-1"].refresh()


async def until_reported(node: TestNode, name: str, value: JsonValue) -> None:
    async with asyncio.timeout(20):
        while await node.reported("dev-1", name) != value:
            await asyncio.sleep(0.01)


def lived(place: Place, body: Callable[[TestNode, list[float]], Awaitable[None]]) -> None:
    """``body`` with the node and the seconds that have passed more than did."""
    more = [0.0]

    async def run() -> None:
        async with life(brisk(place), place.plugins, passed=lambda: more[0]) as node:
            await body(node, more)

    asyncio.run(run())


def test_what_an_update_made_a_device_forget_is_told_again(place: Place, device: FakeDevice) -> None:
    async def body(node: TestNode, more: list[float]) -> None:
        await wish(node, "interval", 30)
        await until_reported(node, "interval", 30)
        await node.want("dev-1", "app@2.0.0")
        assert (await node.ended("dev-1")).state is State.SUCCEEDED
        device.properties["interval"] = 0
        await until_reported(node, "interval", 0)
        assert len(device.applied) == 1, "not within its first pause"
        more[0] += FIRST_PAUSE_S
        await until_reported(node, "interval", 30)
        assert [one.value for one in device.applied] == [30, 30]

    lived(place, body)


def test_a_value_that_does_not_stay_is_written_less_and_less_often(place: Place, device: FakeDevice) -> None:
    def forgets(desired: Desired) -> JsonValue:
        asyncio.get_running_loop().call_later(0.05, device.properties.update, {"interval": 0})
        return desired.value

    device.takes = forgets

    async def body(node: TestNode, more: list[float]) -> None:
        await wish(node, "interval", 30)
        for times in range(1, 5):
            await until(lambda times=times: len(device.applied) == times)  # type: ignore[misc]
            await until_reported(node, "interval", 0)
            more[0] += FIRST_PAUSE_S * 2 ** (times - 1) - 5
            await asyncio.sleep(0.2)
            assert len(device.applied) == times
            more[0] += 5

    lived(place, body)


def test_a_value_that_is_rounded_is_written_once(place: Place, device: FakeDevice) -> None:
    device.takes = lambda desired: 29.9

    async def body(node: TestNode, more: list[float]) -> None:
        await wish(node, "interval", 30)
        await until_reported(node, "interval", 29.9)
        more[0] += 1e6
        await wish(node, "other", 1)
        await until(lambda: any(one.name == "other" for one in device.applied))
        await asyncio.sleep(0.2)
        assert [one.name for one in device.applied] == ["interval", "other"]

    lived(place, body)


@pytest.mark.parametrize(
    "error", [Transient(Reason.DEVICE_ERROR, "not now"), Permanent(Reason.DEVICE_ERROR, "never")]
)
def test_a_wish_that_is_refused_stops_nothing_else(
    place: Place, device: FakeDevice, error: Transient | Permanent
) -> None:
    refuses = [True]

    def takes(desired: Desired) -> JsonValue:
        if desired.name == "interval" and refuses[0]:
            raise error
        return desired.value

    device.takes = takes

    async def body(node: TestNode, more: list[float]) -> None:
        await wish(node, "interval", 30)
        await wish(node, "other", 1)
        await until_reported(node, "other", 1)
        await until(lambda: bool(device.applied))
        device.properties["level"] = 7
        await until_reported(node, "level", 7)
        assert [one.name for one in device.applied].count("interval") == 1
        assert node.sessions["dev-1"].unit.restarts == 0
        refuses[0] = False
        more[0] += FIRST_PAUSE_S
        await until_reported(node, "interval", 30)

    lived(place, body)


def test_a_device_that_asks_is_offered_all_its_wishes_at_once(place: Place, device: FakeDevice) -> None:
    async def first(node: TestNode, more: list[float]) -> None:
        await wish(node, "interval", 30)
        await until_reported(node, "interval", 30)

    async def second(node: TestNode, more: list[float]) -> None:
        await until(lambda: [(one.name, one.value) for one in device.offered] == [("interval", 30)])
        assert len(device.applied) == 1, "it has it already"
        await wish(node, "other", 1)
        await until(lambda: [one.name for one in device.offered] == ["interval", "other"])

    lived(place, first)
    device.offered = []
    lived(place, second)
