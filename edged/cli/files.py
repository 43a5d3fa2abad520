"""The daemon's files, read by a command while the daemon may run or may not."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlite_utils import Database


def open_database(path: Path) -> Database:
    """The database at ``path``, read-only. Raises ``sqlite3.Error``."""
    from sqlite_utils import Database

    conn = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    conn.row_factory = sqlite3.Row
    return Database(conn, execute_plugins=False)
