"""A UDS client (ISO 14229-1) on asyncio: one request at a time, its answer, the time that the server asks for.

Requests are udsoncan's; only its codec is used, since its client blocks. Not here: what is asked in which
order (``programming``), and trying again after a failure, but for what the standard gives to the client: the same request
after busyRepeatRequest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from udsoncan import Request, services
from udsoncan.BaseService import BaseService
from udsoncan.ResponseCode import ResponseCode

from edged.errors import EdgedError, Permanent, Reason, Transient
from edged_can.transport import N_CR_S, Transport

BUSY_REPEAT_REQUEST: Final = 0x21
RESPONSE_PENDING: Final = 0x78
_P2_STAR_S: Final = 5.0
"""ISO 14229-2, table 4: what a server has after each requestCorrectlyReceived-ResponsePending, unless it says otherwise."""
_BUSY_WAIT_S: Final = 0.1
_STARTING_S: Final = 0.05
_NEGATIVE: Final = 0x7F
_NEGATIVE_BYTES: Final = 3
KEEP_ALIVE_S: Final = 2.0
"""ISO 14229-2, 7.2: a server leaves the session after 5 s (S3 server) without a request."""
_PASSES: Final = frozenset(
    {BUSY_REPEAT_REQUEST, 0x22, 0x24, 0x25, 0x36, 0x37, 0x70, 0x71, 0x73, 0x7E, 0x7F, *range(0x81, 0x95)}
)
"""What a server may answer now and not later: it is busy, left the session, waits after wrong keys; or the machine around it
is not in the state that it wants (table A.1)."""

_NOT_OFFERED: Final = frozenset({0x10, 0x11, 0x12, 0x13, 0x31, 0x33, 0x7E, 0x7F})
"""What a server answers that has no such identifier, or not the service; other codes speak of the moment."""


class NegativeResponse(EdgedError):
    """The server said no; ``code`` is its negative response code. One of the two below, by what it means."""

    code: int


class RefusedForNow(NegativeResponse, Transient):
    """It may say yes later."""


class RefusedForGood(NegativeResponse, Permanent):
    """It will say the same again."""


def negative(service: str, code: int) -> NegativeResponse:
    """The error for a negative response, with the standard's names."""
    text = f"{service}: the device answered {code_name(code)} ({code:#04x})"
    kind = RefusedForNow if code in _PASSES else RefusedForGood
    error = kind(Reason.DEVICE_ERROR, text)
    error.code = code
    return error


def code_name(code: int) -> str:
    """The name of a negative response code, as ISO 14229-1 writes it (table A.1)."""
    if code == RESPONSE_PENDING:
        return "requestCorrectlyReceived-ResponsePending"
    name = ResponseCode.get_name(code)
    return name[:1].lower() + name[1:] if name and name.isidentifier() else "a code of its manufacturer"


@dataclass(frozen=True, slots=True)
class Timing:
    """``answer_s``: the longest for one answer. ``pending_s``: the longest that it may be put off."""

    answer_s: float = 1.0
    pending_s: float = 120.0


