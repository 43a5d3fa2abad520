"""``doctor --backup``: all that makes this node this node, in one file.

**The file** (a tar archive, mode 0600, for whoever has it can sign as this node)::

    state/edged.db            twins, jobs, floors, audit trail: one moment of the database, checked
    state/node-key.pem        the node's key
    state/trust/root.json     the root of trust that an operator set, if so
    config/...                edged.toml, models.d, devices.d, credentials

Images are left out: they are fetched again. To put it back, see "Back up" in the README.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edged.errors import Permanent, Reason

if TYPE_CHECKING:
    from edged.config import Config

_LOOK = "find out who put it there, and replace it by the file itself"
_AS_ROOT = "run this command as root"
_CONFIG_PARTS = ("models.d/*.toml", "devices.d/*.toml", "credentials/*")


@dataclass(frozen=True, slots=True)
class Member:
    """One file of the archive."""

    name: str
    data: bytes
    mode: int = 0o600


def members(config: Config, config_path: Path) -> Iterator[Member]:
    """What belongs into a backup, read now.

    Raises ``Permanent(STORAGE_FAILED)`` where the state cannot be read, or the database is damaged.
    """
    state = config.node.state_dir
    yield Member("state/edged.db", _database(state / "edged.db"))
    yield Member("state/node-key.pem", _read(state / "node-key.pem"))
    root = state / "trust" / "root.json"
    if root.exists():
        yield Member("state/trust/root.json", _read(root), 0o644)
    for file in _config_files(config_path):
        mode = 0o600 if file.parent.name == "credentials" else 0o644
        yield Member(f"config/{file.relative_to(config_path.parent)}", _read(file), mode)


def archive(found: Iterable[Member]) -> bytes:
    """The tar archive (POSIX pax, not compressed) of ``found``, all owned by root: who restores gives it to the daemon."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in found:
            info = tarfile.TarInfo(member.name)
            info.size, info.mode = len(member.data), member.mode
            tar.addfile(info, io.BytesIO(member.data))
    return buffer.getvalue()


def _config_files(config_path: Path) -> Iterator[Path]:
    yield config_path
    for pattern in _CONFIG_PARTS:
        yield from (file for file in sorted(config_path.parent.glob(pattern)) if file.is_file())


def _database(path: Path) -> bytes:
    """The database at this moment, as the daemon that may be writing to it has committed it."""
    import sqlite3

    from edged.cli.files import open_database

    try:
        with closing(open_database(path)) as source, closing(sqlite3.connect(":memory:")) as copy:
            source.conn.backup(copy)
            check = copy.execute("PRAGMA quick_check(1)").fetchone()[0]
            data = copy.serialize()
    except sqlite3.Error as exc:
        raise Permanent(Reason.STORAGE_FAILED, f"{path}: {exc}") from exc
    if check != "ok":
        raise Permanent(
            Reason.STORAGE_FAILED,
            f"{path} is damaged ({check}): stop the daemon and copy {path.parent} as it is",
        )
    return data


def _read(path: Path) -> bytes:
    """A regular file, not a link: root reads what the daemon wrote, and one that was taken over could name any file."""
    try:
        with os.fdopen(
            os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb"
        ) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise Permanent(Reason.STORAGE_FAILED, f"{path} is not a regular file: {_LOOK}")
            return file.read()
    except OSError as exc:
        why = f"it is a link: {_LOOK}" if exc.errno == errno.ELOOP else f"{exc.strerror}; {_AS_ROOT}"
        raise Permanent(Reason.STORAGE_FAILED, f"{path}: {why}") from exc
