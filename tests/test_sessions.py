"""Who has the session: one borrower at a time, none for ever, and nobody after an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from edged.api import Device, Env, Identity, MapperSpec, Reported, Session, SessionTraits
from edged.clock import SystemClock
from edged.errors import EdgedError, Permanent, Reason, Transient
from edged.sessions import DeviceUnit, Sessions
from edged.supervisor import RestartPolicy, UnitState


class Talking:
    """A session that reports a count for ever."""

    traits = SessionTraits(ceiling_bytes_per_s=1000)

    def __init__(self, mapper: Mapper) -> None:
        self.mapper = mapper

    async def identify(self) -> Identity:
        return Identity("hw")

    async def reports(self) -> AsyncIterator[Reported]:
        self.mapper.reporting += 1
        count = 0
        try:
            while True:
                yield Reported("count", count)
                count += 1
                await asyncio.sleep(0.001)
        finally:
            self.mapper.reporting -= 1


@dataclass
class Mapper:
    """Opens sessions of ``kind``; ``faults`` are raised by the next connections, first to last."""

    kind: Callable[[Mapper], Any] = Talking
    faults: list[BaseException] = field(default_factory=list)
    opened: int = 0
    open: int = 0
    reporting: int = 0

    @asynccontextmanager
    async def connect(self, device: Device, env: Env) -> AsyncIterator[Session]:
        if self.faults:
            raise self.faults.pop(0)
        self.opened += 1
        self.open += 1
        try:
            yield self.kind(self)
        finally:
            self.open -= 1


@dataclass
class Seen:
    reports: list[Reported] = field(default_factory=list)
    attached: int = 0
    beside: int = 0
    """Reports that were being read while the session was attached."""


Check = Callable[[DeviceUnit, Seen], Awaitable[None]]


def _run(connect: Any, check: Check, *, watch: bool = True, call_s: float = 5, policy: Any = None) -> None:
    async def run() -> None:
        seen = Seen()

        async def report(reported: Reported) -> None:
            seen.reports.append(reported)

        async def attached(session: Session) -> None:
            seen.attached += 1
            seen.beside += isinstance(session, Talking) and session.mapper.reporting

        spec = MapperSpec("test", connect, dict)
        unit = DeviceUnit(
            Device("dev", "model", "test", "test:1"),
            spec,
            None,  # type: ignore[arg-type]
            report,
            attached,
            SystemClock(),
            watch=watch,
            call_s=call_s,
            policy=policy or RestartPolicy(first_s=0.01, longest_s=0.02),
        )
        task = asyncio.create_task(unit.run())
        try:
            async with asyncio.timeout(20):
                await check(unit, seen)
        finally:
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=20)
            assert done and task.cancelled(), "the unit did not end"

    asyncio.run(run())


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_reports_stop_while_the_session_is_lent_and_go_on_afterwards() -> None:
    mapper = Mapper()

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        await _until(lambda: len(seen.reports) > 2)
        async with unit.lease(20):
            assert mapper.reporting == 0
            count = len(seen.reports)
            await asyncio.sleep(0.02)
            assert len(seen.reports) == count
        await _until(lambda: len(seen.reports) > count)
        assert (mapper.opened, seen.attached) == (1, 1)

    _run(mapper.connect, check)


def test_reports_stop_while_a_device_is_told_what_has_changed() -> None:
    """Two readers on one line would take each other's answers."""
    mapper = Mapper()

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        await _until(lambda: len(seen.reports) > 2)
        for times in range(2, 5):
            unit.refresh()
            await _until(lambda times=times: seen.attached == times)  # type: ignore[misc]
            count = len(seen.reports)
            await _until(lambda count=count: len(seen.reports) > count)  # type: ignore[misc]
        assert (mapper.opened, seen.beside) == (1, 0)

    _run(mapper.connect, check)


def test_one_borrower_at_a_time_in_the_order_of_asking() -> None:
    mapper, order = Mapper(), []

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        async def borrow(number: int) -> None:
            async with unit.lease(20):
                order.append(number)
                await asyncio.sleep(0.01)
                order.append(number)

        await asyncio.gather(*(borrow(number) for number in range(4)))

    _run(mapper.connect, check)
    assert order == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_lease_that_takes_too_long_is_given_up_and_hinders_nobody() -> None:
    mapper = Mapper()

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        async with unit.lease(20):
            with pytest.raises(Transient) as caught:
                async with unit.lease(0.02):
                    raise AssertionError("lent twice")
            assert caught.value.reason is Reason.LINK_BUSY
        async with unit.lease(20):
            pass

    _run(mapper.connect, check)


