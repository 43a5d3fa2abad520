"""A real MCUboot on a simulated nRF52832, run by the interpreter of ``tests/peers/unicorn.txt``: one boot of the board.

Reads one JSON object of settings from its standard input and prints one that tells how the boot ended; the file that ``flash``
names is what the flash holds, before and after. The processor is Unicorn's; around it is what that boot loader touches: the
flash controller, strict where the real one would spoil bytes, the UART, and registers that keep what is written to them. Time
does not pass and nothing interrupts.
"""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unicorn import UC_ARCH_ARM, UC_HOOK_CODE, UC_HOOK_MEM_WRITE, UC_MODE_MCLASS, UC_MODE_THUMB, Uc, UcError
from unicorn.arm_const import UC_ARM_REG_PC, UC_ARM_REG_SP, UC_CPU_ARM_CORTEX_M4

PAGE_BYTES = 4096
RAM_AT, RAM_BYTES = 0x20000000, 0x10000
FICR_AT, UICR_AT = 0x10000000, 0x10001000
GPIO_AT, ERRATA_AT = 0x50000000, 0xF0000000
PERIPHERALS_AT, PERIPHERALS_BYTES = 0x40000000, 0x26000
CORE_AT, CORE_BYTES = 0xE0000000, 0x100000
UART_START_TX, UART_TX_POINTER, UART_TX_COUNT = 0x40002008, 0x40002544, 0x40002548
UART_SENT = (0x40002120, 0x40002158)
CLOCK_STATE, CLOCK_RUNS = 0x40000418, 0x10001
NVMC_READY, NVMC_CONFIG, NVMC_ERASE_PAGE = 0x4001E400, 0x4001E504, 0x4001E508
WRITES, ERASES = 1, 2
CYCLES, INTERRUPT_CONTROL = 0xE0001004, 0xE000ED0C
GAVE_UP = b"Unable to find bootable image"
BOOT_LIMIT_S = 300


