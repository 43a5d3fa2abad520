"""The kit for mappers, on a second implementation of SMP, with each framing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from smp_kit import FACTORY, subject
from smp_server import SmpServer

from edged.testing.conformance import Check


@pytest.mark.parametrize("framing", ["console", "raw", "cobs"])
def test_conformance(framing: str, edged_conformance: Check, tmp_path: Path) -> None:
    with SmpServer(tmp_path, FACTORY, framing=framing, line_bytes_per_s=100_000) as server:
        asyncio.run(check(edged_conformance, server, framing))


async def check(conformance: Check, server: SmpServer, framing: str) -> None:
    await conformance(subject(server, framing=framing))
