"""Supervised units: back off, give up, wake; a cancellation always comes through."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from edged.clock import SystemClock
from edged.errors import Permanent, Reason, Transient
from edged.supervisor import RestartPolicy, Unit, UnitState

Body = Callable[[Unit], Awaitable[None]]
QUICK = RestartPolicy(crashes=3, first_s=0.01, longest_s=0.02)


def _watch(body: Body, see: Callable[[Unit], Awaitable[None]], policy: RestartPolicy = QUICK) -> None:
    async def run() -> None:
        unit = Unit("unit", body, policy, SystemClock())
        task = asyncio.create_task(unit.run())
        try:
            async with asyncio.timeout(20):
                await see(unit)
        finally:
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=20)
            assert done and task.cancelled(), "the cancellation was lost"

    asyncio.run(run())


async def _until(unit: Unit, state: UnitState) -> None:
    while unit.state is not state:
        await asyncio.sleep(0.001)


def test_errors_of_the_world_never_end_a_unit() -> None:
    async def body(unit: Unit) -> None:
        raise Transient(Reason.DEVICE_ABSENT, "gone")

    async def see(unit: Unit) -> None:
        while unit.restarts < 8:
            assert unit.state is not UnitState.GIVEN_UP
            await asyncio.sleep(0.001)
        assert (unit.reason, unit.detail) == (Reason.DEVICE_ABSENT, "gone")

    _watch(body, see)


@pytest.mark.parametrize(
    "error", [ValueError("bug"), Permanent(Reason.PLUGIN_FAILED, "bug"), asyncio.CancelledError()]
)
def test_faults_of_the_plugin_end_it_until_somebody_asks(error: BaseException) -> None:
    runs = 0

    async def body(unit: Unit) -> None:
        nonlocal runs
        runs += 1
        raise error

    async def see(unit: Unit) -> None:
        await _until(unit, UnitState.GIVEN_UP)
        assert (runs, unit.reason) == (3, Reason.PLUGIN_FAILED)
        await asyncio.sleep(0.05)
        assert runs == 3
        unit.wake()
        while runs < 4:
            await asyncio.sleep(0.001)
        await _until(unit, UnitState.GIVEN_UP)

    _watch(body, see)


def test_waking_ends_a_back_off_and_only_the_one_that_is_now() -> None:
    runs = 0

    async def body(unit: Unit) -> None:
        nonlocal runs
        runs += 1
        unit.wake()
        raise Transient(Reason.DEVICE_ABSENT)

    async def see(unit: Unit) -> None:
        await _until(unit, UnitState.BACKING_OFF)
        await asyncio.sleep(0.05)
        assert runs == 1, "who asked before the failure was heard already"
        unit.wake()
        while runs < 2:
            await asyncio.sleep(0.001)

    _watch(body, see, RestartPolicy(first_s=60, longest_s=60))


def test_a_body_that_returns_is_run_again() -> None:
    runs = 0

    async def body(unit: Unit) -> None:
        nonlocal runs
        runs += 1
        unit.running()
        await asyncio.sleep(0)

    async def see(unit: Unit) -> None:
        while runs < 5:
            await asyncio.sleep(0.001)
        assert unit.restarts == 0

    _watch(body, see)


async def _swallows(unit: Unit) -> None:
    unit.running()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(60)


async def _turns_into_an_error(unit: Unit) -> None:
    unit.running()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        raise OSError("the port is gone") from None


async def _turns_into_an_error_of_the_world(unit: Unit) -> None:
    unit.running()
    try:
        await asyncio.sleep(60)
    finally:
        raise Transient(Reason.LINK_LOST)


@pytest.mark.parametrize("body", [_swallows, _turns_into_an_error, _turns_into_an_error_of_the_world])
def test_what_becomes_of_a_cancellation_in_a_plugin_does_not_matter(body: Body) -> None:
    async def see(unit: Unit) -> None:
        await _until(unit, UnitState.RUNNING)

    _watch(body, see)
