"""An interface of the kernel: its own ISO-TP (linux/can/isotp.h) carries messages, raw frames come through python-can.

What comes is on the event loop's watch of descriptors; a message is sent by one call in a thread of its session. There is no
Python for each frame that is sent. The raw socket hears what somebody listens to, and the peers of sessions for their flow
control, unless a session is to keep to a share of the bus: then it has to see all of it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import socket
import struct
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Final

import can

from edged.errors import Permanent, Reason, Transient
from edged_can.address import CanAddress
from edged_can.base import BaseLink
from edged_can.bus_errors import FULL, code_of, lost, not_opened, queue_full
from edged_can.frames import Frame, wire_s
from edged_can.link import CanLink, again
from edged_can.load import gap_s
from edged_can.messages import to_message
from edged_can.transport import N_AS_S, N_CR_S, WAIT_FRAMES, Peer, Shape, Transport

_EXTENDED_ID: Final = 0x80000000

_SOL_CAN_ISOTP: Final = 106
_OPTS, _RECV_FC, _LL_OPTS = 1, 2, 5
_OPTIONS: Final = struct.Struct("=LLBBBB")
"""flags, frame_txtime (ns), ext_address, txpad_content, rxpad_content, rx_ext_address"""
_EXTEND_ADDR, _TX_PADDING, _RX_EXT_ADDR, _WAIT_TX_DONE = 0x002, 0x004, 0x200, 0x400
_NO_PAUSE: Final = 0xFFFFFFFF
"""As frame_txtime; 0 would leave the kernel's own 50 us."""
_LEAST_KERNEL: Final = (5, 18)
"""The first that knows it; before, it would be a pause of four seconds."""
_FD_MTU: Final = 72
_BRS: Final = 0x01
_LONGEST: Final = 8300
_FULL_WAIT_S: Final = 0.002
_CLOSE_S: Final = 5.0
"""So long is waited for a message that nobody wants to be sent any more."""
_FIRST, _CONSECUTIVE = 1, 2
_CONTINUE, _WAIT = 0x30, 0x31
"""How frames of a message begin, and all that a FlowControl begins with (ISO 15765-2, 9.6)."""
_NOBODY: Final = [{"can_id": 0, "can_mask": 0x1FFFFFFF, "extended": True}]

_MEANINGS: Final = {
    errno.ECOMM: (Reason.NO_RESPONSE, "nobody takes the message: no flow control"),
    errno.ETIMEDOUT: (Reason.NO_RESPONSE, "its message stopped in the middle"),
    errno.EILSEQ: (Reason.PROTOCOL_ERROR, "its frames came out of order"),
    errno.EBADMSG: (Reason.PROTOCOL_ERROR, "a frame of it was damaged"),
    errno.EMSGSIZE: (Reason.PROTOCOL_ERROR, "it cannot take a message of that length"),
}
"""What an ISO-TP socket reports (net/can/isotp.c), as the caller is to see it."""


def has_isotp() -> bool:
    """Does this kernel have ISO-TP sockets that wait and pause as is needed here? Asking loads the module."""
    if _release() < _LEAST_KERNEL:
        return False
    try:
        socket.socket(socket.AF_CAN, socket.SOCK_DGRAM, socket.CAN_ISOTP).close()
    except (AttributeError, OSError):
        return False
    return True


def _release() -> tuple[int, ...]:
    """The first two numbers of the kernel's release."""
    return tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])


@asynccontextmanager
async def opened(bus: CanAddress, log: logging.LoggerAdapter[logging.Logger]) -> AsyncIterator[CanLink]:
    """The interface, open until the block ends. Errors as :func:`edged_can.link.open_can`."""
    link = KernelLink(bus)
    try:
        link.open()
        yield link
    finally:
        link.close()


