"""ThingsBoard's device API over MQTT, the server's side: topics, payloads, and what a download may cost. Pure.

After the reference "MQTT Device API" and "OTA updates" of ThingsBoard 3.x and its MqttTransportHandler. Topics name no device:
``me`` is whoever's connection it is.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field
from hashlib import md5, sha256, sha384, sha512
from operator import itemgetter
from typing import Any, Final, NamedTuple, Protocol

from edged.api import JsonValue

TELEMETRY: Final = "v1/devices/me/telemetry"
ATTRIBUTES: Final = "v1/devices/me/attributes"
ATTRIBUTES_REQUEST: Final = "v1/devices/me/attributes/request/"
ATTRIBUTES_RESPONSE: Final = "v1/devices/me/attributes/response/"
RPC_REQUEST: Final = "v1/devices/me/rpc/request/"
RPC_RESPONSE: Final = "v1/devices/me/rpc/response/"
SUBSCRIBED: Final = ("v1/devices/me/#", "v2/fw/request/#", "v2/sw/request/#")
"""What a server wants of a device's topics."""

DOWNLOADING: Final = "DOWNLOADING"
DOWNLOADED: Final = "DOWNLOADED"
UPDATED: Final = "UPDATED"
FAILED: Final = "FAILED"
BOOTING: Final = frozenset({DOWNLOADED, "VERIFIED", "UPDATING"})
"""It has an image whole, and may boot it any time."""

SESSION_LIMITS: Final[dict[str, JsonValue]] = {
    "maxPayloadSize": 65536,
    "maxInflightMessages": 100,
    "rateLimits": {"messages": "", "telemetryMessages": "", "telemetryDataPoints": ""},
}
"""The answer to ``getSessionLimits``: an empty text is no limit. What is too much is read later and not lost, and a client that
kept to a rate would ask for chunks at that."""

PAST_THE_END: Final = 8
"""So often may a client ask for what is behind the image's end."""
STRAY: Final = 8
"""So often may it ask under a number that belongs to another image, or for the other component."""
SMALLEST_CHUNK_BYTES: Final = 64
"""Of a chunk that does not end the image: smaller ones cost more in messages than in bytes."""
MOST_PIECES: Final = 16_384
"""An image may be fetched in any order, but so many parts of it at most may lie apart from one another."""
MOST_NUMBERS: Final = 64
"""Of a device's requests, on one connection."""
MOST_NAME_CHARS: Final = 128
MOST_VALUE_CHARS: Final = 4096
MOST_NAMES: Final = 256
MOST_VALUES_CHARS: Final = 256 * 1024
"""What is kept of what a device reports: of one name and of one value, as JSON, and in all."""
DEEPEST: Final = 32
"""So many objects and lists may lie in one another: what is read must also be written again, from deeper in the stack."""
_MOST_DIGITS: Final = 9
_CHUNK = re.compile(r"v2/(fw|sw)/request/([0-9A-Za-z_-]{1,32})/chunk/([0-9]{1,9})")
_OPENING = re.compile(r"[\[{]")
_NUMBER = re.compile(r"[0-9]{1,32}")
_OF_AN_OFFER = re.compile(r"(fw|sw)_(title|version|tag|size|checksum|checksum_algorithm|url)")


class Misbehaved(Exception):
    """A client does what must be stopped. ``event`` is what it is counted as, ``answer`` what it is told."""

    def __init__(self, event: str, detail: str, answer: str) -> None:
        super().__init__(detail)
        self.event = event
        self.answer = answer


class ChunkRequest(NamedTuple):
    """``v2/{component}/request/{number}/chunk/{chunk}``. ``size_bytes`` None: an empty payload; 0: the whole image."""

    component: str
    number: str
    chunk: int
    size_bytes: int | None

    @property
    def topic(self) -> str:
        return f"v2/{self.component}/request/{self.number}/chunk/{self.chunk}"

    @property
    def payload(self) -> bytes:
        return b"" if self.size_bytes is None else b"%d" % self.size_bytes

    @property
    def following(self) -> ChunkRequest:
        """For the chunk after this one."""
        return ChunkRequest(self.component, self.number, self.chunk + 1, self.size_bytes)

    @property
    def answer_topic(self) -> str:
        return f"v2/{self.component}/response/{self.number}/chunk/{self.chunk}"


