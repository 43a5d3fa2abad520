"""Clients and devices that others wrote, each in an environment of its own under ``.cache/peers``.

They need libraries that edged does not (pydantic), or overwrite some that it does (``paho``). What is installed is locked with
hashes in ``tests/peers/NAME.txt``; a change there makes the environment anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
CACHE: Final = ROOT / ".cache" / "peers"


def peer_python(name: str) -> Path:
    """The interpreter of the environment for ``tests/peers/NAME.txt``; made now where there is none.

    Raises ``subprocess.CalledProcessError`` where the Python package index cannot be reached.
    """
    lock = ROOT / "tests" / "peers" / f"{name}.txt"
    venv = CACHE / f"{name}-{hashlib.sha256(lock.read_bytes() + str(CACHE).encode()).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not (venv / ".ready").exists():
            shutil.rmtree(venv, ignore_errors=True)
            _run(sys.executable, "-m", "venv", venv)
            pip = (venv / "bin" / "python", "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check")
            _run(*pip, "install", "--require-hashes", "--no-deps", "--requirement", lock)
            (venv / ".ready").touch()
    return venv / "bin" / "python"


def _run(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True)
