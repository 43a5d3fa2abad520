"""What happens to a line in the middle of a job by SMP: it is pulled and comes back, or somebody else talks on it, too."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
from engine_kit import QUICK, until
from peer_kit import peer_python
from smp_kit import (
    BODY_BYTES,
    FACTORY,
    IN_VAIN_S,
    MARK,
    PIECE_BYTES,
    RESET,
    SECOND,
    STATE,
    THIRD,
    UPLOAD,
    VERSION_IS,
    Heard,
    Node,
    OtherClient,
)
from smp_server import SmpServer, body_of, make_image, read_image
from terminal_server import TerminalServer

from edged.domain.job import Job, State
from edged.errors import Reason
from edged.store import jobs
from edged.testing.node import TestNode

FEW = attrs.evolve(QUICK, max_attempts=3)
PATIENT = attrs.evolve(QUICK, first_backoff_s=0.2, longest_backoff_s=1)
HALF_BYTES = len(SECOND) // 2
WINDOW_BYTES = 4 * 384
"""What may be on its way when the line goes: a window of the device's buffers."""


async def _waiting_for(life: TestNode, *reasons: Reason) -> Job:
    async with asyncio.timeout(20):
        while (
            waiting := (found := await life.jobs("dev-1"))[0].waiting
        ) is None or waiting.reason not in reasons:
            await asyncio.sleep(0.005)
    return found[0]


async def _reasons(life: TestNode, job: Job) -> set[Reason | None]:
    return {entry.reason for entry in await life.store.read(lambda tx: jobs.history(tx, job.id))}


async def _details(life: TestNode, job: Job) -> str:
    return "; ".join(
        str(entry.detail) for entry in await life.store.read(lambda tx: jobs.history(tx, job.id))
    )


# -- the line is pulled


