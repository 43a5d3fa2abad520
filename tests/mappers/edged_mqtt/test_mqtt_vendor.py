"""ThingsBoard's own client as the device: tb-mqtt-client 1.13.14, in a process of its own, through the whole engine."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from mqtt_node import Authority, Plant, deployed, image_bytes, vendor_device

from edged.domain.job import State
from edged.testing.node import life


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0")
    return plant


@pytest.mark.parametrize("chunk", [4096, 16384, 65536, 0])
def test_the_vendors_client_goes_over_tls_to_updated(plant: Plant, tmp_path: Path, chunk: int) -> None:
    authority = Authority(tmp_path)
    plant.tls(authority)
    plant.device()

    async def run() -> None:
        async with (
            life(plant.config, plant.plugins) as node,
            vendor_device(
                plant.port, tls=True, ca=str(authority.ca), username="token-of-pump-1", chunk=chunk
            ) as client,
        ):
            first = await deployed(node, "pump@1.0.0")
            assert first.state is State.SUCCEEDED, first.detail
            job = await deployed(node, "pump@2.0.0")
            assert job.state is State.SUCCEEDED, job.detail
            assert job.fallback is not None and job.fallback.release == "pump@1.0.0"
            digest = hashlib.sha256(image_bytes("2.0.0")).hexdigest()
            assert await client.until(lambda line: line.startswith("received")) == (
                f"received 200000 {digest} 2.0.0"
            )
            assert await client.until(lambda line: line.startswith("updated")) == "updated pump 2.0.0"
            # it keeps to four fifths of what getSessionLimits says
            assert [line for line in client.lines if line.startswith("limits")] == [
                "limits 52428 False False"
            ]

    asyncio.run(run())
