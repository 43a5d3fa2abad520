"""The kit that any mapper is run against, with a device that pulls."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from mqtt_kit import LINKS, SPEC, PullingDevice, mqtt_device

from edged.testing.conformance import Subject
from edged.testing.ports import free_port

FIRST = [(0, bytes(range(256)) * 64)]
SECOND = [(0, bytes(range(255, -1, -1)) * 64)]


@pytest.fixture(autouse=True)
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pump-1", "pump-2"):
        (tmp_path / f"edged_{name}").write_text(f"token-of-{name}\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))


@pytest.mark.parametrize("protocol", [4, 5])
def test_conformance(edged_conformance: Any, protocol: int) -> None:
    async def run() -> None:
        port = free_port()
        devices = [
            PullingDevice(port, f"token-of-{name}", chunk_bytes=1024, protocol=protocol, every_s=0.1)
            for name in ("pump-1", "pump-2")
        ]
        device = devices[0]
        for one in devices:
            one.start()
        subject = Subject(
            spec=SPEC,
            links=LINKS,
            device=mqtt_device(port),
            first=FIRST,
            second=SECOND,
            sent=lambda: bytes(device.chunks),
            holds=device.holds,
            written=lambda: device.written,
            unit_bytes=1024,
            unplug=device.unplug,
            plug=device.plug,
            neighbour=mqtt_device(port, "pump-2"),
        )
        try:
            async with asyncio.timeout(60):
                await edged_conformance(subject)
        finally:
            for one in devices:
                await one.stop()

    asyncio.run(run())
