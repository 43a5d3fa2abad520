"""The examples work: the node's files load, the mapper is a plugin that passes the kit, what the README promises is so."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from engine_kit import Place, Publisher, write_quickly

import edged_uart
from edged.cli import main
from edged.cli.release import release
from edged.config import load
from edged.domain.job import State
from edged.errors import Reason
from edged.links import LinkPool, device_env
from edged.plugins import discover
from edged.testing.conformance import Check
from edged.testing.fake import FakeDevice, fake_app
from edged.testing.node import life
from edged_firmware.release import Draft
from edged_firmware.release import add as add_release

ROOT = Path(__file__).parent.parent
NODE = ROOT / "examples" / "node"
MAPPER = ROOT / "examples" / "mapper-template"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's package and tests can be imported, for as long as a test runs."""
    monkeypatch.syspath_prepend(MAPPER)
    monkeypatch.syspath_prepend(MAPPER / "tests")
    for name in ("edged_lamp", "simulated_lamp", "test_lamp"):
        monkeypatch.delitem(sys.modules, name, raising=False)


# -- the node


def test_the_nodes_files_load_and_their_mapper_understands_them() -> None:
    config = load(NODE / "edged.toml")
    assert set(config.models) == {"uno"} and set(config.devices) == {"pump-1"}
    result = CliRunner().invoke(main, ["--config", str(NODE / "edged.toml"), "check-config"])
    assert result.exit_code == 0, result.output


def test_the_readme_has_the_same_node(tmp_path: Path) -> None:
    """Its three blocks are the examples without comments and without what is the default anyway."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```toml\n# /etc/edged/(.*?)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        (tmp_path / block[0]).parent.mkdir(exist_ok=True)
        (tmp_path / block[0]).write_text(block[1])
    told, example = load(tmp_path / "edged.toml"), load(NODE / "edged.toml")
    assert told.model == example.model
    assert told.trust.repository == example.trust.repository
    (mine,), (its,) = told.device, example.device
    assert (mine.id, mine.model, mine.mapper, mine.address) == (its.id, its.model, its.mapper, its.address)


def test_the_health_check_of_the_example_sees_its_line() -> None:
    health = load(NODE / "edged.toml").models["uno"].health
    assert health is not None
    pattern = re.compile(health.check("1.2.0").pattern)
    assert pattern.search("ready 1.2.0") and not pattern.search("ready 1x2.0")


def test_the_unit_starts_a_command_that_there_is() -> None:
    unit = (ROOT / "systemd" / "edged.service").read_text(encoding="utf-8")
    assert re.search(r"^ExecStart=\S+/bin/edged run$", unit, re.MULTILINE)
    assert re.search(r"^Type=notify$", unit, re.MULTILINE) and re.search(
        r"^WatchdogSec=\d+$", unit, re.MULTILINE
    )


# -- the mapper


def test_the_mapper_passes_the_kit(example: None, edged_conformance: Check) -> None:
    from test_lamp import check_lamp  # type: ignore[import-not-found]

    asyncio.run(check_lamp(edged_conformance))


def test_the_mapper_is_found_as_its_package_says(
    example: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed into a folder of plugins, as ``pip install --target`` would."""
    project = tomllib.loads((MAPPER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shutil.copytree(
        MAPPER / "edged_lamp", tmp_path / "edged_lamp", ignore=shutil.ignore_patterns("__pycache__")
    )
    info = tmp_path / f"edged_lamp-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["edged.plugins"]
    (info / "entry_points.txt").write_text(
        "[edged.plugins]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
    )
    monkeypatch.setattr("edged.plugins.PLUGIN_FOLDERS", (tmp_path,))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.startswith(str(MAPPER))])
    found = discover()
    (state,) = [state for state in found.states if state.name == "lamp"]
    assert (state.distribution, state.problem) == ("edged-lamp 0.1.0", "")
    assert (state.mappers, state.schemes) == (("lamp",), ())


def test_the_mapper_installs_and_passes_its_own_tests(tmp_path: Path) -> None:
    """As its README says, but into a folder: what pip built is what its tests import."""
    plugins = tmp_path / "plugins"
    copy = shutil.copytree(MAPPER, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    build = (
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(plugins),
        str(copy),
    )
    subprocess.run([*pip, *build], check=True, timeout=120)
    shutil.rmtree(copy / "edged_lamp")
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(copy)],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(plugins)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "16 passed" in tested.stdout


