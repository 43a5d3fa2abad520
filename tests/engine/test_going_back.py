"""The way back: which image it is, that it is kept until it is not needed, and how it is flashed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from engine_kit import IMAGE_BYTES, Place, Publisher, retried, unplug

from edged.api import Label
from edged.config import Storage
from edged.domain.job import Job, State
from edged.errors import Permanent, Reason
from edged.store.artifacts import pinned
from edged.testing.fake import fake_app
from edged.testing.node import TestNode, life
from edged_firmware.fetch import part_path


@pytest.fixture
def mine(tmp_path: Path, publisher: Publisher) -> Publisher:
    """A publisher that this test may change."""
    return publisher.copy(tmp_path / "publisher")


class RefusesTheWayBack:
    """The device says no at the third page that is written after its first boot, once."""

    def __init__(self) -> None:
        self.booted = False
        self.pages = 0

    def effect(self, name: str, apply: Callable[[], None], torn: Callable[[], None] | None = None) -> None:
        self.booted |= name == "device.boot"
        if self.booted and name == "device.page":
            self.pages += 1
            if self.pages == 3:
                raise Permanent(Reason.DEVICE_ERROR, "the page does not hold")
        apply()


def test_a_device_between_two_images_is_not_taken_for_its_own_way_back(
    tmp_path: Path, publisher: Publisher
) -> None:
    """What it ran came from elsewhere; the update was not good; the device refused on the way back. The cure is to retry."""
    place = Place(tmp_path / "state", publisher)
    device = place.device()
    refusing = device.effects = RefusesTheWayBack()

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            before = bytes(device.slots[0])
            await node.want("dev-1", "app@3.0.0")
            first = await node.ended("dev-1")
            assert (first.state, first.reason) == (State.FAILED, Reason.REVERT_FAILED)
            assert refusing.pages == 3, "it refused while the way back was written"
            assert bytes(device.slots[0]) != before
            assert first.fallback is not None
            assert first.fallback.image_sha256 in await node.store.read(pinned)
            second = await retried(node, place, first)
            assert second.state is State.REVERTED, second.detail
            assert second.fallback == first.fallback
            assert bytes(device.slots[0])[: IMAGE_BYTES * 2] == before[: IMAGE_BYTES * 2]

    asyncio.run(run())


def test_what_runs_is_a_way_back_also_where_it_was_withdrawn(tmp_path: Path, mine: Publisher) -> None:
    """One slot, nothing to read back: the image that was installed is on this node's disk still."""
    place = Place(tmp_path / "state", mine)
    device = place.device(reads_back=False)

    async def install() -> None:
        place.without_fallback = True
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@1.0.0")
            assert (await node.ended("dev-1")).state is State.SUCCEEDED

    async def replace_it(wish: str, end: State) -> None:
        place.without_fallback = False
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", wish)
            job = await node.ended("dev-1")
            assert job.state is end, job.detail
            assert job.fallback is not None and job.fallback.release == "app@1.0.0"

    asyncio.run(install())
    mine.withdraw("1.0.0")
    asyncio.run(replace_it("app@3.0.0", State.REVERTED))
    assert device.app is not None and device.app.version == "1.0.0"
    asyncio.run(replace_it("app@2.0.0", State.SUCCEEDED))


def test_a_device_that_comes_back_with_its_former_release_is_brought_back(
    tmp_path: Path, publisher: Publisher
) -> None:
    """A spare with the old image, whose flash cannot be read: this node put that release there itself, so it is a way back,
    though its counter is below the floor."""
    place = Place(tmp_path / "state", publisher)
    device = place.device(reads_back=False)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            for version in ("1.0.0", "2.0.0"):
                await node.want("dev-1", f"app@{version}")
                assert (await node.ended("dev-1")).state is State.SUCCEEDED
            device.install(fake_app("1.0.0", IMAGE_BYTES))
            job = await _brought_back(node, place)
            assert (job.run, job.source, job.state) == (2, "drift", State.SUCCEEDED), job.detail
            assert job.fallback is not None and job.fallback.release == "app@1.0.0"
            assert device.app is not None and device.app.version == "2.0.0"

    asyncio.run(run())


async def _brought_back(node: TestNode, place: Place) -> Job:
    """The wire goes and comes, and the job that follows ends."""
    before, bus = len(await node.jobs("dev-1")), place.plugin.bus("bus")
    await unplug(bus)
    bus.lost = False
    async with asyncio.timeout(20):
        while len(await node.jobs("dev-1")) == before:
            await asyncio.sleep(0.01)
    return await node.ended("dev-1")


def test_a_published_release_that_the_device_tells_is_a_way_back(
    tmp_path: Path, publisher: Publisher
) -> None:
    place = Place(tmp_path / "state", publisher)
    device = place.device(reads_back=False)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@3.0.0")
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED), job.detail
            assert device.app is not None and device.app.version == "1.0.0"
            assert await node.reported("dev-1") == {"name": "app", "version": "1.0.0"}

    asyncio.run(run())


def test_the_version_of_a_nameless_device_is_of_the_name_that_is_on_record(
    tmp_path: Path, mine: Publisher
) -> None:
    """It may have gone to the version 0.9.0 of our firmware, which nobody has; another firmware with that version is no way
    back."""
    mine.add("0.9.0", fake_app("0.9.0", IMAGE_BYTES), name="other")
    mine.publish()
    place = Place(tmp_path / "state", mine)
    device = place.device(reads_back=False)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@1.0.0")
            assert (await node.ended("dev-1")).state is State.SUCCEEDED
            device.install(fake_app("0.9.0", IMAGE_BYTES))
            await node.want("dev-1", "app@2.0.0")
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.FAILED, Reason.NO_FALLBACK), job.detail
            assert device.counts.received == 0

    asyncio.run(run())