@pytest.mark.parametrize("behind", ["a port", "a terminal server", "a terminal server that goes away"])
def test_pulled_in_the_upload_a_job_waits_and_goes_on_at_the_device_s_offset(
    tmp_path: Path, behind: str
) -> None:
    """Three times in one upload."""
    with ExitStack() as stack:
        server = stack.enter_context(SmpServer(tmp_path, FACTORY))
        pull, plug = server.unplug, server.plug
        node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS)
        if behind != "a port":
            tcp = stack.enter_context(TerminalServer(server.port))
            node.scheme, node.port = "socket", tcp.rest
            if behind != "a terminal server":
                pull, plug = tcp.off, tcp.on
        absent = Reason.LINK_LOST if behind == "a terminal server" else Reason.DEVICE_ABSENT

        due = [len(SECOND) // 4, len(SECOND) // 2, len(SECOND) * 3 // 4]

        def pulls(group: int, number: int, body: dict[str, Any]) -> bool:
            if (group, number) != (1, 1) or not due or body["off"] < due[0]:
                return True
            pull()
            # who waits for this plugs it in again, which must not come before
            due.pop(0)
            return False

        async def run() -> Job:
            async with node.life() as life:
                server.on_request = pulls
                await life.want("dev-1", "fw@2.0.0")
                for left in (2, 1, 0):
                    await until(lambda left=left: len(due) == left)
                    assert (await _waiting_for(life, absent)).state is State.STAGING
                    plug()
                job = await life.ended("dev-1")
                assert Reason.LINK_LOST in await _reasons(life, job)
                return job

        job = asyncio.run(run())
        assert job.state is State.SUCCEEDED and not due, job.detail
        assert server.runs == "2.0.0" and server.confirmed
        assert bytes(server.slots[0][: len(SECOND)]) == SECOND
        assert server.counts.erases == 1 and server.counts.stored == len(SECOND), "bytes were stored twice"
        pieces = [body for _, group, number, body in server.log if (group, number) == (1, 1)]
        sent = sum(len(body["data"]) for body in pieces)
        assert sent <= len(SECOND) + 3 * 2 * WINDOW_BYTES
        assert job.trial_boots == server.counts.trial_boots == 1


# -- somebody else is on it, too

LONGER = make_image((3, 0, 0), body_of(BODY_BYTES + 3000, 3))
SHORTER = make_image((3, 0, 0), body_of(BODY_BYTES - 2000, 3))
ILL = make_image((9, 0, 0), body_of(BODY_BYTES, 9))
Between = Callable[[OtherClient, Heard], None]


def uploads(image: bytes, pieces: int, together: int = 1) -> Between:
    """So many pieces, each where the device says that it is: ``together`` before each of ours, from our upload's middle on."""

    def between(other: OtherClient, heard: Heard) -> None:
        if heard.command != UPLOAD or other.server.counts.stored < HALF_BYTES:
            return
        for _ in range(min(together, pieces - other.asked)):
            ram = other.server._ram
            is_its = ram.sha == hashlib.sha256(image).digest()
            other.piece(image, ram.offset if is_its else 0)

    return between


def puts_one_in(other: OtherClient, heard: Heard) -> None:
    """A piece of another image into our upload, at its offset."""
    if heard.command == UPLOAD and not other.asked and other.server.counts.stored >= HALF_BYTES:
        other.piece(THIRD, other.server._ram.offset)


def begins_alike(other: OtherClient, heard: Heard) -> None:
    """Another upload, a shorter one, that is where ours is: so that nothing shows it but its length."""
    at = other.server._ram.offset
    if heard.command == UPLOAD and at and not other.asked:
        sha = hashlib.sha256(SHORTER).digest()
        other.ask(UPLOAD, {"off": 0, "data": SHORTER[:at], "len": len(SHORTER), "sha": sha})


def once(when: Callable[[OtherClient, Heard], bool], what: Callable[[OtherClient], None]) -> Between:
    def between(other: OtherClient, heard: Heard) -> None:
        if not other.asked and when(other, heard):
            what(other)

    return between


def is_staged(other: OtherClient, heard: Heard) -> bool:
    return heard.command == STATE and other.server.counts.stored >= len(SECOND) and not other.server._ram.size


def is_to_be_marked(other: OtherClient, heard: Heard) -> bool:
    return heard.command == MARK and not other.server.pending


def is_marked(other: OtherClient, heard: Heard) -> bool:
    return heard.command == RESET and other.server.pending


def is_on_trial(other: OtherClient, heard: Heard) -> bool:
    return heard.command == STATE and not other.server.confirmed


def replaces(other: OtherClient) -> None:
    for offset in range(0, len(THIRD), PIECE_BYTES):
        other.piece(THIRD, offset)


def begins(other: OtherClient) -> None:
    other.piece(THIRD, 0)


def marks(confirm: bool) -> Callable[[OtherClient], None]:
    def what(other: OtherClient) -> None:
        held = read_image(bytes(other.server.slots[1]))
        assert held is not None
        other.ask(MARK, {"hash": held.digest, "confirm": confirm})

    return what


def resets(other: OtherClient) -> None:
    other.ask(RESET, {})


GOOD = (State.SUCCEEDED, None, None)


@pytest.mark.parametrize(
    ("between", "end", "said"),
    [
        pytest.param(uploads(THIRD, 1), GOOD, "", id="begins an upload"),
        pytest.param(uploads(SHORTER, 1), GOOD, "", id="begins a shorter one"),
        pytest.param(begins_alike, GOOD, "", id="begins one that is alike"),
        pytest.param(uploads(LONGER, 18, 18), GOOD, "", id="a part of a longer one"),
        pytest.param(uploads(SHORTER, 30, 30), GOOD, "", id="uploads"),
        pytest.param(uploads(THIRD, 12), GOOD, "", id="uploads meanwhile"),
        pytest.param(
            uploads(THIRD, 1000),
            (State.FAILED, Reason.ATTEMPTS_EXHAUSTED, "somebody else uploads"),
            "somebody else uploads",
            id="does not stop",
        ),
        pytest.param(puts_one_in, (State.FAILED, Reason.VERIFY_FAILED, "damaged"), "", id="puts a piece into ours"),
        pytest.param(once(is_staged, replaces), GOOD, "somebody else writes to it", id="replaces what was uploaded"),
        pytest.param(once(is_staged, begins), GOOD, "somebody else writes to it", id="begins one where ours is whole"),
        pytest.param(once(is_to_be_marked, begins), GOOD, "somebody else writes to it", id="begins one before the mark"),
        pytest.param(once(is_to_be_marked, replaces), GOOD, "somebody else writes to it", id="replaces it before the mark"),
        pytest.param(once(is_staged, marks(False)), GOOD, "", id="marks it"),
        pytest.param(
            once(is_staged, marks(True)), (State.FAILED, Reason.REVERT_FAILED, "for good"), "", id="confirms it untried"
        ),
        pytest.param(once(is_marked, resets), GOOD, "", id="resets before us"),
        pytest.param(once(is_on_trial, resets), (State.REVERTED, Reason.DEVICE_REVERTED, ""), "", id="resets in the trial"),
    ],
)  # fmt: skip
def test_another_client_on_the_line(
    tmp_path: Path, between: Between, end: tuple[State, Reason | None, str | None], said: str
) -> None:
    with SmpServer(tmp_path, FACTORY, reset_s=0.0) as server:
        node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS, engine=FEW)
        other = OtherClient(server, between)

        async def run() -> tuple[Job, str]:
            async with node.life() as life:
                await life.want("dev-1", "fw@2.0.0")
                job = await life.ended("dev-1")
                return job, await _details(life, job)

        job, details = asyncio.run(run())
        assert other.asked, "there was nobody else"
        assert (job.state, job.reason) == end[:2], job.detail
        assert said in details and (end[2] or "") in job.detail
        _check_what_runs(server, job)


