"""The mapper's own table of a device's configuration, checked key by key. Pure.

The keys stand best in ``[model.config]``: devices of one kind differ in their identifiers at most.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from edged_can.transport import FRAME_BYTES, MESSAGE_BYTES, Peer, Shape

_HEX: Final = re.compile(r"(?:[0-9a-fA-F]{2})*")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_SIGNAL: Final = re.compile(r"\w+\.\w+")
_CREDENTIAL: Final = re.compile(r"|[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")

SEQUENCE: Final = (
    "default_session",
    "extended_session",
    "check_preconditions",
    "dtc_off",
    "communication_off",
    "programming_session",
    "security_access",
)
"""What may come before the first erase, in the order in which it usually does."""
FIELDS: Final = ("format", "address", "length", "crc32", "sha256")
TYPES: Final = ("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "f32", "f64", "bool", "text", "hex")

Holds = Callable[[Any], bool]
Rule = tuple[str, Holds]


def _whole(low: int, high: int) -> Rule:
    return f"a whole number from {low} to {high}", lambda value: _is_whole(value) and low <= value <= high


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or isinstance(value, float)


def _number(low: float, high: float) -> Rule:
    return (
        f"a number from {low:g} to {high:g}",
        lambda value: _is_number(value) and low <= value <= high,
    )


def _flag() -> Rule:
    return "true or false", lambda value: isinstance(value, bool)


def _one_of(*choices: object) -> Rule:
    return " or ".join(map(repr, choices)), lambda value: not isinstance(value, bool) and value in choices


def _text(pattern: re.Pattern[str], allowed: str) -> Rule:
    return allowed, lambda value: isinstance(value, str) and bool(pattern.fullmatch(value))


def _some_of(*choices: str) -> Rule:
    return (
        f"a list of {', '.join(map(repr, choices))}, each once",
        lambda value: (
            isinstance(value, list) and all(one in choices for one in value) and len(set(value)) == len(value)
        ),
    )


def _texts(pattern: re.Pattern[str], allowed: str) -> Rule:
    return (
        f"a list of {allowed}",
        lambda value: (
            isinstance(value, list) and all(isinstance(one, str) and pattern.fullmatch(one) for one in value)
        ),
    )


def _key(default: Any, rule: Rule) -> Any:
    """A field with its default and what is allowed."""
    return field(default=default, metadata={"rule": rule})


_ID: Final = _whole(0, 0x1FFFFFFF)
_BYTE_OR_NONE: Final[Rule] = (
    "a whole number from 0 to 255, or false",
    lambda value: value is False or (_is_whole(value) and 0 <= value <= 255),
)
_DID: Final = _whole(0, 0xFFFF)
_PART: Final = _some_of(*FIELDS)


@dataclass(frozen=True, slots=True)
class Routine:
    """A RoutineControl of the programming sequence.

    - ``routine``: its identifier.
    - ``parameters``: what it is given, in order: ``format`` (addressAndLengthFormatIdentifier), ``address``, ``length``,
      ``crc32``, ``sha256`` of the segment or of all segments one after another.
    - ``per``: ``"segment"`` once for each, ``"image"``: once, with the first address and the length up to the last;
      ``"never"``: the device has no such routine.
    - ``ok``: how its routineStatusRecord must begin, in hexadecimal digits; empty: it is not looked at.
    """

    routine: int = _key(0xFF00, _DID)
    parameters: tuple[str, ...] = _key((), _PART)
    per: str = _key("segment", _one_of("segment", "image", "never"))
    ok: str = _key("", _text(_HEX, "pairs of hexadecimal digits, or nothing"))


@dataclass(frozen=True, slots=True)
class Security:
    """SecurityAccess.

    - ``level``: the requestSeed subfunction, odd; the key is sent with the next one.
    - ``algorithm``: how the key comes from the seed: built in, or a plug-in's.
    - ``credential``: the file in ``/etc/edged/credentials`` with the algorithm's secret; empty: it needs none.
    """

    level: int = _key(
        1, ("an odd number from 1 to 125", lambda v: _is_whole(v) and 1 <= v <= 125 and v % 2 == 1)
    )
    algorithm: str = _key("xor", _text(_NAME, "the name of an algorithm"))
    credential: str = _key("", _text(_CREDENTIAL, "the name of a file, or empty"))


@dataclass(frozen=True, slots=True)
class Property:
    """A property behind a data identifier: ``value = raw * scale + offset``.

    ``type``: ``u8`` to ``f64``, with ``le`` at its end for little-endian ones; ``bool``, ``text``, ``hex``. ``poll_s``: how
    often it is read, 0: only after it was written. ``session``: where the device takes it, ``default`` or ``extended``;
    ``security``: after SecurityAccess.
    """

    name: str = _key("", _text(_NAME, "letters, digits, '_', '.', '-', at most 64"))
    did: int = _key(0, _DID)
    type: str = _key("", _one_of(*TYPES, *(f"{name}le" for name in TYPES if name[1:] in ("16", "32", "64"))))
    scale: float = _key(1.0, ("a number but 0", lambda v: _is_number(v) and v != 0))
    offset: float = _key(0.0, _number(-1e18, 1e18))
    unit: str = _key("", ("a text", lambda v: isinstance(v, str)))
    poll_s: float = _key(10.0, _number(0, 86_400))
    writable: bool = _key(False, _flag())
    session: str = _key("default", _one_of("default", "extended"))
    security: bool = _key(False, _flag())


@dataclass(frozen=True, slots=True)
class UdsConfig:
    """How to talk to one controller. Identifiers as in its diagnostic description; times in seconds.

    - ``request_id``, ``response_id``: CAN identifiers to and from it; of 29 bits with ``extended_ids``.
    - ``target_address``, ``source_address``: extended addressing; false: normal addressing.
    - ``fd``, ``frame_bytes``: CAN FD. ``padding``: the byte that fills frames up; false: none.
    - ``block_size``, ``st_min``: what the device is asked to keep to when it answers.
    - ``block_bytes``: the longest TransferData request, below what the device allows.
    - ``bus_share``: of the bus that may be in use while edged sends; 1: no limit.
    - ``answer_s``: the longest that one answer takes. ``pending_s``: so long may a device ask for more time
      (requestCorrectlyReceived-ResponsePending). ``boot_s``: from a reset until it answers again.
      ``settle_s``: from its answer to a reset, or to the programming session, to the next request.
    - ``hardware_did``, ``version_did``, ``serial_did``: what identifies it; 0: it has none.
    - ``sequence``: what comes before the first erase. ``precondition_routine``: what ``check_preconditions`` starts.
    - ``address_bytes``, ``length_bytes``, ``data_format``: of RequestDownload.
    - ``reset``: the ECUReset subfunction after programming.
    - ``erase``, ``check``: the routines before and after a download. ``security``: SecurityAccess.
    - ``properties``: what it reports.
    - ``dbc``: a file that describes its raw frames; ``signals``: which it reports, each ``MESSAGE.SIGNAL``, and at most
      every ``signals_s``; ``commands``: which can be set, by a frame.
    """

    request_id: int = _key(0x7E0, _ID)
    response_id: int = _key(0x7E8, _ID)
    extended_ids: bool = _key(False, _flag())
    target_address: int | bool = _key(False, _BYTE_OR_NONE)
    source_address: int | bool = _key(False, _BYTE_OR_NONE)
    fd: bool = _key(False, _flag())
    frame_bytes: int = _key(64, _one_of(*FRAME_BYTES))
    padding: int | bool = _key(0xCC, _BYTE_OR_NONE)
    block_size: int = _key(0, _whole(0, 255))
    st_min: int = _key(
        0,
        (
            "0 to 127 (ms), or 241 to 249 (100 to 900 us)",
            lambda v: _is_whole(v) and (0 <= v <= 127 or 241 <= v <= 249),
        ),
    )
    block_bytes: int = _key(MESSAGE_BYTES, _whole(8, MESSAGE_BYTES))
    bus_share: float = _key(1.0, _number(0.05, 1))
    answer_s: float = _key(1.0, _number(0.05, 60))
    pending_s: float = _key(120.0, _number(1, 3600))
    boot_s: float = _key(10.0, _number(0.1, 600))
    settle_s: float = _key(0.5, _number(0, 60))
    hardware_did: int = _key(0xF191, _whole(1, 0xFFFF))
    version_did: int = _key(0xF189, _DID)
    serial_did: int = _key(0xF18C, _DID)
    sequence: tuple[str, ...] = _key(
        ("extended_session", "dtc_off", "communication_off", "programming_session", "security_access"),
        _some_of(*SEQUENCE),
    )
    precondition_routine: int = _key(0x0203, _DID)
    address_bytes: int = _key(4, _whole(1, 5))
    length_bytes: int = _key(4, _whole(1, 4))
    data_format: int = _key(0, _whole(0, 255))
    reset: int = _key(1, _whole(1, 0x7F))
    erase: Routine = Routine(0xFF00, ("format", "address", "length"))
    check: Routine = Routine(0xFF01, (), "image", "00")
    security: Security = Security()
    properties: tuple[Property, ...] = ()
    dbc: str = _key("", ("the path of a file, or empty", lambda v: isinstance(v, str)))
    signals: tuple[str, ...] = _key((), _texts(_SIGNAL, "texts MESSAGE.SIGNAL"))
    signals_s: float = _key(1.0, _number(0, 3600))
    commands: tuple[str, ...] = _key((), _texts(_SIGNAL, "texts MESSAGE.SIGNAL"))

    @property
    def peer(self) -> Peer:
        return Peer(
            self.request_id,
            self.response_id,
            self.extended_ids,
            _byte(self.target_address),
            _byte(self.source_address),
        )

    @property
    def shape(self) -> Shape:
        return Shape(
            self.fd,
            self.frame_bytes if self.fd else 8,
            self.block_size,
            self.st_min,
            _byte(self.padding),
            self.bus_share,
        )


def _byte(value: int | bool) -> int | None:
    return None if value is False else int(value)


def parse(table: Mapping[str, object]) -> UdsConfig:
    """A device's table. Raises ValueError: a line for each fault, with key, what was found, what is allowed."""
    faults: list[str] = []
    config: UdsConfig = _read(UdsConfig(), table, "", faults)
    if not faults:
        faults = list(_together(config))
    if faults:
        raise ValueError("\n".join(faults))
    return config


