"""The CAN bus as a link: shared by all devices on it, opened by the first session and closed after the last.

A bus does not reconnect: once its adapter is gone or its controller is off the bus, every method raises
Transient(LINK_LOST), and whoever needs it opens a new link.
"""

from __future__ import annotations

import asyncio
import importlib
from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import ModuleType
from typing import Any, Final, Protocol

from edged.api import Env
from edged.errors import Permanent, Reason, Transient
from edged_can.address import SOCKETCAN, CanAddress, parse_address
from edged_can.frames import Frame
from edged_can.load import BusLoad
from edged_can.transport import Peer, Shape, Transport

_KEPT_FRAMES: Final = 1024


class Listener:
    """Frames with some identifiers, as they come; the newest 1024 of those that nobody has read yet."""

    def __init__(self) -> None:
        self._frames: deque[Frame] = deque(maxlen=_KEPT_FRAMES)
        self._more = asyncio.Event()
        self._lost: Transient | None = None

    async def next(self, timeout_s: float | None) -> Frame | None:
        """The next frame; None where none came in time. Raises Transient(LINK_LOST)."""
        while not self._frames:
            if self._lost is not None:
                raise again(self._lost)
            self._more.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._more.wait()
            except TimeoutError:
                return None
        return self._frames.popleft()

    def waiting(self) -> list[Frame]:
        """Those that came and nobody has read yet."""
        frames = [*self._frames]
        self._frames.clear()
        return frames

    def put(self, frame: Frame) -> None:
        self._frames.append(frame)
        self._more.set()

    def lose(self, error: Transient) -> None:
        self._lost = error
        self._more.set()


class Turns:
    """Who programs a controller on this bus. One that tells everyone what to do has it alone: the others would be thrown out
    of their sessions. Nobody waits here: that is the engine's."""

    def __init__(self, bus: str) -> None:
        self._bus = bus
        self._alone: dict[str, bool] = {}

    def take(self, device: str, *, alone: bool) -> None:
        """Until :meth:`give`. Raises Transient(LINK_BUSY) where others are at work, and one of them or ``device`` alone."""
        others = [name for name in self._alone if name != device]
        if others and (alone or any(self._alone[name] for name in others)):
            text = f"{self._bus}: {', '.join(others)} is being programmed, and one of them tells all controllers to be quiet"
            raise Transient(Reason.LINK_BUSY, text)
        self._alone[device] = alone

    def give(self, device: str) -> None:
        self._alone.pop(device, None)


class CanLink(Protocol):
    """An open bus. ``kernel``: the kernel's own ISO-TP carries the messages; else can-isotp in a thread does."""

    @property
    def address(self) -> str: ...
    @property
    def exclusive(self) -> bool: ...
    @property
    def bus(self) -> CanAddress: ...
    @property
    def load(self) -> BusLoad: ...
    @property
    def kernel(self) -> bool: ...

    def transport(self, peer: Peer, shape: Shape) -> AbstractAsyncContextManager[Transport]:
        """Messages to and from ``peer``. Raises Permanent(CONFIG_INVALID) for a shape that this bus cannot carry."""
        ...

    def listen(self, ids: Collection[tuple[int, bool]]) -> AbstractAsyncContextManager[Listener]:
        """Raw frames with these identifiers, each with whether it has 29 bits."""
        ...

    def speaks_to(self, response_id: int, extended: bool) -> bool:
        """Does a session of ours listen to this identifier?"""
        ...

    async def send(self, frame: Frame) -> None:
        """Give one frame to the bus. Raises Transient(LINK_LOST)."""
        ...


def again(error: Transient) -> Transient:
    """The same failure for another reader: an exception that two tasks raise grows one traceback for both."""
    return Transient(error.reason, error.detail)


@asynccontextmanager
async def open_can(rest: str, env: Env) -> AsyncIterator[CanLink]:
    """Open the bus that ``rest`` names; the ``open`` of this link's :class:`~edged.api.LinkSpec`.

    Raises Transient(DEVICE_ABSENT), Transient(LINK_BUSY) or Permanent(CONFIG_INVALID).
    """
    bus = _parsed(rest)
    module = await loaded("edged_can.kernel" if await _kernel_carries(bus) else "edged_can.threaded")
    opened: AbstractAsyncContextManager[CanLink] = module.opened(bus, env.log)
    async with opened as link:
        yield link


async def loaded(name: str) -> ModuleType:
    """A module that brings heavy libraries, imported in a thread when it is needed first: an idle daemon stays small."""
    return await asyncio.to_thread(importlib.import_module, name)


async def _kernel_carries(bus: CanAddress) -> bool:
    if bus.interface != SOCKETCAN:
        return False
    module: Any = await loaded("edged_can.kernel")
    # asking may load a module of the kernel
    return bool(await asyncio.to_thread(module.has_isotp))


def _parsed(rest: str) -> CanAddress:
    try:
        return parse_address(rest)
    except ValueError as error:
        raise Permanent(Reason.CONFIG_INVALID, f"address: found 'can:{rest}'; {error}") from error
