"""Images and chunk indexes on the node's disk, named by their SHA-256: ``<state>/artifacts/<sha256>``.

The file comes first, then its row; when something goes, the row goes first. So a cut leaves at most a file
without a row, which :meth:`Artifacts.recover` removes at the next start. What a file holds is *not* trusted
for being here: it is verified again whenever it is read for a device.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import sqlite3
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from edged.clock import from_text, to_text
from edged.errors import Permanent, Reason, Refused, Transient
from edged_firmware.durable import fsync_folder, replace_durably

from .database import Store, Tx

__all__ = ["Artifact", "Artifacts", "Collected", "get", "pinned", "touch", "used_bytes"]

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_PARTIAL: Final = re.compile(r"[0-9a-f]{64}(\..+)?")
"""A download, and what the downloader keeps beside it under the same name."""
_HOLD: Final = timedelta(minutes=10)
"""What was used more recently stays: its job may be about to pin it."""
_RESERVE_BYTES: Final = 16 * 1024 * 1024
"""Left free on the disk, for the database and its log."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file: ``kind`` says what it is (``image``, ``index``, ``read_out``), ``source`` whence it came."""

    sha256: str
    size_bytes: int
    kind: str
    source: str
    created: datetime
    last_used: datetime


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed: files, bytes, rows whose file was not there."""

    files: int = 0
    size_bytes: int = 0
    rows: int = 0


def get(tx: Tx, sha256: str) -> Artifact | None:
    """The row, or None."""
    row = tx.db.execute("SELECT * FROM artifact WHERE sha256 = ?", [sha256]).fetchone()
    return None if row is None else _artifact(row)


def touch(tx: Tx, sha256: str) -> bool:
    """Note that the artifact is used now; False where it is not known."""
    return bool(
        tx.db.execute(
            "UPDATE artifact SET last_used = ? WHERE sha256 = ?", [to_text(tx.now), sha256]
        ).rowcount
    )


def used_bytes(tx: Tx) -> int:
    """The sizes of all artifacts together."""
    return int(tx.db.execute("SELECT coalesce(sum(size_bytes), 0) FROM artifact").fetchone()[0])


def pinned(tx: Tx) -> frozenset[str]:
    """The digests that must stay: image, index and fallback of each job that is not ended, and what each
    device runs.

    What a device runs is what its last succeeded job wrote, or the fallback that its last reverted job went
    back to.
    """
    return frozenset(row[0] for row in tx.db.execute(_PINNED) if row[0] is not None)


_PINNED: Final = """
WITH active AS (
    SELECT verified, fallback FROM job WHERE state NOT IN ('succeeded', 'failed', 'cancelled', 'reverted')
), running AS (
    SELECT CASE state WHEN 'succeeded' THEN verified END AS verified,
           CASE state WHEN 'reverted' THEN fallback END AS fallback
    FROM job WHERE seq IN (
        SELECT max(seq) FROM job WHERE state IN ('succeeded', 'reverted') GROUP BY device, component)
), stranded AS (
    -- what a job that could not go back would have gone back to
    SELECT NULL AS verified, CASE state WHEN 'failed' THEN fallback END AS fallback
    FROM job WHERE seq IN (SELECT max(seq) FROM job WHERE touched = 1 GROUP BY device, component)
), holding AS (SELECT * FROM active UNION ALL SELECT * FROM running UNION ALL SELECT * FROM stranded)
SELECT json_extract(verified, '$.image.sha256') FROM holding
UNION SELECT json_extract(verified, '$.index.sha256') FROM holding
UNION SELECT json_extract(fallback, '$.image_sha256') FROM holding
UNION SELECT json_extract(fallback, '$.index_sha256') FROM holding
"""


class Artifacts:
    """The folder and its rows. File work runs in threads; one change of the folder at a time.

    ``quota_bytes`` bounds all artifacts and partial downloads together; ``reserve_bytes`` is left free on the
    disk.
    """

    def __init__(
        self, store: Store, folder: Path, quota_bytes: int, *, reserve_bytes: int = _RESERVE_BYTES
    ) -> None:
        self._store = store
        self._folder = folder
        self._quota_bytes = quota_bytes
        self._reserve_bytes = reserve_bytes
        self._lock = asyncio.Lock()

    def path(self, sha256: str) -> Path:
        """Where the artifact is, or would be. Raises ``ValueError`` where ``sha256`` is not 64 hex digits."""
        return self._folder / _checked(sha256)

    def partial(self, sha256: str) -> Path:
        """Where to download it to: the same at each call, so that a download goes on after a restart."""
        return self._folder / "partial" / _checked(sha256)

    async def recover(self) -> Collected:
        """At start: make the folders, remove files without a row, rows without a whole file, stale downloads.

        A partial download stays as long as a job wants it.
        """
        async with self._lock:
            found = await asyncio.to_thread(_scan, self._folder)
            if self._store.read_only_reason is not None:
                return Collected()
            known, wanted = await self._store.write(lambda tx: (_drop_missing(tx, found), pinned(tx)))
            gone = [self._folder / name for name in found if name not in known.kept]
            partials = await asyncio.to_thread(_sizes, self._folder / "partial", _PARTIAL)
            gone += [
                self._folder / "partial" / name for name in partials if name.partition(".")[0] not in wanted
            ]
            freed = await asyncio.to_thread(_remove, gone)
            return Collected(len(gone), freed, known.dropped)

    async def adopt(self, tmp: Path, kind: str, source: str, expected_sha256: str | None = None) -> str:
        """Move the finished file ``tmp`` (on the same file system) in, lastingly; returns its SHA-256 in hex.

        A file that is there already is replaced: the new bytes were verified just now.
        Raises ``Refused(HASH_MISMATCH)`` where it is not ``expected_sha256``, and removes it;
        ``Transient(DISK_FULL)`` and the errors of :meth:`Store.write`.
        """
        digest, size = await asyncio.to_thread(_measure, tmp)
        if expected_sha256 is not None and digest != expected_sha256:
            await asyncio.to_thread(tmp.unlink, missing_ok=True)
            raise Refused(Reason.HASH_MISMATCH, f"{source}: {digest} came, {expected_sha256} was expected")
        async with self._lock:
            await asyncio.to_thread(replace_durably, tmp, self._folder / digest)
            await self._store.write(lambda tx: _put(tx, digest, size, kind, source))
        return digest

    async def locate(self, sha256: str) -> Path | None:
        """The artifact's file, noted as used now; None where it is not here."""
        path = self.path(sha256)
        known = await self._store.write(lambda tx: touch(tx, sha256))
        return path if known and await asyncio.to_thread(path.is_file) else None

    async def collect(self) -> Collected:
        """Bring the artifacts under the quota, as far as pins allow; the least recently used go first."""
        async with self._lock:
            return await self._free(await self._shortage(0))

    async def room_for(self, size_bytes: int, sha256: str = "") -> None:
        """Make sure that an artifact of ``size_bytes`` fits, removing what nobody needs. What is there already of the
        download of ``sha256`` is a part of it.

        Raises ``Transient(DISK_FULL)`` with what is wanted, the quota, what is in use and what the disk has
        free.
        """
        async with self._lock:
            partials = await asyncio.to_thread(_sizes, self._folder / "partial", _PARTIAL)
            held = sum(size for name, size in partials.items() if name.partition(".")[0] == sha256)
            missing = max(size_bytes - held, 0)
            shortage = await self._shortage(missing)
            if shortage > 0:
                await self._drop_partials(partials, sha256)
                shortage = await self._shortage(missing)
            if shortage > 0:
                await self._free(shortage)
                shortage = await self._shortage(missing)
            if shortage > 0:
                raise await self._no_room(missing)

    async def _drop_partials(self, partials: Collection[str], but: str) -> None:
        """Downloads that no active job goes on with."""
        wanted = {*await self._store.read(pinned), but}
        gone = [self._folder / "partial" / name for name in partials if name.partition(".")[0] not in wanted]
        await asyncio.to_thread(_remove, gone)

    async def _shortage(self, size_bytes: int) -> int:
        """How many bytes must go before ``size_bytes`` more fit; 0 or less where they fit."""
        used, free = await self._levels()
        over = used + size_bytes - self._quota_bytes
        return max(over, size_bytes + self._reserve_bytes - free) if size_bytes else over

    async def _levels(self) -> tuple[int, int]:
        partials = await asyncio.to_thread(_sizes, self._folder / "partial", _PARTIAL)
        used = await self._store.read(used_bytes) + sum(partials.values())
        return used, await asyncio.to_thread(_free_bytes, self._folder)

    async def _free(self, wanted_bytes: int) -> Collected:
        if wanted_bytes <= 0:
            return Collected()
        victims = await self._store.write(lambda tx: _drop_oldest(tx, wanted_bytes))
        freed = await asyncio.to_thread(_remove, [self._folder / sha256 for sha256 in victims])
        return Collected(len(victims), freed)

    async def _no_room(self, size_bytes: int) -> Transient:
        used, free = await self._levels()
        return Transient(
            Reason.DISK_FULL,
            f"{size_bytes} bytes wanted in {self._folder}: {used} of {self._quota_bytes} (quota) are in use"
            f" by jobs and devices, the disk has {free} free, of which {self._reserve_bytes} are kept",
        )


