"""An SMP client on a serial line: requests and their answers.

A server answers each request once, in the order in which they came. It loses what it has no room for and what is damaged on
the wire, and says nothing then; so a request without an answer is sent again, with the same sequence number, a bounded
number of times. That is the protocol's, not a retry of the job: what then still fails is Transient.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from edged.errors import Reason, Transient
from edged_uart import smp
from edged_uart.link import SerialLink
from edged_uart.smp import Command, ErrorAnswer, Message
from edged_uart.smp_config import MOST_WINDOW
from edged_uart.smp_framing import Framing

TRIES: Final = 4
_PROBE_ROUNDS: Final = 2
_NEWER_S: Final = 0.3
_UNKNOWN_BUFFER_BYTES: Final = 256
_LEAST_BUFFER_BYTES: Final = 32
_MOST_BUFFER_BYTES: Final = 16384
BUSY_S: Final = 0.1
_BUSY_TRIES: Final = 5


class Busy(Transient):
    """The server had no room for a request, or no time, each time that it was asked."""

    def __init__(self, error: ErrorAnswer) -> None:
        super().__init__(Reason.DEVICE_ERROR, f"{error.detail}, {_BUSY_TRIES} times")
        self.name = error.name


@dataclass(frozen=True, slots=True)
class Parameters:
    """What the server says of its buffers (os group, command 6). ``told``: False where it does not know the command."""

    buffer_bytes: int = _UNKNOWN_BUFFER_BYTES
    buffer_count: int = 1
    told: bool = False

    @property
    def window(self) -> int:
        """So many requests may be on their way: each needs a buffer, and one is for the answer. Few enough for their sequence
        numbers to be told apart, and not more than a table may say."""
        return min(MOST_WINDOW, max(1, self.buffer_count - 1))


class SmpClient:
    """Requests over one link, one task at a time.

    ``answer_s``: longest time from a request to its whole answer, for each time that it is sent. ``hear`` is told the
    application's own lines as they come. ``version`` is that of the header; 0 until :meth:`meet`.
    """

    def __init__(
        self, link: SerialLink, framing: Framing, answer_s: float, hear: Callable[[str], None]
    ) -> None:
        self.version = 0
        self.parameters = Parameters()
        self._link = link
        self._framing = framing
        self._answer_s = answer_s
        self._hear = hear
        # late answers to an earlier session's requests must not be taken for this one's
        self._sequence = random.randrange(256)
        self._arrived: deque[Message] = deque()

    @property
    def message_bytes(self) -> int:
        """The longest message that the server has room for."""
        return self.parameters.buffer_bytes - self._framing.overhead_bytes

    def forget(self) -> None:
        """The server has begun anew: it is to be met again, and what it said before is nobody's."""
        self.version = 0
        self._framing.forget()
        self._arrived.clear()

    async def meet(self) -> None:
        """Find the header's version and the server's parameters; nothing where that has been done.

        Raises Transient(NO_RESPONSE).
        """
        if self.version:
            return
        self._framing.forget()
        asked: dict[int, int] = {}
        for version in smp.VERSIONS * _PROBE_ROUNDS:
            if await self._try(version, asked, self._answer_s):
                if len(asked) > 1:
                    # a server that has just come up may know the newer one, and not have heard of it
                    await self._try(smp.VERSIONS[0], {}, min(self._answer_s, _NEWER_S))
                return
        raise Transient(
            Reason.NO_RESPONSE,
            f"{self._link.path}: nobody answered SMP within {len(asked) * self._answer_s:g} s; "
            "check the baud rate, the framing, and that the application runs an SMP server on this port",
        )

    async def _try(self, version: int, asked: dict[int, int], timeout_s: float) -> bool:
        """Ask with a header of ``version``; an answer to what was ``asked`` before, by sequence number, serves too."""
        asked[await self.send(smp.PARAMETERS, version=version)] = version
        answer = await self.answer(dict.fromkeys(asked, smp.PARAMETERS), timeout_s)
        if answer is None or _is_of_version(answer.body):
            return False
        self.version, self.parameters = asked[answer.sequence], _parameters(answer.body)
        return True

    async def ask(
        self,
        command: Command,
        body: Mapping[str, object] | None = None,
        *,
        tries: int = TRIES,
        answer_s: float = 0.0,
    ) -> Mapping[str, Any]:
        """The body of the answer to ``command``, which is sent up to ``tries`` times; ``answer_s``: for each (0: the usual).
        To a server that is busy it is sent again all the same, after a pause that doubles.

        Raises ErrorAnswer (a Permanent), Busy (a Transient), Transient(NO_RESPONSE), Transient(LINK_LOST).
        """
        await self.meet()
        wait_s = answer_s or self._answer_s
        pause_s, longest_s = BUSY_S, BUSY_S * 2 ** (_BUSY_TRIES - 1)
        while True:
            answer = await self._answer_of(command, body, tries, wait_s)
            try:
                return smp.check(command, answer.body)
            except ErrorAnswer as error:
                if not error.passes:
                    raise
                if pause_s >= longest_s:
                    raise Busy(error) from error
            await asyncio.sleep(pause_s)
            pause_s *= 2

    async def _answer_of(
        self, command: Command, body: Mapping[str, object] | None, tries: int, wait_s: float
    ) -> Message:
        sequence = self._next_sequence()
        for _ in range(tries):
            await self.send(command, body, sequence=sequence)
            answer = await self.answer({sequence: command}, wait_s)
            if answer is not None:
                return answer
        raise Transient(
            Reason.NO_RESPONSE,
            f"{self._link.path}: no answer to {command}, which was sent {tries} times; "
            f"each answer may take {wait_s:g} s",
        )

    async def is_told(self, command: Command, body: Mapping[str, object] | None = None) -> bool:
        """Send ``command`` once, again only to a server that is busy. False where no answer came: one that resets may not get
        to it, or has not heard.

        Raises ErrorAnswer, Busy, Transient(LINK_LOST).
        """
        try:
            await self.ask(command, body, tries=1)
        except Transient as error:
            if error.reason is not Reason.NO_RESPONSE:
                raise
            return False
        return True

    async def listen(self, timeout_s: float) -> None:
        """Wait until the application says a line, ``timeout_s`` at most. Raises Transient(LINK_LOST)."""
        end = asyncio.get_running_loop().time() + timeout_s
        while (left := end - asyncio.get_running_loop().time()) > 0 and not await self._receive(left):
            self._arrived.clear()

    async def silence(self, timeout_s: float) -> None:
        """Send nothing for ``timeout_s``, and hear what the application says. Raises Transient(LINK_LOST)."""
        end = asyncio.get_running_loop().time() + timeout_s
        while (left := end - asyncio.get_running_loop().time()) > 0:
            await self._receive(left)
            self._arrived.clear()

    async def send(
        self,
        command: Command,
        body: Mapping[str, object] | None = None,
        *,
        sequence: int | None = None,
        version: int = 0,
    ) -> int:
        """Send a request, and return its sequence number (default: the next). Raises Transient(LINK_LOST)."""
        sequence = self._next_sequence() if sequence is None else sequence
        message = smp.encode(command, sequence, body or {}, version or self.version)
        await self._link.send(self._framing.encode(message))
        return sequence

    def _next_sequence(self) -> int:
        self._sequence = (self._sequence + 1) & 0xFF
        return self._sequence

    async def answer(self, expected: Mapping[int, Command], timeout_s: float) -> Message | None:
        """The next answer to one of the requests ``expected``, by sequence number; None where none came in time.

        Others are nobody's. Raises Transient(LINK_LOST).
        """
        end = asyncio.get_running_loop().time() + timeout_s
        while True:
            while self._arrived:
                message = self._arrived.popleft()
                command = expected.get(message.sequence)
                if command is not None and message.answers(command, message.sequence):
                    return message
            left = end - asyncio.get_running_loop().time()
            if left <= 0:
                # the rest of what was cut on its way would be taken for the begin of the next
                self._framing.forget()
                return None
            await self._receive(left)

    async def _receive(self, timeout_s: float) -> bool:
        """Take in what arrives next; True where a line of the application was among it."""
        data = await self._link.receive(_whatever, timeout_s)
        for raw in self._framing.feed(data or b""):
            with suppress(smp.NotAMessageError):
                self._arrived.append(smp.decode(raw))
        lines = list(self._framing.text_lines())
        for line in lines:
            self._hear(line)
        return bool(lines)


def _whatever(got: bytearray) -> int:
    """All that has arrived, for :meth:`SerialLink.receive`."""
    return len(got) or 1


def _is_of_version(body: Mapping[str, Any]) -> bool:
    """Does the server say that it does not know the header?"""
    try:
        smp.check(smp.PARAMETERS, body)
    except ErrorAnswer as error:
        return error.is_of_version
    return False


def _parameters(body: Mapping[str, Any]) -> Parameters:
    """What the server told; a server that knows no parameters, or tells nonsense, is taken for a small one."""
    size, count = body.get("buf_size"), body.get("buf_count")
    if not isinstance(size, int) or size < _LEAST_BUFFER_BYTES:
        return Parameters()
    count = count if isinstance(count, int) and count > 0 else 1
    return Parameters(min(size, _MOST_BUFFER_BYTES), count, told=True)
