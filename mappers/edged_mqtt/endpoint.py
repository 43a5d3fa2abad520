"""An MQTT endpoint for devices: each has its own connection, and what it is told is written to that connection.

No broker: there is no routing between clients, nothing is retained or kept for a session, and filters that a client subscribes
are granted and not looked at. The topics of ThingsBoard's device API name no device ("me"), so that who sends is known by the
credential of the connection alone; and its own client subscribes filters that no topic matches.

What a client can do is bounded: the size of a packet, the time until its CONNECT, silence beyond its keep-alive or the node's
own bound, connections in all and without a credential, and how fast one credential may throw itself out.

A device keeps its connection from one session to the next: what it says in between waits.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import math
import socket
import ssl
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from edged.api import Env
from edged.errors import Permanent, Reason, Transient
from edged_mqtt import packets
from edged_mqtt.config import ListenAddress, ListenConfig
from edged_mqtt.packets import Code, Connect, Kind, Malformed
from edged_mqtt.tls import server_context
from edged_mqtt.wire import Credential, Guest, Proof, digest

CONNECT_S: Final = 10.0
"""So long may TLS take, and then the CONNECT."""
REFUSE_S: Final = 0.5
"""A wrong credential is told so late: guessing takes long."""
FAREWELL_S: Final = 2.0
"""After a last packet the connection is cut off so late, also where the client does not read."""
STRANGERS: Final = 512
"""Connections without a credential at a time, in TLS's handshake or after it: hundreds of devices come back at once when the
power does."""
STRANGERS_OF_ONE: Final = 256
"""The same from one address, or one network of 64 bits: it may be a router with many behind it, but must leave room for
others."""
ACCEPT_AGAIN_S: Final = 1.0
"""Where the system has no descriptor left, as in asyncio's own listener."""
BACKLOG: Final = 256
FIRST_PACKET_BYTES: Final = 4096
STRANGER_BYTES: Final = 16 * 1024
"""So much may a stranger send at all: its CONNECT, and what it says behind that before it was answered (3.1.4)."""
LARGEST_PACKET_BYTES: Final = 128 * 1024
"""From a device: attributes and telemetry. What a device is told of as its limit is half of it."""
PACKETS_AT_ONCE: Final = 64
"""So many packets of one client are handled before the loop looks at others."""
CONTROL_PER_S: Final = 50.0
CONTROL_AT_ONCE: Final = 500.0
"""Packets of a client that are no messages: pings, subscriptions. A session bounds the messages."""
MOST_HEAD_BYTES: Final = 128
"""Of a message: its topic, and what stands before that."""
CONTROL_BYTES: Final = 256
"""A larger one counts once more for each of these."""
TAKEOVERS: Final = 4
TAKEOVER_S: Final = 30.0
"""So often, within so long, may one credential take its own place."""
FIRST_REST_S: Final = 1.0
LONGEST_REST_S: Final = 60.0
FORGIVEN_S: Final = 600.0
"""Who was thrown out for what it did is not let in for so long; twice as long each time, until it was good for a while."""
KEPT_S: Final = 60.0
"""A device stays connected, and may come, for so long where its session ended, so that the next one finds it there."""
MOST_HELD: Final = 32
MOST_HELD_BYTES: Final = 64 * 1024
"""So many of its messages, and bytes of them, wait for that next session; then it is not read."""
MOST_TOLD_BYTES: Final = 256 * 1024
"""So much waits for a client that does not read, or that is in the middle of a long message."""
TOLD_AGAIN_S: Final = 60.0
MOST_CAUSES: Final = 64
MOST_CAUSE_CHARS: Final = 200
"""Why TLS failed is told once in so long for each cause, of so many causes."""
MOST_REFUSALS: Final = 8
REFUSED_S: Final = 600.0
"""So many, and so long, are known who were not let in."""

INBOX_BYTES: Final = 64 * 1024
"""So much is received at once."""

_BYTES_ACKED: Final = slice(120, 128)
"""``tcpi_bytes_acked`` of the kernel's ``struct tcp_info`` (linux/tcp.h)."""
_BUSY: Final = frozenset({errno.EADDRINUSE})


