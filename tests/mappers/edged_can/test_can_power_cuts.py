"""The power of node and controller is cut at every lasting effect of an update over CAN: before, after and torn.

Every life starts from fresh objects on the same disk and the same flash. What must hold afterwards: the controller runs a
whole image and the right one, there is one job for the wish and it ended as it should, and it cost no more than the image
once more, and one start, for each cut: with one slot that cannot be read nothing can be gone on from.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
from can_kit import bus_name, secret
from can_node import IMAGE_BYTES, IMAGES, PATIENT, SIZES, Site, alive, published, settle
from engine_kit import cut_at_each, through_cuts, until_cut
from uds_server import Controller

from edged.clock import SystemClock
from edged.domain.job import Job, State
from edged.domain.reconcile import FIRMWARE, firmware_value
from edged.store import audit, jobs, twins
from edged.store.database import Store
from edged.store.node_key import NodeKey
from edged.testing.faults import Faults, When
from edged.testing.node import TestNode, life

QUICK = {"answer_s": 5, "boot_s": 1.0}
"""A life that is cut ends at once, and nothing else is slow: that an answer does not come is not among the faults here."""
ONE_CHECKPOINT = attrs.evolve(PATIENT, checkpoint_bytes=SIZES[0])
"""Due when the first segment is written, and not again."""
FIRST_BLOCKS = -(-SIZES[0] // 256)
"""Of the first segment, by what the controller takes at once."""
SCENARIOS = {"good": ("2.0.0", State.SUCCEEDED, "2.0.0", 1), "bad": ("3.0.0", State.REVERTED, "1.0.0", 2)}


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A node that knows what its controller runs, as every world begins."""
    folder = tmp_path_factory.mktemp("begin")
    site = Site(folder / "state", published(folder / "releases"), table=QUICK)

    async def body() -> None:
        async with life(site.config, site.plugins) as node:
            await settle(node)

    with pytest.MonkeyPatch.context() as patch, alive(site, site.controller()):
        secret(patch, folder)
        asyncio.run(body())
    return site


TRIES = 3
"""On a starved machine one life of a hundred had an effect less or more before its cut; each cut has to fall where it is to."""
ENDING = {"good": 2, "bad": 1}
"""Commits from the last start of the controller to the end of the job."""


class Paced:
    """The controller's effects in a first life, each at its place among the node's: checkpoints are due by the clock, so the
    first block of the second segment waits for the one that is due by then. A later life is due none that was made before."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._commits = self._blocks = 0
        self.late = False

    def effect(self, name: str, apply: Callable[[], None], torn: Callable[[], None] | None = None) -> None:
        if name == "device.block" and self._blocks == FIRST_BLOCKS:
            self._wait()
        self._faults.effect(name, apply, torn)
        self._blocks = self._blocks + 1 if name == "device.block" else 0
        self._commits = self._now()

    def _wait(self) -> None:
        until = time.monotonic() + 4
        while self._now() == self._commits and not self._faults.dead:
            self.late = time.monotonic() > until
            if self.late:
                return
            time.sleep(0.002)

    def _now(self) -> int:
        return self._faults.names.count("store.commit")


class World:
    """One controller and one node's folder, over as many lives as it takes."""

    def __init__(self, folder: Path, begin: Site, name: str) -> None:
        self.version, self.state, self.runs, self.images = SCENARIOS[name]
        shutil.copytree(begin.folder, folder)
        self.site = Site(folder, begin.publisher, engine=ONE_CHECKPOINT, table=QUICK)
        self.controller = self.site.controller()
        self.cuts = self.lives = 0

    def live(self, faults: Faults) -> Job | None:
        """One life; the ended job, or None where the power was cut."""
        before = self.controller
        paced = Paced(faults)
        effects = faults if self.lives else paced
        self.lives += 1
        self.controller = Controller(flash=before.flash, counts=before.counts, effects=effects, boot_s=0)
        self.site.bus = bus_name()
        with alive(self.site, self.controller):
            job = until_cut(self._live(faults), faults)
        self.cuts += faults.dead
        assert not paced.late, "no checkpoint came when it was due"
        return job

    async def _live(self, faults: Faults) -> Job:
        async with life(self.site.config, self.site.plugins, faults=faults) as node:
            await self._wish(node)
            return await node.ended("ecu", 60)

    async def _wish(self, node: TestNode) -> None:
        twin = await node.store.read(lambda tx: twins.get(tx, "ecu"))
        wish = firmware_value(f"ecu@{self.version}")
        if twin.desired[FIRMWARE].value != wish:
            await node.want("ecu", f"ecu@{self.version}")

    def check(self, job: Job) -> None:
        assert job.state is self.state, f"{job.state}: {job.reason} {job.detail}"
        controller, counts = self.controller, self.controller.counts
        assert controller.version == self.runs.encode()
        assert all(controller.held(at, len(data)) == data for at, data in IMAGES[self.runs])
        assert counts.written <= (self.images + self.cuts) * IMAGE_BYTES
        assert counts.resets <= self.images + self.cuts
        assert counts.wrong_keys == 0
        asyncio.run(self._check_store())

    async def _check_store(self) -> None:
        folder = self.site.folder
        async with Store.open(folder / "edged.db", SystemClock()) as store:
            found = await store.read(lambda tx: jobs.find(tx, device="ecu"))
            assert len(found) == 2, "a job was lost or made twice"
            key = NodeKey.load_or_create(folder).public_key
            report = await store.read(lambda tx: audit.verify(tx, key))
            assert report.intact, report.reason


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SCENARIOS)
def test_one_cut_at_every_effect(tmp_path: Path, begin: Site, name: str) -> None:
    names = _effects(tmp_path / "counting", begin, name)
    assert {"store.commit", "device.erase", "device.block", "device.reset"} <= set(names)
    torn = ("device.erase", "device.block")
    planned, hit = cut_at_each(names, torn, lambda folder: World(tmp_path / folder, begin, name), TRIES)
    assert hit == planned == 2 * len(names) + sum(effect in torn for effect in names)


def _effects(folder: Path, begin: Site, name: str) -> list[str]:
    """Of a life without a cut, up to the commit that ends the job: what the node tidies up then, a cut may or may not meet."""
    counting = Faults()
    world = World(folder, begin, name)
    job = world.live(counting)
    assert job is not None
    world.check(job)
    last = max(at for at, effect in enumerate(counting.names) if effect == "device.reset")
    return counting.names[: last + 1 + ENDING[name]]


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_effect_has_its_place(tmp_path: Path, begin: Site, name: str) -> None:
    """What the sweep stands on; a checkpoint is among them, between the two segments."""
    names = _effects(tmp_path / "first", begin, name)
    assert set(names[-ENDING[name] :]) == {"store.commit"}
    assert names == _effects(tmp_path / "second", begin, name)
    second = [at for at, effect in enumerate(names) if effect == "device.block"][FIRST_BLOCKS]
    assert names[second - 2 : second] == ["device.block", "store.commit"]


@pytest.mark.parametrize("seed", range(6))
def test_several_cuts_in_a_row(tmp_path: Path, begin: Site, seed: int) -> None:
    dice = random.Random(seed)
    world = World(tmp_path / "state", begin, dice.choice(sorted(SCENARIOS)))
    through_cuts(
        world, (Faults(dice.randint(1, 24), dice.choice(list(When))) for _ in range(dice.randint(2, 4)))
    )
    assert world.cuts >= 1
