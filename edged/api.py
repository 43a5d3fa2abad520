"""THE contract for plugin authors: records, Protocols, hook specifications.

A plugin is a Python package with an entry point in the group ``edged.plugins`` whose module holds pluggy hook
implementations. Hooks are plain functions: they are called once, at start, do no I/O, and return frozen records whose
fields are async callables. Everything that can wait or fail happens later, behind the Protocols below.

Rules for whoever implements a session

* Raise ``Transient`` for what may work later (port gone, no answer), ``Permanent`` for what cannot (the device says no).
  Any other exception is a fault of the plugin: the session is closed, the fault is kept with its reason, nothing else stops.
* Let ``asyncio.CancelledError`` through, always, and leave the wire in a state in which the next session can connect.
* ``stage`` is idempotent and goes on from what the *device* has. Nothing but bytes that came from ``image.read`` may be
  sent as image bytes: that call is what guarantees that they were verified against signed metadata.
* ``activate`` never makes an image permanent where the device can revert.

What is *not* here: retries (the engine's), reconnecting (the supervisor's), time-outs around a whole call (the engine's).
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import pluggy

from edged_firmware.image import Image, Label, Segment

__all__ = [
    "API_VERSION",
    "Desired",
    "Device",
    "Env",
    "Health",
    "HealthCheck",
    "HookSpecs",
    "Identity",
    "Image",
    "JsonValue",
    "Label",
    "Link",
    "LinkSpec",
    "MapperSpec",
    "Phase",
    "Progress",
    "Reported",
    "Segment",
    "Session",
    "SessionTraits",
    "Slot",
    "Slots",
    "SupportsDesired",
    "SupportsDesiredQuery",
    "SupportsFirmware",
    "SupportsHealth",
    "SupportsPreparation",
    "SupportsReadBack",
    "SupportsTrial",
    "as_text",
    "hookimpl",
    "hookspec",
    "no_config",
]

API_VERSION = 1
"""Raised by one when a change breaks plugins; a plugin made for another version is left out, with its reason."""

PROJECT = "edged"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

JsonValue: TypeAlias = "None | bool | int | float | str | list[JsonValue] | dict[str, JsonValue]"


def as_text(value: JsonValue) -> str:
    """The one text of a value, which a health check's pattern is held against: a text as it is, all else as JSON writes it
    (``true``, ``12.5``, ``null``)."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Device:
    """A thing that this node keeps up to date, as the configuration describes it.

    ``address`` is ``scheme:rest`` and names the link (``serial:/dev/ttyUSB0``, ``can:can0``). ``hardware_ids`` are what
    the device may answer in :attr:`Identity.hardware_id`. ``flash_base`` and ``flash_size_bytes`` bound what may be
    written. ``config`` is what the mapper's ``parse_config`` made of the device's own table.
    """

    id: str
    model: str
    mapper: str
    address: str
    hardware_ids: tuple[str, ...] = ()
    flash_base: int = 0
    flash_size_bytes: int | None = None
    config: object = None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who answered. ``hardware_id`` is the protocol's own id of the hardware (AVR signature ``avr:1e950f``, SMP board…)."""

    hardware_id: str
    serial_number: str | None = None
    detail: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for an image on the device, as the device describes it *now*.

    ``runs`` is what the release's signed ``identifies_as`` is compared with; None means that the device cannot tell.
    ``runs_name`` is compared with the release's name where the device tells a name as well, None where it has none.
    ``pending`` is "will be booted on trial at the next reset".
    """

    name: str
    active: bool
    runs: str | None = None
    confirmed: bool = True
    pending: bool = False
    bootable: bool = True
    runs_name: str | None = None


@dataclass(frozen=True, slots=True)
class Slots:
    """All slots of one firmware component. One slot: the device cannot fall back by itself."""

    slots: tuple[Slot, ...]

    @property
    def active(self) -> Slot | None:
        return next((slot for slot in self.slots if slot.active), None)


@dataclass(frozen=True, slots=True)
class SessionTraits:
    """What the engine must know of a session; reported honestly, since safety rules hang on it.

    ``ceiling_bytes_per_s``: what the link can carry at most (115200 8N1: 11520). ``identify_disturbs``: identifying
    resets or stops the running application, so it happens only inside a job or when an operator asks.
    ``concurrent``: ``reports()`` may go on while the session is leased. ``quiet_s``: so long may a transfer move no byte
    and be well, such as while the device erases all of its flash; no shorter silence is taken for a stall.
    """

    ceiling_bytes_per_s: float
    slot_count: int = 1
    concurrent: bool = False
    identify_disturbs: bool = False
    quiet_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Reported:
    """One property value that the device reported. ``value`` is JSON; ``unit`` is a UCUM code where it has one."""

    name: str
    value: JsonValue
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Desired:
    """One property value that the device should have; ``version`` rises by one with each change."""

    name: str
    value: JsonValue
    version: int


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How to tell that an activated image is good.

    ``kind`` is ``line`` (the application prints a line) or ``property`` (it answers ``query``). ``pattern`` is a regular
    expression that the text must contain, for a property :func:`as_text` of its value; ``{identifies_as}`` in it has been
    replaced by the release's signed value.
    """

    kind: str
    pattern: str
    query: str = ""
    timeout_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Health:
    """What the check saw: ``evidence`` is the text that matched; where none did, what was seen instead:
    the first few lines, where a crash says its cause, and the last."""

    healthy: bool
    evidence: str


