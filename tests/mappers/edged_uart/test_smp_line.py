"""What happens to a line in the middle of a job by SMP: it is pulled and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from smp_kit import (
    FACTORY,
    SECOND,
    VERSION_IS,
    Node,
)
from smp_server import SmpServer
from terminal_server import TerminalServer

from edged.domain.job import Job, State
from edged.errors import Reason
from edged.store import jobs
from edged.testing.node import TestNode

WINDOW_BYTES = 4 * 384
"""What may be on its way when the line goes: a window of the device's buffers."""


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.001)


async def _waiting_for(life: TestNode, *reasons: Reason) -> Job:
    async with asyncio.timeout(20):
        while (
            waiting := (found := await life.jobs("dev-1"))[0].waiting
        ) is None or waiting.reason not in reasons:
            await asyncio.sleep(0.005)
    return found[0]


async def _reasons(life: TestNode, job: Job) -> set[Reason | None]:
    return {entry.reason for entry in await life.store.read(lambda tx: jobs.history(tx, job.id))}


# -- the line is pulled


@pytest.mark.parametrize("behind", ["a port", "a terminal server", "a terminal server that goes away"])
def test_pulled_in_the_upload_a_job_waits_and_goes_on_at_the_device_s_offset(
    tmp_path: Path, behind: str
) -> None:
    """Three times in one upload."""
    with ExitStack() as stack:
        server = stack.enter_context(SmpServer(tmp_path, FACTORY, line_bytes_per_s=50_000))
        pull, plug = server.unplug, server.plug
        node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS)
        if behind != "a port":
            tcp = stack.enter_context(TerminalServer(server.port))
            node.scheme, node.port = "socket", tcp.rest
            if behind != "a terminal server":
                pull, plug = tcp.off, tcp.on
        absent = Reason.LINK_LOST if behind == "a terminal server" else Reason.DEVICE_ABSENT

        async def run() -> Job:
            async with node.life() as life:
                await life.want("dev-1", "fw@2.0.0")
                for quarter in range(1, 4):
                    at = quarter * len(SECOND) // 4
                    await _until(lambda at=at: server.counts.stored >= at)
                    pull()
                    assert server.counts.stored < len(SECOND), "it was not pulled in the upload"
                    assert (await _waiting_for(life, absent)).state is State.STAGING
                    plug()
                job = await life.ended("dev-1")
                assert Reason.LINK_LOST in await _reasons(life, job)
                return job

        job = asyncio.run(run())
        assert job.state is State.SUCCEEDED and server.runs == "2.0.0" and server.confirmed, job.detail
        assert bytes(server.slots[0][: len(SECOND)]) == SECOND
        assert server.counts.erases == 1 and server.counts.stored == len(SECOND), "bytes were stored twice"
        pieces = [body for _, group, number, body in server.log if (group, number) == (1, 1)]
        sent = sum(len(body["data"]) for body in pieces)
        assert sent <= len(SECOND) + 3 * 2 * WINDOW_BYTES
        assert job.trial_boots == server.counts.trial_boots == 1
