"""Any interface of python-can, and ISO-TP by can-isotp, in two threads that belong to the link.

python-can blocks while it receives, so one thread does nothing else. The other sends, and runs can-isotp's state machine
of every peer, one frame of each in turn: what a peer of ours waits for is never behind a long message to another one.
The event loop hears of whole messages and of the frames that somebody listens to. ``can.Notifier`` is not used: it loses
errors under asyncio.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any, Final

import can
import isotp
from isotp.protocol import RateLimiter, TransportLayerLogic

from edged.errors import Permanent, Reason, Transient
from edged_can.address import CanAddress
from edged_can.base import BaseLink
from edged_can.bus_errors import FULL, code_of, lost, not_opened, queue_full
from edged_can.frames import Frame
from edged_can.link import CanLink, again
from edged_can.load import BusLoad
from edged_can.messages import to_message
from edged_can.transport import MESSAGE_BYTES, N_AS_S, WAIT_FRAMES, Peer, Shape, Transport

# at level debug they write every frame, keys and seeds in them
for _library in ("can", "isotp"):
    logging.getLogger(_library).setLevel(logging.WARNING)

_POLL_S: Final = 0.1
"""How long a receive may last before the thread looks whether the link is being closed."""
_LET_GO_S: Final = 3.0
_STUCK_S: Final = 3.0
_KEPT_MESSAGES: Final = 64
_FULL_WAIT_S: Final = 0.002
_FRAMES_AT_ONCE: Final = 32
"""7 ms at 500 kbit/s: another peer waits no longer for its flow control."""
_ANY_FRAME: Final = 64
_FLOW_CONTROL: Final = 3
_LONGEST_PAUSE: Final = 0x7F
_PAUSES: Final = frozenset({*range(_LONGEST_PAUSE + 1), *range(0xF1, 0xFA)})
"""STmin as a raw byte: 0 to 127 ms, 100 to 900 us."""
_NO_ANSWER: Final = (isotp.FlowControlTimeoutError, isotp.MaximumWaitFrameReachedError)
_BROKEN_OFF: Final = (isotp.ConsecutiveFrameTimeoutError,)
_TAKES_NO_MORE: Final = (isotp.OverflowError,)
_HARMLESS: Final = (
    isotp.UnexpectedConsecutiveFrameError,
    isotp.UnexpectedFlowControlError,
    isotp.InvalidCanDataError,
)
"""Frames that belong to nothing: another tester's, or late ones. What they break shows by itself."""


@asynccontextmanager
async def opened(bus: CanAddress, log: logging.LoggerAdapter[logging.Logger]) -> AsyncIterator[CanLink]:
    """The bus, open until the block ends. Errors as :func:`edged_can.link.open_can`."""
    link = ThreadedLink(bus, log)
    try:
        await link.open()
        yield link
    finally:
        await link.close()


