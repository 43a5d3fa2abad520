"""The mapper's own table of a device's configuration, checked key by key. Pure.

The keys stand best in ``[model.config]``: devices of one kind differ in their identifiers at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from edged.tables import (
    Rule,
    flag,
    key,
    list_of,
    number,
    one_of,
    printable,
    read,
    refuse,
    some_of,
    table,
    tables,
    text,
    whole,
)
from edged_can.address import parse_address
from edged_can.transport import FRAME_BYTES, MESSAGE_BYTES, Peer, Shape

SEQUENCE: Final = (
    "default_session",
    "functional_extended_session",
    "extended_session",
    "check_preconditions",
    "functional_dtc_off",
    "dtc_off",
    "functional_communication_off",
    "communication_off",
    "programming_session",
    "security_access",
    "second_security_access",
    "fingerprint",
)
"""What may come before the first erase, in the order in which it usually does. ``functional_``: everyone on the bus is told."""
CHECKSUMS: Final = ("crc32", "sha256")
FIELDS: Final = ("format", "address", "length", *CHECKSUMS)
TYPES: Final = ("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "f32", "f64", "bool", "text", "hex")

_NAME: Final = r"[A-Za-z_][A-Za-z0-9_.-]{0,63}"
_ANY: Final = number(-1e18, 1e18)
_ID: Final = whole(0, 0x1FFFFFFF)
_BYTE: Final = whole(0, 255)
_BYTE_OR_NONE: Final = _BYTE | False
_HEX: Final = text(r"(?:[0-9a-fA-F]{2})*", "pairs of hexadecimal digits, or nothing")
_DID: Final = whole(0, 0xFFFF)
_SIGNALS: Final = list_of(text(r"\w+\.\w+", "MESSAGE.SIGNAL"), "texts MESSAGE.SIGNAL")


@dataclass(frozen=True, slots=True)
class Routine:
    """A RoutineControl of the programming sequence.

    - ``routine``: its identifier.
    - ``parameters``: what it is given, in order: ``format`` (addressAndLengthFormatIdentifier), ``address``, ``length``,
      ``crc32``, ``sha256`` of the segment or of all segments one after another.
    - ``per``: ``"segment"`` once for each, ``"image"``: once, with the first address and the length up to the last;
      ``"never"``: the device has no such routine.
    - ``ok``: how its routineStatusRecord must begin, in hexadecimal digits; empty: it is not looked at.
    - ``poll_s``: where it goes on after it was started, its results are asked for (0x31 03) so often, and the status is
      theirs; 0: it is done when it answers. ``running``: how the status begins while it is at work.
    """

    routine: int = key(0xFF00, _DID)
    parameters: tuple[str, ...] = key((), some_of(*FIELDS))
    per: str = key("segment", one_of("segment", "image", "never"))
    ok: str = key("", _HEX)
    poll_s: float = key(0.0, number(0, 60))
    running: str = key("", _HEX)


@dataclass(frozen=True, slots=True)
class Security:
    """SecurityAccess.

    - ``level``: the requestSeed subfunction, odd; the key is sent with the next one.
    - ``algorithm``: how the key comes from the seed: built in, or a plug-in's.
    - ``credential``: the file in ``/etc/edged/credentials`` with the algorithm's secret; empty: it needs none.
    """

    level: int = key(
        1, Rule("an odd number from 1 to 125", lambda value: _BYTE.holds(value) and value in range(1, 126, 2))
    )
    algorithm: str = key("xor", text(_NAME, "the name of an algorithm"))
    credential: str = key("", text(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", "the name of a file") | "")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Who programs when, as the step ``fingerprint`` writes it (WriteDataByIdentifier).

    ``record``: pairs of hexadecimal digits, and between them ``{yymmdd}``, ``{yyyymmdd}``, ``{hhmmss}`` (UTC, two decimal
    digits in each byte) and ``{serial}``, the text of ``serial`` in ASCII.
    """

    did: int = key(0xF15A, _DID)
    record: str = key(
        "",
        text(
            r"(?:[0-9a-fA-F]{2}|\{(?:yymmdd|yyyymmdd|hhmmss|serial)\})*",
            "pairs of hexadecimal digits, {yymmdd}, {yyyymmdd}, {hhmmss}, {serial}",
        ),
    )
    serial: str = key("", text(r"[ -~]{0,32}", "printable ASCII, at most 32 characters"))


