from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from sqlite_utils import Database
from store_kit import HandClock, make_job, raw, read, write

from edged.errors import Reason, Transient
from edged.store import Store, audit, floors, jobs, meta, migrations, twins
from edged.store.migrations import Migration, latest, migrate

CHILD: Final = Path(__file__).with_name("store_child.py")
OLD: Final = {1: Path(__file__).with_name("schema_v1.sql").read_text()}
"""The schema of each published version but the newest, as it was."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "edged.db"


def make_old(path: Path, version: int) -> None:
    """A database of an old version with something in it."""
    with raw(path) as conn:
        conn.execute("PRAGMA journal_mode = WAL")
        conn.executescript(OLD[version])
        conn.execute(
            "INSERT INTO twin VALUES ('uno', 'desired', 'led', '{\"on\":true}', 7,"
            " '2025-01-01T00:00:00.000Z', 'operator', NULL)"
        )
        conn.execute("""
            INSERT INTO job (id, device, component, release, desired_version, run, source, created, updated,
                deadline, state, revision, attempts, steps, trial_boots, touched, waiting_detail, detail,
                no_fallback, done_bytes, total_bytes)
            VALUES ('j1', 'uno', 'firmware', 'blink@1.0', 1, 1, 'operator',
                '2026-01-01T00:00:00.000Z',
                '2026-01-01T00:00:00.000Z', '2026-01-02T00:00:00.000Z',
                'queued', 0, 0, 0, 0, 0, '', '', 0, 0, 0)
            """)


def schema(path: Path) -> list[tuple[str, str]]:
    with raw(path) as conn:
        return conn.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()


def version_of(path: Path) -> int:
    with raw(path) as conn:
        return int(conn.execute("PRAGMA user_version").fetchone()[0])


def test_every_version_but_the_newest_is_kept_here() -> None:
    assert sorted(OLD) == list(range(1, latest()))
    assert [step.version for step in migrations.MIGRATIONS] == list(range(1, latest() + 1))


@pytest.mark.parametrize("old", sorted(OLD))
def test_an_old_database_comes_to_the_newest_schema_with_what_it_held(path: Path, old: int) -> None:
    make_old(path, old)
    write(path, lambda tx: floors.raise_to(tx, "uno", "firmware", 3, "blink@1.0"))
    assert version_of(path) == latest()
    assert read(path, lambda tx: jobs.get(tx, "j1")) == make_job()
    twin = read(path, lambda tx: twins.get(tx, "uno"))
    assert (twin.desired["led"].value, twin.desired["led"].version) == ({"on": True}, 7)
    fresh = path.with_name("fresh.db")
    write(fresh, audit.head)
    assert schema(path) == schema(fresh)


@pytest.mark.parametrize("old", sorted(OLD))
def test_a_copy_of_the_old_version_is_kept(path: Path, old: int) -> None:
    make_old(path, old)
    write(path, audit.head)
    copy = path.with_name(f"edged.db.v{old}.bak")
    assert version_of(copy) == old
    with raw(copy) as conn:
        assert conn.execute("SELECT id FROM job").fetchall() == [("j1",)]
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_new_or_current_database_leaves_no_copy(path: Path) -> None:
    write(path, audit.head)
    write(path, audit.head)
    assert list(path.parent.glob("*.bak")) == []


def steps_up_to(last: int) -> tuple[Migration, ...]:
    return tuple(Migration(n, f"CREATE TABLE t{n} (a INTEGER) STRICT;") for n in range(1, last + 1))


def migrate_by_hand(path: Path, steps: tuple[Migration, ...]) -> None:
    with raw(path) as conn:
        migrate(Database(conn, execute_plugins=False), path, steps)


def test_the_newest_two_copies_stay(path: Path) -> None:
    for last in (1, 2, 9, 10, 11):
        migrate_by_hand(path, steps_up_to(last))
    assert {copy.name for copy in path.parent.glob("*.bak")} == {"edged.db.v9.bak", "edged.db.v10.bak"}
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []


def test_a_step_that_fails_leaves_the_version_before_it(path: Path) -> None:
    good = steps_up_to(2)
    migrate_by_hand(path, good[:1])
    bad = (*good, Migration(3, "CREATE TABLE t3 (a INTEGER) STRICT; INSERT INTO nowhere VALUES (1);"))
    with pytest.raises(sqlite3.OperationalError):
        migrate_by_hand(path, bad)
    assert version_of(path) == 2
    assert [name for name, _ in schema(path)] == ["t1", "t2"]
    migrate_by_hand(path, steps_up_to(3))
    assert version_of(path) == 3


def test_kill_before_every_statement_of_a_migration(path: Path) -> None:
    def child(at: int) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, str(CHILD), "migrate", str(path), str(at)], capture_output=True, timeout=60
        )

    def fresh() -> None:
        for file in path.parent.iterdir():
            file.unlink()
        make_old(path, 1)

    fresh()
    whole = child(0)
    assert whole.returncode == 0, whole.stderr
    statements = int(whole.stdout)
    assert statements > 8
    stepped = range(1, statements + 1, max(1, statements // 15))
    for at in [*stepped, statements]:
        fresh()
        assert child(at).returncode == -signal.SIGKILL, "the cut fired"
        assert version_of(path) in (1, latest())
        with raw(path) as conn:
            tables = {name for (name,) in conn.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        assert ("release_floor" in tables) == (version_of(path) == latest()), "all of a step or nothing of it"
        assert read(path, lambda tx: jobs.get(tx, "j1")) == make_job()
        assert version_of(path) == latest()
        assert version_of(path.with_name("edged.db.v1.bak")) == 1


def test_processes_that_start_together_migrate_once(path: Path) -> None:
    make_old(path, 1)

    async def main() -> None:
        async def one(i: int) -> None:
            async with Store.open(path, HandClock()) as store:
                assert store.read_only_reason is None
                await store.write(lambda tx: meta.put(tx, str(i), "x"))

        await asyncio.gather(*(one(i) for i in range(8)))

    asyncio.run(main())
    assert version_of(path.with_name("edged.db.v1.bak")) == 1


def test_no_space_for_the_copy_is_transient_and_migrates_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tmp: Path, path: Path) -> None:
        raise Transient(Reason.DISK_FULL, "no space")

    make_old(path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "replace_durably", full)
        with pytest.raises(Transient):
            write(path, audit.head)
    assert version_of(path) == 1
    write(path, audit.head)
    assert version_of(path) == latest()
