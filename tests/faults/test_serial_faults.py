"""A real update of a real boot loader, disturbed in the middle: by an operator, by the plug, by the board's power."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from daemon_kit import Node
from intelhex import IntelHex

from edged.testing.avr import SimulatedAvr, build_app
from edged.testing.demo import DEVICE, Bench, configure, publish

FLASH_BYTES = 12 * 1024
WISH = "blink@1.0.0"
HALF_PAGES = 30


@dataclass
class Scene:
    """A node, its board, and the update that is under way."""

    node: Node
    board: SimulatedAvr
    image: Path

    def deploy(self) -> str:
        answer = self.node.client.post("deployments", body={"release": WISH, "devices": [DEVICE]})
        return str(answer["devices"][0]["job"])

    def until_half_written(self) -> None:
        self.until(lambda: self.board.stats().pages_written >= HALF_PAGES)

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline, "it did not happen within a minute"
            time.sleep(0.01)

    def state(self, job: str) -> str:
        return str(self.node.client.get("jobs", job)["state"])

    def check_end(self, job: str, disturbances: int) -> None:
        self.until(lambda: self.state(job) in ("succeeded", "failed", "reverted", "cancelled"))
        assert self.state(job) == "succeeded", self.node.client.get("jobs", job)
        image, flash = IntelHex(str(self.image)), self.board.flash()
        assert all(flash[address] == image[address] for address in image.addresses())
        pages = len({address // 128 for address in image.addresses()})
        assert self.board.stats().pages_written <= pages + 2 * disturbances

    def reasons(self, job: str) -> set[object]:
        return {row[0] for row in self.node.rows(f"SELECT reason FROM job_history WHERE job = '{job}'")}


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    image = build_app(version="1.0.0", filler_bytes=9_000)
    board = SimulatedAvr(tmp_path / "board")
    board.port.parent.mkdir()
    with board:
        bench = _bench(board, image)
        yield Scene(Node(tmp_path, configure(bench, publish(bench, tmp_path), tmp_path)), board, image)


def _bench(board: SimulatedAvr, image: Path) -> Bench:
    return Bench(
        title="",
        mapper="uart-stk500",
        protocol="stk500v1",
        address=f"serial:{board.port}",
        hardware_id=f"avr:{board.board.signature.hex()}",
        flash_bytes=FLASH_BYTES,
        health='kind = "line"\npattern = "edged-app .* {identifies_as} ready"\ntimeout_s = 5',
        daemon=(),
        images={"1.0.0": image},
    )


def _stopped(process: subprocess.Popen[bytes]) -> float:
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    return time.monotonic() - begun


def test_stopped_in_the_middle_and_started_again(scene: Scene) -> None:
    with scene.node.life() as process:
        job = scene.deploy()
        scene.until_half_written()
        assert _stopped(process) < 10
    assert scene.node.rows("SELECT state FROM job") == [("staging",)]
    with scene.node.life():
        scene.check_end(job, disturbances=1)


def test_unplugged_in_the_middle(scene: Scene) -> None:
    with scene.node.life():
        job = scene.deploy()
        scene.until_half_written()
        scene.board.unplug()
        scene.until(lambda: bool(scene.reasons(job) & {"link_lost", "device_absent"}))
        scene.board.plug()
        scene.check_end(job, disturbances=1)


def test_the_board_loses_its_power_in_the_middle(scene: Scene) -> None:
    with scene.node.life():
        job = scene.deploy()
        scene.until_half_written()
        scene.board.power_cut()
        scene.until(lambda: bool(scene.reasons(job) & {"link_lost", "device_absent", "no_response"}))
        scene.board.restart()
        scene.check_end(job, disturbances=1)
