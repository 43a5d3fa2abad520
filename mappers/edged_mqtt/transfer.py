"""One image on its way to one device that pulls it, from the offer to the device's word that it runs it.

The device sets the pace: it asks for a chunk, gets it, and asks for the next. What it will ask for next is read and verified
meanwhile, so that most requests are answered in the callback that reads them; the task only reads ahead, and answers what has
to be waited for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from edged.api import Image, Phase, Progress
from edged.errors import EdgedError, Permanent, Reason, Refused, Transient
from edged_mqtt import thingsboard as tb
from edged_mqtt.config import MqttConfig
from edged_mqtt.news import News
from edged_mqtt.thingsboard import ChunkRequest, Download, Misbehaved, Numbers, Offer, Told
from edged_mqtt.wire import Seat

STREAM_BYTES: Final = 256 * 1024
"""A chunk that is larger goes out in parts, so that it is never in memory whole."""
WINDOW_BYTES: Final = 64 * 1024
"""So much is read at once, and again ahead of that; a block of the verified reader, which it gives without a copy."""
MOST_NOTES: Final = 8
"""So often is kept over restarts what the device asks by, in one transfer: each is a write to the disk."""
MOST_REQUESTS: Final = 32
"""Requests for chunks that wait; a device that sends more is not read until some are answered."""
PROGRESS_STEPS: Final = 100
PROGRESS_BYTES: Final = 64 * 1024
PROGRESS_S: Final = 0.2
"""Progress is told in hundredths of the image, or in steps of so many bytes, or so often, whatever comes first."""
AFTER_FAILURE_S: Final = 10.0
"""So long may a device that reports FAILED take to begin anew."""
BOOT_S: Final = 60.0
"""So long its return is awaited in place; after that the job waits for it, and others have its turn."""
_EVIDENCE_CHARS: Final = 200


@dataclass(frozen=True, slots=True)
class Peer:
    """The device that an image goes to: who it is, where it is reached, what it said, what the numbers of its requests stand
    for. ``count`` and ``stop`` are told what it does wrong; ``stop`` ends its connection, and the transfer. ``note`` keeps a
    text over restarts."""

    id: str
    config: MqttConfig
    seat: Seat
    told: Told
    numbers: Numbers
    count: Callable[[str], None]
    stop: Callable[[Misbehaved], None]
    note: Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Verified bytes of the image, from ``begin`` to before ``end``."""

    begin: int
    end: int
    data: memoryview

    def part(self, offset: int, length: int) -> memoryview | None:
        """None where it is not all here."""
        if self.begin <= offset and offset + length <= self.end:
            return self.data[offset - self.begin : offset - self.begin + length]
        return None


class _Answer(NamedTuple):
    """To a request: what of the image it is, and the message as the seat packed it."""

    request: ChunkRequest
    offset: int
    length: int
    message: bytes


