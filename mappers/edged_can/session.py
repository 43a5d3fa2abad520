"""One controller on a CAN bus, spoken to by UDS: see :class:`edged.api.Session` and the ``Supports...`` Protocols.

One slot, which cannot be read back: what runs is what the controller says in its version identifier. Asking for identifiers
in the default session disturbs nothing.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Final

from edged.api import (
    Desired,
    Device,
    Env,
    Health,
    HealthCheck,
    Identity,
    Image,
    JsonValue,
    Progress,
    Reported,
    SessionTraits,
    Slot,
    Slots,
    as_text,
)
from edged.errors import EdgedError, Permanent, Reason, Transient
from edged_can.access import Access
from edged_can.client import NegativeResponse, Timing, UdsClient
from edged_can.config import Property, UdsConfig, quiet_s
from edged_can.dbc import Signals, load
from edged_can.frames import Frame, ceiling_bytes_per_s
from edged_can.link import CanLink, Turns
from edged_can.programming import DEFAULT_SESSION, EXTENDED_SESSION, Programming
from edged_can.properties import WrongType, decode, encode, holds, text_of
from edged_can.refused import RefusedKeys

PROTOCOL: Final = "uds"
NO_APPLICATION: Final = ""
"""What runs where the controller does not tell a version that it should: no release identifies as nothing."""
_ASK_AGAIN_S: Final = 0.5
_S3_S: Final = 5.5
"""S3server (ISO 14229-2): so long after the last request a session ends by itself, and a little more."""
_BOOTING_S: Final = 0.05


@asynccontextmanager
async def connected(
    device: Device,
    config: UdsConfig,
    link: CanLink,
    env: Env,
    refused: RefusedKeys,
    alone_until: dict[str, float],
    turns: Turns,
) -> AsyncIterator[UdsSession]:
    """A session; at its end the controller is told that the tester goes. Errors as the transport's.

    ``refused``: the keys that devices refused. ``alone_until``: of the loop's clock; a controller that could not be told is
    asked nothing until it has left its programming session by itself, which each request would put off. ``turns``: the bus's.
    """
    now = asyncio.get_running_loop().time
    await asyncio.sleep(alone_until.get(device.id, 0.0) - now())
    # who is cancelled in between leaves it to the next
    alone_until.pop(device.id, None)
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(link.transport(config.peer, config.shape))
        client = UdsClient(transport, Timing(config.answer_s, config.pending_s), device.id)
        signals = await _signals(config, link)
        access = Access(client, env, device.id, refused)
        # told at once, and not after a job has begun to change the controller
        for settings in config.unlocks.values():
            # a table that says nothing of it is that of a device which is never unlocked, until it is to be flashed
            if settings.credential:
                await access.check(settings)
        session = UdsSession(device, config, link, client, access, env, turns, signals)
        await stack.enter_async_context(client.kept_alive(lambda: session.programming.entered))
        await stack.enter_async_context(session.programming.everyone.kept_alive())
        try:
            yield session
        finally:
            # also where the daemon is stopped in the middle: the controller must not wait for a tester that is gone
            if session.programming.entered:
                alone_until[device.id] = now() + _S3_S
                with suppress(TimeoutError, Transient, Permanent):
                    async with asyncio.timeout(config.answer_s):
                        await session.programming.leave()
                        del alone_until[device.id]


class UdsSession:
    """A session with one controller."""

    def __init__(
        self,
        device: Device,
        config: UdsConfig,
        link: CanLink,
        client: UdsClient,
        access: Access,
        env: Env,
        turns: Turns,
        signals: Signals | None = None,
    ) -> None:
        self._device = device
        self._config = config
        self._link = link
        self._client = client
        self._signals = signals
        self._loop = asyncio.get_running_loop()
        self._access = access
        self._env = env
        self._complained: set[tuple[str, int | None]] = set()
        self._untold: set[str] = set()
        self._wishes: dict[str, JsonValue] = {}
        self._prepared = False
        self.programming = Programming(client, config, link, access, device.id, env, turns)
        peer, shape = config.peer, config.shape
        self.traits = SessionTraits(
            ceiling_bytes_per_s=ceiling_bytes_per_s(
                link.bus,
                extended=peer.extended_ids,
                fd=shape.fd,
                frame_bytes=shape.frame_bytes,
                overhead=peer.overhead,
            ),
            quiet_s=quiet_s(config),
        )

    async def identify(self) -> Identity:
        """``uds:`` and the hardware identifier's record. Raises Transient, NegativeResponse."""
        config = self._config
        hardware = text_of(await self._client.read(config.hardware_did))
        serial = await self._read_text(config.serial_did)
        version = await self._read_text(config.version_did)
        detail = {"protocol": PROTOCOL} | ({"version": version} if version else {})
        return Identity(f"uds:{hardware}", serial or None, detail)

    async def slots(self) -> Slots:
        """The one slot; what runs in it is what the version identifier says. Raises Transient, NegativeResponse."""
        if not self._config.version_did:
            return Slots((Slot("flash", active=True),))
        version = await self._version()
        deadline = self._loop.time() + self._config.boot_s
        while version is None and self._loop.time() < deadline:
            # a boot loader answers for a moment after every start
            await asyncio.sleep(_ASK_AGAIN_S)
            version = await self._version()
        return Slots((Slot("flash", active=True, runs=NO_APPLICATION if version is None else version),))

    async def prepare(self, image: Image) -> None:
        """The programming sequence up to the first erase.

        Raises, before anything is sent, Permanent: IMAGE_TOO_LARGE, CONFIG_INVALID for a secret that cannot be used, and
        Refused(FACTS_INVALID); then what :meth:`Programming.enter` raises.
        """
        self._check_bounds(image)
        self.programming.check(image)
        for settings in self._config.unlocks.values():
            await self._access.check(settings)
        await self.programming.enter()
        self._prepared = True

    async def stage(self, image: Image, progress: Progress) -> None:
        """The programming sequence up to the check routine. Raises what :mod:`edged_can.programming` raises, and
        :meth:`prepare`."""
        if not self._prepared:
            await self.prepare(image)
        self._prepared = False
        await self.programming.write(image, progress)

    async def activate(self) -> None:
        """ECUReset, and wait until the application tells its version, for ``boot_s`` at most.

        Raises Transient(NO_RESPONSE) where nobody answers any more, NegativeResponse for the reset.
        """
        await self.programming.reset()
        # until then the boot loader may answer that has not reset yet
        await asyncio.sleep(self._config.settle_s)
        if not self._config.version_did:
            await self._client.await_start(self._config.boot_s)
            return
        deadline = self._loop.time() + self._config.boot_s
        # only the controller knows when it has booted
        while not await self._has_booted(deadline) and self._loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_BOOTING_S)

    async def check_health(self, check: HealthCheck) -> Health:
        """``property``: the record of an identifier (``query``: its number, or a property's name) matches.

        Raises Transient(LINK_LOST), Permanent(UNSUPPORTED) for a kind of check or a query that is not known.
        """
        if check.kind != "property":
            raise Permanent(Reason.UNSUPPORTED, f"health check {check.kind!r}; known: property")
        pattern, deadline = re.compile(check.pattern), self._loop.time() + check.timeout_s
        while True:
            tells, seen = await self._evidence_by(deadline, check.query)
            if tells and pattern.search(seen):
                return Health(True, seen)
            if self._loop.time() >= deadline:
                return Health(False, seen)
            await asyncio.sleep(min(_ASK_AGAIN_S, max(0.0, deadline - self._loop.time())))

    async def reports(self) -> AsyncIterator[Reported]:
        """The properties, each as often as it is configured to be read, and the signals of raw frames as they come.

        Raises Transient: NO_RESPONSE, LINK_LOST.
        """
        polls = _Polls(self._config.properties, self._loop.time)
        async with self._link.listen(self._signals.ids if self._signals else ()) as listener:
            while True:
                prop = polls.due()
                if prop is None:
                    frame = await listener.next(polls.wait_s())
                    frames = [frame] if frame is not None else []
                else:
                    polled = await self._polled(prop)
                    if polled is not None:
                        yield polled
                    # there may be a poll due for ever
                    frames = listener.waiting()
                for reported in self._decoded(frames):
                    yield reported

    def _decoded(self, frames: Iterable[Frame]) -> Iterator[Reported]:
        if self._signals is not None:
            for frame in frames:
                yield from self._signals.decode(frame, self._loop.time)

    async def apply(self, desired: Desired) -> Reported:
        """WriteDataByIdentifier, and read back; nothing is written that the device has already.

        What it then has is told as the value that was desired, however its type rounds it. Raises Permanent(REQUEST_INVALID),
        NegativeResponse, Transient.
        """
        if self._signals is not None and desired.name in self._signals.commands:
            await self._link.send(self._signals.encode(desired.name, desired.value))
            return Reported(desired.name, desired.value)
        prop = next((each for each in self._config.properties if each.name == desired.name), None)
        if prop is None or not prop.writable:
            able = [each.name for each in self._config.properties if each.writable] + [*self._config.commands]
            text = f"{desired.name!r} cannot be set; properties that can: {', '.join(able) or 'none'}"
            raise Permanent(Reason.REQUEST_INVALID, text)
        record = encode(prop, desired.value)
        if not await self._holds(prop, desired.value):
            if prop.session == "default" and not prop.security:
                await self._client.write(prop.did, record)
            else:
                await self._write_privileged(prop, record)
        self._wishes[prop.name] = desired.value
        return await self._report(prop)

    async def _holds(self, prop: Property, value: JsonValue) -> bool:
        """Whether the device has it already, as far as it tells."""
        try:
            return holds(prop, await self._client.read(prop.did), value)
        except NegativeResponse:
            return False

    async def _write_privileged(self, prop: Property, record: bytes) -> None:
        """In a session that the polls for other properties must not keep alive: it is left again, and locked with it."""
        try:
            # whose answer is lost may be in it all the same
            await self._client.session(EXTENDED_SESSION)
            if prop.security:
                await self._access.unlock(self._config.security)
            await self._client.write(prop.did, record)
        finally:
            await self._client.session(DEFAULT_SESSION)

    async def _has_booted(self, deadline: float) -> bool:
        """Raises Transient for a silence beyond the deadline, or a lost bus."""
        try:
            return await self._version() is not None
        except NegativeResponse:
            return False
        except Transient as error:
            if error.reason is Reason.LINK_LOST or self._loop.time() > deadline:
                raise
            return False

    async def _version(self) -> str | None:
        """What runs; None where no application does. Raises NegativeResponse where it may tell later, and Transient."""
        record = await self._client.read_offered(self._config.version_did)
        return None if record is None else text_of(record)

    async def _polled(self, prop: Property) -> Reported | None:
        """What the device says; where it refuses to, or says what is no value of the type, a null in place of what it said
        before, and nothing from then on.

        It may not offer the property now, or in this session, and the others may be had. Each time is counted; it is logged
        once for each property and answer.
        """
        try:
            reported = await self._report(prop)
        except NegativeResponse as error:
            return self._untellable(prop, "property_refused", error.code, error.detail)
        except WrongType as error:
            return self._untellable(prop, "property_mistyped", None, error.detail)
        self._untold.discard(prop.name)
        return reported

    def _untellable(self, prop: Property, event: str, code: int | None, why: str) -> Reported | None:
        self._env.count(event)
        if (prop.name, code) not in self._complained:
            self._complained.add((prop.name, code))
            self._env.log.warning("property %s is not told: %s", prop.name, why)
        known = prop.name not in self._untold
        self._untold.add(prop.name)
        return Reported(prop.name, None, prop.unit or None) if known else None

    async def _report(self, prop: Property) -> Reported:
        """What the device says; the value that was desired, where that is what it has of it."""
        record = await self._client.read(prop.did)
        if prop.name in self._wishes and holds(prop, record, self._wishes[prop.name]):
            return Reported(prop.name, self._wishes[prop.name], prop.unit or None)
        return decode(prop, record)

    async def _read_text(self, did: int) -> str | None:
        """An identifier as text; None where there is none, or the device does not offer it now."""
        if not did:
            return None
        try:
            return text_of(await self._client.read(did))
        except NegativeResponse:
            return None

    async def _evidence_by(self, deadline: float, query: str) -> tuple[bool, str]:
        """As :meth:`_evidence`; a device that puts its answer off is not waited for beyond the deadline, but for one answer."""
        left_s = max(deadline - self._loop.time(), 2 * self._config.answer_s)
        try:
            async with asyncio.timeout(left_s):
                return await self._evidence(query)
        except TimeoutError:
            return False, f"{query}: no answer, the device asked for more time"

    async def _evidence(self, query: str) -> tuple[bool, str]:
        """Whether an identifier or a property says something, and what; else why it does not."""
        prop = next((each for each in self._config.properties if each.name == query), None)
        try:
            if prop is not None:
                return True, as_text(decode(prop, await self._client.read(prop.did)).value)
            return True, text_of(await self._client.read(_did(query)))
        except EdgedError as error:
            if isinstance(error, NegativeResponse | WrongType) or error.reason is Reason.NO_RESPONSE:
                return False, error.detail
            raise

    def _check_bounds(self, image: Image) -> None:
        base, size = self._device.flash_base, self._device.flash_size_bytes
        begin = min(segment.address for segment in image.segments)
        end = max(segment.address + segment.length for segment in image.segments)
        if begin < base:
            text = f"the image begins at {begin:#x}; {self._device.id} begins at {base:#x}"
            raise Permanent(Reason.IMAGE_TOO_LARGE, text)
        if size is not None and end > base + size:
            raise Permanent(
                Reason.IMAGE_TOO_LARGE,
                f"the image ends at {end:#x}; {self._device.id} ends at {base + size:#x}",
            )


