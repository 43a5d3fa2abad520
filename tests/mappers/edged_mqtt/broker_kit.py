"""Debian's mosquitto as the node's broker."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edged.testing.ports import free_port

MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
START_S = 20.0


class Mosquitto:
    """One broker. ``port`` is the node's listener; ``listeners`` are further ones, each with lines of its
    own; ``bridge`` is none, but the lines of a bridge.

    It gives up root at its start, so its files lie where everybody may read them. ``whole``: all of the configuration, where
    ``PORT`` is the node's listener's, in place of ``lines``.
    """

    def __init__(
        self, folder: Path, lines: str = "allow_anonymous true", *, whole: str = "", **listeners: str
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.ports = {name: free_port() for name in listeners}
        text = "user root\nset_tcp_nodelay true\nper_listener_settings true\nmax_queued_messages 100\n"
        text += f"listener {self.port} 127.0.0.1\n{lines}\n"
        for name, more in listeners.items():
            text += f"{more}\n" if name == "bridge" else f"listener {self.ports[name]} 127.0.0.1\n{more}\n"
        self.ports.pop("bridge", None)
        self.config = folder / "mosquitto.conf"
        self.config.write_text(f"user root\n{whole.replace('PORT', str(self.port))}" if whole else text)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.folder / "mosquitto.log").open("ab")
        self._process = subprocess.Popen([MOSQUITTO, "-c", str(self.config), "-v"], stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + START_S
        for port in (self.port, *self.ports.values()):
            while time.monotonic() < deadline:
                with socket.socket() as one:
                    if one.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert self._process.poll() is None, self.log
                time.sleep(0.02)

    def freeze(self) -> None:
        """It does nothing any more, and its connections stay."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def log(self) -> str:
        return (self.folder / "mosquitto.log").read_text(errors="replace")[-3000:]

    @contextmanager
    def running(self) -> Iterator[Mosquitto]:
        self.start()
        try:
            yield self
        finally:
            self.stop()
