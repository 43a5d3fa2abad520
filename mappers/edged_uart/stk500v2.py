"""STK500 version 2 as boot loaders speak it (Atmel AVR068, rev. 2591C; stk500boot_v2).

Messages have a sequence number, a length and a checksum (chapter 2); each command is answered by its own id
and a status. Only flash and the signature are touched: no fuse, no lock bit, no EEPROM and no chip erase
command is here.

stk500boot, the boot loader of the Arduino Mega, erases one page for each page that is programmed, *counted
from address 0 since its start* and not where it writes. To write page n it must be given the pages 0 to n - 1
first: it cannot go on in the middle. A boot loader that erases the page that it writes can; the configuration
says so.
"""

from __future__ import annotations

from typing import Final

from edged.errors import Permanent, Reason, Transient
from edged_uart.link import SerialLink

MESSAGE_START: Final = 0x1B
TOKEN: Final = 0x0E
STATUS_CMD_OK: Final = 0x00

CMD_SIGN_ON: Final = 0x01
CMD_LOAD_ADDRESS: Final = 0x06
CMD_ENTER_PROGMODE_ISP: Final = 0x10
CMD_LEAVE_PROGMODE_ISP: Final = 0x11
CMD_PROGRAM_FLASH_ISP: Final = 0x13
CMD_READ_FLASH_ISP: Final = 0x14
CMD_READ_SIGNATURE_ISP: Final = 0x1B

_HEAD_BYTES: Final = 5
_FRAME_BYTES: Final = _HEAD_BYTES + 1
_BODY_BYTES: Final = 275
_SYNC_TRIES: Final = 8
_SYNC_S: Final = 0.2

# AVR068 5.2.1 and 5.2.4 hand these on to a programmer's SPI; a boot loader has none, but wants the bytes.
_ENTER: Final = bytes((CMD_ENTER_PROGMODE_ISP, 200, 100, 25, 32, 0, 0x53, 3, 0xAC, 0x53, 0x00, 0x00))
_LEAVE: Final = bytes((CMD_LEAVE_PROGMODE_ISP, 1, 1))
_WRITE_MODE: Final = bytes((0xC1, 10, 0x40, 0x4C, 0x20, 0x00, 0x00))
_READ_COMMAND: Final = b"\x20"
_SIGNATURE_COMMAND: Final = 0x30
_LARGE: Final = 1 << 31