def chunk_request(topic: str, payload: bytes) -> ChunkRequest | None:
    """A request for a chunk, None where the topic is none. Raises :class:`Misbehaved` for a size that is no number."""
    match = _CHUNK.fullmatch(topic)
    if match is None:
        return None
    size: int | None = None
    if payload:
        if len(payload) > _MOST_DIGITS or not payload.isdigit():
            raise Misbehaved("bad_request", f"chunk size {payload[:20]!r} is no number", "BAD_REQUEST")
        size = int(payload)
    return ChunkRequest(match[1], match[2], int(match[3]), size)


@dataclass(frozen=True, slots=True)
class Offer:
    """An image as a device is told of it."""

    component: str
    title: str
    version: str
    size_bytes: int
    checksum: str
    algorithm: str

    @property
    def attributes(self) -> dict[str, JsonValue]:
        """The shared attributes."""
        return dict(zip(names(self.component), self._values, strict=True))

    @property
    def _values(self) -> tuple[JsonValue, ...]:
        return self.title, self.version, self.size_bytes, self.checksum, self.algorithm


def names(component: str) -> tuple[str, ...]:
    """The shared attributes that tell of an image."""
    return tuple(
        f"{component}_{name}" for name in ("title", "version", "size", "checksum", "checksum_algorithm")
    )


def tells_of_an_image(name: str) -> bool:
    """Whether ``name`` is a shared attribute by which a device is offered an image, also one that is not offered here (a tag,
    an URL)."""
    return _OF_AN_OFFER.fullmatch(name) is not None


def withdrawal(component: str) -> bytes:
    """The message that an image is not offered any more."""
    return deleted(*names(component))


def deleted(*attributes: str) -> bytes:
    """The message that these shared attributes are there no more."""
    return encoded({"deleted": list(attributes)})


@dataclass(slots=True)
class _Meaning:
    """Of a number: the image, and the size of chunks that was named under it last; 0: the image's; None: none was.
    ``is_recalled``: from before this node was started."""

    offer: Offer
    size_bytes: int | None = None
    is_recalled: bool = False