class KernelLink(BaseLink["_KernelPeer"]):
    """See :class:`edged_can.link.CanLink`. Opening a socket does not block; one of ISO-TP is closed in a thread."""

    kernel = True

    def __init__(self, bus: CanAddress) -> None:
        super().__init__(bus)
        self._raw: Any = None

    def open(self) -> None:
        try:
            self._raw = can.Bus(
                channel=self.bus.channel,
                interface=self.bus.interface,
                ignore_config=True,
                **{"fd": self.bus.fd, **dict(self.bus.options)},  # type: ignore[arg-type]
            )
        except (ValueError, TypeError) as error:
            raise Permanent(Reason.CONFIG_INVALID, f"{self.bus}: {error}") from error
        except (can.CanError, OSError) as error:
            raise not_opened(self.bus, code_of(error), str(error)) from error
        self._heard_changed()
        self._loop.add_reader(self._raw.fileno(), self._on_readable)

    def close(self) -> None:
        raw, self._raw = self._raw, None
        if raw is not None:
            self._loop.remove_reader(raw.fileno())
            raw.shutdown()

    @asynccontextmanager
    async def transport(self, peer: Peer, shape: Shape) -> AsyncIterator[Transport]:
        """As :class:`~edged_can.link.CanLink`."""
        self._check(shape)
        port = _KernelPeer(self, peer, shape)
        self._peers.append(port)
        self._measured += shape.share < 1
        self._heard_changed()
        try:
            port.open(0.0)
            yield port
        finally:
            self._measured -= shape.share < 1
            try:
                # its flow control is heard until then
                await asyncio.shield(port.end())
            finally:
                self._peers.remove(port)
                self._heard_changed()

    async def send(self, frame: Frame) -> None:
        """As :class:`~edged_can.link.CanLink`."""
        message = to_message(frame)
        try:
            async with asyncio.timeout(N_AS_S):
                # select() calls a socket writable whose device's queue is full: there is nothing to wait for but time
                while not self._try_send(message):  # noqa: ASYNC110
                    await asyncio.sleep(_FULL_WAIT_S)
        except TimeoutError:
            raise queue_full(self.bus, self.errors) from None

    def _try_send(self, message: can.Message) -> bool:
        if self.lost is not None:
            raise again(self.lost)
        try:
            self._raw.send(message)
        except can.CanError as error:
            code = code_of(error)
            # without a number it is python-can's own word for a full queue
            if code in FULL or code is None:
                return False
            raise self.lose(lost(self.bus, code, str(error))) from error
        return True

    def _heard_changed(self) -> None:
        if self._raw is None:
            return
        wanted = {key for ids in self._listeners.values() for key in ids} | {peer.key for peer in self._peers}
        filters = [{"can_id": id, "can_mask": 0x1FFFFFFF, "extended": extended} for id, extended in wanted]
        self._raw.set_filters(None if self._measured else filters or _NOBODY)

    def _on_readable(self) -> None:
        try:
            message = self._raw.recv(0)
        except can.CanError as error:
            self._loop.remove_reader(self._raw.fileno())
            self.lose(lost(self.bus, code_of(error), str(error)))
            return
        # what other sockets of this machine send comes back marked; most of it is ours
        if message is not None and self._arrived(message, own=not message.is_rx):
            key = message.arbitration_id, message.is_extended_id
            for peer in self._peers:
                if peer.key == key:
                    peer.heard(bytes(message.data))


