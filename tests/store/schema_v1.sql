-- The schema as it was first published. Never change it.

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
PRAGMA user_version = 1;