@dataclass(frozen=True, slots=True)
class Property:
    """A property behind a data identifier: ``value = raw * scale + offset``.

    ``type``: ``u8`` to ``f64``, with ``le`` at its end for little-endian ones; ``bool``, ``text``, ``hex``. ``poll_s``: how
    often it is read, 0: only after it was written. ``session``: where the device takes it, ``default`` or ``extended``;
    ``security``: after SecurityAccess.
    """

    name: str = key("", text(_NAME, "letters, digits, '_', '.', '-', at most 64"))
    did: int = key(0, _DID)
    type: str = key("", one_of(*TYPES, *(f"{name}le" for name in TYPES if name[1:] in ("16", "32", "64"))))
    scale: float = key(1.0, Rule("a number but 0", lambda value: _ANY.holds(value) and value != 0))
    offset: float = key(0.0, _ANY)
    unit: str = key("", printable())
    poll_s: float = key(10.0, number(0, 86_400))
    writable: bool = key(False, flag())
    session: str = key("default", one_of("default", "extended"))
    security: bool = key(False, flag())


@dataclass(frozen=True, slots=True)
class UdsConfig:
    """How to talk to one controller. Identifiers as in its diagnostic description; times in seconds.

    - ``request_id``, ``response_id``: CAN identifiers to and from it; of 29 bits with ``extended_ids``.
    - ``functional_id``: of requests to all controllers on the bus, for the steps ``functional_...``; false: none are sent.
      ``functional_address``: their first byte, with extended addressing.
    - ``target_address``, ``source_address``: extended addressing; false: normal addressing.
    - ``fd``, ``frame_bytes``: CAN FD. ``padding``: the byte that fills frames up; false: none.
    - ``block_size``, ``st_min``: what the device is asked to keep to when it answers.
    - ``block_bytes``: the longest TransferData request, below what the device allows.
    - ``bus_share``: of the bus that may be in use while edged sends; 1: no limit.
    - ``answer_s``: the longest that one answer takes. ``pending_s``: so long may a device ask for more time to
      answer one request (requestCorrectlyReceived-ResponsePending). ``boot_s``: from a reset until it answers again.
      ``settle_s``: from its answer to a reset, or to the programming session, to the next request.
    - ``hardware_did``, ``version_did``, ``serial_did``: what identifies it; 0: it has none.
    - ``sequence``: what comes before the first erase. ``precondition_routine``: what ``check_preconditions`` starts.
    - ``communication_control``, ``communication_type``: of CommunicationControl. ``dtc_record``: DTCSettingControlOptionRecord
      of ControlDTCSetting, in hexadecimal digits.
    - ``address_bytes``, ``length_bytes``, ``data_format``: of RequestDownload. ``exit_parameters``: what RequestTransferExit
      says of the segment, in order.
    - ``sector_bytes``: its flash is erased in sectors of so many bytes at most, which begin at multiples of that; 0: nobody
      knows, and to erase one segment may take any other.
    - ``reset``: the ECUReset subfunction after programming.
    - ``erase``, ``check``: the routines before and after a download. ``security``, ``second_security``: SecurityAccess, at one
      level and at another. ``fingerprint``: what the step of that name writes.
    - ``properties``: what it reports.
    - ``dbc``: a file that describes its raw frames; ``signals``: which it reports, each ``MESSAGE.SIGNAL``, and at most
      every ``signals_s``; ``commands``: which can be set, by a frame.
    """

    request_id: int = key(0x7E0, _ID)
    response_id: int = key(0x7E8, _ID)
    extended_ids: bool = key(False, flag())
    functional_id: int | bool = key(False, whole(1, 0x1FFFFFFF) | False)
    functional_address: int | bool = key(False, _BYTE_OR_NONE)
    target_address: int | bool = key(False, _BYTE_OR_NONE)
    source_address: int | bool = key(False, _BYTE_OR_NONE)
    fd: bool = key(False, flag())
    frame_bytes: int = key(64, one_of(*FRAME_BYTES))
    padding: int | bool = key(0xCC, _BYTE_OR_NONE)
    block_size: int = key(0, whole(0, 255))
    st_min: int = key(
        0,
        Rule(
            "0 to 127 (ms), or 241 to 249 (100 to 900 us)",
            lambda value: _BYTE.holds(value) and (value <= 127 or 241 <= value <= 249),
        ),
    )
    block_bytes: int = key(MESSAGE_BYTES, whole(8, MESSAGE_BYTES))
    bus_share: float = key(1.0, number(0.05, 1))
    answer_s: float = key(1.0, number(0.05, 60))
    pending_s: float = key(120.0, number(1, 3600))
    boot_s: float = key(10.0, number(0.1, 600))
    settle_s: float = key(0.5, number(0, 60))
    hardware_did: int = key(0xF191, whole(1, 0xFFFF))
    version_did: int = key(0xF189, _DID)
    serial_did: int = key(0xF18C, _DID)
    sequence: tuple[str, ...] = key(
        ("extended_session", "dtc_off", "communication_off", "programming_session", "security_access"),
        some_of(*SEQUENCE),
    )
    precondition_routine: int = key(0x0203, _DID)
    communication_control: int = key(3, one_of(1, 2, 3))
    communication_type: int = key(1, whole(1, 255))
    dtc_record: str = key("", _HEX)
    address_bytes: int = key(4, whole(1, 5))
    length_bytes: int = key(4, whole(1, 4))
    data_format: int = key(0, whole(0, 255))
    exit_parameters: tuple[str, ...] = key((), some_of(*CHECKSUMS))
    sector_bytes: int = key(0, whole(0, 0x10000000))
    reset: int = key(1, whole(1, 0x7F))
    erase: Routine = table(Routine(0xFF00, ("format", "address", "length")))
    check: Routine = table(Routine(0xFF01, (), "image", "00"))
    security: Security = table(Security())
    second_security: Security = table(Security(3))
    fingerprint: Fingerprint = table(Fingerprint())
    properties: tuple[Property, ...] = tables(Property, required=("name", "did", "type"))
    dbc: str = key("", text(r".*", "the path of a file, or empty"))
    signals: tuple[str, ...] = key((), _SIGNALS)
    signals_s: float = key(1.0, number(0, 3600))
    commands: tuple[str, ...] = key((), _SIGNALS)

    @property
    def tells_everyone(self) -> bool:
        """Is there a step that all controllers on the bus are told?"""
        return any(step.startswith("functional_") for step in self.sequence)

    @property
    def secures_properties(self) -> bool:
        """Is there a property that is written after SecurityAccess?"""
        return any(one.security for one in self.properties)

    @property
    def unlocks(self) -> dict[str, Security]:
        """The accesses that are used, by the names of their tables."""
        used = {}
        if "security_access" in self.sequence or self.secures_properties:
            used["security"] = self.security
        if "second_security_access" in self.sequence:
            used["second_security"] = self.second_security
        return used

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