@dataclass(frozen=True, slots=True)
class _Known:
    kept: Collection[str]
    dropped: int


def _put(tx: Tx, sha256: str, size_bytes: int, kind: str, source: str) -> None:
    now = to_text(tx.now)
    tx.db.execute(
        "INSERT INTO artifact (sha256, size_bytes, kind, source, created, last_used)"
        " VALUES (?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (sha256) DO UPDATE SET last_used = excluded.last_used",
        [sha256, size_bytes, kind, source, now, now],
    )


def _drop_missing(tx: Tx, found: dict[str, int]) -> _Known:
    """Remove the rows whose file is not there in its full size."""
    rows = tx.db.execute("SELECT sha256, size_bytes FROM artifact").fetchall()
    missing = [row["sha256"] for row in rows if found.get(row["sha256"]) != row["size_bytes"]]
    for sha256 in missing:
        tx.db.execute("DELETE FROM artifact WHERE sha256 = ?", [sha256])
    return _Known({row["sha256"] for row in rows} - set(missing), len(missing))


def _drop_oldest(tx: Tx, wanted_bytes: int) -> list[str]:
    """Remove rows that nothing pins, least recently used first, until ``wanted_bytes`` are freed."""
    pins, freed, victims = pinned(tx), 0, []
    rows = tx.db.execute(
        "SELECT sha256, size_bytes FROM artifact WHERE last_used < ? ORDER BY last_used, sha256",
        [to_text(tx.now - _HOLD)],
    ).fetchall()
    for row in rows:
        if freed >= wanted_bytes:
            break
        if row["sha256"] not in pins:
            victims.append(str(row["sha256"]))
            freed += row["size_bytes"]
            tx.db.execute("DELETE FROM artifact WHERE sha256 = ?", [row["sha256"]])
    return victims


