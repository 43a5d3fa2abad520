"""The real daemon, the real command line, and real firmware by others: an operator's update, and kill -9 in its middle."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zephyr_kit
from daemon_kit import Node
from engine_kit import Publisher
from smp_kit import identifies_as
from zephyr_kit import BOARD, Zephyr, signed

pytestmark = pytest.mark.skipif(zephyr_kit.QEMU is None, reason="not installed: qemu-system-arm")


@pytest.fixture
def zephyr(tmp_path: Path) -> Iterator[Zephyr]:
    folder = tmp_path / "zephyr"
    folder.mkdir()
    with Zephyr(folder) as device:
        yield device


@pytest.fixture
def node(tmp_path: Path, zephyr: Zephyr) -> Node:
    publisher = Publisher(tmp_path / "publisher")
    publisher.base.mkdir()
    publisher.init().add("1.0.0", signed("1.0.0"), name="fw", models=("board",), protocol="smp")
    publisher.publish()
    config = tmp_path / "edged.toml"
    config.write_text(f"""
[node]
id = "node-1"
state_dir = "{tmp_path}/state"
[api]
socket = "{tmp_path}/edged.sock"
[metrics]
listen = ""
[trust]
repository = "{publisher.repo}"
root = "{publisher.root}"
[engine]
first_backoff_s = 0.1
[[model]]
id = "board"
hardware_ids = ["{BOARD}"]
[model.health]
kind = "property"
query = "image.hash"
pattern = "^{{identifies_as}}$"
[[device]]
id = "board-1"
model = "board"
mapper = "uart-smp"
address = "serial:{zephyr.port}"
[device.config]
boot_s = 20
boot_loader = "reverts"
""")
    return Node(tmp_path, config)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.005)


def test_probe_deploy_and_what_runs(node: Node, zephyr: Zephyr) -> None:
    image = signed("1.0.0")
    with node.life():
        probed = node.edged("mapper", "probe", "--device", "board-1", "--json")
        assert probed.returncode == 0, probed.stderr
        assert BOARD in probed.stdout and "1baa222074cc805f active confirmed" in probed.stdout
        deployed = node.edged("deploy", "fw@1.0.0", "--to", "board-1", "--wait")
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        (job,) = node.client.get("jobs")["jobs"]
        assert (job["state"], job["detail"]) == ("succeeded", identifies_as(image))
        twin = json.dumps(node.client.get("devices", "board-1"))
        assert identifies_as(image) in twin and "stat.smp_svr_stats.ticks" in twin
    assert zephyr.slot(0, len(image)) == image and zephyr.boots == 2


def test_killed_in_the_middle_of_the_upload(node: Node, zephyr: Zephyr) -> None:
    image = signed("1.0.0")
    with node.life() as process:
        node.client.post("deployments", body={"release": "fw@1.0.0", "devices": ["board-1"]})
        until(lambda: len(zephyr.tap) > 40_000)
        process.send_signal(signal.SIGKILL)
    assert node.rows("SELECT state FROM job") == [("staging",)]
    with node.life():
        until(lambda: node.client.get("jobs")["jobs"][0]["state"] in ("succeeded", "failed", "reverted"))
        assert node.client.get("jobs")["jobs"][0]["state"] == "succeeded"
    assert zephyr.slot(0, len(image)) == image and zephyr.boots == 2
    # the device kept its offset: what was on its way went twice, and no more
    assert len(zephyr.tap) < len(image) * 127 / 93 * 1.1 + 4 * 800 + 6000
