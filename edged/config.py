"""TOML to frozen records, with every limit of the daemon and its unit.

``edged.toml`` holds the node's settings; ``models.d/*.toml`` hold ``[[model]]`` tables and ``devices.d/*.toml``
``[[device]]`` and ``[[link]]`` tables (each may also stand in ``edged.toml``). Each fault is one line: file, key, what was
found, what is allowed. All faults are reported, not only the first: each key is read and checked for itself, and what is
sound is kept for the checks that follow. Relative paths are relative to the folder of ``edged.toml``.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import attrs
import cattrs

from edged.api import HealthCheck
from edged.errors import ConfigError

T = TypeVar("T")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:.+")
_SECRET_MAY_GO = re.compile(r"https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/]")


class _NotAllowed(ValueError):
    """A value outside what is allowed; its text is the "allowed" part of the message."""


class _Unsound(ValueError):
    """A table without which there is no record: a key that is required is missing or not allowed. It was told already."""


def _between(low: float, high: float) -> Callable[[object, object, Any], None]:
    def check(_: object, __: object, value: Any) -> None:
        if not low <= value <= high:
            raise _NotAllowed(f"a number from {low:g} to {high:g}")

    return check


def _one_of(*choices: str) -> Callable[[object, object, Any], None]:
    def check(_: object, __: object, value: Any) -> None:
        if value not in choices:
            raise _NotAllowed("one of " + ", ".join(repr(choice) for choice in choices))

    return check


def _matches(pattern: re.Pattern[str], allowed: str) -> Callable[[object, object, Any], None]:
    def check(_: object, __: object, value: Any) -> None:
        if not pattern.fullmatch(value):
            raise _NotAllowed(allowed)

    return check


def _is_regex(_: object, __: object, value: str) -> None:
    try:
        re.compile(value.replace("{identifies_as}", "x"))
    except re.error as exc:
        raise _NotAllowed(f"a regular expression ({exc})") from exc


def _is_repository(_: object, __: object, value: str) -> None:
    scheme, mark, _rest = value.partition("://")
    try:
        parts = urlsplit(value)
        port = parts.port  # raises where it is no port
    except ValueError:
        pass
    else:
        reaches = parts.path if scheme == "file" else parts.hostname and port != 0
        if not mark or (scheme in ("https", "http", "file") and reaches):
            return
    raise _NotAllowed("https://HOST/PATH, http://HOST/PATH, file:///PATH, a folder, or empty")


def _is_listen(_: object, __: object, value: str) -> None:
    host, _colon, port = value.rpartition(":")
    try:
        ipaddress.ip_address(host[1:-1] if host[:1] + host[-1:] == "[]" else host)
        fits = port.isascii() and port.isdecimal() and int(port) < 65536
    except ValueError:
        fits = False
    if value and not fits:
        raise _NotAllowed(
            "ADDRESS:PORT, such as '127.0.0.1:9464' or '[::1]:9464', with a port up to 65535; or empty"
        )


_is_id = _matches(_ID, "letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit")


def _host_name() -> str:
    """The host name, as far as an id may have it."""
    return re.sub(r"[^A-Za-z0-9._-]|^[^A-Za-z0-9]+", "", socket.gethostname())[:63] or "node"


@attrs.frozen(kw_only=True)
class Node:
    """``[node]``: who this node is and where its state lies."""

    id: str = attrs.field(factory=_host_name, validator=_is_id)
    state_dir: Path = Path("/var/lib/edged")


@attrs.frozen(kw_only=True)
class Api:
    """``[api]``: the local API on a unix socket, mode 0660."""

    socket: Path = Path("/run/edged/edged.sock")
    group: str = "edged"


@attrs.frozen(kw_only=True)
class TrustSettings:
    """``[trust]``: where releases come from and how old their metadata may be.

    ``repository``: URL (https, http, file) or folder; empty: none. ``root``: the root of trust to begin with, where the
    operator has set none with ``edged trust init``. ``credential``: name of the secret that the repository's server wants
    as the Authorization header (RFC 9110 11.6.2); empty: none.
    """

    repository: str = attrs.field(default="", validator=_is_repository)
    credential: str = attrs.field(
        default="",
        validator=_matches(re.compile(r"|[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"), "the name of a file, or empty"),
    )
    root: Path | None = None
    refresh_s: float = attrs.field(default=3600.0, validator=_between(5, 604_800))
    offline_grace_days: float = attrs.field(default=30.0, validator=_between(0, 365))

    @property
    def offline_grace(self) -> timedelta:
        return timedelta(days=self.offline_grace_days)


@attrs.frozen(kw_only=True)
class FetchSettings:
    """``[fetch]``: downloading. ``bandwidth_bytes_per_s`` 0: no cap."""

    bandwidth_bytes_per_s: int = attrs.field(default=0, validator=_between(0, 10**10))
    stall_s: float = attrs.field(default=30.0, validator=_between(1, 3600))


@attrs.frozen(kw_only=True)
class Storage:
    """``[storage]``: disk budgets. ``report_interval_s``: what devices report is written at most so often."""

    artifact_quota_bytes: int = attrs.field(default=2 * 1024**3, validator=_between(1024**2, 10**13))
    keep_jobs_days: float = attrs.field(default=365.0, validator=_between(1, 36_500))
    outbox_rows: int = attrs.field(default=10_000, validator=_between(100, 10**7))
    report_interval_s: float = attrs.field(default=10.0, validator=_between(0.2, 3600))


@attrs.frozen(kw_only=True)
class EngineSettings:
    """``[engine]``: bounds of the job engine.

    ``stall_s``: no new byte from a device for that long is a transient error. ``call_s``: so long may a mapper take to
    connect, and for any call that is no transfer. ``checkpoint_bytes`` and
    ``checkpoint_s``: progress is committed when both have passed.
    """

    parallel_jobs: int = attrs.field(default=16, validator=_between(1, 1024))
    max_attempts: int = attrs.field(default=8, validator=_between(1, 1000))
    first_backoff_s: float = attrs.field(default=1.0, validator=_between(0.01, 3600))
    longest_backoff_s: float = attrs.field(default=60.0, validator=_between(0.01, 86_400))
    max_steps: int = attrs.field(default=200, validator=_between(10, 100_000))
    max_trial_boots: int = attrs.field(default=3, validator=_between(1, 100))
    max_runs: int = attrs.field(default=3, validator=_between(1, 1000))
    deadline_s: float = attrs.field(default=30 * 86_400.0, validator=_between(1, 365 * 86_400))
    stall_s: float = attrs.field(default=30.0, validator=_between(0.1, 3600))
    lease_s: float = attrs.field(default=30.0, validator=_between(0.1, 3600))
    call_s: float = attrs.field(default=120.0, validator=_between(0.1, 3600))
    checkpoint_bytes: int = attrs.field(default=64 * 1024, validator=_between(1, 1024**3))
    checkpoint_s: float = attrs.field(default=1.0, validator=_between(0, 3600))


@attrs.frozen(kw_only=True)
class MetricsSettings:
    """``[metrics]``: the Prometheus endpoint; ``listen`` empty: none."""

    listen: str = attrs.field(default="127.0.0.1:9464", validator=_is_listen)


@attrs.frozen(kw_only=True)
class LogSettings:
    """``[log]``."""

    format: str = attrs.field(default="keyvalue", validator=_one_of("keyvalue", "json"))
    level: str = attrs.field(default="info", validator=_one_of("debug", "info", "warning", "error"))


@attrs.frozen(kw_only=True)
class HealthSettings:
    """``[model.health]``: how to tell that the application is good."""

    kind: str = attrs.field(validator=_one_of("line", "property"))
    pattern: str = attrs.field(validator=_is_regex)
    query: str = ""
    timeout_s: float = attrs.field(default=10.0, validator=_between(0.1, 3600))

    def check(self, identifies_as: str) -> HealthCheck:
        """The check for the release that answers ``identifies_as``."""
        pattern = self.pattern.replace("{identifies_as}", re.escape(identifies_as))
        return HealthCheck(self.kind, pattern, self.query, self.timeout_s)


@attrs.frozen(kw_only=True)
class Policy:
    """``[model.policy]``. ``without_fallback``: flash a one-slot device even where there is nothing to go back to."""

    without_fallback: bool = False


@attrs.frozen(kw_only=True)
class Model:
    """``[[model]]``: what a kind of device has. Sizes in bytes. ``config``: what stands in the table of the same name of
    each of its devices that does not say otherwise."""

    id: str = attrs.field(validator=_is_id)
    hardware_ids: tuple[str, ...] = ()
    flash_base: int = attrs.field(default=0, validator=_between(0, 2**63))
    flash_size: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(_between(1, 2**63))
    )
    health: HealthSettings | None = None
    policy: Policy = Policy()
    config: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class DeviceSettings:
    """``[[device]]``: one device of this node. ``config`` is its mapper's own table; ``watch``: keep the session open
    and read its reports between jobs."""

    id: str = attrs.field(validator=_is_id)
    model: str
    mapper: str
    address: str = attrs.field(validator=_matches(_ADDRESS, "SCHEME:REST, such as 'serial:/dev/ttyUSB0'"))
    watch: bool = True
    config: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class LinkSettings:
    """``[[link]]``: a wire that needs more than its address. ``config`` is its plugin's own table."""

    address: str = attrs.field(
        validator=_matches(_ADDRESS, "SCHEME:REST, such as 'mqtt:listen@0.0.0.0:8883'")
    )
    config: dict[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Config:
    """All settings of a node."""

    node: Node = attrs.field(factory=Node)
    api: Api = Api()
    trust: TrustSettings = TrustSettings()
    fetch: FetchSettings = FetchSettings()
    storage: Storage = Storage()
    engine: EngineSettings = EngineSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()
    model: tuple[Model, ...] = ()
    device: tuple[DeviceSettings, ...] = ()
    link: tuple[LinkSettings, ...] = ()

    @property
    def models(self) -> dict[str, Model]:
        return {model.id: model for model in self.model}

    @property
    def devices(self) -> dict[str, DeviceSettings]:
        return {device.id: device for device in self.device}


@attrs.frozen(kw_only=True)
class _Models:
    model: tuple[Model, ...] = ()


@attrs.frozen(kw_only=True)
class _Devices:
    device: tuple[DeviceSettings, ...] = ()
    link: tuple[LinkSettings, ...] = ()


@dataclass(frozen=True, slots=True)
class Examined:
    """What :func:`examine` found. ``config`` is what is sound: a key with a fault has its default there, a model or device
    with one is missing. ``places`` says by device, and by address of a link, where it stands, for further faults:
    ``FILE: device[0]``; ``model_places`` the same by model."""

    config: Config
    problems: list[str]
    places: Mapping[str, str]
    model_places: Mapping[str, str]

    def place_of(self, settings: DeviceSettings, path: str) -> str:
        """Where the value at ``path`` of the device's table stands (``security.level``, ``properties[0].did``): with its
        model where it comes from there, else with the device."""
        model = self.config.models.get(settings.model)
        inherited: object = model.config if model else {}
        held: object = settings.config
        shared = False
        for key in (part.partition("[")[0] for part in path.split(".")):
            if not (isinstance(inherited, Mapping) and isinstance(held, Mapping) and key in inherited):
                break
            inherited, held = inherited[key], held[key]
            shared = inherited == held
        return self.model_places[settings.model] if shared else self.places[settings.id]


def load(path: Path) -> Config:
    """Read ``path`` and the folders ``models.d`` and ``devices.d`` beside it.

    Raises ``ConfigError`` with every fault that was found.
    """
    found = examine(path)
    if found.problems:
        raise ConfigError(found.problems)
    return found.config


def examine(path: Path) -> Examined:
    """:func:`load` for whoever wants to go on with what is sound."""
    reader = _Reader(path.parent)
    config = reader.read(path, Config) or Config()
    models, devices, links = list(config.model), list(config.device), list(config.link)
    for file in reader.files(path.parent / "models.d"):
        models += (reader.read(file, _Models) or _Models()).model
    for file in reader.files(path.parent / "devices.d"):
        found = reader.read(file, _Devices) or _Devices()
        devices += found.device
        links += found.link
    repository = config.trust.repository
    if repository and "://" not in repository:
        config = attrs.evolve(
            config, trust=attrs.evolve(config.trust, repository=str(path.parent / repository))
        )
    problems = reader.problems + list(_cross_check(reader, devices))
    described = tuple(_with_defaults(devices, models))
    config = attrs.evolve(config, model=tuple(models), device=described, link=tuple(links))
    # an address has a colon, an id has none
    known = reader.places["device"] | reader.places["link"]
    return Examined(config, problems, _first(known), _first(reader.places["model"]))


def _first(places: Mapping[str, list[str]]) -> dict[str, str]:
    return {name: found[0] for name, found in places.items()}


def _with_defaults(devices: list[DeviceSettings], models: list[Model]) -> Iterator[DeviceSettings]:
    tables = {model.id: model.config for model in models}
    for device in devices:
        yield attrs.evolve(device, config=_merged(tables.get(device.model, {}), device.config))


def _merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Tables key by key, anything else as the device has it."""
    both = {
        key: _merged(defaults[key], own[key])
        for key in defaults.keys() & own.keys()
        if isinstance(defaults[key], Mapping) and isinstance(own[key], Mapping)
    }
    return {**defaults, **own, **both}


_LISTS: dict[object, tuple[str, type]] = {
    tuple[Model, ...]: ("model", Model),
    tuple[DeviceSettings, ...]: ("device", DeviceSettings),
    tuple[LinkSettings, ...]: ("link", LinkSettings),
}

_NAMES = {"model": "id", "device": "id", "link": "address"}
_FOLDERS = {"model": "models.d", "device": "devices.d", "link": "devices.d"}


def _elsewhere(kind: type[Any], key: str) -> str:
    """Where a key stands that has no place in a file of this kind."""
    if kind not in (_Models, _Devices) or key not in attrs.fields_dict(Config):
        return ""
    return f"; {key} belongs into " + (f"{_FOLDERS[key]} or edged.toml" if key in _FOLDERS else "edged.toml")


class _Reader:
    """Files to records. Strict where cattrs is lenient: no number from a text, no text from a number, no key that nobody
    reads. A fault is told and reading goes on.

    ``places`` has, for models and for devices, where each id stands: also those that have a fault elsewhere. ``unread``:
    of some model not even the id is known.
    """

    def __init__(self, folder: Path) -> None:
        self.problems: list[str] = []
        self.places: dict[str, dict[str, list[str]]] = {"model": {}, "device": {}, "link": {}}
        self.unread = False
        self._file = folder
        self._path = ""
        self._converter = convert = cattrs.Converter(detailed_validation=False)
        convert.register_structure_hook_func(attrs.has, self._table)
        convert.register_structure_hook_func(_LISTS.__contains__, self._tables)
        for kind, accepted in ((str, (str,)), (int, (int,)), (float, (int, float)), (bool, (bool,))):
            convert.register_structure_hook(kind, _strictly(kind, accepted))
        convert.register_structure_hook_func(lambda kind: kind == tuple[str, ...], _texts)
        convert.register_structure_hook_func(lambda kind: kind == dict[str, Any], _any_table)
        convert.register_structure_hook(Path, lambda value, _: folder / _strictly(str, (str,))(value, str))

    def files(self, folder: Path) -> list[Path]:
        """The TOML files of ``folder``, none where there is no such folder; one that cannot be listed is a fault."""
        try:
            return sorted(path for path in folder.iterdir() if path.name.endswith(".toml"))
        except OSError as exc:
            if isinstance(exc, FileNotFoundError) and not folder.is_symlink():
                return []
            allowed = f"a folder that user {os.getuid()} may list (ls -ld shows owner and mode)"
            self.problems.append(f"{folder}: cannot be read: {exc.strerror}; allowed: {allowed}")
            self.unread = self.unread or folder.name == "models.d"
            return []

    def read(self, file: Path, kind: type[T]) -> T | None:
        """What is sound in ``file``; None where it cannot be read at all."""
        self._file, self._path = file, ""
        try:
            data = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as exc:
            fault = f"cannot be read: {exc.strerror}"
        except (ValueError, RecursionError) as exc:
            fault = f"not TOML: {exc}"
        else:
            return self._converter.structure(data, kind)
        self.problems.append(f"{file}: {fault}")
        self.unread = self.unread or kind is not _Devices
        return None

    def _table(self, data: object, kind: type[Any]) -> Any:
        """Raises ``_Unsound`` where a required key has no sound value."""
        if not isinstance(data, Mapping):
            raise _NotAllowed("a table")
        attrs.resolve_types(kind)
        fields: Mapping[str, attrs.Attribute[Any]] = attrs.fields_dict(kind)
        sound: dict[str, Any] = {}
        for name, field in fields.items():
            with self._below(f".{name}", data.get(name)):
                if name in data or attrs.has(field.type or object):
                    sound[name] = self._checked(field, data.get(name, {}))
                elif field.default is attrs.NOTHING:
                    self._tell("found nothing; this key is required")
                elif not isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
                    sound[name] = field.default
        for name in sorted(data.keys() - fields.keys()):
            with self._below(f".{name}", None):
                self._tell(
                    f"found an unknown key; allowed: {', '.join(sorted(fields))}{_elsewhere(kind, name)}"
                )
        for name, fault in _TOGETHER.get(kind, _nothing)(sound):
            with self._below(f".{name}", None):
                self._tell(f"found {sound[name]!r}; allowed: {fault}")
        if any(field.default is attrs.NOTHING and name not in sound for name, field in fields.items()):
            raise _Unsound
        return kind(**sound)

    def _checked(self, field: attrs.Attribute[Any], data: object) -> object:
        value = self._converter.structure(data, field.type or object)
        if field.validator is not None:
            field.validator(None, field, value)
        return value

    def _tables(self, data: object, kind: object) -> tuple[Any, ...]:
        name, record = _LISTS[kind]
        if not isinstance(data, list):
            self.unread = self.unread or name == "model"
            raise _NotAllowed(f"[[{name}]] tables")
        found: list[Any] = []
        for number, item in enumerate(data):
            with self._below(f"[{number}]", item):
                self._note_place(name, item)
                found.append(self._converter.structure(item, record))
        return tuple(found)

    def _note_place(self, name: str, item: object) -> None:
        told = item.get(_NAMES[name]) if isinstance(item, Mapping) else None
        if isinstance(told, str):
            self.places[name].setdefault(told, []).append(f"{self._file}: {self._path}")
        else:
            self.unread = self.unread or name == "model"

    @contextmanager
    def _below(self, key: str, found: object) -> Iterator[None]:
        """One step down; what is not allowed there is told, and skipped."""
        before = self._path
        self._path = f"{before}{key}".removeprefix(".")
        try:
            yield
        except _NotAllowed as exc:
            self._tell(f"found {found!r:.200}; allowed: {exc}")
        except _Unsound:
            pass
        finally:
            self._path = before

    def _tell(self, fault: str) -> None:
        self.problems.append(f"{self._file}: {self._path}: {fault}")


def _texts(value: object, _: object) -> tuple[str, ...]:
    # a text is a sequence of texts as well, of one letter each
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _NotAllowed("a list of texts")
    return tuple(value)


def _any_table(value: object, _: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _NotAllowed("a table")
    return value


def _strictly(kind: type[T], accepted: tuple[type, ...]) -> Callable[[object, object], T]:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}

    def structure(value: object, _: object) -> T:
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise _NotAllowed(names[kind])
        try:
            return kind(value)  # type: ignore[call-arg]
        except OverflowError:
            raise _NotAllowed(names[kind]) from None

    return structure


# -- keys that must fit each other: each check is given the sound keys of one table, and yields key and what is allowed

_Fits = Iterator[tuple[str, str]]


def _nothing(_: Mapping[str, Any]) -> _Fits:
    yield from ()


def _trust_fits(sound: Mapping[str, Any]) -> _Fits:
    repository = sound.get("repository")
    if sound.get("credential") and repository is not None and not _SECRET_MAY_GO.match(repository):
        what = "https:// (or http:// to this machine), so that nobody on the way reads the credential"
        yield "repository", f"with trust.credential: {what}"


def _engine_fits(sound: Mapping[str, Any]) -> _Fits:
    first, longest = sound.get("first_backoff_s"), sound.get("longest_backoff_s")
    if first is not None and longest is not None and first > longest:
        yield "first_backoff_s", f"at most longest_backoff_s, which is {longest:g}"


def _health_fits(sound: Mapping[str, Any]) -> _Fits:
    if sound.get("kind") == "property" and sound.get("query") == "":
        yield "query", "what is to be asked, where kind is 'property'"


_TOGETHER: dict[type, Callable[[Mapping[str, Any]], _Fits]] = {
    TrustSettings: _trust_fits,
    EngineSettings: _engine_fits,
    HealthSettings: _health_fits,
}


def _cross_check(reader: _Reader, devices: list[DeviceSettings]) -> Iterator[str]:
    """What no single table can tell: ids used twice, devices of a model that nobody described."""
    for kind, key in _NAMES.items():
        for name, places in sorted(reader.places[kind].items()):
            for place in places[1:]:
                yield f"{place}.{key}: found {name!r}, which is {places[0]} already; allowed: each {key} once"
    if reader.unread:
        return  # it may be the model that could not be read
    known = ", ".join(sorted(reader.places["model"])) or "none, since no model is described"
    for device in devices:
        if device.model not in reader.places["model"]:
            place = reader.places["device"][device.id][0]
            yield f"{place}.model: found {device.model!r}; allowed: {known}"
