"""The power is cut at every lasting effect of an update of a device that pulls: before, after and torn; that of both, of node
and device, and that of the device alone.

Every life starts from fresh objects on the same disk and the same flash. What must hold afterwards: the device runs a whole
image and the right one, there is one job and it ended as it should, and it cost no more than one image for each life.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from pathlib import Path
from typing import Any

import attrs
import pytest
from engine_kit import at_once, cut_at_each, moments, through_cuts, until_cut
from mqtt_kit import PullingDevice
from mqtt_node import Plant, image_bytes

from edged import reports
from edged.config import HealthSettings
from edged.domain.job import Job, State
from edged.domain.reconcile import FIRMWARE, firmware_value
from edged.store import audit, twins
from edged.testing.faults import Faults, When
from edged.testing.node import TestNode, life

SIZE = 20_000
HEALTH = HealthSettings(kind="property", query="build", pattern="build={identifies_as}", timeout_s=20)
SOON_ILL = attrs.evolve(HEALTH, timeout_s=0.2)
"""Where the check has to fail. One that passes has its time, or the first moment without it would be a way back."""
TORN = ("device.erase", "device.chunk")
TRIES = 5
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


class Pump(PullingDevice):
    """Its self test tells which application it runs, and whether that one is good."""

    def report(self, **values: Any) -> None:
        build = "broken" if self.version == "3.0.0" else self.version
        super().report(**values, **({"build": build} if values == self.values else {}))


class World:
    """One device and one node's folder, over as many lives as it takes. ``device_faults``: where the device alone loses its
    power once."""

    def __init__(self, folder: Path, begin: Path, name: str, device_faults: Faults | None = None) -> None:
        self.version, self.state, self.runs = SCENARIOS[name]
        shutil.copytree(begin, folder)
        self.plant = Plant(folder, health=SOON_ILL if self.state is State.REVERTED else HEALTH)
        self.plant.device(silence_s=20.0)
        self.runs_now, self.flash, self.written = "1.0.0", bytearray(), 0
        self.cuts = self.fallen = 0
        self.device_faults = device_faults

    def live(self, faults: Faults) -> Job | None:
        """One life; the ended job, or None where the power was cut."""
        job = until_cut(self._live(faults), faults)
        self.cuts += faults.dead
        return job

    async def _live(self, faults: Faults) -> Job:
        alone = None if self.device_faults is None or self.device_faults.dead else self.device_faults
        device = Pump(
            self.plant.port,
            "token-of-pump-1",
            version=self.runs_now,
            chunk_bytes=4096,
            flash=self.flash,
            effects=alone or faults,
            revives=alone is not None,
            every_s=0.05,
        )
        device.start()
        try:
            async with life(self.plant.config, self.plant.plugins, faults=faults) as node:
                await self._wish(node)
                return await node.ended("pump-1", 60)
        finally:
            await device.stop()
            self.runs_now = device.version
            self.written += device.written
            self.fallen += device.falls

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


def effects_of(world: World) -> list[str]:
    """Those of an update that is not cut."""
    counting = Faults()
    job = world.live(counting)
    assert job is not None
    world.check(job)
    return counting.names


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "step"), [("good", 1), ("bad", 2)])
def test_one_cut_at_every_effect(
    tmp_path: Path, begin: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    """``step``: on the way back every other one, since each costs two images and a health check that fails."""
    # what the device reports is committed when a timer says so, anywhere among the job's commits: not in these lives
    monkeypatch.setattr(reports, "FLUSH_S", 3600.0)
    names = effects_of(World(tmp_path / "counting", begin, name))
    assert names.count("store.commit") >= 8
    assert {"device.erase", "device.chunk", "device.boot"} <= set(names)
    planned, hit = cut_at_each(names, TORN, lambda folder: World(tmp_path / folder, begin, name), TRIES, step)
    assert hit == planned, f"{hit} of {planned} cuts fell where they were to"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_device_alone_loses_its_power_at_each_of_its_effects(
    tmp_path: Path, begin: Path, name: str
) -> None:
    names = [
        one for one in effects_of(World(tmp_path / "counting", begin, name)) if one.startswith("device.")
    ]
    images = 2 if name == "bad" else 1
    assert names == ["device.erase", *["device.chunk"] * -(-SIZE // 4096), "device.boot"] * images

    def lives_on(moment: tuple[int, str, When]) -> None:
        number, effect, when = moment
        cut = Faults(number, when)
        world = World(tmp_path / f"{number}-{when}", begin, name, cut)
        job = world.live(Faults())
        assert job is not None and (cut.fired, world.fallen) == (effect, 1)
        world.check(job)

    at_once(lives_on, list(moments(names, TORN)))


@pytest.mark.parametrize("seed", range(4))
def test_several_cuts_in_a_row_and_a_device_that_falls(tmp_path: Path, begin: Path, seed: int) -> None:
    dice = random.Random(seed)
    falls = Faults(dice.randint(1, 6), dice.choice(list(When)))
    world = World(tmp_path / "plant", begin, dice.choice(sorted(SCENARIOS)), falls)
    cuts = [Faults(dice.randint(4, 16), dice.choice(list(When))) for _ in range(dice.randint(2, 4))]
    through_cuts(world, cuts)
    assert world.cuts >= 1
    assert falls.fired.startswith("device."), "the device did not lose its power"