def test_what_nobody_knows_is_no_way_back_until_it_is_published(tmp_path: Path, mine: Publisher) -> None:
    """Not of another model, nor one of two with that version: a guess is no way back. The cure that is told works."""
    mine.add("0.9.0", fake_app("0.9.0", IMAGE_BYTES), name="other", models=("gadget",))
    mine.publish()
    place = Place(tmp_path / "state", mine)
    device = place.device(app="0.9.0", reads_back=False)

    async def end(wish: str) -> Job:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", wish)
            return await node.ended("dev-1")

    job = asyncio.run(end("app@2.0.0"))
    assert (job.state, job.reason) == (State.FAILED, Reason.NO_FALLBACK)
    assert "dev-1 says that it runs 0.9.0, which is not one known release" in job.detail
    assert device.counts.received == 0
    mine.add("0.9.0", fake_app("0.9.0", IMAGE_BYTES))
    mine.publish()
    assert asyncio.run(end("app@3.0.0")).state is State.REVERTED
    mine.add("0.9.0", fake_app("0.9.0", IMAGE_BYTES), name="also")
    mine.publish()
    place = Place(tmp_path / "another", mine)
    place.device(app="0.9.0", reads_back=False)
    assert asyncio.run(end("app@2.0.0")).reason is Reason.NO_FALLBACK
    place = Place(tmp_path / "mute", mine)
    place.device(reads_back=False, tells=False)
    assert "it does not say so" in asyncio.run(end("app@2.0.0")).detail


def test_name_and_signed_parameters_reach_the_mapper_and_those_of_the_way_back_too(
    tmp_path: Path, mine: Publisher
) -> None:
    mine.add("4.0.0", fake_app("4.0.0", IMAGE_BYTES), params={"erase": "sector"})
    mine.add("5.0.0", fake_app("5.0.0", IMAGE_BYTES, healthy=False), params={"erase": "chip"})
    mine.add("6.0.0", fake_app("6.0.0", IMAGE_BYTES), params={"voltage": 12})
    mine.publish()
    place = Place(tmp_path / "state", mine)
    device = place.device()

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@4.0.0")
            assert (await node.ended("dev-1")).state is State.SUCCEEDED
            assert device.flashed_with == {"erase": "sector"}
            assert device.flashed_as == Label("app", "4.0.0")
            received = device.counts.received
            await node.want("dev-1", "app@6.0.0")
            refused = await node.ended("dev-1")
            assert (refused.state, refused.reason) == (State.FAILED, Reason.PROTOCOL_MISMATCH)
            assert refused.detail.endswith(
                "flashed with voltage, which mapper fake does not know; it knows erase"
            )
            assert device.counts.received == received
            await node.want("dev-1", "app@5.0.0")
            job = await node.ended("dev-1")
            assert job.state is State.REVERTED
            assert job.fallback is not None and job.fallback.params == {"erase": "sector"}
            assert device.flashed_with == {"erase": "sector"}
            assert device.flashed_as == Label("app", "4.0.0")

    asyncio.run(run())


def test_a_hiccup_after_a_long_absence_is_the_first_failure(tmp_path: Path, publisher: Publisher) -> None:
    place = Place(tmp_path / "state", publisher)
    place.engine = attrs.evolve(place.engine, max_attempts=3)
    device = place.device()
    device.absent = True
    bus = place.plugin.bus("bus")
    bus.lost = True

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            async with asyncio.timeout(20):
                while (
                    not (found := await node.jobs("dev-1")) or found[0].attempts <= place.engine.max_attempts
                ):
                    await asyncio.sleep(0.01)
                bus.lost = False
                while not await _waits(node, Reason.NO_RESPONSE):
                    await asyncio.sleep(0.001)
            device.absent = False
            job = await node.ended("dev-1")
            assert job.state is State.SUCCEEDED, job.detail

    asyncio.run(run())


async def _waits(node: TestNode, reason: Reason) -> bool:
    job = (await node.jobs("dev-1"))[0]
    assert not job.state.ended, job.detail
    return job.waiting is not None and job.waiting.reason is reason


@pytest.mark.parametrize(("left_behind", "wanted"), [("8.0.0", "8.0.0"), ("8.0.0", "9.0.0")])
def test_a_download_under_a_quota_goes_on_and_one_that_nobody_wants_makes_room(
    tmp_path: Path, mine: Publisher, left_behind: str, wanted: str
) -> None:
    for version in ("8.0.0", "9.0.0"):
        mine.add(version, fake_app(version, 600 * 1024))
    mine.publish()
    place = Place(tmp_path / "state", mine)
    place.device()
    config = attrs.evolve(place.config, storage=Storage(artifact_quota_bytes=1024 * 1024))

    async def run() -> None:
        async with life(config, place.plugins) as node:
            cut = await node.trust.resolve(f"app@{left_behind}")
            part = part_path(place.folder / "artifacts" / "partial" / cut.image.sha256)
            part.write_bytes(mine.image_file(left_behind).read_bytes()[: 500 * 1024])
            fetched = await node.trust.resolve(f"app@{wanted}")
            await node.images.fetch(fetched, lambda done, total: None)
            assert await node.images.missing_bytes(fetched) == 0
            assert not part.exists()

    asyncio.run(run())