def test_after_an_error_or_a_doubt_the_session_is_a_fresh_one() -> None:
    mapper = Mapper()

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        with pytest.raises(ValueError, match="body"):
            async with unit.lease(20):
                raise ValueError("body")
        async with unit.lease(20) as lease:
            assert mapper.opened == 2
            lease.intact = False
        async with unit.lease(20):
            assert mapper.opened == 3
        async with unit.lease(20):
            assert mapper.opened == 3

    _run(mapper.connect, check)


def test_a_borrower_that_is_cancelled_gives_back() -> None:
    mapper = Mapper()

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        async def borrow() -> None:
            async with unit.lease(20):
                await asyncio.sleep(60)

        tasks = [asyncio.create_task(borrow()) for _ in range(3)]
        await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        async with unit.lease(20):
            pass

    _run(mapper.connect, check)


def test_what_connecting_raised_is_what_the_borrowers_hear_and_asking_again_helps() -> None:
    mapper = Mapper(faults=[Transient(Reason.DEVICE_ABSENT, "gone")])

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        with pytest.raises(Transient) as caught:
            async with unit.lease(20):
                pass
        assert caught.value.reason is Reason.DEVICE_ABSENT
        async with unit.lease(20):
            pass

    _run(mapper.connect, check, watch=False, policy=RestartPolicy(first_s=60, longest_s=60))


@pytest.mark.parametrize(
    "fault",
    [
        ValueError("bug"),
        asyncio.CancelledError(),
        SystemExit(1),
        Transient("no answer"),  # type: ignore[arg-type]
    ],
)
def test_a_fault_of_the_plugin_is_named_and_the_unit_lives(fault: BaseException) -> None:
    mapper = Mapper(faults=[fault])

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        with pytest.raises(Permanent) as caught:
            async with unit.lease(20):
                pass
        assert caught.value.reason is Reason.PLUGIN_FAILED
        async with unit.lease(20):
            pass

    _run(mapper.connect, check, watch=False)


def test_without_watching_the_session_is_there_only_while_it_is_lent() -> None:
    mapper = Mapper()

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        await asyncio.sleep(0.02)
        assert mapper.opened == 0
        async with unit.lease(20):
            assert mapper.open == 1
        await _until(lambda: mapper.open == 0)
        assert seen.reports == []
        unit.refresh()
        await _until(lambda: mapper.opened == 2 and mapper.open == 0)

    _run(mapper.connect, check, watch=False)


def test_a_device_that_stops_reporting_is_connected_anew() -> None:
    class Silent(Talking):
        async def reports(self) -> AsyncIterator[Reported]:
            return
            yield

    mapper = Mapper(Silent)

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        await _until(lambda: mapper.opened > 2)
        await _until(lambda: unit.unit.reason is Reason.LINK_LOST)
        assert mapper.open <= 1

    _run(mapper.connect, check)


def test_reports_that_never_wait_do_not_keep_the_loop() -> None:
    class Flood(Talking):
        async def reports(self) -> AsyncIterator[Reported]:
            while True:
                yield Reported("count", 1)

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        await _until(lambda: len(seen.reports) > 10)
        async with unit.lease(20):
            pass

    _run(Mapper(Flood).connect, check)


def test_reports_that_swallow_cancellation_are_the_plugins_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edged.sessions.LET_GO_S", 0.05)
    begun, over = asyncio.Event(), asyncio.Event()

    class Stubborn(Talking):
        async def reports(self) -> AsyncIterator[Reported]:
            begun.set()
            while not over.is_set():
                with suppress(asyncio.CancelledError):
                    await over.wait()
            yield Reported("count", 1)

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        await begun.wait()
        with pytest.raises(EdgedError) as caught:
            async with unit.lease(20):
                pass
        over.set()
        assert caught.value.reason in (Reason.PLUGIN_FAILED, Reason.LINK_BUSY)
        await asyncio.sleep(0.05)

    _run(Mapper(Stubborn).connect, check)


