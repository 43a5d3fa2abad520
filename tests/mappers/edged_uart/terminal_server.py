"""A terminal server: whoever connects by TCP has the serial line, one at a time, bytes and nothing else."""

from __future__ import annotations

import os
import select
import socket
import threading
import tty
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self


class TerminalServer:
    """``rest``: HOST:PORT of the line at ``port``. ``connections`` counts."""

    def __init__(self, port: Path) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="terminal server", daemon=True)
        self.rest = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        while not self._ending.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                connection, _ = self._listener.accept()
                self.connections += 1
                # a line that is not there, or goes away, ends the connection
                with connection, suppress(OSError):
                    self._carry(connection)

    def _carry(self, connection: socket.socket) -> None:
        line = os.open(self._port, os.O_RDWR | os.O_NOCTTY)
        try:
            tty.setraw(line)
            while not self._ending.is_set():
                ready = select.select([connection, line], [], [], 0.05)[0]
                if line in ready:
                    connection.sendall(os.read(line, 4096))
                if connection in ready:
                    if not (data := connection.recv(4096)):
                        return
                    os.write(line, data)
        finally:
            os.close(line)
