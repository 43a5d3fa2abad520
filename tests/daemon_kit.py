"""The real daemon in a folder of a test, and the real command line."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from edged.cli.client import Client, Unreachable

_START_S = 30.0


class Node:
    """The daemon on ``config``, which lies in ``folder`` beside its socket and its state."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder = folder
        self.config = config
        self.client = Client(folder / "edged.sock")
        self.database = folder / "state" / "edged.db"

    def edged(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run ``edged`` with ``arguments`` to its end."""
        command = [sys.executable, "-m", "edged", "--config", str(self.config), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    @contextlib.contextmanager
    def life(self) -> Iterator[subprocess.Popen[bytes]]:
        """A running daemon; killed without warning when the block ends."""
        with (self.folder / "daemon.log").open("ab") as log:
            command = [sys.executable, "-m", "edged", "--config", str(self.config), "run"]
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                self._await_socket(process)
                yield process
            finally:
                process.kill()
                process.wait()

    def _await_socket(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(Unreachable):
                self.client.get("status")
                return
            assert process.poll() is None, (self.folder / "daemon.log").read_text()[-2000:]
            time.sleep(0.02)
        raise AssertionError(f"the daemon did not answer within {_START_S} s")

    def rows(self, query: str) -> list[tuple[object, ...]]:
        """What the database holds."""
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(query).fetchall()