def parse(values: Mapping[str, object]) -> UdsConfig:
    """A device's table. Raises ValueError: a line for each fault, with key, what was found, what is allowed."""
    config = read(UdsConfig, values)
    refuse(_together(config))
    return config


def longest_call_s(config: object) -> float:
    """See :attr:`edged.api.MapperSpec.longest_call_s`: a reset, and the start after it."""
    assert isinstance(config, UdsConfig)
    return 2 * config.answer_s + config.settle_s + config.boot_s


def quiet_s(config: UdsConfig) -> float:
    """See :attr:`edged.api.SessionTraits.quiet_s`.

    Before the first erase no step has more than two requests, and one of them a start. A routine has its start, its results
    for ``pending_s`` and the last of them; between two blocks there may be RequestTransferExit, the check, RequestDownload.
    """
    request_s = config.answer_s + config.pending_s
    before_s = 2 * len(config.sequence) * request_s + config.settle_s + config.boot_s
    routine_s = 3 * request_s + max(config.erase.poll_s, config.check.poll_s)
    return max(before_s, routine_s + 3 * request_s)


def claims(address: str, config: object) -> frozenset[str]:
    """See :attr:`edged.api.MapperSpec.claims`: an identifier each way, with the address behind it where there is one."""
    assert isinstance(config, UdsConfig)
    bus = parse_address(address.partition(":")[2])
    behind = {"request_id": config.target_address, "response_id": config.source_address}
    return frozenset(
        f"{name} {getattr(config, name):#x}{'' if byte is False else f' with address {byte:#x}'} on {bus.place}"
        for name, byte in behind.items()
    )


