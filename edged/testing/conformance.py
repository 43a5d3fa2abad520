"""The kit that any mapper is run against.

Describe a device of yours as a :class:`Subject`, and run every check of :data:`CHECKS` on a fresh one, most simply with the
pytest plugin::

    def test_my_mapper(edged_conformance):        # one test per check
        asyncio.run(edged_conformance(make_subject()))

Each check raises ``AssertionError`` with what was expected. The kit drives the mapper as the engine does: through its
``connect``, with links from a shared pool, and with the verified reader as the only source of image bytes.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from edged.api import (
    Device,
    Image,
    Label,
    LinkSpec,
    MapperSpec,
    Phase,
    Reported,
    Session,
    SupportsFirmware,
    SupportsPreparation,
    SupportsReadBack,
    SupportsTrial,
)
from edged.clock import SystemClock
from edged.errors import Reason, Refused, Transient
from edged.links import LinkPool, device_env
from edged.sessions import DeviceUnit
from edged.testing.loop_watch import loop_turns
from edged_firmware.chunks import ChunkIndex
from edged_firmware.image import MemorySource, pack

CHUNK_BYTES = 512
CANCEL_S = 10.0
HALF_S = 120.0
"""So long may half of an image take."""
SILENCE_S = 120.0
"""So long may a call take to notice that nobody answers: the default of ``engine.call_s``."""
CHECK_S = 600.0
"""So long may a whole check take, on the slowest wire."""
HELD_S = 1.0
"""For so long nobody may hold the event loop."""
_WINDOW_BYTES = 16


async def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A device under test, real or simulated, in the state in which it left the factory.

    ``first`` and ``second`` are two applications as (address, bytes) segments, each larger than three write units and
    different from the first unit on. ``sent`` returns what went over the wire towards the device so far, the image's bytes in
    a row: where frames or blocks are smaller than a unit, what they carry, joined; ``holds`` the bytes of its flash at
    (address, length), of the slot that is written; ``written`` counts the image bytes that it stored so far. ``unit_bytes``
    is what it stores at once (a page). ``unplug`` and ``plug`` break and mend the wire. ``neighbour`` is a second device on
    the same link, where the wire can have one. ``mark_other``, with two slots: another client has the image in the slot that
    does not run booted on trial at the next reset. ``mute`` and ``unmute``: the wire stays and the device says nothing on it,
    where it can be made to. ``reports``: it reports by itself. ``resumes``: False where the device's
    own protocol makes every transfer begin anew, however well it can be read.
    """

    spec: MapperSpec
    links: Mapping[str, LinkSpec]
    device: Device
    first: list[tuple[int, bytes]]
    second: list[tuple[int, bytes]]
    sent: Callable[[], bytes]
    holds: Callable[[int, int], bytes]
    written: Callable[[], int]
    unit_bytes: int
    unplug: Callable[[], Awaitable[None]]
    plug: Callable[[], Awaitable[None]] = _nothing
    neighbour: Device | None = None
    mark_other: Callable[[], Awaitable[None]] | None = None
    mute: Callable[[], Awaitable[None]] | None = None
    unmute: Callable[[], Awaitable[None]] = _nothing
    reports: bool = True
    resumes: bool = True
    pool: LinkPool = field(init=False)

    def __post_init__(self) -> None:
        # one for all sessions, as in the daemon: a wire may outlive a session
        object.__setattr__(self, "pool", LinkPool(self.links))


Check = Callable[[Subject], Awaitable[None]]


