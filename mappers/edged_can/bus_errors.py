"""What the controller says in error frames (linux/can/error.h), and what a failure of the interface means."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Final

from edged.errors import Reason, Transient
from edged_can.address import CanAddress

_TX_TIMEOUT: Final = 0x001
_CONTROLLER: Final = 0x004
_PROTOCOL: Final = 0x008
_TRANSCEIVER: Final = 0x010
_NO_ACK: Final = 0x020
_BUS_OFF: Final = 0x040
_BUS_ERROR: Final = 0x080
_RESTARTED: Final = 0x100

_OVERFLOW_BITS: Final = 0x03
_WARNING_BITS: Final = 0x0C
_PASSIVE_BITS: Final = 0x30
_ACTIVE_BIT: Final = 0x40
_RECENT_S: Final = 10.0
"""What the bus said longer ago explains no silence of now; requests are repeated within it."""

_PASSIVE: Final = "the controller is error-passive"
_WARNS: Final = "the controller warns of many errors"
_DAMAGED: Final = "damaged frames"

_ABSENT: Final = frozenset({errno.ENODEV, errno.ENOENT, errno.ENXIO})
_DOWN: Final = frozenset({errno.ENETDOWN, errno.EIO})
FULL: Final = frozenset({errno.ENOBUFS, errno.EAGAIN})


class BusErrors:
    """The errors that one bus has told of: what it said lately, else the state in which its controller still is."""

    def __init__(self, bus: CanAddress, now: Callable[[], float] = time.monotonic) -> None:
        self.bus = bus
        self._now = now
        self._newest = ""
        self._newest_at = 0.0
        self._state = ""

    def saw(self, error_class: int, data: bytes) -> Transient | None:
        """Take an error frame; the failure where it says that the controller has left the bus."""
        if error_class & _BUS_OFF:
            self._say("bus off")
            return Transient(
                Reason.LINK_LOST,
                f"{self.bus}: bus off: the controller has left the bus after too many errors; check wiring, termination and "
                "bit rate",
            )
        detail = data[1] if len(data) > 1 else 0
        if error_class & _RESTARTED or (error_class & _CONTROLLER and detail & _ACTIVE_BIT):
            self._state = ""
        if error_class & _CONTROLLER and detail & (_PASSIVE_BITS | _WARNING_BITS):
            self._state = _PASSIVE if detail & _PASSIVE_BITS else _WARNS
        described = _described(error_class, detail)
        if described:
            self._say(described)
        return None

    def damaged(self) -> None:
        """A frame came that was none."""
        self._say(_DAMAGED)

    def explained(self, what: str) -> str:
        """``what`` went wrong, with what the bus said of itself meanwhile."""
        recent = self._newest if self._now() - self._newest_at <= _RECENT_S else ""
        said = recent or self._state
        return f"{what}; the bus says: {said}" if said else what

    def _say(self, text: str) -> None:
        self._newest, self._newest_at = text, self._now()


def _described(error_class: int, detail: int) -> str:
    """What happened; a state of the controller is told where nothing did."""
    if error_class & _NO_ACK:
        return "no node acknowledges"
    if error_class & _CONTROLLER and detail & _OVERFLOW_BITS:
        return "frames were lost, the controller's buffer was full"
    if error_class & (_PROTOCOL | _BUS_ERROR):
        return _DAMAGED
    if error_class & _TRANSCEIVER:
        return "the transceiver has a fault"
    if error_class & _TX_TIMEOUT:
        return "a frame could not be sent in time"
    return "the controller was started again" if error_class & _RESTARTED else ""


def code_of(error: Exception) -> int | None:
    """The system's error number, wherever python-can put it."""
    found = getattr(error, "error_code", None) or getattr(error, "errno", None)
    cause = error.__cause__
    if found is None and isinstance(cause, OSError):
        return cause.errno
    return found if isinstance(found, int) else None


def lost(bus: CanAddress, code: int | None, text: str) -> Transient:
    """A failure of the interface while it was in use."""
    if code in _DOWN:
        return Transient(Reason.LINK_LOST, f"{bus}: the interface is down; is it configured and not bus-off?")
    said = os.strerror(code) if code else text
    return Transient(Reason.LINK_LOST, f"{bus}: {said}: unplugged?")


def queue_full(bus: CanAddress, errors: BusErrors) -> Transient:
    """The interface took no frame for N_As."""
    text = f"{bus}: the queue for sending stays full: nobody acknowledges, or the bus is overloaded"
    return Transient(Reason.LINK_LOST, errors.explained(text))


def not_opened(bus: CanAddress, code: int | None, text: str) -> Transient:
    """The interface could not be opened."""
    if code in _ABSENT:
        return Transient(Reason.DEVICE_ABSENT, f"{bus}: there is no such interface")
    if code == errno.EBUSY:
        return Transient(Reason.LINK_BUSY, f"{bus} is used by another program")
    return Transient(Reason.DEVICE_ABSENT, f"{bus}: {os.strerror(code) if code else text}")