class Board:
    """``cut_at``: the power goes at that change of the flash, counted from 1; ``torn``: when half of it is done."""

    def __init__(self, flash: bytes, application_at: int, cut_at: int, torn: bool) -> None:
        self._flash = flash
        self._cut_at, self._torn = cut_at, torn
        self._registers: dict[int, int] = {NVMC_READY: 1, CLOCK_STATE: CLOCK_RUNS}
        self._after_cut: bytes | None = None
        self.end: dict[str, Any] = {}
        self.said = bytearray()
        self.changes = 0
        self._cpu = cpu = Uc(UC_ARCH_ARM, UC_MODE_THUMB | UC_MODE_MCLASS)
        cpu.ctl_set_cpu_model(UC_CPU_ARM_CORTEX_M4)
        for at, size in (
            (0, len(flash)), (RAM_AT, RAM_BYTES), (FICR_AT, PAGE_BYTES), (UICR_AT, PAGE_BYTES), (GPIO_AT, PAGE_BYTES),
            (ERRATA_AT, PAGE_BYTES),
        ):  # fmt: skip
            cpu.mem_map(at, size)
        cpu.mem_write(0, flash)
        # size of a page, pages; reset by pin 21, no lock, no NFC: else the start-up code writes them and resets
        cpu.mem_write(FICR_AT + 0x10, struct.pack("<II", PAGE_BYTES, len(flash) // PAGE_BYTES))
        cpu.mem_write(UICR_AT + 0x200, struct.pack("<IIII", 21, 21, 0xFFFFFF5A, 0xFFFFFFFE))
        for at, size in ((PERIPHERALS_AT, PERIPHERALS_BYTES), (CORE_AT, CORE_BYTES)):
            cpu.mmio_map(at, size, self._read, at, self._write, at)
        cpu.hook_add(UC_HOOK_MEM_WRITE, self._store, None, 0, len(flash) - 1)
        cpu.hook_add(UC_HOOK_CODE, self._started, None, application_at, len(flash) - 1)

    def boot(self) -> bytes:
        """What the flash holds at the end."""
        stack, entry = struct.unpack_from("<II", self._flash)
        self._cpu.reg_write(UC_ARM_REG_SP, stack)
        try:
            self._cpu.emu_start(entry | 1, 0xFFFFFFFE, timeout=BOOT_LIMIT_S * 1_000_000)
        except UcError as error:
            self._stop("fault", detail=str(error))
        self._stop("fault", detail=f"it did not end within {BOOT_LIMIT_S} s")
        if self._after_cut is not None:
            return self._after_cut
        return bytes(self._cpu.mem_read(0, len(self._flash)))

    def _stop(self, how: str, **more: object) -> None:
        """What comes first counts: the processor may go on for some instructions."""
        if not self.end:
            self.end = {"end": how, "at": self._cpu.reg_read(UC_ARM_REG_PC), **more}
        self._cpu.emu_stop()

    def _started(self, cpu: Uc, at: int, size: int, _: object) -> None:
        self._stop("application")

    # -- the flash

    def _store(self, cpu: Uc, access: int, at: int, size: int, value: int, _: object) -> None:
        """A word that is about to be written: bits can only be cleared."""
        new = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        old = bytes(cpu.mem_read(at, size))
        if self._registers.get(NVMC_CONFIG) != WRITES or any(b & ~a for a, b in zip(old, new, strict=True)):
            self._stop("fault", detail=f"{new.hex()} written to {at:#x}, which has {old.hex()}")
        self._change(at, new)

    def _erase(self, at: int) -> None:
        if self._registers.get(NVMC_CONFIG) != ERASES or at % PAGE_BYTES:
            self._stop("fault", detail=f"{at:#x} is to be erased")
        erased = b"\xff" * PAGE_BYTES
        self._change(at, erased)
        if not self.end:
            self._cpu.mem_write(at, erased)

    def _change(self, at: int, new: bytes) -> None:
        self.changes += 1
        if self.changes == self._cut_at and not self.end:
            flash = bytearray(self._cpu.mem_read(0, len(self._flash)))
            half = new[: len(new) // 2] if self._torn else b""
            flash[at : at + len(half)] = half
            self._after_cut = bytes(flash)
            self._stop("cut")

    # -- registers

    def _read(self, cpu: Uc, offset: int, size: int, base: int) -> int:
        at = base + offset
        if at == CYCLES:
            # whoever waits for a number of cycles gets it soon
            self._registers[at] = (self._registers.get(at, 0) + 1024) & 0xFFFFFFFF
        return self._registers.get(at, 0)

    def _write(self, cpu: Uc, offset: int, size: int, value: int, base: int) -> None:
        at = base + offset
        self._registers[at] = value
        if at == NVMC_ERASE_PAGE:
            self._erase(value)
        elif at == UART_START_TX:
            self._say(bytes(cpu.mem_read(self._registers[UART_TX_POINTER], self._registers[UART_TX_COUNT])))
            self._registers |= dict.fromkeys(UART_SENT, 1)
        elif at == INTERRUPT_CONTROL:
            self._stop("reset")
        elif base == PERIPHERALS_AT and offset & 0xFFF < 0x100 and value:
            # a task that is started has its event at once
            self._registers[at | 0x100] = 1

    def _say(self, data: bytes) -> None:
        self.said += data
        if GAVE_UP in self.said:
            self._stop("no image")


def main(read: Callable[[], str] = sys.stdin.readline) -> None:
    settings = json.loads(read())
    file = Path(settings["flash"])
    board = Board(
        file.read_bytes(), settings["application_at"], settings.get("cut_at", 0), settings.get("torn", False)
    )
    file.write_bytes(board.boot())
    print(json.dumps({**board.end, "changes": board.changes, "said": board.said.decode(errors="replace")}))


main()