class _KernelPeer:
    """An ISO-TP socket; :class:`edged_can.transport.Transport`.

    The pause between frames cannot be changed on a socket that is bound, so a share of the bus is kept to by binding a new
    one before a message, where the others' use of the bus has changed.
    """

    def __init__(self, link: KernelLink, peer: Peer, shape: Shape) -> None:
        self._link = link
        self._peer = peer
        self._shape = shape
        self._frame_s = wire_s(
            shape.frame_bytes if shape.fd else 8, link.bus, extended=peer.extended_ids, fd=shape.fd
        )
        self._loop = asyncio.get_running_loop()
        self._gap_s = 0.0
        self._socket: socket.socket | None = None
        self._executor = ThreadPoolExecutor(1, f"{link.bus} {peer.request_id:#x}")
        self._sending: asyncio.Future[Any] | None = None
        self._waits = 0
        self._receiving_until = 0.0
        self._given_up: Transient | None = None
        self.key = peer.response_id, peer.extended_ids
        self._waiting: asyncio.Task[Any] | None = None

    def open(self, gap_s: float) -> None:
        """Bind the socket, with a pause of ``gap_s`` after each frame. Raises Transient, Permanent(CONFIG_INVALID)."""
        opened = socket.socket(socket.AF_CAN, socket.SOCK_DGRAM, socket.CAN_ISOTP)
        self._socket, self._gap_s = opened, gap_s
        opened.setblocking(False)
        flag = _EXTENDED_ID if self._peer.extended_ids else 0
        ids = self._peer.response_id | flag, self._peer.request_id | flag
        try:
            self._configure(opened)
            opened.bind((self._link.bus.channel, *ids))
        except OSError as error:
            raise not_opened(self._link.bus, error.errno, str(error)) from error

    async def close(self) -> None:
        """In the thread: the kernel waits for the end of what is being sent, and for its readers."""
        opened, self._socket, sending = self._socket, None, self._sending
        if sending is not None:
            await asyncio.wait([sending], timeout=_CLOSE_S)
            if not sending.done():
                self._give_up("it is slow to take a message that is not wanted any more")
        if opened is not None and self._given_up is None:
            await self._loop.run_in_executor(self._executor, opened.close)
        elif opened is not None:
            # after the call that is under way, for which nobody waits
            self._executor.submit(opened.close)

    async def end(self) -> None:
        """Close it for good."""
        await self.close()
        self._executor.shutdown(wait=False)

    async def send(self, message: bytes) -> None:
        """As :class:`~edged_can.transport.Transport`; the kernel sends the frames, and returns after the last of them.

        In a thread, one hop for a message: the call waits, non-blocking socket or not. Who waits for the answer counts its
        time from then on, however far apart the receiver wants its frames. It ends by itself where no flow control comes, or
        no frame gets out. A receiver that says wait more often than N_WFTmax ends the session: the kernel does not count, and
        lets go of the message when it falls silent.
        """
        self._check()
        if self._sending is not None:
            # of a message whose sender was cancelled
            await asyncio.wait([self._sending])
        await self._pace()
        deadline = self._loop.time() + N_AS_S
        # only its first frame finds the queue full: nothing of it has gone out then
        while not await self._try_send(message):
            if self._loop.time() > deadline:
                raise queue_full(self._link.bus, self._link.errors)
            await asyncio.sleep(_FULL_WAIT_S)

    async def _try_send(self, message: bytes) -> bool:
        """False where the device's queue is full."""
        self._check()
        assert self._socket is not None
        self._waits = 0
        sending = self._sending = self._loop.run_in_executor(self._executor, self._socket.send, message)
        sending.add_done_callback(self._sent)
        await asyncio.wait([sending])
        if self._given_up is not None:
            raise again(self._given_up)
        try:
            sending.result()
        except OSError as error:
            if error.errno in FULL:
                return False
            raise self._meaning(error) from error
        return True

    def _sent(self, sending: asyncio.Future[Any]) -> None:
        self._sending = None
        if not sending.cancelled():
            # its sender may be gone; the failure is told to the next
            sending.exception()

    def heard(self, frame: bytes) -> None:
        """A frame from the peer's identifier: of its flow control the kernel knows all but when to stop (N_WFTmax)."""
        source = b"" if self._peer.source is None else bytes((self._peer.source,))
        if not frame.startswith(source) or len(frame) == len(source):
            return
        kind = frame[len(source)]
        if kind >> 4 == _FIRST or (kind >> 4 == _CONSECUTIVE and self.is_receiving()):
            # the kernel drops some first frames without a word, and what comes after them
            self._receiving_until = self._loop.time() + N_CR_S
        if kind in (_CONTINUE, _WAIT):
            self._waits = self._waits + 1 if kind == _WAIT else 0
        if self._sending is not None and self._waits > WAIT_FRAMES:
            self._give_up("nobody takes the message: it says wait without end")
            self._sending.cancel()

    def _give_up(self, why: str) -> None:
        text = self._link.errors.explained(f"{self._link.bus}: {self._peer.request_id:#x}: {why}")
        self._given_up = Transient(Reason.NO_RESPONSE, text)

    async def receive(self, timeout_s: float) -> bytes | None:
        """As :class:`~edged_can.transport.Transport`."""
        self._check()
        assert self._socket is not None
        self._waiting = asyncio.create_task(self._loop.sock_recv(self._socket, _LONGEST))
        try:
            await asyncio.wait([self._waiting], timeout=timeout_s)
            if not self._waiting.done():
                return None
            # the whole message, or why there is none
            self._receiving_until = 0.0
            if self._waiting.cancelled():
                self._check()
                return None
            received: bytes = self._waiting.result()
            return received
        except OSError as error:
            raise self._meaning(error) from error
        finally:
            self._waiting.cancel()
            self._waiting = None

    def is_receiving(self) -> bool:
        """As :class:`~edged_can.transport.Transport`."""
        return self._loop.time() < self._receiving_until

    def drop_input(self) -> None:
        """As :class:`~edged_can.transport.Transport`."""
        self._receiving_until = 0.0
        while self._socket is not None:
            try:
                self._socket.recv(_LONGEST)
            except BlockingIOError:
                return
            except OSError as error:
                # a failure of an earlier message, told now
                if error.errno not in _MEANINGS:
                    return

    def explained(self, what: str) -> str:
        """As :class:`~edged_can.transport.Transport`."""
        return self._link.errors.explained(what)

    def fail(self, error: Transient) -> None:
        """The link is lost: who waits for a message is told."""
        if self._waiting is not None:
            self._waiting.cancel()

    def _check(self) -> None:
        failure = self._link.lost or self._given_up
        if failure is not None:
            raise again(failure)

    async def _pace(self) -> None:
        if self._shape.share >= 1:
            return
        gap = gap_s(self._frame_s, self._shape.share, self._link.load.used_by_others())
        if self._socket is None or abs(gap - self._gap_s) > 0.05 * self._frame_s:
            # who is cancelled here leaves none behind, and says goodbye to the device through the next
            await asyncio.shield(self.close())
            self.open(gap)

    def _configure(self, opened: socket.socket) -> None:
        flags, pad = (0, 0) if self._shape.padding is None else (_TX_PADDING, self._shape.padding)
        flags |= _WAIT_TX_DONE
        target, source = self._peer.target, self._peer.source
        if target is not None and source is not None:
            flags |= _EXTEND_ADDR | _RX_EXT_ADDR
        pause = round(self._gap_s * 1e9) or _NO_PAUSE
        options = _OPTIONS.pack(flags, pause, target or 0, pad, pad, source or 0)
        opened.setsockopt(_SOL_CAN_ISOTP, _OPTS, options)
        opened.setsockopt(_SOL_CAN_ISOTP, _RECV_FC, bytes((self._shape.block_size, self._shape.st_min, 0)))
        if self._shape.fd:
            layer = bytes((_FD_MTU, self._shape.frame_bytes, _BRS))
            opened.setsockopt(_SOL_CAN_ISOTP, _LL_OPTS, layer)

    def _meaning(self, error: OSError) -> Transient:
        name = f"{self._link.bus}: {self._peer.request_id:#x}"
        known = _MEANINGS.get(error.errno or 0)
        if known is None:
            return self._link.lose(lost(self._link.bus, error.errno, str(error)))
        return Transient(known[0], self._link.errors.explained(f"{name}: {known[1]}"))
