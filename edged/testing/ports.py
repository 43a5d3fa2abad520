"""TCP ports for servers of a test that come, go, and come back."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress
from typing import Final

_PORTS: Final = range(10_000, 32_000)
"""Below those that the kernel gives to clients (Linux: 32768 to 60999, ``ip_local_port_range``): a client of another test, or
the one that waits for just this server, may be given the number of a server that is down, which then cannot come back."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now, and that no client will be given."""
    while True:
        # a test that seeds its own dice would try the same ones each time, and as others do
        port = secrets.choice(_PORTS)
        with suppress(OSError), socket.socket() as one:
            one.bind(("127.0.0.1", port))
            return port
