"""Discovery: each plugin by itself, and why one was left out."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from edged import plugins
from edged.api import API_VERSION, LinkSpec, MapperSpec, hookimpl
from edged.config import Config, DeviceSettings, Model
from edged.devices import LeftOut, resolve
from edged.errors import Permanent, Reason
from edged.testing.fake import FakePlugin

SPEC = next(iter(FakePlugin().edged_mappers()))


class Offers:
    """A plugin that offers ``mappers``, or raises it."""

    def __init__(self, mappers: Any) -> None:
        self._mappers = mappers

    @hookimpl
    def edged_mappers(self) -> Iterable[MapperSpec]:
        if isinstance(self._mappers, BaseException):
            raise self._mappers
        return self._mappers  # type: ignore[no-any-return]


class Misspelt:
    @hookimpl
    def edged_maper(self) -> Iterable[MapperSpec]:
        return [SPEC]


class Async:
    @hookimpl
    def edged_links(self) -> Iterable[LinkSpec]:
        return 7  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())


@pytest.mark.parametrize(
    ("plugin", "problem"),
    [
        (Offers(ValueError("no hardware")), f"ValueError('no hardware') in {__file__}, line "),
        (Offers(SystemExit("needs python-can")), "needs python-can"),
        (Offers([replace(SPEC, api_version=API_VERSION + 1)]), "is made for plugin API"),
        (Offers([replace(SPEC, name="fake")]), "offered already: fake"),
        (Offers([replace(SPEC, name="two"), replace(SPEC, name="two")]), "offered already: two"),
        (Offers([replace(SPEC, name=None)]), "no text"),  # type: ignore[arg-type]
        (Offers(["fake"]), "expected MapperSpec"),
        (Offers([]), "no mapper and no link"),
        (Misspelt(), "unknown hook edged_maper"),
        (Async(), "not iterable"),
        (object(), "no mapper and no link"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_left_out_with_its_reason(plugin: object, problem: str) -> None:
    found = plugins.discover([("good", FakePlugin()), ("bad", plugin)])
    assert list(found.mappers) == ["fake"]
    assert [state.problem == "" for state in found.states] == [True, False]
    assert problem in found.states[1].problem


@pytest.mark.parametrize("source", ["1 / 0", "raise SystemExit(3)", "import nothing_of_that_name"])
def test_a_plugin_whose_import_fails_stops_nobody(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    name = f"broken_plugin_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "entry_points", lambda group: (EntryPoint("broken", name, group),))
    found = plugins.discover([("good", FakePlugin())])
    assert list(found.mappers) == ["fake"]
    problem = found.states[0].problem
    assert problem.startswith("import failed: ") and problem.endswith(f" in {tmp_path}/{name}.py, line 1")


def test_a_device_without_its_mapper_is_told_which_plugin_is_not_in_use() -> None:
    found = plugins.discover([("px9", Offers(ValueError("boom"))), ("good", FakePlugin())])
    device = DeviceSettings(id="a", model="m", mapper="px9", address="px:1")
    left_out = resolve(Config(model=(Model(id="m"),), device=(device,)), found)["a"]
    assert isinstance(left_out, LeftOut)
    mapper, address = left_out.detail.split("; address: ")
    assert mapper.startswith(
        "mapper: found 'px9'; allowed: fake; not in use is plugin px9 (extra): ValueError('boom') in "
    )
    assert "begins with one of: fake:; not in use is plugin px9 (extra): ValueError('boom')" in address


def test_nobody_takes_the_place_of_a_built_in_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name and wherever it is installed: here before ours in both orders."""
    (tmp_path / "aaa.py").write_text(
        "from dataclasses import replace\n"
        "from edged.api import hookimpl\n"
        "from edged.testing.fake import FakePlugin\n"
        "@hookimpl\n"
        "def edged_mappers():\n"
        "    return [replace(next(iter(FakePlugin().edged_mappers())), name='uart-smp')]\n"
    )
    info = tmp_path / "aaa-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aaa\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edged.plugins]\naaa = aaa\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "entry_points", importlib.metadata.entry_points)
    found = plugins.discover()
    states = {state.name: state for state in found.states}
    assert states["aaa"].problem == "offers what is offered already: uart-smp"
    assert states["aaa"].distribution == "aaa 1.0"
    assert not states["uart"].problem
    assert {"serial", "socket"} <= found.links.keys()
    assert found.mappers["uart-smp"].schemes == {"serial", "socket"}


def test_what_nobody_offers_is_unsupported_with_what_there_is() -> None:
    found = plugins.discover([("good", FakePlugin())])
    for lookup, name in ((found.mapper, "uart"), (found.link, "can")):
        with pytest.raises(Permanent, match="fake") as caught:
            lookup(name)
        assert caught.value.reason is Reason.UNSUPPORTED


def test_a_node_without_devices_has_no_library_of_a_protocol_in_memory() -> None:
    """They are loaded when a device first needs them; a fresh interpreter tells."""
    code = "import sys, edged.app, edged.plugins as p; print(sorted(p.discover().mappers), *sys.modules, sep='\\n')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mappers, *modules = ran.stdout.splitlines()
    assert "uart-smp" in mappers and "can-uds" in mappers and "mqtt-thingsboard" in mappers
    heavy = {"aiomqtt", "can", "cantools", "cbor2", "intelhex", "isotp", "paho", "udsoncan"}
    assert not heavy & {module.partition(".")[0] for module in modules}
