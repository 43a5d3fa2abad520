"""What a transfer tells of itself."""

from __future__ import annotations

import pytest

from edged.api import Phase
from edged.clock import SystemClock
from edged.engine.transfer import OBSERVED_BYTES, Checkpoints, Meter


class HandClock(SystemClock):
    """Goes on by a second at each look."""

    seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 1.0
        return self.seconds


@pytest.mark.parametrize(
    ("step_bytes", "image_bytes", "observed", "each_s"),
    [
        (128, 32 * 1024, 8, 32.0),
        (4096, 32 * 1024, 8, 1.0),
        (64 * 1024, 128 * 1024, 2, 1 / 16),
        (128, 2048, 0, None),
    ],
)
def test_the_time_of_a_write_is_told_for_the_smallest_parts_too(
    step_bytes: int, image_bytes: int, observed: int, each_s: float | None
) -> None:
    seen: list[float] = []
    meter = Meter(HandClock(), 30, Checkpoints(65536, 1), image_bytes=image_bytes, observe_write=seen.append)
    for done in range(0, image_bytes + 1, step_bytes):
        meter(Phase.WRITE, done, image_bytes)
    assert len(seen) == observed
    assert each_s is None or seen == pytest.approx([each_s] * observed)
    assert OBSERVED_BYTES == 4096, "the metric's help says so"


def test_an_erase_moves_and_is_no_byte_read_or_written() -> None:
    meter = Meter(HandClock(), 30, Checkpoints(65536, 1), image_bytes=100)
    for done in (0, 40, 100):
        meter(Phase.ERASE, done, 100)
    assert meter.status.phase is Phase.ERASE and meter.status.done_bytes == 100
    assert (meter.read_bytes, meter.written_bytes, meter.reached_bytes) == (0, 0, 0)