class Phase(StrEnum):
    """What a progress report counts."""

    COMPARE = "compare"
    ERASE = "erase"
    WRITE = "write"
    VERIFY = "verify"
    READ_OUT = "read_out"


class Progress(Protocol):
    """Told by a mapper while it works. Never blocks; call it as often as is natural for the protocol (each page)."""

    def __call__(self, phase: Phase, done_bytes: int, total_bytes: int) -> None:
        """``done_bytes`` of ``total_bytes`` of the phase are done; ``WRITE`` counts bytes that the device acknowledged."""
        ...


class Session(Protocol):
    """One open connection of a mapper to one device."""

    @property
    def traits(self) -> SessionTraits: ...

    async def identify(self) -> Identity:
        """Ask the device who it is; called before any write.

        Raises ``Transient`` (no answer) or ``Permanent`` (another kind of device answered).
        """
        ...

    def reports(self) -> AsyncIterator[Reported]:
        """Property values as they come. Ends, or raises ``Transient``, when the device is gone."""
        ...


@runtime_checkable
class SupportsDesired(Protocol):
    """The device takes property values."""

    async def apply(self, desired: Desired) -> Reported:
        """Set one property and return what the device says now. Idempotent."""
        ...


@runtime_checkable
class SupportsDesiredQuery(Protocol):
    """The device asks for its properties when it likes, such as after each of its starts."""

    def offer(self, desired: Sequence[Desired]) -> None:
        """All that it should have, whether it reports that or not: the answer to its next question. Called when the session
        is attached and when a wish has changed; :meth:`SupportsDesired.apply` follows for what it does not report."""
        ...


@runtime_checkable
class SupportsFirmware(Protocol):
    """The device takes firmware."""

    async def slots(self) -> Slots:
        """What the device says NOW."""
        ...

    async def stage(self, image: Image, progress: Progress) -> None:
        """Send ``image`` and verify it on the device as far as the protocol can.

        Idempotent; goes on from what the device has. Two slots: afterwards no *other* image is pending; what others left so
        is erased, or booted on trial and left. Raises ``Permanent(VERIFY_FAILED)`` where what the device holds
        afterwards is not the image.
        """
        ...

    async def activate(self) -> None:
        """Boot what was staged; on trial where the device can revert.

        Two slots: it follows :meth:`stage` in the same session. Where the slot holds another image by now, it raises
        ``Transient`` instead of booting that. Raises ``Permanent`` where it was not booted and cannot be: ``VERIFY_FAILED``
        where the device does not hold it.
        """
        ...


@runtime_checkable
class SupportsPreparation(Protocol):
    """The device has to agree before its memory may be changed: a session, a key, a precondition."""

    async def prepare(self, image: Image) -> None:
        """All that comes before the first change of what the device runs. Idempotent.

        Where it raises ``Permanent`` the job ends ``failed`` and has no way to go back; it may be cancelled meanwhile.
        :meth:`SupportsFirmware.stage` follows at once, and by itself in another session, where it has to prepare again.
        """
        ...


