"""Control packets of MQTT 3.1.1 and 5.0, as far as an endpoint for devices needs them: what a client sends is parsed, what a
server sends is built. Pure; knows no connection and no topic.

Sections are those of the OASIS standards MQTT Version 3.1.1 (v3) and MQTT Version 5.0 (v5). Not here: QoS 2, retained messages,
wills (they are read over), topic aliases (the server allows none, v5 3.2.2.3.8), AUTH.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

V3: Final = 4
V5: Final = 5
MOST_REMAINING_BYTES: Final = 268_435_455
"""What a Variable Byte Integer can say (v5 1.5.5)."""


MOST_PACKET_BYTES: Final = MOST_REMAINING_BYTES + 5
_MAXIMUM_PACKET_SIZE: Final = 0x27
_FIXED_BYTES: Final = {0x11: 4, 0x21: 2, _MAXIMUM_PACKET_SIZE: 4, 0x22: 2, 0x19: 1, 0x17: 1}
_TEXTS: Final = {0x26: 2, 0x15: 1, 0x16: 1}
"""Properties of CONNECT (v5 3.1.2.11): of how many bytes, or of how many strings or binaries."""


class Kind(IntEnum):
    """Control packet types (v5 2.1.2)."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14


class Code(IntEnum):
    """Reason codes of v5 (2.4) that are sent."""

    SUCCESS = 0x00
    MALFORMED = 0x81
    PROTOCOL_ERROR = 0x82
    UNSUPPORTED_VERSION = 0x84
    BAD_CLIENT_ID = 0x85
    BAD_CREDENTIAL = 0x86
    UNAVAILABLE = 0x88
    BUSY = 0x89
    SHUTTING_DOWN = 0x8B
    KEEP_ALIVE = 0x8D
    TAKEN_OVER = 0x8E
    TOO_LARGE = 0x95
    TOO_MUCH = 0x96
    ADMINISTRATIVE = 0x98
    NO_QOS = 0x9B


_RETURN_CODES: Final = {
    Code.SUCCESS: 0,
    Code.UNSUPPORTED_VERSION: 1,
    Code.BAD_CLIENT_ID: 2,
    Code.BUSY: 3,
    Code.UNAVAILABLE: 3,
    Code.BAD_CREDENTIAL: 4,
}
"""The same in v3 (3.2.2.3), where there is one; 5 is "not authorized"."""


class Malformed(Exception):
    """The client does not keep to the protocol; ``code`` says how."""

    def __init__(self, detail: str, code: Code = Code.MALFORMED) -> None:
        super().__init__(detail)
        self.code = code


@dataclass(frozen=True, slots=True)
class Connect:
    """CONNECT (v5 3.1). ``keep_alive_s`` 0: the client asks for none. ``most_bytes``: its Maximum Packet Size."""

    version: int
    client_id: str
    keep_alive_s: int
    user: str | None
    password: bytes | None
    most_bytes: int = MOST_PACKET_BYTES


class Publish(NamedTuple):
    """PUBLISH (v5 3.3). ``number``: packet identifier, 0 with QoS 0."""

    topic: str
    payload: bytes
    qos: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True)
class Subscribe:
    """SUBSCRIBE (v5 3.8): filters with the QoS asked for; of UNSUBSCRIBE (v5 3.10) the QoS mean nothing."""

    number: int
    filters: tuple[tuple[str, int], ...]


class _Reader:
    """Walks through the body of a packet; raises :class:`Malformed` where it is too short."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def done(self) -> bool:
        return self._at >= len(self._data)

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) < count:
            raise Malformed("a packet ends too early")
        self._at += count
        return part

    def rest(self) -> bytes:
        part = self._data[self._at :]
        self._at = len(self._data)
        return part

    def byte(self) -> int:
        return self.take(1)[0]

    def word(self) -> int:
        part = self.take(2)
        return part[0] << 8 | part[1]

    def binary(self) -> bytes:
        return self.take(self.word())

    def text(self) -> str:
        return _text(self.binary())

    def number(self) -> int:
        """A Variable Byte Integer (v5 1.5.5)."""
        value = 0
        for shift in (0, 7, 14, 21):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise Malformed("a length of more than four bytes")

    def skip_properties(self) -> None:
        """Properties (v5 2.2.2): only one of CONNECT's changes what this endpoint does."""
        self.take(self.number())

    def largest_packet(self) -> int:
        """The Maximum Packet Size among the properties of CONNECT."""
        reader, most = _Reader(self.take(self.number())), None
        while not reader.done:
            kind = reader.byte()
            if kind in _FIXED_BYTES:
                value = int.from_bytes(reader.take(_FIXED_BYTES[kind]), "big")
                if kind == _MAXIMUM_PACKET_SIZE:
                    if most is not None or not value:
                        raise Malformed("a Maximum Packet Size of 0, or two of them", Code.PROTOCOL_ERROR)
                    most = value
                continue
            if kind not in _TEXTS:
                raise Malformed(f"property {kind:#04x} in CONNECT")
            for _ in range(_TEXTS[kind]):
                reader.binary()
        return MOST_PACKET_BYTES if most is None else min(most, MOST_PACKET_BYTES)