@asynccontextmanager
async def open_endpoint(address: ListenAddress, config: ListenConfig, env: Env) -> AsyncIterator[Endpoint]:
    """Listen at ``address`` until the block ends.

    Raises ``Transient(LINK_BUSY)`` where somebody listens there, ``Transient(DEVICE_ABSENT)`` where the address is not this
    machine's, and ``Permanent(CONFIG_INVALID)`` for keys that cannot be used.
    """
    context = await asyncio.to_thread(server_context, config, env) if config.certificate else None
    endpoint = Endpoint(f"mqtt:{address}", config, env.count, env.log)
    try:
        # not asyncio's listener: that one begins TLS with whoever comes, before anybody is asked
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        listener = socket.create_server((address.host, address.port), family=family, backlog=BACKLOG)
    except OSError as exc:
        reason = Reason.LINK_BUSY if exc.errno in _BUSY else Reason.DEVICE_ABSENT
        raise Transient(reason, f"cannot listen at {address}: {exc.strerror or exc}") from exc
    with listener:
        listener.setblocking(False)
        accepting = asyncio.create_task(endpoint.accept(listener, context), name=f"mqtt {address}")
        try:
            yield endpoint
        finally:
            accepting.cancel()
            await asyncio.wait([accepting])
            await endpoint.close()


