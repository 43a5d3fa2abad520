"""Processes that the tests start, kill and race against each other."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
from pathlib import Path

from edged.clock import SystemClock
from edged_firmware.errors import EdgedError


def _say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


async def acknowledge(path: Path, life: str) -> None:
    """Four writers for ever; a line on standard output for each write that the store has answered."""
    from edged.store import Store, Tx, audit, outbox, twins

    async with Store.open(path, SystemClock()) as store:

        async def writer(name: str) -> None:
            n = 0
            while True:
                n += 1
                mark = f"{life}.{name}.{n}"

                def all_of_it(tx: Tx, mark: str = mark, n: int = n) -> None:
                    twins.set_reported(tx, name, "n", f"{life}.{n}", "device")
                    audit.append(tx, name, "mark", {"mark": mark, "padding": "x" * 200})
                    outbox.put(tx, "mark", name, None, {"mark": mark}, mark)
                    if n % 20 == 0:
                        audit.sign_head(tx, lambda message: message[:64])

                await store.write(all_of_it)
                _say(mark)

        await asyncio.gather(*(writer(f"w{i}") for i in range(4)))


async def count(path: Path, name: str, times: int) -> None:
    """Add one to a shared number ``times`` times; says how often the store refused."""
    from edged.store import Store, Tx, meta

    def step(tx: Tx) -> None:
        meta.put(tx, "count", str(int(meta.get(tx, "count") or "0") + 1))

    refused = 0
    async with Store.open(path, SystemClock()) as store:
        for _ in range(times):
            try:
                await store.write(step)
            except EdgedError as error:
                refused += 1
                print(name, error, file=sys.stderr)
    _say(str(refused))


def migrate_and_die(path: Path, at_statement: int) -> None:
    """Migrate, and die before the given statement (1 is the first); says how many there were otherwise."""
    from sqlite_utils import Database

    from edged.store.migrations import migrate

    conn = sqlite3.connect(path, isolation_level=None)
    conn.execute("PRAGMA journal_mode = WAL")
    seen = 0

    def trace(_sql: str) -> None:
        nonlocal seen
        seen += 1
        if seen == at_statement:
            os.kill(os.getpid(), signal.SIGKILL)

    conn.set_trace_callback(trace)
    migrate(Database(conn, execute_plugins=False), path)
    _say(str(seen))


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    if command == "acknowledge":
        asyncio.run(acknowledge(Path(where), rest[0]))
    elif command == "count":
        asyncio.run(count(Path(where), rest[0], int(rest[1])))
    elif command == "migrate":
        migrate_and_die(Path(where), int(rest[0]))
