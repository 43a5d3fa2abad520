"""Devices on a broker: one connection of this node, each device's topics below a prefix of its own.

A broker tells neither who sent a message nor who is there: that a device writes only below its own prefix is the broker's to
enforce (docs/mqtt.md has a list for mosquitto), and a device that is silent is not known to be gone. All of aiomqtt is here.

One task reads the connection for as long as it lives: an iterator that is cancelled loses a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import ssl
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from edged.api import Env
from edged.errors import Permanent, Reason, Transient
from edged_mqtt.config import BrokerAddress, BrokerConfig
from edged_mqtt.thingsboard import SUBSCRIBED
from edged_mqtt.tls import client_context
from edged_mqtt.wire import Credential, Guest

CONNECT_S: Final = 10.0
FAREWELL_S: Final = 2.0
SESSION_S: Final = 86_400
"""So long the broker keeps what devices say while this node is away."""
FIRST_RETRY_S: Final = 0.5
LONGEST_RETRY_S: Final = 30.0
LARGE_BYTES: Final = 1024 * 1024
"""A message to a device goes through memory whole: of those that are larger there is one at a time."""
SLOWEST_BYTES_PER_S: Final = 100_000
"""So fast at least must the broker take it."""
MOST_INCOMING: Final = 16_384
"""So many messages wait to be given to the seats at most: what a broker kept of a fleet comes at once."""
STEADY_S: Final = 30.0
"""A connection that lasted so long was a good one: two nodes with one ``client_id`` throw each other out at once."""
MOST_OUTGOING: Final = 256
"""So many messages wait for the broker at most."""
LARGEST_HEARD_BYTES: Final = 128 * 1024
"""A message of a device, as at the node's own endpoint."""
MOST_RESTING: Final = 256
MOST_RESTING_BYTES: Final = 1024 * 1024
"""Messages of one device that wait for its session; what comes beyond is lost, as if the network had lost it."""
HELD_S: Final = 60.0
"""What a device says while no session has its seat waits for one so long: what a broker kept comes before the sessions do."""
MOST_HELD_BYTES: Final = 4 * 1024 * 1024
MOST_HELD_OF_ONE_BYTES: Final = 64 * 1024
"""Of all devices, and of one: the reports of the others must have room beside what one sends."""
_OVERHEAD_BYTES: Final = 256
_STEMS: Final = tuple(f"/{topic.removesuffix('#')}" for topic in SUBSCRIBED)


@asynccontextmanager
async def open_broker(address: BrokerAddress, config: BrokerConfig, env: Env) -> AsyncIterator[Broker]:
    """Be connected to the broker until the block ends; a connection that is lost is made anew.

    Raises ``Transient(DEVICE_ABSENT)`` where it does not answer, ``Permanent(CONFIG_INVALID)`` for keys that cannot be used.
    """
    password = await env.credential(config.credential) if config.credential else None
    context = await asyncio.to_thread(client_context, config, env) if config.tls else None
    broker = Broker(address, config, password, context, env.count, env.log)
    try:
        await broker.first()
        yield broker
    finally:
        await broker.close()


