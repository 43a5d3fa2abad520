"""``kill -9`` of the real daemon at random moments of real updates of a real boot loader.

One release after the other, until at least 25 kills have hit a job. After each kill: the acknowledged job is there, no second
one is active, the database is sound. At the end: each release came to its end, the device holds the last image byte for byte,
the audit trail is intact, and no more pages were written than the images have and the kills can have cost.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from daemon_kit import Node
from intelhex import IntelHex

from edged.testing.avr import SimulatedAvr, build_app
from edged.testing.demo import DEVICE, Bench, configure, publish, simulated_board

KILLS = 25
KILLS_PER_RELEASE = 4
VERSIONS = tuple(f"{number}.0.0" for number in range(1, 16))
FILLER_BYTES = 3000
FLASH_BYTES = 6144
PAGE_BYTES = 128
PAGES_PER_KILL = 2
"""The page that was being written, and one whose write was under way in the boot loader."""


class Campaign:
    """One release after the other, killed as often as the dice say."""

    def __init__(self, node: Node, dice: random.Random) -> None:
        self.node = node
        self.dice = dice
        self.kills = 0
        self.hit: Counter[str] = Counter()
        self.versions: list[str] = []
        self.acknowledged: set[str] = set()

    def run(self) -> None:
        """Update by update, as many as the kills need; each is let through in the end."""
        for version in VERSIONS:
            self.versions.append(version)
            for _ in range(KILLS_PER_RELEASE):
                if not self._one_life(version, self.dice.uniform(0.02, 2.0)):
                    break
            else:
                assert not self._one_life(version, 60), f"{version} did not end within a minute"
            if self.kills >= KILLS:
                return

    def _one_life(self, version: str, seconds: float) -> bool:
        """Deploy where nobody did, then kill after ``seconds``; False where the job ended before."""
        with self.node.life():
            job = self._job(version)
            ended = self._ended_within(job, seconds)
        self.check()
        if not ended:
            self.kills += 1
            ((state,),) = self.node.rows(f"SELECT state FROM job WHERE id = '{job}'")
            self.hit[str(state)] += 1
        return not ended

    def _job(self, version: str) -> str:
        found = [job for job in self.node.client.get("jobs")["jobs"] if job["release"] == f"blink@{version}"]
        if found:
            return str(found[0]["id"])
        answer = self.node.client.post(
            "deployments", body={"release": f"blink@{version}", "devices": [DEVICE]}
        )
        job = str(answer["devices"][0]["job"])
        self.acknowledged.add(job)
        return job

    def _ended_within(self, job: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.node.client.get("jobs", job)["state"]
            if state in ("succeeded", "failed", "reverted", "cancelled"):
                assert state == "succeeded", f"{job} ended {state}"
                return True
            time.sleep(0.02)
        return False

    def check(self) -> None:
        """What must hold whenever the daemon is dead."""
        node = self.node
        assert node.rows("PRAGMA integrity_check") == [("ok",)]
        stored = {row[0] for row in node.rows("SELECT id FROM job")}
        assert self.acknowledged <= stored, "an acknowledged job was lost"
        active = (
            "SELECT count(*) FROM job WHERE state NOT IN ('succeeded', 'failed', 'cancelled', 'reverted')"
        )
        assert node.rows(active)[0][0] in (0, 1), "two jobs were active at once"


def _bench(board: Bench) -> Bench:
    images = {version: build_app(version=version, filler_bytes=FILLER_BYTES) for version in VERSIONS}
    return replace(board, images=images, flash_bytes=FLASH_BYTES)


def _pages(image: Path) -> int:
    return len({address // PAGE_BYTES for address in IntelHex(str(image)).addresses()})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [2026])
def test_killed_at_random_and_always_right(tmp_path: Path, seed: int) -> None:
    with simulated_board(tmp_path) as board:
        bench = _bench(board)
        node = Node(tmp_path, configure(bench, publish(bench, tmp_path), tmp_path))
        campaign = Campaign(node, random.Random(seed))
        campaign.run()
        device = SimulatedAvr(tmp_path / "board")
        flash, stats = device.flash(), device.stats()
    versions = campaign.versions
    assert campaign.kills >= KILLS, f"only {campaign.kills} kills hit a job"
    assert len(campaign.hit) >= 2 and campaign.hit["staging"], f"the kills hit only {campaign.hit}"
    assert len(campaign.acknowledged) == len(versions)
    jobs = node.rows("SELECT release, state FROM job ORDER BY seq")
    assert jobs == [(f"blink@{version}", "succeeded") for version in versions]
    last = IntelHex(str(bench.images[versions[-1]]))
    wrong = [address for address in last.addresses() if flash[address] != last[address]]
    assert not wrong, f"{len(wrong)} bytes differ from the last image"
    bound = sum(_pages(bench.images[version]) for version in versions) + campaign.kills * PAGES_PER_KILL
    assert stats.pages_written <= bound
    done = node.edged("audit", "verify", "--offline")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Intact"), done.stdout
    print(
        f"{campaign.kills} kills in {len(versions)} updates, {dict(campaign.hit)}; "
        f"{stats.pages_written} pages written (bound {bound}); {done.stdout.strip()}"
    )
