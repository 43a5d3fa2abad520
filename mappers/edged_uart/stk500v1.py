"""STK500, the first protocol, as boot loaders speak it (Atmel AVR061, rev. 2525B; optiboot, ATmegaBOOT).

Each command ends with Sync_CRC_EOP and is answered by Resp_STK_INSYNC, its data, Resp_STK_OK; there is no
checksum, so whoever writes must read back. A boot loader erases the page that it is told to program. Only
flash and the signature are touched: no fuse, no lock bit, no EEPROM command is here.
"""

from __future__ import annotations

from typing import Final

from edged.errors import Reason, Transient
from edged_uart.link import SerialLink
from edged_uart.parts import PARTS

EOP: Final = b"\x20"
INSYNC: Final = 0x14
OK: Final = 0x10

GET_SYNC: Final = b"\x30"
ENTER_PROGMODE: Final = b"\x50"
LEAVE_PROGMODE: Final = b"\x51"
LOAD_ADDRESS: Final = b"\x55"
PROG_PAGE: Final = b"\x64"
READ_PAGE: Final = b"\x74"
READ_SIGN: Final = b"\x75"
FLASH: Final = b"F"

_SYNC_TRIES: Final = 12
_SYNC_S: Final = 0.12


class Stk500v1:
    """A boot loader in its window after a reset.

    ``answer_s``: the longest that one answer may take. ``page_at_once``: the address and the command for its page may go
    out together, where the part has a USART: its receiver holds two bytes while one is on the line, and to answer takes a
    boot loader less than that (optiboot and ATmegaBOOT do nothing else between the two commands).
    """

    name: Final = "stk500v1"
    page_by_page: Final = True
    reach_bytes: Final = 128 * 1024
    window_s: Final = 0.4

    def __init__(self, link: SerialLink, answer_s: float, *, page_at_once: bool = True) -> None:
        self._link = link
        self._answer_s = answer_s
        self._page_at_once = page_at_once
        self._hears_while_it_sends = False

    async def sync(self) -> None:
        """Get Synchronization, sent until it is answered; then Enter Program Mode.

        Raises Transient(NO_RESPONSE).
        """
        for earlier in range(_SYNC_TRIES):
            await self._link.send(GET_SYNC + EOP)
            answer = await self._link.receive(_sync_length, _SYNC_S)
            if answer is not None:
                if earlier:
                    # the requests before this one may be answered too, after this one was
                    await self._link.quiet(_SYNC_S)
                await self._ask(ENTER_PROGMODE, 0)
                return
        raise Transient(
            Reason.NO_RESPONSE,
            f"{self._link.path}: no boot loader answered STK500 within {_SYNC_TRIES * _SYNC_S:g} s; "
            "check the baud rate and that a reset reaches the board",
        )

    async def signature(self) -> bytes:
        """Read Signature Bytes: 3 bytes, high byte first."""
        found = await self._ask(READ_SIGN, 3)
        # these have a USART; where software moves the bits, what comes while it sends is lost
        self._hears_while_it_sends = self._page_at_once and found in PARTS
        return found

    async def read(self, address: int, length: int) -> bytes:
        """Load Address, Read Page: ``length`` bytes (256 at most) from the byte address ``address``."""
        return await self._ask_at(address, READ_PAGE + length.to_bytes(2, "big") + FLASH, length)

    async def write(self, address: int, data: bytes) -> None:
        """Load Address, Program Page: ``data`` is one whole page, ``address`` its byte address."""
        await self._ask_at(address, PROG_PAGE + len(data).to_bytes(2, "big") + FLASH + data, 0)

    async def leave(self) -> None:
        """Leave Program Mode: optiboot starts the application at once, others do after their time-out."""
        await self._ask(LEAVE_PROGMODE, 0)

    async def _ask_at(self, address: int, command: bytes, count: int) -> bytes:
        """Load Address, then :meth:`_ask`; in one go where the device can, which saves a wait for each page."""
        # flash is addressed in words, low byte first
        load = LOAD_ADDRESS + (address >> 1).to_bytes(2, "little")
        if not self._hears_while_it_sends:
            await self._ask(load, 0)
            return await self._ask(command, count)
        await self._link.send(load + EOP + command + EOP)
        answers = await self._link.receive(lambda _: count + 4, self._answer_s)
        self._data(load, answers and answers[:2])
        return self._data(command, answers and answers[2:])

    async def _ask(self, command: bytes, count: int) -> bytes:
        """Send ``command``; returns the ``count`` bytes of data in its answer. Raises as :meth:`_data`."""
        await self._link.send(command + EOP)
        return self._data(command, await self._link.receive(lambda _: count + 2, self._answer_s))

    def _data(self, command: bytes, answer: bytes | None) -> bytes:
        """The data in the ``answer`` to ``command``.

        Raises Transient(NO_RESPONSE) for None, Transient(PROTOCOL_ERROR) for what is not an answer.
        """
        what = f"{self._link.path}: command {command[0]:#04x}"
        if answer is None:
            raise Transient(Reason.NO_RESPONSE, f"{what}: no whole answer within {self._answer_s:g} s")
        if answer[0] != INSYNC or answer[-1] != OK:
            raise Transient(Reason.PROTOCOL_ERROR, f"{what}: answered {answer[:8].hex(' ')}, not 14 .. 10")
        return answer[1:-1]


def _sync_length(got: bytearray) -> int:
    """Up to and with the first INSYNC, OK: what a resetting board sends before them is nobody's answer."""
    at = got.find(bytes((INSYNC, OK)))
    return at + 2 if at >= 0 else len(got) + 1
