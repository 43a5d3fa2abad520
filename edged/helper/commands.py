"""Runs programs: with a bound on time and memory, an environment of its own, no input, and every line in the journal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "APT_LISTCHANGES_FRONTEND": "none",
    "NEEDRESTART_SUSPEND": "1",
}
"""The whole environment of what is run: nothing is inherited."""

MOST_LINES = 400
MOST_LINE_BYTES = 16 * 1024
GRACE_S = 10.0
DRAIN_S = 2.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: its exit code (124 where time ran out) and the last lines that it wrote."""

    code: int
    text: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def gist(self) -> str:
        """The lines that say what is wrong, else the last one."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "dpkg:", "Err:", "error:"))]
        return "; ".join(errors[:3]) or (lines[-1] if lines else f"exit code {self.code}")


async def run(
    argv: Sequence[str], *, timeout_s: float, cwd: Path | None = None, quiet: bool = False
) -> Ended:
    """Run ``argv`` to its end, or for ``timeout_s``: then it and its children are told to end, and killed if they do not.

    ``quiet``: what it writes is an answer, and not for the journal. Raises OSError where the program cannot be started.
    """
    lines: deque[str] = deque(maxlen=MOST_LINES)
    async with _pipe() as (stream, write_fd):
        reading = asyncio.create_task(_read(stream, lines, quiet=quiet))
        try:
            code = await _ended(argv, write_fd, timeout_s, cwd)
        finally:
            # a child that the program left behind may hold the pipe for ever
            await asyncio.wait([reading], timeout=DRAIN_S)
            reading.cancel()
            await asyncio.wait([reading])
    return Ended(code, "\n".join(lines))


@asynccontextmanager
async def _pipe() -> AsyncIterator[tuple[asyncio.StreamReader, int]]:
    """A pipe: what comes out, and the descriptor that goes in, which whoever gets it closes."""
    read_fd, write_fd = os.pipe()
    stream = asyncio.StreamReader(limit=MOST_LINE_BYTES)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), os.fdopen(read_fd, "rb", buffering=0)
    )
    try:
        yield stream, write_fd
    finally:
        transport.close()


async def _ended(argv: Sequence[str], write_fd: int, timeout_s: float, cwd: Path | None) -> int:
    """Run it; its exit code."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=write_fd,
            stderr=write_fd,
            cwd=cwd,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    finally:
        os.close(write_fd)
    try:
        async with asyncio.timeout(timeout_s):
            return await process.wait()
    except TimeoutError:
        log.warning("%s did not end within %.0f s", argv[0], timeout_s)
        return 124
    finally:
        if process.returncode is None:
            await _end(process)


async def _read(stream: asyncio.StreamReader, lines: deque[str], *, quiet: bool) -> None:
    while chunk := await _line(stream):
        text = chunk.decode("utf-8", errors="replace").rstrip()
        lines.append(text)
        if text and not quiet:
            log.info("| %s", text)


async def _line(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as exc:
        return exc.partial
    except asyncio.LimitOverrunError as exc:
        return await stream.read(exc.consumed)


async def _end(process: asyncio.subprocess.Process) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await process.wait()
                return
