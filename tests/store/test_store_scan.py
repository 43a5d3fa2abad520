"""Sizes are taken while downloads come and go."""

from __future__ import annotations

import threading
from pathlib import Path

from edged.store import artifacts


def test_a_file_that_goes_while_the_folder_is_read_is_not_counted(tmp_path: Path) -> None:
    over = threading.Event()

    def come_and_go() -> None:
        number = 0
        while not over.is_set():
            file = tmp_path / f"{number % 50:064x}.tmp"
            file.touch()
            file.unlink()
            number += 1

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(3000):
            artifacts._sizes(tmp_path, artifacts._PARTIAL)
    finally:
        over.set()
        thread.join()
