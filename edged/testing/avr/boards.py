"""The boards that can be simulated: a part, a boot loader that others wrote, and where Debian puts it.

Facts only: no process is started here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

_BOOT_FOLDER: Final = Path("/usr/share/arduino/hardware/arduino/avr/bootloaders")


@dataclass(frozen=True, slots=True)
class Board:
    """A part with a boot loader in its flash.

    ``boot_at`` is the byte address of the boot section, where every reset starts; the application has the
    ``boot_at`` bytes below it. ``signature`` is the part's (data sheet, "Signature Bytes"). ``programmer``
    and ``part`` are avrdude's names for the protocol and the part.
    """

    name: str
    mcu: str
    boot_hex: Path
    boot_at: int
    baud: int
    flash_bytes: int
    page_bytes: int
    signature: bytes
    programmer: str
    part: str


OPTIBOOT_328P: Final = Board(
    name="optiboot-328p",
    mcu="atmega328p",
    boot_hex=_BOOT_FOLDER / "optiboot" / "optiboot_atmega328.hex",
    # Debian's compiler makes it 532 bytes, too large for the 512 byte section at 0x7e00 that it is linked
    # for. Its code does not depend on its place, so it stands in the 1 KiB section (fuse BOOTSZ = 0b10).
    boot_at=0x7C00,
    baud=115200,
    flash_bytes=32768,
    page_bytes=128,
    signature=b"\x1e\x95\x0f",
    programmer="arduino",
    part="m328p",
)
"""STK500v1; an external reset opens a window of one second, a watchdog reset starts the application."""

ATMEGABOOT_328P: Final = Board(
    name="atmegaboot-328p",
    mcu="atmega328p",
    boot_hex=_BOOT_FOLDER / "atmega" / "ATmegaBOOT_168_atmega328.hex",
    boot_at=0x7800,
    baud=57600,
    flash_bytes=32768,
    page_bytes=128,
    signature=b"\x1e\x95\x0f",
    programmer="arduino",
    part="m328p",
)
"""STK500v1; does not leave on request, only by its time-out."""

STK500BOOT_2560: Final = Board(
    name="stk500boot-2560",
    mcu="atmega2560",
    boot_hex=_BOOT_FOLDER / "stk500v2" / "stk500boot_v2_mega2560.hex",
    boot_at=0x3E000,
    baud=115200,
    flash_bytes=262144,
    page_bytes=256,
    signature=b"\x1e\x98\x01",
    programmer="wiring",
    part="m2560",
)
"""STK500v2; erases one page per page written, counted from 0 in each of its lives, wherever it writes."""
