"""Artifacts, floors, facts of the node and its key."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from store_kit import START, HandClock, make_job, raw, read, write

from edged.domain.job import Fallback, State
from edged.errors import Permanent, Reason, Refused, Transient
from edged.store import Store, artifacts, audit, floors, jobs, meta
from edged.store.artifacts import Artifacts, Collected
from edged.store.node_key import FILE_NAME, NodeKey
from edged_firmware.trust import SeenRole

HOUR = timedelta(hours=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "edged.db"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Shelf:
    """An open store with its artifacts, and a clock that runs an hour with each file."""

    def __init__(self, store: Store, folder: Path, clock: HandClock, quota: int, reserve: int) -> None:
        self.store = store
        self.folder = folder
        self.clock = clock
        self.artifacts = Artifacts(store, folder, quota, reserve_bytes=reserve)

    async def add(self, data: bytes, **expected: Any) -> str:
        self.clock.moment += HOUR
        tmp = self.artifacts.partial(digest(data))
        tmp.write_bytes(data)
        return await self.artifacts.adopt(tmp, "image", "test", **expected)

    def files(self) -> set[str]:
        return {file.name for file in self.folder.iterdir() if file.is_file()}

    async def rows(self) -> set[str]:
        return await self.store.read(
            lambda tx: {row["sha256"] for row in tx.db.execute("SELECT sha256 FROM artifact")}
        )


@asynccontextmanager
async def shelf(path: Path, quota: int = 10_000, reserve: int = 0) -> AsyncIterator[Shelf]:
    clock = HandClock()
    async with Store.open(path, clock) as store:
        one = Shelf(store, path.parent / "artifacts", clock, quota, reserve)
        await one.artifacts.recover()
        yield one


def test_a_file_is_adopted_under_its_digest(path: Path) -> None:
    async def main() -> None:
        async with shelf(path) as s:
            sha256 = await s.add(b"image", expected_sha256=digest(b"image"))
            assert sha256 == digest(b"image")
            assert s.artifacts.path(sha256).read_bytes() == b"image"
            assert list((s.folder / "partial").iterdir()) == []
            row = await s.store.read(lambda tx: artifacts.get(tx, sha256))
            assert row == artifacts.Artifact(sha256, 5, "image", "test", START + HOUR, START + HOUR)
            assert await s.add(b"image") == sha256
            s.clock.moment += HOUR
            assert await s.artifacts.locate(sha256) == s.artifacts.path(sha256)
            row = await s.store.read(lambda tx: artifacts.get(tx, sha256))
            assert row is not None
            assert (row.created, row.last_used) == (START + HOUR, START + 3 * HOUR)
            assert await s.artifacts.locate(digest(b"other")) is None
            s.artifacts.path(sha256).unlink()
            assert await s.artifacts.locate(sha256) is None

    asyncio.run(main())


def test_another_file_than_expected_is_refused_and_removed(path: Path) -> None:
    async def main() -> None:
        async with shelf(path) as s:
            with pytest.raises(Refused) as caught:
                await s.add(b"image", expected_sha256=digest(b"other"))
            assert caught.value.reason is Reason.HASH_MISMATCH
            assert (s.files(), await s.rows()) == (set(), set())
            assert list((s.folder / "partial").iterdir()) == []
            with pytest.raises(Permanent):
                await s.artifacts.adopt(s.folder / "none", "image", "test")

    asyncio.run(main())


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_only_a_digest_leads_to_a_file(path: Path, name: str) -> None:
    async def main() -> None:
        async with shelf(path) as s:
            for ask in (s.artifacts.path, s.artifacts.partial):
                with pytest.raises(ValueError, match="SHA-256"):
                    ask(name)

    asyncio.run(main())


def test_a_start_clears_what_a_cut_left(path: Path) -> None:
    async def main() -> None:
        async with shelf(path) as s:
            whole, short, lost = [await s.add(data) for data in (b"whole", b"short", b"lost")]
            orphan, stale, wanted = digest(b"orphan"), digest(b"stale"), digest(b"wanted")
            (s.folder / orphan).write_bytes(b"orphan")
            (s.folder / short).write_bytes(b"sho")
            (s.folder / lost).unlink()
            (s.folder / "notes.txt").write_bytes(b"somebody's")
            for name in (stale, wanted):
                s.artifacts.partial(name).write_bytes(b"half")
            verified = json.dumps({"image": {"sha256": wanted}, "index": {"sha256": digest(b"i")}})
            await s.store.write(lambda tx: jobs.add(tx, make_job(verified=verified)))
            assert await s.artifacts.recover() == Collected(3, len(b"orphan" + b"sho" + b"half"), 2)
            assert s.files() == {whole, "notes.txt"}
            assert await s.rows() == {whole}
            assert [file.name for file in (s.folder / "partial").iterdir()] == [wanted]
            assert await s.artifacts.recover() == Collected()

    asyncio.run(main())


def test_the_least_recently_used_goes_first_and_pins_stay(path: Path) -> None:
    names = ["old image", "old index", "job image", "job index", "fallback", "a", "b", "c"]

    async def main() -> None:
        async with shelf(path, quota=8 * 100) as s:
            sha = {name: await s.add(name.ljust(100).encode()) for name in names}
            done = make_job("j1", verified=verified(sha["old image"], sha["old index"]))
            runs = make_job(
                "j2",
                device="mega",
                verified=verified(sha["job image"], sha["job index"]),
                fallback=Fallback(sha["fallback"], sha["fallback"], True, None),
            )
            await s.store.write(lambda tx: [jobs.add(tx, job) for job in (done, runs)])
            await s.store.write(lambda tx: finish(tx, done))
            assert await s.store.read(artifacts.pinned) == {sha[name] for name in names[:5]}
            assert await s.artifacts.collect() == Collected()
            await s.artifacts.locate(sha["a"])
            s.clock.moment += HOUR
            await s.artifacts.room_for(100)
            assert await s.rows() == s.files() == set(sha.values()) - {sha["b"]}
            await s.artifacts.room_for(300)
            assert await s.rows() == s.files() == {sha[name] for name in names[:5]}
            with pytest.raises(Transient) as caught:
                await s.artifacts.room_for(301)
            assert caught.value.reason is Reason.DISK_FULL
            for told in ("301 bytes wanted", "500 of 800 (quota)", "free"):
                assert told in caught.value.detail
            assert await s.rows() == {sha[name] for name in names[:5]}

    asyncio.run(main())


def verified(image: str, index: str) -> str:
    return json.dumps({"image": {"sha256": image}, "index": {"sha256": index}})


def finish(tx: Any, job: Any, state: State = State.SUCCEEDED) -> Any:
    via = [State.FETCHING, State.READY, State.STAGING, State.ACTIVATING]
    via += (
        [State.VERIFYING, State.SUCCEEDED] if state is State.SUCCEEDED else [State.REVERTING, State.REVERTED]
    )
    for to in via:
        reason = Reason.HEALTH_FAILED if to is State.REVERTED else None
        job = jobs.advance(tx, job, replace(job, state=to, reason=reason), "step")
    return job


def test_what_a_device_went_back_to_is_pinned_until_something_else_runs(path: Path) -> None:
    sha = {name: digest(name.encode()) for name in ("i1", "x1", "i2", "x2", "fi", "fx")}

    def pins(*names: str) -> set[str]:
        return {sha[name] for name in names}

    first = make_job(
        "j1", verified=verified(sha["i1"], sha["x1"]), fallback=Fallback(sha["fi"], sha["fx"], True, None)
    )
    second = make_job("j2", run=2, verified=verified(sha["i2"], sha["x2"]))
    third = make_job("j3", run=3, verified=verified(sha["i1"], sha["x1"]))
    steps = [
        (lambda tx: jobs.add(tx, first), pins("i1", "x1", "fi", "fx")),
        (lambda tx: finish(tx, first, State.REVERTED), pins("fi", "fx")),
        (lambda tx: jobs.add(tx, second), pins("i2", "x2", "fi", "fx")),
        (lambda tx: finish(tx, second), pins("i2", "x2")),
        (lambda tx: jobs.add(tx, third), pins("i2", "x2", "i1", "x1")),
        (
            lambda tx: jobs.advance(
                tx, third, replace(third, state=State.FAILED, reason=Reason.STALLED), "end"
            ),
            pins("i2", "x2"),
        ),
    ]
    for step, wanted in steps:
        assert write(path, step, artifacts.pinned)[1] == wanted


def test_what_was_just_used_stays_until_its_job_can_pin_it(path: Path) -> None:
    async def main() -> None:
        async with shelf(path, quota=100) as s:
            sha256 = await s.add(bytes(100))
            with pytest.raises(Transient):
                await s.artifacts.room_for(1)
            assert await s.rows() == {sha256}
            s.clock.moment += HOUR
            await s.artifacts.room_for(1)
            assert await s.rows() == set()

    asyncio.run(main())


def test_partial_downloads_count_and_the_disk_keeps_a_reserve(path: Path) -> None:
    async def main() -> None:
        async with shelf(path, quota=1000) as s:
            half = s.artifacts.partial(digest(b"half"))
            half.write_bytes(bytes(900))
            await s.artifacts.room_for(1000, digest(b"half"))
            with pytest.raises(Transient):
                await s.artifacts.room_for(1001, digest(b"half"))
            assert half.exists()
            await s.artifacts.room_for(101)
            assert not half.exists(), "a download that nobody wants holds up another"
        async with shelf(path, reserve=1 << 60) as s:
            with pytest.raises(Transient, match=f"of which {1 << 60} are kept"):
                await s.artifacts.room_for(1)

    asyncio.run(main())


# floors


def test_a_release_floor_only_rises(path: Path) -> None:
    def raise_to(counter: int) -> Any:
        return lambda tx: floors.raise_to(tx, "uno", "firmware", counter, f"blink@{counter}")

    assert read(path, lambda tx: floors.get(tx, "uno", "firmware")) == 0
    assert write(path, raise_to(3), raise_to(2), raise_to(3), raise_to(5), raise_to(0)) == [3, 3, 3, 5, 5]
    assert read(path, floors.all_floors) == {("uno", "firmware"): floors.Floor(5, "blink@5", START)}
    assert read(path, lambda tx: floors.counters(tx, "uno")) == {"firmware": 5}
    with raw(path) as conn:
        conn.execute("PRAGMA recursive_triggers = ON")
        for statement in (
            "UPDATE release_floor SET counter = 4",
            "UPDATE release_floor SET device = 'mega'",
            "DELETE FROM release_floor",
            "REPLACE INTO release_floor VALUES ('uno', 'firmware', 1, '', '')",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="release floor"):
                conn.execute(statement)


def test_seen_versions_rise_while_the_role_keeps_its_keys(path: Path) -> None:
    first = {"root": SeenRole(1, ("r",)), "timestamp": SeenRole(9, ("a", "b"))}
    write(path, lambda tx: floors.raise_seen(tx, first), lambda tx: floors.raise_seen(tx, first))
    assert read(path, floors.get_seen) == first
    for keyids in (("a", "b"), ("a", "b", "c")):
        with pytest.raises(Refused) as caught:
            write(path, lambda tx, keyids=keyids: floors.raise_seen(tx, {"timestamp": SeenRole(8, keyids)}))
        assert caught.value.reason is Reason.METADATA_ROLLBACK
    assert read(path, floors.get_seen) == first
    write(path, lambda tx: floors.raise_seen(tx, {"timestamp": SeenRole(2, ("b", "c"))}))
    assert read(path, floors.get_seen)["timestamp"] == SeenRole(2, ("b", "c"))
    with raw(path) as conn:
        for statement in ("UPDATE seen_role SET version = version - 1", "DELETE FROM seen_role"):
            with pytest.raises(sqlite3.IntegrityError, match="seen version"):
                conn.execute(statement)


def test_the_time_floor_only_rises(path: Path) -> None:
    assert read(path, floors.get_time) is None
    moments = [START, START - HOUR, START + HOUR]
    assert write(path, *(lambda tx, m=m: floors.raise_time(tx, m) for m in moments)) == [
        START,
        START,
        START + HOUR,
    ]
    assert read(path, floors.get_time) == START + HOUR
    with raw(path) as conn:
        for statement in ("UPDATE meta SET value = '2020'", "UPDATE meta SET key = 'x'", "DELETE FROM meta"):
            with pytest.raises(sqlite3.IntegrityError, match="time floor"):
                conn.execute(statement)


def test_a_node_keeps_its_id(path: Path) -> None:
    assert write(path, lambda tx: meta.node_id(tx, lambda: "first")) == ["first"]
    assert write(path, lambda tx: meta.node_id(tx, lambda: "second")) == ["first"]


# the node's key


def test_the_key_is_made_once_and_signs_the_trail(tmp_path: Path, path: Path) -> None:
    key = NodeKey.load_or_create(tmp_path)
    file = tmp_path / FILE_NAME
    assert file.stat().st_mode & 0o777 == 0o600
    again = NodeKey.load_or_create(tmp_path)
    assert again.public_hex == key.public_hex
    assert len(key.public_hex) == 64
    write(path, lambda tx: audit.append(tx, "test", "event", {}), lambda tx: audit.sign_head(tx, key.sign))
    report = read(path, lambda tx: audit.verify(tx, again.public_key))
    assert (report.intact, report.signed_heads) == (True, 1)


def test_all_who_start_together_get_the_same_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = {key.public_hex for key in pool.map(NodeKey.load_or_create, [tmp_path] * 8)}
    assert len(keys) == 1


def test_a_key_that_cannot_be_used_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / FILE_NAME
    NodeKey.load_or_create(tmp_path)
    own = file.read_bytes()
    other = rsa.generate_private_key(65537, 2048).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    for content, mode, says in (
        (b"", 0o600, "not a private key"),
        (b"rubbish", 0o600, "not a private key"),
        (own[:-40], 0o600, "not a private key"),
        (own.replace(b"MC4C", b"MC4D"), 0o600, "not a private key"),
        (other, 0o600, "not an Ed25519 key"),
        (other, 0o640, "chmod 0600"),
    ):
        file.write_bytes(content)
        file.chmod(mode)
        with pytest.raises(Permanent, match=says) as caught:
            NodeKey.load_or_create(tmp_path)
        assert caught.value.reason is Reason.STORAGE_FAILED
        assert file.read_bytes() == content


def test_a_folder_for_the_key_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Permanent):
        NodeKey.load_or_create(tmp_path / "none")


def test_a_key_that_another_tool_made_is_taken(tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / FILE_NAME).write_bytes(b"\n" + pem.replace(b"\n", b"\r\n"))
    (tmp_path / FILE_NAME).chmod(0o600)
    public = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    assert NodeKey.load_or_create(tmp_path).public_hex == public.hex()


def test_the_store_does_not_load_heavy_libraries(tmp_path: Path) -> None:
    NodeKey.load_or_create(tmp_path)
    code = "import sys, edged.store.audit, edged.store.node_key, edged.store.artifacts, edged.store.floors\n"
    code += "from pathlib import Path\n"
    code += f"edged.store.node_key.NodeKey.load_or_create(Path({str(tmp_path)!r}))\n"
    code += "print([m for m in ('cryptography', 'tuf', 'securesystemslib') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