def _read(default: Any, table: object, path: str, faults: list[str]) -> Any:
    """``default`` with what ``table`` says; every fault is told and reading goes on."""
    if not isinstance(table, Mapping):
        faults.append(f"{path.removesuffix('.')}: found {table!r}; allowed: a table")
        return default
    fields = {each.name: each for each in dataclasses.fields(default)}
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            faults.append(f"{path}{key}: found an unknown key; allowed: {', '.join(sorted(fields))}")
        elif dataclasses.is_dataclass(getattr(default, key)):
            found[key] = _read(getattr(default, key), value, f"{path}{key}.", faults)
        elif key == "properties":
            found[key] = _properties(value, f"{path}{key}", faults)
        else:
            found[key] = _checked(fields[key], value, f"{path}{key}", faults)
    return dataclasses.replace(default, **found)


def _checked(key: dataclasses.Field[Any], value: object, path: str, faults: list[str]) -> object:
    allowed, holds = key.metadata["rule"]
    if not holds(value):
        faults.append(f"{path}: found {value!r}; allowed: {allowed}")
        return key.default
    return tuple(value) if isinstance(value, list) else value


def _properties(value: object, path: str, faults: list[str]) -> tuple[Property, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        faults.append(f"{path}: found {value!r}; allowed: a list of tables")
        return ()
    found = []
    for number, table in enumerate(value):
        here = f"{path}[{number}]."
        one = _read(Property(), table, here, faults)
        if isinstance(table, Mapping):
            missing = [key for key in ("name", "did", "type") if key not in table]
            faults += [f"{here}{key}: found nothing; this key is required" for key in missing]
        found.append(one)
    return tuple(found)


def _together(config: UdsConfig) -> typing.Iterator[str]:
    """What no single key can tell."""
    most = 0x1FFFFFFF if config.extended_ids else 0x7FF
    for key in ("request_id", "response_id"):
        if getattr(config, key) > most:
            yield f"{key}: found {getattr(config, key):#x}; allowed: at most 0x7ff without extended_ids = true"
    if config.request_id == config.response_id and config.target_address is False:
        yield f"response_id: found {config.response_id:#x}, which is request_id too; allowed: another one"
    if (config.target_address is False) != (config.source_address is False):
        yield "source_address: found one address of two; allowed: target_address and source_address, or neither"
    if "security_access" in config.sequence or any(one.security for one in config.properties):
        from edged_can.security import known

        if config.security.algorithm not in known():
            yield (
                f"security.algorithm: found {config.security.algorithm!r}; allowed: {', '.join(sorted(known()))}, or one that "
                "a plug-in brings"
            )
    yield from _proofs(config)
    if bool(config.dbc) != bool(config.signals or config.commands):
        yield f"dbc: found {config.dbc!r}; allowed: a file together with signals or commands, or none of them"
    names = [one.name for one in config.properties]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"properties: found {name!r} twice; allowed: each name once"


def _proofs(config: UdsConfig) -> typing.Iterator[str]:
    """Checksums where there are some, and something that tells a good image from another."""
    unknown = {"crc32", "sha256"} & set(config.erase.parameters)
    if unknown:
        yield f"erase.parameters: found {sorted(unknown)!r}; allowed: format, address, length: nothing was sent by then"
    if not config.version_did and (config.check.per == "never" or not config.check.ok):
        yield (
            "check: found nothing that is looked at; allowed: per 'segment' or 'image' and an ok, or a version_did: else "
            "nothing would tell what the device holds"
        )