class Stk500v2:
    """A boot loader in its window after a reset.

    ``answer_s``: the longest that one answer may take. ``page_by_page``: it erases where it writes.
    """

    name: Final = "stk500v2"
    reach_bytes: Final = 1 << 31
    window_s: Final = 4.0

    def __init__(self, link: SerialLink, answer_s: float, *, page_by_page: bool) -> None:
        self.page_by_page = page_by_page
        self._link = link
        self._answer_s = answer_s
        self._sequence = 0

    async def sync(self) -> None:
        """CMD_SIGN_ON (5.1.1), sent until it is answered; then CMD_ENTER_PROGMODE_ISP (5.2.1).

        Raises Transient(NO_RESPONSE).
        """
        for _ in range(_SYNC_TRIES):
            if await self._exchange(bytes((CMD_SIGN_ON,)), _SYNC_S):
                await self._ask(_ENTER, 0)
                return
            self._link.drop_input()
        raise Transient(
            Reason.NO_RESPONSE,
            f"{self._link.path}: no boot loader answered STK500v2 within {_SYNC_TRIES * _SYNC_S:g} s; "
            "check the baud rate and that a reset reaches the board",
        )

    async def signature(self) -> bytes:
        """CMD_READ_SIGNATURE_ISP (5.2.12), once for each of the 3 bytes, high byte first."""
        found = b""
        for number in range(3):
            body = bytes((CMD_READ_SIGNATURE_ISP, 4, _SIGNATURE_COMMAND, 0, number, 0))
            found += (await self._ask(body, 2))[:1]
        return found

    async def read(self, address: int, length: int) -> bytes:
        """CMD_LOAD_ADDRESS (5.1.5), CMD_READ_FLASH_ISP (5.2.5): ``length`` bytes, 256 at most."""
        await self._load_address(address)
        body = bytes((CMD_READ_FLASH_ISP,)) + length.to_bytes(2, "big") + _READ_COMMAND
        return (await self._ask(body, length + 1))[:length]

    async def write(self, address: int, data: bytes) -> None:
        """CMD_LOAD_ADDRESS (5.1.5), CMD_PROGRAM_FLASH_ISP (5.2.4): ``data`` is one whole page."""
        await self._load_address(address)
        await self._ask(
            bytes((CMD_PROGRAM_FLASH_ISP,)) + len(data).to_bytes(2, "big") + _WRITE_MODE + data, 0
        )

    async def leave(self) -> None:
        """CMD_LEAVE_PROGMODE_ISP (5.2.2): the boot loader starts the application."""
        await self._ask(_LEAVE, 0)

    async def _load_address(self, address: int) -> None:
        # flash is addressed in words; bit 31: beyond 64 KiB
        word = address >> 1 | (_LARGE if address >= 0x10000 else 0)
        await self._ask(bytes((CMD_LOAD_ADDRESS,)) + word.to_bytes(4, "big"), 0)

    async def _ask(self, body: bytes, count: int) -> bytes:
        """Send ``body``; returns the ``count`` bytes behind the status of its answer.

        Raises Transient(NO_RESPONSE), Transient(PROTOCOL_ERROR) for an answer to something else, and
        Permanent(DEVICE_ERROR) for a status other than STATUS_CMD_OK.
        """
        answer = await self._exchange(body, self._answer_s)
        what = f"{self._link.path}: command {body[0]:#04x}"
        if answer is None:
            raise Transient(Reason.NO_RESPONSE, f"{what}: no whole answer within {self._answer_s:g} s")
        if len(answer) < 2 or answer[0] != body[0]:
            raise Transient(Reason.PROTOCOL_ERROR, f"{what}: answered {answer[:8].hex(' ')}")
        if answer[1] != STATUS_CMD_OK:
            raise Permanent(Reason.DEVICE_ERROR, f"{what}: the device answered status {answer[1]:#04x}")
        if len(answer) != count + 2:
            raise Transient(
                Reason.PROTOCOL_ERROR, f"{what}: {len(answer)} bytes answered instead of {count + 2}"
            )
        return answer[2:]

    async def _exchange(self, body: bytes, timeout_s: float) -> bytes | None:
        """The body of the answer to ``body``: None where none came in time, empty where it was damaged."""
        self._sequence = (self._sequence + 1) & 0xFF
        await self._link.send(frame(self._sequence, body))
        while True:
            raw = await self._link.receive(frame_end, timeout_s)
            if raw is None:
                return None
            answer = raw[frame_start(raw) :]
            if checksum(answer) != 0:
                return b""
            # a late answer to an earlier message is nobody's
            if answer[1] == self._sequence:
                return answer[_HEAD_BYTES:-1]


def frame(sequence: int, body: bytes) -> bytes:
    """A message (chapter 2): MESSAGE_START, sequence number, size (2 bytes), TOKEN, body, checksum."""
    message = bytes((MESSAGE_START, sequence)) + len(body).to_bytes(2, "big") + bytes((TOKEN,)) + body
    return message + bytes((checksum(message),))


def checksum(message: bytes) -> int:
    """Exclusive or over all bytes; 0 over a whole message that ends with its own."""
    value = 0
    for byte in message:
        value ^= byte
    return value


def frame_start(got: bytes | bytearray) -> int:
    """Where in ``got`` the first message may begin: all before it is noise."""
    start = got.find(MESSAGE_START)
    while start >= 0 and not _may_begin(got[start : start + _HEAD_BYTES]):
        start = got.find(MESSAGE_START, start + 1)
    return start if start >= 0 else len(got)


def frame_end(got: bytearray) -> int:
    """Where the first message ends, as far as can be told: beyond ``got`` while it is not whole."""
    start = frame_start(got)
    head = got[start : start + _HEAD_BYTES]
    if len(head) < _HEAD_BYTES:
        return start + _HEAD_BYTES
    return start + _FRAME_BYTES + int.from_bytes(head[2:4], "big")


def _may_begin(head: bytes | bytearray) -> bool:
    return len(head) < _HEAD_BYTES or (head[4] == TOKEN and int.from_bytes(head[2:4], "big") <= _BODY_BYTES)