class Numbers:
    """What the numbers of a device's requests stand for, on one connection: an image, and a size of chunks. The oldest of too
    many are forgotten."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, _Meaning] = OrderedDict()
        self._former: OrderedDict[str, _Meaning] = OrderedDict()

    def stands_for(self, number: str, offer: Offer) -> bool:
        """Whether ``number`` is that of ``offer``; one that is new is so from now on."""
        known = self._known.get(number)
        if known is None:
            former = self._former.get(number)
            # a size that was named for another image is none for this one
            size_bytes = former.size_bytes if former is not None and former.offer == offer else None
            _keep(self._known, number, _Meaning(offer, size_bytes))
            return True
        return known.offer is offer or known.offer == offer

    def stood_for(self, number: str, offer: Offer) -> bool:
        """Whether ``number`` is that of ``offer``, also where the device began under it on a former connection."""
        known = (self._known.get(number), self._former.get(number))
        return any(meaning is not None and meaning.offer == offer for meaning in known)

    def size(self, number: str, size_bytes: int | None) -> int | None:
        """``size_bytes``, or where that is None what it was before under this number, which stands for an image."""
        meaning = self._known[number]
        if size_bytes is not None:
            meaning.size_bytes = size_bytes
        return meaning.size_bytes

    def recall(self, note: str) -> None:
        """What a device had begun before this node was started, as :func:`note_of` wrote it."""
        number, size_bytes, *offer = json.loads(note)
        _keep(self._former, number, _Meaning(Offer(*offer), size_bytes, is_recalled=True))

    def is_recalled(self, number: str) -> bool:
        """Whether what the device began under ``number`` was counted in another life of this node."""
        former = self._former.get(number)
        return former is not None and former.is_recalled

    def reconnected(self) -> None:
        """It is another connection. One that ended before anything was asked takes nothing away."""
        for number, meaning in self._known.items():
            _keep(self._former, number, meaning)
        self._known.clear()

    def withdrawn(self) -> None:
        """The device knows that what it began is not offered any more."""
        self._known.clear()
        self._former.clear()


def note_of(number: str, size_bytes: int, offer: Offer) -> str:
    """What is kept over restarts: under which number a device asks for which image, in chunks of which size."""
    return json.dumps([number, size_bytes, *astuple(offer)])


def _keep(kept: OrderedDict[str, _Meaning], number: str, meaning: _Meaning) -> None:
    kept[number] = meaning
    kept.move_to_end(number)
    while len(kept) > MOST_NUMBERS:
        kept.popitem(last=False)


class Hash(Protocol):
    """A checksum in the making."""

    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


class _Crc32:
    """CRC-32 as ThingsBoard writes it: the four bytes little-endian (Guava's HashCode)."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return self._value.to_bytes(4, "little").hex()


def checksum(algorithm: str) -> Hash:
    """For ``fw_checksum_algorithm``. It guards against the wire, not against an attacker: every byte was verified before."""
    if algorithm == "CRC32":
        return _Crc32()
    return {"SHA256": sha256, "SHA384": sha384, "SHA512": sha512, "MD5": md5}[algorithm]()


@dataclass(slots=True)
class Told:
    """What a device said of its firmware, as far as it is still true: nothing of a former connection is. ``news`` rises with
    each report; ``awaits`` is the version of an image that it was given whole: it may boot that without another word.
    ``failures`` counts how often it said FAILED, ``error`` is why it did so last. ``since``: from that time on (of the loop's
    clock) what it says is the word of what it runs. ``names_version``: its last word on its state came with the version.
    ``offered_version``: of the image that it was offered last, which is the one that it says FAILED of. ``boots_since``: when
    it said first that it may boot any time; None: it does not say so."""

    title: str | None = None
    version: str | None = None
    state: str | None = None
    news: int = 0
    awaits: str | None = None
    failures: int = 0
    error: str = ""
    since: float = 0.0
    names_version: bool = True
    offered_version: str | None = None
    boots_since: float | None = None
    _arrived_at: float | None = None

    def take(self, component: str, values: Mapping[str, JsonValue], now: float) -> bool:
        """Read a report that came at ``now``; False where it says nothing of the firmware."""
        found = {
            key: values[name]
            for key, name in (
                ("title", f"current_{component}_title"),
                ("version", f"current_{component}_version"),
                ("state", f"{component}_state"),
                ("error", f"{component}_error"),
            )
            if isinstance(values.get(name), str)
        }
        if not found:
            return False
        if "version" in found:
            # a report with the version is one of all: what is not in it is not so any more
            self.state = None
        if found.get("state") == FAILED:
            # counted here: the next word may come before anybody has looked
            self.failures += 1
            self.error = str(found.get("error", ""))
        if found.get("version", self.version) != self.version:
            # what a connection's first word names has run since it was made, unless an image was offered meanwhile
            self.since = now if self._arrived_at is None else self._arrived_at
            self._arrived_at = None
        for key in found.keys() - {"error"}:
            setattr(self, key, found[key])
        if self.state not in BOOTING:
            self.boots_since = None
        elif self.boots_since is None:
            self.boots_since = now
        self.names_version = "version" in found or (self.names_version and "state" not in found)
        if self.state in (UPDATED, FAILED) or self.version == self.awaits:
            self.awaits = None
        self.news += 1
        return True

    @property
    def is_unsure(self) -> bool:
        """Whether what it said last does not tell what it runs."""
        return self.is_booting or (self.state == UPDATED and not self.names_version)

    @property
    def is_booting(self) -> bool:
        """Whether it may run something else any time."""
        return self.state in BOOTING or self.awaits is not None

    def reconnected(self, now: float) -> None:
        """It is on another connection: it may have booted anything meanwhile, or be another board."""
        self.title = self.version = self.state = self.awaits = None
        self.since = self._arrived_at = now
        self.news += 1

    def offered(self, version: str) -> None:
        """It may become something else on this connection."""
        self._arrived_at = None
        self.offered_version = version

    @property
    def contradicts(self) -> bool:
        """Whether it names the version that it was offered, and says that it failed to install that."""
        return self.state == FAILED and self.version is not None and self.version == self.offered_version

    def runs(self, offer: Offer) -> bool:
        """Whether it says that it runs ``offer``, and is not about to boot something else."""
        named = self.title is None or self.title == offer.title
        return self.version == offer.version and named and not (self.is_booting or self.contradicts)


class Pieces:
    """Which bytes of an image were sent: parts that touch are one."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._edges: list[int] = []
        """Where parts begin and end, in turn."""

    def __len__(self) -> int:
        return len(self._edges) // 2

    def add(self, begin: int, end: int) -> None:
        if self._edges and self._edges[-1] == begin < end:
            # in order, as nearly all are
            self._edges[-1] = end
            self.total_bytes += end - begin
            return
        first, last = bisect_left(self._edges, begin), bisect_right(self._edges, end)
        begins, ends = [begin] * (first % 2), [end] * (last % 2)
        known = [*begins, *self._edges[first:last], *ends]
        self.total_bytes += end - begin - (sum(known[1::2]) - sum(known[::2]))
        self._edges[first:last] = [begin] * (1 - first % 2) + [end] * (1 - last % 2)

    @property
    def has_first(self) -> bool:
        """Whether the first byte is among them."""
        return self._edges[:1] == [0]

    def clear(self) -> None:
        self._edges.clear()
        self.total_bytes = 0


@dataclass(slots=True)
class Download:
    """How far one device is with one image, and what it cost, over all connections on which it is offered that. ``rounds``: so
    often may it be fetched. ``wholes`` counts the rounds before this one in which every byte of it was sent, ``failures`` how
    often the device said that it failed."""

    size_bytes: int
    rounds: int
    sent_bytes: int = 0
    wholes: int = 0
    failures: int = 0
    _past: int = 0
    _stray: int = 0
    _sent: Pieces = field(default_factory=Pieces)
    acknowledged_bytes: int = 0
    _most_bytes: int = 0

    def __post_init__(self) -> None:
        self._most_bytes = self.rounds * self.size_bytes + self.slack_bytes

    def ask(self, offset: int, length: int) -> bool:
        """The device wants ``length`` bytes at ``offset``; with that it has what it was sent before. Whether it begins anew.

        Raises :class:`Misbehaved` where it asked too often, or for too little.
        """
        if not length:
            self._past += 1
            if self._past > PAST_THE_END:
                text = f"it asked {self._past} times for what is behind the end of the image"
                raise Misbehaved("endless_requests", text, "NOT_FOUND")
        elif length < SMALLEST_CHUNK_BYTES and offset + length < self.size_bytes:
            text = f"it asked for a chunk of {length} bytes; allowed: {SMALLEST_CHUNK_BYTES} or more"
            raise Misbehaved("chunk_too_small", text, "BAD_REQUEST")
        self.acknowledged_bytes = max(self.acknowledged_bytes, self._sent.total_bytes)
        anew = offset == 0 and self._sent.has_first
        if anew:
            self._begin_round()
        if self.sent_bytes + length > self._most_bytes:
            text = f"it fetched {self.sent_bytes} bytes of an image of {self.size_bytes}"
            raise Misbehaved("same_download", text, "TOO_MANY_REQUESTS")
        if len(self._sent) >= MOST_PIECES:
            text = f"it asked for {len(self._sent)} parts of the image that lie apart"
            raise Misbehaved("scattered_requests", text, "TOO_MANY_REQUESTS")
        return anew

    @property
    def slack_bytes(self) -> int:
        """What may be asked for twice without being a round of its own."""
        return max(65536, self.size_bytes // 4)

    def stray(self, why: str) -> None:
        """It asked for something that it was not offered. Raises :class:`Misbehaved` where it does so for ever."""
        self._stray += 1
        if self._stray > STRAY:
            raise Misbehaved("stray_requests", f"it asked {self._stray} times for {why}", "NOT_FOUND")

    def sent(self, offset: int, length: int) -> None:
        """It was sent what it wanted."""
        self.spent(length)
        self.holds(offset, length)

    def spent(self, length: int) -> None:
        """So many bytes went out to it, perhaps not all of what it wanted."""
        self.sent_bytes += length

    def holds(self, offset: int, length: int) -> None:
        """All of what it wanted went out."""
        if length:
            self._sent.add(offset, offset + length)

    @property
    def is_begun(self) -> bool:
        """Whether anything was sent in this round."""
        return len(self._sent) > 0

    @property
    def is_whole(self) -> bool:
        """Whether every byte was sent in this round."""
        return self._sent.total_bytes >= self.size_bytes

    def goes_on_at(self, offset: int) -> None:
        """It has what is before ``offset``, from a life of this node in which that was counted."""
        self.holds(0, offset)
        self.acknowledged_bytes = offset

    def began(self, *, anew: bool) -> None:
        """It is offered the image ``anew``, or goes on where it was. What it had cost is not forgotten."""
        self._past = self._stray = 0
        if anew:
            self._begin_round()

    def _begin_round(self) -> None:
        self.wholes += self.is_whole
        self._sent.clear()
        self.acknowledged_bytes = 0

    def finished(self) -> None:
        """The device says that it has it all."""
        self.acknowledged_bytes = self.size_bytes


def fits(name: str, value: JsonValue) -> bool:
    """Whether a value is none too large to be kept, nor its name."""
    return len(name) <= MOST_NAME_CHARS and _chars(value) <= MOST_VALUE_CHARS


def _chars(value: JsonValue) -> int:
    return len(value) if isinstance(value, str) else len(json.dumps(value, ensure_ascii=False))


class Values(Mapping[str, JsonValue]):
    """What a device reported last under each name, and when: bounded in number and in characters."""

    def __init__(self) -> None:
        self._values: dict[str, tuple[float, int, JsonValue]] = {}
        self._chars = 0

    def put(self, name: str, value: JsonValue, now: float) -> bool:
        """Whether there was room; what it replaces is gone only where there was."""
        _, before, _ = self._values.get(name, (0.0, 0, None))
        chars = len(name) + _chars(value)
        total = self._chars - before + chars
        if (name not in self._values and len(self._values) >= MOST_NAMES) or total > MOST_VALUES_CHARS:
            return False
        self._values[name] = (now, chars, value)
        self._chars = total
        return True

    def told_at(self, name: str) -> float:
        """When it was reported last, of the loop's clock; before all times where it never was."""
        return self._values[name][0] if name in self._values else -math.inf

    def forget(self, name: str) -> None:
        if name in self._values:
            self._chars -= self._values.pop(name)[1]

    def __getitem__(self, name: str) -> JsonValue:
        return self._values[name][2]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def encoded(value: JsonValue) -> bytes:
    """JSON. Raises ValueError for what nests too deep, or has half a surrogate pair in a text."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("JSON within JSON within JSON") from None


def _decoded(payload: bytes) -> Any:
    """JSON in UTF-8 (RFC 8259, 8.1). Raises ValueError for what is none, nests deeper than ``DEEPEST``, or cannot be encoded
    again."""
    text = payload.decode("utf-8-sig")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("JSON within JSON within JSON") from None
    if len(_OPENING.findall(text)) > DEEPEST:
        _require_flat(found)
    if "\\u" in text:
        encoded(found)
    return found


def _require_flat(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [child for one in level for child in _children(one)]
        if not level:
            return
    raise ValueError(f"JSON that nests deeper than {DEEPEST}")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def reported(payload: bytes) -> list[Mapping[str, JsonValue]]:
    """The samples of telemetry or attributes, the oldest first: ``{k: v}``, ``{"ts": t, "values": {k: v}}``, or a list of such.
    One without a time is of now.

    Raises ValueError for anything else.
    """
    found = _decoded(payload)
    if not isinstance(found, list):
        return [_sample(found)[1]]
    return [values for _, values in sorted(map(_sample, found), key=itemgetter(0))]


def _sample(item: Any) -> tuple[float, Mapping[str, JsonValue]]:
    """Time in milliseconds, and values."""
    if not isinstance(item, dict):
        raise ValueError("no object of values")
    time_ms, values = item.get("ts"), item.get("values")
    if "ts" not in item or not isinstance(values, dict):
        return math.inf, item
    if not isinstance(time_ms, int | float | str):
        raise ValueError("ts is no time")
    return float(time_ms) if isinstance(time_ms, str) else time_ms, values


def request_number(topic: str, prefix: str) -> str | None:
    """The number at the end of a request's topic; None where there is none."""
    number = topic.removeprefix(prefix)
    return number if topic.startswith(prefix) and _NUMBER.fullmatch(number) else None


def wanted_keys(payload: bytes) -> tuple[frozenset[str], frozenset[str]]:
    """The client's and the shared attributes that a request names; both empty: it wants all. Raises ValueError."""
    found = _decoded(payload) if payload else {}
    if not isinstance(found, dict):
        raise ValueError("no object of keys")
    client, shared = found.get("clientKeys", ""), found.get("sharedKeys", "")
    return _keys(client), _keys(shared)


def _keys(text: object) -> frozenset[str]:
    return frozenset(text.split(",")) - {""} if isinstance(text, str) else frozenset()


def attributes_answer(
    payload: bytes, client: Mapping[str, JsonValue], shared: Mapping[str, JsonValue]
) -> bytes:
    """The answer to a request for attributes. Raises ValueError where it cannot be read."""
    client_keys, shared_keys = wanted_keys(payload)
    every = not client_keys and not shared_keys
    answer: dict[str, JsonValue] = {}
    for name, keys, values in (("client", client_keys, client), ("shared", shared_keys, shared)):
        found = {key: value for key, value in values.items() if every or key in keys}
        if found or keys:
            answer[name] = found
    return encoded(answer)


def rpc_answer(payload: bytes) -> bytes:
    """The answer to a device's call. Raises ValueError where it cannot be read."""
    call = _decoded(payload)
    if not isinstance(call, dict):
        raise ValueError("no object with a method")
    if call.get("method") == "getSessionLimits":
        return encoded(SESSION_LIMITS)
    return encoded({"error": "UNSUPPORTED"})
