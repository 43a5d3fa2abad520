"""Downloads: gone on with after any cut, never more than was signed, and never a byte that was not."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
from aiohttp import web
from fetch_kit import Handler, Seen, Sending, answering, expected, index_of, serve, streaming
from hypothesis import given, settings
from hypothesis import strategies as st

import edged_firmware
from edged_firmware.bandwidth import BandwidthCap
from edged_firmware.chunks import ChunkIndex
from edged_firmware.errors import EdgedError, Permanent, Reason, Refused, Transient
from edged_firmware.fetch import Expected, Fetched, Fetcher, note_path, part_path

T = TypeVar("T")
CHUNK = 4096
DATA = os.urandom(20 * CHUNK + 123)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


@dataclass
class Node:
    """A folder to download to, and what was counted on the way."""

    folder: Path
    data: bytes = DATA
    counted: list[tuple[str, int]] = field(default_factory=list)
    restarts: list[tuple[str, int]] = field(default_factory=list)
    progress: list[int] = field(default_factory=list)
    cap: BandwidthCap | None = None
    stall_s: float = 20.0

    @property
    def dest(self) -> Path:
        return self.folder / "app-1.2.img"

    @property
    def fetched(self) -> int:
        return sum(n_bytes for _, n_bytes in self.counted)

    async def fetch(
        self, url: str, index: ChunkIndex | None | bool = True, session: aiohttp.ClientSession | None = None
    ) -> Fetched:
        if session is None:
            async with aiohttp.ClientSession() as own:
                return await self.fetch(url, index, own)
        fetcher = Fetcher(
            session,
            self.cap,
            lambda kind, n_bytes: self.counted.append((kind, n_bytes)),
            restarted=lambda kind, n_bytes: self.restarts.append((kind, n_bytes)),
            stall_s=self.stall_s,
        )
        wanted = index_of(self.data, CHUNK) if index is True else index or None
        return await fetcher.fetch(url, self.dest, expected(self.data), wanted, self.progress.append)

    def part(self) -> bytes:
        return part_path(self.dest).read_bytes()

    def assert_done(self) -> None:
        assert self.dest.read_bytes() == self.data
        assert [path.name for path in self.folder.iterdir()] == [self.dest.name]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    folder = tmp_path / "node"
    folder.mkdir()
    return Node(folder)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published 100%.img"
    path.write_bytes(DATA)
    return path


async def failing(node: Node, handler: Handler, index: bool = True) -> EdgedError:
    async with serve(handler) as url:
        with pytest.raises(EdgedError) as raised:
            await node.fetch(f"{url}/app", index)
    assert not node.dest.exists()
    assert url in raised.value.detail or raised.value.reason in (Reason.CHUNK_MISMATCH, Reason.HASH_MISMATCH)
    return raised.value


def assert_transient(error: EdgedError, text: str) -> None:
    assert isinstance(error, Transient)
    assert error.reason is Reason.FETCH_FAILED
    assert text in error.detail


# -- the honest server


@pytest.mark.parametrize("index", [True, False])
def test_a_file_arrives(node: Node, published: Path, index: bool) -> None:
    async def scenario() -> None:
        async with serve(Seen(published)) as url:
            assert await node.fetch(f"{url}/app", index) == Fetched(0, len(DATA))

    run(scenario())
    node.assert_done()
    assert {kind for kind, _ in node.counted} == {"http"}
    assert node.fetched == len(DATA)
    assert node.progress == sorted(node.progress)
    assert (node.progress[0], node.progress[-1]) == (0, len(DATA))


def test_what_is_there_is_not_fetched_again(node: Node) -> None:
    node.dest.write_bytes(DATA)
    part_path(node.dest).write_bytes(b"left over")
    note_path(node.dest).write_bytes(b"left over")
    assert run(node.fetch("http://127.0.0.1:1/nobody")) == Fetched(len(DATA), 0)
    node.assert_done()


@pytest.mark.parametrize("wrong", [DATA[:-1], DATA[:-1] + bytes([DATA[-1] ^ 1])])
def test_what_is_there_and_wrong_is_replaced(node: Node, published: Path, wrong: bytes) -> None:
    node.dest.write_bytes(wrong)
    run(node.fetch(str(published)))
    node.assert_done()


def test_a_part_is_gone_on_with(node: Node, published: Path) -> None:
    seen = Seen(published)
    part_path(node.dest).write_bytes(DATA[: 5 * CHUNK + 100])

    async def scenario() -> None:
        async with serve(seen) as url:
            fetched = await node.fetch(f"{url}/app")
            assert fetched == Fetched(5 * CHUNK, len(DATA) - 5 * CHUNK)

    run(scenario())
    node.assert_done()
    assert seen.ranges == [f"bytes={5 * CHUNK}-"]
    assert node.restarts == []


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_a_part_holds_only_its_good_prefix_counts(
    tmp_path_factory: pytest.TempPathFactory, draw: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("node")
    node = Node(folder / "node")
    node.folder.mkdir()
    (folder / "file").write_bytes(DATA)
    part = bytearray(DATA[: draw.draw(st.integers(0, len(DATA)))])
    part += draw.draw(st.binary(max_size=40)) * draw.draw(st.integers(0, 400))
    if part and draw.draw(st.booleans()):
        part[draw.draw(st.integers(0, len(part) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    part_path(node.dest).write_bytes(part)
    good = next(
        (at for at, pair in enumerate(zip(part, DATA, strict=False)) if pair[0] != pair[1]), len(part)
    )
    good = min(good, len(DATA))
    chunks = good if good == len(DATA) else good - good % CHUNK

    assert run(node.fetch(str(folder / "file"))) == Fetched(chunks, len(DATA) - chunks)
    node.assert_done()


def test_cut_after_cut_costs_a_chunk_each(node: Node) -> None:
    server = Sending(DATA)
    cuts = 0

    async def scenario() -> None:
        nonlocal cuts
        async with serve(server) as url:
            for stop_after in (1500, CHUNK + 10, 3 * CHUNK - 1, 5, 9000, 20_000):
                server.stop_after = stop_after
                with pytest.raises(Transient, match="fetch_failed"):
                    await node.fetch(f"{url}/app")
                cuts += 1
            server.stop_after = None
            await node.fetch(f"{url}/app")

    run(scenario())
    node.assert_done()
    assert cuts == 6
    assert node.fetched <= len(DATA) + cuts * CHUNK
    assert server.if_ranges[-1] == '"one"'
    assert server.statuses[-1] == 206


def test_cancelled_and_gone_on_with(node: Node) -> None:
    server = Sending(DATA, pause_s=0.0005)
    cuts = 0

    async def scenario() -> None:
        nonlocal cuts
        async with serve(server) as url:
            for part in (1, 2, 3):
                task = asyncio.create_task(node.fetch(f"{url}/app"))
                while not node.progress or node.progress[-1] < part * len(DATA) // 5:
                    await asyncio.sleep(0.001)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                cuts += 1
                assert DATA.startswith(node.part())
            await node.fetch(f"{url}/app")

    before = len(list(Path("/proc/self/fd").iterdir()))
    run(scenario())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    node.assert_done()
    assert node.fetched <= len(DATA) + cuts * CHUNK


def test_killed_and_gone_on_with(node: Node, tmp_path: Path) -> None:
    server = Sending(DATA, piece=1500, pause_s=0.002)
    # However slow this process is to kill: two lives together cannot get to the end.
    server.hold_after = 30_000
    index = tmp_path / "index"
    index.write_bytes(index_of(DATA, CHUNK).encode())
    expect = expected(DATA)
    roots = {str(Path(edged_firmware.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(":")}
    environment = {**os.environ, "PYTHONPATH": ":".join(sorted(roots))}

    async def killed_life(url: str, stop_at: int) -> tuple[int, int]:
        """Kill a child that has ``stop_at`` good bytes; what arrived, and how much of it after its last report."""
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).with_name("fetch_child.py")),
            *(url, str(node.dest), str(expect.length), expect.sha256, str(index)),
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )
        assert child.stdout is not None
        said: list[list[str]] = []
        while not said or said[-1][0] != "good" or int(said[-1][1]) < stop_at:
            said.append((await child.stdout.readline()).decode().split())
        child.send_signal(signal.SIGKILL)
        said += [line.split() for line in (await child.stdout.read()).decode().splitlines()]
        assert await child.wait() == -signal.SIGKILL
        last = max(at for at, (word, _) in enumerate(said) if word == "good")
        arrived = [int(number) if word == "arrived" else 0 for word, number in said]
        return sum(arrived), sum(arrived[last:])

    async def scenario() -> tuple[int, int]:
        async with serve(server) as url:
            lives = [await killed_life(f"{url}/app", stop_at) for stop_at in (10_000, 35_000)]
            server.hold_after, server.pause_s = None, 0
            await node.fetch(f"{url}/app")
            return sum(arrived for arrived, _ in lives) + node.fetched, sum(late for _, late in lives)

    total, late = run(scenario())
    node.assert_done()
    assert server.statuses == [200, 206, 206]
    # What came in at the very moment of the kill cannot have been written: it is the only thing that comes on top.
    assert total <= len(DATA) + 2 * CHUNK + late


def test_two_who_want_one_file_fetch_it_once(node: Node, published: Path) -> None:
    seen = Seen(published)

    async def scenario() -> None:
        async with serve(seen) as url, aiohttp.ClientSession() as session:
            fetcher = Fetcher(lambda: session)
            wanted = (f"{url}/app", node.dest, expected(DATA), index_of(DATA))
            done = await asyncio.gather(fetcher.fetch(*wanted), fetcher.fetch(*wanted))
            assert sorted(done, key=lambda one: one.resumed_bytes)[1] == Fetched(len(DATA), 0)

    run(scenario())
    node.assert_done()
    assert len(seen.requests) == 1


# -- validators


def test_another_entity_tag_starts_over_and_says_so(node: Node) -> None:
    server = Sending(DATA)

    async def scenario() -> None:
        async with serve(server) as url:
            server.stop_after = 9 * CHUNK
            with pytest.raises(Transient):
                await node.fetch(f"{url}/app")
            assert json.loads(note_path(node.dest).read_bytes())["validator"] == '"one"'
            have = len(node.part())
            server.stop_after, server.tag = None, '"two"'
            await node.fetch(f"{url}/app")
            assert node.restarts == [("http", have)]
            assert have > 0

    run(scenario())
    node.assert_done()
    assert server.statuses == [200, 200]
    assert server.if_ranges == [None, '"one"']


@pytest.mark.parametrize(
    "note", [b"", b"[]", b"\xff", b'{"url": "x"}', None, b'{"validator": "a\\r\\nX: y"}']
)
def test_a_note_that_is_lost_or_garbage_costs_nothing(node: Node, note: bytes | None) -> None:
    server = Sending(DATA)
    part_path(node.dest).write_bytes(DATA[: 3 * CHUNK])
    if note is not None:
        note_path(node.dest).write_bytes(note)

    async def scenario() -> None:
        async with serve(server) as url:
            await node.fetch(f"{url}/app")

    run(scenario())
    node.assert_done()
    assert (server.if_ranges, server.statuses) == ([None], [206])


@pytest.mark.parametrize(
    ("tag", "changed", "kept"),
    [
        ('"strong"', "Wed, 01 Jul 2026 10:00:00 GMT", '"strong"'),
        ('W/"weak"', "Wed, 01 Jul 2026 10:00:00 GMT", "Wed, 01 Jul 2026 10:00:00 GMT"),
        ('W/"weak"', "", None),
    ],
)
def test_only_what_is_fit_for_if_range_is_kept(node: Node, tag: str, changed: str, kept: str | None) -> None:
    run(failing(node, streaming(DATA[: 2 * CHUNK], ETag=tag, Last_Modified=changed)))
    assert node.part() == DATA[: 2 * CHUNK]
    note = note_path(node.dest)
    assert (json.loads(note.read_bytes())["validator"] if note.exists() else None) == kept


# -- the hostile server


def test_ranges_that_are_wrong_are_not_believed(node: Node) -> None:
    async def scenario(where: str | None) -> None:
        part_path(node.dest).write_bytes(DATA[: 3 * CHUNK])
        statuses = []

        async def handler(request: web.Request) -> web.StreamResponse:
            asked = "Range" in request.headers
            statuses.append(206 if asked else 200)
            if not asked:
                return web.Response(body=DATA)
            headers = {"Content-Range": where} if where else {}
            return web.Response(status=206, body=DATA[3 * CHUNK :], headers=headers)

        async with serve(handler) as url:
            await node.fetch(f"{url}/app")
        assert statuses == [206, 200]

    length, have = len(DATA), 3 * CHUNK
    for where in (
        None,
        "bytes",
        f"bytes 0-{length - 1}/{length}",
        f"bytes {have + 1}-{length - 1}/{length}",
        f"bytes {have}-{length}/{length}",
        f"bytes {have}-{length - 1}/{length + 1}",
        f"bytes {have}-{length - 1}/{length}, bytes 0-1/2",
    ):
        run(scenario(where))
        node.assert_done()
        node.dest.unlink()


def test_416_asks_for_the_whole(node: Node) -> None:
    part_path(node.dest).write_bytes(DATA[:CHUNK])

    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=416) if "Range" in request.headers else web.Response(body=DATA)

    async def scenario() -> None:
        async with serve(handler) as url:
            await node.fetch(f"{url}/app")

    run(scenario())
    node.assert_done()
    assert node.restarts == [("http", CHUNK)]


def test_a_whole_part_asks_nobody(node: Node) -> None:
    part_path(node.dest).write_bytes(DATA)
    assert run(node.fetch("http://127.0.0.1:1/nobody")) == Fetched(len(DATA), 0)
    node.assert_done()


def test_an_endless_body_ends_at_the_signed_length(node: Node) -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(DATA)
        while True:
            await response.write(bytes(65536))
            sent += 65536

    error = run(failing(node, endless))
    assert isinstance(error, Refused)
    assert error.reason is Reason.LENGTH_MISMATCH
    assert node.part() == DATA
    assert sent < 50_000_000

    part_path(node.dest).unlink()
    error = run(failing(node, endless, index=False))
    assert error.reason is Reason.LENGTH_MISMATCH
    assert part_path(node.dest).stat().st_size <= len(DATA)


@pytest.mark.parametrize("body", [DATA + b"x", DATA[:-1], b""])
def test_another_length_is_refused_before_a_byte_is_taken(node: Node, body: bytes) -> None:
    error = run(failing(node, answering(200, body)))
    assert isinstance(error, Refused)
    assert error.reason is Reason.LENGTH_MISMATCH
    assert node.fetched == 0


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("n_bytes", [0, 10, CHUNK, len(DATA) - 1])
def test_a_body_that_ends_early_may_be_whole_later(node: Node, n_bytes: int, index: bool) -> None:
    assert_transient(run(failing(node, streaming(DATA[:n_bytes]), index)), f"after {n_bytes} of {len(DATA)}")


def test_a_dropped_connection_may_hold_later(node: Node) -> None:
    server = Sending(DATA)
    server.stop_after = 3 * CHUNK
    assert_transient(run(failing(node, server)), "Error")


@pytest.mark.parametrize("flipped", [0, 5 * CHUNK + 17, len(DATA) - 1])
def test_a_flipped_bit_is_refused_and_the_good_prefix_kept(node: Node, published: Path, flipped: int) -> None:
    wrong = bytearray(DATA)
    wrong[flipped] ^= 4
    error = run(failing(node, answering(200, bytes(wrong))))
    assert isinstance(error, Refused)
    assert error.reason is Reason.CHUNK_MISMATCH
    good = flipped - flipped % CHUNK
    assert node.part() == DATA[:good]
    assert run(node.fetch(str(published))) == Fetched(good, len(DATA) - good)
    node.assert_done()


def test_a_flipped_bit_without_an_index_is_refused_and_nothing_kept(node: Node) -> None:
    error = run(failing(node, answering(200, DATA[:-1] + bytes([DATA[-1] ^ 1])), index=False))
    assert isinstance(error, Refused)
    assert error.reason is Reason.HASH_MISMATCH
    assert list(node.folder.iterdir()) == []


def test_an_index_over_another_file_is_refused(node: Node, published: Path) -> None:
    with pytest.raises(Refused, match="index_mismatch"):
        run(node.fetch(str(published), index_of(DATA + b"x")))
    other = index_of(DATA[::-1])
    with pytest.raises(Refused, match="chunk_mismatch"):
        run(node.fetch(str(published), other))


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 401, 403, 404, 410, 416, 429, 500, 503])
def test_any_other_status_may_change(node: Node, status: int) -> None:
    assert_transient(
        run(failing(node, answering(status, b"" if status in (204, 304) else b"no"))), f"status {status}"
    )


def test_a_compressed_body_is_not_taken(node: Node) -> None:
    handler = answering(200, b"x", Content_Encoding="gzip")
    assert_transient(run(failing(node, handler)), "compressed")


def test_nobody_there(node: Node) -> None:
    with pytest.raises(Transient) as raised:
        run(node.fetch("http://user:secret@127.0.0.1:1/app?token=secret"))
    assert_transient(raised.value, "http://127.0.0.1:1/app")
    assert "secret" not in str(raised.value)


def test_a_server_that_drips_is_a_stall(node: Node) -> None:
    node.stall_s = 1.0

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = len(DATA)
        await response.prepare(request)
        await response.write(DATA[: 2 * CHUNK])
        for byte in DATA[2 * CHUNK :]:
            await response.write(bytes([byte]))
            await asyncio.sleep(0.02)
        return response

    assert_transient(run(failing(node, drip)), "stalled")
    assert node.part() == DATA[: 2 * CHUNK]


def test_a_server_that_does_not_answer_is_a_stall(node: Node) -> None:
    node.stall_s = 0.1

    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    assert_transient(run(failing(node, silent)), "stalled")


# -- redirects and credentials


async def redirected(node: Node, other_host: bool, **session: Any) -> list[str | None]:
    """The Authorization that the server at the end of a redirect was sent."""
    got: list[str | None] = []

    async def last(request: web.Request) -> web.StreamResponse:
        got.append(request.headers.get("Authorization"))
        return web.Response(body=DATA)

    async with serve(last) as there:

        async def first(request: web.Request) -> web.StreamResponse:
            if request.path == "/end":
                return await last(request)
            raise web.HTTPFound(f"{there}/end" if other_host else "/end")

        async with serve(first) as here, aiohttp.ClientSession(**session) as own:
            await node.fetch(f"{here}/app", session=own)
    return got


def test_no_credentials_go_to_another_host(node: Node) -> None:
    headers = {"Authorization": "TargetToken secret"}
    assert run(redirected(node, True, headers=headers)) == [None]
    node.assert_done()
    node.dest.unlink()
    assert run(redirected(node, False, headers=headers)) == ["TargetToken secret"]
    node.assert_done()


def test_a_session_with_auth_of_its_own_follows_no_redirect(node: Node) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(Transient, match="status 302"):
            run(redirected(node, True, auth=aiohttp.BasicAuth("me", "secret")))


def test_a_circle_of_redirects_ends(node: Node) -> None:
    async def circle(request: web.Request) -> web.StreamResponse:
        raise web.HTTPFound("/round")

    assert_transient(run(failing(node, circle)), "TooManyRedirects")


# -- folders


@pytest.mark.parametrize("form", ["path", "uri", "localhost"])
def test_a_folder_is_a_source(node: Node, published: Path, form: str) -> None:
    uri = published.as_uri()
    url = {"path": str(published), "uri": uri, "localhost": uri.replace("///", "//localhost/", 1)}[form]
    part_path(node.dest).write_bytes(DATA[: 2 * CHUNK])
    assert run(node.fetch(url)) == Fetched(2 * CHUNK, len(DATA) - 2 * CHUNK)
    node.assert_done()
    assert {kind for kind, _ in node.counted} == {"file"}


def test_a_folder_without_the_file_may_have_it_later(node: Node, tmp_path: Path) -> None:
    with pytest.raises(Transient) as raised:
        run(node.fetch(str(tmp_path / "none")))
    assert_transient(raised.value, str(tmp_path / "none"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EdgedError):
        run(node.fetch(str(tmp_path / "pipe")))


def test_a_file_of_another_length_is_refused(node: Node, published: Path) -> None:
    for wrong in (DATA + b"x", DATA[:-1]):
        published.write_bytes(wrong)
        with pytest.raises(Refused, match="length_mismatch"):
            run(node.fetch(str(published)))
        assert node.fetched == 0


def test_a_stick_that_fails_may_work_later(
    node: Node, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pread

    def fail(fd: int, length: int, offset: int) -> bytes:
        if Path(f"/proc/self/fd/{fd}").readlink() == published:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, length, offset)

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(Transient) as raised:
        run(node.fetch(str(published)))
    assert_transient(raised.value, "Input/output error")


@pytest.mark.parametrize("url", ["ftp://h/x", "oci://h/x", "file://other/x", "data://x"])
def test_a_kind_of_address_that_is_not_known(node: Node, url: str) -> None:
    with pytest.raises(Permanent, match="unsupported"):
        run(node.fetch(url))


# -- the node's own disk


def test_a_full_disk_keeps_the_good_prefix(
    node: Node, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def full(fd: int, data: memoryview, offset: int) -> int:
        if offset >= 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:777], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(Transient) as raised:
            run(node.fetch(str(published)))
    assert raised.value.reason is Reason.DISK_FULL
    assert str(node.folder) in raised.value.detail
    assert run(node.fetch(str(published))).resumed_bytes == 2 * CHUNK
    node.assert_done()


def test_a_part_that_is_a_link_is_not_followed(node: Node, published: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    part_path(node.dest).symlink_to(tmp_path / "precious")
    with pytest.raises(Transient, match="storage_failed"):
        run(node.fetch(str(published)))
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_what_is_written_reaches_the_disk_bit_by_bit(
    node: Node, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append(os.fstat(fd).st_size)
        real(fd)

    async def scenario() -> None:
        async with serve(Sending(DATA)) as url, aiohttp.ClientSession() as session:
            fetcher = Fetcher(session, sync_bytes=4 * CHUNK)
            await fetcher.fetch(f"{url}/app", node.dest, expected(DATA), index_of(DATA))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    run(scenario())
    assert synced
    node.assert_done()


def test_a_thread_that_writes_is_waited_for(
    node: Node, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancellation must not close the part under a thread that is about to write to it."""
    writing, go_on = threading.Event(), threading.Event()
    real = os.pwrite
    late: list[int] = []

    def slow(fd: int, data: memoryview, offset: int) -> int:
        writing.set()
        go_on.wait(20)
        late.append(real(fd, data, offset))
        return late[-1]

    async def scenario() -> None:
        task = asyncio.create_task(node.fetch(str(published)))
        assert await asyncio.to_thread(writing.wait, 20)
        task.cancel()
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.sleep(0.02)
        assert not task.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(os, "pwrite", slow)
    run(scenario())
    assert late
    assert DATA.startswith(node.part())


# -- the cap


def test_the_cap_holds_the_download_back(node: Node, published: Path) -> None:
    now, slept = 0.0, 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now, slept
        now += seconds
        slept += seconds

    node.cap = BandwidthCap(10_000, lambda: now, sleep)
    run(node.fetch(str(published)))
    node.assert_done()
    assert slept == pytest.approx(len(DATA) / 10_000 - 1)
    assert max(n_bytes for _, n_bytes in node.counted) <= 5_000


@pytest.mark.parametrize(("length", "sha256"), [(-1, "0" * 64), (1, "0" * 63), (1, "A" * 64), (1, "")])
def test_what_cannot_be_expected(length: int, sha256: str) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        Expected(length, sha256)


@pytest.mark.parametrize("index", [True, False])
def test_an_empty_file(node: Node, tmp_path: Path, index: bool) -> None:
    node.data = b""
    assert run(node.fetch("http://127.0.0.1:1/nobody", index)) == Fetched(0, 0)
    node.assert_done()
