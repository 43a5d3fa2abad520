"""What a wait costs, what a clock that jumps does, and what is checked again after a long wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import attrs
import pytest
from engine_kit import QUICK, Place, Publisher, until

from edged.api import Device, Env, Session
from edged.domain.job import Job, State
from edged.errors import Reason, Transient
from edged.store import audit, jobs, outbox
from edged.testing.fake import FakeDevice, FakePlugin, fake_app
from edged.testing.node import TestNode, life


@dataclass
class Unplugged(FakePlugin):
    """The fake mapper, whose port is not there while ``gone``; ``tries`` counts who looked."""

    gone: bool = True
    tries: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    @asynccontextmanager
    async def _connect(self, device: Device, env: Env) -> AsyncIterator[Session]:
        if self.gone:
            self.tries += 1
            raise Transient(Reason.DEVICE_ABSENT, f"the port is not there, try {self.tries}")
        async with super()._connect(device, env) as session:
            yield session


@pytest.fixture
def plugin() -> Unplugged:
    return Unplugged()


@pytest.fixture
def place(tmp_path: Path, publisher: Publisher, plugin: Unplugged) -> Place:
    return Place(tmp_path / "state", publisher, plugin=plugin, engine=attrs.evolve(QUICK, max_steps=15))


async def _waiting(node: TestNode) -> Job:
    async with asyncio.timeout(20):
        while not (found := await node.jobs("dev-1")) or found[0].waiting is None:
            await asyncio.sleep(0.005)
    return found[0]


async def _wait_for_the_device(place: Place) -> None:
    """A life in which a job is admitted and fetched, and then waits for its device."""
    async with life(place.config, place.plugins) as node:
        await node.want("dev-1", "app@2.0.0")
        assert (await _waiting(node)).state is State.READY


def test_a_device_that_is_away_for_long_costs_neither_steps_nor_rows(place: Place, plugin: Unplugged) -> None:
    place.device()

    async def rows(node: TestNode, job: Job) -> tuple[int, int, int]:
        return await node.store.read(
            lambda tx: (audit.head(tx).seq, outbox.head(tx), len(jobs.history(tx, job.id)))
        )

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            job = await _waiting(node)
            before, tries = await rows(node, job), plugin.tries
            async with asyncio.timeout(20):
                while plugin.tries < tries + 2 * place.engine.max_steps:
                    await asyncio.sleep(0.01)
            job = (await node.jobs("dev-1"))[0]
            assert job.state is State.READY, (job.state, job.reason, job.detail)
            assert job.waiting is None or f"try {plugin.tries}"[:5] in job.waiting.detail
            assert await rows(node, job) == before
            plugin.gone = False
            assert (await node.ended("dev-1")).state is State.SUCCEEDED

    asyncio.run(run())


def test_a_clock_that_is_set_does_not_end_a_job(place: Place, plugin: Unplugged) -> None:
    """A board without a clock begins in 1970; then the network tells it the time."""
    place.device()
    now = datetime(1970, 1, 1, tzinfo=UTC)

    async def run() -> None:
        nonlocal now
        async with life(place.config, place.plugins, now=lambda: now) as node:
            await node.want("dev-1", "app@2.0.0")
            await _waiting(node)
            now = datetime.now(UTC)
            # a try that is under way could end the job before the engine looks at the clock
            await node.engine.ping()
            plugin.gone = False
            job = await node.ended("dev-1")
            assert job.state is State.SUCCEEDED, job.detail
            assert job.deadline > now

    asyncio.run(run())


def test_deadlines_of_earlier_lives_come_no_nearer_and_go_no_farther(place: Place, plugin: Unplugged) -> None:
    """A board without a battery begins in 1970 at each boot until it is told the time; another keeps a wrong one."""
    place.device()
    right = datetime.now(UTC)
    now = right

    async def boot(begins: datetime) -> Job:
        nonlocal now
        now = begins
        async with life(place.config, place.plugins, now=lambda: now) as node:
            await node.engine.ping()
            now = right
            await node.engine.ping()
            return (await node.jobs("dev-1"))[0]

    async def run() -> None:
        async with life(place.config, place.plugins, now=lambda: now) as node:
            await node.want("dev-1", "app@2.0.0")
            first = (await _waiting(node)).deadline
        for begins in (
            datetime(1970, 1, 1, tzinfo=UTC),
            right + timedelta(days=5),
            right - timedelta(days=9),
        ):
            job = await boot(begins)
            assert abs(job.deadline - first) < timedelta(minutes=1), (begins, job.deadline, first)
            assert not job.state.ended, (begins, job.reason, job.detail)

    asyncio.run(run())


def test_a_clock_that_is_set_back_by_seconds_keeps_nobody_busy(place: Place, plugin: Unplugged) -> None:
    place.device()
    back = timedelta()

    async def run() -> None:
        nonlocal back
        place.engine = attrs.evolve(place.engine, first_backoff_s=30, longest_backoff_s=30)
        async with life(place.config, place.plugins, now=lambda: datetime.now(UTC) - back) as node:
            await node.want("dev-1", "app@2.0.0")
            await _waiting(node)
            back = timedelta(seconds=40)
            await node.engine.ping()
            turns = node.engine.turns
            await asyncio.sleep(1)
            assert node.engine.turns <= turns + 2

    asyncio.run(run())


@pytest.mark.parametrize("by", [timedelta(days=8), timedelta(days=-8)])
def test_a_clock_that_is_set_while_bytes_move_disturbs_nobody(
    tmp_path: Path, publisher: Publisher, by: timedelta
) -> None:
    """The deadline is the time that passes, not what the clock says; and it is still a deadline afterwards."""
    place = Place(tmp_path / "state", publisher)
    device, step = place.device(), timedelta()
    bus = place.plugin.buses["bus"]
    bus.bytes_per_s = 20_000

    async def run() -> None:
        nonlocal step
        async with life(place.config, place.plugins, now=lambda: datetime.now(UTC) + step) as node:
            await node.want("dev-1", "app@2.0.0")
            async with asyncio.timeout(20):
                while not device.counts.pages_written:
                    await asyncio.sleep(0.005)
            # so that it is not through before the engine has looked at the clock
            bus.bytes_per_s = 500
            (before,) = await node.jobs("dev-1")
            step = by
            await node.engine.ping()
            bus.bytes_per_s = 20_000
            job = await node.ended("dev-1")
            assert job.state is State.SUCCEEDED, (job.reason, job.detail)
            assert abs(job.deadline - before.deadline - by) < timedelta(seconds=10)
            events = [entry.event for entry in await node.store.read(lambda tx: jobs.history(tx, job.id))]
            assert events.count("clock was set") == 1 and job.trial_boots == 1
            set_by = [row.data for row in await node.store.read(audit.list) if row.event == "clock.set"]
            assert set_by == [{"by_s": by.total_seconds(), "jobs": 1}]

    asyncio.run(run())


class FallsSilent:
    """The device answers nobody any more after each of ``pages`` that are written."""

    def __init__(self, device: FakeDevice, *pages: int) -> None:
        self.device = device
        self.pages = pages

    def effect(self, name: str, apply: Callable[[], None], torn: Callable[[], None] | None = None) -> None:
        apply()
        if name == "device.page" and self.device.counts.pages_written in self.pages:
            self.device.absent = True


def test_a_device_that_is_silent_between_two_images_is_waited_for(place: Place, plugin: Unplugged) -> None:
    """Its cable, or its supply: more attempts in vain than a job has, in the middle of the write and on the way back."""
    plugin.gone = False
    device = place.device()
    # two of the eight pages of the image; and one of the way back
    device.effects = FallsSilent(device, 2, 9)

    async def silent(node: TestNode, state: State) -> None:
        await until(lambda: device.absent)
        async with asyncio.timeout(20):
            while (job := (await node.jobs("dev-1"))[0]).attempts <= place.engine.max_attempts:
                await asyncio.sleep(0.005)
        assert job.state is state and job.waiting is not None
        assert job.waiting.reason is Reason.DEVICE_ABSENT and "nobody answers" in job.waiting.detail
        # its wire is opened again at each try, and says nothing of the device
        node.engine.device_returned("dev-1")
        await node.engine.ping()
        assert (await node.jobs("dev-1"))[0].attempts >= job.attempts
        device.absent = False

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@3.0.0")
            await silent(node, State.STAGING)
            await silent(node, State.REVERTING)
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED), job.detail
            assert device.app is not None and device.app.version == "1.0.0"

    asyncio.run(run())


def test_a_device_that_never_answers_is_told_of_before_anything_is_changed(
    place: Place, plugin: Unplugged
) -> None:
    plugin.gone = False
    place.device().absent = True

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.FAILED, Reason.ATTEMPTS_EXHAUSTED), job.detail
            assert "does not answer" in job.detail and not job.touched

    asyncio.run(run())


def test_a_wait_that_the_clock_left_behind_is_over(place: Place, plugin: Unplugged) -> None:
    """The node comes back without knowing the time: what it waited for was in another century."""
    place.device()
    now = datetime.now(UTC)

    async def begin() -> None:
        async with life(place.config, place.plugins, now=lambda: now) as node:
            await node.want("dev-1", "app@2.0.0")
            await _waiting(node)

    async def go_on() -> None:
        async with life(place.config, place.plugins, now=lambda: now) as node:
            assert (await node.ended("dev-1")).state is State.SUCCEEDED

    asyncio.run(begin())
    plugin.gone, now = False, datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=5)
    asyncio.run(go_on())


def test_what_was_admitted_for_another_configuration_is_not_sent(place: Place, plugin: Unplugged) -> None:
    device = place.device()

    async def go_on() -> None:
        config = place.config
        gadget = attrs.evolve(config.models["widget"], id="gadget")
        config = attrs.evolve(
            config, model=(gadget,), device=(attrs.evolve(config.devices["dev-1"], model="gadget"),)
        )
        async with life(config, place.plugins) as node:
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.FAILED, Reason.MODEL_MISMATCH)

    asyncio.run(_wait_for_the_device(place))
    plugin.gone = False
    asyncio.run(go_on())
    assert device.counts.received == 0


@pytest.mark.parametrize("reachable", [True, False])
def test_what_was_withdrawn_while_the_job_waited_is_not_sent(
    tmp_path: Path, publisher: Publisher, plugin: Unplugged, reachable: bool
) -> None:
    publisher = publisher.copy(tmp_path / "publisher")
    place = Place(tmp_path / "node", publisher, plugin)
    device = place.device()

    async def go_on() -> None:
        config = place.config
        if not reachable:
            config = attrs.evolve(config, trust=attrs.evolve(config.trust, repository="http://127.0.0.1:1"))
        async with life(config, place.plugins) as node:
            job = await node.ended("dev-1")
            if reachable:
                assert (job.state, job.reason) == (State.FAILED, Reason.RELEASE_UNKNOWN)
            else:
                assert job.state is State.SUCCEEDED, job.detail

    asyncio.run(_wait_for_the_device(place))
    publisher.withdraw("2.0.0")
    plugin.gone = False
    asyncio.run(go_on())
    assert (device.counts.received == 0) is reachable


def test_what_another_publisher_calls_the_same_is_not_taken_for_it(
    tmp_path: Path, publisher: Publisher, plugin: Unplugged
) -> None:
    place = Place(tmp_path / "node", publisher, plugin)
    device = place.device()
    other = Publisher(tmp_path / "other").init()
    for version in ("2.0.0", "3.0.0"):
        other.add(version, fake_app("2.0.0", 1024))
    for _ in range(3):
        other.publish()

    async def go_on() -> None:
        place.publisher = other
        async with life(place.config, place.plugins) as node:
            job = await node.ended("dev-1")
            assert (job.state, job.reason) == (State.FAILED, Reason.RELEASE_UNKNOWN)
            assert "another image" in job.detail

    asyncio.run(_wait_for_the_device(place))
    plugin.gone = False
    asyncio.run(go_on())
    assert device.counts.received == 0


def test_a_transfer_ends_at_its_deadline(place: Place, plugin: Unplugged) -> None:
    plugin.gone = False
    place.device(reads_back=False, tells=False)
    place.without_fallback = True
    place.plugin.bus("bus").bytes_per_s = 100
    place.engine = attrs.evolve(place.engine, deadline_s=1.5, max_attempts=2)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            job = await node.ended("dev-1")
            assert Reason.DEADLINE_PASSED.value in f"{job.reason} {job.detail}"

    asyncio.run(run())
