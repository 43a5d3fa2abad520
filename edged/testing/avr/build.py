"""Builds the simulator host and the test applications into a cache folder, once per source.

Several builders at once are safe: each works in a folder of its own and renames the finished file into place.
Nothing that is built here belongs into the repository.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from edged.testing.avr.boards import ATMEGABOOT_328P, OPTIBOOT_328P, STK500BOOT_2560, Board

_HERE: Final = Path(__file__).parent
_HOST_FLAGS: Final = ("-O2", "-std=gnu11", "-Wall", "-Wextra")
_APP_FLAGS: Final = ("-Os", "-std=gnu11", "-Wall", "-Wextra", "-DF_CPU=16000000UL")


class SimulatorError(RuntimeError):
    """The simulator cannot be built or does not run; the text says which command said what."""


def missing_packages() -> list[str]:
    """The Debian packages that are needed here and are not installed, sorted; empty where all is there."""
    needed = {
        "gcc": shutil.which("gcc"),
        "gcc-avr": shutil.which("avr-gcc"),
        "binutils-avr": shutil.which("avr-objcopy"),
        "avr-libc": _file("/usr/lib/avr/include/avr/io.h"),
        "libsimavr-dev": _file("/usr/include/simavr/sim_avr.h"),
        "libelf-dev": _file("/usr/include/libelf.h"),
        "arduino-core-avr": all(
            board.boot_hex.is_file() for board in (OPTIBOOT_328P, ATMEGABOOT_328P, STK500BOOT_2560)
        ),
    }
    return sorted(package for package, there in needed.items() if not there)


def cache_folder() -> Path:
    """Where built files are kept: ``$XDG_CACHE_HOME/edged/avr``, else ``~/.cache/edged/avr``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "edged" / "avr"


def build_host() -> Path:
    """The program that runs a board. Raises SimulatorError where it cannot be built."""
    source = _HERE / "host.c"
    command = ("gcc", *_HOST_FLAGS, "-o", "host", str(source), "-lsimavr", "-lelf")
    return _cached("host", [source.read_bytes(), *command], "host", lambda folder: _run(command, folder))


def build_app(
    *,
    version: str,
    name: str = "demo",
    filler_bytes: int = 0,
    healthy: bool = True,
    mcu: str = "atmega328p",
    baud: int = 115200,
) -> Path:
    """An application of about 1.2 kB plus ``filler_bytes``, as Intel HEX.

    What it says is described in ``app.c``. The filler depends on ``name`` and ``version``, so that two
    versions differ in every page. An application that is not ``healthy`` starts, sends three bytes that are
    no line, and stays silent. Raises SimulatorError where it cannot be built (also: too large for the part).
    """
    filler = random.Random(f"{name} {version}").randbytes(filler_bytes)
    source = _HERE / "app.c"
    command = [
        *("avr-gcc", *_APP_FLAGS, f"-mmcu={mcu}", f"-DBAUD={baud}"),
        *(f'-DAPP_NAME="{name}"', f'-DAPP_VERSION="{version}"'),
        *(() if healthy else ("-DUNHEALTHY",)),
        *(('-DFILLER="filler"',) if filler else ()),
        *("-o", "app.elf", str(source)),
    ]

    def make(folder: Path) -> None:
        (folder / "filler").write_bytes(filler)
        _run(command, folder)
        _run(("avr-objcopy", "-O", "ihex", "-R", ".eeprom", "app.elf", "app.hex"), folder)

    key: list[str | bytes] = [source.read_bytes(), filler, *command]
    return _cached(f"app-{mcu}-{version}.hex", key, "app.hex", make)


def boot_code(board: Board) -> Path:
    """The boot loader's code as raw bytes, to be loaded at ``board.boot_at``. Raises SimulatorError.

    Only the first section of the HEX file: optiboot's version word at the end of flash is not code.
    """
    command = (
        *("avr-objcopy", "-I", "ihex", "-O", "binary", "-j", ".sec1"),
        *(str(board.boot_hex), "boot.bin"),
    )
    key: list[str | bytes] = [board.boot_hex.read_bytes(), *command]
    return _cached(f"{board.name}.bin", key, "boot.bin", lambda folder: _run(command, folder))


def _file(path: str) -> bool:
    return Path(path).is_file()


def _cached(name: str, key: Sequence[str | bytes], made: str, make: Callable[[Path], None]) -> Path:
    digest = hashlib.sha256()
    for part in key:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    cache = cache_folder()
    target = cache / f"{digest.hexdigest()[:16]}-{name}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            make(Path(folder))
            (Path(folder) / made).rename(target)
    return target


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise SimulatorError(
            f"{command[0]} is not installed; missing packages: {missing_packages()}"
        ) from error
    if done.returncode != 0:
        raise SimulatorError(f"{' '.join(command)}: {done.stderr.strip()}")
