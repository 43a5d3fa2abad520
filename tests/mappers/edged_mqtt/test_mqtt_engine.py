"""Whole updates of devices that pull, through the real engine: how they end, what they cost, and what is believed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
from engine_kit import until
from mqtt_kit import PullingDevice
from mqtt_node import IMAGE_BYTES, Plant, deployed, image_bytes

from edged.config import HealthSettings
from edged.domain.job import Job, State
from edged.domain.reconcile import FIRMWARE
from edged.engine import reconciler
from edged.errors import Reason
from edged.store import jobs, twins
from edged.store.database import Tx
from edged.testing.node import TestNode, life


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0", "3.0.0")
    plant.device()
    return plant


@asynccontextmanager
async def running(plant: Plant, *devices: PullingDevice, observer: Any = None) -> AsyncIterator[TestNode]:
    async with life(plant.config, plant.plugins, observer=observer) as node:
        for device in devices:
            device.start()
        try:
            yield node
        finally:
            for device in devices:
                await device.stop()


def pump(plant: Plant, **options: Any) -> PullingDevice:
    return PullingDevice(plant.port, "token-of-pump-1", **options)


async def _first(node: TestNode) -> None:
    job = await deployed(node, "pump@1.0.0")
    assert job.state is State.SUCCEEDED, job.detail


@pytest.mark.parametrize("component", ["fw", "sw"])
def test_an_update_and_the_way_back_cost_one_image_each(plant: Plant, component: str) -> None:
    plant.devices[0].config["component"] = component
    device = pump(plant, component=component)

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            assert device.written == 0, "it runs already what it should"
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, device.version) == (State.SUCCEEDED, "2.0.0"), job.detail
            assert bytes(device.flash) == image_bytes("2.0.0")
            assert device.written == IMAGE_BYTES
            assert job.done_bytes == job.total_bytes
            device.boots = False
            job = await deployed(node, "pump@3.0.0")
            assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_REVERTED), job.detail
            assert "runs pump 2.0.0, not pump 3.0.0" in job.detail
            assert device.version == "2.0.0"
            assert await node.reported("pump-1") == {"name": "pump", "version": "2.0.0"}
            assert device.written == 2 * IMAGE_BYTES, "what it runs still was sent again"

    asyncio.run(run())


def test_the_first_update_goes_back_to_what_the_device_says_that_it_ran(plant: Plant) -> None:
    device = pump(plant, boots=False)

    async def run() -> None:
        async with running(plant, device) as node:
            job = await deployed(node, "pump@3.0.0")
            assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_REVERTED), job.detail
            assert job.fallback is not None and job.fallback.release == "pump@1.0.0"
            assert device.version == "1.0.0"

    asyncio.run(run())


def test_a_device_that_reboots_says_what_it_runs_when_it_is_back(plant: Plant) -> None:
    device = pump(plant, reboots=True)

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, device.version) == (State.SUCCEEDED, "2.0.0"), job.detail
            device.boots = False
            job = await deployed(node, "pump@3.0.0")
            # each time it comes back with what it ran before, and fetches the image again
            assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_ERROR), job.detail
            assert "bytes of an image of 200000" in job.detail
            assert device.version == "2.0.0"
            assert 4 * IMAGE_BYTES <= device.written <= 5 * IMAGE_BYTES

    asyncio.run(run())


def test_a_device_that_comes_back_as_it_was_is_seen_to(plant: Plant) -> None:
    plant.devices[0].config["install_s"] = 1.0
    device = pump(plant, reboots=True, boots=False, asks_again=False)

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            job = await deployed(node, "pump@3.0.0")
            assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_REVERTED), job.detail
            assert "it runs pump 1.0.0 still 1 s after it had pump 3.0.0 whole" in job.detail

    asyncio.run(run())


def test_a_version_of_another_title_is_another_firmware(plant: Plant) -> None:
    device = pump(plant, title="valve", version="2.0.0")

    async def run() -> None:
        async with running(plant, device) as node:
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, job.reason) == (State.FAILED, Reason.NO_FALLBACK), job.detail
            assert device.written == 0

    asyncio.run(run())
    plant.devices[0].config["title"] = "valve"
    again = pump(plant, title="valve", version="1.0.0")

    async def titled() -> None:
        async with running(plant, again) as node:
            await _first(node)
            job = await deployed(node, "pump@3.0.0")
            assert (job.state, again.title, again.version) == (State.SUCCEEDED, "valve", "3.0.0"), job.detail

    plant.folder = plant.folder / "second"
    asyncio.run(titled())


def test_health_is_what_the_new_application_reports_and_the_way_back_is_offered(plant: Plant) -> None:
    plant.health = HealthSettings(
        kind="property", query="build", pattern="build={identifies_as}", timeout_s=1
    )
    device = pump(plant, values={"build": "1.0.0"})

    def boot(_: int) -> None:
        if device.shared.get("fw_version") in ("1.0.0", "2.0.0"):
            device.values["build"] = device.shared["fw_version"]

    device.on_chunk = boot
    device.every_s = 0.05

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            assert (await deployed(node, "pump@2.0.0")).state is State.SUCCEEDED
            job = await deployed(node, "pump@3.0.0")
            assert (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED), job.detail
            assert "saw 'build=2.0.0'" in job.detail
            assert (device.version, bytes(device.flash)) == ("2.0.0", image_bytes("2.0.0"))

    asyncio.run(run())


def test_a_job_waits_for_a_device_that_sleeps_and_uses_up_nothing(plant: Plant) -> None:
    device = pump(plant)

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            await device.unplug()
            await node.want("pump-1", "pump@2.0.0")
            job = await _waiting(node, lambda job: job.waiting is not None and job.updated != job.created)
            assert job.waiting is not None and job.waiting.reason is Reason.DEVICE_ABSENT
            await asyncio.sleep(1.5)
            (job, *_) = await node.jobs("pump-1")
            assert job.state is State.READY and not job.touched
            await device.plug()
            ended = await node.ended("pump-1")
            assert (ended.state, device.version) == (State.SUCCEEDED, "2.0.0"), ended.detail
            assert ended.steps < 15, "waiting used up steps"

    asyncio.run(run())


async def _waiting(node: TestNode, found: Callable[[Job], bool]) -> Job:
    async with asyncio.timeout(20):
        while True:
            jobs = await node.jobs("pump-1")
            if jobs and found(jobs[0]):
                return jobs[0]
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("resumes", [True, False], ids=["where it was", "from the beginning"])
def test_a_device_that_sleeps_in_the_middle_goes_on_when_it_wakes(plant: Plant, resumes: bool) -> None:
    device = pump(plant, resumes=resumes)
    sleeping: list[asyncio.Future[None]] = []
    naps = iter([5, 9, 20])
    nap = [next(naps)]

    def sleep(chunk: int) -> None:
        if chunk == nap[0]:
            nap[0] = next(naps, 0)
            sleeping.append(asyncio.ensure_future(_nap(device)))

    device.on_chunk = sleep
    device.delay_s = 0.005

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, device.version) == (State.SUCCEEDED, "2.0.0"), job.detail
            assert bytes(device.flash) == image_bytes("2.0.0")
            assert device.log.count("connected") >= 4 and len(sleeping) == 3, "it did not sleep"
            assert job.attempts == 0
            begun, again = (1, 0) if resumes else (4, 5 + 9 + 20)
            assert device.log.count("DOWNLOADING") == begun
            # what was on its way at each nap is lost, or comes twice
            assert device.written <= IMAGE_BYTES + (again + 3) * 4096
            assert len(device.chunks) <= IMAGE_BYTES + (again + 3) * 4096

    asyncio.run(run())


async def _nap(device: PullingDevice) -> None:
    await device.unplug()
    await asyncio.sleep(0.4)
    await device.plug()


def test_a_cancelled_job_withdraws_the_offer_and_leaves_the_device_as_it_was(plant: Plant) -> None:
    device = pump(plant, delay_s=0.05)

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            await node.want("pump-1", "pump@2.0.0")
            await until(lambda: device.written >= 8 * 4096)
            # a while for those that come until the wish to cancel is stored
            device.delay_s = 0.5
            node.engine.job_changed(await node.store.write(_cancel))
            job = await node.ended("pump-1")
            assert (job.state, job.reason) == (State.REVERTED, Reason.CANCELLED), job.detail
            await until(lambda: "fw_version" in device.deleted)  # the offer is withdrawn
            assert device.version == "1.0.0" and device.written < IMAGE_BYTES

    asyncio.run(run())


def _cancel(tx: Tx) -> Job:
    job = jobs.active_for(tx, "pump-1", FIRMWARE)
    assert job is not None
    return reconciler.cancel(tx, job, Reason.CANCELLED, "operator")


def test_what_a_device_says_is_in_its_twin_and_what_it_is_given_it_gets(plant: Plant) -> None:
    plant.devices[0].config["units"] = {"temperature": "Cel"}
    device = pump(plant)

    async def run() -> None:
        async with running(plant, device) as node:
            await _until(node, "temperature", 20.5)
            twin = await node.store.read(lambda tx: twins.get(tx, "pump-1"))
            assert twin.reported["temperature"].unit == "Cel"
            assert twin.reported["current_fw_version"].value == "1.0.0"
            await node.store.write(lambda tx: twins.set_desired(tx, "pump-1", "interval", 30, "operator"))
            node.sessions["pump-1"].refresh()
            await _until(node, "interval", 30)
            assert device.shared["interval"] == 30
            device.publish("v1/devices/me/attributes", json.dumps({"serial": "x-17"}))
            device.publish("v1/devices/me/telemetry", json.dumps([{"ts": 1, "values": {"level": [1, 2]}}]))
            device.publish("v1/devices/me/telemetry", b"\xff{")
            device.publish("v1/devices/me/telemetry", b"[" * 100_000)
            await _until(node, "level", [1, 2])
            assert await node.reported("pump-1", "serial") == "x-17"
            assert FIRMWARE not in twin.reported

    asyncio.run(run())


def test_a_wish_that_is_taken_back_is_a_shared_attribute_that_is_deleted(plant: Plant) -> None:
    device = pump(plant)

    async def run() -> None:
        async with running(plant, device) as node:
            for value in (30, None):
                await node.store.write(
                    lambda tx, value=value: twins.set_desired(tx, "pump-1", "interval", value, "operator")
                )
                node.sessions["pump-1"].refresh()
                if value is not None:
                    await _until(node, "interval", value)
            async with asyncio.timeout(20):
                while "interval" not in device.deleted:
                    await asyncio.sleep(0.02)
            assert device.shared["interval"] == 30, "it was given null for a value"

    asyncio.run(run())


async def _until(node: TestNode, name: str, value: object) -> None:
    async with asyncio.timeout(20):
        while await node.reported("pump-1", name) != value:
            await asyncio.sleep(0.02)


def test_two_names_with_one_version_are_two_where_the_device_tells_no_name(plant: Plant) -> None:
    plant.publisher.add("1.0.0", image_bytes("valve"), name="valve", models=("pump",), protocol="thingsboard")
    plant.publisher.publish()
    plant.devices[0].config["title"] = "works"
    device = pump(plant, title="works")

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            job = await deployed(node, "valve@1.0.0")
            assert (job.state, job.reason) == (State.FAILED, Reason.UNSUPPORTED), job.detail
            assert "runs pump@1.0.0 by our record and tells no name" in job.detail
            assert not device.written
            assert await node.reported("pump-1") == {"name": "pump", "version": "1.0.0"}

    asyncio.run(run())


SELF_TEST = HealthSettings(kind="property", query="self_test", pattern="self_test=passed", timeout_s=3)


async def _reboots(device: PullingDevice, version: str, away_s: float = 0.1) -> None:
    await device.unplug()
    device.version = version
    await asyncio.sleep(away_s)
    await device.plug()
    await device.connected.wait()


def test_an_image_that_goes_back_by_itself_has_not_the_old_ones_health(plant: Plant) -> None:
    """It says that it is up, crashes, and the boot loader goes back: what passes the check is the old application."""
    plant.health = SELF_TEST
    device = pump(plant, values={"self_test": "passed"}, asks_again=False)
    crashes: list[asyncio.Task[None]] = []

    async def crash() -> None:
        device.values = {}
        device.version = "2.0.0"
        device.say("UPDATED")
        await asyncio.sleep(0.3)
        await _reboots(device, "1.0.0")
        device.report(self_test="passed")

    def whole() -> None:
        crashes.append(asyncio.create_task(crash()))

    device.on_whole = whole

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            job = await deployed(node, "pump@2.0.0")
            assert crashes, "it did not crash"
            assert (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED), job.detail
            assert "it runs pump 1.0.0 by now" in job.detail
            assert await node.reported("pump-1") == {"name": "pump", "version": "1.0.0"}

    asyncio.run(run())


def test_health_that_was_reported_before_the_update_is_none(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device boots for longer than a session waits, so another one looks at what it reported."""
    monkeypatch.setattr("edged_mqtt.transfer.BOOT_S", 0.3)
    plant.health = SELF_TEST
    device = pump(plant, values={"self_test": "passed"})
    boots: list[asyncio.Task[None]] = []

    def whole() -> None:
        device.values = {}
        device.say("UPDATING")
        boots.append(asyncio.create_task(_reboots(device, device.shared["fw_version"], 1.5)))

    device.on_whole = whole

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            job = await deployed(node, "pump@2.0.0")
            assert boots, "it did not boot"
            assert job.reason is Reason.HEALTH_FAILED, (job.state, job.detail)
            assert job.state is State.REVERTED and device.version == "1.0.0", job.detail

    asyncio.run(run())


