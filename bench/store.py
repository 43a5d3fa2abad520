"""How many durable twin updates a second, alone and with group commit, and what the store costs in memory.

    python bench/store.py [FOLDER] [SECONDS]

FOLDER must lie on the disk that is to be measured (a tmpfs has no fsync to wait for).
"""

from __future__ import annotations

import asyncio
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path


def rss_mib() -> float:
    """The largest resident size so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


async def measure(folder: Path, writers: int, seconds: float) -> str:
    """One line of the table."""
    from edged.clock import SystemClock
    from edged.store import Store, twins

    commits: list[float] = []
    waits: list[float] = []
    async with Store.open(folder / f"{writers}.db", SystemClock(), observe=commits.append) as store:
        end = time.monotonic() + seconds

        async def writer(device: str) -> None:
            n = 0
            while (began := time.monotonic()) < end:
                n += 1
                await store.write(lambda tx, n=n: twins.set_reported(tx, device, "n", n, "device"))
                waits.append(time.monotonic() - began)

        await asyncio.gather(*(writer(f"d{i}") for i in range(writers)))
    p99 = statistics.quantiles(waits, n=100)[98]
    return (
        f"{writers:>7} {len(waits) / seconds:>10.0f} {len(waits) / len(commits):>12.1f}"
        f" {statistics.median(commits) * 1000:>10.3f} {p99 * 1000:>9.2f}"
    )


async def main() -> None:
    parent = sys.argv[1] if len(sys.argv) > 1 else None
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 3.0
    before = rss_mib()
    print("writers  updates/s  per commit  commit ms    p99 ms")
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        for writers in (1, 8, 64):
            print(await measure(Path(folder), writers, seconds))
    print(f"memory: {before:.1f} MiB before the import, {rss_mib():.1f} MiB at most")


if __name__ == "__main__":
    asyncio.run(main())
