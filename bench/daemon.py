"""The real ``edged run``: time to READY=1, memory idle and while it flashes, which libraries that memory is, and what it
writes to its disk.

The node has one device, a simulated board with a real optiboot whose reports it watches, and the metrics' port is open.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.figures import Figure, at_most
from bench.flash import applications, described
from edged.testing import demo
from edged.testing.avr import OPTIBOOT_328P, SimulatedAvr

_READY_S: Final = 30.0
_KIB_PER_MIB: Final = 1024
_DAY_S: Final = 86_400
_LIBRARIES: Final = (
    *("asyncio", "sqlite3", "logging", "tomllib", "importlib.metadata", "click", "attrs", "cattrs"),
    *("sqlite_utils", "pluggy", "cryptography.hazmat.primitives.asymmetric.ed25519", "serial"),
    *("edged.app", "edged_uart", "prometheus_client", "aiohttp.web", "rich.table", "tuf.ngclient"),
)
"""In the order in which they are imported here: each is charged with what those before it had not brought."""

_WEIGH: Final = """
import importlib, json, sys
def rss():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))
found = {"interpreter": rss()}
for name in json.loads(sys.argv[1]):
    before = rss()
    importlib.import_module(name)
    found[name] = rss() - before
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process, in MiB: resident, and its share of what is resident (proc_pid_smaps(5): Pss)."""

    rss_mib: float
    pss_mib: float

    @classmethod
    def of(cls, pid: int) -> Memory:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return cls(kib["Rss"] / _KIB_PER_MIB, kib["Pss"] / _KIB_PER_MIB)


def _written_mib(pid: int) -> float:
    """What a process has given to its disk (proc_pid_io(5): write_bytes); the file system's journal comes on top."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["write_bytes"]) / _KIB_PER_MIB**2


@dataclass(frozen=True, slots=True)
class Started:
    """A daemon that is ready."""

    process: subprocess.Popen[bytes]
    command: list[str]
    ready_s: float


@contextmanager
def _daemon(config: Path) -> Iterator[Started]:
    """``edged run`` until READY=1 came; ends it at the end."""
    command = [sys.executable, "-m", "edged", "--config", str(config)]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        address = config.with_name("notify")
        address.unlink(missing_ok=True)
        notified.bind(str(address))
        notified.settimeout(_READY_S)
        with config.with_name("daemon.log").open("ab") as log:
            began = time.monotonic()
            process = subprocess.Popen(
                [*command, "run"],
                env=_environment(config.parent) | {"NOTIFY_SOCKET": str(address)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            while b"READY=1" not in notified.recv(4096).split(b"\n"):
                pass
            yield Started(process, command, time.monotonic() - began)
        finally:
            process.terminate()
            process.wait(_READY_S)


def _environment(folder: Path) -> dict[str, str]:
    """With compiled modules in ``folder``, as an installed package has them; a compilation costs time and memory."""
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    return os.environ | compiled


def _bare_start_s() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.monotonic() - began


def _weigh(folder: Path) -> dict[str, float]:
    """MiB by library, in a process of its own; its second run, in which nothing is compiled."""
    command = [sys.executable, "-c", _WEIGH, json.dumps(_LIBRARIES)]
    for _ in range(2):
        done = subprocess.run(command, env=_environment(folder), capture_output=True, check=True)
    return {name: kib / _KIB_PER_MIB for name, kib in json.loads(done.stdout).items()}


def _flashing(started: Started, version: str) -> tuple[Memory, Memory]:
    """The largest memory while a release is deployed, and what is left of it afterwards."""
    deploy = [*started.command, "deploy", f"blink@{version}", "--to", demo.DEVICE, "--wait", "--yes"]
    seen: list[Memory] = []
    with subprocess.Popen(deploy, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            seen.append(Memory.of(started.process.pid))
            time.sleep(0.05)
        assert process.stderr is not None
        if process.returncode != 0:
            raise RuntimeError(f"deploy failed: {process.stderr.read()!r}")
    time.sleep(1.0)
    return max(seen, key=lambda memory: memory.rss_mib), Memory.of(started.process.pid)


def run(*, quick: bool) -> list[Figure]:
    """Start several times on the same state, then flash once."""
    starts, rest_s, idle_s = (1, 0.2, 1.0) if quick else (7, 3.0, 60.0)
    files = applications(4_000 if quick else 28_000)
    with tempfile.TemporaryDirectory(prefix="edged-bench-") as name:
        folder = Path(name)
        (folder / "board").mkdir()
        with SimulatedAvr(folder / "board", OPTIBOOT_328P, application=files.before) as board:
            bench = described(board, files)
            config = demo.configure(bench, demo.publish(bench, folder), folder)
            config.write_text(config.read_text().replace('listen = ""', 'listen = "127.0.0.1:0"'))
            return _measure(config, starts, rest_s, idle_s)


def _measure(config: Path, starts: int, rest_s: float, idle_s: float) -> list[Figure]:
    with _daemon(config) as first:
        first_ready_s = first.ready_s
    ready, bare, idle = [], [], []
    for _ in range(starts):
        bare.append(_bare_start_s())
        with _daemon(config) as started:
            ready.append(started.ready_s)
            time.sleep(rest_s)
            idle.append(Memory.of(started.process.pid))
    with _daemon(config) as started:
        pid, before = started.process.pid, _written_mib(started.process.pid)
        time.sleep(idle_s)
        at_rest = _written_mib(pid)
        flashing, after = _flashing(started, demo.GOOD[-1])
        written = (at_rest - before) / idle_s * _DAY_S, _written_mib(pid) - at_rest
    return [
        Figure(
            name="daemon.start",
            what="start of the daemon to READY=1",
            unit="x",
            against="start of a bare interpreter (`python -c pass`)",
            samples=tuple(mine / peer for mine, peer in zip(ready, bare, strict=True)),
            detail={
                "ready_s": ready,
                "ready_s_median": statistics.median(ready),
                "first_ready_with_compilation_s": first_ready_s,
                "bare_interpreter_s": bare,
            },
        ),
        _memory("idle", "idle", idle, {"mib_by_import": _weigh(config.parent)}, goal=True),
        _memory("flashing", "at most while it fetches and flashes", [flashing], {}),
        _memory("after", "idle after the flash", [after], {}),
        _written(
            "idle", "written in a day, idle, one device reporting each second", written[0], "the disk's life"
        ),
        _written("update", "written for one update", written[1], "the image of 28 kB"),
    ]


def _written(name: str, what: str, mib: float, against: str) -> Figure:
    return Figure(name=f"daemon.written_{name}", what=what, unit="MiB", against=against, samples=(mib,))


def _memory(
    name: str, when: str, seen: list[Memory], detail: dict[str, object], *, goal: bool = False
) -> Figure:
    pss_mib = statistics.median(memory.pss_mib for memory in seen)
    return Figure(
        name=f"daemon.memory_{name}",
        what=f"resident memory, {when} (Pss {pss_mib:.1f} MiB)",
        unit="MiB",
        against="45 MiB",
        samples=tuple(memory.rss_mib for memory in seen),
        goal=at_most(45) if goal else None,
        detail=detail | {"pss_mib": pss_mib},
    )