class Caller:
    """A device that comes by itself: ``here`` says whether it is there."""

    def __init__(self) -> None:
        self.here = asyncio.Event()
        self.gone = asyncio.Event()
        self.opened = 0

    @asynccontextmanager
    async def connect(self, device: Device, env: Env) -> AsyncIterator[Any]:
        self.opened += 1
        self.env = env
        if not self.here.is_set():
            with env.away("it sleeps"):
                await self.here.wait()
        yield self

    traits = SessionTraits(1.0)

    async def reports(self) -> AsyncIterator[Reported]:
        while True:
            yield Reported("x", 1)
            await self.gone.wait()
            with self.env.away("it sleeps again"):
                await self.here.wait()


def test_whoever_wants_a_device_that_is_away_is_told_at_once_and_its_return_attaches_it_anew() -> None:
    caller = Caller()

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        await _until(lambda: unit.unit.state is UnitState.ABSENT)
        assert (unit.unit.reason, unit.unit.detail) == (Reason.DEVICE_ABSENT, "it sleeps")
        # longer than connecting may take
        await asyncio.sleep(0.3)
        with pytest.raises(Transient, match="it sleeps") as caught:
            async with unit.lease(30):
                raise AssertionError("lent")
        assert caught.value.reason is Reason.DEVICE_ABSENT
        unit.refresh()
        caller.here.set()
        await _until(lambda: seen.attached == 1 and unit.unit.state is UnitState.RUNNING)
        caller.here.clear()
        caller.gone.set()
        await _until(lambda: unit.unit.state is UnitState.ABSENT)
        unit.refresh()
        await asyncio.sleep(0.05)
        assert seen.attached == 1, "a device that is away was attached"
        caller.gone.clear()
        caller.here.set()
        await _until(lambda: seen.attached == 2)
        async with unit.lease(20) as lease:
            assert lease.session is caller
        assert caller.opened == 1, "the session was opened again in between"

    _run(caller.connect, check, call_s=0.2)


def test_a_borrower_that_waits_while_the_device_goes_is_turned_away() -> None:
    caller = Caller()

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        caller.here.set()
        await _until(lambda: seen.attached == 1)
        async with unit.lease(20):
            waiting = asyncio.create_task(_borrow(unit))
            await asyncio.sleep(0.01)
            with caller.env.away("left"), pytest.raises(Transient, match="left"):
                await waiting

    _run(caller.connect, check)


async def _borrow(unit: DeviceUnit) -> None:
    async with unit.lease(20):
        pass


def test_connecting_that_hangs_is_given_up_and_tried_again() -> None:
    tries = 0

    @asynccontextmanager
    async def connect(device: Device, env: Env) -> AsyncIterator[Session]:
        nonlocal tries
        tries += 1
        if tries < 3:
            await asyncio.sleep(3600)
        yield Talking(Mapper())

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        with pytest.raises(Transient) as caught:
            async with unit.lease(20):
                pass
        assert caught.value.reason is Reason.NO_RESPONSE
        await _until(lambda: unit.unit.state is UnitState.RUNNING)

    _run(connect, check, call_s=0.05)


def test_closing_that_hangs_is_given_up() -> None:
    opened = 0

    @asynccontextmanager
    async def connect(device: Device, env: Env) -> AsyncIterator[Session]:
        nonlocal opened
        opened += 1
        try:
            yield Talking(Mapper())
        finally:
            await asyncio.sleep(3600)

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        async with unit.lease(20) as lease:
            lease.intact = False
        await _until(lambda: opened == 2)

    _run(connect, check, call_s=0.05)


def test_a_mapper_cannot_hide_what_happened() -> None:
    opened = 0

    @asynccontextmanager
    async def connect(device: Device, env: Env) -> AsyncIterator[Session]:
        nonlocal opened
        opened += 1
        with suppress(BaseException):
            yield Lost(Mapper())

    class Lost(Talking):
        async def reports(self) -> AsyncIterator[Reported]:
            raise Transient(Reason.LINK_LOST)
            yield

    async def check(unit: DeviceUnit, seen: Seen) -> None:
        began = asyncio.get_running_loop().time()
        await _until(lambda: opened > 5)
        assert asyncio.get_running_loop().time() - began > 0.04, "no back-off"
        assert unit.unit.restarts > 0

    _run(connect, check)


def test_an_unknown_device_is_refused_with_those_there_are() -> None:
    with pytest.raises(Permanent, match="none is configured") as caught:
        Sessions({})["dev"]
    assert caught.value.reason is Reason.DEVICE_UNKNOWN
