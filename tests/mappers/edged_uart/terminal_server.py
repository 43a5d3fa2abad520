"""A terminal server: whoever connects by TCP has the serial line, bytes and nothing else."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import tty
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from edged.testing.ports import free_port


class TerminalServer:
    """``rest``: HOST:PORT of the line at ``port``. ``most``: so many have it at once, and each hears all that the device says.
    ``connections`` counts."""

    def __init__(self, port: Path, most: int = 1) -> None:
        self._port = port
        self._most = most
        self._listener = socket.create_server(("127.0.0.1", free_port()))
        self._ending = threading.Event()
        self._address = self._listener.getsockname()
        self.rest = f"127.0.0.1:{self._address[1]}"
        self.connections = 0

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._serve, name="terminal server", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.off()

    def off(self) -> None:
        """Who is connected is reset, and the next one refused."""
        self._ending.set()
        self._thread.join(10)
        self._listener.close()

    def on(self) -> None:
        self._ending.clear()
        self._listener = socket.create_server(self._address)
        self.__enter__()

    def _serve(self) -> None:
        while not self._ending.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                # a line that is not there, or goes away, ends the connections
                with ExitStack() as stack, suppress(OSError):
                    self._carry(stack)

    def _carry(self, stack: ExitStack) -> None:
        clients = [self._accepted(stack)]
        line = os.open(self._port, os.O_RDWR | os.O_NOCTTY)
        stack.callback(os.close, line)
        tty.setraw(line)
        while clients and not self._ending.is_set():
            others = [self._listener] if len(clients) < self._most else []
            ready = select.select([*clients, *others, line], [], [], 0.05)[0]
            said = os.read(line, 4096) if line in ready else b""
            if line in ready and not said:
                return
            clients = [one for one in clients if _is_served(one, said, line, one in ready)]
            if self._listener in ready:
                clients.append(self._accepted(stack))
        if self._ending.is_set():
            for one in clients:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _accepted(self, stack: ExitStack) -> socket.socket:
        connection, _ = self._listener.accept()
        self.connections += 1
        return stack.enter_context(connection)


def _is_served(client: socket.socket, said: bytes, line: int, is_ready: bool) -> bool:
    """False where it has gone."""
    try:
        client.sendall(said)
        data = client.recv(4096) if is_ready else b""
    except ConnectionError:
        return False
    os.write(line, data)
    return bool(data) or not is_ready