class _Polls:
    """When each property is to be read."""

    def __init__(self, properties: tuple[Property, ...], now: Callable[[], float]) -> None:
        self._now = now
        self._polled = [prop for prop in properties if prop.poll_s]
        self._due = {prop.name: now() for prop in self._polled}

    def due(self) -> Property | None:
        """The one that is to be read now; it is due again after its interval."""
        now = self._now()
        for prop in sorted(self._polled, key=lambda each: self._due[each.name]):
            if self._due[prop.name] <= now:
                self._due[prop.name] = now + prop.poll_s
                return prop
        return None

    def wait_s(self) -> float | None:
        """Until one is due; None: never."""
        return max(0.0, min(self._due.values()) - self._now()) if self._due else None


async def _signals(config: UdsConfig, link: CanLink) -> Signals | None:
    """What the DBC file says, where there is one. Raises Permanent(CONFIG_INVALID), Permanent(UNSUPPORTED)."""
    if not config.dbc:
        return None
    names = config.signals, config.commands
    return await asyncio.to_thread(load, config.dbc, *names, config.signals_s, fd=link.bus.fd)


def _did(query: str) -> int:
    """A data identifier in hexadecimal digits. Raises Permanent(UNSUPPORTED)."""
    if re.fullmatch(r"(?:0[xX])?[0-9A-Fa-f]{1,4}", query):
        return int(query, 16)
    raise Permanent(
        Reason.UNSUPPORTED,
        f"health query {query!r}: neither a property nor a data identifier such as 'F189'",
    )
