"""The one durable write: a file is there whole after a power cut, or it is there as it was before.

Temp file in the same folder, write, fsync, rename, fsync of the folder. All functions block: on an event
loop call them through ``asyncio.to_thread``. This module does not create folders and does not lock against
other programs that write the same path by other means.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from edged_firmware.errors import Reason, Transient

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Make ``path`` hold exactly ``data``, lastingly, with exactly the permission bits ``mode`` (no umask).

    Several writers of one path, threads or processes, come one after another. A symbolic link at ``path`` is
    replaced, not followed. A cut leaves at most one file ``.NAME.tmp`` in the folder; the next write uses it
    up.
    Raises Transient(DISK_FULL) with the folder and the bytes wanted, Transient(STORAGE_FAILED) otherwise.
    """
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        fd = _open_alone(tmp)
        try:
            _fill_and_rename(fd, tmp, path, data, mode)
        finally:
            os.close(fd)
        _fsync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path, len(data)) from error


def replace_durably(tmp: Path, path: Path) -> None:
    """Move the finished file ``tmp`` over ``path``, lastingly; both must lie on one file system.

    The bytes of ``tmp`` reach the disk before its new name does. Errors as :func:`write_durably`.
    """
    try:
        fsync_file(tmp)
        tmp.replace(path)
        _fsync_folder(path.parent)
        if tmp.parent != path.parent:
            _fsync_folder(tmp.parent)
    except OSError as error:
        raise storage_error(error, path, 0) from error


def fsync_folder(folder: Path) -> None:
    """Make the names in ``folder`` lasting. Raises Transient(STORAGE_FAILED)."""
    try:
        _fsync_folder(folder)
    except OSError as error:
        raise storage_error(error, folder, 0) from error


def fsync_file(path: Path) -> None:
    """Make the bytes of ``path`` lasting. Raises OSError as it is."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def storage_error(error: OSError, path: Path, wanted_bytes: int) -> Transient:
    """The Transient that stands for ``error`` at ``path``: DISK_FULL (disk or quota), else STORAGE_FAILED."""
    if error.errno in _FULL:
        return Transient(
            Reason.DISK_FULL, f"no space in {path.parent}: {wanted_bytes} bytes wanted for {path.name}"
        )
    return Transient(Reason.STORAGE_FAILED, f"{path}: {error.strerror or error}")


def _open_alone(tmp: Path) -> int:
    """Open ``tmp`` for this writer only; returns its descriptor, which holds the lock."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        fd = os.open(tmp, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if _still_there(fd, tmp):
                return fd
        except OSError:
            os.close(fd)
            raise
        # The writer before us has renamed this very file into place: to write to it now would tear its work.
        os.close(fd)


def _still_there(fd: int, tmp: Path) -> bool:
    try:
        there = tmp.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _fill_and_rename(fd: int, tmp: Path, path: Path, data: bytes, mode: int) -> None:
    try:
        os.ftruncate(fd, 0)
        os.fchmod(fd, mode)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
        tmp.replace(path)
    except OSError:
        with suppress(OSError):
            tmp.unlink()
        raise


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
