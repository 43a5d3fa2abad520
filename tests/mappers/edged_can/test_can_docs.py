"""The configuration of docs/can.md as it stands there: accepted, flashed through the engine, polled, wished for."""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from can_kit import bus_name, on_bus
from can_node import IMAGES, write_hex
from click.testing import CliRunner
from uds_server import SECRET, Controller

from edged.cli import main
from edged.config import Config, load
from edged.domain.job import Job, State
from edged.domain.twin import Value
from edged.plugins import discover
from edged.store import twins
from edged.testing.node import TestNode, life

PAGE = (Path(__file__).parents[3] / "docs" / "can.md").read_text(encoding="utf-8")
ADDRESS = 'address = "can:can0"'


def edged(*words: str) -> str:
    answer = CliRunner().invoke(main, [*words])
    assert answer.exit_code == 0, answer.output
    return answer.output


def write_page(folder: Path, bus: str) -> Path:
    """The page's files below ``folder``, with ``bus`` for its address; the main one, which every node has."""
    blocks = re.findall(r"^```toml\n# /etc/edged/(\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in blocks] == ["models.d/drive.toml", "devices.d/drive-1.toml"]
    assert sum(text.count(ADDRESS) for _, text in blocks) == 1
    for name, text in blocks:
        (folder / name).parent.mkdir()
        (folder / name).write_text(text.replace(ADDRESS, f'address = "can:virtual@{bus}"'))
    main_file = folder / "edged.toml"
    main_file.write_text(
        f'[node]\nid = "node-1"\nstate_dir = "{folder}/state"\n'
        f'[trust]\nrepository = "{folder}/firmware"\nroot = "{folder}/firmware/metadata/1.root.json"\n'
        "[storage]\nreport_interval_s = 0.2\n"
    )
    return main_file


def publish(version: str) -> None:
    """A release by the page's own lines, with another image, and of ``version``."""
    (add,) = re.findall(r"^edged (release add .*)$", PAGE, re.MULTILINE)
    assert add.count(" drive.hex ") == add.count(" 1.2.0 ") == 1
    write_hex(Path("drive.hex"), IMAGES[version])
    edged(*shlex.split(add.replace(" 1.2.0 ", f" {version} ")))
    edged("release", "publish", "firmware")


async def told(node: TestNode, name: str, holds: Callable[[Value], bool]) -> Value:
    """A reported property of the device, as soon as it ``holds``."""
    async with asyncio.timeout(10):
        while True:
            twin = await node.store.read(lambda tx: twins.get(tx, "drive-1"))
            if name in twin.reported and holds(twin.reported[name]):
                return twin.reported[name]
            await asyncio.sleep(0.02)


async def used(config: Config, controller: Controller) -> tuple[Job, Value, Value, Value]:
    """An update and a wish: how the job ended; the pressure before and after it, and what was wished for."""
    async with life(config, discover()) as node:
        before = await told(node, "pressure", lambda value: True)
        controller.properties[0x0101] = (1234).to_bytes(2, "big")
        for version in ("1.0.0", "2.0.0"):
            await node.want("drive-1", f"drive@{version}")
            job = await node.ended("drive-1")
            assert job.state is State.SUCCEEDED, job.detail
        after = await told(node, "pressure", lambda value: value != before)
        await node.store.write(lambda tx: twins.set_desired(tx, "drive-1", "enabled", False, "operator"))
        node.sessions["drive-1"].refresh()
        return job, before, after, await told(node, "enabled", lambda value: value.value is False)


def test_the_example_is_accepted_and_flashed_and_tells_its_pressure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edged_firmware.durable.os.fsync", lambda _: None)
    # the folder of credentials is the tests' own; the name and the secret are the page's
    (typed,) = re.findall(r"/etc/edged/credentials/drive +# then type: (\S+)", PAGE)
    assert typed.lower() == f"hex:{SECRET.hex()}"
    (tmp_path / "edged_drive").write_text(typed)
    bus, controller = bus_name(), Controller()
    controller.install(IMAGES["1.0.0"])
    controller.properties[0x0101] = (57).to_bytes(2, "big")
    config = write_page(tmp_path, bus)
    assert edged("--config", str(config), "check-config").endswith("1 model, 1 device, no fault.\n")
    edged("release", "init", "firmware")
    for version in ("1.0.0", "2.0.0"):
        publish(version)
    with on_bus(bus, controller):
        job, before, after, enabled = asyncio.run(used(load(config), controller))
    assert (before.value, before.unit) == (5.7, "bar") and (after.value, after.unit) == (123.4, "bar")
    assert job.detail == "2.0.0" and controller.runs == b"2.0.0"
    assert enabled.value is False and controller.properties[0x0102] == b"\0"
    assert controller.counts.written == sum(len(data) for _, data in IMAGES["2.0.0"])
