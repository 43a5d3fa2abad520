"""The kit for mappers, on a second implementation of SMP, with each framing."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from smp_kit import FACTORY, subject
from smp_server import SmpServer
from terminal_server import TerminalServer

from edged.testing.conformance import Check, Subject


@pytest.mark.parametrize("framing", ["console", "raw", "cobs"])
def test_conformance(framing: str, edged_conformance: Check, tmp_path: Path) -> None:
    with SmpServer(tmp_path, FACTORY, framing=framing, line_bytes_per_s=100_000) as server:
        asyncio.run(check(edged_conformance, server, framing))


def test_conformance_behind_a_terminal_server(edged_conformance: Check, tmp_path: Path) -> None:
    with SmpServer(tmp_path, FACTORY, line_bytes_per_s=100_000) as server, TerminalServer(server.port) as tcp:
        device = replace(subject(server).device, address=f"socket:{tcp.rest}")
        asyncio.run(run(edged_conformance, replace(subject(server), device=device)))
        assert tcp.connections


async def check(conformance: Check, server: SmpServer, framing: str) -> None:
    await run(conformance, subject(server, framing=framing))


async def run(conformance: Check, of: Subject) -> None:
    await conformance(of)
