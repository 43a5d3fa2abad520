from __future__ import annotations

import asyncio
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from store_kit import HandClock, raw

from edged.store import Store, Tx, audit, outbox, twins

CHILD: Final = Path(__file__).with_name("store_child.py")
DATABASES: Final = 3
KILLS: Final = 6


class Victim:
    """A process that writes for ever, and everything that it said was written."""

    def __init__(self, path: Path, life: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD), "acknowledge", str(path), str(life)], stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._fd = self._process.stdout.fileno()
        os.set_blocking(self._fd, False)
        self._heard = b""

    def listen(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self._fd], [], [], left)[0]:
                self._heard += os.read(self._fd, 65536)

    def listen_until_it_writes(self) -> None:
        end = time.monotonic() + 20
        while not self._heard:
            assert time.monotonic() < end
            self.listen(0.01)

    def kill(self) -> set[str]:
        """The marks of all writes that were acknowledged, up to the very end."""
        self._process.send_signal(signal.SIGKILL)
        assert self._process.stdout is not None
        os.set_blocking(self._fd, True)
        while chunk := os.read(self._fd, 65536):
            self._heard += chunk
        assert self._process.wait(10) == -signal.SIGKILL
        self._process.stdout.close()
        return set(self._heard.decode().splitlines())


def check(path: Path, acknowledged: set[str]) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            assert store.read_only_reason is None
            await store.read(compare)

    def compare(tx: Tx) -> None:
        assert tx.db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        report = audit.verify(tx, None)
        assert report.intact, report
        trail = [str(row.data["mark"]) for row in audit.list(tx, limit=1_000_000)]
        told = [event.key for event in outbox.after(tx, 0, limit=1_000_000)]
        assert trail == told, "one transaction, one fate"
        assert acknowledged <= set(trail), "an acknowledged write is lost"
        newest = {mark.split(".")[1]: mark for mark in trail}
        shown = {name: twin.reported["n"].value for name, twin in twins.all(tx).items()}
        assert shown == {name: f"{mark.split('.')[0]}.{mark.split('.')[2]}" for name, mark in newest.items()}

    asyncio.run(main())


def test_kill_at_random_moments_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(os.urandom(8))
    paths = [tmp_path / f"{i}.db" for i in range(DATABASES)]
    acknowledged: dict[Path, set[str]] = {path: set() for path in paths}
    kills = 0
    for life in range(KILLS):
        victims = {path: Victim(path, life) for path in paths}
        for path, victim in victims.items():
            # one life in six ends while it starts; not the first, or by chance nothing would be acknowledged
            if life == 0 or rng.random() < 0.83:
                victim.listen_until_it_writes()
            victim.listen(rng.uniform(0, 0.15))
            acknowledged[path] |= victim.kill()
            kills += 1
        for path in paths:
            check(path, acknowledged[path])
    assert kills >= 15
    assert all(acknowledged.values())


def test_a_torn_log_is_cut_where_it_is_torn(tmp_path: Path) -> None:
    """What a power cut leaves of the write-ahead log: a file that ends in the middle of a transaction."""
    path = tmp_path / "edged.db"
    wal = path.with_name("edged.db-wal")

    async def fill() -> list[tuple[int, bytes, bytes]]:
        shots = []
        async with Store.open(path, HandClock()) as store:
            for i in range(5):
                await store.write(lambda tx, i=i: audit.append(tx, "test", "row", {"i": i}))
                shots.append((i, path.read_bytes(), wal.read_bytes()))
        return shots

    shots = asyncio.run(fill())
    (_, _, before), (last, main_file, log) = shots[-2], shots[-1]
    assert len(log) > len(before)
    for torn in range(len(before) + 1, len(log), 997):
        cut = tmp_path / f"cut{torn}"
        cut.mkdir()
        (cut / "edged.db").write_bytes(main_file)
        (cut / "edged.db-wal").write_bytes(log[:torn])

        async def count(folder: Path = cut) -> int:
            async with Store.open(folder / "edged.db", HandClock()) as store:
                assert store.read_only_reason is None
                assert (await store.read(lambda tx: audit.verify(tx, None))).intact
                return (await store.read(audit.head)).seq

        assert asyncio.run(count()) == last, "the last transaction is not there, those before it are"
    with raw(path) as conn:
        assert conn.execute("SELECT count(*) FROM audit").fetchone() == (5,)
