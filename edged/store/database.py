"""One SQLite database, one thread that writes to it, one that reads; transactions as plain functions.

A write is a closure on a :class:`Tx`. Closures that are queued at the same moment share one transaction and
one fsync (group commit), each in a savepoint of its own; nobody is answered before the COMMIT. This module
knows no table.

sqlite-utils 4 opens transactions with a plain BEGIN (deferred), which fails at once, whatever the time-out,
where another process commits in between. So BEGIN IMMEDIATE stands around everything here, and sqlite-utils,
seeing an open transaction, uses savepoints inside it. Its third-party plugins are not loaded: they would run
in the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlite_utils import Database

from edged.clock import Clock, from_text, to_text
from edged.errors import EdgedError, Permanent, Reason, Transient
from edged_firmware.durable import write_durably

from . import migrations
from .files import locked_folder

__all__ = ["BUSY_TIMEOUT_S", "Store", "Tx"]

BUSY_TIMEOUT_S: Final = 10.0
"""How long a transaction waits for another process (the CLI, a backup) before it is
``Transient(STORAGE_FAILED)``.
"""

_MOST_PER_COMMIT: Final = 256
_PRAGMAS: Final = (
    f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}",
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA cell_size_check = ON",
    # savepoints spill into a temporary file otherwise, on a file system that may be full or absent
    "PRAGMA temp_store = MEMORY",
    "PRAGMA cache_size = -1024",
    "PRAGMA journal_size_limit = 4194304",
)
_CANNOT: Final = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOLFS,
    }
)
_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL})
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Tx:
    """An open transaction: what the functions of this package take. Valid only inside the closure that got
    it.

    ``now`` is the transaction's time (UTC). ``db`` returns rows as ``sqlite3.Row``. A closure must not begin,
    commit or roll back; ``db.atomic()`` inside it is a savepoint and is allowed.
    """

    db: Database
    now: datetime


@dataclass(frozen=True, slots=True)
class _Work:
    """A closure and who waits for it; without a closure it is a ping."""

    fn: Callable[[Tx], Any] | None
    future: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class _Outcome:
    future: asyncio.Future[Any]
    result: Any = None
    error: BaseException | None = None


class Store:
    """The daemon's database. Made by :meth:`open`; belongs to the event loop that opened it.

    ``read_only_reason`` is None, or the sentence for the operator why nothing is written: the file is
    damaged, it was made by a newer edged, or the disk failed under it. Reads go on as far as the file allows.
    """

    def __init__(
        self, path: Path, writer: _Writer | None, reader: _Reader | None, reason: str | None
    ) -> None:
        self._path = path
        self._writer = writer
        self._reader = reader
        self._reason = reason

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls, path: Path, clock: Clock, *, observe: Callable[[float], None] | None = None
    ) -> AsyncIterator[Store]:
        """Open (or make) the database at ``path``, migrate it, check it; close it at the end of the block.

        ``observe`` is called on the event loop with the seconds that each COMMIT took.
        A database that fails its check, or is of a newer schema, opens read-only: see ``read_only_reason``.

        Raises ``Transient(DISK_FULL)`` or ``Transient(STORAGE_FAILED)`` where it cannot be opened now (no
        space to migrate, locked by another process), ``Permanent(STORAGE_FAILED)`` where the folder cannot be
        used.
        """
        loop = asyncio.get_running_loop()
        opened = await asyncio.to_thread(_open, path)
        writer = _Writer(opened.writer, clock, loop, path, observe) if opened.writer is not None else None
        reader = _Reader(opened.reader, clock, loop, path) if opened.reader is not None else None
        try:
            yield cls(path, writer, reader, opened.reason)
        finally:
            await asyncio.shield(_end(reader, writer))

    @property
    def path(self) -> Path:
        """The database file."""
        return self._path

    @property
    def read_only_reason(self) -> str | None:
        """Why nothing is written; None where all is well."""
        if self._reason is not None or self._writer is None:
            return self._reason
        return self._writer.failed

    async def write(self, fn: Callable[[Tx], _T]) -> _T:
        """Run ``fn`` in one IMMEDIATE transaction on the writer's thread; return what it returns after the
        COMMIT.

        Whatever ``fn`` raises undoes its own writes only, and is raised here. Closures run in the order of
        the calls and once; ``fn`` must touch nothing but its ``Tx``, because it runs on another thread.

        Cancellation: the write is neither stopped nor lost. The call waits until it is decided and then
        raises ``CancelledError``; a second cancellation ends the waiting, not the write.

        Raises ``Transient(DISK_FULL)``: nothing was written, the same call works once there is space.
        ``Transient(STORAGE_FAILED)``: locked for longer than ``BUSY_TIMEOUT_S``.
        ``Permanent(STORAGE_FAILED)``: the disk or the file is damaged, or the store is read-only.
        """
        if self._writer is None or self.read_only_reason is not None:
            raise Permanent(Reason.STORAGE_FAILED, f"{self._path} is read-only: {self.read_only_reason}")
        return await _shielded(self._writer.submit(fn))

    async def read(self, fn: Callable[[Tx], _T]) -> _T:
        """Run ``fn`` on the reader's thread, on one unchanging snapshot; sees every write that was answered
        before.

        Errors as :meth:`write`; a ``fn`` that writes is ``Permanent(STORAGE_FAILED)``.
        """
        if self._reader is None:
            raise Permanent(Reason.STORAGE_FAILED, f"{self._path} cannot be read: {self._reason}")
        return await self._reader.submit(fn)

    async def ping(self) -> None:
        """Through the writer's queue and back, without touching the disk: proof that the writer lives."""
        if self._writer is not None:
            await self._writer.submit(None)


