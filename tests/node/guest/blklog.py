"""A disk with a volatile cache, from the log of QEMU's ``blklogwrites``: what it can hold after a power cut.

The log's format is that of the kernel's dm-log-writes. A disk keeps what was written before the last flush, and of
the writes since then any part; a write that was asked to be durable (FUA) is. Not modelled: torn sectors, disks that
lie about a flush.
"""

from __future__ import annotations

import random
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guest.command import GuestError, eventually
from guest.images import run

MAGIC: Final = 0x6A736677736872
_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")
_FLUSH, _FUA, _DISCARD, _MARK = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class Write:
    """One entry of the log: ``length`` bytes at ``offset`` of the disk, which lie at ``at`` in the log."""

    offset: int
    length: int
    at: int
    flush: bool
    fua: bool
    discard: bool


def options(disk: Path, log: Path, name: str = "state") -> str:
    """The ``-blockdev`` option of a disk ``name`` whose writes are logged. Makes an empty log."""
    log.write_bytes(b"")
    return (
        f"driver=blklogwrites,node-name={name},file.driver=file,file.filename={disk},"
        f"log.driver=file,log.filename={log},log-super-update-interval=1"
    )


@contextmanager
def exported(disk: Path, log: Path, folder: Path) -> Iterator[Path]:
    """A file whose writes and flushes go to ``disk`` and are logged, for a loop device. Raises GuestError."""
    log.write_bytes(b"")
    seen = folder / "exported.raw"
    seen.touch()
    with (folder / "export.log").open("ab") as said:
        server = subprocess.Popen(
            [
                *("qemu-storage-daemon", "--blockdev", f"driver=file,node-name=disk,filename={disk}"),
                *("--blockdev", f"driver=file,node-name=log,filename={log}"),
                *(
                    "--blockdev",
                    "driver=blklogwrites,node-name=logged,file=disk,log=log,log-super-update-interval=1",
                ),
                *("--export", f"type=fuse,id=export,node-name=logged,mountpoint={seen},writable=on"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
        )
    try:
        eventually(lambda: _is_served(seen, server, folder), 60, "the exported disk")
        yield seen
    finally:
        server.terminate()
        server.wait()


def _is_served(seen: Path, server: subprocess.Popen[bytes], folder: Path) -> bool:
    if server.poll() is not None:
        raise GuestError(f"qemu-storage-daemon ended: {(folder / 'export.log').read_text()[-2000:]}")
    return seen.stat().st_size > 0


def entries(log: Path) -> int:
    """How many entries are in the log by now; also of one that is being written."""
    with log.open("rb") as file:
        head = file.read(_SUPER.size)
    if len(head) < _SUPER.size:
        return 0
    magic, _, count, _ = _SUPER.unpack(head)
    return int(count) if magic == MAGIC else 0


def parse(log: Path) -> list[Write]:
    """All entries, in order. Raises ValueError for what is no such log."""
    with log.open("rb") as file:
        magic, version, count, sector = _SUPER.unpack(file.read(_SUPER.size))
        if (magic, version) != (MAGIC, 1):
            raise ValueError(f"{log}: not a log of writes")
        found, at = [], sector
        for _ in range(count):
            file.seek(at)
            first, sectors, flags, _length = _ENTRY.unpack(file.read(_ENTRY.size))
            at += sector
            length = sectors * sector
            flag = {bit: bool(flags & bit) for bit in (_FLUSH, _FUA, _DISCARD)}
            found.append(Write(first * sector, length, at, flag[_FLUSH], flag[_FUA], flag[_DISCARD]))
            at += 0 if flag[_DISCARD] else length
    return found


def durable(writes: list[Write], point: int) -> int:
    """How many entries from the start are surely on the disk when the power fails after ``point`` entries."""
    flushes = (number for number in range(point, 0, -1) if writes[number - 1].flush)
    return next(flushes, 0)


@dataclass(frozen=True, slots=True)
class Sample:
    """What had been told when the log was at least ``entries`` long."""

    told_bytes: int
    entries: int


@contextmanager
def sampled(witness: Path, log: Path) -> Iterator[list[Sample]]:
    """Pairs of the witness's and the log's length, in that order: a cut at or after it must hold what was told."""
    samples: list[Sample] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            told = witness.stat().st_size if witness.exists() else 0
            samples.append(Sample(told, entries(log)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def crash(
    writes: list[Write], log: Path, base: Path, target: Path, point: int, dice: random.Random, *, kept: int
) -> None:
    """Make ``target`` what the disk holds after a cut at ``point``: ``base``, ``kept`` entries, some of the rest."""
    survivors = writes[:kept] + [write for write in writes[kept:point] if write.fua or dice.random() < 0.5]
    run("cp", "--sparse=always", str(base), str(target))
    with log.open("rb") as source, target.open("r+b") as disk:
        for write in survivors:
            source.seek(write.at)
            disk.seek(write.offset)
            disk.write(bytes(write.length) if write.discard else source.read(write.length))