class UdsClient:
    """Asks one server. Several tasks may ask; one request is under way at a time."""

    def __init__(self, transport: Transport, timing: Timing, name: str) -> None:
        self._transport = transport
        self._timing = timing
        self._name = name
        self._p2_star_s = _P2_STAR_S
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        self._asked_at = self._loop.time()

    async def ask(self, request: Request, echo: bytes = b"", *, about: str = "") -> bytes:
        """The data of the positive response to ``request``, after ``echo``: what the standard has the server repeat there.

        Anything else that comes meanwhile belongs to an earlier request, and is passed over. ``about`` is for messages. Raises
        :class:`NegativeResponse`, and Transient: NO_RESPONSE, and what the transport raises.
        """
        assert request.service is not None
        async with self._lock:
            deadline = self._loop.time() + self._timing.pending_s
            while True:
                answer = await self._exchange(request.service, request.get_payload(), echo, deadline)
                if answer.code != BUSY_REPEAT_REQUEST or self._loop.time() > deadline:
                    break
                await asyncio.sleep(_BUSY_WAIT_S)
        if answer.code is not None:
            raise negative(request.service.get_name() + about, answer.code)
        return answer.data

    async def tell(self, request: Request) -> None:
        """Send ``request``, and ask for no positive response."""
        async with self._lock:
            await self._send(request.get_payload(suppress_positive_response=True))

    async def session(self, kind: int) -> None:
        """DiagnosticSessionControl (10.2); the server's P2* is heeded from then on."""
        request = services.DiagnosticSessionControl.make_request(kind)
        times = await self.ask(request, bytes((kind,)))
        if len(times) >= 4:
            # P2*server_max in units of 10 ms
            self._p2_star_s = max(_P2_STAR_S, int.from_bytes(times[2:4], "big") / 100)

    async def read(self, did: int) -> bytes:
        """ReadDataByIdentifier (11.2), one identifier: its record."""
        echo = did.to_bytes(2, "big")
        request = Request(services.ReadDataByIdentifier, data=echo)
        return await self.ask(request, echo, about=f" {did:#06x}")

    async def read_offered(self, did: int) -> bytes | None:
        """As :meth:`read`; None where the server has no such identifier, or not the service, as a boot loader."""
        try:
            return await self.read(did)
        except NegativeResponse as error:
            if error.code in _NOT_OFFERED:
                return None
            raise

    async def write(self, did: int, record: bytes) -> None:
        """WriteDataByIdentifier (11.7)."""
        echo = did.to_bytes(2, "big")
        request = Request(services.WriteDataByIdentifier, data=echo + record)
        await self.ask(request, echo, about=f" {did:#06x}")

    async def is_there(self) -> None:
        """TesterPresent (10.6): return when the server answers, also where it has another opinion of testers.

        Raises Transient.
        """
        with suppress(NegativeResponse):
            await self.ask(services.TesterPresent.make_request(), b"\x00")

    async def await_start(self, timeout_s: float) -> None:
        """Return when the server answers, which may be starting. Raises Transient(NO_RESPONSE), Transient(LINK_LOST)."""
        deadline = self._loop.time() + timeout_s
        while True:
            try:
                await self.is_there()
                return
            except Transient as error:
                if error.reason is Reason.LINK_LOST or self._loop.time() > deadline:
                    raise
            await asyncio.sleep(_STARTING_S)

    @asynccontextmanager
    async def kept_alive(self, told: Callable[[], bool]) -> AsyncIterator[None]:
        """Within the block the server hears of its tester while nothing is asked, as long as ``told()``."""
        task = asyncio.create_task(self._keep_alive(told))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _keep_alive(self, told: Callable[[], bool]) -> None:
        request = services.TesterPresent.make_request()
        while True:
            due = self._asked_at + KEEP_ALIVE_S - self._loop.time()
            if due > 0 or not told():
                await asyncio.sleep(due if due > 0 else KEEP_ALIVE_S)
                continue
            with suppress(Transient):
                # whoever asks next is told what is wrong with the bus
                await self.tell(request)

    async def _send(self, payload: bytes) -> None:
        self._transport.drop_input()
        try:
            await self._transport.send(payload)
        finally:
            self._asked_at = self._loop.time()

    async def _exchange(
        self, service: type[BaseService], payload: bytes, echo: bytes, deadline: float
    ) -> _Answer:
        await self._send(payload)
        timing, what = self._timing, f"{self._name}: {service.get_name()}"
        answer_by = self._loop.time() + timing.answer_s
        silence = f"{what}: no answer within {timing.answer_s:g} s"
        too_long = f"{what}: the device asked for more time for {timing.pending_s:g} s ({code_name(RESPONSE_PENDING)})"
        while True:
            message = await self._transport.receive(max(0.0, answer_by - self._loop.time()))
            self._asked_at = self._loop.time()
            if message is None and self._transport.is_receiving() and self._asked_at < deadline:
                # the time of an answer ends with its first frame (ISO 14229-2, P2 client); the transport minds the others
                answer_by = self._asked_at + N_CR_S
                continue
            if message is None:
                raise Transient(Reason.NO_RESPONSE, self._transport.explained(silence))
            answer = _answer(message, service, echo)
            if answer is None:
                continue
            if answer.code != RESPONSE_PENDING:
                return answer
            if self._asked_at > deadline:
                raise Transient(Reason.NO_RESPONSE, too_long)
            wait_s = max(self._p2_star_s, timing.answer_s)
            answer_by = min(self._asked_at + wait_s, deadline)
            asked = f"{what}: no answer within {wait_s:g} s after the device asked for more time"
            silence = too_long if answer_by == deadline else asked


@dataclass(frozen=True, slots=True)
class _Answer:
    """``code``: of a negative response, None where it is positive; ``data``: what follows the echo in a positive one."""

    code: int | None
    data: bytes = b""


def _answer(message: bytes, service: type[BaseService], echo: bytes) -> _Answer | None:
    """What ``message`` says to a request of ``service`` (8.3); None where it belongs to another one."""
    head = bytes((service.response_id(),)) + echo
    if message.startswith(head):
        return _Answer(None, message[len(head) :])
    if len(message) >= _NEGATIVE_BYTES and message.startswith(bytes((_NEGATIVE, service.request_id()))):
        return _Answer(message[2])
    return None