async def _end(*threads: _Thread | None) -> None:
    """One after the other, the writer last: of two connections that close at the same moment, each takes the
    other for the last one, and the write-ahead log stays beside the database instead of moving into it.
    """
    for thread in threads:
        if thread is not None:
            thread.stop()
            await thread.ended()


async def _shielded(future: asyncio.Future[_T]) -> _T:
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        error = future.exception()
        if error is not None:
            _log.warning("a write whose caller was cancelled failed: %s", error)
        raise


class _Thread:
    """A thread that owns a connection and takes work from a queue; answers arrive on the event loop."""

    most_at_once = 1

    def __init__(
        self, db: Database, clock: Clock, loop: asyncio.AbstractEventLoop, path: Path, name: str
    ) -> None:
        self._db = db
        self._clock = clock
        self._loop = loop
        self._path = path
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._unanswered: list[_Work] = []
        self._stopped = False
        self._stopping = threading.Lock()
        # a daemon thread: an idle store must not keep a process alive that ended by a bug
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def submit(self, fn: Callable[[Tx], _T] | None) -> asyncio.Future[_T]:
        """Queue ``fn``; called on the event loop."""
        work = _Work(fn, self._loop.create_future())
        with self._stopping:
            if self._stopped:
                work.future.set_exception(Permanent(Reason.STORAGE_FAILED, f"{self._path} is closed"))
            else:
                self._queue.put(work)
        return work.future

    def stop(self) -> None:
        """Finish what is queued, then close the connection and end the thread."""
        with self._stopping:
            self._stopped = True
            self._queue.put(None)

    async def ended(self) -> None:
        """Return when the thread has ended."""
        await asyncio.to_thread(self._thread.join)

    def _serve(self) -> None:
        try:
            going = True
            while going:
                self._unanswered, going = self._take()
                if self._unanswered:
                    self._run(self._unanswered)
                    self._unanswered = []
        finally:
            self._db.close()
            self._disappoint()

    def _disappoint(self) -> None:
        """Where a bug ends the thread: whoever waits must hear of it."""
        self.stop()
        rest = self._unanswered + list(iter(self._queue.get, None))
        detail = f"the thread for {self._path} ended by a fault"
        self._answer([_Outcome(work.future, error=Permanent(Reason.STORAGE_FAILED, detail)) for work in rest])

    def _take(self) -> tuple[list[_Work], bool]:
        """Everything that is queued now, waiting for the first; False once the end was asked for."""
        work = self._queue.get()
        batch: list[_Work] = []
        while work is not None:
            batch.append(work)
            if len(batch) == self.most_at_once:
                return batch, True
            try:
                work = self._queue.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False

    def _run(self, batch: list[_Work]) -> None:
        raise NotImplementedError

    def _answer(self, outcomes: list[_Outcome], observed_s: float | None = None) -> None:
        # the loop is closed where the process is ending: nobody waits any more
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._deliver, outcomes, observed_s)

    def _deliver(self, outcomes: list[_Outcome], observed_s: float | None) -> None:
        for outcome in outcomes:
            if outcome.future.done():
                continue
            if outcome.error is None:
                outcome.future.set_result(outcome.result)
            else:
                outcome.future.set_exception(outcome.error)

    def _now(self) -> datetime:
        """The clock, in the precision that rows have: what a caller gets back is what is stored."""
        return from_text(to_text(self._clock.now()))

    def _attempt(self, work: _Work, tx: Tx) -> _Outcome:
        assert work.fn is not None
        try:
            return _Outcome(work.future, work.fn(tx))
        except BaseException as error:  # noqa: BLE001  it is raised where the caller awaits
            return _Outcome(work.future, error=self._meaning(error))

    def _meaning(self, error: BaseException) -> BaseException:
        """What the caller gets for ``error``: the translation of a storage fault, anything else as it is."""
        if isinstance(error, sqlite3.Error):
            return _translated(error, self._path) or error
        if isinstance(error, StopIteration):
            # a future cannot carry it, and its caller would wait for ever
            bug = RuntimeError("a store closure raised StopIteration")
            bug.__cause__ = error
            return bug
        return error