def test_what_was_said_on_another_connection_is_not_believed(plant: Plant) -> None:
    """It goes back while it is away, and takes its time to say so."""
    device = pump(plant, asks_again=False)

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            assert (await deployed(node, "pump@2.0.0")).state is State.SUCCEEDED
            says, device.say = device.say, lambda *_, **__: None  # type: ignore[method-assign]
            await _reboots(device, "1.0.0")
            await node.want("pump-1", "pump@2.0.0")
            asyncio.get_running_loop().call_later(1, says)
            async with node.sessions["pump-1"].lease(20) as lease:
                slots = await lease.session.slots()  # type: ignore[attr-defined]
                assert slots.active.runs == "1.0.0"

    asyncio.run(run())


@pytest.mark.parametrize("version", ["2.0.0", "1.0.0"])
def test_a_state_may_come_in_a_message_before_the_version(plant: Plant, version: str) -> None:
    device = pump(plant)

    async def boot() -> None:
        device.version = version if device.shared["fw_version"] == "2.0.0" else "1.0.0"
        device.report(fw_state="UPDATED")
        await asyncio.sleep(0.5)
        device.report(current_fw_title="pump")
        device.report(current_fw_version=device.version)

    boots: list[asyncio.Task[None]] = []
    device.on_whole = lambda: boots.append(asyncio.create_task(boot()))

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            job = await deployed(node, "pump@2.0.0")
            assert boots, "it did not boot"
            if version == "2.0.0":
                assert job.state is State.SUCCEEDED, job.detail
            else:
                assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_REVERTED), job.detail
                assert "it says UPDATED and runs pump 1.0.0, not pump 2.0.0" in job.detail

    asyncio.run(run())


