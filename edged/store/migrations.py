"""The schema, as numbered steps. A step that was published is never changed: a new one is added.

Each step runs in one transaction together with its ``user_version``. Before the first step on a database that
holds something, a copy is kept beside it (``edged.db.v3.bak`` holds version 3); the newest two copies stay.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sqlite_utils import Database

from edged_firmware.durable import fsync_folder, replace_durably

__all__ = ["MIGRATIONS", "Migration", "latest", "migrate", "version", "why_unknown"]

_COPIES: Final = 2


@dataclass(frozen=True, slots=True)
class Migration:
    """One step: ``sql`` brings a database of version ``version - 1`` to ``version``."""

    version: int
    sql: str


_V1: Final = """
CREATE TABLE twin (
    device TEXT NOT NULL CHECK (device <> ''),
    side TEXT NOT NULL CHECK (side IN ('desired', 'reported')),
    name TEXT NOT NULL CHECK (name <> ''),
    value TEXT NOT NULL CHECK (json_valid(value)),
    version INTEGER NOT NULL CHECK (version >= 1),
    time TEXT NOT NULL,
    source TEXT NOT NULL,
    unit TEXT,
    PRIMARY KEY (device, side, name)
) STRICT, WITHOUT ROWID;

CREATE TABLE job (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE CHECK (id <> ''),
    device TEXT NOT NULL CHECK (device <> ''),
    component TEXT NOT NULL CHECK (component <> ''),
    release TEXT NOT NULL,
    desired_version INTEGER NOT NULL,
    run INTEGER NOT NULL,
    source TEXT NOT NULL,
    created TEXT NOT NULL,
    updated TEXT NOT NULL,
    deadline TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('queued', 'fetching', 'ready', 'staging', 'activating', 'verifying',
        'reverting', 'succeeded', 'failed', 'cancelled', 'reverted')),
    revision INTEGER NOT NULL CHECK (revision >= 0),
    attempts INTEGER NOT NULL CHECK (attempts >= 0),
    steps INTEGER NOT NULL CHECK (steps >= 0),
    trial_boots INTEGER NOT NULL CHECK (trial_boots >= 0),
    touched INTEGER NOT NULL CHECK (touched IN (0, 1)),
    cancel TEXT,
    waiting_reason TEXT,
    waiting_until TEXT,
    waiting_detail TEXT NOT NULL,
    reason TEXT,
    detail TEXT NOT NULL,
    verified TEXT CHECK (verified IS NULL OR json_valid(verified)),
    fallback TEXT CHECK (fallback IS NULL OR json_valid(fallback)),
    no_fallback INTEGER NOT NULL CHECK (no_fallback IN (0, 1)),
    done_bytes INTEGER NOT NULL CHECK (done_bytes >= 0),
    total_bytes INTEGER NOT NULL CHECK (total_bytes >= 0),
    retry_of TEXT REFERENCES job (id) ON DELETE SET NULL,
    UNIQUE (device, component, desired_version, run),
    CHECK ((waiting_reason IS NULL) = (waiting_until IS NULL)),
    CHECK (state NOT IN ('failed', 'cancelled', 'reverted') OR reason IS NOT NULL)
) STRICT;
CREATE UNIQUE INDEX job_one_active ON job (device, component)
    WHERE state NOT IN ('succeeded', 'failed', 'cancelled', 'reverted');
CREATE INDEX job_retry ON job (retry_of);

CREATE TABLE job_history (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    job TEXT NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    time TEXT NOT NULL,
    from_state TEXT,
    to_state TEXT NOT NULL,
    reason TEXT,
    event TEXT NOT NULL,
    detail TEXT NOT NULL
) STRICT;
CREATE INDEX job_history_job ON job_history (job);

CREATE TABLE audit (
    seq INTEGER PRIMARY KEY,
    format INTEGER NOT NULL,
    ts TEXT NOT NULL,
    actor TEXT NOT NULL,
    event TEXT NOT NULL,
    json TEXT NOT NULL CHECK (json_valid(json)),
    prev_hash TEXT NOT NULL CHECK (length(prev_hash) = 64),
    hash TEXT NOT NULL CHECK (length(hash) = 64)
) STRICT;
CREATE TRIGGER audit_order BEFORE INSERT ON audit
    WHEN NEW.seq IS NOT (SELECT coalesce(max(seq), 0) + 1 FROM audit)
BEGIN SELECT RAISE(ABORT, 'an audit row can only be added at the end'); END;
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit
BEGIN SELECT RAISE(ABORT, 'an audit row cannot be changed'); END;
CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit
BEGIN SELECT RAISE(ABORT, 'an audit row cannot be removed'); END;

CREATE TABLE signatures (
    seq INTEGER PRIMARY KEY CHECK (seq >= 1),
    hash TEXT NOT NULL CHECK (length(hash) = 64),
    signature TEXT NOT NULL,
    ts TEXT NOT NULL
) STRICT;
CREATE TRIGGER signatures_no_update BEFORE UPDATE ON signatures
BEGIN SELECT RAISE(ABORT, 'a signed head cannot be changed'); END;
CREATE TRIGGER signatures_no_delete BEFORE DELETE ON signatures
BEGIN SELECT RAISE(ABORT, 'a signed head cannot be removed'); END;

