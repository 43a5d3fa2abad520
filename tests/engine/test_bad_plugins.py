"""Mappers that do what they must not: a job or a unit ends with a reason, the daemon does not."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import attrs
import pytest
from engine_kit import Place, Publisher

from edged.api import (
    Device,
    Env,
    Health,
    Identity,
    Phase,
    Session,
    SessionTraits,
    Slot,
    Slots,
)
from edged.domain.job import Job, State
from edged.errors import Reason, Transient
from edged.testing.fake import FakePlugin
from edged.testing.node import TestNode, life

Twist = Callable[..., Awaitable[Any]]


@dataclass
class BadPlugin(FakePlugin):
    """The fake mapper, with calls of its session replaced: ``twists`` has a function of (session, real call) by name."""

    twists: dict[str, Twist] = field(default_factory=dict)
    attributes: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    @asynccontextmanager
    async def _connect(self, device: Device, env: Env) -> AsyncIterator[Session]:
        async with super()._connect(device, env) as session:
            for name, twist in self.twists.items():
                setattr(session, name, _bound(twist, session, getattr(session, name)))
            for name, value in self.attributes.items():
                setattr(session, name, value)
            yield session


def _bound(twist: Twist, session: Any, real: Any) -> Any:
    return lambda *arguments: twist(session, real, *arguments)


@pytest.fixture
def place(tmp_path: Path, publisher: Publisher) -> Place:
    return Place(tmp_path / "state", publisher, plugin=BadPlugin())


def _deploy(place: Place, release: str = "app@2.0.0", wait_s: float = 20) -> Job:
    async def run() -> Job:
        async with life(place.config, place.plugins) as node:
            await node.want("dev-1", release)
            return await node.ended("dev-1", wait_s)

    return asyncio.run(run())


def _twist(place: Place, **twists: Twist) -> None:
    assert isinstance(place.plugin, BadPlugin)
    place.plugin.twists |= twists


async def _none(session: Any, real: Any, *args: Any) -> None:
    return None


async def _cancels_itself(session: Any, real: Any, *args: Any) -> None:
    raise asyncio.CancelledError


async def _exits(session: Any, real: Any, *args: Any) -> None:
    raise SystemExit(3)


async def _wrong_error(session: Any, real: Any, *args: Any) -> None:
    raise Transient("no answer")  # type: ignore[arg-type]


async def _noise(session: Any, real: Any, *args: Any) -> None:
    raise Transient(Reason.NO_RESPONSE, "\udcff" * 100_000)


def _not_async(session: Any, real: Any, *args: Any) -> Any:
    raise KeyError("sync")


async def _bad_slots(session: Any, real: Any, *args: Any) -> Slots:
    return Slots(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", ["identify", "slots", "stage", "activate", "check_health"])
@pytest.mark.parametrize("twist", [_cancels_itself, _exits, _wrong_error, _noise, _not_async])
def test_what_a_call_raises_ends_the_job(place: Place, call: str, twist: Twist) -> None:
    device = place.device()
    _twist(place, **{call: twist})
    job = _deploy(place)
    assert job.state in (State.FAILED, State.REVERTED), job
    assert len(job.detail) <= 2000
    assert device.counts.received <= 2 * 2048 * 8


def test_the_log_shows_where_a_mapper_failed_in_a_job(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.device()

    async def beyond_the_end(session: Any, real: Any, *args: Any) -> Any:
        return args[7]

    _twist(place, stage=beyond_the_end)
    _deploy(place)
    (first, *_) = [record for record in caplog.records if record.message == "plugin failed"]
    assert first.exc_info is not None
    shown = "".join(traceback.format_exception(first.exc_info[1]))
    assert "return args[7]" in shown and "in beyond_the_end" in shown


@pytest.mark.parametrize(
    ("call", "twist"),
    [
        ("identify", _none),
        ("slots", _none),
        ("slots", _bad_slots),
        ("read_flash", _none),
        ("check_health", _none),
    ],
)
def test_an_answer_of_another_kind_ends_the_job(place: Place, call: str, twist: Twist) -> None:
    place.device()
    _twist(place, **{call: twist})
    job = _deploy(place)
    assert job.state in (State.FAILED, State.REVERTED)
    assert job.reason is Reason.PLUGIN_FAILED or Reason.PLUGIN_FAILED.value in job.detail


def test_a_read_out_that_is_too_short_is_no_way_back(place: Place) -> None:
    device = place.device(app=None)
    device.install(b"factory" * 300)

    async def short(session: Any, real: Any, *args: Any) -> bytes:
        return bytes((await real(*args))[:100])

    _twist(place, read_flash=short)
    job = _deploy(place)
    assert (job.state, job.reason) == (State.FAILED, Reason.PLUGIN_FAILED)
    assert device.counts.received == 0


async def _hangs(session: Any, real: Any, *args: Any) -> None:
    await asyncio.sleep(3600)


@pytest.mark.parametrize("call", ["identify", "slots", "activate", "check_health"])
def test_a_call_that_hangs_is_given_up(place: Place, call: str) -> None:
    place.engine = attrs.evolve(place.engine, call_s=0.3, max_attempts=2)
    place.device()
    _twist(place, **{call: _hangs})
    assert _deploy(place).state in (State.FAILED, State.REVERTED)


@pytest.mark.parametrize("report", [(Phase.WRITE, 0.5, 2048), ("write", 1, 2048), ("chatter", 1, 1)])
def test_strange_progress_is_the_mappers_fault(place: Place, report: tuple[Any, Any, Any]) -> None:
    place.device()

    async def stage(session: Any, real: Any, image: Any, progress: Any) -> None:
        progress(*report)
        await asyncio.sleep(0.5)
        await real(image, progress)

    _twist(place, stage=stage)
    assert _deploy(place).state is not State.CANCELLED


def test_a_link_without_a_known_speed_is_no_fault(place: Place) -> None:
    place.device()

    async def stage(session: Any, real: Any, *args: Any) -> None:
        session.traits = replace(session.traits, ceiling_bytes_per_s=0)
        await real(*args)
        await asyncio.sleep(0.01)

    place.plugin.bus("bus").bytes_per_s = 50_000
    _twist(place, stage=stage)
    assert _deploy(place).state is State.SUCCEEDED


def test_two_slots_without_a_way_back_are_refused_before_the_first_byte(place: Place) -> None:
    device = place.device(slot_count=1, reads_back=False)

    async def identify(session: Any, real: Any, *args: Any) -> Any:
        session.traits = replace(session.traits, slot_count=2)
        return await real(*args)

    _twist(place, identify=identify)
    job = _deploy(place)
    assert (job.state, job.reason) == (State.FAILED, Reason.UNSUPPORTED)
    assert device.counts.received == 0


def test_no_slot_is_not_two_slots(place: Place) -> None:
    device = place.device(reads_back=False, tells=False)

    async def identify(session: Any, real: Any, *args: Any) -> Any:
        session.traits = replace(session.traits, slot_count=0)
        return await real(*args)

    _twist(place, identify=identify)
    job = _deploy(place)
    assert job.reason is Reason.NO_FALLBACK
    assert device.counts.received == 0


def test_a_device_with_two_slots_that_cannot_tell_is_not_reverted_for_ever(place: Place) -> None:
    device = place.device(slot_count=2)
    reverts = 0

    async def slots(session: Any, real: Any, *args: Any) -> Slots:
        return Slots(tuple(replace(slot, runs=None) for slot in (await real(*args)).slots))

    async def revert(session: Any, real: Any, *args: Any) -> None:
        nonlocal reverts
        reverts += 1
        await real(*args)

    _twist(place, slots=slots, revert=revert)
    job = _deploy(place, "app@3.0.0")
    assert (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED)
    assert reverts == 1
    assert device.app is not None and device.app.version == "1.0.0"


def test_a_slot_that_stays_pending_does_not_go_on_for_ever(place: Place) -> None:
    place.device(slot_count=2)
    reverts = 0

    async def slots(session: Any, real: Any, *args: Any) -> Slots:
        found: tuple[Slot, ...] = (await real(*args)).slots
        return (
            Slots(tuple(replace(slot, pending=not slot.active) for slot in found))
            if reverts
            else Slots(found)
        )

    async def revert(session: Any, real: Any, *args: Any) -> None:
        nonlocal reverts
        reverts += 1
        await real(*args)

    _twist(place, slots=slots, revert=revert)
    job = _deploy(place, "app@3.0.0")
    assert (job.state, job.reason) == (State.FAILED, Reason.REVERT_FAILED)
    assert reverts <= place.engine.max_attempts


def test_a_transfer_that_swallows_cancellation_is_left_behind(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edged.sessions.LET_GO_S", 0.1, raising=False)
    place.engine = attrs.evolve(place.engine, stall_s=0.3, max_attempts=2)
    place.device()
    over = asyncio.Event()

    async def stage(session: Any, real: Any, *args: Any) -> None:
        while not over.is_set():
            with suppress(asyncio.CancelledError):
                await over.wait()

    _twist(place, stage=stage)

    async def run() -> None:
        try:
            async with life(place.config, place.plugins) as node:
                await node.want("dev-1", "app@2.0.0")
                job = await node.ended("dev-1", 20)
                assert (job.state, job.reason) == (State.FAILED, Reason.REVERT_FAILED)
        finally:
            over.set()
            await asyncio.sleep(0.05)

    asyncio.run(run())


@pytest.mark.parametrize(("quiet_s", "transfers"), [(0.0, 2), (60.0, 1)])
def test_a_silence_that_the_mapper_announced_is_no_stall(
    place: Place, quiet_s: float, transfers: int
) -> None:
    place.engine = attrs.evolve(place.engine, stall_s=0.2)
    place.device()
    begun = 0

    async def slots(session: Any, real: Any, *args: Any) -> Slots:
        # the second transfer is not what this is about
        session.traits = replace(session.traits, quiet_s=60.0 if begun else quiet_s)
        found: Slots = await real(*args)
        return found

    async def stage(session: Any, real: Any, *args: Any) -> None:
        nonlocal begun
        begun += 1
        await asyncio.sleep(0.8 if begun == 1 else 0)
        await real(*args)

    _twist(place, slots=slots, stage=stage)
    assert _deploy(place).state is State.SUCCEEDED
    assert begun == transfers


async def _raises_when_cancelled(session: Any, real: Any, *args: Any) -> None:
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        raise OSError("the port is gone") from None


async def _returns_when_cancelled(session: Any, real: Any, *args: Any) -> Health:
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(3600)
    return Health(True, "")


@pytest.mark.parametrize("twist", [_raises_when_cancelled, _returns_when_cancelled])
def test_the_end_of_the_daemon_is_not_the_end_of_the_job(place: Place, twist: Twist) -> None:
    """A mapper that turns a cancellation into something else: the row stays as it is, and the next life goes on."""
    place.device()
    _twist(place, check_health=twist)

    async def in_state(node: TestNode, state: State) -> Job:
        async with asyncio.timeout(20):
            while not (found := await node.jobs("dev-1")) or found[0].state is not state:
                await asyncio.sleep(0.01)
        return found[0]

    async def first() -> None:
        async with asyncio.timeout(40), life(place.config, place.plugins) as node:
            await node.want("dev-1", "app@2.0.0")
            await in_state(node, State.VERIFYING)
            await asyncio.sleep(0.1)

    async def second() -> None:
        assert isinstance(place.plugin, BadPlugin)
        place.plugin.twists.clear()
        async with life(place.config, place.plugins) as node:
            assert (await node.ended("dev-1")).state is State.SUCCEEDED

    asyncio.run(first())
    asyncio.run(second())


def test_a_device_that_goes_back_during_its_health_check_has_not_passed(place: Place) -> None:
    device = place.device()
    begun = [bytes(slot) for slot in device.slots]

    async def goes_back(session: Any, real: Any, *args: Any) -> Any:
        health = await real(*args)
        device.slots[0][:] = begun[0]
        return health

    _twist(place, check_health=goes_back)
    job = _deploy(place)
    assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_REVERTED), job.detail
    assert "runs another image" in job.detail


@pytest.mark.parametrize("garbled", [1, 2])
def test_an_identity_that_came_in_garbled_is_asked_for_once_more(place: Place, garbled: int) -> None:
    """Once is noise, which must not end a job for good; twice is another device."""
    device = place.device()
    asked = 0
    assert isinstance(place.plugin, BadPlugin)
    # only a job asks then
    place.plugin.attributes["traits"] = SessionTraits(1e9, identify_disturbs=True)

    async def answers(session: Any, real: Any, *args: Any) -> Identity:
        nonlocal asked
        asked += 1
        identity: Identity = await real(*args)
        return replace(identity, hardware_id="fake:9") if asked <= garbled else identity

    _twist(place, identify=answers)
    job = _deploy(place)
    if garbled == 1:
        assert job.state is State.SUCCEEDED, job.detail
    else:
        assert (job.state, job.reason) == (State.FAILED, Reason.HARDWARE_MISMATCH)
        assert asked == 2 and device.counts.received == 0
