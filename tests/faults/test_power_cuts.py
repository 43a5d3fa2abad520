"""The power is cut at every lasting effect of an update: before, after and torn; once, and several times in a row.

Every life starts from fresh objects on the same disk and the same device. What must hold afterwards: the device runs a whole
image and the right one, there is one job and it ended as it should, the audit trail is intact, and it cost no more than one
checkpoint of bytes and one trial boot for each cut.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from engine_kit import IMAGE_BYTES, Place, Publisher, check_store, cut_at_each, through_cuts, until_cut

from edged.domain.job import Job, State
from edged.domain.reconcile import FIRMWARE
from edged.store import twins
from edged.testing.fake import FakeDevice
from edged.testing.faults import Faults, When
from edged.testing.node import TestNode, life

CHECKPOINT_BYTES = 512
PAGE_BYTES = 256
TRIES = 12
"""Checkpoints are due by the clock: now and then there is one more, or one less, and a cut falls elsewhere."""
COUNTED = 7
READ_OUT_BYTES = 4096


@dataclass(frozen=True)
class Scenario:
    """What is wished for, and how it must end."""

    wish: str
    slots: int
    tells: bool
    state: State
    runs: str
    floor: int

    @property
    def bytes_without_cuts(self) -> int:
        """What goes over the wire when nothing goes wrong: the image, and on one slot what was read out on the way back."""
        back = self.state is State.REVERTED and self.slots == 1
        return IMAGE_BYTES + (READ_OUT_BYTES if back else 0)


SCENARIOS = {
    "one slot, good": Scenario("app@2.0.0", 1, True, State.SUCCEEDED, "2.0.0", 2),
    "one slot, silent, good": Scenario("app@2.0.0", 1, False, State.SUCCEEDED, "2.0.0", 2),
    "one slot, bad": Scenario("app@3.0.0", 1, True, State.REVERTED, "1.0.0", 0),
    "two slots, good": Scenario("app@2.0.0", 2, True, State.SUCCEEDED, "2.0.0", 2),
    "two slots, bad": Scenario("app@3.0.0", 2, True, State.REVERTED, "1.0.0", 0),
}


class World:
    """One device and one node's folder, over as many lives as it takes.

    ``watch``: the device's reports are committed too, whenever a timer says so; without them the effects of an update
    are always the same ones.
    """

    def __init__(
        self, folder: Path, publisher: Publisher, scenario: Scenario, *, watch: bool = False
    ) -> None:
        self.scenario = scenario
        self.place = Place(folder, publisher)
        self.device: FakeDevice = self.place.device(
            slot_count=scenario.slots, tells=scenario.tells, page_bytes=PAGE_BYTES, watch=watch
        )
        self.cuts = 0

    def live(self, faults: Faults) -> Job | None:
        """One life; the ended job, or None where the power was cut."""
        self.device.effects = faults
        job = until_cut(self._live(faults), faults)
        self.cuts += bool(faults.fired)
        return job

    async def _live(self, faults: Faults) -> Job:
        async with life(self.place.config, self.place.plugins, faults=faults) as node:
            await self._wish(node)
            return await node.ended("dev-1")

    async def _wish(self, node: TestNode) -> None:
        """As an operator: repeat the wish as long as it was not acknowledged."""
        twin = await node.store.read(lambda tx: twins.get(tx, "dev-1"))
        if FIRMWARE not in twin.desired:
            await node.want("dev-1", self.scenario.wish)

    def check(self, job: Job) -> None:
        scenario, device = self.scenario, self.device
        assert job.state is scenario.state, f"{job.state}: {job.reason} {job.detail}"
        assert device.app is not None and device.app.version == scenario.runs
        assert device.confirmed and not device.pending
        again = self.cuts * (CHECKPOINT_BYTES + PAGE_BYTES)
        assert device.counts.received <= scenario.bytes_without_cuts + again
        assert device.counts.trial_boots <= 1 + self.cuts
        asyncio.run(self._check_store())

    async def _check_store(self) -> None:
        async with life(self.place.config, self.place.plugins) as node:
            await check_store(node, "dev-1", self.scenario.floor)


def effects_of(folder: Path, publisher: Publisher, scenario: Scenario) -> list[str]:
    """The lasting effects of an update that nobody interrupts, in order, as they are most often."""
    found = Counter(_effects(folder / str(number), publisher, scenario) for number in range(COUNTED))
    ((names, _),) = found.most_common(1)
    return list(names)


def _effects(folder: Path, publisher: Publisher, scenario: Scenario) -> tuple[str, ...]:
    counting = Faults()
    world = World(folder, publisher, scenario)
    job = world.live(counting)
    assert job is not None
    world.check(job)
    return tuple(counting.names)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_one_cut_at_every_effect(tmp_path: Path, publisher: Publisher, name: str) -> None:
    scenario = SCENARIOS[name]
    names = effects_of(tmp_path / "counting", publisher, scenario)
    assert {"store.commit", "artifact.adopt", "device.page", "device.boot"} <= set(names)
    planned, hit = cut_at_each(
        names, ("device.page",), lambda folder: World(tmp_path / folder, publisher, scenario), TRIES
    )
    assert hit == planned == 2 * len(names) + names.count("device.page")


@pytest.mark.parametrize("seed", range(40))
def test_several_cuts_in_a_row(tmp_path: Path, publisher: Publisher, seed: int) -> None:
    """Up to five cuts, early ones and late ones, also while it goes back."""
    dice = random.Random(seed)
    scenario = SCENARIOS[dice.choice(sorted(SCENARIOS))]
    world = World(tmp_path / "state", publisher, scenario, watch=True)
    through_cuts(
        world, (Faults(dice.randint(1, 30), dice.choice(list(When))) for _ in range(dice.randint(2, 5)))
    )
    assert world.cuts >= 1