def test_answers_to_another_client_cost_nothing(tmp_path: Path) -> None:
    """It asks all the time, also by our sequence numbers, and sends pieces that the device drops."""

    def asks(other: OtherClient, heard: Heard) -> None:
        for sequence in (heard.sequence, heard.sequence ^ 0x80):
            other.ask(STATE, {}, sequence)
            other.ask((2, 0, 0), {"d": "hello"}, sequence)
        if heard.command == UPLOAD:
            other.ask(UPLOAD, {"off": 2**20, "data": b"x"}, heard.sequence ^ 0x80)

    with SmpServer(tmp_path, FACTORY) as server:
        node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS)
        other = OtherClient(server, asks)
        job = asyncio.run(node.deploy("2.0.0"))
        pieces = [body for _, group, number, body in server.log if (group, number) == (1, 1)]
        ours = [body for body in pieces if body["off"] < 2**20]
        assert other.asked > 4 * len(ours) and job.state is State.SUCCEEDED, job.detail
        assert sum(len(body["data"]) for body in ours) == len(SECOND), "a piece was sent twice"
        _check_what_runs(server, job)


def _check_what_runs(server: SmpServer, job: Job) -> None:
    right = SECOND if job.state is State.SUCCEEDED else FACTORY
    assert bytes(server.slots[0][: len(right)]) == right and server.confirmed
    assert job.state is not State.SUCCEEDED or not server.pending


def test_what_another_client_confirms_in_its_trial_is_left_where_it_is_not_well(tmp_path: Path) -> None:
    with SmpServer(tmp_path, FACTORY) as server:
        node = Node(
            tmp_path / "node", server.port, {"9.0.0": ILL}, attrs.evolve(VERSION_IS, timeout_s=IN_VAIN_S)
        )
        other = OtherClient(server, once(is_on_trial, lambda other: other.ask(MARK, {"confirm": True})))
        job = asyncio.run(node.deploy("9.0.0"))
        assert other.asked and (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED), job.detail
        _check_what_runs(server, job)


def test_pieces_that_another_client_puts_into_our_upload_are_seen_by_a_device_that_checks(
    tmp_path: Path,
) -> None:
    with SmpServer(tmp_path, FACTORY, checks=True) as server:
        node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS)
        other = OtherClient(server, puts_one_in)
        job = asyncio.run(node.deploy("2.0.0"))
        assert other.asked == 1 and job.state is State.SUCCEEDED and server.counts.trial_boots == 1, (
            job.detail
        )
        _check_what_runs(server, job)


