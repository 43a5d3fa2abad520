"""One device that pulls its firmware: the server's side of ThingsBoard's device API, for whoever has the device's seat.

The device decides: it asks for chunks in its own order and size, checks the whole, installs and boots by itself, and then says
what it runs. So ``stage`` offers an image and is done when the device *runs* it; ``activate`` has nothing left to do. One slot,
not readable: the way back is to offer the former image.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
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
from edged.errors import EdgedError, Permanent, Reason, Refused, Transient
from edged_mqtt import thingsboard as tb
from edged_mqtt.config import MqttConfig
from edged_mqtt.news import News
from edged_mqtt.thingsboard import ChunkRequest, Download, Misbehaved, Numbers, Offer, Told, Values
from edged_mqtt.transfer import STREAM_BYTES, Peer, Transfer
from edged_mqtt.wire import Seat, Wire

CEILING_BYTES_PER_S: Final = 12_500_000.0
"""Ethernet of 100 Mbit/s: what is behind a socket nobody knows."""
MESSAGES_PER_S: Final = 50.0
MESSAGES_AT_ONCE: Final = 500.0
"""Messages of a device that are no requests for chunks."""
MESSAGE_BYTES: Final = 4096
MESSAGE_VALUES: Final = 100
"""A larger one, or one of more values, counts once more for each of these."""
EARLY_S: Final = 5.0
"""So long is an image awaited for a device that asks for chunks of none: after a cut it may go on before anybody looked."""
_EVIDENCE_CHARS: Final = 200
_BEGUN: Final = "begun"
"""Under which its note is kept over restarts."""
_NOTHING: Final = object()
"""No JSON value is equal to it."""


@dataclass(slots=True)
class Memory:
    """What is known of a device from one session to the next.

    ``values``: what it reported; ``client``: the names of those that were attributes; ``shared``: what it was given;
    ``numbers``: of its requests; ``early``: requests that came while nothing was offered; ``withdrawn``: the component of an
    offer that came to nothing, which it was not told yet; ``offer``, ``download``: what it is offered until that ends for
    good, and what it has had of it. ``note``: what is kept of that over restarts; None: nobody has looked.
    """

    told: Told = field(default_factory=Told)
    values: Values = field(default_factory=Values)
    client: set[str] = field(default_factory=set)
    shared: dict[str, JsonValue] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=Numbers)
    early: deque[ChunkRequest] = field(default_factory=deque)
    withdrawn: str = ""
    offer: Offer | None = None
    download: Download | None = None
    note: str | None = None

    def download_of(self, offer: Offer, rounds: int) -> Download:
        """Of what it is offered from now on."""
        if self.download is None or self.offer != offer:
            self.offer, self.download = offer, Download(offer.size_bytes, rounds)
        return self.download


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
        self._transfer: Transfer | None = None
        self._early_timer: asyncio.TimerHandle | None = None
        self._over: EdgedError | None = None
        self._proved: tuple[str | None, str | None] = None, None
        self._noticed: tuple[str | None, str | None] = None, None
        self._pending: dict[str, Reported] = {}
        self._report_news = News()
        self._news = News()
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
        seat.silence_s = self._config.silence_s
        if not seat.present:
            self._memory.early.clear()
        elif self._memory.early:
            self._await_offer()

    def over(self, fault: EdgedError) -> None:
        """See :class:`~edged_mqtt.wire.Guest`."""
        self._over = fault
        self._wake()

    def arrived(self) -> None:
        """See :class:`~edged_mqtt.wire.Guest`."""
        self._asked_version = False
        self._unoffered = 0
        self._memory.numbers.reconnected()
        self._forget_early()
        if self._transfer is not None:
            self._transfer.arrived()
        if self._memory.withdrawn:
            self.seat.tell(tb.ATTRIBUTES, tb.withdrawal(self._memory.withdrawn))
            self._memory.withdrawn = ""
        # another board may have been given the same credential
        self._values.forget(self._config.hardware_key)
        self._memory.client.discard(self._config.hardware_key)
        self._told.reconnected(self._loop.time())
        self._wake()

    def left(self, why: str) -> None:
        """See :class:`~edged_mqtt.wire.Guest`."""
        self._why_away = why
        self._forget_early()
        if self._transfer is not None:
            self._transfer.left(why)
        self._wake()

    def heard(self, topic: str, payload: bytes, meaning: object = None) -> bool:
        """See :class:`~edged_mqtt.wire.Guest`."""
        values = 0
        try:
            request = meaning if isinstance(meaning, ChunkRequest) else tb.chunk_request(topic, payload)
            if request is not None:
                transfer = self._transfer
                if transfer is None or transfer.is_over:
                    return self._not_offered(request)
                return transfer.wanted(request)
            values = self._said(topic, payload)
        except Misbehaved as exc:
            self._stop(exc)
        except ValueError:
            self._env.count("unreadable")
        return self._has_room(len(topic) + len(payload), values)

    def _wake(self) -> None:
        self._news.set()
        self._report_news.set()
        if self._transfer is not None:
            self._transfer.heard()

    def _not_offered(self, request: ChunkRequest) -> bool:
        """It goes on by itself after a cut, and will hear of the offer: one that asks on and on is stopped."""
        self._unoffered += 1
        if self._unoffered > tb.STRAY:
            raise Misbehaved("not_offered", "it asks for chunks and is offered nothing", "NOT_FOUND")
        self._memory.early.append(request)
        self._await_offer()
        return self._has_room(0)

    def _await_offer(self) -> None:
        if self._early_timer is None:
            self._early_timer = self._loop.call_later(EARLY_S, self._refuse_early)

    def _refuse_early(self) -> None:
        """There is nothing of what it asked for."""
        for request in self._memory.early:
            self._env.count("stray_request")
            self.seat.tell(f"v2/{request.component}/error", b"NOT_FOUND")
        self._forget_early()

    def _forget_early(self) -> None:
        self._memory.early.clear()
        self.close()

    def close(self) -> None:
        """The session ends: nothing happens any more by itself."""
        if self._early_timer is not None:
            self._early_timer.cancel()
            self._early_timer = None

    def _said(self, topic: str, payload: bytes) -> int:
        """A message that is no request for a chunk: how many values it reported. Raises ValueError where it cannot be read."""
        if topic in (tb.TELEMETRY, tb.ATTRIBUTES):
            samples = tb.reported(payload)
            for values in samples:
                self._reported(values, is_attribute=topic == tb.ATTRIBUTES)
            self._wake()
            return sum(map(len, samples))
        elif (number := tb.request_number(topic, tb.ATTRIBUTES_REQUEST)) is not None:
            offered = self._transfer.offer.attributes if self._transfer else {}
            client = {name: self._values[name] for name in self._memory.client}
            answer = tb.attributes_answer(payload, client, {**self._memory.shared, **offered})
            self.seat.tell(tb.ATTRIBUTES_RESPONSE + number, answer)
        elif (number := tb.request_number(topic, tb.RPC_REQUEST)) is not None:
            self.seat.tell(tb.RPC_RESPONSE + number, tb.rpc_answer(payload))
        return 0

    def _reported(self, values: Mapping[str, JsonValue], *, is_attribute: bool) -> None:
        now = self._loop.time()
        fitting = {name: value for name, value in values.items() if tb.fits(name, value)}
        for _ in range(len(values) - len(fitting)):
            self._env.count("too_large")
        self._told.take(self._config.component, fitting, now)
        for name, value in fitting.items():
            if not self._values.put(name, value, now):
                self._env.count("too_many_names")
                continue
            self._pending[name] = Reported(name, value, self._config.units.get(name))
            if is_attribute:
                self._memory.client.add(name)

    def _has_room(self, size: int, values: int = 0) -> bool:
        """Whether the device may send more at once after a message of ``size`` bytes, which reported so many ``values``; where
        not, it is read again when it may."""
        now, cost = self._loop.time(), 1 + size // MESSAGE_BYTES + values // MESSAGE_VALUES
        self._tokens = min(MESSAGES_AT_ONCE, self._tokens + (now - self._filled_at) * MESSAGES_PER_S) - cost
        self._filled_at = now
        if self._tokens >= 0:
            return True
        self._env.count("slowed_down")
        self._loop.call_later(-self._tokens / MESSAGES_PER_S, self.seat.more)
        return False

    def _stop(self, misbehaved: Misbehaved) -> None:
        """Tell the client why, and end its connection, as ThingsBoard does; and what it was given."""
        if self._transfer is not None:
            self._transfer.stopped(misbehaved)
        self._env.count(misbehaved.event)
        self.seat.tell(f"v2/{self._config.component}/error", misbehaved.answer.encode())
        self.seat.expel(str(misbehaved))

    # -- edged.api.Session

    async def awaited(self) -> None:
        """Wait for the device, as long as it takes. Raises what the wire ended with."""
        if not self.seat.present and self._over is None:
            with self._env.away(f"{self._device.id}: {self._why_away}"):
                while not self.seat.present and self._over is None:
                    await self._report_news.wait(None)
        if self._over is not None:
            raise self._over

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
            hardware_id = as_text(self._values[key])
        return Identity(hardware_id, self._name, {"protocol": "thingsboard"})

    async def reports(self) -> AsyncIterator[Reported]:
        """Telemetry and attributes, the newest value of each."""
        while True:
            await self.awaited()
            while self._pending:
                yield self._pending.pop(next(iter(self._pending)))
            self._begin_anew_if_another()
            await self._report_news.wait(None)

    def _begin_anew_if_another(self) -> None:
        """Behind a broker nobody sees that a device was replaced, or went back: what it says that it runs tells it, once."""
        told = self._told
        said = told.title, told.version
        if self._transfer is None and told.version is not None and self._is_another and said != self._noticed:
            self._noticed = said
            with self._env.away(
                f"{self._device.id}: it says that it runs {told.title} {told.version} by now"
            ):
                pass

    # -- edged.api.SupportsDesired

    def offer(self, desired: Sequence[Desired]) -> None:
        """What the device is answered that asks for its shared attributes."""
        self._memory.shared = {
            one.name: one.value
            for one in desired
            if one.value is not None and not tb.tells_of_an_image(one.name)
        }

    async def apply(self, desired: Desired) -> Reported:
        """Give a shared attribute. What the device reports under the same name within ``confirm_s`` is what it has; one that
        does not answer has what it was given. One that is taken back is deleted, and what the device said last is what it has.

        Raises Transient(DEVICE_ERROR) where it says what it said before: it may not have heard, or not want it;
        Permanent(REQUEST_INVALID) for one that would offer it an image.
        """
        if tb.tells_of_an_image(desired.name):
            text = f"{desired.name!r} would offer firmware that nobody verified; that comes with a release, by edged deploy"
            raise Permanent(Reason.REQUEST_INVALID, text)
        self._require()
        name, begun = desired.name, self._loop.time()
        if desired.value is None:
            self._memory.shared.pop(name, None)
            await self.seat.send(tb.ATTRIBUTES, tb.deleted(name))
            return Reported(name, self._values.get(name), self._config.units.get(name))
        before = self._values.get(name, _NOTHING)
        self._memory.shared[name] = desired.value
        await self.seat.send(tb.ATTRIBUTES, tb.encoded({name: desired.value}))
        deadline = begun + self._config.confirm_s
        while (said := self._said_since(begun, name)) != desired.value and self._loop.time() < deadline:
            if not await self._news.wait(deadline):
                break
        if said is _NOTHING:
            return Reported(name, desired.value, self._config.units.get(name))
        if said == before != desired.value:
            raise Transient(
                Reason.DEVICE_ERROR, f"{self._device.id}: {name} is {as_text(self._values[name])} still"
            )
        return Reported(name, self._values[name], self._config.units.get(name))

    def _said_since(self, begun: float, name: str) -> object:
        """What the device reported under ``name`` since then."""
        return self._values[name] if self._values.told_at(name) > begun else _NOTHING

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
            self._learn_title()
            if self._values.told_at(check.query) >= told.since and not self._is_another:
                seen = f"{check.query}={as_text(self._values[check.query])}"[:_EVIDENCE_CHARS]
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
        """Whether the device does not say (any more) that it runs what it ran when it was last looked at. Its title may come in
        a message of its own, after the version: without one it is no other."""
        (title, version), told = self._proved, self._told
        if version is None:
            return False
        return told.version != version or (None not in (title, told.title) and told.title != title)

    def _learn_title(self) -> None:
        """One that it had not said yet when it was last looked at."""
        title, version = self._proved
        if title is None and version is not None and not self._is_another:
            self._proved = self._told.title, version

    # -- edged.api.SupportsFirmware

    async def slots(self) -> Slots:
        """What the device says that it runs; None where it does not say it within ``report_s``, or says at once that it runs
        what it was offered last and that it failed to install it. So long it is awaited, too,
        where it says that it may run something else any time: a word that was late is followed by another.

        Raises Transient(DEVICE_ABSENT), also where it says so still: it has ``install_s`` from when it said so first. The first
        look of a session, by which it is attached, is not put off for so long.
        """
        self._require()
        if self._told.is_booting or (self._told.version is None and not self._asked_version):
            await self._until_told()
            self._asked_version = True
            self._require()
            if self._proved[1] is not None:
                self._require_booted()
        told, title = self._told, self._config.title
        self._proved = told.title, told.version
        name = None if title and told.title in (None, title) else told.title
        runs = None if told.contradicts else told.version
        return Slots((Slot(name="firmware", active=True, runs=runs, runs_name=name),))

    def _require_booted(self) -> None:
        told, install_s = self._told, self._config.install_s
        since = told.boots_since
        if since is not None and told.state in tb.BOOTING and self._loop.time() < since + install_s:
            text = f"it says {told.state}; what it runs then is awaited for {install_s:g} s"
            raise Transient(Reason.DEVICE_ABSENT, f"{self._device.id}: {text}")

    async def stage(self, image: Image, progress: Progress) -> None:
        """Offer ``image`` and serve it, until the device says that it runs it.

        Raises Permanent: UNSUPPORTED for an image that is no single piece or has no name; VERIFY_FAILED where the device
        found it broken; DEVICE_ERROR where it misbehaves; DEVICE_REVERTED where it runs another one afterwards. Transient:
        DEVICE_ABSENT where it left, NO_RESPONSE where it is silent. An image that is not given in the end is withdrawn.
        """
        offer = await self._offer_of(image)
        self._require()
        download = self._memory.download_of(offer, self._config.rounds)
        if await self._runs_already(offer):
            self.seat.tell(tb.ATTRIBUTES, tb.withdrawal(offer.component))
            return
        early = self._early_of(offer)
        transfer = self._transfer = Transfer(self._peer, offer, image, progress, download, early)
        self._told.offered(offer.version)
        self._unoffered = 0
        is_given = is_tried_again = False
        try:
            if not early:
                transfer.require_round()
                await self.seat.send(tb.ATTRIBUTES, tb.encoded(offer.attributes))
            self._memory.withdrawn = ""
            await transfer.run()
            is_given = True
            self._memory.download = None
            self._proved = self._told.title, self._told.version
        except Transient:
            is_tried_again = True
            raise
        except (Permanent, Refused):
            self._memory.download = None
            raise
        finally:
            self._transfer = None
            transfer.close()
            if not is_given:
                self._withdraw(offer, is_tried_again=is_tried_again)

    @property
    def _peer(self) -> Peer:
        return Peer(
            self._device.id,
            self._config,
            self.seat,
            self._told,
            self._memory.numbers,
            self._env.count,
            self._stop,
            self._note,
        )

    async def recall(self) -> None:
        """What the device was in the middle of before this node was started, once."""
        if self._memory.note is not None:
            return
        self._memory.note = ""
        try:
            if note := await self._env.recall(_BEGUN):
                self._memory.note = note
                self._memory.numbers.recall(note)
        except EdgedError as error:
            self._env.log.warning("what the device has begun is not known", extra={"detail": str(error)})

    async def _note(self, note: str) -> None:
        if note == self._memory.note:
            return
        self._memory.note = note
        try:
            await self._env.remember(_BEGUN, note)
        except EdgedError as error:
            text = "after a restart of this node the device has to begin anew"
            self._env.log.warning(text, extra={"detail": str(error)})

    def _early_of(self, offer: Offer) -> list[ChunkRequest]:
        """What the device asked for that is in the middle of this image: a new offer would make it begin anew, and take the
        chunk that it waits for as the first one. Empty where it is not."""
        early, numbers = list(self._memory.early), self._memory.numbers
        if not all(numbers.stood_for(request.number, offer) for request in early):
            self._refuse_early()
            return []
        self._forget_early()
        return early

    def _withdraw(self, offer: Offer, *, is_tried_again: bool) -> None:
        """Tell that the image is not offered any more: at once, or where the job is over when the device is back. One of which
        nobody knows what it boots has to come anew, and say what it runs."""
        if self.seat.present:
            self.seat.tell(tb.ATTRIBUTES, tb.withdrawal(offer.component))
            self._memory.numbers.withdrawn()
            if self._told.is_unsure:
                self.seat.dismiss("it has to say anew what it runs")
        elif not is_tried_again:
            self._memory.withdrawn = offer.component

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
        """Until the device has said what it runs, and is not about to boot another, ``report_s`` at most."""
        deadline = self._loop.time() + self._config.report_s
        while (self._told.version is None or self._told.is_booting) and self.seat.present:
            if not await self._news.wait(deadline):
                return

    def _require(self) -> None:
        if self._over is not None:
            raise self._over
        if not self.seat.present:
            raise Transient(Reason.DEVICE_ABSENT, f"{self._device.id}: {self._why_away}")
