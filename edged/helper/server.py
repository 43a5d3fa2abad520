"""The socket: who asks, is it a request, and the answer. Every request is bounded in size, time and number."""

from __future__ import annotations

import asyncio
import logging
import pwd
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

from edged.helper import protocol
from edged.helper.protocol import MOST_REQUEST_BYTES, Refusal, Request, Verb, Why
from edged.helper.upgrade import Upgrades

log = logging.getLogger(__name__)

REQUEST_S = 5.0
SEND_S = 5.0
REST_S = 1.0
MOST_REST_BYTES = 64 * 1024
MOST_CONNECTIONS = 8
_PEERCRED = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel says."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        return cls(
            *_PEERCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
        )


class Server:
    """Serves a listening unix socket, which stays another's: it is neither closed nor removed.

    ``user`` and root may ask, nobody else, whatever the mode of the socket.
    """

    def __init__(
        self, listening: socket.socket, upgrades: Upgrades, *, user: str = "_edged", idle_s: float = 30.0
    ) -> None:
        self._listening = listening
        self._upgrades = upgrades
        self._user = user
        self._idle_s = idle_s
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until nobody asked for ``idle_s`` and nothing is at work, or until cancelled."""
        self._listening.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    async with asyncio.timeout(self._idle_s):
                        connection, _ = await loop.sock_accept(self._listening)
                except TimeoutError:
                    if self._connections or self._upgrades.busy:
                        continue
                    return
                self._take(connection)
        finally:
            for task in self._connections:
                task.cancel()
            if self._connections:
                await asyncio.wait(self._connections)

    def _take(self, connection: socket.socket) -> None:
        task = asyncio.create_task(self._serve(connection, full=len(self._connections) >= MOST_CONNECTIONS))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, connection: socket.socket, *, full: bool) -> None:
        connection.setblocking(False)
        with connection, suppress(OSError, TimeoutError):
            try:
                await self._answer(connection, Peer.of(connection), full=full)
            except Refusal as exc:
                log.warning("refused: %s: %s", exc.why.value, exc.detail)
                await _send(connection, protocol.refused(exc.why, exc.detail))
                await _take_the_rest(connection)

    async def _answer(self, connection: socket.socket, peer: Peer, *, full: bool) -> None:
        if not self._may_ask(peer):
            raise Refusal(Why.NOT_ALLOWED, f"user {peer.uid} may not ask")
        if full:
            raise Refusal(Why.BUSY, f"{MOST_CONNECTIONS} others are connected")
        request = protocol.parse(await _line(connection))
        log.info("uid %d, pid %d: %s %s", peer.uid, peer.pid, request.verb.value, request.version)
        if request.verb is Verb.STATUS:
            await _send(connection, protocol.event("status", **await self._upgrades.status()))
            await _send(connection, protocol.done())
        elif request.verb is Verb.REBOOT:
            self._upgrades.may_reboot()
            # before it: afterwards there may be nobody left to hear or to say it
            await _send(connection, protocol.event("rebooting"))
            await self._upgrades.reboot()
            await _send(connection, protocol.done())
        else:
            await self._follow(connection, request)

    def _may_ask(self, peer: Peer) -> bool:
        if peer.uid == 0:
            return True
        try:
            return peer.uid == pwd.getpwnam(self._user).pw_uid
        except KeyError:
            return False

    async def _follow(self, connection: socket.socket, request: Request) -> None:
        """Tell how the upgrade goes, for as long as the other end listens; the upgrade goes on without it."""
        listener = await self._upgrades.begin(request)
        try:
            while True:
                line = await listener.get()
                await _send(connection, line)
                if b'"result"' in line:
                    return
        finally:
            self._upgrades.forget(listener)


async def _line(connection: socket.socket) -> bytes:
    """One line, without its end. Raises :class:`Refusal` where it is too long, too slow or cut off."""
    loop = asyncio.get_running_loop()
    found = b""
    try:
        async with asyncio.timeout(REQUEST_S):
            while b"\n" not in found:
                if len(found) > MOST_REQUEST_BYTES:
                    raise Refusal(
                        Why.REQUEST_INVALID, f"the request is longer than {MOST_REQUEST_BYTES} bytes"
                    )
                more = await loop.sock_recv(connection, MOST_REQUEST_BYTES)
                if not more:
                    raise Refusal(Why.REQUEST_INVALID, "the request has no end")
                found += more
    except TimeoutError:
        raise Refusal(Why.REQUEST_INVALID, f"no request within {REQUEST_S:.0f} s") from None
    line, _, rest = found.partition(b"\n")
    if rest or len(line) > MOST_REQUEST_BYTES:
        raise Refusal(
            Why.REQUEST_INVALID,
            f"expected one line of at most {MOST_REQUEST_BYTES} bytes, and nothing after it",
        )
    return line


async def _take_the_rest(connection: socket.socket) -> None:
    """Read what was not asked for, bounded: closing a unix socket with unread bytes in it takes our answer back too."""
    connection.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(REST_S):
        for _ in range(MOST_REST_BYTES // MOST_REQUEST_BYTES):
            if not await asyncio.get_running_loop().sock_recv(connection, MOST_REQUEST_BYTES):
                return


async def _send(connection: socket.socket, line: bytes) -> None:
    async with asyncio.timeout(SEND_S):
        await asyncio.get_running_loop().sock_sendall(connection, line)
