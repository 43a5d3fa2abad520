"""One device that pulls its firmware: the server's side of ThingsBoard's device API, for whoever has the device's seat.

The device decides: it asks for chunks in its own order and size, checks the whole, installs and boots by itself, and then says
what it runs. So ``stage`` offers an image and is done when the device *runs* it; ``activate`` has nothing left to do. One slot,
not readable: the way back is to offer the former image.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
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
    Phase,
    Progress,
    Reported,
    SessionTraits,
    Slot,
    Slots,
)
from edged.errors import Permanent, Reason, Transient
from edged_mqtt import thingsboard as tb
from edged_mqtt.config import MqttConfig
from edged_mqtt.thingsboard import ChunkRequest, Download, Misbehaved, Offer, Told
from edged_mqtt.wire import Seat, Wire

CEILING_BYTES_PER_S: Final = 12_500_000.0
"""Ethernet of 100 Mbit/s: what is behind a socket nobody knows."""
STREAM_BYTES: Final = 256 * 1024
"""A chunk that is larger goes out in parts, so that it is never in memory whole."""
MOST_REQUESTS: Final = 32
"""Requests for chunks that wait; a device that sends more is not read until some are answered."""
MOST_NUMBERS: Final = 64
MOST_PENDING: Final = 256
MESSAGES_PER_S: Final = 50.0
MESSAGES_AT_ONCE: Final = 500.0
"""Messages of a device that are no requests for chunks."""
AFTER_FAILURE_S: Final = 10.0
"""So long may a device that reports FAILED take to begin anew."""
BOOT_S: Final = 60.0
"""So long its return is awaited in place; after that the job waits for it, and others have its turn."""
_EVIDENCE_CHARS: Final = 200


class _News:
    """That something happened, for one who waits for it: an event with a deadline, without a task or a context for each wait,
    of which there is one for every chunk."""

    __slots__ = ("_loop", "_there", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._there = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        self._there = True
        if self._waiter is not None:
            _end(self._waiter)

    async def wait(self, deadline: float | None) -> bool:
        """Wait for the next news; False where the deadline came first. News that came before the call count."""
        if not self._there:
            waiter = self._waiter = self._loop.create_future()
            timer = None if deadline is None else self._loop.call_at(deadline, _end, waiter)
            try:
                await waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()
        there, self._there = self._there, False
        return there


def _end(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


@dataclass(slots=True)
class Memory:
    """What is known of a device from one session to the next. ``values``: what it reported, and when; ``client``: which of that
    were attributes; ``shared``: what it was given."""

    told: Told = field(default_factory=Told)
    values: dict[str, tuple[float, JsonValue]] = field(default_factory=dict)
    client: dict[str, JsonValue] = field(default_factory=dict)
    shared: dict[str, JsonValue] = field(default_factory=dict)


class MqttSession:
    """See :class:`edged.api.Session` and the ``Supports...`` Protocols for the contract, and
    :class:`~edged_mqtt.wire.Guest` for what the wire calls."""

    seat: Seat

    def __init__(self, device: Device, name: str, config: MqttConfig, wire: Wire, env: Env) -> None:
        self._device = device
        self._name = name
        self._config = config
        self._env = env
        self._loop = asyncio.get_running_loop()
        memory = wire.memory(name).setdefault("device", Memory())
        assert isinstance(memory, Memory)
        self._memory = memory
        self._told, self._values = memory.told, memory.values
        self._offer: Offer | None = None
        self._requests: deque[tuple[ChunkRequest, bool]] = deque()
        self._ahead: tuple[ChunkRequest, bytes] | None = None
        self._full = False
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._pins: OrderedDict[str, Offer] = OrderedDict()
        self._proved: tuple[str | None, str | None] = None, None
        self._pending: dict[str, Reported] = {}
        self._report_news = _News()
        self._news = _News()
        self._arrivals = 0
        self._asked_version = False
        self._unoffered = 0
        self._why_away = "it has not connected yet"
        self._tokens, self._filled_at = MESSAGES_AT_ONCE, self._loop.time()
        self.traits = SessionTraits(
            ceiling_bytes_per_s=CEILING_BYTES_PER_S,
            concurrent=True,
            quiet_s=config.silence_s + config.install_s + config.report_s,
        )

    # -- edged_mqtt.wire.Guest

    def seated(self, seat: Seat) -> None:
        """See :class:`~edged_mqtt.wire.Guest`."""
        self.seat = seat

    def arrived(self) -> None:
        """See :class:`~edged_mqtt.wire.Guest`."""
        self._arrivals += 1
        self._asked_version = False
        self._unoffered = 0
        self._sizes.clear()
        self._pins.clear()
        self._requests.clear()
        self._ahead = None
        # another board may have been given the same credential
        self._values.pop(self._config.hardware_key, None)
        self._told.reconnected(self._loop.time())
        self._wake()

    def left(self, why: str) -> None:
        """See :class:`~edged_mqtt.wire.Guest`."""
        self._why_away = why
        self._requests.clear()
        self._ahead = None
        self._full = False
        self._wake()

    def heard(self, topic: str, payload: bytes) -> bool:
        """See :class:`~edged_mqtt.wire.Guest`."""
        try:
            request = tb.chunk_request(topic, payload)
            if request is not None:
                return self._wanted(request)
            self._said(topic, payload)
        except Misbehaved as exc:
            self._stop(exc)
        except ValueError:
            self._env.count("unreadable")
        return self._has_room()

    def _wake(self) -> None:
        self._news.set()
        self._report_news.set()

    def _wanted(self, request: ChunkRequest) -> bool:
        if self._offer is None:
            return self._not_offered(request)
        ahead, self._ahead = self._ahead, None
        given = (
            ahead is not None
            and not self._requests
            and ahead[0] == request
            and self.seat.send_now(request.answer_topic, ahead[1])
        )
        self._requests.append((request, given))
        self._news.set()
        self._full = len(self._requests) >= MOST_REQUESTS
        return not self._full

    def _not_offered(self, request: ChunkRequest) -> bool:
        """It goes on by itself after a cut, and will hear of the offer: one that asks on and on is stopped."""
        self._unoffered += 1
        if self._unoffered > tb.STRAY:
            raise Misbehaved("not_offered", "it asks for chunks and is offered nothing", "NOT_FOUND")
        self._env.count("stray_request")
        self.seat.tell(f"v2/{request.component}/error", b"NOT_FOUND")
        return self._has_room()

    def _said(self, topic: str, payload: bytes) -> None:
        """A message that is no request for a chunk. Raises ValueError where it cannot be read."""
        if topic in (tb.TELEMETRY, tb.ATTRIBUTES):
            self._reported(dict(tb.reported(payload)), is_attribute=topic == tb.ATTRIBUTES)
        elif (number := tb.request_number(topic, tb.ATTRIBUTES_REQUEST)) is not None:
            offered = self._offer.attributes if self._offer else {}
            answer = tb.attributes_answer(payload, self._memory.client, {**self._memory.shared, **offered})
            self.seat.tell(tb.ATTRIBUTES_RESPONSE + number, answer)
        elif (number := tb.request_number(topic, tb.RPC_REQUEST)) is not None:
            self.seat.tell(tb.RPC_RESPONSE + number, tb.rpc_answer(payload))

    def _reported(self, values: Mapping[str, JsonValue], *, is_attribute: bool) -> None:
        now = self._loop.time()
        self._told.take(self._config.component, values, now)
        for name, value in values.items():
            if name not in self._values and len(self._values) >= MOST_PENDING:
                self._env.count("too_many_names")
                continue
            self._values[name] = (now, value)
            self._pending[name] = Reported(name, value, self._config.units.get(name))
            if is_attribute:
                self._memory.client[name] = value
        self._wake()

    def _has_room(self) -> bool:
        """Whether the device may send more at once; where not, it is read again when it may."""
        now = self._loop.time()
        self._tokens = min(MESSAGES_AT_ONCE, self._tokens + (now - self._filled_at) * MESSAGES_PER_S) - 1
        self._filled_at = now
        if self._tokens >= 0:
            return True
        self._env.count("slowed_down")
        self._loop.call_later(-self._tokens / MESSAGES_PER_S, self.seat.more)
        return False

    def _stop(self, misbehaved: Misbehaved) -> None:
        """Tell the client why, and end its connection, as ThingsBoard does."""
        self._env.count(misbehaved.event)
        self.seat.tell(f"v2/{self._config.component}/error", misbehaved.answer.encode())
        self.seat.expel(str(misbehaved))

    # -- edged.api.Session

    async def awaited(self) -> None:
        """Wait for the device, as long as it takes."""
        if not self.seat.present:
            with self._env.away(f"{self._device.id}: {self._why_away}"):
                while not self.seat.present:
                    await self._report_news.wait(None)

    async def identify(self) -> Identity:
        """Whose credential it is; with ``hardware_key``, what the device says in that attribute.

        Raises Transient: DEVICE_ABSENT, or NO_RESPONSE where the attribute does not come.
        """
        self._require()
        hardware_id = f"credential:{self._name}"
        if key := self._config.hardware_key:
            deadline = self._loop.time() + self._config.report_s
            while key not in self._values:
                if not await self._news.wait(deadline):
                    text = f"{self._device.id} did not say its {key} within {self._config.report_s:g} s"
                    raise Transient(Reason.NO_RESPONSE, text)
                self._require()
            hardware_id = _text(self._values[key][1])
        return Identity(hardware_id, self._name, {"protocol": "thingsboard"})

    async def reports(self) -> AsyncIterator[Reported]:
        """Telemetry and attributes, the newest value of each."""
        while True:
            await self.awaited()
            while self._pending:
                yield self._pending.pop(next(iter(self._pending)))
            await self._report_news.wait(None)

    # -- edged.api.SupportsDesired

    async def apply(self, desired: Desired) -> Reported:
        """Give a shared attribute. What the device reports under the same name within ``confirm_s`` is what it has; one that
        does not answer has what it was given."""
        self._require()
        begun = self._loop.time()
        self._memory.shared[desired.name] = desired.value
        await self.seat.send(tb.ATTRIBUTES, tb.encoded({desired.name: desired.value}))
        deadline = begun + self._config.confirm_s
        value = desired.value
        while self._loop.time() < deadline:
            told_at, told = self._values.get(desired.name, (0.0, None))
            if told_at > begun:
                value = told
                if told == desired.value:
                    break
            if not await self._news.wait(deadline):
                break
        return Reported(desired.name, value, self._config.units.get(desired.name))

    # -- edged.api.SupportsHealth

    async def check_health(self, check: HealthCheck) -> Health:
        """``property``: what the device reports as ``query``, since it said that it runs the image; on each connection anew.

        Raises Permanent(UNSUPPORTED) for another kind of check, Transient(NO_RESPONSE) where it is there, and has not said
        again what it runs.
        """
        if check.kind != "property":
            raise Permanent(Reason.UNSUPPORTED, f"health check {check.kind!r}; known: property")
        pattern, deadline, seen = re.compile(check.pattern), self._loop.time() + check.timeout_s, ""
        while True:
            told = self._told
            if told.version is not None and self._is_another:
                return Health(False, f"it runs {told.title} {told.version} by now"[:_EVIDENCE_CHARS])
            at, value = self._values.get(check.query, (-1.0, None))
            if at >= told.since and not self._is_another:
                seen = f"{check.query}={_text(value)}"[:_EVIDENCE_CHARS]
                if pattern.search(seen):
                    return Health(True, seen)
            if not await self._news.wait(deadline):
                break
        if self._is_another and self.seat.present:
            text = f"{self._device.id} came back, and did not say what it runs"
            raise Transient(Reason.NO_RESPONSE, text)
        return Health(False, seen)

    @property
    def _is_another(self) -> bool:
        """Whether the device does not say (any more) that it runs what it ran when it was last looked at."""
        return self._proved[1] is not None and (self._told.title, self._told.version) != self._proved

    # -- edged.api.SupportsFirmware

    async def slots(self) -> Slots:
        """What the device says that it runs; None where it does not say it within ``report_s``.

        Raises Transient(DEVICE_ABSENT).
        """
        self._require()
        if self._told.version is None and not self._asked_version:
            await self._until_told()
            self._asked_version = True
            self._require()
        told, title = self._told, self._config.title
        self._proved = told.title, told.version
        name = None if title and told.title in (None, title) else told.title
        return Slots((Slot(name="firmware", active=True, runs=told.version, runs_name=name),))

    async def stage(self, image: Image, progress: Progress) -> None:
        """Offer ``image`` and serve it, until the device says that it runs it.

        Raises Permanent: UNSUPPORTED for an image that is no single piece or has no name; VERIFY_FAILED where the device
        found it broken; DEVICE_ERROR where it misbehaves; DEVICE_REVERTED where it runs another one afterwards. Transient:
        DEVICE_ABSENT where it left, NO_RESPONSE where it is silent. An image that is not given in the end is withdrawn.
        """
        offer = await self._offer_of(image)
        self._require()
        if await self._runs_already(offer):
            self.seat.tell(tb.ATTRIBUTES, tb.withdrawal(offer.component))
            return
        transfer = _Transfer(self, offer, image, progress)
        self._offer = offer
        self._told.offered()
        self._requests.clear()
        self._ahead = None
        is_given = False
        try:
            await self.seat.send(tb.ATTRIBUTES, tb.encoded(offer.attributes))
            await transfer.run()
            is_given = True
        finally:
            if not is_given:
                self.seat.tell(tb.ATTRIBUTES, tb.withdrawal(offer.component))
            self._offer = None
            self._requests.clear()
            self._ahead = None
            self._make_room()

    async def activate(self) -> None:
        """Nothing: the device booted it by itself, or ``stage`` would not have ended."""

    async def _offer_of(self, image: Image) -> Offer:
        if image.label is None:
            raise Permanent(Reason.UNSUPPORTED, "an image without a name and a version cannot be offered")
        if len(image.segments) != 1:
            text = f"the image has {len(image.segments)} segments; a device that pulls can be offered one"
            raise Permanent(Reason.UNSUPPORTED, text)
        found = tb.checksum(self._config.checksum)
        size = image.size_bytes
        for offset in range(0, size, STREAM_BYTES):
            found.update(await image.read(0, offset, min(STREAM_BYTES, size - offset)))
        title = self._config.title or image.label.name
        return Offer(
            self._config.component,
            title,
            image.label.identifies_as,
            size,
            found.hexdigest(),
            self._config.checksum,
        )

    async def _runs_already(self, offer: Offer) -> bool:
        """Whether there is nothing to send: asked of a device that said what it runs, and is not about to boot another."""
        if self._told.version is None:
            await self._until_told()
        deadline = self._loop.time() + self._config.install_s
        while self._told.is_booting:
            if not await self._news.wait(deadline):
                break
            self._require()
        return self._told.runs(offer)

    async def _until_told(self) -> None:
        """Until the device has said what it runs, ``report_s`` at most."""
        deadline = self._loop.time() + self._config.report_s
        while self._told.version is None and self.seat.present:
            if not await self._news.wait(deadline):
                return

    def _require(self) -> None:
        if not self.seat.present:
            raise Transient(Reason.DEVICE_ABSENT, f"{self._device.id}: {self._why_away}")

    def _make_room(self) -> None:
        if self._full:
            self._full = False
            self.seat.more()


class _Transfer:
    """One image on its way to one device, from the offer to the device's word that it runs it."""

    def __init__(self, session: MqttSession, offer: Offer, image: Image, progress: Progress) -> None:
        self._session = session
        self._offer = offer
        self._image = image
        self._progress = progress
        self._config = session._config
        self._device = session._device.id
        self._told = session._told
        self._loop = asyncio.get_running_loop()
        self._download = Download(offer.size_bytes, self._config.rounds)
        self._news = self._told.news
        self._failures = self._failed_before = self._told.failures
        self._moved_at = self._loop.time()
        self._whole_at: float | None = None
        self._failed_at: float | None = None
        self._left_at: float | None = None
        self._updated_at: float | None = None

    async def run(self) -> None:
        """Until the device runs the image. Raises as :meth:`MqttSession.stage`."""
        session = self._session
        self._progress(Phase.WRITE, 0, self._offer.size_bytes)
        while not self._is_done():
            if session._requests:
                request, given = session._requests.popleft()
                if not session._requests:
                    session._make_room()
                await self._answer(request, given=given)
            else:
                await self._wait()

    # -- what the device says

    def _is_done(self) -> bool:
        """Judge what the device said since the last look."""
        told = self._told
        if told.news == self._news:
            return False
        self._news = told.news
        self._moved_at = self._loop.time()
        if told.runs(self._offer):
            self._session._proved = told.title, told.version
            self._progress(Phase.VERIFY, self._offer.size_bytes, self._offer.size_bytes)
            return True
        if told.failures > self._failures:
            self._failed()
        if told.state in tb.BOOTING:
            self._has_all()
        elif self._whole_at is not None and (told.state == tb.UPDATED or self._updated_at is not None):
            if told.names_version and told.version is not None:
                raise self._is_wrong()
            # its version may come in a message of its own
            self._updated_at = self._updated_at or self._loop.time()
        return False

    def _is_wrong(self) -> Permanent:
        self._session._env.count("wrong_version")
        text = f"it says {tb.UPDATED} and runs {self._told.title} {self._told.version}"
        return Permanent(Reason.DEVICE_REVERTED, f"{self._device}: {text}, not {self._wanted}")

    @property
    def _wanted(self) -> str:
        return f"{self._offer.title} {self._offer.version}"

    def _has_all(self) -> None:
        if self._whole_at is None:
            self._whole_at = self._loop.time()
        self._download.finished()
        self._progress(Phase.WRITE, self._offer.size_bytes, self._offer.size_bytes)
        self._progress(Phase.VERIFY, 0, self._offer.size_bytes)

    def _failed(self) -> None:
        self._session._env.count("device_failed")
        self._failures = self._told.failures
        self._whole_at = self._updated_at = None
        self._failed_at = self._loop.time() if self._told.state == tb.FAILED else None
        if self._failures - self._failed_before >= self._config.rounds:
            raise self._broken()

    def _broken(self) -> Permanent:
        text = f"it says {tb.FAILED}: {self._told.error[:_EVIDENCE_CHARS]!r}, {self._failures - self._failed_before} times"
        return Permanent(Reason.VERIFY_FAILED, f"{self._device}: {text}")

    # -- what it asks for

    async def _answer(self, request: ChunkRequest, *, given: bool) -> None:
        """Give what is asked for. ``given``: it was ready, and the device has it already."""
        self._moved_at = self._loop.time()
        self._failed_at = None
        try:
            size = self._size_of(request)
            if size is None:
                return
            offset = request.index * size
            length = max(0, min(size, self._offer.size_bytes - offset))
            self._check_size(length)
            if self._download.ask(offset, length):
                self._whole_at = self._updated_at = None
        except Misbehaved as exc:
            self._session._stop(exc)
            raise Permanent(Reason.DEVICE_ERROR, f"{self._device}: {exc}") from exc
        self._progress(Phase.WRITE, self._download.acknowledged_bytes, self._offer.size_bytes)
        if given:
            self._account(offset, length)
        else:
            await self._send(request, offset, length)
        await self._get_ready(request, offset + size, size)

    async def _get_ready(self, request: ChunkRequest, offset: int, size: int) -> None:
        """Read the chunk that most devices ask for next, while the device is at the one that it was given."""
        length = min(size, self._offer.size_bytes - offset)
        if 0 < length <= STREAM_BYTES and not self._session._requests:
            session, arrivals = self._session, self._session._arrivals
            data = await self._image.read(0, offset, length)
            if session._arrivals == arrivals:
                session._ahead = (replace(request, index=request.index + 1), data)

    def _size_of(self, request: ChunkRequest) -> int | None:
        """The size of the chunks that are asked for under the request's number: as it says, else as it said, else the whole
        image. None where the number is another image's. Raises :class:`Misbehaved`."""
        session = self._session
        pinned = session._pins.setdefault(request.number, self._offer)
        if request.component != self._offer.component or pinned != self._offer:
            self._download.stray(f"v2/{request.component} under number {request.number}")
            session._env.count("stray_request")
            session.seat.tell(f"v2/{request.component}/error", b"NOT_FOUND")
            return None
        size = request.size_bytes or session._sizes.get(request.number) or self._offer.size_bytes
        if request.size_bytes:
            session._sizes[request.number] = size
        for kept in (session._sizes, session._pins):
            while len(kept) > MOST_NUMBERS:
                kept.popitem(last=False)
        return size

    def _check_size(self, length: int) -> None:
        allowed = self._session.seat.largest_bytes
        if self._config.largest_chunk_bytes:
            allowed = min(allowed, self._config.largest_chunk_bytes)
        if length > allowed:
            text = f"it asked for {length} bytes at once; allowed: {allowed}"
            raise Misbehaved("payload_too_large", text, "PAYLOAD_TOO_LARGE")

    async def _send(self, request: ChunkRequest, offset: int, length: int) -> None:
        seat, topic = self._session.seat, request.answer_topic
        try:
            if length > STREAM_BYTES:
                await seat.stream(topic, length, self._parts(offset, length))
            else:
                await seat.send(topic, await self._image.read(0, offset, length) if length else b"")
        except Transient as exc:
            if exc.reason is Reason.LINK_LOST:
                return  # it left; the next look says so
            raise
        self._account(offset, length)

    def _account(self, offset: int, length: int) -> None:
        """The device was sent ``length`` bytes."""
        self._moved_at = self._loop.time()
        self._download.sent(offset, length)
        if self._whole_at is None and self._download.is_whole:
            self._whole_at = self._loop.time()
            self._told.awaits = self._offer.version

    async def _parts(self, offset: int, length: int) -> AsyncIterator[bytes]:
        for at in range(offset, offset + length, STREAM_BYTES):
            yield await self._image.read(0, at, min(STREAM_BYTES, offset + length - at))
            self._moved_at = self._loop.time()

    # -- silence

    async def _wait(self) -> None:
        """For the next news; raises where it has been silent for too long."""
        session = self._session
        if session.seat.present:
            self._left_at = None
        elif self._whole_at is None:
            at = self._download.acknowledged_bytes
            text = f"{session._why_away}, with {at} of {self._offer.size_bytes} bytes"
            raise Transient(Reason.DEVICE_ABSENT, f"{self._device}: {text}")
        elif self._left_at is None:
            self._left_at = self._loop.time()
        if not await session._news.wait(self._deadline()):
            self._give_up()

    def _deadline(self) -> float:
        if self._left_at is not None:
            return self._left_at + BOOT_S
        if self._failed_at is not None:
            return self._failed_at + min(AFTER_FAILURE_S, self._config.silence_s)
        if self._updated_at is not None:
            return self._updated_at + self._config.report_s
        if self._whole_at is not None:
            return self._whole_at + self._config.install_s
        return self._moved_at + self._config.silence_s

    def _give_up(self) -> None:
        if self._left_at is not None:
            text = "it has the image whole, left, and is not back yet"
            raise Transient(Reason.DEVICE_ABSENT, f"{self._device}: {text}")
        if self._failed_at is not None:
            raise self._broken()
        if self._updated_at is not None:
            raise self._is_wrong()
        if self._whole_at is not None:
            runs = f"{self._told.title} {self._told.version}"
            text = f"it runs {runs} still {self._config.install_s:g} s after it had {self._wanted} whole"
            raise Permanent(Reason.DEVICE_REVERTED, f"{self._device}: {text}")
        self._session._env.count("silent")
        if not self._download.sent_bytes:
            # one that sleeps and one that is not interested look alike, on any wire
            raise Transient(Reason.DEVICE_ABSENT, f"{self._device}: it does not ask for what it is offered")
        at = self._download.acknowledged_bytes
        text = f"silent for {self._config.silence_s:g} s, with {at} of {self._offer.size_bytes} bytes"
        raise Transient(Reason.NO_RESPONSE, f"{self._device}: {text}")


def _text(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
