"""The helper's socket: who may ask, bounds, and its life. Over the real socket, in part with the real process."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helper_kit import ROOT, Node, ask, served

from edged.helper import server
from edged.helper.client import HelperClient, HelperGone
from edged.helper.commands import ENVIRONMENT, MOST_LINES, run
from edged.helper.protocol import MOST_REQUEST_BYTES


async def answered(client: HelperClient) -> None:
    """Return when there is room for one more who asks: the helper has seen that others are gone."""
    async with asyncio.timeout(20):
        while (await ask(client, "status"))[-1]["result"] != "ok":
            await asyncio.sleep(0.01)


async def say(folder: Path, text: bytes, *, end: bool = False) -> dict[str, Any]:
    """The last line of the answer to ``text``; ``end``: nothing more will come."""
    reader, writer = await asyncio.open_unix_connection(str(folder / "helper.sock"))
    try:
        writer.write(text)
        if end:
            writer.write_eof()
        async with asyncio.timeout(20):
            found: dict[str, Any] = json.loads((await reader.read()).splitlines()[-1])
        return found
    finally:
        writer.close()


def test_what_is_no_request_is_refused_and_the_next_one_is_answered(node: Node, tmp_path: Path) -> None:
    chance = random.Random(7)
    texts = [
        *(b"\n", b"{}\n", b"GET / HTTP/1.1\r\n", b"x" * 5000, b"x" * (MOST_REQUEST_BYTES + 1) + b"\n"),
        *(
            b'{"verb": "status"}\n{"verb": "reboot"}\n',
            b'{"verb": "status"}\nx',
            b"\x00\n",
            b"[" * 1000 + b"\n",
        ),
        *(chance.randbytes(chance.randrange(1, 900)).replace(b"\n", b"") + b"\n" for _ in range(40)),
    ]

    async def asked() -> None:
        async with served(node, tmp_path) as client:
            for text in texts:
                answer = await say(tmp_path, text)
                assert (answer["result"], answer["reason"]) == ("refused", "request_invalid"), text
            answer = await say(tmp_path, b'{"verb": "reb', end=True)
            assert answer["reason"] == "request_invalid"
            assert (await ask(client, "status"))[-1] == {"result": "ok"}

    asyncio.run(asked())
    assert node.reboots() == 0


def test_a_request_may_come_in_pieces_but_not_for_ever(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def asked() -> None:
        async with served(node, tmp_path):
            monkeypatch.setattr(server, "REQUEST_S", 20)
            reader, writer = await asyncio.open_unix_connection(str(tmp_path / "helper.sock"))
            for piece in (b'{"verb"', b': "sta', b'tus"}\n'):
                writer.write(piece)
                await asyncio.sleep(0.05)
            assert b'"ok"' in await reader.read()
            writer.close()
            monkeypatch.setattr(server, "REQUEST_S", 0.5)
            answer = await say(tmp_path, b'{"verb": ')
            assert answer["reason"] == "request_invalid" and "within" in answer["detail"]

    asyncio.run(asked())


def test_many_at_once_are_bounded(node: Node, tmp_path: Path) -> None:
    async def asked() -> None:
        async with served(node, tmp_path) as client:
            idle = [
                await asyncio.open_unix_connection(str(tmp_path / "helper.sock"))
                for _ in range(server.MOST_CONNECTIONS)
            ]
            answer = (await ask(client, "status"))[-1]
            assert (answer["result"], answer["reason"]) == ("refused", "busy")
            for _, writer in idle:
                writer.close()
            await answered(client)

    asyncio.run(asked())


def test_who_does_not_read_stops_nobody(node: Node, tmp_path: Path) -> None:
    async def asked() -> None:
        async with served(node, tmp_path) as client:
            for _ in range(3):
                _, writer = await asyncio.open_unix_connection(str(tmp_path / "helper.sock"))
                writer.write(b'{"verb": "status"}\n')
                writer.transport.abort()
            assert (await ask(client, "status"))[-1]["result"] == "ok"

    asyncio.run(asked())


# -- who asks


ASK = """
import socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    sock.sendall(b'{"verb": "status"}\\n')
    print(b"".join(iter(lambda: sock.recv(65536), b"")).decode().splitlines()[-1])
