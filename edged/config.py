"""TOML to frozen records, with every limit of the daemon and its unit.

``edged.toml`` holds the node's settings; ``models.d/*.toml`` hold ``[[model]]`` tables and ``devices.d/*.toml``
``[[device]]`` tables (either may also stand in ``edged.toml``). Each fault is one line: file, key, what was found, what
is allowed. All faults are reported, not only the first. Relative paths are relative to the folder of ``edged.toml``.
"""

from __future__ import annotations

import re
import socket
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import attrs
import cattrs
from cattrs.errors import AttributeValidationNote, ForbiddenExtraKeysError, IterableValidationNote

from edged.api import HealthCheck
from edged.errors import ConfigError

T = TypeVar("T")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:.+")
_SECRET_MAY_GO = re.compile(r"https://|http://(127\.0\.0\.1|localhost|\[::1\])[:/]")


class _NotAllowed(ValueError):
    """A value outside what is allowed; its text is the "allowed" part of the message. ``key`` is the attribute that
    holds ``value``, where a validator of the record found it."""

    def __init__(self, allowed: str, key: str = "", value: object = None) -> None:
        super().__init__(allowed)
        self.key = key
        self.value = value


def _between(low: float, high: float) -> Callable[[object, attrs.Attribute[Any], Any], None]:
    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not low <= value <= high:
            raise _NotAllowed(f"a number from {low:g} to {high:g}", attribute.name, value)

    return check


def _one_of(*choices: str) -> Callable[[object, attrs.Attribute[Any], Any], None]:
    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if value not in choices:
            allowed = "one of " + ", ".join(repr(choice) for choice in choices)
            raise _NotAllowed(allowed, attribute.name, value)

    return check


def _matches(pattern: re.Pattern[str], allowed: str) -> Callable[[object, attrs.Attribute[Any], Any], None]:
    def check(_: object, attribute: attrs.Attribute[Any], value: Any) -> None:
        if not pattern.fullmatch(value):
            raise _NotAllowed(allowed, attribute.name, value)

    return check


def _is_regex(_: object, attribute: attrs.Attribute[Any], value: str) -> None:
    try:
        re.compile(value.replace("{identifies_as}", "x"))
    except re.error as exc:
        raise _NotAllowed(f"a regular expression ({exc})", attribute.name, value) from exc


_is_id = _matches(_ID, "letters, digits, '.', '_' and '-', at most 63, beginning with a letter or digit")


@attrs.frozen(kw_only=True)
class Node:
    """``[node]``: who this node is and where its state lies."""

    id: str = attrs.field(factory=socket.gethostname, validator=_is_id)
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

    repository: str = ""
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
    """``[storage]``: disk budgets."""

    artifact_quota_bytes: int = attrs.field(default=2 * 1024**3, validator=_between(1024**2, 10**13))
    keep_jobs_days: float = attrs.field(default=365.0, validator=_between(1, 36_500))
    outbox_rows: int = attrs.field(default=10_000, validator=_between(100, 10**7))


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
    deadline_s: float = attrs.field(default=7 * 86_400.0, validator=_between(1, 365 * 86_400))
    stall_s: float = attrs.field(default=30.0, validator=_between(0.1, 3600))
    lease_s: float = attrs.field(default=30.0, validator=_between(0.1, 3600))
    call_s: float = attrs.field(default=120.0, validator=_between(0.1, 3600))
    checkpoint_bytes: int = attrs.field(default=64 * 1024, validator=_between(1, 1024**3))
    checkpoint_s: float = attrs.field(default=1.0, validator=_between(0, 3600))


@attrs.frozen(kw_only=True)
class MetricsSettings:
    """``[metrics]``: the Prometheus endpoint; ``listen`` empty: none."""

    listen: str = attrs.field(
        default="127.0.0.1:9464",
        validator=_matches(re.compile(r"|\[?[0-9A-Fa-f:.]+\]?:\d{1,5}"), "ADDRESS:PORT, or empty"),
    )


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
    """``[[model]]``: what a kind of device has. Sizes in bytes."""

    id: str = attrs.field(validator=_is_id)
    hardware_ids: tuple[str, ...] = ()
    flash_base: int = attrs.field(default=0, validator=_between(0, 2**63))
    flash_size: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(_between(1, 2**63))
    )
    health: HealthSettings | None = None
    policy: Policy = Policy()


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