class _Reader(_Thread):
    def __init__(self, db: Database, clock: Clock, loop: asyncio.AbstractEventLoop, path: Path) -> None:
        super().__init__(db, clock, loop, path, "edged-store-read")

    def _run(self, batch: list[_Work]) -> None:
        try:
            self._db.execute("BEGIN")
        except sqlite3.Error as error:
            self._answer([_Outcome(work.future, error=self._meaning(error)) for work in batch])
            return
        tx = Tx(self._db, self._now())
        outcomes = [self._attempt(work, tx) for work in batch]
        self._db.rollback()
        self._answer(outcomes)


class _Writer(_Thread):
    most_at_once = _MOST_PER_COMMIT

    def __init__(
        self,
        db: Database,
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
        path: Path,
        observe: Callable[[float], None] | None,
    ) -> None:
        self.failed: str | None = None
        self._observe = observe
        super().__init__(db, clock, loop, path, "edged-store-write")

    def _run(self, batch: list[_Work]) -> None:
        pings = [_Outcome(work.future) for work in batch if work.fn is None]
        writes = [work for work in batch if work.fn is not None]
        if not writes:
            self._answer(pings)
            return
        try:
            outcomes, commit_s = self._transaction(writes)
        except sqlite3.Error as error:
            self._abandon(error)
            self._answer(pings + [_Outcome(work.future, error=self._lost(error)) for work in writes])
        else:
            self._answer(pings + outcomes, commit_s)

    def _transaction(self, writes: list[_Work]) -> tuple[list[_Outcome], float]:
        """Raises ``sqlite3.Error`` where the transaction as a whole came to nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        tx = Tx(self._db, self._now())
        outcomes = [self._in_savepoint(work, tx) for work in writes]
        began = time.monotonic()
        self._db.conn.execute("COMMIT")
        return outcomes, time.monotonic() - began

    def _in_savepoint(self, work: _Work, tx: Tx) -> _Outcome:
        conn = self._db.conn
        conn.execute("SAVEPOINT closure")
        outcome = self._attempt(work, tx)
        if not conn.in_transaction or _is_latching(outcome.error):
            # SQLite gave up all of it (disk full, I/O error), or the file is damaged: nothing of it may stand
            raise _cause(outcome.error)
        if outcome.error is not None:
            conn.execute("ROLLBACK TO closure")
        conn.execute("RELEASE closure")
        return outcome

    def _abandon(self, error: sqlite3.Error) -> None:
        if _is_latching(error):
            self.failed = f"the disk or the file failed: {error}"
        with contextlib.suppress(sqlite3.Error):
            self._db.rollback()

    def _lost(self, error: sqlite3.Error) -> EdgedError:
        return _translated(error, self._path) or Transient(
            Reason.STORAGE_FAILED, f"the transaction was undone: {error}"
        )

    def _deliver(self, outcomes: list[_Outcome], observed_s: float | None) -> None:
        super()._deliver(outcomes, observed_s)
        if self._observe is not None and observed_s is not None:
            self._observe(observed_s)


def _cause(error: BaseException | None) -> sqlite3.Error:
    """The SQLite error behind ``error``; one that says so where a closure ended the transaction itself."""
    inner = error.__cause__ if isinstance(error, EdgedError) else error
    if isinstance(inner, sqlite3.Error):
        return inner
    return sqlite3.OperationalError("a closure ended the transaction that it was given")


def _is_latching(error: BaseException | None) -> bool:
    """Whether nobody knows any more what the disk holds, so that to write on would make it worse."""
    code: int = getattr(error.__cause__ if isinstance(error, EdgedError) else error, "sqlite_errorcode", 0)
    return code & 0xFF in _DAMAGED or code == sqlite3.SQLITE_IOERR_FSYNC


def _translated(error: sqlite3.Error, path: Path) -> EdgedError | None:
    """The meaning of a storage fault; None for what is a bug or a broken constraint."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    primary = code & 0xFF
    translated: EdgedError | None = None
    if primary == sqlite3.SQLITE_FULL or (primary == sqlite3.SQLITE_IOERR and _no_space(path.parent)):
        translated = Transient(Reason.DISK_FULL, f"no space for {path}: free some in {path.parent}")
    elif primary in _BUSY:
        translated = Transient(Reason.STORAGE_FAILED, f"{path} is in use by another process: {error}")
    elif primary in _CANNOT:
        translated = Permanent(
            Reason.STORAGE_FAILED, f"{path}: {error} ({getattr(error, 'sqlite_errorname', code)})"
        )
    if translated is not None:
        translated.__cause__ = error
    return translated