"""


def as_user(uid: int, path: Path) -> dict[str, Any]:
    """What the helper answers to a process of ``uid``; one that is not ours needs root."""
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid != os.getuid() else []
    done = subprocess.run(
        [*command, "/usr/bin/python3", "-I", "-c", ASK, str(path)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_kernel_says_who_asks(node: Node) -> None:
    """The socket's mode lets everybody in here: who is refused is refused by the helper."""
    nobody = 65534

    async def asked(user: str, uid: int, folder: Path) -> dict[str, Any]:
        async with served(node, folder, user=user):
            return await asyncio.to_thread(as_user, uid, folder / "helper.sock")

    with open_folder() as folder:
        other = nobody if os.getuid() == 0 else os.getuid()
        for user in ("daemon", "there-is-no-such-user"):
            answer = asyncio.run(asked(user, other, folder))
            assert (answer["result"], answer["reason"]) == ("refused", "not_allowed")
            assert str(other) in answer["detail"]
        if os.getuid() == 0:
            assert asyncio.run(asked("nobody", nobody, folder))["result"] == "ok"
            assert asyncio.run(asked("there-is-no-such-user", 0, folder))["result"] == "ok"


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which those of pytest are not."""
    folder = Path(f"/tmp/edged-helper-{os.getpid()}")
    folder.mkdir(mode=0o755)
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()


def test_nobody_there_and_an_answer_that_breaks_off(tmp_path: Path) -> None:
    async def asked() -> None:
        with pytest.raises(HelperGone, match=r"nowhere\.sock"):
            await HelperClient(tmp_path / "nowhere.sock").status()
        for text in (b"", b'{"event": ', b"nonsense\n", b"[]\n"):

            async def answer(
                _: asyncio.StreamReader, writer: asyncio.StreamWriter, text: bytes = text
            ) -> None:
                writer.write(text)
                writer.close()

            path = tmp_path / "false.sock"
            async with await asyncio.start_unix_server(answer, str(path)):
                with pytest.raises(HelperGone):
                    await HelperClient(path).status()
            path.unlink(missing_ok=True)

    asyncio.run(asked())


# -- its life, as systemd sees it


HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def started(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """The real process on a socket that another owns."""
    path = folder / "own.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen(16)
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", HAND_OVER, str(listening.fileno())),
                *(sys.executable, "-m", "edged.helper", "--state", str(folder / "state"), *options),
            ],
            cwd=ROOT,
            pass_fds=[listening.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process, path
        finally:
            process.kill()
            process.communicate()


def test_it_ends_when_it_is_idle_and_leaves_the_socket(tmp_path: Path) -> None:
    with started(tmp_path, "--idle-s", "1.5") as (process, path):
        # before the question: how long the answer to it takes is nothing of the rest
        began = time.monotonic()
        assert asyncio.run(HelperClient(path).status())["event"] == "status"
        assert process.wait(20) == 0
        assert time.monotonic() - began > 1.4
        assert path.is_socket(), "the socket is systemd's"
        with socket.socket(socket.AF_UNIX) as waiting:
            waiting.connect(str(path))


def test_it_ends_when_it_is_told_to(tmp_path: Path) -> None:
    with started(tmp_path) as (process, path):
        asyncio.run(HelperClient(path).status())
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0
        assert errors.startswith("<6>uid "), "the journal reads the priority"


def test_what_it_runs_gets_nothing_of_its_environment_or_its_socket() -> None:
    """A program that is run must not hold the socket open, nor see what systemd or anybody passed to the helper."""
    ended = asyncio.run(run(["/bin/sh", "-c", "env; ls /proc/self/fd"], timeout_s=20))
    names = {line.partition("=")[0] for line in ended.text.splitlines() if "=" in line}
    allowed = {*ENVIRONMENT, "PWD", "_", "OLDPWD", "SHLVL"}
    assert names <= allowed
    assert {line for line in ended.text.splitlines() if line.isdecimal()} <= {"0", "1", "2", "3"}


def test_a_program_that_does_not_end_is_ended_with_its_children() -> None:
    began = time.monotonic()
    ended = asyncio.run(run(["/bin/sh", "-c", "echo here; sleep 60 & wait"], timeout_s=3))
    assert (ended.code, ended.text) == (124, "here") and time.monotonic() - began < 15


def test_a_child_that_stays_behind_does_not_hold_it_up() -> None:
    began = time.monotonic()
    ended = asyncio.run(run(["/bin/sh", "-c", "sleep 30 & echo done; exit 3"], timeout_s=20))
    assert (ended.code, ended.text) == (3, "done") and time.monotonic() - began < 15


def test_what_a_program_writes_is_bounded() -> None:
    script = "import sys; sys.stdout.write('x' * 3_000_000 + '\\n'); [print(n) for n in range(3000)]; print('last')"
    ended = asyncio.run(run([sys.executable, "-c", script], timeout_s=30))
    assert ended.ok and len(ended.text.splitlines()) <= MOST_LINES and ended.text.endswith("last")


def test_started_by_hand_it_says_how_it_is_started() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edged.helper"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and "edged-helper.socket" in done.stderr


def test_all_of_it_is_imported_before_the_first_request() -> None:
    """The files that it was loaded from are replaced while it works."""
    script = (
        "import sys, asyncio; from edged.helper import __main__; before = set(sys.modules)\n"
        "from edged.helper.commands import run\n"
        "asyncio.run(run(['/bin/true'], timeout_s=5))\n"
        "print(sorted(name for name in set(sys.modules) - before if name.startswith('edged')))\n"
        "print(sorted(name for name in sys.modules if name.startswith('edged')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    late, ours = done.stdout.splitlines()
    assert late == "[]", done.stderr
    assert not {"edged.config", "edged.api", "edged.errors", "edged.clock"} & set(
        json.loads(ours.replace("'", '"'))
    )