def test_a_device_that_takes_less_than_it_is_sent_is_asked_once_whose_upload_it_has(tmp_path: Path) -> None:
    """Nobody else: it keeps whole words of its flash only."""

    def in_words(body: dict[str, Any]) -> Any:
        data = body["data"]
        is_last = body["off"] + len(data) == len(SECOND)
        return normal(body if is_last else body | {"data": data[: len(data) // 32 * 32]})

    with SmpServer(tmp_path, FACTORY) as server:
        normal = server._do_1_1_w
        server._do_1_1_w = in_words  # type: ignore[method-assign]
        node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS)
        job = asyncio.run(node.deploy("2.0.0"))
        begun = [body for _, group, number, body in server.log if (group, number) == (1, 1) and "sha" in body]
        assert job.state is State.SUCCEEDED and len(begun) == 2, job.detail
        assert server.counts.stored == len(SECOND)
        _check_what_runs(server, job)


def test_a_device_that_takes_no_second_piece_is_not_asked_for_ever(tmp_path: Path) -> None:
    """It says that each goes beyond the end, of which it was told with the first."""

    def first_only(body: dict[str, Any]) -> Any:
        return {"rc": 9, "err": {"group": 1, "rc": 31}} if body["off"] else normal(body)

    with SmpServer(tmp_path, FACTORY) as server:
        normal = server._do_1_1_w
        server._do_1_1_w = first_only  # type: ignore[method-assign]
        node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS, engine=FEW)
        job = asyncio.run(node.deploy("2.0.0"))
        begun = [body for _, group, number, body in server.log if (group, number) == (1, 1) and "sha" in body]
        assert (job.state, job.reason) == (State.FAILED, Reason.ATTEMPTS_EXHAUSTED), job.detail
        assert len(begun) <= 5 * FEW.max_attempts
        _check_what_runs(server, job)


PEER = """
import asyncio, sys
from smp import packet
from smpclient import SMPClient
from smpclient.transport import SMPTransport

class Shared(SMPTransport):
    mtu = 384
    max_unencoded_size = 256

    async def connect(self, address, timeout_s):
        self.reader, self.writer = await asyncio.open_connection(*address.split(":"))

    async def disconnect(self):
        self.writer.close()

    async def send_and_receive(self, data):
        for line in packet.encode(data, line_length=124):
            self.writer.write(line)
        while True:
            found = await self.one()
            if found and found[6] == data[6]:
                return found

    async def one(self):
        decoder = packet.decode()
        next(decoder)
        try:
            while True:
                decoder.send(await self.reader.readline())
        except StopIteration as end:
            return end.value
        except Exception:
            return None

async def main(address, file):
    data, ends = open(file, "rb").read(), 0
    async with SMPClient(Shared(), address, timeout_s=0.3) as client:
        print("ready", flush=True)
        sys.stdin.readline()
        for _ in range(4):
            try:
                async for offset in client.upload(data, first_timeout_s=0.3):
                    ends += 1
                    if ends >= 12:
                        break
            except Exception as error:
                print(type(error).__name__, error, file=sys.stderr)
        print("pieces", ends)

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_client_that_others_wrote_uploads_meanwhile(tmp_path: Path) -> None:
    """smpclient, by the same terminal server: the line is shared, and its bytes come among ours."""
    (tmp_path / "image").write_bytes(THIRD)
    with ExitStack() as stack:
        server = stack.enter_context(SmpServer(tmp_path, FACTORY, line_bytes_per_s=50_000, checks=True))
        tcp = stack.enter_context(TerminalServer(server.port, most=2))
        node = Node(
            tmp_path / "node", tcp.rest, {"2.0.0": SECOND}, VERSION_IS, scheme="socket", engine=PATIENT
        )
        peer = subprocess.Popen(
            [peer_python("smpclient"), "-c", PEER, tcp.rest, tmp_path / "image"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with peer:
            assert peer.stdin is not None and peer.stdout is not None
            assert peer.stdout.readline() == "ready\n"

            async def run() -> Job:
                async with node.life() as life:
                    await life.want("dev-1", "fw@2.0.0")
                    await until(lambda: server.counts.stored > len(SECOND) // 4)
                    assert peer.stdin is not None
                    await asyncio.to_thread(print, "go", file=peer.stdin, flush=True)
                    return await life.ended("dev-1")

            job = asyncio.run(run())
            word, pieces = peer.stdout.readline().split()
        digest = hashlib.sha256(THIRD).digest()
        assert word == "pieces" and any(body.get("sha") == digest for _, _, _, body in server.log)
        assert tcp.connections >= 2 and server.counts.erases > 1 and int(pieces) > 0
        assert job.state is State.SUCCEEDED, job.detail
        _check_what_runs(server, job)
