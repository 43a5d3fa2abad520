"""The serial link against the kernel's own pseudo terminals."""

from __future__ import annotations

import asyncio
import errno
import os
import pty
import select
import socket
import termios
import tty
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_kit import until
from uart_kit import LINKS

import edged_uart.link
from edged.api import Device, Health, HealthCheck
from edged.errors import EdgedError, Permanent, Reason, Transient
from edged.links import LinkPool, device_env
from edged_uart import socket_link
from edged_uart.config import UartConfig
from edged_uart.link import SerialLink, one_byte
from edged_uart.session import UartSession
from edged_uart.stk500v1 import Stk500v1


class Peer:
    """The other end of a line."""

    def __init__(self) -> None:
        self.master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        os.set_blocking(self.master, False)
        self.path = os.ttyname(self._slave)

    def say(self, data: bytes) -> None:
        os.write(self.master, data)

    def takes(self) -> bool:
        """Whether there is room for something to say."""
        return bool(select.select([], [self.master], [], 0)[1])

    def hang_up(self) -> None:
        if self.master >= 0:
            os.close(self._slave)
            os.close(self.master)
            self.master = -1


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    try:
        yield peer
    finally:
        peer.hang_up()


def on_link(peer: Peer, use: Callable[[SerialLink], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        link = SerialLink(peer.path)
        try:
            await link.open()
            await use(link)
        finally:
            await link.close()

    asyncio.run(run())


def length_prefixed(got: bytearray) -> int:
    return 1 + got[0] if got else 1


async def lost(call: Coroutine[Any, Any, object]) -> str:
    with pytest.raises(Transient) as caught:
        async with asyncio.timeout(20):
            await call
    assert caught.value.reason is Reason.LINK_LOST
    return caught.value.detail


def test_messages_come_whole_whatever_the_pieces_and_one_at_a_time(peer: Peer) -> None:
    async def use(link: SerialLink) -> None:
        asking = asyncio.ensure_future(link.receive(length_prefixed, 5))
        for byte in b"\x03ab":
            peer.say(bytes([byte]))
            await asyncio.sleep(0.005)
        assert not asking.done()
        peer.say(b"c\x01x\x02")
        assert await asking == b"\x03abc"
        assert await link.receive(length_prefixed, 5) == b"\x01x"
        assert await link.receive(length_prefixed, 0.05) is None
        peer.say(b"yz")
        assert await link.receive(length_prefixed, 5) == b"\x02yz"

    on_link(peer, use)


def test_a_wait_that_is_cancelled_loses_nothing(peer: Peer) -> None:
    async def use(link: SerialLink) -> None:
        asking = asyncio.ensure_future(link.receive(length_prefixed, None))
        await asyncio.sleep(0.01)
        peer.say(b"\x02a")
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        peer.say(b"b")
        assert await link.receive(length_prefixed, 5) == b"\x02ab"

    on_link(peer, use)


def test_more_than_the_system_takes_at_once_is_sent_whole(peer: Peer) -> None:
    data = bytes(range(256)) * 2000

    async def use(link: SerialLink) -> None:
        sending = asyncio.ensure_future(link.send(data))
        got = b""
        while len(got) < len(data):
            try:
                got += os.read(peer.master, 65536)
            except BlockingIOError:
                await asyncio.sleep(0.001)
        await sending
        assert got == data

    on_link(peer, use)


def test_what_nobody_waits_for_is_kept_within_bounds(peer: Peer) -> None:
    async def use(link: SerialLink) -> None:
        for _ in range(100):
            # a busy machine may not have emptied the pseudo terminal yet
            await until(peer.takes)
            peer.say(b"x" * 1024)
            await asyncio.sleep(0.001)
        await until(peer.takes)
        peer.say(b"end")
        await until(lambda: link._input.endswith(b"end"))
        kept = await link.receive(len, 1)
        assert kept is not None and kept.endswith(b"end") and 60_000 < len(kept) <= 65536

    on_link(peer, use)


def test_input_that_is_dropped_is_dropped_whole(peer: Peer) -> None:
    """The system holds more of it than one read takes."""

    async def use(link: SerialLink) -> None:
        for text in (b"x" * 9000, b"y" * 9000):
            await asyncio.to_thread(peer.say, text[:4000])
            asyncio.get_running_loop().remove_reader(link._fd)
            await asyncio.to_thread(peer.say, text[4000:])
            link.drop_input()
            assert await link.receive(lambda _: 1, 0.1) is None

    on_link(peer, use)


def test_hanging_up_ends_every_wait_and_says_why(peer: Peer) -> None:
    async def use(link: SerialLink) -> None:
        asyncio.get_running_loop().call_later(0.05, peer.hang_up)
        assert "unplugged" in await lost(link.receive(one_byte, None))
        assert "unplugged" in await lost(link.receive(one_byte, 1))
        assert "unplugged" in await lost(link.send(b"x"))
        assert peer.path in await lost(link.send(b"x"))

    on_link(peer, use)


def test_a_sender_notices_first(peer: Peer) -> None:
    async def use(link: SerialLink) -> None:
        peer.hang_up()
        await lost(link.send(b"x"))

    on_link(peer, use)


def test_a_stuck_sender_is_freed_by_the_hang_up(peer: Peer) -> None:
    async def use(link: SerialLink) -> None:
        asyncio.get_running_loop().call_later(0.1, peer.hang_up)
        await lost(link.send(b"x" * 1_000_000))

    on_link(peer, use)


def opening(path: str) -> EdgedError:
    async def run() -> None:
        link = SerialLink(path)
        try:
            await link.open()
        finally:
            await link.close()

    with pytest.raises(EdgedError) as caught:
        asyncio.run(run())
    return caught.value


def test_a_port_that_is_not_there_is_absent(tmp_path: Path) -> None:
    error = opening(str(tmp_path / "ttyUSB9"))
    assert isinstance(error, Transient) and error.reason is Reason.DEVICE_ABSENT
    assert error.detail.endswith("ttyUSB9: No such file or directory")


def test_a_port_that_may_not_be_opened_names_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(link: SerialLink) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(SerialLink, "_open_port", deny)
    error = opening("/dev/ttyUSB9")
    assert isinstance(error, Transient) and error.reason is Reason.DEVICE_ABSENT
    assert (
        error.detail
        == "/dev/ttyUSB9: Permission denied: is the daemon's user in the port's group, usually dialout?"
    )


def test_what_is_no_port_is_no_port(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (str(tmp_path / "file"), "/dev/null"):
        error = opening(path)
        assert isinstance(error, Transient) and error.reason is Reason.DEVICE_ABSENT
        assert error.detail == f"{path} is no serial port"


def test_a_port_in_use_is_busy_and_free_again_after_the_close(peer: Peer) -> None:
    async def use(_: SerialLink) -> None:
        error = await asyncio.to_thread(opening, peer.path)
        assert isinstance(error, Transient) and error.reason is Reason.LINK_BUSY

    on_link(peer, use)
    on_link(peer, lambda link: link.send(b"x"))


def test_a_cancelled_open_leaves_the_port_free(peer: Peer) -> None:
    async def cancelled() -> None:
        async def enter() -> None:
            link = SerialLink(peer.path)
            try:
                await link.open()
            finally:
                await link.close()

        task = asyncio.ensure_future(enter())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for _ in range(5):
        asyncio.run(cancelled())
        on_link(peer, lambda link: link.send(b"x"))


def test_the_baud_rate_reaches_the_port_and_a_wrong_one_is_refused(peer: Peer) -> None:
    async def use(link: SerialLink) -> None:
        await link.set_baud(57600)
        assert termios.tcgetattr(peer.master)[4] == termios.B57600
        with pytest.raises(Permanent) as caught:
            await link.set_baud(-1)
        assert caught.value.reason is Reason.CONFIG_INVALID

    on_link(peer, use)


def test_a_real_port_without_modem_lines_is_reported(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No port without DTR is at hand; a pty that is not recognised as one behaves alike."""
    monkeypatch.setattr(edged_uart.link, "_PTY_MAJORS", range(0))

    async def use(link: SerialLink) -> None:
        with pytest.raises(Permanent) as caught:
            await link.pulse_reset()
        assert caught.value.reason is Reason.UNSUPPORTED
        assert "reset = 'none'" in caught.value.detail

    on_link(peer, use)


def test_a_port_may_keep_its_lines_when_it_is_closed(peer: Peer) -> None:
    def hangs_up() -> bool:
        return bool(termios.tcgetattr(peer.master)[2] & termios.HUPCL)

    async def use(link: SerialLink) -> None:
        attributes = termios.tcgetattr(peer.master)
        attributes[2] |= termios.HUPCL
        termios.tcsetattr(peer.master, termios.TCSANOW, attributes)
        assert hangs_up()
        await link.keep_lines()
        assert not hangs_up()
        await link.set_baud(57600)
        assert not hangs_up()

    on_link(peer, use)


def test_a_reset_on_a_pty_opens_it_anew(peer: Peer) -> None:
    async def use(link: SerialLink) -> None:
        peer.say(b"old")
        await until(lambda: link._input == b"old")
        await link.pulse_reset()
        peer.say(b"new")
        assert await link.receive(lambda _: 3, 20) == b"new"
        peer.hang_up()
        with pytest.raises(Transient):
            await link.pulse_reset()

    on_link(peer, use)


@pytest.mark.parametrize(
    ("count", "evidence"),
    [
        (0, ""),
        (2, "panic: bad magic\ndump 0"),
        (5, "panic: bad magic\ndump 0\ndump 1\ndump 2\ndump 3"),
        (102, "panic: bad magic\ndump 0\ndump 1\ndump 2\n" + "x" * 200),
    ],
)
def test_what_an_application_says_instead_is_kept_from_its_beginning_and_bounded(
    peer: Peer, count: int, evidence: str
) -> None:
    """What crashes says why first, and then repeats itself."""
    lines = ["panic: bad magic", *(f"dump {number}" for number in range(100)), "x" * 500]

    async def use(link: SerialLink) -> None:
        board = Device("board", "board", "uart-stk500", link.address)
        session = UartSession(board, UartConfig(), link, Stk500v1(link, 1.0, page_at_once=True))
        said = "".join(f"{line}\r\n" for line in lines[:count]).encode()
        peer.say(said)
        await until(lambda: link._input == said)
        health = await session.check_health(HealthCheck("line", "^ready", timeout_s=1))
        assert health == Health(False, evidence)

    on_link(peer, use)


# -- a line at the other end of a TCP connection


@pytest.mark.parametrize(
    ("rest", "host", "port"),
    [("ts.example:4001", "ts.example", 4001), ("192.0.2.1:1", "192.0.2.1", 1), ("[::1]:65535", "::1", 65535)],
)
def test_the_address_of_a_terminal_server(rest: str, host: str, port: int) -> None:
    assert socket_link.parse_address(rest) == (host, port)


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "host",
        "host:",
        ":1",
        "host:0",
        "host:65536",
        "host:x",
        "::1:4001",
        "[]:1",
        "a b:1",
        "[host]:1",
        "host:٣",
        "a..b:1",
    ],
)
def test_what_is_no_address_of_a_terminal_server(rest: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        socket_link.parse_address(rest)


def test_a_name_that_no_resolver_knows_is_told_in_its_words() -> None:
    error = SerialLink("x")._translate(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    assert error.reason is Reason.DEVICE_ABSENT and "Name or service not known" in error.detail


def test_a_terminal_server_that_is_not_there_or_goes_away_is_told() -> None:
    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            rest = f"127.0.0.1:{listener.getsockname()[1]}"
            async with LINKS["socket"].open(rest, device_env("x", LinkPool(LINKS))) as link:
                assert isinstance(link, socket_link.SocketLink) and link.address == f"socket:{rest}"
                assert link._socket is not None
                assert link._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                other, _ = listener.accept()
                with other:
                    await link.set_baud(9600)
                    await link.keep_lines()
                    await link.send(b"to")
                    assert other.recv(9) == b"to"
                    other.sendall(b"from")
                    assert await link.receive(lambda _: 4, 5) == b"from"
                    with pytest.raises(Permanent) as refused:
                        await link.pulse_reset()
                    assert (
                        refused.value.reason is Reason.UNSUPPORTED
                        and "reset = 'none'" in refused.value.detail
                    )
                with pytest.raises(Transient) as gone:
                    await link.receive(lambda _: 1, 5)
                assert gone.value.reason is Reason.LINK_LOST
                assert "the connection was closed" in gone.value.detail
        with pytest.raises(Transient) as caught:
            async with LINKS["socket"].open(rest, device_env("x", LinkPool(LINKS))):
                pass
        assert caught.value.reason is Reason.DEVICE_ABSENT and "refused" in caught.value.detail

    asyncio.run(run())