def test_a_device_that_names_the_new_version_and_says_failed_has_failed(plant: Plant) -> None:
    """As one whose new application does not pass its own test."""
    device = pump(plant, chunk_bytes=65_536)

    def fail() -> None:
        if device._offer["version"] == "1.0.0":
            device.on_whole = None
            device._install()
            return
        device.version = "2.0.0"
        device.say("FAILED", fw_error="self test")

    async def run() -> None:
        plant.devices[0].config["silence_s"] = 0.5
        async with running(plant, device) as node:
            await _first(node)
            device.on_whole = fail
            job = await deployed(node, "pump@2.0.0")
            assert (job.state, job.reason) == (State.REVERTED, Reason.VERIFY_FAILED), job.detail
            assert "it says FAILED: 'self test'" in job.detail
            assert bytes(device.flash) == image_bytes("1.0.0"), "it was not given back what it ran"

    asyncio.run(run())


def test_a_device_that_does_not_ask_for_what_it_is_offered_uses_up_no_attempt(plant: Plant) -> None:
    """It sleeps, on a connection that nobody closed."""
    plant.devices[0].config["silence_s"] = 0.3
    plant.engine = attrs.evolve(plant.engine, max_attempts=2)
    # few requests: it is the offer that it is silent to
    device = pump(plant, chunk_bytes=65_536)

    async def run() -> None:
        async with running(plant, device) as node:
            await _first(node)
            ask, device.ask = device.ask, lambda: None  # type: ignore[method-assign]
            device.asks_again = False
            begun = device.say
            device.say = lambda state=None, **more: None if state else begun(**more)  # type: ignore[method-assign]
            await node.want("pump-1", "pump@2.0.0")
            await asyncio.sleep(4)
            (job, *_) = await node.jobs("pump-1")
            assert (job.state, job.attempts) == (State.STAGING, 0), job.detail
            assert job.waiting is None or job.waiting.reason is Reason.DEVICE_ABSENT
            device.ask, device.say, device.asks_again = ask, begun, True  # type: ignore[method-assign]
            ended = await node.ended("pump-1")
            assert (ended.state, device.version) == (State.SUCCEEDED, "2.0.0"), ended.detail

    asyncio.run(run())
