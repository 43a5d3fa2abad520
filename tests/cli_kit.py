"""A real daemon in a process of its own, its configuration, and the command line in front of it."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from engine_kit import Publisher

from edged.cli import main
from edged.cli.client import Client

_WITH_FAKE_DEVICES = """
import sys
from pathlib import Path
from edged import app, config, server, sessions
from edged.testing.fake import FakePlugin
plugin = FakePlugin()
plugin.bus("slow").bytes_per_s = 2000
plugin.bus("line").exclusive = True
# longer than the end may take, so that who waits them out is not taken for a slow machine
app.HUNG_S = server._CLOSE_S = sessions.LET_GO_S = 60.0
app.main(config.load(Path(sys.argv[1])), [("fake", plugin)])
"""

DEVICES = """
[[model]]
id = "widget"
hardware_ids = ["fake:1"]
flash_size = 16384
[model.health]
kind = "property"
pattern = "version={identifies_as}"
query = "version"
timeout_s = 2
[[device]]
id = "one"
model = "widget"
mapper = "fake"
address = "fake:bus/one"
config = {app = "1.0.0"}
[[device]]
id = "two"
model = "widget"
mapper = "fake"
address = "fake:bus/two"
config = {app = "1.0.0", slot_count = 2}
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class Place:
    """A node's folder: configuration, state, socket."""

    base: Path
    publisher: Publisher | None = None
    extra: str = DEVICES
    repository: str = ""
    listen: str = ""
    group: str = "root"
    told: list[str] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.base / "edged.toml"

    @property
    def state(self) -> Path:
        return self.base / "state"

    @property
    def socket(self) -> Path:
        return self.base / "edged.sock"

    @property
    def client(self) -> Client:
        return Client(self.socket)

    def write(self) -> Place:
        """Write the configuration file."""
        self.base.mkdir(parents=True, exist_ok=True)
        repository = self.repository or (str(self.publisher.repo) if self.publisher else "")
        root = f'root = "{self.publisher.root}"' if self.publisher else ""
        self.config.write_text(
            f'[node]\nid = "node-1"\nstate_dir = "state"\n'
            f'[api]\nsocket = "edged.sock"\ngroup = "{self.group}"\n'
            f'[trust]\nrepository = "{repository}"\n{root}\n'
            f'[metrics]\nlisten = "{self.listen}"\n'
            "[engine]\nfirst_backoff_s = 0.05\nlongest_backoff_s = 0.2\ncheckpoint_bytes = 512\ncheckpoint_s = 0\n"
            + self.extra
        )
        return self

    def run(self, *words: str) -> Answer:
        """``edged`` with the node's configuration, in this process."""
        found = CliRunner().invoke(main, ["--config", str(self.config), *words])
        if found.exception is not None and not isinstance(found.exception, SystemExit):
            raise found.exception
        return Answer(found.exit_code, found.stdout, found.stderr)

    def spawn(self, *, fake: bool = True, **environment: str) -> subprocess.Popen[str]:
        """Start the daemon; returns at once."""
        command = ["-c", _WITH_FAKE_DEVICES, str(self.config)]
        if not fake:
            command = ["-m", "edged", "--config", str(self.config), "run"]
        return subprocess.Popen(
            [sys.executable, *command], env=os.environ | environment, stderr=subprocess.PIPE, text=True
        )

    @contextmanager
    def daemon(self, *, fake: bool = True, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """The daemon from READY=1 on; ends it with SIGTERM, which must be clean."""
        with Listener(self.base / "notify.sock") as listener:
            process = self.spawn(fake=fake, NOTIFY_SOCKET=str(self.base / "notify.sock"), **environment)
            try:
                self.told = listener.hear("READY=1", process)
                yield process
                if process.poll() is None:
                    process.terminate()
                    assert process.wait(30) == 0, process.stderr and process.stderr.read()
                    self.told += listener.hear("STOPPING=1", process)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                assert process.stderr is not None
                process.stderr.close()


class Listener:
    """What systemd hears at ``path``. It is taken off the socket at once, as systemd does: few messages fit into that."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._listen)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self._socket.getsockname())
        self._thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while message := self._socket.recv(4096):
            self._heard.put(message.decode())

    def hear(self, wanted: str, process: subprocess.Popen[str], timeout_s: float = 60) -> list[str]:
        """What was said since the last call, up to ``wanted``."""
        heard: list[str] = []
        deadline = time.monotonic() + timeout_s
        while wanted not in heard:
            try:
                heard.append(self._heard.get(timeout=0.1))
            except queue.Empty:
                assert time.monotonic() < deadline, f"never heard {wanted}, but {heard}"
                assert process.poll() is None or wanted == "STOPPING=1", (
                    process.stderr and process.stderr.read()
                )
        return heard


def eventually(check: Any, timeout_s: float = 30.0) -> Any:
    """What ``check`` returns as soon as that is true."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"still {found!r} after {timeout_s} s"
        time.sleep(0.02)
