"""``edged demo`` ends with ``demo: ok``, on the simulated board and on the fake device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("options", [[], ["--fake"]], ids=["board", "fake"])
def test_demo(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "edged", "demo", "--dir", str(tmp_path / "demo"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("demo: ok\n")
    for text in ("chunk_mismatch", "counter_lower", "Intact", "succeeded: runs blink@2.0.0"):
        assert text in done.stdout + done.stderr
    assert ("agrees byte for byte" in done.stdout) == (not options)
    assert done.stdout.count("; 0 bytes were sent") == (0 if options else 2)
