"""The durable write: whole or as before, in the right order, with the right error."""

from __future__ import annotations

import errno
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edged_firmware import durable
from edged_firmware.durable import fsync_folder, replace_durably, write_durably
from edged_firmware.errors import Reason, Transient


class Cut(BaseException):
    """The power is gone: nothing may catch this."""


def test_the_file_holds_the_data_and_the_mode(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        write_durably(tmp_path / "a", b"one")
        write_durably(tmp_path / "b", b"", mode=0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_bytes() == b"one"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_link_is_replaced_and_its_goal_stays(tmp_path: Path) -> None:
    (tmp_path / "goal").write_bytes(b"goal")
    (tmp_path / "link").symlink_to("goal")
    write_durably(tmp_path / "link", b"new")
    assert (tmp_path / "goal").read_bytes() == b"goal"
    assert not (tmp_path / "link").is_symlink()


def test_bytes_then_name_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(fd: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "bytes")
        real_fsync(fd)

    def replace(self: Path, target: Path) -> Path:
        done.append("name")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_durably(tmp_path / "a", b"one")
    assert done == ["bytes", "name", "folder"]
    done.clear()
    replace_durably(tmp_path / "a", tmp_path / "b")
    assert done == ["bytes", "name", "folder"]


@pytest.mark.parametrize("effect", ["ftruncate", "write", "fsync", "replace"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cut_leaves_the_old_or_the_new_and_the_next_write_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, effect: str, when: str
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old" * 100)
    owner = Path if effect == "replace" else os
    real = getattr(owner, effect)

    def cut(*arguments: object) -> None:
        if when == "after":
            real(*arguments)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(owner, effect, cut)
        with pytest.raises(Cut):
            write_durably(path, b"new")
    expected = b"new" if (effect, when) == ("replace", "after") else b"old" * 100
    assert path.read_bytes() == expected
    write_durably(path, b"next")
    assert path.read_bytes() == b"next"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_where_and_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(fd: int, data: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(Transient) as raised:
        write_durably(path, b"x" * 4711)
    assert raised.value.reason is Reason.DISK_FULL
    assert str(tmp_path) in raised.value.detail
    assert "4711" in raised.value.detail
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert path.read_bytes() == b"old"


def test_a_real_full_device_is_disk_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(durable, "_open_alone", lambda tmp: os.open("/dev/full", os.O_RDWR))
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: None)
    monkeypatch.setattr(os, "fchmod", lambda fd, mode: None)
    with pytest.raises(Transient, match="disk_full"):
        write_durably(tmp_path / "a", b"x")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    write_durably(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    "call",
    [
        lambda gone: write_durably(gone / "a", b""),
        lambda gone: replace_durably(gone / "t", gone / "a"),
        fsync_folder,
    ],
    ids=["write", "replace", "fsync"],
)
def test_a_missing_folder_is_storage_failed(tmp_path: Path, call: object) -> None:
    assert callable(call)
    with pytest.raises(Transient) as raised:
        call(tmp_path / "gone")
    assert raised.value.reason is Reason.STORAGE_FAILED
    assert str(tmp_path / "gone") in raised.value.detail


def test_many_writers_of_one_path_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "a"
    texts = [bytes([n]) * 20_000 for n in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_durably(path, text), texts * 2))
    assert path.read_bytes() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_in_the_way_leaves_no_temp_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(Transient, match="storage_failed"):
        write_durably(tmp_path / "a", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
