"""Discovery of plugins: each is loaded in a try of its own, and why one was left out is kept.

The one place where a broad ``except`` is right: a plugin is somebody else's code, and whatever it raises while it is
loaded must not stop the daemon.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pluggy

from edged.api import API_VERSION, PROJECT, HookSpecs, LinkSpec, MapperSpec
from edged.errors import Permanent, Reason

ENTRY_POINT_GROUP = "edged.plugins"
PLUGIN_FOLDERS = (Path("/usr/lib/edged-plugins"), Path("/opt/edged/plugins"))
"""Third-party plugins of the package; behind our own on the path, so that no module of theirs is taken for one of ours."""
_OURS = "edged"
"""The distribution of the built-in plugins."""


@dataclass(frozen=True, slots=True)
class PluginState:
    """One plugin as it was found: ``problem`` is empty where it is in use."""

    name: str
    distribution: str
    problem: str = ""
    mappers: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plugins:
    """What all plugins together offer, and what became of each."""

    mappers: Mapping[str, MapperSpec] = field(default_factory=dict)
    links: Mapping[str, LinkSpec] = field(default_factory=dict)
    states: tuple[PluginState, ...] = ()

    def mapper(self, name: str) -> MapperSpec:
        """Raises ``Permanent(UNSUPPORTED)``, naming what there is."""
        try:
            return self.mappers[name]
        except KeyError:
            known = ", ".join(sorted(self.mappers)) or "none"
            raise Permanent(Reason.UNSUPPORTED, f"no mapper {name!r}; mappers: {known}") from None

    def link(self, scheme: str) -> LinkSpec:
        """Raises ``Permanent(UNSUPPORTED)``, naming what there is."""
        try:
            return self.links[scheme]
        except KeyError:
            known = ", ".join(sorted(self.links)) or "none"
            raise Permanent(Reason.UNSUPPORTED, f"no link for {scheme!r}; links: {known}") from None


def discover(extra: Iterable[tuple[str, object]] = ()) -> Plugins:
    """Load every installed plugin, and ``extra`` ones (name, module or object) that tests and the demo bring along.

    The built-in ones come first: who offers what they offer is the one that is left out.
    """
    for folder in PLUGIN_FOLDERS:
        if folder.is_dir() and str(folder) not in sys.path:
            sys.path.append(str(folder))
    loader = _Loader()
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=_rank):
        loader.load(point)
    for name, plugin in extra:
        loader.register(name, "extra", plugin)
    return Plugins(loader.mappers, loader.links, tuple(loader.states))


class _Unusable(Exception):
    """A plugin that works and cannot be used; its text says why."""


def _told(error: BaseException) -> str:
    """What is wrong with a plugin; of its own errors what was raised, and where."""
    if isinstance(error, _Unusable):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    return f"{error!r} in {frames[-1].filename}, line {frames[-1].lineno}" if frames else repr(error)


def _rank(point: EntryPoint) -> tuple[bool, str]:
    return point.dist is None or point.dist.name != _OURS, point.name


class _Loader:
    """Collects specs plugin by plugin, so that one that raises silences nobody else."""

    def __init__(self) -> None:
        self.mappers: dict[str, MapperSpec] = {}
        self.links: dict[str, LinkSpec] = {}
        self.states: list[PluginState] = []

    def load(self, point: EntryPoint) -> None:
        distribution = f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"
        try:
            plugin = point.load()
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - the plugin boundary
            self.states.append(PluginState(point.name, distribution, f"import failed: {_told(exc)}"))
            return
        self.register(point.name, distribution, plugin)

    def register(self, name: str, distribution: str, plugin: object) -> None:
        try:
            mappers, links = _collect(name, plugin)
            self._check(mappers, links)
        except (Exception, SystemExit) as exc:  # noqa: BLE001 - the plugin boundary
            self.states.append(PluginState(name, distribution, _told(exc)))
            return
        self.mappers.update((spec.name, spec) for spec in mappers)
        self.links.update((spec.scheme, spec) for spec in links)
        self.states.append(
            PluginState(
                name,
                distribution,
                mappers=tuple(spec.name for spec in mappers),
                schemes=tuple(spec.scheme for spec in links),
            )
        )

    def _check(self, mappers: list[MapperSpec], links: list[LinkSpec]) -> None:
        for mapper in mappers:
            if mapper.api_version != API_VERSION:
                raise _Unusable(
                    f"mapper {mapper.name!r} is made for plugin API {mapper.api_version}, this is {API_VERSION}"
                )
        names, schemes = [spec.name for spec in mappers], [spec.scheme for spec in links]
        if not all(isinstance(name, str) for name in names + schemes):
            raise _Unusable(f"a name that is no text: {names + schemes}")
        taken = [name for name in names if name in self.mappers or names.count(name) > 1]
        taken += [scheme for scheme in schemes if scheme in self.links or schemes.count(scheme) > 1]
        if taken:
            raise _Unusable(f"offers what is offered already: {', '.join(taken)}")


def _collect(name: str, plugin: object) -> tuple[list[MapperSpec], list[LinkSpec]]:
    """Ask one plugin by itself, with its hooks checked: a misspelt hook name is an error, not silence."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(HookSpecs)
    manager.register(plugin, name)
    misspelt = [word for word in dir(plugin) if word.startswith("edged_") and _is_hook(plugin, word)]
    unknown = [word for word in misspelt if not hasattr(HookSpecs, word)]
    if unknown:
        raise _Unusable(f"unknown hook {', '.join(unknown)}")
    mappers = _flat(manager.hook.edged_mappers(), MapperSpec)
    links = _flat(manager.hook.edged_links(), LinkSpec)
    if not mappers and not links:
        raise _Unusable("offers no mapper and no link: are its functions marked with @hookimpl?")
    return mappers, links


def _is_hook(plugin: object, word: str) -> bool:
    return getattr(getattr(plugin, word), f"{PROJECT}_impl", None) is not None


def _flat(results: Iterable[Iterable[Any]], kind: type[Any]) -> list[Any]:
    specs = [spec for result in results for spec in result]
    for spec in specs:
        if not isinstance(spec, kind):
            raise _Unusable(f"a hook returned {spec!r}, expected {kind.__name__}")
    return specs
