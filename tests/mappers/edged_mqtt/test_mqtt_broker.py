"""Devices on a real broker: Debian's mosquitto, with mount points, passwords, certificates, restarts and access lists."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from broker_kit import Mosquitto
from mqtt_kit import LINKS, SPEC, PullingDevice, mqtt_device
from mqtt_node import Authority, Plant, deployed, image_bytes, vendor_device

from edged.config import LinkSettings
from edged.domain.job import State
from edged.errors import Reason
from edged.supervisor import UnitState
from edged.testing.conformance import Subject
from edged.testing.node import TestNode, life

FIRST = [(0, bytes(range(256)) * 64)]
SECOND = [(0, bytes(range(255, -1, -1)) * 64)]


def _on_broker(port: int, name: str) -> Any:
    return replace(mqtt_device(port, name, silence_s=1.5), address=f"mqtt:127.0.0.1:{port}/devices/{name}")


async def listening(node: TestNode) -> None:
    """Until this node hears what the device says: a broker keeps nothing for whoever comes later."""
    async with asyncio.timeout(20):
        while node.sessions["pump-1"].unit.state is not UnitState.ABSENT:
            await asyncio.sleep(0.01)


def test_conformance(edged_conformance: Any, tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)

    async def run() -> None:
        devices = [
            PullingDevice(broker.port, chunk_bytes=1024, every_s=0.1, repeats=True, prefix=f"devices/{name}/")
            for name in ("pump-1", "pump-2")
        ]
        device = devices[0]
        for one in devices:
            one.start()
        subject = Subject(
            spec=SPEC,
            links=LINKS,
            device=_on_broker(broker.port, "pump-1"),
            first=FIRST,
            second=SECOND,
            sent=lambda: bytes(device.received),
            holds=device.holds,
            written=lambda: device.written,
            unit_bytes=1024,
            unplug=device.unplug,
            plug=device.plug,
            neighbour=_on_broker(broker.port, "pump-2"),
        )
        try:
            async with asyncio.timeout(60):
                await edged_conformance(subject)
        finally:
            for one in devices:
                await one.stop()

    with broker.running():
        asyncio.run(run())


@pytest.mark.parametrize("chunk", [4096, 16384, 65536, 0])
def test_the_vendors_client_goes_through_a_bridge_to_updated(tmp_path: Path, chunk: int) -> None:
    """A small mosquitto for the device, which bridges to the node's below a prefix; between the two, and to the device, TLS. (A
    listener's mount_point does not serve: Debian 12's mosquitto 2.0.11 does not take it off again, eclipse-mosquitto#2244.)
    """
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0")
    authority = Authority(tmp_path)
    certificate, key = authority.issue("broker")
    tls = f"allow_anonymous true\ncertfile {certificate}\nkeyfile {key}"
    broker = Mosquitto(tmp_path, tls)
    folder = tmp_path / "pump"
    folder.mkdir()
    bridge = Mosquitto(
        folder,
        tls,
        bridge=f"connection node\naddress 127.0.0.1:{broker.port}\nbridge_cafile {authority.ca}\n"
        'topic # both 1 "" devices/pump-1/\ntry_private true',
    )
    plant.device(address=f"mqtt:127.0.0.1:{broker.port}/devices/pump-1")
    plant.links.append(
        LinkSettings(address=f"mqtt:127.0.0.1:{broker.port}", config={"tls": True, "ca": str(authority.ca)})
    )

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node, AsyncExitStack() as stack:
            await listening(node)
            client = await stack.enter_async_context(
                vendor_device(
                    bridge.port, tls=True, ca=str(authority.ca), username="any", chunk=chunk, subscribe=True
                )
            )
            first = await deployed(node, "pump@1.0.0")
            assert first.state is State.SUCCEEDED, first.detail
            job = await deployed(node, "pump@2.0.0")
            assert job.state is State.SUCCEEDED, job.detail
            digest = hashlib.sha256(image_bytes("2.0.0")).hexdigest()
            assert await client.until(lambda line: line.startswith("received")) == (
                f"received 200000 {digest} 2.0.0"
            )
            assert await client.until(lambda line: line.startswith("updated")) == "updated pump 2.0.0"

    with broker.running(), bridge.running():
        asyncio.run(run())


def test_what_a_broker_retained_is_no_device(tmp_path: Path) -> None:
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", size=20_000)
    broker = Mosquitto(tmp_path)
    plant.device(address=f"mqtt:127.0.0.1:{broker.port}/devices/pump-1")
    device = PullingDevice(broker.port, prefix="devices/pump-1/", retains=True)

    async def run() -> None:
        device.start()
        await device.connected.wait()
        async with asyncio.timeout(20):
            while "current_fw_version" not in await asyncio.to_thread(_retained, broker):
                await asyncio.sleep(0.05)
        await device.stop()
        async with life(plant.config, plant.plugins) as node:
            await listening(node)
            await node.want("pump-1", "pump@1.0.0")
            async with asyncio.timeout(20):
                while not (jobs := await node.jobs("pump-1")) or jobs[0].waiting is None:
                    await asyncio.sleep(0.02)
            assert jobs[0].waiting.reason is Reason.DEVICE_ABSENT
            device.start()
            try:
                assert (await node.ended("pump-1")).state is State.SUCCEEDED, "a live message was not heard"
            finally:
                await device.stop()

    with broker.running():
        asyncio.run(run())


def _retained(broker: Mosquitto) -> str:
    """What the broker gives to whoever subscribes now."""
    asked = ["mosquitto_sub", "-p", str(broker.port), "-t", "devices/#", "-W", "1", "--retained-only"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout


def test_a_broker_that_restarts_in_the_middle_costs_one_download_more_at_most(tmp_path: Path) -> None:
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0")
    broker = Mosquitto(tmp_path)
    plant.device(address=f"mqtt:127.0.0.1:{broker.port}/devices/pump-1", silence_s=2)
    device = PullingDevice(broker.port, prefix="devices/pump-1/", delay_s=0.01)

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node:
            await listening(node)
            device.start()
            try:
                first = await deployed(node, "pump@1.0.0")
                assert first.state is State.SUCCEEDED, first.detail
                await node.want("pump-1", "pump@2.0.0")
                async with asyncio.timeout(20):
                    while device.written < 20 * 4096:
                        await asyncio.sleep(0.01)
                broker.stop()
                await asyncio.sleep(0.3)
                broker.start()
                job = await node.ended("pump-1", 60)
                assert (job.state, device.version) == (State.SUCCEEDED, "2.0.0"), job.detail
                assert device.log.count("connected") >= 2, "the broker did not go"
                assert bytes(device.flash) == image_bytes("2.0.0")
                assert device.written <= 2 * 200_000
            finally:
                await device.stop()

    with broker.running():
        asyncio.run(run())
