"""The flash protocol ``uds``: the programming sequence of ISO 14229-1 (clause 15 and annex) as controllers are built for it.

Sessions and permissions; erase, RequestDownload, TransferData, RequestTransferExit for each segment; the check routine;
ECUReset. Which of it a kind of controller wants is configuration. Knows no slots and no health.
"""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from itertools import pairwise
from typing import Final

from udsoncan import DataFormatIdentifier, MemoryLocation, Request, services

from edged.api import Env, Image, Phase, Progress, Segment
from edged.errors import Permanent, Reason, Refused, Transient
from edged_can.access import Access
from edged_can.client import BUSY_REPEAT_REQUEST, NegativeResponse, RefusedForGood, UdsClient
from edged_can.config import Fingerprint, Routine, UdsConfig
from edged_can.functional import Everyone
from edged_can.link import CanLink, Turns

DEFAULT_SESSION: Final = 1
PROGRAMMING_SESSION: Final = 2
EXTENDED_SESSION: Final = 3

_START_ROUTINE: Final = 1
_REQUEST_RESULTS: Final = 3
_DTC_OFF: Final = 2
_HEAD_BYTES: Final = 2
"""Of a TransferData request: service and blockSequenceCounter; maxNumberOfBlockLength counts them (14.3.3)."""
_ALIGNED_BYTES: Final = 256
"""A multiple of what most flash is programmed by at once: words of 4 to 32 bytes, pages of 128 or 256."""
_STARTS: Final = 4
"""Of segments that are erased together: the first, and those after a block that had to be repeated and was refused."""
_SENDS: Final = 3
"""Of one block: the server acknowledges a repeated one and writes it once (14.5.2.3), or refuses it."""
_COURTESIES: Final = frozenset({"extended_session", "dtc_off", "communication_off"})
"""What spares an application its faults. A boot loader has none, and often not the service either; whether it may be
programmed is for the steps that follow to say."""
_NOT_SUPPORTED: Final = frozenset({0x11, 0x12, 0x7E, 0x7F})
"""serviceNotSupported, subFunctionNotSupported, and both in the active session (annex A.1)."""
_REQUEST_OUT_OF_RANGE: Final = 0x31
_OF_THE_MOMENT: Final = frozenset({BUSY_REPEAT_REQUEST, 0x22, 0x37, *range(0x81, 0x95)})
"""busyRepeatRequest, conditionsNotCorrect, requiredTimeDelayNotExpired, and what is wrong with the machine around it: its
speed, its engine, its voltage (annex A.1)."""
_SECURITY_ACCESS_DENIED: Final = 0x33
_UNLOCKS: Final = frozenset({"security_access", "second_security_access"})
_CURED_BY_ERASE: Final = frozenset({0x10, 0x72})
"""generalReject, and generalProgrammingFailure: an erase or a cell that did not take, which the next start may cure."""
_DROPPED: Final = frozenset({0x24, 0x70, 0x71, 0x73})
"""requestSequenceError, uploadDownloadNotAccepted, transferDataSuspended, wrongBlockSequenceCounter: no transfer is under way
as the client knows it, and a new one begins at RequestDownload."""


