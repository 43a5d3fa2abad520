"""Reports of devices: the newest value wins, many are one commit, and a store that fails loses none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import pytest

from edged import reports
from edged.api import JsonValue, Reported
from edged.clock import SystemClock
from edged.engine.events import Broadcast
from edged.errors import Reason, Transient
from edged.store import Store, Tx, twins

T = TypeVar("T")


class _Impatient(SystemClock):
    """A clock that does not wait."""

    def now(self) -> datetime:
        return datetime(2026, 12, 1, tzinfo=UTC)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)


class _Counting:
    """A store that counts its writes, and is full where it was told to be."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.writes = 0
        self.full = 0

    async def write(self, fn: Callable[[Tx], T]) -> T:
        self.writes += 1
        if self.full:
            self.full -= 1
            raise Transient(Reason.DISK_FULL, "no space")
        return await self.inner.write(fn)


def run(path: Path, body: Callable[[reports.Reports, _Counting, Broadcast], Any]) -> None:
    async def life() -> None:
        clock, broadcast = _Impatient(), Broadcast()
        async with Store.open(path / "edged.db", clock) as store:
            counting = _Counting(store)
            await body(reports.Reports(counting, clock, broadcast, 10.0), counting, broadcast)  # type: ignore[arg-type]

    asyncio.run(life())


async def reported(store: _Counting, device: str) -> dict[str, object]:
    twin = await store.inner.read(lambda tx: twins.get(tx, device))
    return {name: value.value for name, value in twin.reported.items()}


def test_many_values_are_one_commit_and_the_newest_wins(tmp_path: Path) -> None:
    async def body(taken: reports.Reports, store: _Counting, broadcast: Broadcast) -> None:
        with broadcast.watch() as queue:
            for number in range(100):
                await taken.put("one", Reported("level", number))
                await taken.put("two", Reported("level", -number))
            await taken.flush()
            await taken.flush()
            assert store.writes == 1
            assert await reported(store, "one") == {"level": 99}
            assert await reported(store, "two") == {"level": -99}
            assert [queue.get_nowait()["value"] for _ in range(2)] == [99, -99]
            await taken.put("one", Reported("level", 99))
            await taken.flush()
            assert queue.empty()

    run(tmp_path, body)


def test_what_a_full_disk_did_not_take_is_stored_later_unless_it_is_old(tmp_path: Path) -> None:
    async def body(taken: reports.Reports, store: _Counting, _: Broadcast) -> None:
        store.full = 2
        await taken.put("one", Reported("level", 1))
        await taken.put("one", Reported("mode", "auto"))
        await taken.flush()
        await taken.put("one", Reported("level", 2))
        task = asyncio.create_task(taken.run())
        async with asyncio.timeout(20):
            while await reported(store, "one") != {"level": 2, "mode": "auto"}:
                await asyncio.sleep(0.01)
        task.cancel()

    run(tmp_path, body)


def test_who_reports_more_names_than_fit_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "MOST_WAITING", 3)

    async def body(taken: reports.Reports, store: _Counting, _: Broadcast) -> None:
        for number in range(3):
            await taken.put("one", Reported(f"p{number}", number))
        await taken.put("one", Reported("p0", "again"))
        waiting = asyncio.create_task(taken.put("one", Reported("p3", 3)))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await taken.flush()
        await waiting
        await taken.flush()
        assert await reported(store, "one") == {"p0": "again", "p1": 1, "p2": 2, "p3": 3}

    run(tmp_path, body)


def nested(levels: int) -> JsonValue:
    value: JsonValue = 1
    for _ in range(levels):
        value = [value]
    return value


def test_values_that_are_large_but_can_be_read_again_are_kept(tmp_path: Path) -> None:
    values = {"list": nested(32), "text": "x" * 65_534, "object": {"a": [nested(30)]}}

    async def body(taken: reports.Reports, store: _Counting, _: Broadcast) -> None:
        for name, value in values.items():
            await taken.put("one", Reported(name, value))
        await taken.flush()
        assert await reported(store, "one") == values

    run(tmp_path, body)


@pytest.mark.parametrize(
    "bad",
    [
        Reported("level", float("nan")),
        Reported("level", "\ud800"),
        Reported("level", {"a": ["\udcff"]}),
        Reported("level", nested(33)),
        Reported("level", "x" * 65_535),
        Reported("level", b"raw"),  # type: ignore[arg-type]
        Reported("level", object()),  # type: ignore[arg-type]
        Reported("", 1),
        Reported("\udcff", 1),
        Reported(None, 1),  # type: ignore[arg-type]
        Reported("level", 1, "\udcff"),
        Reported("level", 1, 7),  # type: ignore[arg-type]
        Reported("firmware", {"name": "app", "version": "9.9.9"}),
        Reported("firmware.radio", None),
    ],
)
def test_what_no_twin_can_hold_is_left_out_and_stops_nothing(tmp_path: Path, bad: Reported) -> None:
    async def body(taken: reports.Reports, store: _Counting, _: Broadcast) -> None:
        await taken.put("one", bad)
        await taken.put("one", Reported("mode", "auto"))
        await taken.flush()
        assert await reported(store, "one") == {"mode": "auto"}

    run(tmp_path, body)


def test_a_device_that_makes_up_names_does_not_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "MOST_NAMES", 3)

    async def body(taken: reports.Reports, store: _Counting, _: Broadcast) -> None:
        for number in range(10):
            await taken.put("one", Reported(f"p{number}", number))
            await taken.flush()
        await taken.put("one", Reported("p1", "again"))
        await taken.flush()
        assert await reported(store, "one") == {"p0": 0, "p1": "again", "p2": 2}

    run(tmp_path, body)


class _Hand(SystemClock):
    """Time passes by sleeping alone, and by hand; ``slept`` are the sleeps."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.seconds

    async def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 3))
        self.seconds += seconds


def test_a_chatty_device_is_written_once_an_interval_and_a_quiet_one_at_once(tmp_path: Path) -> None:
    """Each commit wears the disk."""

    async def life() -> None:
        clock = _Hand()
        async with Store.open(tmp_path / "edged.db", clock) as store:
            counting = _Counting(store)
            taken = reports.Reports(counting, clock, Broadcast(), 10.0)  # type: ignore[arg-type]
            running = asyncio.create_task(taken.run())
            for number, pause_s in enumerate((0.0, 0.0, 4.0, 60.0)):
                clock.seconds += pause_s
                await taken.put("one", Reported("uptime", number))
                async with asyncio.timeout(20):
                    while counting.writes <= number or await reported(counting, "one") != {"uptime": number}:
                        await asyncio.sleep(0.001)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert clock.slept == [reports.FLUSH_S, 10.0, 6.0, reports.FLUSH_S]

    asyncio.run(life())
