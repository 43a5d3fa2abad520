"""The part file of a download: a prefix of the wanted file that is good, and stays good across a cut.

What was written before a cut is not believed but verified again, chunk by chunk. All of it blocks. This
module fetches nothing, and does not keep two writers of one part file apart (``fetch`` does, within one
process).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from edged_firmware.chunks import ChunkIndex
from edged_firmware.durable import replace_durably, storage_error, write_durably
from edged_firmware.errors import Reason, Refused

#: Bytes taken at once where no index cuts the file into chunks.
_BLOCK_BYTES = 64 * 1024
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VALIDATOR = re.compile(r"[\x20-\x7e]{1,200}")


@dataclass(frozen=True, slots=True)
class Expected:
    """What signed metadata say about a file: ``length`` in bytes and ``sha256`` as 64 lower-case hex digits.

    Raises ValueError where these are not such.
    """

    length: int
    sha256: str

    def __post_init__(self) -> None:
        if self.length < 0 or not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"length {self.length} and sha256 {self.sha256!r} cannot be those of a file")


def part_path(dest: Path) -> Path:
    """Where the part of ``dest`` lies: ``NAME.part``, so that no two files of a folder share one."""
    return dest.with_name(f"{dest.name}.part")


def note_path(dest: Path) -> Path:
    """Where the server's validator for the part of ``dest`` lies: ``NAME.part.json``."""
    return dest.with_name(f"{dest.name}.part.json")


class PartFile:
    """The part of ``dest``, from :meth:`open` to :meth:`close`; one thread at a time.

    ``have`` is the length in bytes of the good prefix on disk. Without an index no prefix can be proved good,
    so that a part starts over at 0. Every method that touches the disk raises Transient(DISK_FULL or
    STORAGE_FAILED). Raises Refused(INDEX_MISMATCH) where index and metadata speak of different lengths.
    """

    def __init__(self, dest: Path, expect: Expected, index: ChunkIndex | None, sync_bytes: int) -> None:
        if index is not None and index.length != expect.length:
            text = f"{dest.name}: the index covers {index.length} bytes, the metadata say {expect.length}"
            raise Refused(Reason.INDEX_MISMATCH, text)
        self.have = 0
        self.length = expect.length
        self._dest = dest
        self._path = part_path(dest)
        self._expect = expect
        self._index = index
        self._chunk_bytes = index.chunk_size if index is not None else _BLOCK_BYTES
        self._sync_bytes = sync_bytes
        self._unsynced = 0
        self._sha256 = hashlib.sha256()
        self._fd = -1

    def is_done(self) -> bool:
        """Whether ``dest`` is there already, whole and as expected. Removes what is left of its part then."""
        try:
            with self._dest.open("rb") as file:
                same_length = os.fstat(file.fileno()).st_size == self.length
                done = same_length and hashlib.file_digest(file, "sha256").hexdigest() == self._expect.sha256
        except FileNotFoundError:
            return False
        except OSError as error:
            raise storage_error(error, self._dest, 0) from error
        if done:
            self._remove_leftovers()
        return done

    def open(self) -> None:
        """Open the part, verify what it holds and cut it off after its last good chunk."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(self._path, flags, 0o644)
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise OSError(f"{self._path} is not a regular file")
            self._recover()
            os.ftruncate(self._fd, self.have)
        except OSError as error:
            raise storage_error(error, self._path, self.length) from error

    def whole(self, at: int, held: int) -> int:
        """How many of ``held`` bytes from ``at``, where a chunk begins, are whole chunks of the file."""
        end = min(at + held, self.length)
        return (end if end == self.length else end - end % self._chunk_bytes) - at

    def add(self, at: int, data: bytes) -> None:
        """Take ``data``, whole chunks from offset ``at``; those before ``have`` are verified and not written.

        Raises Refused(CHUNK_MISMATCH) at the first chunk that is not good; the good ones before it are kept.
        """
        good, view = 0, memoryview(data)
        try:
            for begin in range(0, len(data), self._chunk_bytes):
                chunk = view[begin : begin + self._chunk_bytes]
                if self._index is not None:
                    self._index.check((at + begin) // self._chunk_bytes, chunk)
                good = begin + len(chunk)
        finally:
            self._write(view[max(0, self.have - at) : good])

    def finish(self) -> None:
        """Make the part, which is complete, ``dest``, lastingly.

        Raises Refused(HASH_MISMATCH), and removes the part, where it is not what the metadata say.
        """
        found = self._sha256.hexdigest()
        if found != self._expect.sha256:
            self._remove_leftovers()
            text = f"{self._dest.name}: sha256 is {found}, the metadata say {self._expect.sha256}"
            raise Refused(Reason.HASH_MISMATCH, text)
        replace_durably(self._path, self._dest)
        self._remove_leftovers()

    def close(self) -> None:
        """Close the part; what it holds stays. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def validator(self, url: str) -> str | None:
        """The validator (RFC 9110, 8.8) that came with the part's bytes, if they came from ``url``."""
        try:
            note = json.loads(note_path(self._dest).read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(note, dict) or note.get("url") != url:
            return None
        value = note.get("validator")
        return value if isinstance(value, str) and _VALIDATOR.fullmatch(value) else None

    def remember(self, url: str, validator: str | None) -> None:
        """Keep ``validator`` for the next start; None forgets. Nothing is kept where there is no index."""
        if self._index is None or validator == self.validator(url):
            return
        if validator is None or not _VALIDATOR.fullmatch(validator):
            self._remove(note_path(self._dest))
            return
        note = json.dumps({"url": url, "validator": validator}).encode()
        write_durably(note_path(self._dest), note, 0o600)

    def _recover(self) -> None:
        if self._index is None:
            return
        for number in range(self._index.count):
            offset, length = self._index.extent(number)
            chunk = os.pread(self._fd, length, offset)
            try:
                self._index.check(number, chunk)
            except Refused:
                return
            self._sha256.update(chunk)
            self.have = offset + length

    def _write(self, new: memoryview) -> None:
        try:
            while new:
                written = os.pwrite(self._fd, new, self.have)
                self._sha256.update(new[:written])
                self.have += written
                self._unsynced += written
                new = new[written:]
            if self._unsynced >= self._sync_bytes:
                os.fdatasync(self._fd)
                self._unsynced = 0
        except OSError as error:
            raise storage_error(error, self._path, self.length - self.have) from error

    def _remove_leftovers(self) -> None:
        self._remove(self._path)
        self._remove(note_path(self._dest))

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, path, 0) from error