CREATE TABLE outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    time TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind <> ''),
    device TEXT,
    job TEXT,
    payload TEXT NOT NULL CHECK (json_valid(payload)),
    key TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE outbox_consumer (
    name TEXT PRIMARY KEY CHECK (name <> ''),
    seq INTEGER NOT NULL CHECK (seq >= 0),
    lost INTEGER NOT NULL DEFAULT 0 CHECK (lost >= 0),
    updated TEXT NOT NULL
) STRICT;
"""

_V2: Final = """
CREATE TABLE artifact (
    sha256 TEXT PRIMARY KEY CHECK (length(sha256) = 64 AND sha256 NOT GLOB '*[^0-9a-f]*'),
    size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),
    kind TEXT NOT NULL CHECK (kind <> ''),
    source TEXT NOT NULL,
    created TEXT NOT NULL,
    last_used TEXT NOT NULL
) STRICT;

CREATE TABLE release_floor (
    device TEXT NOT NULL CHECK (device <> ''),
    component TEXT NOT NULL CHECK (component <> ''),
    counter INTEGER NOT NULL CHECK (counter >= 0),
    release TEXT NOT NULL,
    time TEXT NOT NULL,
    PRIMARY KEY (device, component)
) STRICT;
CREATE TRIGGER release_floor_rises BEFORE UPDATE ON release_floor
    WHEN NEW.counter < OLD.counter OR NEW.device <> OLD.device OR NEW.component <> OLD.component
BEGIN SELECT RAISE(ABORT, 'a release floor only rises'); END;
CREATE TRIGGER release_floor_stays BEFORE DELETE ON release_floor
BEGIN SELECT RAISE(ABORT, 'a release floor cannot be removed'); END;

CREATE TABLE seen_role (
    role TEXT PRIMARY KEY CHECK (role <> ''),
    version INTEGER NOT NULL CHECK (version >= 0),
    keyids TEXT NOT NULL CHECK (json_valid(keyids)),
    time TEXT NOT NULL
) STRICT;
CREATE TRIGGER seen_role_rises BEFORE UPDATE ON seen_role
    WHEN NEW.version < OLD.version AND NOT EXISTS (
        SELECT 1 FROM json_each(OLD.keyids) WHERE value NOT IN (SELECT value FROM json_each(NEW.keyids)))
BEGIN SELECT RAISE(ABORT, 'a seen version only rises while the role keeps its keys'); END;
CREATE TRIGGER seen_role_stays BEFORE DELETE ON seen_role
BEGIN SELECT RAISE(ABORT, 'a seen version cannot be removed'); END;

CREATE TABLE meta (
    key TEXT PRIMARY KEY CHECK (key <> ''),
    value TEXT NOT NULL
) STRICT;
CREATE TRIGGER meta_time_rises BEFORE UPDATE ON meta
    WHEN OLD.key = 'time_floor' AND (NEW.key <> OLD.key OR NEW.value < OLD.value)
BEGIN SELECT RAISE(ABORT, 'the time floor only rises'); END;
CREATE TRIGGER meta_time_stays BEFORE DELETE ON meta WHEN OLD.key = 'time_floor'
BEGIN SELECT RAISE(ABORT, 'the time floor cannot be removed'); END;
"""

MIGRATIONS: Final = (Migration(1, _V1), Migration(2, _V2))


def latest() -> int:
    """The schema version that this code reads and writes."""
    return MIGRATIONS[-1].version


def version(db: Database) -> int:
    """The schema version of ``db``; 0 where it is empty."""
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def why_unknown(db: Database) -> str | None:
    """Why this code must not touch ``db``: a newer schema, or another program's; None where it may."""
    found = version(db)
    if found > latest():
        return (
            f"the database has schema version {found}, this edged knows up to {latest()}: "
            "install the newer edged again, or restore the copy that it kept beside the database"
        )
    if found == 0 and db.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone() is not None:
        return "the file is another program's database"
    return None


def migrate(db: Database, path: Path, steps: tuple[Migration, ...] = MIGRATIONS) -> None:
    """Bring ``db``, the open database at ``path``, to the version of the last of ``steps``; blocks.

    The caller holds the folder (``files.locked_folder``). Cut at any point, the database has its old or its
    new version, and the next call goes on.

    Raises ``sqlite3.Error`` as it is; ``Transient(DISK_FULL)`` where there is no space for the copy.
    """
    found = version(db)
    if 0 < found < steps[-1].version:
        _keep_copy(db, path)
    for step in steps:
        if step.version > found:
            _apply(db, step)


def _apply(db: Database, step: Migration) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        db.executescript(step.sql)
        db.execute(f"PRAGMA user_version = {step.version}")
        db.conn.execute("COMMIT")
    except BaseException:
        db.rollback()
        raise


def _keep_copy(db: Database, path: Path) -> None:
    copy = path.with_name(f"{path.name}.v{version(db)}.bak")
    tmp = path.with_name(f".{copy.name}.tmp")
    # a cut leaves one behind, and VACUUM INTO takes only a new or empty file
    tmp.unlink(missing_ok=True)
    db.execute("VACUUM INTO ?", [str(tmp)])
    replace_durably(tmp, copy)
    for old in _copies(path)[:-_COPIES]:
        old.unlink()
    fsync_folder(path.parent)


def _copies(path: Path) -> list[Path]:
    """The copies beside ``path``, oldest version first."""
    pattern = re.compile(re.escape(path.name) + r"\.v(\d+)\.bak")
    found = [(int(m[1]), p) for p in path.parent.iterdir() if (m := pattern.fullmatch(p.name))]
    return [p for _, p in sorted(found)]