class Transfer:
    """See above. :meth:`run` is the task; the other public methods are called by the device's session, at once.

    ``download``: what the device has had of the image, also before. ``early``: what it asked for before this began: it is in
    the middle of the image, and goes on; else it is to begin anew.
    """

    def __init__(
        self,
        peer: Peer,
        offer: Offer,
        image: Image,
        progress: Progress,
        download: Download,
        early: Sequence[ChunkRequest] = (),
    ) -> None:
        self.offer = offer
        self._peer = peer
        self._seat = peer.seat
        self._image = image
        self._progress = progress
        self._config = peer.config
        self._told = peer.told
        self._loop = asyncio.get_running_loop()
        self._download = download
        self._requests = deque(early)
        self._resting = False
        self._notes: set[tuple[str, int]] = set()
        self._next: _Answer | None = None
        """To what the device will most likely ask next."""
        self._pieces: tuple[_Piece, ...] = ()
        self._ahead: tuple[int, int] | None = None
        self._arrivals = 0
        self._fault: EdgedError | None = None
        self._why_away = ""
        self._is_another = False
        self._wake = News()
        self._step_bytes = min(offer.size_bytes // PROGRESS_STEPS, PROGRESS_BYTES)
        self._progress_bytes, self._progress_at = 0, 0.0
        self._news = self._told.news
        self._failures = self._told.failures
        self._moved_at = self._loop.time()
        self._whole_at: float | None = None
        self._failed_at: float | None = None
        self._left_at: float | None = None
        self._updated_at: float | None = None
        download.began(anew=not early)
        if early and not download.is_begun and peer.numbers.is_recalled(early[0].number):
            extent = self._extent(early[0])
            download.goes_on_at(extent[0] if extent else 0)

    # -- for the session

    def wanted(self, request: ChunkRequest) -> bool:
        """The device asks for a chunk. Whether it may ask for more at once. Raises :class:`Misbehaved`."""
        if self._is_another and self._config.hardware_key:
            text = f"{self._peer.id} came back and asks for more; it has to say first which hardware it is"
            self._end(Transient(Reason.NO_RESPONSE, text))
            return True
        if not self._requests and self._at_once(request):
            return True
        self._requests.append(request)
        self._wake.set()
        self._resting = len(self._requests) >= MOST_REQUESTS
        return not self._resting

    def require_round(self) -> None:
        """Raises Permanent(DEVICE_REVERTED) where the device had the image whole as often as it may, and came back with
        another one each time."""
        wholes, told = self._download.wholes, self._told
        if wholes >= self._download.rounds and told.version is not None:
            text = (
                f"it had {self._wanted_name} whole {wholes} times, left, and runs {told.title} {told.version}"
            )
            raise Permanent(Reason.DEVICE_REVERTED, f"{self._peer.id}: {text}")

    def heard(self) -> None:
        """The device said something else."""
        self._wake.set()

    def stopped(self, misbehaved: Misbehaved) -> None:
        """The device is thrown out for what it did."""
        self._end(Permanent(Reason.DEVICE_ERROR, f"{self._peer.id}: {misbehaved}"))

    def arrived(self) -> None:
        """The device is on another connection, and may be another one: it has to say who it is before it gets a byte."""
        self._arrivals += 1
        self._resting = False
        self._requests.clear()
        self._is_another = True
        if self._whole_at is None:
            self._end(self._cut())
        self._wake.set()

    @property
    def is_over(self) -> bool:
        """Whether what the device asks for is no matter of this transfer any more."""
        return self._fault is not None

    def _end(self, fault: EdgedError) -> None:
        self._fault = self._fault or fault
        self._wake.set()

    def _cut(self) -> Transient:
        at = self._download.acknowledged_bytes
        self._show(at, self._loop.time())
        text = f"{self._why_away}, with {at} of {self.offer.size_bytes} bytes"
        return Transient(Reason.DEVICE_ABSENT, f"{self._peer.id}: {text}")

    def left(self, why: str) -> None:
        """The device's connection is over."""
        self._why_away = why
        self._resting = False
        self._requests.clear()
        self._wake.set()

    async def run(self) -> None:
        """Until the device runs the image. Raises as :meth:`edged_mqtt.session.MqttSession.stage`."""
        self._progress(Phase.WRITE, self._download.acknowledged_bytes, self.offer.size_bytes)
        while not self._is_done():
            if self._fault is not None:
                raise self._fault
            if self._requests:
                await self._answer_first()
            elif self._ahead is not None:
                await self._read_ahead(*self._ahead)
            else:
                await self._wait()

    def close(self) -> None:
        """It ends, also before it has begun: what the device asked for is not answered, and it is read again."""
        self._requests.clear()
        self._make_room()

    def _make_room(self) -> None:
        if self._resting and not self._requests:
            self._resting = False
            self._seat.more()

    # -- what the device says

    def _is_done(self) -> bool:
        """Judge what the device said since the last look."""
        told = self._told
        if told.news == self._news:
            return False
        self._news = told.news
        if told.state is not None:
            # one that only says again what it runs may wait for a chunk that was lost
            self._moved_at = self._loop.time()
        if told.runs(self.offer):
            self._progress(Phase.VERIFY, self.offer.size_bytes, self.offer.size_bytes)
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
        self._peer.count("wrong_version")
        text = f"it says {tb.UPDATED} and runs {self._told.title} {self._told.version}"
        return Permanent(Reason.DEVICE_REVERTED, f"{self._peer.id}: {text}, not {self._wanted_name}")

    @property
    def _wanted_name(self) -> str:
        return f"{self.offer.title} {self.offer.version}"

    def _has_all(self) -> None:
        if self._whole_at is None:
            self._whole_at = self._loop.time()
        self._download.finished()
        self._progress(Phase.WRITE, self.offer.size_bytes, self.offer.size_bytes)
        self._progress(Phase.VERIFY, 0, self.offer.size_bytes)

    def _failed(self) -> None:
        self._peer.count("device_failed")
        self._download.failures += self._told.failures - self._failures
        self._failures = self._told.failures
        self._whole_at = self._updated_at = None
        self._failed_at = self._loop.time() if self._told.state == tb.FAILED else None
        if self._download.failures >= self._download.rounds:
            raise self._broken()

    def _broken(self) -> Permanent:
        text = f"it says {tb.FAILED}: {self._told.error[:_EVIDENCE_CHARS]!r}, {self._download.failures} times"
        return Permanent(Reason.VERIFY_FAILED, f"{self._peer.id}: {text}")

    # -- what it asks for

    def _at_once(self, request: ChunkRequest) -> bool:
        """Whether the request is dealt with, from what is in memory. Raises :class:`Misbehaved`."""
        answer, self._next = self._next, None
        if not self._seat.ready:
            return False
        if answer is None or answer.request is not request:
            extent = self._extent(request)
            if extent is None:
                return True
            offset, length, size = extent
            answer = None if self._is_news(request.number, size) else self._at_hand(request, offset, length)
            if answer is None:
                return False
        now = self._loop.time()
        self._ask(answer.offset, answer.length, now)
        self._seat.send_now(answer.message)
        self._download.sent(answer.offset, answer.length)
        self._given(now)
        self._foresee(answer)
        return True

    def _at_hand(self, request: ChunkRequest, offset: int, length: int) -> _Answer | None:
        """What is asked for, where it is in memory. Of a larger one it is to be seen that the device takes it, however
        slowly."""
        part = self._part(offset, length) if length <= WINDOW_BYTES else None
        if part is None:
            return None
        return _Answer(request, offset, length, self._seat.packed(request.answer_topic, part))

    def _foresee(self, answer: _Answer) -> None:
        """Most devices ask for the chunks in order: the time to prepare is while ``answer`` is on its way."""
        offset, length = answer.offset + answer.length, answer.length
        left = self.offer.size_bytes - offset
        if left > 0:
            request = answer.request.following
            self._next = self._at_hand(request, offset, min(length, left))
            self._seat.foresee(request.topic, request.payload, request)

    async def _answer_first(self) -> None:
        """What has to be waited for. The request is first in line meanwhile: those that come later wait behind it."""
        request, arrivals = self._requests[0], self._arrivals
        try:
            await self._answer(request)
        except Misbehaved as exc:
            self._peer.stop(exc)
            return
        if self._requests and self._arrivals == arrivals and self._requests[0] is request:
            self._requests.popleft()
        self._make_room()

    async def _answer(self, request: ChunkRequest) -> None:
        extent = self._extent(request)
        if extent is None:
            return
        offset, length, size = extent
        self._ask(offset, length, self._loop.time())
        arrivals, seat, topic = self._arrivals, self._seat, request.answer_topic
        if self._is_news(request.number, size):
            self._notes.add((request.number, size))
            await self._peer.note(tb.note_of(request.number, size, self.offer))
        try:
            if length > STREAM_BYTES:
                await seat.stream(topic, length, self._parts(offset, length))
            else:
                part = self._part(offset, length) or await self._load(offset, length, size)
                if self._arrivals != arrivals:
                    return  # whoever is there now has not asked for it
                await seat.send(topic, part)
        except Transient as exc:
            if exc.reason is Reason.LINK_LOST:
                return  # it left; the next look says so
            if exc.reason is Reason.NO_RESPONSE:
                self._peer.count("silent")
            raise
        if self._arrivals == arrivals and seat.present:
            # where it left meanwhile, nobody knows what it read; of a stream each part was counted when it went out
            account = self._download.holds if length > STREAM_BYTES else self._download.sent
            account(offset, length)
            self._given(self._loop.time())

    def _extent(self, request: ChunkRequest) -> tuple[int, int, int] | None:
        """Offset and length of what is asked for, and the size of the chunks that are asked for under the request's number: as
        it says, else as it said, else the whole image. None where the number is another image's, and the device was told so.
        Raises :class:`Misbehaved`."""
        offer, number = self.offer, request.number
        if request.component != offer.component or not self._peer.numbers.stands_for(number, offer):
            self._download.stray(f"v2/{request.component} under number {number}")
            self._peer.count("stray_request")
            self._seat.tell(f"v2/{request.component}/error", b"NOT_FOUND")
            return None
        size = self._peer.numbers.size(number, request.size_bytes) or offer.size_bytes
        offset = request.chunk * size
        left = offer.size_bytes - offset
        return offset, size if left >= size else max(0, left), size

    def _is_news(self, number: str, size: int) -> bool:
        """Whether the device asks by what it would not be known by after a restart of the node."""
        return (number, size) not in self._notes and len(self._notes) < MOST_NOTES

    def _ask(self, offset: int, length: int, now: float) -> None:
        """The device wants that, and has what it was given before. Raises :class:`Misbehaved`."""
        allowed = self._seat.largest_bytes
        if self._config.largest_chunk_bytes:
            allowed = min(allowed, self._config.largest_chunk_bytes)
        if length > allowed:
            text = f"it asked for {length} bytes at once; allowed: {allowed}"
            raise Misbehaved("payload_too_large", text, "PAYLOAD_TOO_LARGE")
        if self._download.ask(offset, length):
            self._whole_at = self._updated_at = None
        self._failed_at = None
        self._moved_at = now
        done = self._download.acknowledged_bytes
        moved = done - self._progress_bytes
        if moved >= self._step_bytes or moved < 0 or now - self._progress_at >= PROGRESS_S:
            self._show(done, now)

    def _show(self, done_bytes: int, now: float) -> None:
        self._progress_bytes, self._progress_at = done_bytes, now
        self._progress(Phase.WRITE, done_bytes, self.offer.size_bytes)

    def _given(self, now: float) -> None:
        """The device was sent what it asked for."""
        self._moved_at = now
        if self._whole_at is None and self._download.is_whole:
            self._whole_at = self._moved_at
            self._told.awaits = self.offer.version
            # another deadline from now on
            self._wake.set()

    # -- bytes

    def _part(self, offset: int, length: int) -> memoryview | None:
        """Of what is in memory."""
        for number, piece in enumerate(self._pieces):
            part = piece.part(offset, length) if length else None
            if part is not None:
                if number:
                    self._go_on_from(piece)
                return part
        return None

    def _go_on_from(self, piece: _Piece) -> None:
        """The device has come to ``piece``, which was read ahead."""
        self._pieces = (piece,)
        self._plan(piece)
        if self._ahead is not None:
            data = self._image.at_hand(0, *self._ahead)
            if data is None:
                self._wake.set()
            else:
                self._append(self._ahead[0], data)
                self._ahead = None

    def _append(self, offset: int, data: bytes) -> None:
        if self._pieces and self._pieces[-1].end == offset:
            self._pieces = (self._pieces[-1], _Piece(offset, offset + len(data), memoryview(data)))

    def _plan(self, piece: _Piece) -> None:
        """What to read next: as much again."""
        left = self.offer.size_bytes - piece.end
        self._ahead = (piece.end, min(len(piece.data), left)) if left else None

    async def _load(self, offset: int, length: int, size: int) -> bytes | memoryview:
        """From the image, with what most devices ask for next. Raises what its reader raises."""
        if not length:
            return b""
        reach = min(max(size, WINDOW_BYTES // size * size), self.offer.size_bytes - offset)
        try:
            data = await self._image.read(0, offset, reach)
        except (Refused, Transient):
            # what was not asked for must not cost what was
            return await self._image.read(0, offset, length)
        piece = _Piece(offset, offset + reach, memoryview(data))
        self._pieces = (piece,)
        self._plan(piece)
        return piece.data[:length]

    async def _read_ahead(self, offset: int, length: int) -> None:
        self._ahead = None
        try:
            data = await self._image.read(0, offset, length)
        except (Refused, Transient):
            return  # it is asked for, or it does not matter
        self._append(offset, data)

    async def _parts(self, offset: int, length: int) -> AsyncIterator[bytes]:
        """Nothing of them is acknowledged before all were sent: what the device has taken of them is progress, too."""
        had_bytes = self._download.acknowledged_bytes
        for at in range(offset, offset + length, STREAM_BYTES):
            part = await self._image.read(0, at, min(STREAM_BYTES, offset + length - at))
            # counted at once: it may be the last one that the device gets
            self._download.spent(len(part))
            yield part
            self._moved_at = self._loop.time()
            self._show(min(had_bytes + at - offset, self.offer.size_bytes), self._moved_at)

    # -- silence

    async def _wait(self) -> None:
        """For the next news; raises where it has been silent for too long."""
        if self._seat.present:
            self._left_at = None
        elif self._whole_at is None:
            raise self._cut()
        elif self._left_at is None:
            self._left_at = self._loop.time()
        deadline, _ = self._limit()
        if await self._wake.wait(deadline):
            return
        later, end = self._limit()
        # chunks that were given meanwhile are no news, and put the deadline off
        if later <= deadline:
            raise end()

    def _limit(self) -> tuple[float, Callable[[], EdgedError]]:
        """How long is waited, of the loop's clock, and what it ends with then."""
        config = self._config
        if self._left_at is not None:
            return self._left_at + BOOT_S, self._is_away
        if self._failed_at is not None:
            return self._failed_at + min(AFTER_FAILURE_S, config.silence_s), self._broken
        if self._updated_at is not None:
            return self._updated_at + config.report_s, self._is_wrong
        if self._whole_at is not None:
            return self._whole_at + config.install_s, self._is_as_before
        return self._moved_at + config.silence_s, self._is_silent

    def _is_away(self) -> Transient:
        text = "it has the image whole, left, and is not back yet"
        return Transient(Reason.DEVICE_ABSENT, f"{self._peer.id}: {text}")

    def _is_as_before(self) -> Permanent:
        runs = f"{self._told.title} {self._told.version}"
        text = f"it runs {runs} still {self._config.install_s:g} s after it had {self._wanted_name} whole"
        return Permanent(Reason.DEVICE_REVERTED, f"{self._peer.id}: {text}")

    def _is_silent(self) -> Transient:
        self._peer.count("silent")
        if not self._download.is_begun:
            # one that sleeps and one that is not interested look alike, on any wire
            return Transient(Reason.DEVICE_ABSENT, f"{self._peer.id}: it does not ask for what it is offered")
        at = self._download.acknowledged_bytes
        self._show(at, self._loop.time())
        text = f"silent for {self._config.silence_s:g} s, with {at} of {self.offer.size_bytes} bytes"
        return Transient(Reason.NO_RESPONSE, f"{self._peer.id}: {text}")
