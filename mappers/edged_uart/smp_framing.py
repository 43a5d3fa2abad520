"""How SMP messages are carried on a serial line: SMP over console, raw, and raw with COBS. Pure, and incremental.

A decoder is fed what arrives, in pieces of any size, and gives back whole messages. What is damaged is dropped, and the
next message is found again; whether a message makes sense is not looked at here.

- Console (Zephyr documentation, "SMP Transport Specification", UART/serial and console): lines of base64, which share the
  wire with the application's own lines.
- Raw (``MCUMGR_TRANSPORT_RAW_UART``): the message as it is; a message ends where its header says, and nothing
  protects it.
- COBS (MCUboot's ``BOOT_SERIAL_RAW_PROTOCOL_COBS``): message and CRC, stuffed so that 0 only ends a frame.
"""

from __future__ import annotations

import base64
import binascii
from collections import deque
from collections.abc import Iterator
from typing import Final, Protocol

from edged_uart.smp import HEADER_BYTES, Group, Op, message_bytes
from edged_uart.smp_config import LINE_BYTES

FIRST: Final = b"\x06\x09"
NEXT: Final = b"\x04\x14"
CRC_BYTES: Final = 2

_LENGTH_BYTES: Final = 2
_LINE_FRAME_BYTES: Final = len(FIRST) + 1
_LONGEST_LINE: Final = 4096
_KEPT_LINES: Final = 1000
_LONGEST_MESSAGE: Final = 65535 + HEADER_BYTES
_RAW_MOST_BYTES: Final = 16384
_FULL_BLOCK_BYTES: Final = 254


class Framing(Protocol):
    """One way to carry messages. Holds what has arrived of the next message."""

    @property
    def overhead_bytes(self) -> int:
        """What of the server's buffer a message cannot use."""
        ...

    def encode(self, message: bytes) -> bytes:
        """What goes over the wire for ``message``."""
        ...

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that are complete with ``data``."""
        ...

    def text_lines(self) -> Iterator[str]:
        """The application's own lines that came meanwhile; each only once."""
        ...

    def forget(self) -> None:
        """What has arrived of a message is nobody's: the next byte begins a new one."""
        ...


class Console:
    """SMP over console. ``line_bytes``: the longest line, with its frame."""

    overhead_bytes: Final = _LENGTH_BYTES + CRC_BYTES

    def __init__(self, line_bytes: int = LINE_BYTES) -> None:
        self._text_bytes = (line_bytes - _LINE_FRAME_BYTES) // 4 * 4
        self._line = bytearray()
        self._packet: bytearray | None = None
        self._texts: deque[str] = deque(maxlen=_KEPT_LINES)

    def encode(self, message: bytes) -> bytes:
        """Lines of base64 over length, message and CRC."""
        length = (len(message) + CRC_BYTES).to_bytes(_LENGTH_BYTES, "big")
        text = base64.b64encode(length + message + crc16(message))
        parts = (text[at : at + self._text_bytes] for at in range(0, len(text), self._text_bytes))
        return b"".join((NEXT if number else FIRST) + part + b"\n" for number, part in enumerate(parts))

    def feed(self, data: bytes) -> list[bytes]:
        self._line += data
        *lines, rest = self._line.split(b"\n")
        # a line that does not end is no line
        self._line = bytearray(rest[-_LONGEST_LINE:])
        return [message for line in lines if (message := self._take(bytes(line))) is not None]

    def text_lines(self) -> Iterator[str]:
        while self._texts:
            yield self._texts.popleft()

    def forget(self) -> None:
        self._packet = None

    def _take(self, line: bytes) -> bytes | None:
        """A message that ends with ``line``."""
        at, first = _frame_start(line)
        if at < 0:
            # the application's lines may come between those of one message
            self._texts.append(_text(line))
            return None
        if at:
            self._texts.append(_text(line[:at]))
        try:
            part = base64.b64decode(line[at + len(FIRST) :].rstrip(b"\r"), validate=True)
        except binascii.Error:
            self._packet = None
            return None
        if first:
            self._packet = bytearray(part)
        elif self._packet is not None:
            self._packet += part
        return self._whole()

    def _whole(self) -> bytes | None:
        packet = self._packet
        if packet is None or len(packet) < _LENGTH_BYTES:
            return None
        length = int.from_bytes(packet[:_LENGTH_BYTES], "big")
        if len(packet) < _LENGTH_BYTES + length:
            return None
        self._packet = None
        return _checked(bytes(packet[_LENGTH_BYTES:])) if len(packet) == _LENGTH_BYTES + length else None


