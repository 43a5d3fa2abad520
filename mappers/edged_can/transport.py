"""ISO-TP (ISO 15765-2) as the client uses it: whole messages to and from one peer. What carries them is behind a Protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

FRAME_BYTES: Final = (8, 12, 16, 20, 24, 32, 48, 64)
MESSAGE_BYTES: Final = 4095
"""The longest message with a length of 12 bits (ISO 15765-2, 9.6.2); longer ones are understood by few."""
N_AS_S: Final = 1.0
"""The longest that a frame may wait for the bus (ISO 15765-2, 9.8)."""

N_CR_S: Final = 1.0
"""The longest from one frame of a message to the next (ISO 15765-2, 9.8)."""
WAIT_FRAMES: Final = 25
"""N_WFTmax, as a sender takes it (ISO 15765-2, 9.7): so many FC.WAIT in a row put a message off, and no more."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is spoken to (ISO 15765-2, 10.3).

    ``request_id`` and ``response_id``: identifiers to and from it, 29 bits with ``extended_ids``. ``target`` and
    ``source``: extended addressing, the first byte of each frame to and from it; None: normal addressing.
    """

    request_id: int
    response_id: int
    extended_ids: bool = False
    target: int | None = None
    source: int | None = None

    @property
    def overhead(self) -> int:
        """Bytes of each consecutive frame that are not payload."""
        return 1 if self.target is None else 2


@dataclass(frozen=True, slots=True)
class Shape:
    """How messages are cut into frames, and what is asked of the sender of ours.

    ``fd``: CAN FD frames of ``frame_bytes``. ``block_size`` frames (0: all) follow one flow control, ``st_min`` apart
    (its raw byte: 0 to 127 ms, 0xF1 to 0xF9 100 to 900 us). ``padding``: what fills frames up, None: nothing does.
    ``share``: of the bus that may be in use while frames are sent, all traffic together; 1: no limit.
    """

    fd: bool = False
    frame_bytes: int = 8
    block_size: int = 0
    st_min: int = 0
    padding: int | None = 0xCC
    share: float = 1.0


class Transport(Protocol):
    """One peer. One message at a time in each direction.

    Every method raises Transient: LINK_LOST where the bus is gone or off, NO_RESPONSE where nobody takes the message or it
    stops in the middle, PROTOCOL_ERROR where frames come out of order.
    """

    async def send(self, message: bytes) -> None:
        """Hand ``message`` over; it may still be on its way afterwards."""
        ...

    async def receive(self, timeout_s: float) -> bytes | None:
        """The next message from the peer, None where none came in time."""
        ...

    def is_receiving(self) -> bool:
        """Has the first frame of a message come, and its last one not yet?"""
        ...

    def drop_input(self) -> None:
        """Forget what came up to now, failures included."""
        ...

    def explained(self, what: str) -> str:
        """``what`` went wrong, with what the bus says of itself, where it says something."""
        ...
