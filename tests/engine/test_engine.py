"""One release on its way into a device, and everything that can be in its way."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import attrs
import pytest
from engine_kit import Place, Publisher, unplug

from edged.domain.job import State
from edged.domain.reconcile import LeftAlone
from edged.engine.reconciler import left_alone, retry
from edged.errors import Reason
from edged.store import audit, floors, jobs
from edged.testing.fake import FakeDevice, fake_app
from edged.testing.node import TestNode, life


@pytest.fixture
def place(tmp_path: Path, publisher: Publisher) -> Place:
    return Place(tmp_path / "state", publisher)


async def _events(node: TestNode, job_id: str) -> list[tuple[State, Reason | None]]:
    history = await node.store.read(lambda tx: jobs.history(tx, job_id))
    return [(entry.to_state, entry.reason) for entry in history]


async def _audit_is_intact(node: TestNode) -> None:
    report = await node.store.read(lambda tx: audit.verify(tx, node.key.public_key))
    assert report.intact, report.reason


@pytest.mark.parametrize("slots", [1, 2])
def test_a_release_reaches_the_device(place: Place, slots: int) -> None:
    device = place.device(slot_count=slots)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.SUCCEEDED, None), job.detail
            assert device.app is not None and device.app.version == "2.0.0"
            assert device.confirmed and not device.pending
            assert await node.reported("dev-1") == {"name": "app", "version": "2.0.0"}
            assert await node.store.read(lambda tx: floors.get(tx, "dev-1", "firmware")) == 2
            assert device.counts.received == len(fake_app("2.0.0"))
            assert job.done_bytes == job.total_bytes > 0
            states = [state for state, _ in await _events(node, job.id)]
            assert sorted(set(states), key=states.index) == [
                State.QUEUED,
                State.FETCHING,
                State.READY,
                State.STAGING,
                State.ACTIVATING,
                State.VERIFYING,
                State.SUCCEEDED,
            ]
            await _audit_is_intact(node)

    asyncio.run(run())


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize("slots", [1, 2])
def test_a_bad_image_is_left_again(place: Place, slots: int, known: bool) -> None:
    """The health check fails: the device goes back to what it ran, once, and the floor stays."""
    device = place.device(slot_count=slots)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            if known:
                await node.want("dev-1", "app@1.0.0")
                await node.ended("dev-1")
            await node.want("dev-1", "app@3.0.0")
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED)
            assert device.app is not None and device.app.version == "1.0.0"
            assert await node.store.read(lambda tx: floors.get(tx, "dev-1", "firmware")) == int(known)
            assert device.counts.trial_boots <= 1
            assert await node.reported("dev-1") == ({"name": "app", "version": "1.0.0"} if known else None)
            await asyncio.sleep(0.1)
            assert len(await node.jobs("dev-1")) == 1 + known, "a bad image was tried again"
            await _audit_is_intact(node)

    asyncio.run(run())


def test_there_and_back_is_refused_by_the_counter(place: Place) -> None:
    """Setting desired back is a wish like any other: the older counter is refused, and the device keeps what it has."""
    device = place.device()

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            await node.ended("dev-1")
            received = device.counts.received
            await node.want("dev-1", "app@1.0.0")
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.FAILED, Reason.COUNTER_LOWER)
            assert device.counts.received == received

    asyncio.run(run())


def test_a_device_that_comes_back_with_another_version_is_brought_back(place: Place) -> None:
    """Somebody swapped the board for one with the old image: noticed when its session is opened again."""
    device = place.device(slot_count=2)
    bus = place.plugin.bus("bus")

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            await node.ended("dev-1")
            await unplug(bus)
            device.install(fake_app("1.0.0"))
            bus.lost = False
            async with asyncio.timeout(20):
                while len(await node.jobs("dev-1")) < 2:
                    await asyncio.sleep(0.01)
            job = await node.ended("dev-1")
            assert (job.run, job.source, job.state) == (2, "drift", State.SUCCEEDED)
            assert device.app is not None and device.app.version == "2.0.0"
            rows = await node.store.read(lambda tx: audit.list(tx, 0, 1000))
            assert "device.drifted" in [row.event for row in rows]

    asyncio.run(run())


async def _swap(place: Place, device: FakeDevice) -> None:
    """Another board with the old image stands at the address."""
    bus = place.plugin.bus("bus")
    await unplug(bus)
    device.install(fake_app("1.0.0"))
    bus.lost = False


async def _brought_back(node: TestNode, jobs: int) -> None:
    async with asyncio.timeout(20):
        while len(await node.jobs("dev-1")) < jobs:
            await asyncio.sleep(0.01)
    assert (await node.ended("dev-1")).state is State.SUCCEEDED


def test_a_device_that_comes_back_too_often_is_left_alone_until_somebody_asks_or_time_passes(
    place: Place,
) -> None:
    device = place.device(slot_count=2)
    place.engine = attrs.evolve(place.engine, max_runs=1)
    later = timedelta()

    async def why(node: TestNode) -> LeftAlone | None:
        return await node.store.read(lambda tx: left_alone(tx, "dev-1", place.engine))

    async def run() -> None:
        nonlocal later
        async with life(place.config, place.plugins, now=lambda: datetime.now(UTC) + later) as node:
            await node.want("dev-1", "app@2.0.0")
            assert (await node.ended("dev-1")).state is State.SUCCEEDED
            await _swap(place, device)
            await _brought_back(node, 2)
            assert await why(node) is None
            await _swap(place, device)
            async with asyncio.timeout(20):
                while await why(node) != LeftAlone("app@2.0.0", 1):
                    await asyncio.sleep(0.01)
            assert device.app is not None and device.app.version == "1.0.0"
            (newest, _) = await node.jobs("dev-1")
            again = await node.store.write(lambda tx: retry(tx, newest, "operator", place.engine))
            node.engine.job_changed(again)
            await _brought_back(node, 3)
            await _swap(place, device)
            await _brought_back(node, 4)
            later += timedelta(hours=25)
            await _swap(place, device)
            await _brought_back(node, 5)

    asyncio.run(run())


def test_a_job_of_a_device_that_is_gone_from_the_configuration_holds_up_nobody(place: Place) -> None:
    gone = [place.device(f"gone-{number}") for number in range(3)]
    for device in gone:
        device.absent = True

    async def leave() -> None:
        async with life(place.config, place.plugins) as node:
            for device in gone:
                await node.want(device.name, "app@2.0.0")
            async with asyncio.timeout(20):
                while not all([await node.jobs(device.name) for device in gone]):
                    await asyncio.sleep(0.01)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            assert (await node.ended("dev-1")).state is State.SUCCEEDED
            turns = node.engine.turns
            await asyncio.sleep(0.3)
            assert node.engine.turns <= turns + 2, "the loop spins over jobs that nobody can run"

    asyncio.run(leave())
    place.devices.clear()
    place.device("dev-1")
    place.engine = attrs.evolve(place.engine, parallel_jobs=2)
    asyncio.run(run())


def test_what_runs_already_is_not_flashed(place: Place) -> None:
    device = place.device(app="2.0.0")

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            job = await node.ended("dev-1")
            assert job.state is State.SUCCEEDED
            assert not job.touched
            assert device.counts.received == 0

    asyncio.run(run())


def test_a_silent_device_is_read_before_it_is_written(place: Place) -> None:
    """It cannot tell its version, but its flash holds the release already."""
    device = place.device(app="2.0.0", tells=False)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            job = await node.ended("dev-1")
            assert job.state is State.SUCCEEDED
            assert device.counts.received == 0

    asyncio.run(run())


def test_an_unknown_application_is_read_out_and_brought_back(place: Place) -> None:
    """Nobody published what the device runs: its flash is kept, and is what it goes back to."""
    device = place.device(app=None, tells=False)
    device.install(fake_app("0.9-factory", 1000))
    factory = bytes(device.slots[0])

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@3.0.0")
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED)
            assert job.fallback is not None and job.fallback.release is None
            assert bytes(device.slots[0]) == factory
            assert await node.reported("dev-1") is None

    asyncio.run(run())


@pytest.mark.parametrize("allowed", [False, True])
def test_without_a_way_back_policy_decides_before_the_first_erase(place: Place, allowed: bool) -> None:
    device = place.device(reads_back=False, tells=False)
    place.without_fallback = allowed

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            job = await node.ended("dev-1")
            if allowed:
                assert job.state is State.SUCCEEDED and job.no_fallback
            else:
                assert (job.state, job.reason) == (State.FAILED, Reason.NO_FALLBACK)
                assert device.counts.received == 0

    asyncio.run(run())


def test_a_blank_device_has_nothing_to_lose(place: Place) -> None:
    place.device(app=None)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@1.0.0")
            job = await node.ended("dev-1")
            assert job.state is State.SUCCEEDED and job.no_fallback

    asyncio.run(run())


def test_the_known_release_is_the_fallback(place: Place) -> None:
    place.device()

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@1.0.0")
            await node.ended("dev-1")
            await node.want("dev-1", "app@2.0.0")
            job = await node.ended("dev-1")
            assert job.fallback is not None and job.fallback.release == "app@1.0.0"

    asyncio.run(run())


def test_an_absent_device_is_waited_for(place: Place) -> None:
    device = place.device()
    device.absent = True

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            async with asyncio.timeout(20):
                while not (found := await node.jobs("dev-1")) or found[0].waiting is None:
                    await asyncio.sleep(0.01)
            assert found[0].waiting.reason is Reason.NO_RESPONSE
            device.absent = False
            job = await node.ended("dev-1")
            assert job.state is State.SUCCEEDED

    asyncio.run(run())


def test_a_job_goes_on_as_soon_as_its_wire_is_there_again(place: Place) -> None:
    """It does not sit out the back-off of an absent device."""
    place.device()
    bus = place.plugin.bus("bus")
    bus.lost = True
    place.engine = attrs.evolve(place.engine, first_backoff_s=600, longest_backoff_s=600)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            async with asyncio.timeout(20):
                while not (found := await node.jobs("dev-1")) or found[0].waiting is None:
                    await asyncio.sleep(0.01)
            assert found[0].waiting.reason is Reason.DEVICE_ABSENT
            bus.lost = False
            assert (await node.ended("dev-1", timeout_s=20)).state is State.SUCCEEDED

    asyncio.run(run())


def test_the_wrong_device_is_not_written(place: Place) -> None:
    device = place.device(hardware_id="fake:2")

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.FAILED, Reason.HARDWARE_MISMATCH)
            assert device.counts.received == 0

    asyncio.run(run())


def test_a_lost_wire_is_gone_on_from(place: Place) -> None:
    """Unplugged in the middle: the job waits, and goes on from what the device has."""
    device = place.device()
    bus = place.plugin.bus("bus")
    bus.bytes_per_s = 20_000

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            async with asyncio.timeout(20):
                while device.counts.received < 700:
                    await asyncio.sleep(0.005)
            await unplug(bus)
            bus.lost = False
            job = await node.ended("dev-1")
            assert job.state is State.SUCCEEDED, job.detail
            assert device.counts.received <= len(fake_app("2.0.0")) + 2 * device.page_bytes
            assert any(reason is Reason.LINK_LOST for _, reason in await _events(node, job.id))

    asyncio.run(run())


def test_cancelling_goes_back(place: Place) -> None:
    device = place.device()
    bus = place.plugin.bus("bus")
    bus.bytes_per_s = 20_000

    async def run() -> None:
        from edged.engine.reconciler import cancel

        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            async with asyncio.timeout(20):
                while device.counts.received < 700:
                    await asyncio.sleep(0.005)
            # so that it is not through before the store has answered twice
            bus.bytes_per_s = 500
            (job,) = await node.jobs("dev-1")

            def change(tx):  # type: ignore[no-untyped-def]
                return cancel(tx, jobs.get(tx, job.id), Reason.CANCELLED, "tester")

            node.engine.job_changed(await node.store.write(change))
            bus.bytes_per_s = 20_000
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.REVERTED, Reason.CANCELLED)
            assert device.app is not None and device.app.version == "1.0.0"

    asyncio.run(run())


def test_another_wish_supersedes_before_the_first_change(place: Place) -> None:
    device = place.device()
    device.absent = True

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@3.0.0")
            async with asyncio.timeout(20):
                while not await node.jobs("dev-1"):
                    await asyncio.sleep(0.01)
            await node.want("dev-1", "app@2.0.0")
            device.absent = False
            async with asyncio.timeout(20):
                while len(await node.jobs("dev-1")) < 2:
                    await asyncio.sleep(0.01)
            job = await node.ended("dev-1")
            older = (await node.jobs("dev-1"))[1]
            assert (older.state, older.reason) == (State.CANCELLED, Reason.SUPERSEDED)
            assert (job.release, job.state) == ("app@2.0.0", State.SUCCEEDED)

    asyncio.run(run())


def test_several_devices_at_once_and_each_in_turn(place: Place) -> None:
    devices = [place.device(f"dev-{number}", bus=f"bus-{number % 3}") for number in range(8)]
    for number in range(3):
        # so that the first is not ready before the second is wished for
        place.plugin.bus(f"bus-{number}").bytes_per_s = 20_000
    place.engine = attrs.evolve(place.engine, parallel_jobs=4)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            for device in devices:
                await node.want(device.name, "app@2.0.0")
            most = 0
            async with asyncio.timeout(30):
                while any(d.app is None or d.app.version != "2.0.0" for d in devices):
                    most = max(most, len(node.engine.running))
                    await asyncio.sleep(0.002)
            for device in devices:
                assert (await node.ended(device.name)).state is State.SUCCEEDED
            assert 2 <= most <= 4

    asyncio.run(run())


def test_a_damaged_file_on_disk_is_fetched_again(place: Place) -> None:
    """The disk rots while the job waits for its device: nothing wrong is sent, the image is fetched once more."""
    device = place.device()
    device.absent = True

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            async with asyncio.timeout(20):
                while not (found := await node.jobs("dev-1")) or found[0].state is not State.READY:
                    await asyncio.sleep(0.01)
        (image,) = [f for f in (place.folder / "artifacts").glob("?" * 64) if f.stat().st_size > 1000]
        damaged = bytearray(image.read_bytes())
        damaged[1500] ^= 1
        image.write_bytes(bytes(damaged))
        device.absent = False
        async with life(place.config, place.plugins) as node:
            job = await node.ended("dev-1")
            assert job.state is State.SUCCEEDED, job.detail
            assert device.app is not None and device.app.version == "2.0.0"

    asyncio.run(run())