def _artifact(row: sqlite3.Row) -> Artifact:
    return Artifact(
        row["sha256"],
        row["size_bytes"],
        row["kind"],
        row["source"],
        from_text(row["created"]),
        from_text(row["last_used"]),
    )


def _checked(sha256: str) -> str:
    if _SHA256.fullmatch(sha256) is None:
        raise ValueError(f"not a SHA-256 in hex: {sha256!r}")
    return sha256


def _scan(folder: Path) -> dict[str, int]:
    """Make the folders where they are missing; the sizes of the artifact files by name."""
    try:
        (folder / "partial").mkdir(parents=True, exist_ok=True, mode=0o750)
        fsync_folder(folder)
        fsync_folder(folder.parent)
        return _sizes(folder)
    except OSError as error:
        raise Permanent(Reason.STORAGE_FAILED, f"{folder}: {error.strerror}") from error


def _sizes(folder: Path, names: re.Pattern[str] = _SHA256) -> dict[str, int]:
    with os.scandir(folder) as entries:
        sizes = {}
        for entry in entries:
            # a download may replace or remove its files meanwhile
            with contextlib.suppress(FileNotFoundError):
                if names.fullmatch(entry.name) and entry.is_file():
                    sizes[entry.name] = entry.stat().st_size
        return sizes


def _measure(path: Path) -> tuple[str, int]:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size
    except OSError as error:
        raise Permanent(Reason.STORAGE_FAILED, f"{path}: {error.strerror}") from error


def _remove(paths: list[Path]) -> int:
    """Remove files; returns their bytes. One that cannot be removed is left to the next start."""
    freed = 0
    for path in paths:
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    for folder in {path.parent for path in paths}:
        fsync_folder(folder)
    return freed


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