class Programming:
    """Writes images into one controller. ``entered``: it is in its programming session, as far as is known."""

    def __init__(
        self,
        client: UdsClient,
        config: UdsConfig,
        link: CanLink,
        access: Access,
        name: str,
        env: Env,
        turns: Turns,
    ) -> None:
        self._client = client
        self._config = config
        self._turns = turns
        self._name = name
        self._env = env
        self.everyone = everyone = Everyone(link, config)
        self.entered = False
        self._steps: dict[str, Callable[[], Awaitable[None]]] = {
            "default_session": lambda: client.session(DEFAULT_SESSION),
            "extended_session": lambda: client.session(EXTENDED_SESSION),
            "check_preconditions": self._check_preconditions,
            "dtc_off": lambda: self._ask_for(_dtc_off(config), _DTC_OFF),
            "communication_off": lambda: self._ask_for(
                _communication_off(config), config.communication_control
            ),
            "programming_session": self._programming_session,
            "security_access": lambda: access.unlock(config.security),
            "second_security_access": lambda: access.unlock(config.second_security),
            "fingerprint": self._fingerprint,
            "functional_extended_session": lambda: everyone.hold(
                services.DiagnosticSessionControl.make_request(EXTENDED_SESSION)
            ),
            "functional_dtc_off": lambda: everyone.hold(_dtc_off(config)),
            "functional_communication_off": lambda: everyone.hold(_communication_off(config)),
        }

    def check(self, image: Image) -> None:
        """Whether every request can say where it is, how long, and in which format. Raises Permanent(IMAGE_TOO_LARGE),
        Refused(FACTS_INVALID)."""
        self._data_format(image)
        for segment in image.segments:
            _location(segment, self._config)
        for routine in (self._config.erase, self._config.check):
            if routine.per == "image" and {"address", "length"} & set(routine.parameters):
                _location(_span(image.segments), self._config)

    async def enter(self) -> None:
        """What comes before the first erase. Raises NegativeResponse, Permanent; Transient, LINK_BUSY where it would disturb
        another update on the bus, or be disturbed, DEVICE_BUSY where the device says that it cannot be programmed now."""
        self._turns.take(self._name, alone=self._config.tells_everyone)
        self.entered = True
        for step in self._config.sequence:
            await self._step(step)

    async def write(self, image: Image, progress: Progress) -> None:
        """Erase, download and check every segment; where the server lost its place, that one anew, with those that its erase
        may take.

        Raises NegativeResponse; Permanent(VERIFY_FAILED) where a routine says that what is in the flash is not good; Transient.
        """
        try:
            await self._write(image, progress)
        except RefusedForGood as error:
            if error.code in _CURED_BY_ERASE:
                raise Transient(error.reason, error.detail) from error
            if error.code != _SECURITY_ACCESS_DENIED or not _UNLOCKS & set(self._config.sequence):
                raise
            raise Transient(error.reason, f"{error.detail}: was it reset since it was unlocked?") from error

    async def _write(self, image: Image, progress: Progress) -> None:
        await self._erase(image, range(len(image.segments)), progress)
        check = self._config.check
        sent = _Sent("sha256" in check.parameters)
        for together in erased_together(image.segments, self._config):
            sent = await self._write_some(image, together, sent, progress)
        if check.per == "image":
            await self._run(check, "check", _span(image.segments), sent)

    async def _write_some(self, image: Image, numbers: range, before: _Sent, progress: Progress) -> _Sent:
        """Segments that are erased; all of them again where the server loses its place. What was sent with them. Raises as
        :meth:`write`."""
        start = 1
        while True:
            sent = before.copy()
            try:
                for number in numbers:
                    sent = await self._write_one(image, number, sent, progress)
                return sent
            except _PlaceLost as lost:
                if start == _STARTS:
                    raise lost.refusal from None
            start += 1
            await self._erase(image, numbers, progress)

    async def _write_one(self, image: Image, number: int, sent: _Sent, progress: Progress) -> _Sent:
        """One segment, checked where each is. What the next check is about, so far. Raises :class:`_PlaceLost`."""
        check = self._config.check
        if check.per == "segment":
            sent = _Sent("sha256" in check.parameters)
        await self._download(image, number, sent, progress)
        if check.per == "segment":
            await self._run(check, "check", image.segments[number], sent)
        return sent

    async def _erase(self, image: Image, numbers: range, progress: Progress) -> None:
        """All of it before anything is written: whole sectors are erased, and two segments may share one."""
        erase, done = self._config.erase, 0
        segments = image.segments[numbers.start : numbers.stop]
        total = sum(segment.length for segment in segments)
        progress(Phase.ERASE, 0, total)
        for segment in segments if erase.per == "segment" else (_span(segments),):
            await self._run(erase, "erase", segment)
            done = min(done + segment.length, total)
            progress(Phase.ERASE, done, total)

    async def reset(self) -> None:
        """ECUReset (10.3), acknowledged before it happens."""
        kind = self._config.reset
        await self._client.ask(services.ECUReset.make_request(kind), bytes((kind,)))
        await self._let_go()

    async def leave(self) -> None:
        """Back to the default session, where the programming session was entered and no reset ended it."""
        if self.entered:
            try:
                await self._let_go()
            finally:
                await self._client.session(DEFAULT_SESSION)

    async def _let_go(self) -> None:
        """The others on the bus go on as before, and may be programmed."""
        self.entered = False
        try:
            await self.everyone.release()
        finally:
            self._turns.give(self._name)

    async def _programming_session(self) -> None:
        """The boot loader's session: many a controller gets there by a reset, before or after its answer."""
        await self._client.session(PROGRAMMING_SESSION)
        await asyncio.sleep(self._config.settle_s)
        await self._client.await_start(self._config.boot_s)

    async def _step(self, name: str) -> None:
        """One of ``sequence``; passed over where it is a courtesy that this server does not know."""
        try:
            await self._steps[name]()
        except NegativeResponse as error:
            if error.code in _OF_THE_MOMENT:
                raise Transient(Reason.DEVICE_BUSY, error.detail) from error
            if name not in _COURTESIES or error.code not in _NOT_SUPPORTED:
                raise
            self._env.log.info("step %s is passed over: %s", name, error.detail)

    async def _check_preconditions(self) -> None:
        """The application's own: in its boot loader a controller does nothing that they could be about.

        Raises NegativeResponse; Transient(DEVICE_BUSY) where they are not met.
        """
        try:
            await self._run(Routine(self._config.precondition_routine, ok="00"), "precondition")
        except NegativeResponse as error:
            if error.code not in _NOT_SUPPORTED | {_REQUEST_OUT_OF_RANGE} or await self._application_runs():
                raise
            self._env.log.info("no application runs, and its preconditions are passed over: %s", error.detail)
        except Permanent as error:
            if error.reason is not Reason.VERIFY_FAILED:
                raise
            raise Transient(Reason.DEVICE_BUSY, error.detail) from error

    async def _application_runs(self) -> bool:
        """As far as is known: also where nothing would tell."""
        did = self._config.version_did
        return not did or await self._client.read_offered(did) is not None

    async def _ask_for(self, request: Request, subfunction: int) -> None:
        await self._client.ask(request, bytes((subfunction,)))

    async def _fingerprint(self) -> None:
        """Who programs when, before anything is erased (annex C.1: applicationSoftwareFingerprint and its like)."""
        settings = self._config.fingerprint
        await self._client.write(settings.did, fingerprint(settings, self._env.now()))

    async def _download(self, image: Image, number: int, sent: _Sent, progress: Progress) -> None:
        """One segment. Raises :class:`_PlaceLost`."""
        segment, exit_parameters = image.segments[number], self._config.exit_parameters
        own = _Sent("sha256" in exit_parameters)
        done = sum(before.length for before in image.segments[:number])
        size = await self._request_download(segment, self._data_format(image))
        counter = 0
        async with aclosing(_blocks(image, number, size)) as blocks:
            async for data in blocks:
                counter = (counter + 1) & 0xFF
                await self._ask_again(services.TransferData.make_request(counter, data), bytes((counter,)))
                sent.take(data)
                if exit_parameters:
                    own.take(data)
                done += len(data)
                progress(Phase.WRITE, done, image.size_bytes)
        record = b"".join(_field(name, self._config, segment, own) for name in exit_parameters)
        await self._ask_again(Request(services.RequestTransferExit, data=record), b"")

    def _data_format(self, image: Image) -> DataFormatIdentifier:
        """The signed one, else the configuration's (14.2.2). Raises Refused(FACTS_INVALID)."""
        kind = image.params.get("data_format", self._config.data_format)
        if not isinstance(kind, int) or isinstance(kind, bool) or kind not in range(256):
            text = f"flash parameter data_format: found {kind!r}; allowed: a whole number from 0 to 255"
            raise Refused(Reason.FACTS_INVALID, text)
        return DataFormatIdentifier(compression=kind >> 4, encryption=kind & 0xF)

    async def _request_download(self, segment: Segment, data_format: DataFormatIdentifier) -> int:
        """RequestDownload (14.2); how many bytes of data each TransferData may have."""
        location = _location(segment, self._config)
        request = services.RequestDownload.make_request(location, data_format)
        longest, most = _block_length(await self._client.ask(request), self._name), self._config.block_bytes
        size = min(longest, most) - _HEAD_BYTES
        if longest > most and size > _ALIGNED_BYTES:
            # the device's own length fits its flash, and one that is cut is to begin its blocks at words of it too
            size -= size % _ALIGNED_BYTES
        if size < 1:
            text = f"{self._name}: maxNumberOfBlockLength is {longest}, which leaves no room for data"
            raise Permanent(Reason.DEVICE_ERROR, text)
        return size

    async def _ask_again(self, request: Request, echo: bytes) -> None:
        """Ask, and the same again where no answer comes. Raises :class:`_PlaceLost` where the server dropped the transfer."""
        for sending in range(1, _SENDS + 1):
            try:
                await self._client.ask(request, echo)
                return
            except NegativeResponse as error:
                if error.code in _DROPPED:
                    raise _PlaceLost(error) from error
                raise
            except Transient as error:
                if error.reason not in (Reason.NO_RESPONSE, Reason.PROTOCOL_ERROR) or sending == _SENDS:
                    raise

    async def _run(
        self, routine: Routine, what: str, segment: Segment | None = None, sent: _Sent | None = None
    ) -> None:
        """RoutineControl (13.2), started; Permanent(VERIFY_FAILED) where its status is not the one that means well."""
        if routine.per == "never":
            return
        parameters = b"".join(_field(name, self._config, segment, sent) for name in routine.parameters)
        echo = bytes((_START_ROUTINE,)) + routine.routine.to_bytes(2, "big")
        request = services.RoutineControl.make_request(routine.routine, _START_ROUTINE, parameters)
        status = await self._client.ask(request, echo)
        if routine.poll_s:
            status = await self._results(routine, what)
        if not status.startswith(bytes.fromhex(routine.ok)):
            found = status.hex() or "nothing"
            raise Permanent(
                Reason.VERIFY_FAILED,
                f"{self._name}: the {what} routine {routine.routine:#06x} answered {found}, not {routine.ok}",
            )

    async def _results(self, routine: Routine, what: str) -> bytes:
        """requestRoutineResults (13.2) until it is not at work any more: its status. Raises Transient(NO_RESPONSE) after
        ``pending_s``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._config.pending_s
        echo = bytes((_REQUEST_RESULTS,)) + routine.routine.to_bytes(2, "big")
        request = services.RoutineControl.make_request(routine.routine, _REQUEST_RESULTS)
        running = bytes.fromhex(routine.running)
        while True:
            await asyncio.sleep(routine.poll_s)
            status = await self._client.ask(request, echo)
            if not running or not status.startswith(running):
                return status
            if loop.time() > deadline:
                text = f"{self._name}: the {what} routine {routine.routine:#06x} is at work after {self._config.pending_s:g} s"
                raise Transient(Reason.NO_RESPONSE, text)


class _PlaceLost(Exception):
    """The server dropped the transfer in its middle; ``refusal`` is what it said."""

    def __init__(self, refusal: NegativeResponse) -> None:
        super().__init__(refusal)
        self.refusal = refusal


class _Sent:
    """Checksums of what was sent, for the check routine."""

    def __init__(self, wants_hash: bool) -> None:
        self.crc32 = 0
        self._hash = hashlib.sha256() if wants_hash else None

    def copy(self) -> _Sent:
        """The same so far, to go on from."""
        twin = _Sent(wants_hash=False)
        twin.crc32 = self.crc32
        twin._hash = None if self._hash is None else self._hash.copy()
        return twin

    def take(self, data: bytes) -> None:
        self.crc32 = zlib.crc32(data, self.crc32)
        if self._hash is not None:
            self._hash.update(data)

    @property
    def sha256(self) -> bytes:
        return self._hash.digest() if self._hash is not None else b""


async def _blocks(image: Image, number: int, size: int) -> AsyncGenerator[bytes, None]:
    """A segment in blocks of ``size`` bytes; the next one is read, and verified, while the device takes the one before."""
    length = image.segments[number].length
    reading: asyncio.Future[bytes] = asyncio.ensure_future(image.read(number, 0, min(size, length)))
    try:
        for offset in range(size, length, size):
            data = await reading
            reading = asyncio.ensure_future(image.read(number, offset, min(size, length - offset)))
            yield data
        yield await reading
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def _dtc_off(config: UdsConfig) -> Request:
    """ControlDTCSetting (10.8): no fault codes for what follows."""
    return Request(services.ControlDTCSetting, _DTC_OFF, data=bytes.fromhex(config.dtc_record))


def _communication_off(config: UdsConfig) -> Request:
    """CommunicationControl (10.5): unless configured otherwise, normal messages are neither sent nor heard."""
    kind = bytes((config.communication_type,))
    return Request(services.CommunicationControl, config.communication_control, data=kind)


def fingerprint(settings: Fingerprint, now: datetime) -> bytes:
    """The record, with the time of day where it has a place for it; the digits of a date are its bytes (BCD)."""
    parts = {
        "{yymmdd}": now.strftime("%y%m%d"),
        "{yyyymmdd}": now.strftime("%Y%m%d"),
        "{hhmmss}": now.strftime("%H%M%S"),
        "{serial}": settings.serial.encode("ascii").hex(),
    }
    text = settings.record
    for place, digits in parts.items():
        text = text.replace(place, digits)
    return bytes.fromhex(text)


def _block_length(answer: bytes, name: str) -> int:
    """maxNumberOfBlockLength, after the byte whose high half says how long it is (14.2.3)."""
    size = answer[0] >> 4 if answer else 0
    if not 0 < size < len(answer):
        text = f"{name}: RequestDownload: the device answered {answer.hex() or 'nothing'} for a length"
        raise Transient(Reason.PROTOCOL_ERROR, text)
    return int.from_bytes(answer[1 : 1 + size], "big")


def _location(segment: Segment, config: UdsConfig) -> MemoryLocation:
    """Raises Permanent(IMAGE_TOO_LARGE) where address or length have more bytes than the device takes."""
    for what, value, size in (
        ("address", segment.address, config.address_bytes),
        ("length", segment.length, config.length_bytes),
    ):
        if value >= 256**size:
            raise Permanent(Reason.IMAGE_TOO_LARGE, f"the {what} {value:#x} does not fit into {size} bytes")
    return MemoryLocation(segment.address, segment.length, config.address_bytes * 8, config.length_bytes * 8)


def erased_together(segments: Sequence[Segment], config: UdsConfig) -> list[range]:
    """The numbers of the sorted ``segments``, in runs: to erase one of a run may take the others of it.

    Where the device has no erase routine, RequestDownload takes what it is about and no more. Else two that share a sector go
    together, all of them where nobody said how large sectors are.
    """
    erase, sector = config.erase, config.sector_bytes
    if erase.per == "image" or (erase.per == "segment" and not sector):
        return [range(len(segments))]
    firsts = [
        number
        for number, segment in enumerate(segments)
        if number == 0
        or erase.per == "never"
        or (segments[number - 1].address + segments[number - 1].length - 1) // sector
        < segment.address // sector
    ]
    return [range(first, after) for first, after in pairwise([*firsts, len(segments)])]


def _span(segments: tuple[Segment, ...]) -> Segment:
    """From the first address to the last."""
    first, last = segments[0], segments[-1]
    return Segment(first.address, last.address + last.length - first.address)


def _field(name: str, config: UdsConfig, segment: Segment | None, sent: _Sent | None) -> bytes:
    """A parameter of a routine, or of RequestTransferExit."""
    if name == "format":
        # addressAndLengthFormatIdentifier: bytes of the length in the high half, of the address in the low one (annex H)
        return bytes((config.length_bytes << 4 | config.address_bytes,))
    if segment is not None and name == "address":
        return _location(segment, config).get_address_bytes()
    if segment is not None and name == "length":
        return _location(segment, config).get_memorysize_bytes()
    if sent is not None and name == "crc32":
        return sent.crc32.to_bytes(4, "big")
    if sent is not None and name == "sha256":
        return sent.sha256
    raise Permanent(Reason.CONFIG_INVALID, f"{name!r} is not known when this routine is started")
