from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from store_kit import HandClock, make_job, raw, read, write

from edged.errors import EdgedError, Permanent, Reason, Transient
from edged.store import Store, Tx, audit, database, jobs, meta, migrations, twins
from edged.store.files import locked_folder

CHILD = Path(__file__).with_name("store_child.py")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "edged.db"


def put(key: str, value: str = "x") -> Callable[[Tx], None]:
    return lambda tx: meta.put(tx, key, value)


class Gate:
    """A closure that keeps the writer busy until it is told to go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self._go = threading.Event()

    def __call__(self, tx: Tx) -> None:
        self.entered.set()
        assert self._go.wait(60)

    def open(self) -> None:
        self._go.set()


async def hold(store: Store) -> tuple[Gate, asyncio.Task[None]]:
    gate = Gate()
    task = asyncio.create_task(store.write(gate))
    assert await asyncio.to_thread(gate.entered.wait, 60)
    return gate, task


def test_a_write_is_on_disk_before_it_is_answered(path: Path) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            await store.write(put("a"))
            with raw(path) as other:
                assert other.execute("SELECT value FROM meta WHERE key = 'a'").fetchone() == ("x",)

    asyncio.run(main())


def test_what_is_queued_together_shares_one_commit(path: Path) -> None:
    commits: list[float] = []

    async def main() -> None:
        async with Store.open(path, HandClock(), observe=commits.append) as store:
            gate, first = await hold(store)
            rest = [asyncio.create_task(store.write(put(str(i)))) for i in range(20)]
            await asyncio.sleep(0)
            gate.open()
            await asyncio.gather(first, *rest)

    asyncio.run(main())
    assert len(commits) == 2
    assert all(seconds >= 0 for seconds in commits)
    assert read(path, lambda tx: [meta.get(tx, str(i)) for i in range(20)]) == ["x"] * 20


def test_a_failing_closure_undoes_itself_alone(path: Path) -> None:
    def bad(tx: Tx) -> None:
        meta.put(tx, "bad", "x")
        raise LookupError("mine")

    def broken(tx: Tx) -> None:
        meta.put(tx, "broken", "x")
        tx.db.execute("INSERT INTO meta (key, value) VALUES ('', 'x')")

    async def main() -> list[BaseException | None]:
        async with Store.open(path, HandClock()) as store:
            gate, first = await hold(store)
            tasks = [asyncio.create_task(store.write(fn)) for fn in (put("a"), bad, broken, put("b"))]
            await asyncio.sleep(0)
            gate.open()
            await first
            return await asyncio.gather(*tasks, return_exceptions=True)

    before, mine, constraint, after = asyncio.run(main())
    assert (before, after) == (None, None)
    assert isinstance(mine, LookupError)
    assert isinstance(constraint, sqlite3.IntegrityError)
    kept = read(path, lambda tx: [meta.get(tx, key) for key in ("a", "bad", "broken", "b")])
    assert kept == ["x", None, None, "x"]


def test_nobody_is_answered_before_the_shared_commit(path: Path) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            first_gate, first = await hold(store)
            early = asyncio.create_task(store.write(put("early")))
            second_gate = Gate()
            late = asyncio.create_task(store.write(second_gate))
            await asyncio.sleep(0)
            first_gate.open()
            assert await asyncio.to_thread(second_gate.entered.wait, 60)
            await first
            await asyncio.sleep(0.05)
            assert not early.done(), "its closure has run, its commit has not"
            second_gate.open()
            await asyncio.gather(early, late)

    asyncio.run(main())


def test_a_cancelled_caller_loses_nothing_and_waits_for_the_outcome(path: Path) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            gate, first = await hold(store)
            task = asyncio.create_task(store.write(put("a")))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0.02)
            assert not task.done()
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await store.read(lambda tx: meta.get(tx, "a")) == "x"
            await first

    asyncio.run(main())


def test_a_second_cancellation_ends_the_waiting_but_not_the_write(path: Path) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            gate, first = await hold(store)
            task = asyncio.create_task(store.write(put("a")))
            for _ in range(2):
                await asyncio.sleep(0.01)
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.open()
            await first

    asyncio.run(main())
    assert read(path, lambda tx: meta.get(tx, "a")) == "x"


def test_a_cancelled_write_that_fails_is_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def bad(tx: Tx) -> None:
        raise LookupError("nobody waits")

    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            gate, first = await hold(store)
            task = asyncio.create_task(store.write(bad))
            await asyncio.sleep(0)
            task.cancel()
            gate.open()
            with pytest.raises(asyncio.CancelledError):
                await task
            await first

    asyncio.run(main())
    assert "nobody waits" in caplog.text


def test_closing_finishes_what_is_queued(path: Path) -> None:
    async def main() -> list[asyncio.Task[None]]:
        async with Store.open(path, HandClock()) as store:
            gate, first = await hold(store)
            tasks = [asyncio.create_task(store.write(put(str(i)))) for i in range(5)]
            await asyncio.sleep(0)
            gate.open()
        return [first, *tasks]

    assert all(task.done() for task in asyncio.run(main()))
    assert read(path, lambda tx: [meta.get(tx, str(i)) for i in range(5)]) == ["x"] * 5


def test_a_closed_store_says_so(path: Path) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            pass
        for call in (store.write(put("a")), store.read(lambda tx: None), store.ping()):
            with pytest.raises(Permanent, match="closed"):
                await call

    asyncio.run(main())
    with raw(path) as conn:
        assert conn.execute("PRAGMA wal_checkpoint").fetchone()[0] == 0, "nobody holds it any more"


def test_a_closed_store_is_one_file(path: Path) -> None:
    """Two connections that close at the same moment leave the log beside it, about every fiftieth time."""
    for _ in range(100):
        write(path, put("a"))
        assert not path.with_name("edged.db-wal").exists()


def test_reads_go_on_while_the_writer_is_busy_and_see_only_what_is_committed(path: Path) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            await store.write(put("a"))
            gate, first = await hold(store)
            waiting = asyncio.create_task(store.write(put("b")))
            async with asyncio.timeout(20):
                assert await store.read(lambda tx: (meta.get(tx, "a"), meta.get(tx, "b"))) == ("x", None)
            gate.open()
            await asyncio.gather(first, waiting)

    asyncio.run(main())


def test_a_read_cannot_write(path: Path) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            with pytest.raises(Permanent) as caught:
                await store.read(put("a"))
            assert caught.value.reason is Reason.STORAGE_FAILED
            assert await store.read(lambda tx: meta.get(tx, "a")) is None

    asyncio.run(main())


def test_a_ping_goes_through_the_writer_and_writes_nothing(path: Path) -> None:
    commits: list[float] = []

    async def main() -> None:
        async with Store.open(path, HandClock(), observe=commits.append) as store:
            await store.ping()
            gate, first = await hold(store)
            ping = asyncio.create_task(store.ping())
            await asyncio.sleep(0.02)
            assert not ping.done()
            gate.open()
            await asyncio.gather(first, ping)

    asyncio.run(main())
    assert len(commits) == 1


def test_a_closure_that_raises_stop_iteration_does_not_hang_its_caller(path: Path) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            async with asyncio.timeout(20):
                with pytest.raises(RuntimeError, match="StopIteration"):
                    await store.write(lambda tx: next(iter([])))

    asyncio.run(main())


def test_a_closure_that_ends_the_transaction_gets_nobody_a_false_answer(path: Path) -> None:
    async def main() -> list[BaseException | None]:
        async with Store.open(path, HandClock()) as store:
            gate, first = await hold(store)
            before = asyncio.create_task(store.write(put("a")))
            rude = asyncio.create_task(store.write(lambda tx: tx.db.rollback()))
            await asyncio.sleep(0)
            gate.open()
            await first
            found = await asyncio.gather(before, rude, return_exceptions=True)
            await store.write(put("b"))
            return found

    assert [type(error) for error in asyncio.run(main())] == [Transient, Transient]
    assert read(path, lambda tx: (meta.get(tx, "a"), meta.get(tx, "b"))) == (None, "x")


class BrokenClock(HandClock):
    broken = False

    def now(self) -> datetime:
        if self.broken:
            raise ArithmeticError("a bug")
        return super().now()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_writer_reaches_everybody_who_waits(path: Path) -> None:
    clock = BrokenClock()

    async def main() -> None:
        async with Store.open(path, clock) as store:
            gate, first = await hold(store)
            tasks = [asyncio.create_task(store.write(put(str(i)))) for i in range(3)]
            await asyncio.sleep(0)
            clock.broken = True
            gate.open()
            async with asyncio.timeout(20):
                await first
                found = await asyncio.gather(*tasks, return_exceptions=True)
                assert [type(error) for error in found] == [Permanent] * 3
                with pytest.raises(Permanent):
                    await store.ping()

    asyncio.run(main())


def test_rows_and_answers_have_the_same_precision(path: Path) -> None:
    clock = HandClock()
    clock.moment = clock.moment.replace(microsecond=123456)
    answer, again = write(
        path,
        lambda tx: twins.set_reported(tx, "d", "t", 1, "device"),
        lambda tx: twins.get(tx, "d").reported["t"],
        clock=clock,
    )
    assert answer == again


def test_settings_that_durability_rests_on(path: Path) -> None:
    def settings(tx: Tx) -> list[object]:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "recursive_triggers")
        return [tx.db.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

    wanted = ["wal", 2, 1, database.BUSY_TIMEOUT_S * 1000, 1]
    assert write(path, settings) == [wanted]
    assert read(path, settings) == wanted


def test_a_database_locked_for_too_long_is_transient_and_goes_on(path: Path) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            await store.write(lambda tx: tx.db.execute("PRAGMA busy_timeout = 30"))
            with raw(path) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(Transient) as caught:
                    await store.write(put("a"))
                assert caught.value.reason is Reason.STORAGE_FAILED
                other.execute("ROLLBACK")
            await store.write(put("a"))
            assert store.read_only_reason is None

    asyncio.run(main())


def test_processes_that_write_at_once_wait_for_each_other(path: Path) -> None:
    names = ["a", "b", "c"]
    children = [
        subprocess.Popen(
            [sys.executable, str(CHILD), "count", str(path), name, "150"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for name in names
    ]
    answers = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0] * 3, answers
    assert [out.strip() for out, _ in answers] == [b"0"] * 3, answers
    assert read(path, lambda tx: meta.get(tx, "count")) == "450"


# what is damaged is not written


def fill(path: Path) -> None:
    def step(tx: Tx) -> None:
        jobs.add(tx, make_job())
        for i in range(300):
            audit.append(tx, "test", "row", {"i": i, "padding": "x" * 200})

    write(path, step)


def smash_header(path: Path) -> None:
    path.write_bytes(b"not a database at all" + path.read_bytes()[21:])


def smash_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for start in range(4096 * 3, len(data), 4096):
        data[start : start + 512] = b"\xa5" * 512
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def tear_page(path: Path) -> None:
    """Half of one page is from another time."""
    data = bytearray(path.read_bytes())
    data[4096 * 20 + 2048 : 4096 * 21] = bytes(2048)
    data[4096 * 20 : 4096 * 20 + 8] = b"\x0d\xff\xff\xff\xff\xff\xff\xff"
    path.write_bytes(data)


def make_newer(path: Path) -> None:
    with raw(path) as conn:
        conn.execute(f"PRAGMA user_version = {migrations.latest() + 1}")


def make_foreign(path: Path) -> None:
    with raw(path) as conn:
        conn.execute("PRAGMA user_version = 0")


def make_orphan(path: Path) -> None:
    with raw(path) as conn:
        conn.execute("PRAGMA foreign_keys = OFF")
        conn.execute("DELETE FROM job")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (smash_header, "not a database"),
        (smash_middle, "damaged"),
        (cut_short, "damaged"),
        (tear_page, "damaged"),
        (make_newer, "schema version"),
        (make_foreign, "another program"),
        (make_orphan, "job_history refers to a row of job"),
    ],
)
def test_what_cannot_be_trusted_is_opened_read_only(
    path: Path, damage: Callable[[Path], None], says: str
) -> None:
    fill(path)
    damage(path)
    before = path.read_bytes()

    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            assert store.read_only_reason is not None
            assert says in store.read_only_reason
            with pytest.raises(Permanent) as caught:
                await store.write(put("a"))
            assert caught.value.reason is Reason.STORAGE_FAILED
            assert store.read_only_reason in caught.value.detail
            await store.ping()

    asyncio.run(main())
    assert path.read_bytes() == before, "evidence is left as it was found"


def test_the_log_of_a_database_that_must_not_be_written_stays_too(path: Path) -> None:
    fill(path)
    crashed = path.parent / "crashed"
    crashed.mkdir()
    with raw(path) as conn:
        conn.execute("PRAGMA wal_autocheckpoint = 0")
        conn.execute(f"PRAGMA user_version = {migrations.latest() + 1}")
        for name in ("edged.db", "edged.db-wal"):
            (crashed / name).write_bytes(path.with_name(name).read_bytes())
    before = [(crashed / name).read_bytes() for name in ("edged.db", "edged.db-wal")]
    assert len(before[1]) > 0
    assert read(crashed / "edged.db", lambda tx: jobs.get(tx, "j1")) == make_job()
    assert [(crashed / name).read_bytes() for name in ("edged.db", "edged.db-wal")] == before


def test_a_newer_database_can_still_be_read(path: Path) -> None:
    fill(path)
    make_newer(path)
    found = read(path, lambda tx: jobs.get(tx, "j1"))
    assert found == make_job()


def test_what_cannot_be_read_at_all_says_so(path: Path) -> None:
    fill(path)
    smash_header(path)
    with pytest.raises(Permanent) as caught:
        read(path, lambda tx: jobs.get(tx, "j1"))
    assert caught.value.reason is Reason.STORAGE_FAILED


def test_damage_that_shows_while_running_ends_the_writing(path: Path) -> None:
    fill(path)

    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            # pages that this connection has not read yet
            smash_middle(path)
            with pytest.raises(Permanent) as caught:
                await store.write(lambda tx: tx.db.execute("SELECT sum(length(json)) FROM audit").fetchone())
            assert caught.value.reason is Reason.STORAGE_FAILED
            assert store.read_only_reason is not None
            with pytest.raises(Permanent, match="read-only"):
                await store.write(put("a"))

    asyncio.run(main())


def test_an_empty_file_is_a_new_database(path: Path) -> None:
    path.touch()
    write(path, put("a"))
    assert read(path, lambda tx: meta.get(tx, "a")) == "x"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Permanent) as caught:
        write(tmp_path / "none" / "edged.db", put("a"))
    assert caught.value.reason is Reason.STORAGE_FAILED


# a full disk


def grow(tx: Tx) -> None:
    meta.put(tx, "big", "x" * 400_000)


def test_a_database_that_may_not_grow_is_a_full_disk(path: Path) -> None:
    async def main() -> None:
        async with Store.open(path, HandClock()) as store:
            await store.write(put("a"))
            pages = await store.read(lambda tx: tx.db.execute("PRAGMA page_count").fetchone()[0])
            await store.write(lambda tx: tx.db.execute(f"PRAGMA max_page_count = {pages + 2}").fetchone())
            with pytest.raises(Transient) as caught:
                await store.write(grow)
            assert caught.value.reason is Reason.DISK_FULL
            await store.write(put("b"))
            await store.write(lambda tx: tx.db.execute("PRAGMA max_page_count = 100000").fetchone())
            await store.write(grow)

    asyncio.run(main())
    assert read(path, lambda tx: (meta.get(tx, "a"), meta.get(tx, "b"))) == ("x", "x")


@pytest.fixture
def small_disk(tmp_path: Path) -> object:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing_and_is_gone_on_from(small_disk: Path) -> None:
    path = small_disk / "edged.db"
    ballast = small_disk / "ballast"
    kept: list[int] = []

    async def main() -> None:
        async with Store.open(path, HandClock()) as store:

            def step(tx: Tx, i: int) -> None:
                audit.append(tx, "test", "row", {"i": i, "padding": "x" * 3000})

            async def until_full() -> EdgedError:
                for i in range(1000):
                    try:
                        await asyncio.gather(*(store.write(lambda tx, i=i: step(tx, i)) for _ in range(3)))
                    except EdgedError as error:
                        return error
                    kept.append(i)
                raise AssertionError("never full")

            ballast.write_bytes(bytes(700_000))
            error = await until_full()
            assert (type(error), error.reason) == (Transient, Reason.DISK_FULL)
            assert str(small_disk) in error.detail
            assert store.read_only_reason is None
            await store.ping()
            assert (await store.read(lambda tx: audit.verify(tx, None))).intact
            ballast.unlink()
            await store.write(lambda tx: step(tx, -1))

    asyncio.run(main())
    report, marks = read(
        path, lambda tx: (audit.verify(tx, None), [row.data["i"] for row in audit.list(tx, limit=10_000)])
    )
    assert report.intact
    assert all(marks.count(i) == 3 for i in kept)
    assert marks[-1] == -1


def test_a_full_disk_at_start_is_transient(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(1_500_000 // 4096 * 4096 - 8192))
    with pytest.raises(Transient) as caught:
        write(small_disk / "edged.db", put("a"))
    assert caught.value.reason is Reason.DISK_FULL
    (small_disk / "ballast").unlink()
    write(small_disk / "edged.db", put("a"))


def test_an_io_error_is_permanent_unless_the_disk_is_full(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tx: Tx) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        raise error

    def full(path: Path, data: bytes, mode: int) -> None:
        raise Transient(Reason.DISK_FULL, "quota")

    with pytest.raises(Permanent):
        write(path, fail)
    monkeypatch.setattr(database, "write_durably", full)
    with pytest.raises(Transient) as caught:
        write(path, fail)
    assert caught.value.reason is Reason.DISK_FULL
    assert not (path.parent / "space-probe").exists()


def test_opening_does_not_block_the_event_loop(path: Path) -> None:
    """Who waited on the loop for the folder, which another process opens, or for the writer would wait for ever here."""

    async def opened() -> None:
        async with Store.open(path, HandClock()) as store:
            gate, first = await hold(store)
            rest = [asyncio.create_task(store.write(put(str(i)))) for i in range(50)]
            await asyncio.sleep(0.02)
            gate.open()
            await asyncio.gather(first, *rest)

    async def main() -> None:
        with locked_folder(path.parent):
            opening = asyncio.create_task(opened())
            await asyncio.sleep(0.1)
            assert not opening.done()
        await opening

    asyncio.run(main())