class Broker:
    """The connection; see :class:`~edged_mqtt.wire.Wire`."""

    exclusive = False

    def __init__(
        self,
        address: BrokerAddress,
        config: BrokerConfig,
        password: str | None,
        context: ssl.SSLContext | None,
        count: Callable[[str], None],
        log: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        self.address = f"mqtt:{address}"
        self.count = count
        self._where = address
        self._config = config
        self._password = password
        self._context = context
        self._log = log
        self.present: set[str] = set()
        """The devices that were heard and are not known to be gone; also while no session has their seat."""
        self._seats: dict[str, BrokerSeat] = {}
        self._served: set[str] = set()
        """Who had a seat at any time: what these say is subscribed for good."""
        self._ears: list[tuple[str, asyncio.Event]] = []
        self._memories: dict[str, dict[str, object]] = {}
        self._client: aiomqtt.Client | None = None
        self._before: set[str] = set()
        self._up = asyncio.Event()
        self._fault: Transient | Permanent | None = None
        self._held = _Held()
        self._closing = False
        self.large = asyncio.Lock()
        """Held by whoever has a large message in memory."""
        self._pump = self._start()

    def _start(self) -> asyncio.Task[None]:
        pump = asyncio.create_task(self._run(), name=self.address)
        pump.add_done_callback(self._ended)
        return pump

    async def close(self) -> None:
        """Nothing is read any more."""
        self._closing = True
        while not self._pump.done():
            # again and again: aiomqtt raises an error of its own in place of a cancellation where the broker takes no
            # farewell, and asyncio's wait_for of Python 3.11 drops one that comes with what was waited for
            self._pump.cancel()
            await asyncio.wait([self._pump], timeout=CONNECT_S)

    def refused(self, name: str) -> str:
        """See :meth:`edged_mqtt.wire.Wire.refused`."""
        return ""

    def is_present(self, name: str) -> bool:
        """See :meth:`edged_mqtt.wire.Wire.is_present`."""
        return name in self.present

    def is_remembered(self, name: str) -> bool:
        """See :meth:`edged_mqtt.wire.Wire.is_remembered`. A broker has one connection for all."""
        return self.is_present(name)

    async def hears(self, name: str, limit_s: float) -> bool:
        """See :meth:`edged_mqtt.wire.Wire.hears`."""
        heard = asyncio.Event()
        ear = name, heard
        self._ears.append(ear)
        try:
            await self.subscribe(_filters(name))
            async with asyncio.timeout(limit_s):
                return await heard.wait()
        except TimeoutError:
            return False
        finally:
            self._ears.remove(ear)
            if name not in self._served:
                await self._unsubscribe(name)

    def memory(self, name: str) -> dict[str, object]:
        """See :meth:`edged_mqtt.wire.Wire.memory`."""
        return self._memories.setdefault(name, {})

    @asynccontextmanager
    async def seat(self, name: str, credential: Credential, guest: Guest) -> AsyncIterator[BrokerSeat]:
        """See :meth:`edged_mqtt.wire.Wire.seat`. The broker checks credentials."""
        if self._pump.done():
            # it ended by a fault, and all sessions with it; whoever begins anew begins here
            self._pump = self._start()
        if name in self._seats:
            raise Transient(Reason.LINK_BUSY, f"{self.address} has a session with {name} already")
        seat = BrokerSeat(self, name, guest)
        self._served.add(name)
        guest.seated(seat)
        self._seats[name] = seat
        try:
            await self.subscribe(seat.filters)
            for topic, payload in self._held.take(name, asyncio.get_running_loop().time()):
                seat.received(topic, payload)
            yield seat
        finally:
            del self._seats[name]
            await seat.closed()

    async def first(self) -> None:
        """Wait for the first connection. Raises what prevented it."""
        up = asyncio.create_task(self._up.wait())
        try:
            await asyncio.wait([up, self._pump], return_when=asyncio.FIRST_COMPLETED, timeout=CONNECT_S + 2)
        finally:
            up.cancel()
        if not self._up.is_set():
            raise self._fault or Transient(Reason.DEVICE_ABSENT, f"{self.address} does not answer")

    async def _run(self) -> None:
        """Keep the connection, and give each message to the device's seat."""
        wait_s = FIRST_RETRY_S
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                async with self._connected() as client:
                    async for message in client.messages:
                        if message.retain:
                            self.count("retained")
                            continue
                        # in a callback of its own: what goes wrong with one message must not end the others' connection
                        loop.call_soon(self._received, client, str(message.topic), message.payload)
            except (aiomqtt.MqttError, OSError, TimeoutError) as exc:
                self._fault = self._meaning(exc)
                if self._closing or not self._up.is_set():
                    return  # whoever opens the link is told, and tries again
                self._log.warning("broker lost", extra={"detail": self._fault.detail})
                self.count("broker_lost")
            self._lost()
            if loop.time() - began > STEADY_S:
                wait_s = FIRST_RETRY_S
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, LONGEST_RETRY_S)

    def _lost(self) -> None:
        self._held = _Held()
        self._before |= self.present
        for seat in list(self._seats.values()):
            seat.lost(f"the broker at {self._where} is not there")

    def _ended(self, pump: asyncio.Task[None]) -> None:
        """Nothing is read any more. Unless the link was closed, or never open, nobody would notice."""
        exc = None if pump.cancelled() else pump.exception()
        if exc is None:
            return
        fault = Transient(Reason.LINK_LOST, f"{self.address} is not read any more: {exc!r}")
        self._log.error("broker not read any more", exc_info=exc)
        self._held = _Held()
        self.present.clear()
        for seat in list(self._seats.values()):
            seat.guest.over(fault)
        self.count("broker_lost")

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[aiomqtt.Client]:
        client = aiomqtt.Client(
            self._where.host,
            self._where.port,
            username=self._config.user or None,
            password=self._password,
            identifier=self._config.client_id or None,
            tls_context=self._context,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=not self._config.client_id,
            properties=self._properties,
            keepalive=self._config.keep_alive_s,
            timeout=CONNECT_S,
            max_queued_incoming_messages=MOST_INCOMING,
            max_queued_outgoing_messages=MOST_OUTGOING,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        async with client:
            heard = set[BrokerSeat]()
            # sessions begin meanwhile, too: each subscribes here, or by itself once there is a client
            while missing := set(self._seats.values()) - heard:
                for seat in missing:
                    await client.subscribe(seat.filters)
                heard |= missing
            self._client = client
            self._up.set()
            # who was there before may have come back first, and said all that it says
            self.present |= self._before
            for name in self._before & self._seats.keys():
                self._seats[name].guest.arrived()
            self._before.clear()
            try:
                yield client
            finally:
                self._client = None

    @property
    def largest_bytes(self) -> int:
        """See :attr:`edged_mqtt.wire.Seat.largest_bytes`."""
        return self._config.largest_message_bytes

    @property
    def _properties(self) -> Properties:
        """With a name of its own the broker keeps what devices say meanwhile (v5 3.1.2.11.2)."""
        found = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        found.MaximumPacketSize = LARGEST_HEARD_BYTES
        if self._config.client_id:
            found.SessionExpiryInterval = SESSION_S
        return found

    def _meaning(self, exc: Exception) -> Transient | Permanent:
        text = f"{self.address}: {exc}"
        code = getattr(exc, "rc", None)
        if getattr(code, "value", code) in (4, 5, 0x86, 0x87):
            return Permanent(Reason.CONFIG_INVALID, f"{text}; see user and credential in the [[link]] table")
        return Transient(Reason.DEVICE_ABSENT, text)

    def _received(self, client: aiomqtt.Client, topic: str, payload: object) -> None:
        if client is not self._client:
            return  # that connection was lost meanwhile, and what waited of it with it
        # the last place where it can be cut: a prefix may have levels that look like the protocol's, the rest cannot
        cut = max(map(topic.rfind, _STEMS))
        if cut <= 0:
            return
        prefix, rest = topic[:cut], topic[cut + 1 :]
        data = payload if isinstance(payload, bytes) else b""
        for name, heard in self._ears:
            if name == prefix:
                heard.set()
        if (seat := self._seats.get(prefix)) is not None:
            seat.received(rest, data)
            return
        now = asyncio.get_running_loop().time()
        # what a device runs it may say but once, and not every one asks twice for a chunk
        if not self._held.put(prefix, rest, data, now):
            self.count("dropped")

    async def subscribe(self, filters: list[tuple[str, SubscribeOptions]]) -> None:
        """On the connection that there is; on those that follow all seats are. Raises ``Transient(LINK_LOST)``."""
        if self._client is None:
            return
        try:
            await self._client.subscribe(filters)
        except aiomqtt.MqttError as exc:
            raise Transient(Reason.LINK_LOST, f"{self.address}: {exc}") from exc

    async def _unsubscribe(self, name: str) -> None:
        # where the connection is gone, so is the subscription
        with contextlib.suppress(aiomqtt.MqttError):
            if self._client is not None:
                await self._client.unsubscribe([topic for topic, _ in _filters(name)])

    async def publish(self, topic: str, payload: bytes, qos: int) -> None:
        """Raises ``Transient(LINK_LOST)``."""
        if self._client is None:
            raise Transient(Reason.LINK_LOST, f"{self.address} is not there")
        try:
            limit_s = CONNECT_S + len(payload) / SLOWEST_BYTES_PER_S
            await self._client.publish(topic, payload, qos, timeout=limit_s)
        except (aiomqtt.MqttError, TimeoutError) as exc:
            raise Transient(Reason.LINK_LOST, f"{self.address}: {exc}") from exc


def _filters(prefix: str) -> list[tuple[str, SubscribeOptions]]:
    # both sides use the same topic for attributes: what this node says must not come back to it (v5 3.8.3.1)
    # nor what the broker kept: it is no sign of life, whoever said it may be long gone
    options = SubscribeOptions(qos=1, noLocal=True, retainHandling=SubscribeOptions.RETAIN_DO_NOT_SEND)
    return [(f"{prefix}/{topic}", options) for topic in SUBSCRIBED]


class _Held:
    """Messages for seats that nobody has yet, by prefix: bounded in number, bytes and time."""

    def __init__(self) -> None:
        self._messages: dict[str, deque[tuple[float, str, bytes]]] = {}
        self._sizes: Counter[str] = Counter()
        self._bytes = 0

    def put(self, prefix: str, topic: str, payload: bytes, now: float) -> bool:
        """Whether there was room."""
        size = _held_bytes(topic, payload)
        self._forget(prefix, now)
        if (
            self._sizes[prefix] + size > MOST_HELD_OF_ONE_BYTES
            or len(self._messages.get(prefix, ())) >= MOST_RESTING
        ):
            return False
        if self._bytes + size > MOST_HELD_BYTES:
            for name in list(self._messages):
                self._forget(name, now)
        if self._bytes + size > MOST_HELD_BYTES:
            return False
        self._messages.setdefault(prefix, deque()).append((now, topic, payload))
        self._weigh(prefix, size)
        return True

    def take(self, prefix: str, now: float) -> list[tuple[str, bytes]]:
        """What waits for ``prefix`` and is not too old."""
        self._forget(prefix, now)
        found = self._messages.pop(prefix, ())
        self._weigh(prefix, -self._sizes[prefix])
        return [(topic, payload) for _, topic, payload in found]

    def _forget(self, prefix: str, now: float) -> None:
        waiting = self._messages.get(prefix)
        while waiting and now - waiting[0][0] > HELD_S:
            _, topic, payload = waiting.popleft()
            self._weigh(prefix, -_held_bytes(topic, payload))
        if not waiting:
            self._messages.pop(prefix, None)

    def _weigh(self, prefix: str, more: int) -> None:
        self._bytes += more
        self._sizes[prefix] += more
        if not self._sizes[prefix]:
            del self._sizes[prefix]


def _held_bytes(topic: str, payload: bytes) -> int:
    return _OVERHEAD_BYTES + len(topic) + len(payload)


class BrokerSeat:
    """One device's topics; see :class:`~edged_mqtt.wire.Seat`."""

    def __init__(self, broker: Broker, prefix: str, guest: Guest) -> None:
        self.filters = _filters(prefix)
        self._broker = broker
        self._prefix = prefix
        self.guest = guest
        self._resting = False
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._waiting_bytes = 0
        self._telling: set[asyncio.Task[None]] = set()
        self.silence_s = math.inf
        """Without a meaning here: the broker takes what is sent, or is lost."""

    @property
    def present(self) -> bool:
        return self._prefix in self._broker.present

    @property
    def largest_bytes(self) -> int:
        return self._broker.largest_bytes

    def received(self, topic: str, payload: bytes) -> None:
        """A message of the device: it is there."""
        if not self.present:
            self._broker.present.add(self._prefix)
            self.guest.arrived()
        if self._resting:
            size = _held_bytes(topic, payload)
            if len(self._waiting) < MOST_RESTING and self._waiting_bytes + size <= MOST_RESTING_BYTES:
                self._waiting.append((topic, payload))
                self._waiting_bytes += size
            else:
                self._broker.count("dropped")
            return
        self._resting = not self.guest.heard(topic, payload)

    def lost(self, why: str) -> None:
        """Nobody hears of the device any more."""
        if self.present:
            self._broker.present.discard(self._prefix)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._resting = False
            self.guest.left(why)

    @property
    def ready(self) -> bool:
        """Never: the broker has to be waited for."""
        return False

    async def send(self, topic: str, payload: bytes | memoryview) -> None:
        if not self.present:
            raise Transient(Reason.LINK_LOST, f"{self._prefix} is not there")
        if self._telling:
            # a withdrawal must not come behind the next offer; no broker keeps the order of messages of two qualities
            await asyncio.wait(self._telling)
        # a chunk that is lost is asked for again, or the offer is made anew; one that comes twice confuses devices
        await self._broker.publish(f"{self._prefix}/{topic}", bytes(payload), 0)

    def packed(self, topic: str, payload: bytes | memoryview) -> bytes:
        raise NotImplementedError("the broker's client packs what it sends")

    def send_now(self, message: bytes) -> None:
        raise Transient(Reason.LINK_LOST, f"{self._prefix} is not reached at once")

    def foresee(self, topic: str, payload: bytes, meaning: object) -> None:
        """For nothing: the broker's client parses what it gets."""

    async def stream(self, topic: str, length: int, parts: AsyncIterator[bytes]) -> None:
        async with self._broker.large if length > LARGE_BYTES else contextlib.nullcontext():
            await self.send(topic, b"".join([part async for part in parts]))

    def tell(self, topic: str, payload: bytes) -> None:
        if len(self._telling) < MOST_OUTGOING:
            task = asyncio.create_task(self._tell(topic, payload))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)
        else:
            self._broker.count("dropped")

    async def _tell(self, topic: str, payload: bytes) -> None:
        with contextlib.suppress(Transient):
            await self._broker.publish(f"{self._prefix}/{topic}", payload, 1)

    def more(self) -> None:
        self._resting = False
        while self._waiting and not self._resting:
            topic, payload = self._waiting.popleft()
            self._waiting_bytes -= _held_bytes(topic, payload)
            self._resting = not self.guest.heard(topic, payload)

    def expel(self, why: str) -> None:
        """Its connection is the broker's: it is only not listened to until it begins anew."""
        self.lost(why)

    def dismiss(self, why: str) -> None:
        """As :meth:`expel`."""
        self.lost(why)

    async def closed(self) -> None:
        """The session ended: what it had still to tell goes out first."""
        if self._telling:
            await asyncio.wait(self._telling, timeout=FAREWELL_S)
        for task in self._telling:
            task.cancel()