def load(path: Path) -> Config:
    """Read ``path`` and the folders ``models.d`` and ``devices.d`` beside it.

    Raises ``ConfigError`` with every fault that was found.
    """
    problems: list[str] = []
    converter = _converter(path.parent)
    config = _read(path, Config, converter, problems) or Config()
    repository = config.trust.repository
    if repository and "://" not in repository:
        config = attrs.evolve(
            config, trust=attrs.evolve(config.trust, repository=str(path.parent / repository))
        )
    models, devices = list(config.model), list(config.device)
    for file in _toml_files(path.parent / "models.d"):
        models += (_read(file, _Models, converter, problems) or _Models()).model
    for file in _toml_files(path.parent / "devices.d"):
        devices += (_read(file, _Devices, converter, problems) or _Devices()).device
    config = attrs.evolve(config, model=tuple(models), device=tuple(devices))
    problems += _cross_check(config)
    if problems:
        raise ConfigError(problems)
    return config


def _toml_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.toml"))


def _read(file: Path, kind: type[T], converter: cattrs.Converter, problems: list[str]) -> T | None:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
        tables = [key for key in ("model", "device") if not isinstance(data.get(key, []), list)]
        if tables:
            problems += [
                f"{file}: {key}: found one table or value; allowed: [[{key}]] tables" for key in tables
            ]
            return None
        return converter.structure(data, kind)
    except OSError as exc:
        problems.append(f"{file}: cannot be read: {exc.strerror}")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        problems.append(f"{file}: not TOML: {exc}")
    except cattrs.BaseValidationError as exc:
        problems += [f"{file}: {text}" for text in _explain(exc, data, "")]
    return None


def _converter(folder: Path) -> cattrs.Converter:
    """Strict where cattrs is lenient: no number from a text, no text from a number, no key that nobody reads."""
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for kind, accepted in ((str, (str,)), (int, (int,)), (float, (int, float)), (bool, (bool,))):
        converter.register_structure_hook(kind, _strictly(kind, accepted))
    converter.register_structure_hook_func(lambda kind: kind == tuple[str, ...], _texts)
    converter.register_structure_hook(Path, lambda value, _: folder / _strictly(str, (str,))(value, str))
    return converter


def _texts(value: object, _: object) -> tuple[str, ...]:
    # a text is a sequence of texts as well, of one letter each
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _NotAllowed("a list of texts")
    return tuple(value)


def _strictly(kind: type[T], accepted: tuple[type, ...]) -> Callable[[object, object], T]:
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}

    def structure(value: object, _: object) -> T:
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise _NotAllowed(names[kind])
        return kind(value)  # type: ignore[call-arg]

    return structure


def _explain(error: BaseException, data: object, path: str) -> Iterator[str]:
    """One line for each leaf of cattrs' tree of errors, with the key's path and what stands there."""
    if isinstance(error, cattrs.BaseValidationError):
        for inner in error.exceptions:
            yield from _explain(inner, *_below(inner, data, path))
    elif isinstance(error, ForbiddenExtraKeysError):
        known = ", ".join(sorted(attribute.name for attribute in attrs.fields(error.cl)))
        for key in sorted(error.extra_fields):
            yield f"{_join(path, key)}: found an unknown key; allowed: {known}"
    elif isinstance(error, KeyError):
        yield f"{_join(path, str(error.args[0]))}: found nothing; this key is required"
    elif isinstance(error, _NotAllowed) and error.key:
        yield f"{_join(path, error.key)}: found {error.value!r}; allowed: {error}"
    else:
        yield f"{path or 'the file'}: found {data!r}; allowed: {error}"


def _below(error: BaseException, data: object, path: str) -> tuple[object, str]:
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            if isinstance(error, KeyError):
                return data, path
            found = data.get(note.name) if isinstance(data, Mapping) else data
            return found, _join(path, note.name)
        if isinstance(note, IterableValidationNote):
            found = data[note.index] if isinstance(data, list) and isinstance(note.index, int) else data
            return found, f"{path}[{note.index}]"
    return data, path


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _cross_check(config: Config) -> list[str]:
    """What no single file can tell: ids used twice, devices of a model that nobody described."""
    problems = [
        f"{kind} {name!r}: found {count} times; allowed: once"
        for kind, names in (
            ("model", [model.id for model in config.model]),
            ("device", [device.id for device in config.device]),
        )
        for name, count in _repeated(names)
    ]
    if config.trust.credential and not _SECRET_MAY_GO.match(config.trust.repository):
        allowed = "https:// (or http:// to this machine), so that nobody on the way reads the credential"
        problems.append(
            f"trust.repository: found {config.trust.repository!r}; allowed with trust.credential: {allowed}"
        )
    known = ", ".join(sorted(config.models)) or "none is described"
    problems += [
        f"device {device.id!r}: model: found {device.model!r}; allowed: {known}"
        for device in config.device
        if device.model not in config.models
    ]
    return problems


def _repeated(names: Iterable[str]) -> list[tuple[str, int]]:
    listed = list(names)
    return [(name, listed.count(name)) for name in sorted(set(listed)) if listed.count(name) > 1]