def test_the_mapper_in_the_readme_is_the_example() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    source = (MAPPER / "edged_lamp" / "__init__.py").read_text(encoding="utf-8")
    assert f"```python\n{source}```" in text
    assert [file.name for file in (MAPPER / "edged_lamp").glob("*.py")] == ["__init__.py"]
    assert len([line for line in source.splitlines() if line.strip()]) < 50


def test_the_example_reaches_its_device_through_the_whole_daemon(
    example: None, publisher: Publisher, tmp_path: Path
) -> None:
    """A signed release over TCP into a lamp, by the engine; refused where its protocol is another."""
    import attrs
    import edged_lamp  # type: ignore[import-not-found]
    from simulated_lamp import simulated_lamp  # type: ignore[import-not-found]

    mine = publisher.copy(tmp_path / "publisher")
    # a lamp cannot be read: it is changed only where what it runs is published, to go back to
    for version in ("0.1.0", "4.0.0"):
        mine.add(version, fake_app(version), name="lamp", protocol="lamp")
    mine.publish()
    hardware = FakeDevice("lamp-1", page_bytes=edged_lamp.PAGE_BYTES)
    hardware.install(fake_app("0.1.0"))

    async def run() -> None:
        async with simulated_lamp(hardware) as lamp:
            place = Place(tmp_path / "state", mine, health=False)
            place.device("dev-1")
            (settings,) = place.config.device
            config = attrs.evolve(
                place.config, device=(attrs.evolve(settings, mapper="lamp", address=lamp.address),)
            )
            async with life(
                config, discover([("wires", edged_uart), ("lamp under test", edged_lamp)])
            ) as node:
                await node.want("dev-1", "lamp@4.0.0")
                job = await node.ended("dev-1")
                assert job.state is State.SUCCEEDED, job.detail
                assert job.fallback is not None and job.fallback.release == "lamp@0.1.0"
                assert hardware.app is not None and hardware.app.version == "4.0.0"
                await node.want("dev-1", "app@3.0.0")
                job = await node.ended("dev-1")
                assert (job.state, job.reason) == (State.FAILED, Reason.PROTOCOL_MISMATCH)

    asyncio.run(run())


def test_a_lamp_that_is_not_there_is_absent(example: None) -> None:
    import edged_lamp

    from edged.api import Device
    from edged.errors import Transient

    plugins = discover([("wires", edged_uart), ("lamp under test", edged_lamp)])

    async def run() -> None:
        env = device_env("lamp-1", LinkPool(plugins.links))
        device = Device("lamp-1", "lamp", "lamp", "socket:127.0.0.1:1")
        async with plugins.mapper("lamp").connect(device, env):
            pass

    with pytest.raises(Transient) as caught:
        asyncio.run(run())
    assert caught.value.reason is Reason.DEVICE_ABSENT


# -- what the README says of going back


def test_an_older_image_comes_back_under_a_new_version(publisher: Publisher, tmp_path: Path) -> None:
    """``counter_lower`` for the old release; the same bytes, signed again as the README says, go through."""
    mine = publisher.copy(tmp_path / "publisher")
    draft = Draft(
        "app", "1.0.0-again", ("widget",), protocol="fake", identifies_as="1.0.0", chunk_size_bytes=512
    )
    add_release(mine.repo, mine.base / "app-1.0.0.bin", draft, write=write_quickly)
    mine.publish()
    place = Place(tmp_path / "state", mine)
    hardware = place.device(app=None)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            for wish, reason in (
                ("app@2.0.0", None),
                ("app@1.0.0", Reason.COUNTER_LOWER),
                ("app@1.0.0-again", None),
            ):
                await node.want("dev-1", wish)
                job = await node.ended("dev-1")
                assert job.reason is reason, job.detail
        assert hardware.app is not None and hardware.app.version == "1.0.0"

    asyncio.run(run())


def test_the_publishers_commands_of_the_pages_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of docs/trust.md and the one of the README that goes back, line by line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edged_firmware.durable.os.fsync", lambda _: None)
    record = ":0400000001020304F2\n:00000001FF\n"
    for file in ("blink.hex", "blink-1.1.0.hex"):
        Path(file).write_text(record)
    publishing = _shell_lines("docs/trust.md", "## Publishing")
    back = _shell_lines("README.md", "## Undo")
    for line in [*publishing, *back]:
        result = CliRunner().invoke(main, line.split()[1:])
        assert result.exit_code == 0, f"{line}: {result.output}"
    listed = CliRunner().invoke(release, ["list", "firmware"]).output
    assert re.search(r"blink@1\.1\.0-again +counter 2 .* published", listed)


def _shell_lines(page: str, heading: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    block = re.search(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return [line.partition("#")[0].strip() for line in block[1].splitlines()]