def _together(config: UdsConfig) -> Iterator[str]:
    """What no single key can tell."""
    for name in ("request_id", "response_id", "functional_id"):
        if getattr(config, name) > (0x1FFFFFFF if config.extended_ids else 0x7FF):
            yield f"{name}: found {getattr(config, name):#x}; allowed: at most 0x7ff without extended_ids = true"
    if config.request_id == config.response_id and config.target_address is False:
        yield f"response_id: found {config.response_id:#x}, which is request_id too; allowed: another one"
    if (config.target_address is False) != (config.source_address is False):
        yield "source_address: found one address of two; allowed: target_address and source_address, or neither"
    for name, settings in config.unlocks.items():
        yield from _algorithm(name, settings)
        if settings != Security() or config.sequence != UdsConfig().sequence or config.secures_properties:
            yield from _credential(name, settings)
    yield from _functional(config)
    if "fingerprint" in config.sequence and not config.fingerprint.record:
        yield "fingerprint.record: found nothing; allowed: what the step fingerprint is to write"
    yield from _proofs(config)
    if bool(config.dbc) != bool(config.signals or config.commands):
        yield f"dbc: found {config.dbc!r}; allowed: a file together with signals or commands, or none of them"
    names = [one.name for one in config.properties]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"properties: found {name!r} twice; allowed: each name once"


def _algorithm(name: str, settings: Security) -> Iterator[str]:
    from edged_can.security import known

    if settings.algorithm not in known():
        others = ", ".join(sorted(known()))
        yield f"{name}.algorithm: found {settings.algorithm!r}; allowed: {others}, or one that a plug-in brings"


def _credential(name: str, settings: Security) -> Iterator[str]:
    from edged_can.security import needs_secret

    if needs_secret(settings.algorithm) and not settings.credential:
        yield f"{name}.credential: found ''; allowed: the name of the file with the secret, which {settings.algorithm!r} needs"


def _functional(config: UdsConfig) -> Iterator[str]:
    """Requests to everyone want an identifier that nobody else has, and one frame."""
    if config.functional_id is False:
        if config.tells_everyone:
            yield "functional_id: found false; allowed: an identifier, where the sequence has functional steps"
        return
    # with extended addressing the address behind an identifier tells who is meant
    by_address = config.functional_address not in (False, config.target_address)
    if config.functional_id == config.response_id or (
        config.functional_id == config.request_id and not by_address
    ):
        yield f"functional_id: found {config.functional_id:#x}, which is the device's own; allowed: another one"
    if (config.target_address is False) != (config.functional_address is False):
        yield "functional_address: found one address of two; allowed: with target_address, or neither"
    one_frame = 5 if config.functional_address is False else 4
    if len(config.dtc_record) // 2 > one_frame and "functional_dtc_off" in config.sequence:
        found = f"dtc_record: found {config.dtc_record!r}"
        yield f"{found}; allowed: at most {one_frame} bytes, where everyone is told in one frame"


def _proofs(config: UdsConfig) -> Iterator[str]:
    """Checksums where there are some, and something that tells a good image from another."""
    for name in ("erase", "check"):
        routine = getattr(config, name)
        if routine.running and not routine.poll_s:
            yield f"{name}.running: found {routine.running!r}; allowed: with a poll_s"
        if routine.running and routine.ok.lower().startswith(routine.running.lower()):
            yield f"{name}.running: found {routine.running!r}, as ok begins; allowed: another beginning"
    unknown = {"crc32", "sha256"} & set(config.erase.parameters)
    if unknown:
        yield f"erase.parameters: found {sorted(unknown)!r}; allowed: format, address, length: nothing was sent by then"
    if not config.version_did and (config.check.per == "never" or not config.check.ok):
        yield (
            "check: found nothing that is looked at; allowed: per 'segment' or 'image' and an ok, or a version_did: else "
            "nothing would tell what the device holds"
        )
