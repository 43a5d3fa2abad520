"""The node's power is cut at every lasting effect of an update of a device that pulls, and the device's in the middle of it.

Every life of the node starts from fresh objects on the same disk; the device lives on, and knows what it ran. What must hold
afterwards: it runs a whole image and the right one, there is one job and it ended as it should, and it cost no more than one
image for each life.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path

import pytest
from engine_kit import cut_and_end, through_cuts, until_cut
from mqtt_kit import PullingDevice
from mqtt_node import Plant, image_bytes

from edged.config import HealthSettings
from edged.domain.job import Job, State
from edged.domain.reconcile import FIRMWARE, firmware_value
from edged.store import audit, twins
from edged.testing.faults import Faults, When
from edged.testing.node import TestNode, life

SIZE = 20_000
HEALTH = HealthSettings(kind="property", query="build", pattern="build={identifies_as}", timeout_s=0.2)
SCENARIOS = {"good": ("2.0.0", State.SUCCEEDED, "2.0.0"), "bad": ("3.0.0", State.REVERTED, "1.0.0")}


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a node that knows what its device runs, as every world begins."""
    folder = tmp_path_factory.mktemp("begin") / "plant"
    plant = Plant(folder)
    plant.publish("1.0.0", "2.0.0", "3.0.0", size=SIZE)
    plant.device()

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node:
            device = PullingDevice(plant.port, "token-of-pump-1")
            device.start()
            await node.want("pump-1", "pump@1.0.0")
            job = await node.ended("pump-1")
            assert job.state is State.SUCCEEDED, job.detail
            await device.stop()

    asyncio.run(run())
    return folder


class World:
    """One device and one node's folder, over as many lives as it takes. ``falls``: after so many chunks of a life the device
    loses its power, too."""

    def __init__(self, folder: Path, begin: Path, name: str, falls: int = 0) -> None:
        self.version, self.state, self.runs = SCENARIOS[name]
        shutil.copytree(begin, folder)
        self.plant = Plant(folder, health=HEALTH)
        self.plant.device(silence_s=2.0)
        self.runs_now, self.flash, self.written = "1.0.0", b"", 0
        self.cuts = self.fallen = 0
        self.falls = falls

    def live(self, faults: Faults) -> Job | None:
        """One life; the ended job, or None where the power was cut."""
        job = until_cut(self._live(faults), faults)
        self.cuts += faults.dead
        return job

    async def _live(self, faults: Faults) -> Job:
        device = PullingDevice(self.plant.port, "token-of-pump-1", version=self.runs_now, chunk_bytes=4096)
        device.every_s = 0.05
        device.values = {"build": self._build()}

        def chunk(number: int) -> None:
            if self.falls and number == self.falls:
                self.falls = 0
                self.fallen += 1
                asyncio.get_running_loop().call_soon(
                    lambda: falling.append(asyncio.ensure_future(_fall(device)))
                )
            self.runs_now = device.version
            device.values["build"] = self._build()

        falling: list[asyncio.Future[None]] = []
        device.on_chunk = chunk
        installed = device._install

        def install() -> None:
            installed()
            self.runs_now, self.flash = device.version, bytes(device.flash)
            device.values["build"] = self._build()

        device._install = install  # type: ignore[method-assign]
        device.start()
        try:
            async with life(self.plant.config, self.plant.plugins, faults=faults) as node:
                await self._wish(node)
                return await node.ended("pump-1", 60)
        finally:
            self.written += device.written
            await device.stop()

    def _build(self) -> str:
        return "broken" if self.runs_now == "3.0.0" else self.runs_now

    async def _wish(self, node: TestNode) -> None:
        twin = await node.store.read(lambda tx: twins.get(tx, "pump-1"))
        wish = firmware_value(f"pump@{self.version}")
        if twin.desired[FIRMWARE].value != wish:
            await node.want("pump-1", f"pump@{self.version}")

    def check(self, job: Job) -> None:
        assert job.state is self.state, f"{job.state}: {job.reason} {job.detail}"
        assert self.runs_now == self.runs
        assert self.flash == image_bytes(self.runs, SIZE)
        images = 1 + (self.state is State.REVERTED) + self.cuts + self.fallen
        assert self.written <= images * SIZE, f"{self.written} bytes for {self.cuts} cuts"
        asyncio.run(self._check_store())

    async def _check_store(self) -> None:
        async with life(self.plant.config, self.plant.plugins) as node:
            assert len(await node.jobs("pump-1")) == 2, "a job was lost or made twice"
            report = await node.store.read(lambda tx: audit.verify(tx, node.key.public_key))
            assert report.intact, report.reason


async def _fall(device: PullingDevice) -> None:
    await device.unplug()
    await asyncio.sleep(0.05)
    await device.plug()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "step"), [("good", 1), ("bad", 2)])
def test_one_cut_at_every_effect(tmp_path: Path, begin: Path, name: str, step: int) -> None:
    """``step``: on the way back every other one, since each costs two images and a health check that fails."""
    counting = Faults()
    world = World(tmp_path / "counting", begin, name)
    job = world.live(counting)
    assert job is not None
    world.check(job)
    # what the device reports is committed when a timer says so: the job's own commits are those from the wish on
    assert counting.names.count("store.commit") >= 8
    fired = set()
    for number in range(1, len(counting.names) + 1, step):
        for when in (When.BEFORE, When.AFTER):
            cut = Faults(number, when)
            fired.add(cut_and_end(World(tmp_path / f"{number}-{when}", begin, name), cut))
    assert "store.commit" in fired


@pytest.mark.parametrize("seed", range(4))
def test_several_cuts_in_a_row_and_a_device_that_falls(tmp_path: Path, begin: Path, seed: int) -> None:
    dice = random.Random(seed)
    world = World(tmp_path / "plant", begin, dice.choice(sorted(SCENARIOS)), falls=dice.randint(1, 4))
    moments = [When.BEFORE, When.AFTER]
    through_cuts(
        world, (Faults(dice.randint(1, 12), dice.choice(moments)) for _ in range(dice.randint(2, 4)))
    )
    assert world.cuts >= 1