class ThreadedLink(BaseLink["_ThreadedPeer"]):
    """See :class:`edged_can.link.CanLink`."""

    kernel = False

    def __init__(self, bus: CanAddress, log: logging.LoggerAdapter[logging.Logger]) -> None:
        super().__init__(bus)
        self._log = log
        self._open_bus: can.BusABC | None = None
        self._lock_fd = -1
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # a serial port with a limit asks twice before each write, which costs more than the write; see _ThreadedPeer.send
        self._send_limit_s = None if bus.interface == "slcan" else N_AS_S
        self.rounds = 0
        self._opening: asyncio.Task[None] | None = None
        self._frames_sent: set[asyncio.Future[None]] = set()

    async def open(self) -> None:
        self._opening = asyncio.create_task(asyncio.to_thread(self._open))
        await asyncio.shield(self._opening)

    async def close(self) -> None:
        """End the threads and close the bus, also where the caller is cancelled meanwhile."""
        self._closing.set()
        self._jobs.put(_nothing)
        await asyncio.shield(self._close_after_opening())

    async def _close_after_opening(self) -> None:
        """A thread that was left opening the bus goes on when its caller is cancelled."""
        if self._opening is not None:
            await asyncio.wait([self._opening])
        await asyncio.to_thread(self._close)

    @asynccontextmanager
    async def transport(self, peer: Peer, shape: Shape) -> AsyncIterator[Transport]:
        """As :class:`~edged_can.link.CanLink`."""
        self._check(shape)
        port = _ThreadedPeer(self, peer, shape)
        keeps_to_share = shape.share < 1
        self._measured += keeps_to_share
        self.in_thread(lambda: self._peers.append(port))
        try:
            yield port
        finally:
            self._measured -= keeps_to_share
            self.in_thread(lambda: self._peers.remove(port))

    async def send(self, frame: Frame) -> None:
        """As :class:`~edged_can.link.CanLink`."""
        if self.lost is not None:
            raise again(self.lost)
        sent: asyncio.Future[None] = self._loop.create_future()
        self._frames_sent.add(sent)
        self.in_thread(lambda: self._send_one(frame, sent))
        try:
            await self.finished(sent)
        finally:
            self._frames_sent.discard(sent)

    async def finished(self, sent: asyncio.Future[None]) -> None:
        """Until the sending thread is done with it; the bus is lost where that does not come back from its driver.

        Raises what ``sent`` fails with: all that is under way fails when the bus is lost.
        """
        while not sent.done():
            rounds = self.rounds
            await asyncio.wait([sent], timeout=_STUCK_S)
            if not sent.done() and self.rounds == rounds:
                self.lose(queue_full(self.bus, self.errors))
        await sent

    def in_thread(self, job: Callable[[], None]) -> None:
        """Have the sending thread do ``job``, in order."""
        self._jobs.put(job)

    def in_loop(self, call: Callable[..., None], *arguments: object) -> None:
        """As :class:`BaseLink`; only from the threads."""
        if not self._closing.is_set():
            self._loop.call_soon_threadsafe(call, *arguments)

    def _tell_lost(self, error: Transient) -> None:
        super()._tell_lost(error)
        for sent in self._frames_sent:
            _fail(sent, error)

    # -- in threads

    def _open(self) -> None:
        options: dict[str, Any] = {"bitrate": self.bus.bitrate}
        if self.bus.fd:
            options |= {"fd": True, "data_bitrate": self.bus.data_bitrate}
        if self.bus.interface == "slcan":
            # its own default makes a thousand empty reads a second; two seconds are for boards that reset when opened
            options |= {"timeout": _POLL_S, "sleep_after_open": 0.1}
            self._lock(self.bus.channel)
        options |= dict(self.bus.options)
        try:
            self._open_bus = can.Bus(
                channel=self.bus.channel, interface=self.bus.interface, ignore_config=True, **options
            )
        except NotImplementedError as error:
            known = ", ".join(sorted(can.VALID_INTERFACES))
            text = f"{self.bus}: {_first_line(error)}; interfaces of python-can: {known}"
            raise Permanent(Reason.CONFIG_INVALID, text) from error
        except (ValueError, TypeError) as error:
            raise Permanent(Reason.CONFIG_INVALID, f"{self.bus}: {_first_line(error)}") from error
        except (can.CanError, OSError) as error:
            if isinstance(error.__cause__, ValueError):
                # an option that the interface cannot take, in python-can's words
                raise Permanent(Reason.CONFIG_INVALID, f"{self.bus}: {_first_line(error)}") from error
            raise not_opened(self.bus, code_of(error), _first_line(error)) from error
        for name, body in (("receive", self._receive), ("send", self._work)):
            thread = threading.Thread(
                target=self._guarded, args=(body,), name=f"{self.bus} {name}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _guarded(self, body: Callable[[], None]) -> None:
        """Nobody sees a thread end: whatever a driver raises, who waits for the bus is told that it is gone."""
        try:
            body()
        except Exception as error:  # noqa: BLE001 - the end of a thread, and a vendor's driver below it
            self._log.exception("%s: a thread of the link ended", self.bus)
            self.lose(lost(self.bus, None, f"its driver failed: {error!r}"))

    def _lock(self, path: str) -> None:
        """python-can opens a serial port whoever else has it."""
        if not path.startswith("/"):
            return
        try:
            self._lock_fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Transient(Reason.LINK_BUSY, f"{self.bus} is used by another program") from error
        except OSError as error:
            raise not_opened(self.bus, error.errno, str(error)) from error

    def _close(self) -> None:
        for thread in self._threads:
            # a driver that does not return is cancelled by closing it
            thread.join(_LET_GO_S)
        bus, self._open_bus = self._open_bus, None
        if bus is not None:
            try:
                bus.shutdown()
            except (can.CanError, OSError) as error:
                # an adapter that was pulled out cannot be told goodbye
                self._log.debug("closing %s: %s", self.bus, error)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    def _receive(self) -> None:
        bus = self._open_bus
        assert bus is not None
        while not self._closing.is_set() and self.lost is None:
            try:
                message = bus.recv(_POLL_S)
            except (can.CanError, OSError) as error:
                self.lose(lost(self.bus, code_of(error), _first_line(error)))
            except (ValueError, LookupError):
                # a damaged line of a serial adapter: a frame is lost, which ISO-TP notices
                self.errors.damaged()
            else:
                if message is not None:
                    self._take(message)
                elif bus.state is can.BusState.ERROR:
                    self.lose(lost(self.bus, None, "bus off"))

    def _take(self, message: can.Message) -> None:
        if not self._arrived(message, own=False):
            return
        key = message.arbitration_id, message.is_extended_id
        for peer in tuple(self._peers):
            if peer.key == key:
                self.in_thread(lambda peer=peer: peer.feed(message))  # type: ignore[misc]

    def _work(self) -> None:
        wait_s: float | None = None
        while not self._closing.is_set():
            if wait_s != 0:
                with suppress(Empty):
                    self._jobs.get(timeout=wait_s)()
            while not self._jobs.empty():
                self._jobs.get()()
            self.rounds += 1
            waits = [wait for peer in self._peers if (wait := peer.turn()) is not None]
            wait_s = min(waits, default=None)

    def _send_one(self, frame: Frame, sent: asyncio.Future[None]) -> None:
        try:
            self.transmit(to_message(frame))
        except Transient as error:
            self.in_loop(_fail, sent, error)
        else:
            self.in_loop(_settle, sent)

    def transmit(self, message: can.Message) -> None:
        """Give a frame to the driver; only in the sending thread. Raises Transient(LINK_LOST)."""
        bus = self._open_bus
        assert bus is not None
        waited_s = 0.0
        while True:
            if self.lost is not None:
                raise again(self.lost)
            try:
                bus.send(message, timeout=self._send_limit_s)
                break
            except (can.CanError, OSError) as error:
                code = code_of(error)
                if code not in FULL:
                    failure = (
                        queue_full(self.bus, self.errors)
                        if _is_full(error)
                        else lost(self.bus, code, _first_line(error))
                    )
                    raise self.lose(failure) from error
                if waited_s >= N_AS_S:
                    raise self.lose(queue_full(self.bus, self.errors)) from error
            # select() calls a socket writable whose device's queue is full
            self._closing.wait(_FULL_WAIT_S)
            waited_s += _FULL_WAIT_S
        self._saw(message, own=True)


class _ThreadedPeer:
    """can-isotp's state machine for one peer; :class:`edged_can.transport.Transport` towards the loop."""

    def __init__(self, link: ThreadedLink, peer: Peer, shape: Shape) -> None:
        self.key = peer.response_id, peer.extended_ids
        self._link = link
        self._peer = peer
        self._arrived: deque[bytes] = deque(maxlen=_KEPT_MESSAGES)
        self._failure: Transient | None = None
        self._more = asyncio.Event()
        self._sent: asyncio.Future[None] | None = None
        self._frames: deque[isotp.CanMessage] = deque()
        self._request: TransportLayerLogic.SendRequest | None = None
        self._under_way: asyncio.Future[None] | None = None  # the thread's own
        self._pace = _Pace(link.load, shape.share, self._in_the_middle)
        self._logic = TransportLayerLogic(
            rxfn=self._next_frame,
            txfn=self._transmit,
            address=_address(peer),
            error_handler=self._note,
            params=_parameters(shape),
            post_send_callback=self._began,
        )
        self._logic.rate_limiter = self._pace

    # -- on the event loop

    async def send(self, message: bytes) -> None:
        """As :class:`~edged_can.transport.Transport`; returns when the last frame was given to the driver."""
        self._check()
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sent = sent
        self._link.in_thread(lambda: self._begin(message, sent))
        try:
            await self._link.finished(sent)
        finally:
            if not sent.done():
                # what the thread may be telling of it already is not of the next message
                sent.cancel()
                self._link.in_thread(self._logic.stop_sending)
            self._sent = None

    async def receive(self, timeout_s: float) -> bytes | None:
        """As :class:`~edged_can.transport.Transport`."""
        if not self._arrived:
            self._check()
            self._more.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._more.wait()
            except TimeoutError:
                return None
        if not self._arrived:
            self._check()
        return self._arrived.popleft() if self._arrived else None

    def is_receiving(self) -> bool:
        """As :class:`~edged_can.transport.Transport`."""
        return bool(self._logic.rx_state != self._logic.RxState.IDLE)

    def drop_input(self) -> None:
        """As :class:`~edged_can.transport.Transport`."""
        self._arrived.clear()
        self._failure = None

    def explained(self, what: str) -> str:
        """As :class:`~edged_can.transport.Transport`."""
        return self._link.errors.explained(what)

    def fail(self, error: Transient) -> None:
        """What is under way ends with ``error``."""
        self._failure = error
        self._more.set()
        if self._sent is not None:
            _fail(self._sent, error)

    def _fail_of(self, sent: asyncio.Future[None] | None, error: Transient) -> None:
        """What the thread tells while it was about ``sent``, if that is anybody's still."""
        if sent is None or not sent.cancelled():
            self.fail(error)

    def _check(self) -> None:
        failure = self._link.lost or self._failure
        if failure is not None:
            self._failure = None
            raise again(failure)

    def _put(self, message: bytes) -> None:
        self._arrived.append(message)
        self._more.set()

    # -- in the sending thread

    def _begin(self, message: bytes, sent: asyncio.Future[None]) -> None:
        self._under_way = sent
        self._logic.send(message)

    def feed(self, message: can.Message) -> None:
        self._frames.append(
            isotp.CanMessage(
                arbitration_id=message.arbitration_id,
                dlc=message.dlc,
                data=_understood(bytes(message.data), self._peer),
                extended_id=message.is_extended_id,
                is_fd=message.is_fd,
                bitrate_switch=message.bitrate_switch,
            )
        )

    def turn(self) -> float | None:
        """Take what came, send what is due; how long until the next turn, None: until something comes."""
        self._pace.begin_turn()
        try:
            self._logic.process()
        except Transient as error:
            self._logic.stop_sending()
            self._link.in_loop(self._fail_of, self._under_way, error)
            return None
        while (message := self._logic.recv()) is not None:
            self._link.in_loop(self._put, bytes(message))
        if self._request is not None and self._request.complete_event.is_set():
            if self._request.success and self._under_way is not None:
                self._link.in_loop(_settle, self._under_way)
            self._request = None
        return self._until_due()

    def _until_due(self) -> float | None:
        logic = self._logic
        if self._pace.turn_is_over or self._frames:
            # can-isotp takes one flow control at a time
            return 0.0
        due = [
            timer.remaining() for timer in (logic.timer_rx_fc, logic.timer_rx_cf) if not timer.is_stopped()
        ]
        if self._in_the_middle():
            due.append(max(logic.timer_tx_stmin.remaining(), self._pace.wait_s()))
        # the timers count as over only after their time
        return min(due) + 0.0001 if due else None

    def _in_the_middle(self) -> bool:
        """Is it sending the consecutive frames of a message?"""
        return self._logic.tx_state == self._logic.TxState.TRANSMIT_CF

    def _next_frame(self, _: float) -> isotp.CanMessage | None:
        return self._frames.popleft() if self._frames else None

    def _transmit(self, frame: isotp.CanMessage) -> None:
        self._link.transmit(
            can.Message(
                arbitration_id=frame.arbitration_id,
                data=frame.data,
                is_extended_id=frame.is_extended_id,
                is_fd=frame.is_fd,
                bitrate_switch=frame.bitrate_switch,
            )
        )

    def _began(self, request: TransportLayerLogic.SendRequest) -> None:
        self._request = request

    def _note(self, error: Exception) -> None:
        """What can-isotp tells of, as the caller is to see it."""
        name = f"{self._link.bus}: {self._peer.request_id:#x}"
        if isinstance(error, _HARMLESS):
            return
        if isinstance(error, _NO_ANSWER):
            failure = Transient(
                Reason.NO_RESPONSE,
                self._link.errors.explained(f"{name}: nobody takes the message: no flow control"),
            )
        elif isinstance(error, _BROKEN_OFF):
            failure = Transient(Reason.NO_RESPONSE, f"{name}: its message stopped in the middle")
        elif isinstance(error, _TAKES_NO_MORE):
            failure = Transient(Reason.PROTOCOL_ERROR, f"{name}: it cannot take a message of that length")
        else:
            failure = Transient(Reason.PROTOCOL_ERROR, f"{name}: {error}")
        self._link.in_loop(self._fail_of, self._under_way, failure)


class _Pace(RateLimiter):
    """Frames go out some at a time, so that every peer has its turn, and no faster than the bus has room for."""

    def __init__(self, load: BusLoad, share: float, in_the_middle: Callable[[], bool]) -> None:
        super().__init__()
        self._load = load
        self._share = share
        self._in_the_middle = in_the_middle
        self._left = _FRAMES_AT_ONCE

    def begin_turn(self) -> None:
        self._left = _FRAMES_AT_ONCE

    @property
    def turn_is_over(self) -> bool:
        return self._left <= 0

    def wait_s(self) -> float:
        """Until the bus has room for the next frame."""
        return self._load.wait_s(self._share) if self._share < 1 else 0.0

    def update(self) -> None:
        """Nothing: the load is measured elsewhere."""

    def allowed_bytes(self) -> int:
        # the first frame of a message goes at once, and the others wait for it too: can-isotp never calls a message sent
        # whose only frame it held back
        if self._left > 0 and self._share >= 1:
            return _ANY_FRAME
        may_go = not self._in_the_middle() or (self._left > 0 and self.wait_s() == 0)
        return _ANY_FRAME if may_go else 0

    def inform_byte_sent(self, datalen: int) -> None:
        self._left -= 1


def _address(peer: Peer) -> isotp.Address:
    modes = isotp.AddressingMode
    if peer.target is None:
        mode = modes.Normal_29bits if peer.extended_ids else modes.Normal_11bits
        return isotp.Address(mode, txid=peer.request_id, rxid=peer.response_id)
    mode = modes.Extended_29bits if peer.extended_ids else modes.Extended_11bits
    return isotp.Address(
        mode,
        txid=peer.request_id,
        rxid=peer.response_id,
        target_address=peer.target,
        source_address=peer.source,
    )


def _understood(frame: bytes, peer: Peer) -> bytes:
    """A FlowControl with a reserved STmin has the longest in its place (ISO 15765-2, 9.6.5): can-isotp would pass it over."""
    at = 0 if peer.source is None else 1
    pause = frame[at + 2 : at + 3]
    if not pause or frame[at] >> 4 != _FLOW_CONTROL or pause[0] in _PAUSES:
        return frame
    return frame[: at + 2] + bytes((_LONGEST_PAUSE,)) + frame[at + 3 :]


def _parameters(shape: Shape) -> dict[str, Any]:
    return {
        "stmin": shape.st_min,
        "blocksize": shape.block_size,
        "tx_padding": shape.padding,
        "tx_data_length": shape.frame_bytes if shape.fd else 8,
        "can_fd": shape.fd,
        "bitrate_switch": shape.fd,
        "wftmax": WAIT_FRAMES,
        "max_frame_size": MESSAGE_BYTES,
        "wait_func": _no_wait,
    }


def _is_full(error: Exception) -> bool:
    text = str(error)
    return "buffer full" in text or "Could not send message to" in text or "imeout" in text


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: Transient) -> None:
    if not future.done():
        future.set_exception(again(error))


def _nothing() -> None:
    """Wakes the sending thread up."""


def _no_wait(_: float) -> None:
    """can-isotp tries its waiting function out when it is made; on the event loop nothing may wait."""
