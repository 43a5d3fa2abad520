"""The upload of an image by SMP (image group, command 1).

The server keeps the offset of what it has, and tells it in each answer; a piece from any other offset it drops. So whatever
was lost, doubled or forgotten on the way, the next piece begins where the server says (go back N). The first request carries
the SHA-256 of the whole file: a server that has a part of that file already answers with the end of it. So it tells, too, whose
upload the server's is, where that is at an offset to which this one has not brought it: another's is ended by it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from edged.errors import Permanent, Reason, Transient
from edged_uart import smp
from edged_uart.smp_client import BUSY_S, SmpClient

_IMAGE_HEADER_BYTES: Final = 32
_ALIGNED_BYTES: Final = 4
_STRIKES: Final = 8
_RESTARTS: Final = 3
_FIRST_RUN: Final = 8
_LONGEST_RUN: Final = 1024


@dataclass(frozen=True, slots=True)
class Content:
    """What is uploaded. ``sha256`` is of the whole file. ``is_listed``: does the device list it among what it has?"""

    read: Callable[[int, int], Awaitable[bytes]]
    is_listed: Callable[[], Awaitable[bool]]
    size_bytes: int
    sha256: bytes

    @property
    def first(self) -> dict[str, object]:
        """The fields of the first request beside ``off`` and ``data``."""
        return {"len": self.size_bytes, "sha": self.sha256}


@dataclass(frozen=True, slots=True)
class Window:
    """How many requests may wait for their answers: ``size``, from 1 to ``most``.

    As TCP's (RFC 5681): halved whenever something was lost, and one more after a run of answers that were as expected.
    A loss costs a time-out here, and a server that has no room for more will not have any later: so the run that it
    takes, ``run_needed``, doubles with each loss.
    """

    size: int
    most: int
    run: int = 0
    run_needed: int = _FIRST_RUN

    def after_answer(self) -> Window:
        """One more answer was as expected."""
        if self.size >= self.most:
            return self
        if self.run + 1 < self.run_needed:
            return replace(self, run=self.run + 1)
        return replace(self, size=self.size + 1, run=0)

    def after_loss(self) -> Window:
        """Something was lost, or the server had no room for it."""
        needed = min(_LONGEST_RUN, self.run_needed * 2)
        return Window(max(1, self.size // 2), self.most, run_needed=needed)


@dataclass(frozen=True, slots=True)
class Pace:
    """``erase_s``: for so long the server may erase before it answers the first request. ``answer_s``: then for each.
    ``byte_s``: time of a byte on the line. ``window``: so many requests may wait for their answers at most."""

    erase_s: float
    answer_s: float
    byte_s: float
    window: int = 1


async def upload(
    client: SmpClient, content: Content, pace: Pace, progress: Callable[[int], None]
) -> bool | None:
    """Bring ``content`` to the server, from the offset on that it names; ``progress`` is told that offset.

    Returns what the server says of the whole (``match``), None where it says nothing. Raises ErrorAnswer (a Permanent),
    Transient: NO_RESPONSE, PROTOCOL_ERROR, LINK_LOST, DEVICE_ERROR where somebody else uploads, too; and what reading raises.
    """
    await client.meet()
    return await _Upload(client, content, pace, progress).run()


class _Upload:
    def __init__(
        self, client: SmpClient, content: Content, pace: Pace, progress: Callable[[int], None]
    ) -> None:
        self._client = client
        self._content = content
        self._pace = pace
        self._window = Window(max(1, pace.window), max(1, pace.window))
        self._first = content.first
        self._progress = progress
        self._offset = 0
        self._furthest = 0
        self._ends: set[int] = set()
        self._is_astray = False
        self._asks = True
        self._lost = 0
        self._strikes = 0
        self._match: bool | None = None

    async def run(self) -> bool | None:
        for _ in range(_RESTARTS):
            await self._begin()
            while 0 < self._offset < self._content.size_bytes:
                await self._stretch()
                if self._is_astray:
                    await self._ask_whose()
            if self._offset:
                return self._match
            # the server knows of no upload: it began anew, or the answer to the last piece was lost
            if await self._content.is_listed():
                self._progress(self._content.size_bytes)
                return None
        raise Transient(Reason.PROTOCOL_ERROR, f"the device forgot the upload {_RESTARTS} times")

    async def _ask_whose(self) -> None:
        """Begin again: what the server has of this upload is gone on with. Raises Transient(DEVICE_ERROR) where it is
        another's again and again."""
        was, ends, furthest, strikes = self._offset, self._ends, self._furthest, self._strikes
        first = await self._begin()
        if self._offset == was and self._asks:
            # it takes less than it is sent, or has taken somebody's piece for ours, which the hash will tell
            self._asks = False
        elif self._offset >= furthest and self._offset in ends - {first}:
            # an answer was damaged
            self._strikes = strikes
        else:
            self._lost += 1
            if self._lost == _RESTARTS:
                text = f"somebody else uploads to the device, too: this upload was ended {_RESTARTS} times"
                raise Transient(Reason.DEVICE_ERROR, text)

    async def _begin(self) -> int:
        """The first request, alone: the server may erase before it answers, and may name any offset. Returns the end of the
        piece in it.

        It may be busy, or may have lost the request. So it is asked something else after each time-out, which it answers
        when it has dealt with all before: where that is the first answer, the first request has to be repeated.
        """
        body = await self._piece(0)
        least = min(_IMAGE_HEADER_BYTES, self._content.size_bytes)
        if len(body["data"]) < least:
            # the header must be whole in it; without the hash an upload that is cut begins anew
            del self._first["sha"]
            self._asks = False
            body = await self._piece(0)
        if len(body["data"]) < least:
            text = (
                f"its buffer of {self._client.parameters.buffer_bytes} bytes has no room for an image header"
            )
            raise Permanent(Reason.UNSUPPORTED, f"the device cannot be flashed: {text}")
        self._furthest, self._strikes, self._ends = 0, 0, set()
        loop = asyncio.get_running_loop()
        end = loop.time() + self._pace.erase_s
        sequence, question = await self._client.send(smp.UPLOAD, body), None
        expected = {sequence: smp.UPLOAD}
        while loop.time() < end:
            answer = await self._client.answer(expected, self._patience_s(1))
            if answer is None:
                question = await self._client.send(smp.PARAMETERS, sequence=question)
                expected[question] = smp.PARAMETERS
            elif answer.sequence == sequence and await self._is_taken(answer.body):
                self._furthest, self._ends, self._is_astray = self._offset, {self._offset}, False
                return len(body["data"])
            else:
                await self._client.send(smp.UPLOAD, body, sequence=sequence)
        raise Transient(
            Reason.NO_RESPONSE,
            f"the device did not answer the first piece of the image within {self._pace.erase_s:g} s",
        )

    async def _stretch(self) -> None:
        """Pieces from the server's offset on, until there are no more or the server's offset is not the expected one."""
        flight: dict[int, int] = {}
        following, on_course = self._offset, True
        while True:
            while on_course and len(flight) < self._window.size and following < self._content.size_bytes:
                body = await self._piece(following)
                following += len(body["data"])
                self._ends.add(following)
                flight[await self._client.send(smp.UPLOAD, body)] = following
            if not flight:
                return
            answer = await self._client.answer(
                dict.fromkeys(flight, smp.UPLOAD), self._patience_s(len(flight))
            )
            if answer is None:
                self._strike("did not answer")
                return
            # it answers in order: what was sent before this one was lost, or its answer was
            for sequence in list(flight):
                end = flight.pop(sequence)
                if sequence == answer.sequence:
                    break
            if not await self._is_taken(answer.body):
                self._strike("has no room")
                on_course = False
            elif self._offset != end and on_course:
                # what is on its way is dropped by the server, and answered so: only then is it clear what to send
                self._strike(f"is at {self._offset} instead of {end}")
                on_course = False
            elif on_course:
                self._window = self._window.after_answer()

    async def _is_taken(self, body: Mapping[str, Any]) -> bool:
        """:meth:`_take`; False, after a pause, where the server has no room at present."""
        try:
            self._take(body)
        except smp.ErrorAnswer as error:
            if error.is_overrun and self._ends:
                # what is sent never goes beyond the length that was told: that was another's
                self._is_astray = True
                return False
            if not error.passes:
                raise
            await asyncio.sleep(BUSY_S)
            return False
        return True

    def _take(self, body: Mapping[str, Any]) -> None:
        """Believe an answer. Raises ErrorAnswer, Transient(PROTOCOL_ERROR)."""
        offset = smp.check(smp.UPLOAD, body).get("off")
        if not isinstance(offset, int) or not 0 <= offset <= self._content.size_bytes:
            raise Transient(
                Reason.PROTOCOL_ERROR,
                f"the device is at offset {offset!r} of an image of {self._content.size_bytes} bytes",
            )
        self._offset = offset
        self._is_astray |= self._asks and offset > 0 and (offset < self._furthest or offset not in self._ends)
        if offset > self._furthest and not self._is_astray:
            self._furthest, self._strikes = offset, 0
        if isinstance(body.get("match"), bool):
            self._match = body["match"]
        self._progress(offset)

    def _strike(self, what: str) -> None:
        """Something was lost. Raises Transient(NO_RESPONSE) after too many without a new byte in between."""
        self._strikes += 1
        self._window = self._window.after_loss()
        if self._strikes >= _STRIKES:
            raise Transient(
                Reason.NO_RESPONSE,
                f"no byte beyond {self._furthest} arrives: the device {what}, and {self._strikes - 1} times before",
            )

    async def _piece(self, offset: int) -> dict[str, Any]:
        """The body of the request from ``offset`` on: as much as the server has room for."""
        body: dict[str, Any] = {"off": offset, "data": b"", **(self._first if offset == 0 else {})}
        room = self._client.message_bytes - len(smp.encode(smp.UPLOAD, 0, body))
        left = self._content.size_bytes - offset
        # CBOR needs 0 to 2 bytes more for the length of what is no longer empty (RFC 8949, 3)
        length = max(0, room - (0 if room < 24 else 1 if room < 256 else 2))
        if length < left:
            # flash is written in words; a server that does not gather them would answer for less
            length -= length % _ALIGNED_BYTES
        body["data"] = await self._content.read(offset, min(length, left))
        return body

    def _patience_s(self, messages: int) -> float:
        wire_bytes = messages * 2 * self._client.parameters.buffer_bytes
        return self._pace.answer_s + wire_bytes * self._pace.byte_s