class _Halfway:
    """A progress that fires once the half of what is to be written has been, and does ``then`` at that very moment: a device
    that pulls may have the rest before another task gets its turn."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.then: Callable[[], object] = lambda: None

    def __call__(self, phase: Phase, done_bytes: int, total_bytes: int) -> None:
        if phase is Phase.WRITE and done_bytes * 2 >= total_bytes and not self.reached.is_set():
            self.reached.set()
            self.then()

    async def is_reached_by(self, stage: asyncio.Future[None]) -> None:
        """Raises ``AssertionError`` where ``stage`` ends, or goes on for ever, and does not tell that half is written."""
        reached: asyncio.Future[Any] = asyncio.ensure_future(self.reached.wait())
        await asyncio.wait([stage, reached], timeout=HALF_S, return_when=asyncio.FIRST_COMPLETED)
        reached.cancel()
        if self.reached.is_set():
            return
        when = f"went on for {HALF_S:g} s" if not stage.done() else f"ended ({stage.exception()!r})"
        stage.cancel()
        raise AssertionError(
            f"stage {when} and did not tell progress(Phase.WRITE, ...) that half was written"
        )


def _quiet(phase: Phase, done_bytes: int, total_bytes: int) -> None:
    return None


async def _image(segments: list[tuple[int, bytes]], *, damaged_at: int | None = None) -> Image:
    """The verified reader over ``segments``; with ``damaged_at``, one bit of the file is not what was signed."""
    file = bytearray(pack(segments))
    index = ChunkIndex.build(bytes(file), CHUNK_BYTES)
    if damaged_at is not None:
        file[damaged_at] ^= 0x01
    label = Label("kit", hashlib.sha256(pack(segments)).hexdigest()[:12])
    return await Image.open(MemorySource(bytes(file)), index, label=label)


@asynccontextmanager
async def _connected(subject: Subject, device: Device | None = None) -> AsyncIterator[Session]:
    device = device or subject.device
    env = device_env(device.id, subject.pool)
    async with subject.spec.connect(device, env) as session:
        yield session


def _firmware(session: Session) -> SupportsFirmware:
    assert isinstance(session, SupportsFirmware), "the session does not take firmware"
    return session


def _assert_holds(subject: Subject, segments: list[tuple[int, bytes]]) -> None:
    for address, data in segments:
        assert subject.holds(address, len(data)) == data, (
            f"the device does not hold the image at {address:#x}"
        )


async def _stage(subject: Subject, segments: list[tuple[int, bytes]]) -> None:
    async with _connected(subject) as session:
        await session.identify()
        await _firmware(session).stage(await _image(segments), _quiet)


async def _interrupt(subject: Subject, segments: list[tuple[int, bytes]]) -> BaseException | None:
    """Cancel a stage when half is written; returns what came out."""
    halfway = _Halfway()
    async with _connected(subject) as session:
        await session.identify()
        task = asyncio.ensure_future(_firmware(session).stage(await _image(segments), halfway))
        halfway.then = task.cancel
        await halfway.is_reached_by(task)
        done, _ = await asyncio.wait([task], timeout=CANCEL_S)
        assert done, f"stage did not end within {CANCEL_S} s of its cancellation"
        return asyncio.CancelledError() if task.cancelled() else task.exception()


async def identity_is_stable(subject: Subject) -> None:
    """The same device answers the same, in one session and in the next."""
    async with _connected(subject) as session:
        first, again = await session.identify(), await session.identify()
    async with _connected(subject) as session:
        later = await session.identify()
    assert first == again == later, f"identities differ: {first}, {again}, {later}"
    assert first.hardware_id, "the hardware id is empty"


async def traits_are_honest(subject: Subject) -> None:
    """What the session says of itself agrees with what it can do."""
    async with _connected(subject) as session:
        await session.identify()
        slots = (await _firmware(session).slots()).slots
        assert session.traits.ceiling_bytes_per_s > 0, "the link's ceiling is not positive"
        assert len(slots) == session.traits.slot_count, "slots() and traits.slot_count differ"
        assert sum(slot.active for slot in slots) == 1, "not exactly one slot is active"
        two = session.traits.slot_count > 1
        assert two == isinstance(session, SupportsTrial), "two slots and confirm/revert go together"


async def stages_what_it_was_given(subject: Subject) -> None:
    """After ``stage`` the device holds the image, and ``activate`` works."""
    async with _connected(subject) as session:
        await session.identify()
        await _firmware(session).stage(await _image(subject.first), _quiet)
        _assert_holds(subject, subject.first)
        await _firmware(session).activate()


async def prepares_without_a_write(subject: Subject) -> None:
    """``prepare``, where there is one, stores no byte of an image, also twice; ``stage`` goes on from it."""
    async with _connected(subject) as session:
        await session.identify()
        image, before = await _image(subject.second), subject.written()
        if isinstance(session, SupportsPreparation):
            await session.prepare(image)
            await session.prepare(image)
        assert subject.written() == before, "something was written before stage"
        await _firmware(session).stage(image, _quiet)
    _assert_holds(subject, subject.second)


async def stage_is_idempotent(subject: Subject) -> None:
    """A second ``stage`` of the same image ends the same, and writes nothing where the device can be read."""
    await _stage(subject, subject.first)
    before = subject.written()
    async with _connected(subject) as session:
        await session.identify()
        await _firmware(session).stage(await _image(subject.first), _quiet)
        readable = isinstance(session, SupportsReadBack | SupportsTrial)
    _assert_holds(subject, subject.first)
    if readable:
        assert subject.written() == before, "bytes that the device had already were written again"


async def leaves_no_other_image_pending(subject: Subject) -> None:
    """Two slots: what runs is staged and activated while another image is pending; it runs then, and will after a reset."""
    if subject.mark_other is None:
        return
    async with _connected(subject) as session:
        await session.identify()
        assert isinstance(session, SupportsTrial), "mark_other is for devices with two slots"
        firmware = _firmware(session)
        await firmware.stage(await _image(subject.first), _quiet)
        await firmware.activate()
        await session.confirm()
        await firmware.stage(await _image(subject.second), _quiet)
    await subject.mark_other()
    async with _connected(subject) as session:
        await session.identify()
        firmware = _firmware(session)
        before = (await firmware.slots()).active
        await firmware.stage(await _image(subject.first), _quiet)
        await firmware.activate()
        after = await firmware.slots()
    assert before is not None and after.active is not None
    assert after.active.runs == before.runs, "another image was booted than the one that was staged"
    assert not any(slot.pending for slot in after.slots), "another image is still pending"


async def cancellation_comes_out(subject: Subject) -> None:
    """A cancelled ``stage`` ends by ``CancelledError``, and the next session works."""
    outcome = await _interrupt(subject, subject.first)
    assert isinstance(outcome, asyncio.CancelledError), f"stage swallowed its cancellation: {outcome!r}"
    await _stage(subject, subject.first)
    _assert_holds(subject, subject.first)


async def goes_on_from_the_device(subject: Subject) -> None:
    """After a cut in the middle, no more than one unit is written twice where the device lets it; else all of it once."""
    before = subject.written()
    await _interrupt(subject, subject.first)
    async with _connected(subject) as session:
        resumes = subject.resumes and isinstance(session, SupportsReadBack | SupportsTrial)
    await _stage(subject, subject.first)
    _assert_holds(subject, subject.first)
    size = sum(_padded(len(data), subject.unit_bytes) for _, data in subject.first)
    spent, allowed = subject.written() - before, size + subject.unit_bytes if resumes else 2 * size
    assert spent <= allowed, f"{spent} bytes were written for an image of {size} and one cut"


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


async def other_image_starts_again(subject: Subject) -> None:
    """Half of one image does not leak into another."""
    await _interrupt(subject, subject.first)
    await _stage(subject, subject.second)
    _assert_holds(subject, subject.second)


async def port_loss_is_transient(subject: Subject) -> None:
    """Unplugging in the middle raises ``Transient``; plugged in again, a new session goes on."""
    halfway = _Halfway()
    failure: BaseException | None = None
    try:
        async with _connected(subject) as session:
            await session.identify()
            task = asyncio.ensure_future(_firmware(session).stage(await _image(subject.first), halfway))
            await halfway.is_reached_by(task)
            await subject.unplug()
            done, _ = await asyncio.wait([task], timeout=30)
            assert done, "stage did not notice within 30 s that the wire is gone"
            failure = task.exception()
    except Transient as exc:
        failure = failure or exc
    finally:
        await subject.plug()
    assert isinstance(failure, Transient), f"unplugging raised {failure!r}, not Transient"
    await _stage(subject, subject.first)
    _assert_holds(subject, subject.first)


async def silence_is_transient(subject: Subject) -> None:
    """A device that says nothing: ``identify`` raises ``Transient`` for that, in time; when it speaks again, all goes on.

    Only where the subject can be muted.
    """
    failure: BaseException | None = None
    try:
        async with _connected(subject) as session:
            await session.identify()
            if subject.mute is None:
                return
            await subject.mute()
            task = asyncio.ensure_future(session.identify())
            done, _ = await asyncio.wait([task], timeout=SILENCE_S)
            task.cancel()
            assert done, f"identify waited for {SILENCE_S:g} s for an answer: put a time-out on each"
            failure = task.exception()
    except Transient as exc:
        failure = failure or exc
    finally:
        await subject.unmute()
    known = isinstance(failure, Transient) and failure.reason in (Reason.NO_RESPONSE, Reason.DEVICE_ABSENT)
    assert known, f"silence raised {failure!r}, not Transient for NO_RESPONSE or DEVICE_ABSENT"
    await _stage(subject, subject.first)
    _assert_holds(subject, subject.first)


async def leaves_the_loop_to_others(subject: Subject) -> None:
    """No call holds the event loop, on which all devices are served: what blocks belongs into a thread of the link."""
    async with loop_turns(HELD_S), _connected(subject) as session:
        await session.identify()
        await _firmware(session).slots()
        await _firmware(session).stage(await _image(subject.first), _quiet)
        await _firmware(session).activate()


async def no_unverified_byte_is_sent(subject: Subject) -> None:
    """A flipped bit in the image: refused, and the damaged bytes never reach the wire or the flash; the sound ones do."""
    address, data = subject.first[0]
    start = _to_be_written(subject)
    sound = data[start : start + _WINDOW_BYTES]
    at = start + _WINDOW_BYTES // 2
    damaged = bytearray(sound)
    damaged[at - start] ^= 0x01
    before = len(subject.sent())
    refusal = await _refusal(subject, at)
    assert isinstance(refusal, Refused), "an image with a flipped bit was staged"
    assert refusal.reason is Reason.CHUNK_MISMATCH, f"refused for {refusal.reason}, not for the chunk"
    assert damaged not in subject.sent()[before:], "damaged bytes went over the wire"
    assert subject.holds(address + start, _WINDOW_BYTES) != damaged, "damaged bytes are in the flash"
    refused = len(subject.sent())
    await _stage(subject, subject.first)
    # else the damaged ones were not looked for where they would have been
    assert sound in subject.sent()[refused:], "sent() does not show the image's bytes in a row"


def _to_be_written(subject: Subject) -> int:
    """Where 16 bytes of the first segment begin that lie in one unit, one that the device does not have."""
    address, data = subject.first[0]
    unit = subject.unit_bytes
    units = [at for at in range(0, len(data) - unit, unit) if at <= len(data) * 3 // 4]
    new = [at for at in units if subject.holds(address + at, unit) != data[at : at + unit]]
    assert new, "first: the device holds it already"
    return new[-1] + max(0, unit - _WINDOW_BYTES) // 2


async def _refusal(subject: Subject, at: int) -> Refused | None:
    """What comes out where a bit of byte ``at`` of the first segment is not what was signed."""
    header = len(pack(subject.first)) - sum(len(part) for _, part in subject.first)
    try:
        async with _connected(subject) as session:
            await session.identify()
            await _firmware(session).stage(await _image(subject.first, damaged_at=header + at), _quiet)
    except Refused as exc:
        return exc
    return None


async def reports_go_on_around_a_lease(subject: Subject) -> None:
    """Reports stop while the session is lent, and come again afterwards."""
    seen: list[Reported] = []
    more = asyncio.Event()

    async def report(reported: Reported) -> None:
        seen.append(reported)
        more.set()

    async def attached(session: Session) -> None:
        return None

    env = device_env(subject.device.id, subject.pool)
    unit = DeviceUnit(subject.device, subject.spec, env, report, attached, SystemClock())
    task = asyncio.create_task(unit.run())
    try:
        async with asyncio.timeout(60):
            await _one_more(more, subject.reports)
            async with unit.lease(20) as lease:
                await lease.session.identify()
                await _firmware(lease.session).stage(await _image(subject.first), _quiet)
                concurrent, during = lease.session.traits.concurrent, len(seen)
                await asyncio.sleep(0.3)
                assert concurrent or len(seen) == during, "reports went on while the session was lent"
                await _firmware(lease.session).activate()
            await _one_more(more, subject.reports)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _one_more(more: asyncio.Event, expected: bool) -> None:
    more.clear()
    if expected:
        await more.wait()


async def the_link_is_shared_or_refused(subject: Subject) -> None:
    """Two sessions through one link pool: both work on a shared wire; on an exclusive one the second is told who has it."""
    other = subject.neighbour or subject.device
    async with _connected(subject) as session:
        await session.identify()
        if subject.neighbour is None:
            await _expect_busy(subject, other)
            return
        async with _connected(subject, other) as second:
            identities = await asyncio.gather(session.identify(), second.identify())
            assert all(identity.hardware_id for identity in identities)
    assert not subject.pool.users(), "a link stayed open after its last user"


async def _expect_busy(subject: Subject, device: Device) -> None:
    try:
        async with _connected(subject, device):
            raise AssertionError("an exclusive wire was opened twice")
    except Transient as exc:
        assert exc.reason is Reason.LINK_BUSY, f"a wire in use raised {exc.reason}"


def _bounded(check: Check) -> Check:
    """A mapper that waits for ever is told so."""

    @functools.wraps(check)
    async def bounded(subject: Subject) -> None:
        limit = asyncio.timeout(CHECK_S)
        try:
            async with limit:
                await check(subject)
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise AssertionError(
                f"not ended after {CHECK_S:g} s: a call of the mapper waits for ever"
            ) from exc

    return bounded


CHECKS: tuple[Check, ...] = tuple(
    _bounded(check)
    for check in (
        identity_is_stable,
        traits_are_honest,
        stages_what_it_was_given,
        prepares_without_a_write,
        stage_is_idempotent,
        leaves_no_other_image_pending,
        cancellation_comes_out,
        goes_on_from_the_device,
        other_image_starts_again,
        port_loss_is_transient,
        silence_is_transient,
        leaves_the_loop_to_others,
        no_unverified_byte_is_sent,
        reports_go_on_around_a_lease,
        the_link_is_shared_or_refused,
    )
)
