"""What both kinds of CAN link have: who listens, who is spoken to, what the bus tells of itself, and its end.

Not here: where frames come from and how they go out, and in which thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Generic, Protocol, TypeVar

import can

from edged.errors import Permanent, Reason, Transient
from edged_can.address import CanAddress
from edged_can.bus_errors import BusErrors
from edged_can.frames import wire_s
from edged_can.link import Listener
from edged_can.load import BusLoad
from edged_can.messages import to_frame
from edged_can.transport import Shape


class Told(Protocol):
    """A peer that is told of the bus's end. ``key``: the identifier that it listens to, and whether it has 29 bits."""

    key: tuple[int, bool]

    def fail(self, error: Transient) -> None: ...


P = TypeVar("P", bound=Told)


class BaseLink(Generic[P]):
    """See :class:`edged_can.link.CanLink`. ``lost``: why the bus is gone."""

    exclusive = False

    def __init__(self, bus: CanAddress) -> None:
        self.address = str(bus)
        self.bus = bus
        self.load = BusLoad()
        self.errors = BusErrors(bus)
        self.lost: Transient | None = None
        self._loop = asyncio.get_running_loop()
        # replaced and never changed: a thread may be reading it
        self._listeners: dict[Listener, frozenset[tuple[int, bool]]] = {}
        self._peers: list[P] = []
        self._measured = 0

    def speaks_to(self, response_id: int, extended: bool) -> bool:
        """As :class:`~edged_can.link.CanLink`."""
        return any(peer.key == (response_id, extended) for peer in tuple(self._peers))

    @asynccontextmanager
    async def listen(self, ids: Collection[tuple[int, bool]]) -> AsyncIterator[Listener]:
        """As :class:`~edged_can.link.CanLink`."""
        listener = Listener()
        if self.lost is not None:
            listener.lose(self.lost)
        self._listeners = {**self._listeners, listener: frozenset(ids)}
        self._heard_changed()
        try:
            yield listener
        finally:
            self._listeners = {key: ids for key, ids in self._listeners.items() if key is not listener}
            self._heard_changed()

    def lose(self, error: Transient) -> Transient:
        """The bus is gone: everybody who waits for it is told. Returns ``error``."""
        if self.lost is None:
            self.lost = error
            self.in_loop(self._tell_lost, error)
        return error

    def in_loop(self, call: Callable[..., None], *arguments: object) -> None:
        """Have the event loop do ``call``."""
        call(*arguments)

    def _check(self, shape: Shape) -> None:
        """Whether this bus carries it. Raises Permanent(CONFIG_INVALID)."""
        if shape.fd and not self.bus.fd:
            text = (
                f"{self.bus}: fd needs a bus with a data bit rate: can:INTERFACE@CHANNEL@BITRATE/DATA_BITRATE"
            )
            raise Permanent(Reason.CONFIG_INVALID, text)

    def _tell_lost(self, error: Transient) -> None:
        for listener in self._listeners:
            listener.lose(error)
        for peer in tuple(self._peers):
            peer.fail(error)

    def _heard_changed(self) -> None:
        """There are other listeners, or other peers that want all traffic measured."""

    def _arrived(self, message: can.Message, *, own: bool) -> bool:
        """Take what came; whether it is a frame with data. ``own``: a process of this machine sent it."""
        if message.is_error_frame:
            failure = self.errors.saw(message.arbitration_id, bytes(message.data))
            if failure is not None:
                self.lose(failure)
            return False
        self._saw(message, own=own)
        if message.is_remote_frame:
            return False
        key = message.arbitration_id, message.is_extended_id
        for listener, ids in self._listeners.items():
            if key in ids:
                self.in_loop(listener.put, to_frame(message))
        return True

    def _saw(self, message: can.Message, *, own: bool) -> None:
        if self._measured:
            seconds = wire_s(len(message.data), self.bus, extended=message.is_extended_id, fd=message.is_fd)
            self.load.saw(seconds, own=own)