@runtime_checkable
class SupportsTrial(Protocol):
    """The device boots on trial and can go back by itself (two slots)."""

    async def confirm(self) -> None:
        """Make the running image permanent. Idempotent."""
        ...

    async def revert(self) -> None:
        """Go back to the image that ran before; it runs confirmed afterwards, and no other is pending. Idempotent."""
        ...


@runtime_checkable
class SupportsReadBack(Protocol):
    """The device's flash can be read, so that what it runs can be proved and kept."""

    async def read_flash(self, address: int, length: int, progress: Progress) -> bytes:
        """``length`` bytes from ``address``, which lies inside the device's flash bounds."""
        ...


@runtime_checkable
class SupportsHealth(Protocol):
    """The device's application can be asked whether it is well."""

    async def check_health(self, check: HealthCheck) -> Health:
        """Run the check; bounded by ``check.timeout_s``. An unhealthy application is a result, not an error."""
        ...


class Link(Protocol):
    """A shared wire: serial port, CAN bus, broker connection. Its mapper knows its full type."""

    @property
    def address(self) -> str: ...

    @property
    def exclusive(self) -> bool:
        """True where only one session at a time can use the wire (a serial line)."""
        ...


class Env(Protocol):
    """What a mapper is given. It opens wires through :meth:`link` only, so that they are shared and counted."""

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]: ...

    def link(self, address: str) -> AbstractAsyncContextManager[Link]:
        """Use the wire ``scheme:rest``: opened by the first user, closed after the last.

        Entering raises ``Transient(LINK_BUSY)`` where an exclusive wire is in use, ``Transient(DEVICE_ABSENT)`` where
        it cannot be opened, ``Permanent(UNSUPPORTED)`` where no plugin offers the scheme.
        """
        ...

    async def credential(self, name: str) -> str:
        """The secret that lies in ``/etc/edged/credentials/NAME``, without white space around it: one line of text.

        A device's table names it and never holds it. Raises ``Permanent(CONFIG_INVALID)`` where it is not there.
        """
        ...

    @property
    def config(self) -> object:
        """In :attr:`LinkSpec.open`: what ``parse_config`` made of the ``[[link]]`` table of this address, or of an empty one
        where there is none. None for a mapper, whose table is in :attr:`Device.config`."""
        ...

    def credential_file(self, name: str) -> Path:
        """The file of such a secret, for a library that wants a file: a private key. Does not look whether it is there.

        Raises ``Permanent(CONFIG_INVALID)`` where this process was given no secrets.
        """
        ...

    def now(self) -> datetime:
        """The time of day in UTC, for what a device is to be told. It may jump: it measures nothing."""
        ...

    def count(self, event: str) -> None:
        """One more of what an operator should see in the metrics: letters and ``_``, a handful of fixed texts."""
        ...

    async def recall(self, key: str) -> str | None:
        """What this device's mapper, or this wire's plugin, kept last by :meth:`remember` under ``key``; None where it kept
        nothing. Raises ``Transient`` and ``Permanent``: ``STORAGE_FAILED``."""
        ...

    async def remember(self, key: str, text: str) -> None:
        """Keep ``text`` over restarts and power cuts: it is on the disk when this returns. For a handful of short texts that
        change rarely, and no secrets. Raises ``Transient``: ``DISK_FULL``, ``STORAGE_FAILED``; ``Permanent(STORAGE_FAILED)``.
        """
        ...

    def away(self, detail: str) -> AbstractContextManager[None]:
        """While inside, a device that comes by itself is not there, and the session waits for it, as long as it takes.

        For ``connect`` and ``reports()``. Whoever wants the session meanwhile is told ``Transient(DEVICE_ABSENT, detail)``
        at once; leaving the block wakes what waits for the device, and the session is attached as a fresh one is.
        """
        ...


def no_config(table: Mapping[str, object], rest: str = "") -> None:
    """The ``parse_config`` of what needs no table of its own. Raises ``ValueError`` for any key."""
    if table:
        raise ValueError("\n".join(f"{key}: found an unknown key; allowed: none" for key in sorted(table)))


