"""A device that has to agree before its memory is changed: what it refuses has changed nothing, and needs no way back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import attrs
import pytest
from engine_kit import QUICK, Place, Publisher, retried

from edged.api import Device, Env, Image, Session
from edged.domain.job import Job, State
from edged.engine import reconciler
from edged.errors import EdgedError, Permanent, Reason, Transient
from edged.store import jobs, twins
from edged.testing.fake import FakePlugin
from edged.testing.node import TestNode, life


@dataclass
class Asking(FakePlugin):
    """The fake mapper, whose devices are asked first. ``answers`` are what they say in turn, None or an error; then None."""

    answers: list[EdgedError | None] = field(default_factory=list)
    prepared: list[int] = field(default_factory=list)
    hangs: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    @asynccontextmanager
    async def _connect(self, device: Device, env: Env) -> AsyncIterator[Session]:
        async with super()._connect(device, env) as session:
            asked: Any = session
            asked.prepare = self._prepare
            yield session

    async def _prepare(self, image: Image) -> None:
        self.prepared.append(image.size_bytes)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        while self.hangs:
            await asyncio.sleep(0.01)


@pytest.fixture
def plugin() -> Asking:
    return Asking()


@pytest.fixture
def place(tmp_path: Path, publisher: Publisher, plugin: Asking) -> Place:
    return Place(tmp_path / "state", publisher, plugin=plugin, engine=attrs.evolve(QUICK, max_attempts=3))


async def _deployed(node: TestNode, release: str) -> Job:
    await node.want("dev-1", release)
    return await node.ended("dev-1")


@pytest.mark.parametrize("slot_count", [1, 2])
def test_a_refusal_changes_nothing_and_is_not_gone_back_from(
    place: Place, plugin: Asking, slot_count: int
) -> None:
    device = place.device(slot_count=slot_count)
    plugin.answers = [Permanent(Reason.DEVICE_ERROR, "invalidKey")]

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            assert (await _deployed(node, "app@1.0.0")).state is State.SUCCEEDED
            twin = await node.store.read(lambda tx: twins.get(tx, "dev-1"))
            before, received = [bytes(slot) for slot in device.slots], device.counts.received
            job = await _deployed(node, "app@2.0.0")
            assert (job.state, job.reason, job.detail) == (State.FAILED, Reason.DEVICE_ERROR, "invalidKey")
            assert not job.touched and [bytes(slot) for slot in device.slots] == before
            assert device.counts.received == received, "bytes of an image were sent"
            after = await node.store.read(lambda tx: twins.get(tx, "dev-1"))
            assert after.reported["firmware"] == twin.reported["firmware"], "it runs what it ran"
            assert (await retried(node, place, job)).state is State.SUCCEEDED
            assert device.app is not None and device.app.version == "2.0.0"

    asyncio.run(run())


def test_a_device_that_is_busy_is_asked_again_and_then_told_of(place: Place, plugin: Asking) -> None:
    device = place.device()
    plugin.answers = [Transient(Reason.DEVICE_ERROR, "conditionsNotCorrect")] * 4

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            job = await _deployed(node, "app@2.0.0")
            assert (job.state, job.reason) == (State.FAILED, Reason.ATTEMPTS_EXHAUSTED)
            assert not job.touched and len(plugin.prepared) == 3 and device.counts.received == 0
            # it is not busy any more after the next try
            good = await retried(node, place, job)
            assert good.state is State.SUCCEEDED, good.detail
            assert len(plugin.prepared) == 5

    asyncio.run(run())


def test_a_job_can_be_cancelled_while_the_device_is_asked(place: Place, plugin: Asking) -> None:
    device = place.device()
    plugin.hangs = True

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            async with asyncio.timeout(20):
                while not plugin.prepared:
                    await asyncio.sleep(0.005)
            (job,) = await node.jobs("dev-1")
            assert job.state is State.READY
            node.engine.job_changed(
                await node.store.write(
                    lambda tx: reconciler.cancel(tx, jobs.get(tx, job.id), Reason.CANCELLED, "operator")
                )
            )
            ended = await node.ended("dev-1")
            assert (ended.state, ended.touched) == (State.CANCELLED, False)
            assert device.counts.received == 0

    asyncio.run(run())
