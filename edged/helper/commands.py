"""Runs programs: with a bound on time and memory, an environment of its own, no input, and every line in the journal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
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
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=cwd,
        env=ENVIRONMENT,
        start_new_session=True,
        limit=MOST_LINE_BYTES,
    )
    lines: deque[str] = deque(maxlen=MOST_LINES)
    assert process.stdout is not None
    reading = asyncio.create_task(_read(process.stdout, lines, quiet=quiet))
    try:
        async with asyncio.timeout(timeout_s):
            code = await process.wait()
    except TimeoutError:
        log.warning("%s did not end within %.0f s", argv[0], timeout_s)
        code = 124
    finally:
        if process.returncode is None:
            await _end(process)
        # a child that the program left behind may hold the pipe for ever
        await asyncio.wait([reading], timeout=DRAIN_S)
        reading.cancel()
    return Ended(code, "\n".join(lines))


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
