"""A serial line at the other end of a TCP connection, as terminal servers have it (``ser2net`` in raw mode).

Bytes and nothing else: rate and modem lines are the terminal server's own. Nothing protects them on their way.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from edged.api import Env
from edged.errors import Permanent, Reason
from edged_uart.link import SerialLink

SCHEME: Final = "socket"
_CONNECT_S: Final = 5.0
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))
"""After a minute of silence the other end's system is asked, each 10 s, six times (tcp(7))."""


def parse_address(rest: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 address stands in brackets. Raises ValueError."""
    host, _, port = rest.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if not _is_host(bare) or not is_port or (":" in bare) != (bare != host):
        raise ValueError("allowed: socket:HOST:PORT, socket:[IPV6]:PORT")
    return bare, int(port)


def _is_host(name: str) -> bool:
    """Whether a resolver may be asked for it: it encodes a name so, and raises what is no OSError."""
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return name.isprintable() and name != "" and " " not in name


@asynccontextmanager
async def open_socket(rest: str, env: Env) -> AsyncIterator[SocketLink]:
    """Connect to ``HOST:PORT``; the ``open`` of this link's :class:`~edged.api.LinkSpec`.

    Raises Transient(DEVICE_ABSENT) or Permanent(CONFIG_INVALID).
    """
    try:
        link = SocketLink(rest, *parse_address(rest))
    except ValueError as error:
        raise Permanent(Reason.CONFIG_INVALID, f"address: found 'socket:{rest}'; {error}") from error
    try:
        await link.open()
        yield link
    finally:
        await link.close()


class SocketLink(SerialLink):
    """One connection. See :class:`SerialLink`; only how it is opened and closed differs, and what cannot be done."""

    sets_baud = False
    has_lines = False
    hung_up = (
        "the connection was closed: is another client connected to the terminal server, or did it restart?"
    )

    def __init__(self, path: str, host: str, port: int) -> None:
        super().__init__(path)
        self.address = f"{SCHEME}:{path}"
        self._to = (host, port)
        self._socket: socket.socket | None = None

    def _open_port(self) -> int:
        self._socket = socket.create_connection(self._to, _CONNECT_S)
        self._socket.setblocking(False)
        # a terminal server that lost its power says nothing: else a session that only listens would never know
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            self._socket.setsockopt(socket.IPPROTO_TCP, option, value)
        # each message is answered before the next one is sent
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._socket.fileno()

    def _close_port(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def _configure(self, baud: int) -> None:
        """Nothing: the terminal server has its rate."""

    def _keep_lines(self) -> None:
        """Nothing: they are the terminal server's."""

    def _set_lines(self, active: bool) -> bool:
        raise Permanent(
            Reason.UNSUPPORTED,
            f"{self.path}: a TCP connection has no DTR and RTS lines to reset the board with; set reset = 'none'",
        )