def _no_space(folder: Path) -> bool:
    """Whether an I/O error was a full disk or quota in disguise: SQLite reports only ENOSPC of a write as
    such.
    """
    probe = folder / "space-probe"
    try:
        write_durably(probe, bytes(65536), 0o600)
    except Transient as error:
        return error.reason is Reason.DISK_FULL
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    return False


@dataclass(frozen=True, slots=True)
class _Opened:
    writer: Database | None
    reader: Database | None
    reason: str | None


def _open(path: Path) -> _Opened:
    """Check, migrate and open; blocks."""
    try:
        # two processes that start together: to switch to WAL has no time-out, and a migration runs once
        with locked_folder(path.parent):
            reason = _fault(path)
            if reason is None:
                return _open_writable(path)
    except OSError as error:
        raise Permanent(Reason.STORAGE_FAILED, f"{path}: {error.strerror}") from error
    except sqlite3.Error as error:
        translated = _translated(error, path)
        if not isinstance(translated, Permanent) or not path.exists():
            raise translated or error from error
        reason = f"the file is damaged: {error}" if _is_latching(error) else translated.detail
    _log.error("%s is opened read-only: %s", path, reason)
    return _Opened(None, _open_damaged(path), reason)


def _open_writable(path: Path) -> _Opened:
    writer = _connect(path, "rwc")
    try:
        writer.enable_wal()
        migrations.migrate(writer, path)
        reader = _connect(path, "rw")
        reader.execute("PRAGMA query_only = ON")
    except BaseException:
        writer.close()
        raise
    return _Opened(writer, reader, None)


def _open_damaged(path: Path) -> Database | None:
    try:
        return _connect(path, "ro")
    except sqlite3.Error:
        return None


def _connect(path: Path, mode: str) -> Database:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    conn = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    conn.row_factory = sqlite3.Row
    try:
        for pragma in _PRAGMAS:
            conn.execute(pragma)
        return Database(conn, execute_plugins=False)
    except BaseException:
        conn.close()
        raise


def _fault(path: Path) -> str | None:
    """Why the database at ``path`` must not be written; None where it is sound or is not there yet.

    Read-only, so that a damaged file stays as it was found.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    with contextlib.closing(_connect(path, "ro")) as db:
        return _first_fault(db)


def _first_fault(db: Database) -> str | None:
    unknown = migrations.why_unknown(db)
    if unknown is not None:
        return unknown
    found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        return f"the file is damaged: {' '.join(str(found).split())}"
    broken = db.execute("PRAGMA foreign_key_check").fetchone()
    return (
        None if broken is None else f"a row of {broken[0]} refers to a row of {broken[2]} that is not there"
    )