@dataclass(frozen=True, slots=True)
class LinkSpec:
    """How to open a kind of wire. ``open`` gets the rest of the address, after ``scheme:``."""

    scheme: str
    open: Callable[[str, Env], AbstractAsyncContextManager[Link]]
    parse_address: Callable[[str], object] = str
    """Given the same rest. Raises ``ValueError`` with a useful text, such as "allowed: HOST:PORT", where ``open`` could not
    understand it; what it returns is not used. A slip is then found before the first job; without it everything passes."""
    parse_config: Callable[[Mapping[str, object], str], object] = no_config
    """As :attr:`MapperSpec.parse_config`, for the ``[[link]]`` table of an address, an empty one where it has none. Given the
    rest of the address as well: what is allowed may depend on it. ``open`` finds the result in ``env.config``."""
    linger_s: float = 0.0
    """So long a wire stays open that nobody uses: a listener that were closed between two sessions would throw its devices
    out."""
    access_list: Callable[[str, object, Sequence[str]], str] | None = None
    """What an operator installs at the far end of a shared wire, such as a broker, so that no device reaches what is
    another's; None where there is nothing to install. Given the rest of the wire's address, what ``parse_config`` made, and the
    rests of the addresses of all devices with this scheme, also of those elsewhere. The text is in the far end's own format
    and says how it is installed. Raises ``ValueError`` with a useful text where none can be made."""
    wire: Callable[[str], str] = str
    """Given the rest of an address that passed ``parse_address``: that of the wire which a device there is on, as a
    ``[[link]]`` table names it. The same, unless devices on one wire have addresses of their own."""


@dataclass(frozen=True, slots=True)
class MapperSpec:
    """A mapper. ``name`` is wire and protocol (``uart-stk500``); ``flash_protocols`` are the values of a release's
    signed ``flash.protocol`` that this mapper can flash, ``flash_params`` the names in its signed ``flash.params`` that
    ``stage`` heeds (they are in ``image.params``): a release with another one is refused before anything is sent."""

    name: str
    connect: Callable[[Device, Env], AbstractAsyncContextManager[Session]]
    parse_config: Callable[[Mapping[str, object]], object] = no_config
    """Raises ``ValueError`` with a useful text: which key, what was found, what is allowed; one line for each fault."""
    flash_protocols: AbstractSet[str] = frozenset()
    probe: Callable[[str, Env], Awaitable[Identity | None]] | None = None
    """Who answers at this address? Called only when an operator asks. What else is known of the device (versions, slots)
    goes into :attr:`Identity.detail`."""
    flash_params: AbstractSet[str] = frozenset()
    schemes: AbstractSet[str] = frozenset()
    """The schemes of the links that it can use (``serial``); empty: any. An address with another one is then found before
    the first job, and no probe opens a wire that its mapper cannot use."""
    probe_disturbs: bool = True
    """Whether ``probe`` may reset or stop the application. Only a mapper that says False is asked where an operator names
    an address and no mapper."""
    longest_call_s: Callable[[object], float] | None = None
    """Given what ``parse_config`` made: for so many seconds a call that is no transfer (``identify``, ``activate``,
    ``revert``...) may take where nothing is wrong. More than ``engine.call_s`` is then found before the first job."""
    claims: Callable[[str, object], Collection[str]] | None = None
    """Given a device's address and what ``parse_config`` made: what no other device of this mapper can have, as texts for an
    operator (``"request_id 0x7e0 on can:can0"``). Where two have the same, the later one in the configuration is left out:
    both would speak to one device, or take each other's answers."""
    api_version: int = API_VERSION

    def reaches(self, address: str) -> bool:
        """Whether the mapper can use the link of an address ``scheme:rest``."""
        return not self.schemes or address.partition(":")[0] in self.schemes


class HookSpecs:
    """What a plugin may offer. Called once, at start; must not block."""

    @hookspec
    def edged_mappers(self) -> Iterable[MapperSpec]:  # type: ignore[empty-body]
        """The mappers of this plugin."""

    @hookspec
    def edged_links(self) -> Iterable[LinkSpec]:  # type: ignore[empty-body]
        """The kinds of wire that this plugin opens."""