class Endpoint:
    """The listener and its connections; see :class:`~edged_mqtt.wire.Wire`."""

    exclusive = False

    def __init__(
        self,
        address: str,
        config: ListenConfig,
        count: Callable[[str], None],
        log: logging.LoggerAdapter[logging.Logger],
    ) -> None:
        self.address = address
        self.count = count
        self.log = log
        self.longest_silence_s = config.longest_silence_s
        self.inbox: Final = memoryview(bytearray(INBOX_BYTES))
        """Where what a client sends is received, and taken from at once: new memory for each packet costs more than all else
        that is done with it."""
        self._most = config.connections
        self._asks_for_certificates = bool(config.client_ca)
        self._seats: dict[str, EndpointSeat] = {}
        self._keys: dict[bytes, EndpointSeat] = {}
        self._rests: dict[str, _Rest] = {}
        self._memories: dict[str, dict[str, object]] = {}
        self._connections: set[Connection] = set()
        self._strangers: set[Connection] = set()
        self._greeting: set[asyncio.Task[None]] = set()
        self._told: dict[str, float] = {}
        """Why TLS failed, and when that is told again."""
        self._refusals: OrderedDict[tuple[str, str], _Refusal] = OrderedDict()

    # -- for sessions

    def refused(self, name: str) -> str:
        """See :meth:`edged_mqtt.wire.Wire.refused`. What was shown as a credential may be a secret, and is not told."""
        now = asyncio.get_running_loop().time()
        return "; ".join(
            f"{host}, {now - one.at:.0f} s ago ({event}{f', as {name}' if name in one.shown else ''})"
            for (host, event), one in reversed(self._refusals.items())
            if now - one.at < REFUSED_S
        )

    def refuse(self, event: str, host: str, shown: Collection[str | None] = ()) -> None:
        """Somebody is not let in; ``shown``: by what names it came."""
        self.count(event)
        self._refusals.pop((host, event), None)
        self._refusals[host, event] = _Refusal(asyncio.get_running_loop().time(), shown)
        if len(self._refusals) > MOST_REFUSALS:
            self._refusals.popitem(last=False)

    def is_present(self, name: str) -> bool:
        """See :meth:`edged_mqtt.wire.Wire.is_present`."""
        return name in self._seats and self._seats[name].present

    def is_remembered(self, name: str) -> bool:
        """See :meth:`edged_mqtt.wire.Wire.is_remembered`."""
        return self.is_present(name) and not self._seats[name].came

    async def hears(self, name: str, limit_s: float) -> bool:
        """See :meth:`edged_mqtt.wire.Wire.hears`. Who is there is known without listening."""
        return self.is_present(name)

    def memory(self, name: str) -> dict[str, object]:
        """See :meth:`edged_mqtt.wire.Wire.memory`."""
        return self._memories.setdefault(name, {})

    @asynccontextmanager
    async def seat(self, name: str, credential: Credential, guest: Guest) -> AsyncIterator[EndpointSeat]:
        """See :meth:`edged_mqtt.wire.Wire.seat`."""
        seat = self._seat_of(name, credential)
        seat.take(guest)
        try:
            yield seat
        finally:
            seat.vacate()

    def _seat_of(self, name: str, credential: Credential) -> EndpointSeat:
        """The one that it had before, where it still has the same credential; else a new one."""
        if credential.proof is Proof.CERTIFICATE and not self._asks_for_certificates:
            text = f"proof: found 'certificate', but {self.address} asks for none; allowed: with client_ca in its [[link]]"
            raise Permanent(Reason.CONFIG_INVALID, text)
        key, seat = credential.key(), self._seats.get(name)
        if seat is not None and seat.guest is not None:
            raise Transient(Reason.LINK_BUSY, f"{self.address} has a session with {name} already")
        other = self._keys.get(key)
        if other is not None and other is not seat:
            if other.guest is not None:
                text = f"{name} and {other.name} have the same credential"
                raise Permanent(Reason.CONFIG_INVALID, text)
            self._remove(other)
        if seat is not None and seat.credential != credential:
            self._remove(seat)
            seat = None
        if seat is None:
            seat = EndpointSeat(name, credential, self._rests.setdefault(name, _Rest()), self.count)
            self._seats[name] = self._keys[key] = seat
        return seat

    def _remove(self, seat: EndpointSeat) -> None:
        """Its credential is not the device's any more."""
        del self._seats[seat.name], self._keys[seat.credential.key()]
        seat.dismiss("it has another credential by now")

    # -- for connections

    async def accept(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        """Let clients in, for ever; TLS begins only with those for whom there is room."""
        loop = asyncio.get_running_loop()
        while True:
            # where somebody waits already, accepting is no pause for the loop
            await asyncio.sleep(0)
            try:
                sock, peer = await loop.sock_accept(listener)
            except OSError as exc:
                self.log.warning("cannot accept", extra={"detail": str(exc)})
                self.count("connection_refused")
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            connection = Connection(self, str(peer[0]))
            if not self._admit(connection):
                sock.close()
                continue
            task = asyncio.create_task(self._greet(connection, sock, context))
            self._greeting.add(task)
            task.add_done_callback(self._greeting.discard)

    async def _greet(
        self, connection: Connection, sock: socket.socket, context: ssl.SSLContext | None
    ) -> None:
        loop = asyncio.get_running_loop()
        limit_s = CONNECT_S if context else None
        try:
            sock.setblocking(False)
            await loop.connect_accepted_socket(
                lambda: connection, sock, ssl=context, ssl_handshake_timeout=limit_s
            )
        except OSError as exc:
            # ssl.SSLError and a time-out are such, too
            self._tls_failed(connection.host, exc)
            self.forget(connection)
        except asyncio.CancelledError:
            self.forget(connection)
            raise

    def _tls_failed(self, host: str, exc: OSError) -> None:
        """Counted each time, and told with its cause; whoever only scans the port must not fill the journal."""
        self.refuse("tls_failed", host)
        text, now = str(exc)[:MOST_CAUSE_CHARS], asyncio.get_running_loop().time()
        if now < self._told.get(text, now):
            return
        if len(self._told) >= MOST_CAUSES:
            self._told.clear()
        self._told[text] = now + TOLD_AGAIN_S
        self.log.warning("TLS failed", extra={"detail": f"{host}: {text}"})

    def _admit(self, connection: Connection) -> bool:
        """Whether there is room for one more stranger."""
        of_one = sum(stranger.origin == connection.origin for stranger in self._strangers)
        if len(self._strangers) >= STRANGERS or of_one >= STRANGERS_OF_ONE:
            self.count("connection_refused")
            return False
        self._connections.add(connection)
        self._strangers.add(connection)
        return True

    def has_room(self, seat: EndpointSeat) -> bool:
        """Whether a device may connect; one that has a connection, perhaps a dead one, takes the place of that."""
        return seat.present or sum(one.present for one in self._seats.values()) < self._most

    def known(self, connection: Connection) -> None:
        self._strangers.discard(connection)

    def forget(self, connection: Connection) -> None:
        self._strangers.discard(connection)
        self._connections.discard(connection)

    def find(self, hello: Connect, common_name: str | None) -> EndpointSeat | None:
        """Whose credential it is. A certificate that was verified says it alone, where a device is known by it."""
        if common_name is not None:
            seat = self._keys.get(digest(Proof.CERTIFICATE, common_name))
            if seat is not None:
                return seat
        if hello.user is None:
            return None
        for proof in (Proof.TOKEN, Proof.PASSWORD):
            seat = self._keys.get(digest(proof, hello.user))
            if seat is not None:
                return seat if seat.credential.admits(hello.password) else None
        return None

    async def close(self) -> None:
        """End all connections."""
        # a task that was cancelled before it began would leave its socket open
        await asyncio.sleep(0)
        greeting = list(self._greeting)
        for task in greeting:
            task.cancel()
        if greeting:
            await asyncio.wait(greeting)
        for seat in self._seats.values():
            seat.close()
        ending = [connection.ended for connection in self._connections]
        for connection in list(self._connections):
            connection.end(Code.SHUTTING_DOWN)
        if ending:
            await asyncio.wait(ending, timeout=FAREWELL_S + 1)


@dataclass(frozen=True, slots=True)
class _Refusal:
    """When somebody was not let in, and by what names it came."""

    at: float
    shown: Collection[str | None]


class _Rest:
    """How long one device that was thrown out must stay away."""

    def __init__(self) -> None:
        self._length_s = 0.0
        self._until = 0.0

    def begin(self, now: float) -> None:
        forgiven = now - self._until > FORGIVEN_S
        self._length_s = (
            FIRST_REST_S if forgiven else min(max(2 * self._length_s, FIRST_REST_S), LONGEST_REST_S)
        )
        self._until = now + self._length_s

    def lasts(self, now: float) -> bool:
        return now < self._until


class EndpointSeat:
    """One device's place; see :class:`~edged_mqtt.wire.Seat`."""

    def __init__(self, name: str, credential: Credential, rest: _Rest, count: Callable[[str], None]) -> None:
        self.rest = rest
        self.name = name
        self.credential = credential
        self.guest: Guest | None = None
        self._count = count
        self._connection: Connection | None = None
        self._taken: deque[float] = deque(maxlen=TAKEOVERS)
        self._held: deque[tuple[str, bytes]] = deque()
        self._held_bytes = 0
        self.came = False
        """Whether the connection began while there was no session."""
        self._leaving: asyncio.TimerHandle | None = None
        self.silence_s = math.inf

    # -- for the endpoint

    def take(self, guest: Guest) -> None:
        """A session begins; a device that was there before has not come anew by that."""
        self.close()
        guest.seated(self)
        self.guest = guest
        if self.came:
            self.came = False
            guest.arrived()
        self.more()

    def vacate(self) -> None:
        """The session ended. The next one is soon there, or the device has to go."""
        self.guest = None
        self._leaving = asyncio.get_running_loop().call_later(KEPT_S, self._give_up)

    @property
    def is_served(self) -> bool:
        """Whether a session has it, or had it just now: who connects between two must not be told to go, since a client may
        never come back after that."""
        return self.guest is not None or self._leaving is not None

    def _give_up(self) -> None:
        self._leaving = None
        self.dismiss("it has had no session for a while")

    def close(self) -> None:
        """Nothing happens any more by itself."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    # -- for the connection

    def heard(self, topic: str, payload: bytes, meaning: object = None) -> bool:
        """The device sent a message. Whether it may send more."""
        if self.guest is not None and not self._held:
            return self.guest.heard(topic, payload, meaning)
        self._held.append((topic, payload))
        self._held_bytes += len(payload)
        return self.guest is None and len(self._held) < MOST_HELD and self._held_bytes < MOST_HELD_BYTES

    # -- edged_mqtt.wire.Seat

    @property
    def present(self) -> bool:
        return self._connection is not None

    @property
    def largest_bytes(self) -> int:
        most = packets.MOST_PACKET_BYTES if self._connection is None else self._connection.largest_bytes
        return max(most - MOST_HEAD_BYTES, 0)

    def has_newer_than(self, connection: Connection) -> bool:
        """Whether the device is on a connection that began after ``connection``."""
        return self._connection is not None and self._connection.began > connection.began

    def may_sit(self, now: float) -> bool:
        """Whether to let a connection in. The newest wins, since an old one may be dead without anybody knowing; but two that
        throw each other out in turn are two devices with one credential: False then."""
        if self._connection is None:
            return True
        if len(self._taken) == TAKEOVERS and now - self._taken[0] < TAKEOVER_S:
            return False
        self._taken.append(now)
        return True

    def sit(self, connection: Connection) -> None:
        """The device is on ``connection`` from now on."""
        old = self._connection
        if old is not None:
            self.stand(old, "its credential was used on another connection")
            old.end(Code.TAKEN_OVER)
        self._connection = connection
        self.came = self.guest is None
        if self.guest is not None:
            self.guest.arrived()

    def stand(self, connection: Connection, why: str) -> None:
        """``connection`` is over."""
        if self._connection is connection:
            self._connection = None
            self.came = False
            self._held.clear()
            self._held_bytes = 0
            if self.guest is not None:
                self.guest.left(why)

    @property
    def ready(self) -> bool:
        connection = self._connection
        return connection is not None and connection.is_free

    async def send(self, topic: str, payload: bytes | memoryview) -> None:
        connection = self._required()
        await connection.told(self.silence_s)
        connection.publish(topic, payload)
        await connection.drained(self.silence_s)

    def packed(self, topic: str, payload: bytes | memoryview) -> bytes:
        return self._required().packed(topic, payload)

    def send_now(self, message: bytes) -> None:
        self._required().send(message)

    def foresee(self, topic: str, payload: bytes, meaning: object) -> None:
        if self._connection is not None:
            self._connection.foresee(topic, payload, meaning)

    async def stream(self, topic: str, length: int, parts: AsyncIterator[bytes]) -> None:
        connection = self._required()
        await connection.told(self.silence_s)
        whole = False
        connection.streaming = True
        try:
            connection.write(packets.publish_head(topic.encode(), length, connection.version))
            async for part in parts:
                connection.write(part)
                await connection.drained(self.silence_s)
            whole = True
        finally:
            connection.streaming = False
            if whole:
                connection.go_on_soon()
            else:
                connection.abort("a message broke off")

    def tell(self, topic: str, payload: bytes) -> None:
        if self._connection is not None and not self._connection.publish_soon(topic, payload):
            self._count("dropped")

    def more(self) -> None:
        while self._held:
            if self.guest is None:
                return
            topic, payload = self._held.popleft()
            self._held_bytes -= len(payload)
            if not self.guest.heard(topic, payload):
                return
        if self._connection is not None:
            self._connection.resume()

    def expel(self, why: str) -> None:
        if self._connection is not None:
            self.rest.begin(asyncio.get_running_loop().time())
        self.dismiss(why)

    def dismiss(self, why: str) -> None:
        """End the device's connection, which did nothing wrong."""
        connection = self._connection
        if connection is not None:
            self.stand(connection, why)
            connection.end(Code.ADMINISTRATIVE)

    def _required(self) -> Connection:
        if self._connection is None:
            raise Transient(Reason.LINK_LOST, f"{self.name} is not connected")
        return self._connection


class _Foreseen(NamedTuple):
    """The packet of a message that a device is likely to send next, with QoS 1 around its identifier, and what is in it."""

    qos: int
    begin: bytes
    end: bytes
    topic: str
    payload: bytes
    meaning: object


class Connection(asyncio.BufferedProtocol):
    """One connection of a client. Everything happens in the loop's callbacks; a client that does not read, or that sends more
    than its session takes, stops only itself."""

    def __init__(self, endpoint: Endpoint, host: str) -> None:
        self.host = host
        self.origin = _origin(host)
        self.began = asyncio.get_running_loop().time()
        self.version = packets.V3
        self.largest_bytes = packets.MOST_PACKET_BYTES
        self.streaming = False
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._seat: EndpointSeat | None = None
        self._buffer = bytearray()
        self._most_bytes = FIRST_PACKET_BYTES
        self._over = False
        self._resting = False
        self._greeted = False
        self._silence_s = CONNECT_S
        self._heard_at = self.began
        self._watch: asyncio.TimerHandle | None = None
        self._room: asyncio.Future[None] | None = None
        self._why = "its connection was closed"
        self._control, self._control_at = CONTROL_AT_ONCE, self._heard_at
        self._soon: deque[tuple[str, bytes]] = deque()
        self._soon_bytes = 0
        self._untold: asyncio.Future[None] | None = None
        self._foreseen: _Foreseen | None = None
        self._asks_qos = 0
        """Of the message that it sent last."""
        self._owed = b""
        """A PUBACK that goes out together with what follows from the message, or after that."""

    # -- asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._socket = transport.get_extra_info("socket")
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # asyncio sets it for its own listeners only; without it a chunk behind a PUBACK waits for the client's delayed one
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._heard_at = self._loop.time()
        self._watch = self._loop.call_later(self._silence_s, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        self._endpoint.forget(self)
        if self._watch is not None:
            self._watch.cancel()
        for waited_for in (self._room, self._untold):
            if waited_for is not None and not waited_for.done():
                waited_for.set_result(None)
        if self._seat is not None:
            self._seat.stand(self, f"{self._why}: {exc}" if exc else self._why)
        if not self.ended.done():
            self.ended.set_result(None)

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None
        self.go_on_soon()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._endpoint.inbox

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._endpoint.inbox[:nbytes])
        self._heard_at = self._loop.time()
        foreseen = self._foreseen
        if (
            foreseen is not None
            and (number := self._number_in(data, foreseen)) >= 0
            and not (self._buffer or self._over or self._waits)
        ):
            self._asks_qos = foreseen.qos
            self._heard(number, foreseen.topic, foreseen.payload, foreseen.meaning)
            return
        self._buffer += data
        self._work()
        if not self._greeted and len(self._buffer) > STRANGER_BYTES:
            self._endpoint.count("malformed")
            self.abort("it sent too much before it was let in")

    def _number_in(self, data: bytes, foreseen: _Foreseen) -> int:
        """The identifier of the packet that was foreseen, 0 without one; -1: it is another."""
        if not foreseen.qos:
            return 0 if data == foreseen.begin else -1
        at = len(foreseen.begin)
        fits = len(data) == at + 2 + len(foreseen.end)
        if fits and data.startswith(foreseen.begin) and data.endswith(foreseen.end):
            # 0 is none, and malformed
            return (data[at] << 8 | data[at + 1]) or -1
        return -1

    # -- for the seat

    def foresee(self, topic: str, payload: bytes, meaning: object) -> None:
        """See :meth:`edged_mqtt.wire.Seat.foresee`."""
        if self._asks_qos:
            begin, between = packets.acked_publish(topic.encode(), len(payload), self.version)
            end = between + payload
        else:
            begin, end = packets.publish_head(topic.encode(), len(payload), self.version) + payload, b""
        self._foreseen = _Foreseen(self._asks_qos, begin, end, topic, payload, meaning)

    def write(self, data: bytes) -> None:
        """Raises ``Transient(LINK_LOST)`` where the connection is over."""
        if self._over:
            raise Transient(Reason.LINK_LOST, self._why)
        if self._owed:
            data, self._owed = self._owed + data, b""
        self._transport.write(data)

    def packed(self, topic: str, payload: bytes | memoryview) -> bytes:
        """A message with QoS 0: on one connection nothing is lost, and what a lost connection held is asked for again."""
        return b"".join((packets.publish_head(topic.encode(), len(payload), self.version), payload))

    def send(self, message: bytes) -> None:
        """What was :meth:`packed`. Raises as :meth:`write`."""
        if len(message) > self.largest_bytes:
            # as if it had been sent, v5 3.1.2.11.4
            self._endpoint.count("too_large_for_it")
        else:
            self.write(message)

    def publish(self, topic: str, payload: bytes | memoryview) -> None:
        """A message at once. Raises as :meth:`write`."""
        self.send(self.packed(topic, payload))

    def publish_soon(self, topic: str, payload: bytes) -> bool:
        """:meth:`publish`, at once or when the client has read what it was sent before. False where too much waits."""
        if self._over:
            return True
        if self.is_free:
            self.publish(topic, payload)
            return True
        if self._soon_bytes + len(payload) > MOST_TOLD_BYTES:
            return False
        self._soon.append((topic, payload))
        self._soon_bytes += len(payload) + MOST_HEAD_BYTES
        self._untold = self._untold or self._loop.create_future()
        return True

    async def told(self, silence_s: float) -> None:
        """Wait until all is sent that :meth:`publish_soon` put off: what comes later must not overtake it. Errors as
        :meth:`drained`."""
        while self._untold is not None and not self._over:
            await self._read_on(self._untold, silence_s)

    @property
    def is_free(self) -> bool:
        """Whether a message can be sent, and overtakes none."""
        return not (self.streaming or self.is_full or self._soon)

    @property
    def is_full(self) -> bool:
        """Whether the client does not read what it was sent, or is gone."""
        return self._over or self._room is not None

    async def drained(self, silence_s: float) -> None:
        """Wait until the client has read most of what it was sent. One that reads nothing for ``silence_s`` is cut off: raises
        ``Transient(NO_RESPONSE)``."""
        while self._room is not None and not self._over:
            await self._read_on(self._room, silence_s)

    async def _read_on(self, waited_for: asyncio.Future[None], silence_s: float) -> None:
        """Wait for it, ``silence_s`` at most; one round of the above."""
        before = self._taken
        await asyncio.wait([waited_for], timeout=silence_s)
        if waited_for.done() or self._over or self._room is None or self._taken != before:
            return
        text = f"it read nothing of what it was sent for {silence_s:g} s"
        name = self.host if self._seat is None else self._seat.name
        self.abort(text)
        raise Transient(Reason.NO_RESPONSE, f"{name}: {text}")

    @property
    def _taken(self) -> tuple[int, bytes]:
        """Changes with each byte that the client takes: what is not sent yet, and what its machine has acknowledged, since TLS
        hands on whole messages."""
        if self._socket.fileno() < 0:
            # it is over, and is told of that in a moment
            return 0, b""
        info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)
        return self._transport.get_write_buffer_size(), info[_BYTES_ACKED]

    def resume(self) -> None:
        """The session takes more."""
        if self._resting:
            self._resting = False
            self.go_on_soon()

    def go_on_soon(self) -> None:
        """What it sent is looked at again, unless something else stands in the way."""
        self._loop.call_soon(self._go_on)

    def end(self, code: Code) -> None:
        """Say why, and close; a client that does not read is cut off soon after."""
        if self._over:
            return
        # what is not acknowledged comes again on the next connection
        self._acknowledge()
        if self._greeted and self.version == packets.V5 and not self.streaming:
            self._transport.write(packets.disconnect(code))
        self._close()

    def abort(self, why: str) -> None:
        """Cut off at once."""
        self._why = why
        self._over = True
        self._buffer.clear()
        if self._seat is not None:
            self._seat.stand(self, why)
        self._transport.abort()

    # -- inside

    def _close(self) -> None:
        self._over = True
        self._buffer.clear()
        self._transport.close()
        self._loop.call_later(FAREWELL_S, self._transport.abort)

    def _look(self) -> None:
        """Silence for too long, or no CONNECT in time."""
        silent_s = self._loop.time() - self._heard_at
        # a client whose bytes are not read because it sent too many is not silent, nor one that has a long message to read
        unread = self._resting or (self.streaming and not self._transport.is_reading())
        if unread or silent_s < self._silence_s:
            left_s = self._silence_s if unread else self._silence_s - silent_s
            self._watch = self._loop.call_later(max(left_s, 0.05), self._look)
            return
        self._endpoint.count("keep_alive_missed" if self._greeted else "connect_missed")
        self._why = f"nothing was heard of it for {silent_s:.0f} s"
        self.end(Code.KEEP_ALIVE)

    @property
    def _waits(self) -> bool:
        """Whether no packet is handled now: its session has enough, the answer would fall into a message that is being
        written, or it does not read answers."""
        return self._resting or self.streaming or self._room is not None

    def _go_on(self) -> None:
        while self._soon and not self.streaming and not self.is_full:
            topic, payload = self._soon.popleft()
            self._soon_bytes -= len(payload) + MOST_HEAD_BYTES
            self.publish(topic, payload)
        if self._untold is not None and not self._soon:
            if not self._untold.done():
                self._untold.set_result(None)
            self._untold = None
        if not self._over and not self._waits:
            self._heard_at = self._loop.time()
            self._transport.resume_reading()
            self._work()

    def _work(self) -> None:
        try:
            for _ in range(PACKETS_AT_ONCE):
                if self._over or not self._buffer:
                    return
                if self._waits:
                    if len(self._buffer) > LARGEST_PACKET_BYTES:
                        self._transport.pause_reading()
                    return
                if not self._next():
                    return
            self._transport.pause_reading()
            self.go_on_soon()
        except Malformed as exc:
            self._endpoint.count("malformed")
            self._why = f"it does not keep to MQTT: {exc}"
            if not self._greeted and exc.code in (Code.UNSUPPORTED_VERSION, Code.BAD_CLIENT_ID):
                self._transport.write(packets.connack(packets.V3, exc.code))
            self.end(exc.code)

    def _next(self) -> bool:
        """Handle one packet; False where it is not there whole. Raises ``Malformed``."""
        if not self._greeted and self._buffer[0] != Kind.CONNECT << 4:
            raise Malformed("the first packet is no CONNECT", Code.PROTOCOL_ERROR)
        found = packets.frame(self._buffer, self._most_bytes)
        if found is None:
            return False
        first, begin, end = found
        body = bytes(self._buffer[begin:end])
        del self._buffer[:end]
        self._packet(first, body)
        return True

    def _packet(self, first: int, body: bytes) -> None:
        kind = first >> 4
        if not self._greeted:
            self._hello(packets.parse_connect(body))
            return
        if kind == Kind.PUBLISH:
            self._published(first, body)
            return
        handler = _HANDLERS.get(first)
        if handler is None:
            raise Malformed(f"a packet that begins with {first:#04x}", Code.PROTOCOL_ERROR)
        if self._may_control(len(body)):
            handler(self, body)
            return
        self._endpoint.count("flooded")
        self._why = "it sent too many packets that are no messages"
        self.end(Code.TOO_MUCH)

    def _may_control(self, size: int) -> bool:
        now = self._loop.time()
        filled = min(CONTROL_AT_ONCE, self._control + (now - self._control_at) * CONTROL_PER_S)
        self._control, self._control_at = filled - 1 - size // CONTROL_BYTES, now
        return self._control >= 0

    def _hello(self, hello: Connect, late: bool = False) -> None:
        """Let it in or not. Who is not known, or not served, is looked for once more before it is refused: after a start of the
        node devices are back before their sessions are, and a client may give up for good where its credential is refused."""
        self.version = hello.version
        shown = common_name(self._transport.get_extra_info("peercert"))
        seat = self._endpoint.find(hello, shown)
        if not late and (seat is None or not seat.is_served):
            self._resting = True
            self._transport.pause_reading()
            self._loop.call_later(REFUSE_S, self._hello, hello, True)
            return
        if seat is None:
            self._refuse("login_refused", Code.BAD_CREDENTIAL, (hello.user, shown))
            return
        if not seat.is_served:
            self._refuse("not_served", Code.UNAVAILABLE, (seat.name,))
            return
        if self._over:
            return
        if late and seat.has_newer_than(self):
            self._close()
            return
        if seat.rest.lasts(self._loop.time()):
            self._refuse_later("must_rest", Code.BUSY, (seat.name,))
            return
        if not self._endpoint.has_room(seat):
            self._refuse_later("connection_refused", Code.BUSY, (seat.name,))
            return
        if not seat.may_sit(self._loop.time()):
            self._refuse_later("two_sessions", Code.BUSY, (seat.name,))
            return
        self._seat, self._greeted = seat, True
        self._endpoint.known(self)
        self._most_bytes = LARGEST_PACKET_BYTES
        self.largest_bytes = hello.most_bytes
        answer = packets.Connack(
            LARGEST_PACKET_BYTES,
            assigned="" if hello.client_id else seat.name,
            keep_alive_s=self._mind_keep_alive(hello.keep_alive_s),
        )
        self.write(packets.connack(self.version, Code.SUCCESS, answer))
        seat.sit(self)
        if late:
            self.resume()

    def _mind_keep_alive(self, keep_alive_s: int) -> int | None:
        """Watch for one and a half times the keep-alive (v5 3.1.2.10), and no longer than this node bears silence. The
        keep-alive that the client is to have instead of its own, None: its own."""
        longest_s = self._endpoint.longest_silence_s
        own_s = 1.5 * keep_alive_s
        too_long = not 0 < own_s <= longest_s
        self._silence_s = longest_s if too_long else own_s
        if self._watch is not None:
            self._watch.cancel()
        self._watch = self._loop.call_later(self._silence_s, self._look)
        return max(1, int(longest_s / 1.5)) if too_long else None

    def _refuse_later(self, event: str, code: Code, shown: Collection[str | None]) -> None:
        self._resting = True
        self._transport.pause_reading()
        self._loop.call_later(REFUSE_S, self._refuse, event, code, shown)

    def _refuse(self, event: str, code: Code, shown: Collection[str | None]) -> None:
        self._endpoint.refuse(event, self.host, shown)
        if not self._over:
            self._transport.write(packets.connack(self.version, code))
            self._close()

    def _published(self, first: int, body: bytes) -> None:
        message = packets.parse_publish(first, body, self.version)
        self._asks_qos = message.qos
        self._heard(message.number if message.qos else 0, message.topic, message.payload)

    def _heard(self, number: int, topic: str, payload: bytes, meaning: object = None) -> None:
        """A message, with QoS 1 where it has a packet identifier."""
        if number:
            self._owed = packets.puback(number)
        if self._seat is not None and not self._seat.heard(topic, payload, meaning):
            self._resting = True
            self._transport.pause_reading()
        self._acknowledge()

    def _acknowledge(self) -> None:
        if self._owed and not self._over:
            self._transport.write(self._owed)
        self._owed = b""

    def _subscribe(self, body: bytes) -> None:
        asked = packets.parse_subscribe(body, self.version, with_options=True)
        self.write(packets.suback(asked, self.version))

    def _unsubscribe(self, body: bytes) -> None:
        asked = packets.parse_subscribe(body, self.version, with_options=False)
        self.write(packets.unsuback(asked, self.version))

    def _ping(self, body: bytes) -> None:
        self.write(packets.PINGRESP)

    def _acknowledged(self, body: bytes) -> None:
        """Nothing is sent that wants an acknowledgement; a stray one does no harm."""

    def _goodbye(self, body: bytes) -> None:
        self._why = "it said goodbye"
        self._close()


_HANDLERS: Final[dict[int, Callable[[Connection, bytes], None]]] = {
    Kind.SUBSCRIBE << 4 | 2: Connection._subscribe,
    Kind.UNSUBSCRIBE << 4 | 2: Connection._unsubscribe,
    Kind.PINGREQ << 4: Connection._ping,
    Kind.PUBACK << 4: Connection._acknowledged,
    Kind.DISCONNECT << 4: Connection._goodbye,
}


def _origin(host: str) -> str:
    """Whom an address belongs to: one of IPv6 stands for its network, in which a host takes as many as it likes."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return host if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def common_name(certificate: Any) -> str | None:
    """The common name of a certificate as ``SSLSocket.getpeercert`` shows it; None where it was not verified, or has none."""
    if not certificate:
        return None
    names = [value for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return names[0] if len(names) == 1 else None
