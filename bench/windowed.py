"""A mapper for the benchmark only: frames with a window and cumulative answers, over edged's real serial link.

The device's side is ``fleet.c --mode window``, which describes the frames. It shows what the link can carry where the
protocol does not wait for each page; no real device speaks this.
"""

from __future__ import annotations

import binascii
from collections import deque
from typing import Final

from edged.api import Image, Phase, Progress
from edged.errors import Reason, Transient
from edged_uart.link import SerialLink

DATA_BYTES: Final = 256
FRAME_BYTES: Final = DATA_BYTES + 4
_WINDOW: Final = 8
_ANSWER_S: Final = 5.0
_FRAME: Final = b"\x01"
_START: Final = b"\x02"
_ACK: Final = 0x06
_ACK_BYTES: Final = 3


class WindowedSession:
    """One device; ``stage`` as in :class:`edged.api.SupportsFirmware`, for one segment of whole frames."""

    def __init__(self, link: SerialLink) -> None:
        self._link = link

    async def stage(self, image: Image, progress: Progress) -> None:
        """Send the image with eight frames under way. Raises Transient(NO_RESPONSE), Transient(PROTOCOL_ERROR)."""
        await self._link.send(_START)
        await self._next_expected()
        (segment,) = image.segments
        frames = segment.length // DATA_BYTES
        under_way: deque[int] = deque()
        for number in range(frames):
            await self._link.send(await self._frame(image, number))
            under_way.append(number)
            if len(under_way) == _WINDOW or number == frames - 1:
                await self._drain(under_way, progress, segment.length, to_empty=number == frames - 1)

    async def _frame(self, image: Image, number: int) -> bytes:
        data = await image.read(0, number * DATA_BYTES, DATA_BYTES)
        frame = _FRAME + bytes((number & 0xFF,)) + data
        return frame + binascii.crc_hqx(frame, 0).to_bytes(2, "big")

    async def _drain(
        self, under_way: deque[int], progress: Progress, total_bytes: int, *, to_empty: bool
    ) -> None:
        """Wait until one frame is answered, or all of them."""
        while under_way:
            expected = await self._next_expected()
            while under_way and (expected - under_way[0] - 1) & 0xFF < _WINDOW:
                progress(Phase.WRITE, (under_way.popleft() + 1) * DATA_BYTES, total_bytes)
            if not to_empty:
                return

    async def _next_expected(self) -> int:
        """The newest answer that is here: the frames before that number have been stored."""
        answers = await self._link.receive(_whole_answers, _ANSWER_S)
        if answers is None:
            raise Transient(Reason.NO_RESPONSE, f"{self._link.path}: no answer within {_ANSWER_S:g} s")
        kind, expected, inverse = answers[-_ACK_BYTES:]
        if kind != _ACK or expected ^ inverse != 0xFF:
            raise Transient(Reason.PROTOCOL_ERROR, f"{self._link.path}: answered {answers[-3:].hex(' ')}")
        return expected


def _whole_answers(got: bytearray) -> int:
    return max(_ACK_BYTES, len(got) - len(got) % _ACK_BYTES)
