"""A running board: start, stop, faults and what can be seen of it from outside."""

from __future__ import annotations

import asyncio
import select
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import intelhex

from edged.testing.avr.boards import OPTIBOOT_328P, Board
from edged.testing.avr.build import SimulatorError, boot_code, build_host

_COUNTERS: Final = struct.Struct("<8Q")
_START_S: Final = 20.0
_END_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class AvrStats:
    """What the device counted since its ``stats`` file was made; power cuts do not set it back.

    ``watchdog_resets`` are how optiboot leaves for the application. ``bytes_in`` is what the client sent.
    """

    power_resets: int = 0
    external_resets: int = 0
    watchdog_resets: int = 0
    pages_erased: int = 0
    pages_written: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    opens: int = 0


class SimulatedAvr:
    """A board with its serial port at ``port``, its flash and its counters in files of ``folder``.

    Use it as a context manager, plain or async, or call :meth:`start` and :meth:`stop`. Opening the port
    resets the board, as the DTR line of an Arduino does. ``application`` is an Intel HEX file that is in the
    flash from the beginning; it is ignored where ``folder`` already has a flash. The process ends with the
    one that started it.
    """

    def __init__(
        self,
        folder: Path,
        board: Board = OPTIBOOT_328P,
        *,
        baud: int | None = None,
        application: Path | None = None,
        tap: bool = False,
    ) -> None:
        self.board = board
        self.port = folder / "tty"
        self.flash_file = folder / "flash.bin"
        self._stats_file = folder / "stats.bin"
        self._tap_file = folder / "tap.bin"
        self._baud = baud or board.baud
        self._application = application
        self._tap = tap
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        try:
            await asyncio.to_thread(self.start)
        except asyncio.CancelledError:
            # the thread runs on; what it starts must not outlive us
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)

    @property
    def pid(self) -> int:
        """The process of the running board. Raises SimulatorError where it does not run."""
        return self._running().pid

    def start(self) -> None:
        """Power on; returns when the port is there. Blocks. Raises SimulatorError."""
        if self._process is not None:
            raise SimulatorError("the board runs already")
        command = self._command()
        if not self.flash_file.exists():
            self.flash_file.write_bytes(self._factory_flash())
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._process = process
        said = _first_line(process)
        if said != b"ready\n":
            self.stop()
            raise SimulatorError(f"{' '.join(command)}: {said!r}")

    def stop(self) -> None:
        """Power off in good order; a board that does not run is left as it is. Blocks."""
        self._end(signal.SIGTERM)

    def power_cut(self) -> None:
        """Power off at this instant: the flash stays as it is, a client sees the port go away. Blocks."""
        self._running()
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Power on again with the flash as it was. Blocks. Raises SimulatorError."""
        self.start()

    def power_blip(self) -> None:
        """The part loses power for a moment while the line stays: a power-on reset, nothing else."""
        self._running().send_signal(signal.SIGHUP)

    def pull_reset(self) -> None:
        """The reset pin goes low for a moment, as by the DTR line of an adapter that is not a terminal here."""
        self._running().send_signal(signal.SIGURG)

    def stand_still(self) -> None:
        """The board answers nothing and gets no further, until :meth:`go_on`; what is sent meanwhile waits."""
        self._running().send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """From where it stood still."""
        self._running().send_signal(signal.SIGCONT)

    def unplug(self) -> None:
        """Pull the line out: ``port`` is gone, an open client has EIO. The part goes on. Blocks briefly."""
        self._running().send_signal(signal.SIGUSR1)
        _wait_until(lambda: not self.port.is_symlink())

    def plug(self) -> None:
        """Put the line in again: ``port`` is there, on a fresh device node. Blocks for milliseconds."""
        self._running().send_signal(signal.SIGUSR2)
        _wait_until(self.port.is_symlink)

    def flash(self) -> bytes:
        """All of the part's flash as it is now, boot loader included; ``board.flash_bytes`` bytes."""
        return self.flash_file.read_bytes()

    def stats(self) -> AvrStats:
        """The counters as they are now; all zero before the first start."""
        if not self._stats_file.exists():
            return AvrStats()
        return AvrStats(*_COUNTERS.unpack(self._stats_file.read_bytes()))

    def tapped(self) -> bytes:
        """Every byte that clients sent, in order. Raises SimulatorError where ``tap`` was not asked for."""
        if not self._tap:
            raise SimulatorError("the board was made without a tap")
        return self._tap_file.read_bytes()

    def _command(self) -> list[str]:
        command = [
            *(str(build_host()), "--lifeline"),
            *("--mcu", self.board.mcu),
            *("--boot", str(boot_code(self.board))),
            *("--boot-at", hex(self.board.boot_at)),
            *("--baud", str(self._baud)),
            *("--port", str(self.port)),
            *("--flash", str(self.flash_file)),
            *("--stats", str(self._stats_file)),
        ]
        return [*command, "--tap", str(self._tap_file)] if self._tap else command

    def _factory_flash(self) -> bytes:
        flash = bytearray(b"\xff" * self.board.flash_bytes)
        if self._application:
            image = intelhex.IntelHex(str(self._application))
            for start, end in image.segments():
                flash[start:end] = image.tobinarray(start=start, end=end - 1)
        return bytes(flash)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise SimulatorError("the board does not run")
        return self._process

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.send_signal(how)
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
            # the kernel gives the number of a dead device node to somebody else's terminal
            with suppress(FileNotFoundError):
                self.port.unlink()


def _first_line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], _START_S)
    return process.stdout.readline() if ready else b"no word"


def _wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + _END_S
    while not holds():
        if time.monotonic() > end:
            raise SimulatorError("the board did not answer a signal")
        time.sleep(0.002)