class Raw:
    """Messages as they are. What cannot begin an answer is skipped byte by byte."""

    overhead_bytes: Final = 0

    def __init__(self) -> None:
        self._input = bytearray()

    def encode(self, message: bytes) -> bytes:
        return message

    def feed(self, data: bytes) -> list[bytes]:
        self._input += data
        found = []
        while (message := self._take()) is not None:
            found.append(message)
        return found

    def text_lines(self) -> Iterator[str]:
        return iter(())

    def forget(self) -> None:
        self._input.clear()

    def _take(self) -> bytes | None:
        start = next(
            (at for at in range(len(self._input)) if _may_answer(self._input[at : at + HEADER_BYTES])), None
        )
        del self._input[: len(self._input) if start is None else start]
        if len(self._input) < HEADER_BYTES or len(self._input) < (end := message_bytes(self._input)):
            return None
        message = bytes(self._input[:end])
        del self._input[:end]
        return message


class Cobs:
    """Message and CRC in consistent overhead byte stuffing (Cheshire and Baker, 1999), ended by a 0."""

    overhead_bytes: Final = CRC_BYTES

    def __init__(self) -> None:
        self._input = bytearray()

    def encode(self, message: bytes) -> bytes:
        return stuff(message + crc16(message)) + b"\0"

    def feed(self, data: bytes) -> list[bytes]:
        self._input += data
        *frames, rest = self._input.split(b"\0")
        self._input = bytearray(rest[-2 * _LONGEST_MESSAGE :])
        return [message for frame in frames if (message := _unframed(bytes(frame))) is not None]

    def text_lines(self) -> Iterator[str]:
        return iter(())

    def forget(self) -> None:
        self._input.clear()


def crc16(data: bytes) -> bytes:
    """CRC-16/XMODEM: polynomial 0x1021, from 0; 2 bytes, high byte first."""
    return binascii.crc_hqx(data, 0).to_bytes(CRC_BYTES, "big")


def stuff(data: bytes) -> bytes:
    """``data`` without a 0 in it: each block of up to 254 bytes behind its length and 1."""
    out = bytearray()
    for block in data.split(b"\0"):
        full = len(block) // _FULL_BLOCK_BYTES * _FULL_BLOCK_BYTES
        for at in range(0, full, _FULL_BLOCK_BYTES):
            out += b"\xff" + block[at : at + _FULL_BLOCK_BYTES]
        out += bytes((len(block) - full + 1,)) + block[full:]
    return bytes(out)


def unstuff(data: bytes) -> bytes:
    """Inverse of :func:`stuff`. Raises ValueError."""
    out = bytearray()
    at = 0
    while at < len(data):
        code = data[at]
        end = at + code
        if code == 0 or end > len(data):
            raise ValueError("not byte stuffing")
        out += data[at + 1 : end]
        if code != 0xFF and end < len(data):
            out.append(0)
        at = end
    return bytes(out)


def _checked(body: bytes) -> bytes | None:
    message = body[:-CRC_BYTES]
    return message if message and body[-CRC_BYTES:] == crc16(message) else None


def _unframed(frame: bytes) -> bytes | None:
    try:
        return _checked(unstuff(frame))
    except ValueError:
        return None


def _text(line: bytes) -> str:
    return line.decode("utf-8", "replace").strip("\r")


def _frame_start(line: bytes) -> tuple[int, bool]:
    """Where in ``line`` a frame begins (-1: nowhere), and whether it is a first one. Text may stand before it."""
    first, following = line.rfind(FIRST), line.rfind(NEXT)
    return max(first, following), first > following


def _may_answer(head: bytes | bytearray) -> bool:
    """Could the answer to a request begin so? ``head`` may be cut short."""
    if head[0] & ~0x18 not in (Op.READ_ANSWER, Op.WRITE_ANSWER) or any(head[1:2]):
        return False
    if len(head) < HEADER_BYTES:
        return True
    return message_bytes(head) <= _RAW_MOST_BYTES and int.from_bytes(head[4:6], "big") in list(Group)
