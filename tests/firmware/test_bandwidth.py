"""The cap on bytes per second, with a clock of its own."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged_firmware.bandwidth import BandwidthCap


class Time:
    """Seconds that only pass when somebody sleeps; several sleepers wake in order."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@given(st.lists(st.integers(1, 50_000), min_size=1, max_size=50), st.integers(1, 100_000))
def test_over_any_time_no_more_than_the_cap_the_burst_and_a_piece(pieces: list[int], rate: int) -> None:
    async def scenario() -> None:
        time = Time()
        cap = BandwidthCap(rate, time.clock, time.sleep)
        passed = []
        for piece in pieces:
            await cap.take(piece)
            passed.append((time.now, piece))
        for first in range(len(passed)):
            since = passed[first][0]
            for last in range(first, len(passed)):
                total = sum(piece for _, piece in passed[first + 1 : last + 1])
                assert total <= (passed[last][0] - since + 1) * rate * 1.000001 + 1e-6

    asyncio.run(scenario())


def test_what_was_not_used_is_kept_for_a_second_only() -> None:
    async def scenario() -> None:
        time = Time()
        cap = BandwidthCap(1000, time.clock, time.sleep)
        time.now += 3600
        await cap.take(1000)
        assert time.slept == []
        await cap.take(500)
        assert time.slept == [pytest.approx(0.5)]

    asyncio.run(scenario())


def test_those_who_share_it_share_the_rate() -> None:
    async def scenario() -> None:
        time = Time()
        waits: list[float] = []

        async def sleep(seconds: float) -> None:
            waits.append(seconds)
            await asyncio.sleep(0)

        cap = BandwidthCap(1000, time.clock, sleep)
        await asyncio.gather(*(cap.take(1000) for _ in range(4)))
        assert waits == [pytest.approx(n) for n in (1, 2, 3)]

    asyncio.run(scenario())


def test_with_the_real_clock() -> None:
    async def scenario() -> float:
        cap = BandwidthCap(10_000)
        begun = asyncio.get_running_loop().time()
        await cap.take(10_000)
        await cap.take(1_000)
        return asyncio.get_running_loop().time() - begun

    assert 0.09 <= asyncio.run(scenario()) < 5


@pytest.mark.parametrize("rate", [0, -1, float("nan")])
def test_a_cap_that_lets_nothing_through_is_an_argument_error(rate: float) -> None:
    with pytest.raises(ValueError, match="cap of"):
        BandwidthCap(rate)


def test_pieces_take_half_a_second() -> None:
    assert BandwidthCap(100_000).piece_bytes == 50_000
    assert BandwidthCap(10).piece_bytes == 512
