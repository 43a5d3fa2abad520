"""Durable twin updates per second, against what the disk itself can sync.

One writer that awaits each update, and 64 at once, whose updates share commits (group commit). The peer, before each of them on
the same disk: 4 KiB written over in a file that has its size, and ``fdatasync``; a commit of one row costs the same and more.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.figures import Figure, median
from edged.clock import SystemClock
from edged.store import Store, twins

_BLOCK: Final = b"\xa5" * 4096
_FILE_BLOCKS: Final = 1024
WRITERS: Final = (1, 64)


@dataclass(frozen=True, slots=True)
class Round:
    """Per second: updates, and the disk's own syncs just before; seconds: the time that an update took."""

    updates_per_s: float
    syncs_per_s: float
    updates_per_commit: float
    commit_median_s: float
    update_p99_s: float


def _syncs_per_s(folder: Path, seconds: float) -> float:
    fd = os.open(folder / "peer", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, _BLOCK * _FILE_BLOCKS)
        os.fsync(fd)
        count, began = 0, time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            os.pwrite(fd, _BLOCK, count % _FILE_BLOCKS * len(_BLOCK))
            os.fdatasync(fd)
            count += 1
        return count / (now - began)
    finally:
        os.close(fd)


async def _updates(folder: Path, writers: int, seconds: float, syncs_per_s: float) -> Round:
    commits: list[float] = []
    waits: list[float] = []
    async with Store.open(folder / "edged.db", SystemClock(), observe=commits.append) as store:
        began = time.monotonic()

        async def writer(device: str) -> None:
            number = 0
            while (asked := time.monotonic()) < began + seconds:
                number += 1
                await store.write(lambda tx, n=number: twins.set_reported(tx, device, "n", n, "device"))  # type: ignore[misc]
                waits.append(time.monotonic() - asked)

        await asyncio.gather(*(writer(f"d{number}") for number in range(writers)))
        took_s = time.monotonic() - began
    return Round(
        updates_per_s=len(waits) / took_s,
        syncs_per_s=syncs_per_s,
        updates_per_commit=len(waits) / len(commits),
        commit_median_s=statistics.median(commits),
        update_p99_s=statistics.quantiles(waits, n=100)[98],
    )


def _round(parent: Path, writers: int, seconds: float) -> Round:
    with tempfile.TemporaryDirectory(dir=parent) as name:
        syncs_per_s = _syncs_per_s(Path(name), seconds / 2)
        return asyncio.run(_updates(Path(name), writers, seconds, syncs_per_s))


def run(*, quick: bool) -> list[Figure]:
    """Both, on the disk that this repository lies on: a tmpfs has no sync to wait for."""
    parent = Path(__file__).with_name("results")
    parent.mkdir(exist_ok=True)
    repeats, seconds = (1, 0.3) if quick else (5, 3.0)
    rounds = [{writers: _round(parent, writers, seconds) for writers in WRITERS} for _ in range(repeats)]
    return [_figure(writers, [one[writers] for one in rounds]) for writers in WRITERS]


def _figure(writers: int, rounds: list[Round]) -> Figure:
    who = "one writer that awaits each" if writers == 1 else f"{writers} writers at once"
    return Figure(
        name=f"store.twin_updates_{writers}",
        what=f"durable twin updates per second, {who}",
        unit="ratio",
        against="fdatasync of 4 KiB per second, same disk",
        samples=tuple(one.updates_per_s / one.syncs_per_s for one in rounds),
        detail={
            "updates_per_s": median(one.updates_per_s for one in rounds),
            "fdatasyncs_per_s": median(one.syncs_per_s for one in rounds),
            "updates_per_commit": median(one.updates_per_commit for one in rounds),
            "commit_median_s": median(one.commit_median_s for one in rounds),
            "update_p99_s": median(one.update_p99_s for one in rounds),
        },
    )