def _text(data: bytes) -> str:
    """A UTF-8 encoded string (v5 1.5.4)."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Malformed("a text that is not UTF-8") from None
    if "\0" in text:
        raise Malformed("a text with U+0000 in it")
    return text


def frame(buffer: bytes | bytearray, most_bytes: int) -> tuple[int, int, int] | None:
    """Where the first packet of ``buffer`` lies: its first byte, where its body begins and ends; None where it is not there
    whole. Raises :class:`Malformed`, with ``TOO_LARGE`` where its body has more than ``most_bytes``."""
    length, shift = 0, 0
    for at in range(1, 5):
        if at >= len(buffer):
            return None
        byte = buffer[at]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            if length > most_bytes:
                raise Malformed(f"a packet of {length} bytes; allowed: {most_bytes}", Code.TOO_LARGE)
            end = at + 1 + length
            return (buffer[0], at + 1, end) if len(buffer) >= end else None
        shift += 7
    raise Malformed("a length of more than four bytes")


def parse_connect(body: bytes) -> Connect:
    """The body of a CONNECT. Raises :class:`Malformed`, with ``UNSUPPORTED_VERSION`` for another protocol, and
    ``BAD_CLIENT_ID`` for a client of v3 that wants a session kept and has no name (v3 3.1.3.1)."""
    reader = _Reader(body)
    name, version = reader.binary(), reader.byte()
    if (name, version) not in ((b"MQTT", V3), (b"MQTT", V5)):
        raise Malformed(f"protocol {name!r:.40} version {version}", Code.UNSUPPORTED_VERSION)
    flags, keep_alive_s = reader.byte(), reader.word()
    if flags & 1:
        raise Malformed("a reserved flag is set")
    if flags & 0x40 and not flags & 0x80 and version == V3:
        raise Malformed("a password without a user name")
    most_bytes = reader.largest_packet() if version == V5 else MOST_PACKET_BYTES
    client_id = reader.text()
    if version == V3 and not client_id and not flags & 0x02:
        raise Malformed("no client identifier, and no clean session", Code.BAD_CLIENT_ID)
    if flags & 0x04:
        if version == V5:
            reader.skip_properties()
        reader.text()
        reader.binary()
    user = reader.text() if flags & 0x80 else None
    password = reader.binary() if flags & 0x40 else None
    if not reader.done:
        raise Malformed("bytes after the end of CONNECT")
    return Connect(version, client_id, keep_alive_s, user, password, most_bytes)


def parse_publish(first: int, body: bytes, version: int) -> Publish:
    """A PUBLISH with the first byte ``first``. Raises :class:`Malformed`, with ``NO_QOS`` for QoS 2."""
    qos = first >> 1 & 3
    if qos > 1:
        raise Malformed(f"QoS {qos}", Code.NO_QOS)
    length = body[0] << 8 | body[1] if len(body) > 1 else 0
    at = 2 + length
    topic = _text(body[2:at])
    if not topic or len(body) < at or "+" in topic or "#" in topic:
        raise Malformed("a message without a topic, or to a filter")
    number = 0
    if qos:
        if len(body) < at + 2:
            raise Malformed("a packet ends too early")
        number = body[at] << 8 | body[at + 1]
        at += 2
        if not number:
            raise Malformed("packet identifier 0")
    if version == V5:
        reader = _Reader(body[at:])
        reader.skip_properties()
        return Publish(topic, reader.rest(), qos, number)
    return Publish(topic, body[at:], qos, number)


def parse_subscribe(body: bytes, version: int, *, with_options: bool) -> Subscribe:
    """The body of a SUBSCRIBE, or without options of an UNSUBSCRIBE. Raises :class:`Malformed`."""
    reader = _Reader(body)
    number = reader.word()
    if version == V5:
        reader.skip_properties()
    filters: list[tuple[str, int]] = []
    while not reader.done:
        text = reader.text()
        filters.append((text, reader.byte() & 3 if with_options else 0))
        if not text:
            raise Malformed("an empty filter")
    if not number or not filters:
        raise Malformed("no packet identifier, or no filter")
    return Subscribe(number, tuple(filters))


# -- what a server sends


def _packet(first: int, *parts: bytes) -> bytes:
    return bytes([first]) + length_bytes(sum(map(len, parts))) + b"".join(parts)


def length_bytes(length: int) -> bytes:
    """A Variable Byte Integer (v5 1.5.5). Raises ValueError beyond what one can say."""
    if length < 0x80:
        return bytes([length])
    if length > MOST_REMAINING_BYTES:
        raise ValueError(f"{length} bytes do not fit into one packet")
    out = bytearray()
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    out.append(length)
    return bytes(out)


@dataclass(frozen=True, slots=True)
class Connack:
    """What CONNACK tells a client of v5 that is let in (v5 3.2.2.3): how large a packet may be; the identifier that it is
    ``assigned``, empty where it has one; the keep-alive that it is to have instead of its own, None where that is well."""

    most_bytes: int
    assigned: str = ""
    keep_alive_s: int | None = None


def connack(version: int, code: Code, told: Connack | None = None) -> bytes:
    """CONNACK (v5 3.2) without a session. To v5 it says what this server does not do, and what ``told`` has."""
    if version != V5:
        return _packet(Kind.CONNACK << 4, bytes([0, _RETURN_CODES.get(code, 5)]))
    properties = b""
    if told is not None:
        # Maximum QoS, Retain Available, Maximum Packet Size, Wildcard, Subscription Identifier and Shared Subscription
        properties = struct.pack(">BBBBBI", 0x24, 1, 0x25, 0, 0x27, told.most_bytes) + bytes(
            [0x29, 0, 0x2A, 0]
        )
        if told.assigned:
            name = told.assigned.encode()
            properties += b"\x12" + len(name).to_bytes(2, "big") + name
        if told.keep_alive_s is not None:
            properties += b"\x13" + min(told.keep_alive_s, 0xFFFF).to_bytes(2, "big")
    return _packet(Kind.CONNACK << 4, bytes([0, code]), length_bytes(len(properties)), properties)


def publish_head(topic: bytes, payload_bytes: int, version: int) -> bytes:
    """All of a PUBLISH with QoS 0 before its payload of ``payload_bytes``. Raises ValueError where that does not fit."""
    size = len(topic)
    if version == V5:
        return b"\x30%b%b%b\0" % (length_bytes(3 + size + payload_bytes), size.to_bytes(2, "big"), topic)
    return b"\x30%b%b%b" % (length_bytes(2 + size + payload_bytes), size.to_bytes(2, "big"), topic)


def acked_publish(topic: bytes, payload_bytes: int, version: int) -> tuple[bytes, bytes]:
    """A PUBLISH with QoS 1 around its packet identifier: what stands before that, and what between it and the payload."""
    between = b"\0" if version == V5 else b""
    rest = length_bytes(4 + len(topic) + len(between) + payload_bytes)
    return b"\x32%b%b%b" % (rest, len(topic).to_bytes(2, "big"), topic), between


def puback(number: int) -> bytes:
    """PUBACK (v5 3.4), successful: the same in both versions."""
    return bytes([Kind.PUBACK << 4, 2, number >> 8, number & 0xFF])


def suback(asked: Subscribe, version: int) -> bytes:
    """SUBACK (v5 3.9): everything is granted, with QoS 1 at most."""
    properties = b"\0" if version == V5 else b""
    granted = bytes(min(qos, 1) for _, qos in asked.filters)
    return _packet(Kind.SUBACK << 4, asked.number.to_bytes(2, "big"), properties, granted)


def unsuback(asked: Subscribe, version: int) -> bytes:
    """UNSUBACK (v5 3.11)."""
    body = b"\0" + bytes(len(asked.filters)) if version == V5 else b""
    return _packet(Kind.UNSUBACK << 4, asked.number.to_bytes(2, "big"), body)


PINGRESP: Final = bytes([Kind.PINGRESP << 4, 0])


def disconnect(code: Code) -> bytes:
    """DISCONNECT of v5 (3.14); v3 has none from a server."""
    return bytes([Kind.DISCONNECT << 4, 2, code, 0])
