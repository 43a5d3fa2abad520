"""The serial line: one exclusive port, opened and closed in a thread, read and written on the event loop.

pyserial opens, configures and closes, because those calls block. Bytes move through the loop's own watch of
the descriptor: a thread hop for each answer would cost more than the protocol does. Knows no protocol, and
does not reconnect: a lost line stays lost, and whoever needs it opens a new link.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import termios
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Final, TypeVar

import serial

from edged.api import Env
from edged.errors import Permanent, Reason, Transient

T = TypeVar("T")

SCHEME: Final = "serial"
_READ_BYTES: Final = 4096
_KEPT_BYTES: Final = 65536
_PULSE_S: Final = 0.1
_FIRST_BAUD: Final = 115200
_PTY_MAJORS: Final = range(136, 144)
_BUSY: Final = frozenset({errno.EBUSY, errno.EAGAIN})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM})
_NO_MODEM_LINES: Final = frozenset({errno.ENOTTY, errno.EINVAL})


def parse_address(rest: str) -> str:
    """The device file that the part of an address after ``serial:`` names.

    ``/dev/ttyUSB0`` stays; ``by-id/NAME`` and ``by-path/NAME`` lie below ``/dev/serial``. Raises ValueError for
    anything else.
    """
    if split_baud(rest)[1] is not None:
        raise ValueError("a rate in an address is for probing; allowed: baud in the device's config")
    folder, _, name = rest.partition("/")
    if rest.startswith("/") and rest.isprintable():
        return rest
    if (
        folder in ("by-id", "by-path")
        and name not in ("", ".", "..")
        and "/" not in name
        and name.isprintable()
    ):
        return f"/dev/serial/{rest}"
    raise ValueError("allowed: serial:by-id/NAME, serial:by-path/NAME, serial:/dev/NAME")


def split_baud(address: str) -> tuple[str, int | None]:
    """An address that is to be probed: without the bits per second that it may end in (``serial:/dev/ttyUSB0@57600``), and
    these."""
    port, _, baud = address.rpartition("@")
    return (port, int(baud)) if port and baud.isascii() and baud.isdecimal() else (address, None)


def port_path(rest: str) -> str:
    """:func:`parse_address` for an address that comes from elsewhere. Raises Permanent(CONFIG_INVALID)."""
    try:
        return parse_address(rest)
    except ValueError as error:
        raise Permanent(Reason.CONFIG_INVALID, f"address: found 'serial:{rest}'; {error}") from error


@asynccontextmanager
async def open_serial(rest: str, env: Env) -> AsyncIterator[SerialLink]:
    """Open the port that ``rest`` names; the ``open`` of this link's :class:`~edged.api.LinkSpec`.

    Raises Transient(DEVICE_ABSENT), Transient(LINK_BUSY) or Permanent(CONFIG_INVALID).
    """
    link = SerialLink(port_path(rest))
    try:
        await link.open()
        yield link
    finally:
        await link.close()


class SerialLink:
    """One open port, 8N1. Every method that waits raises Transient(LINK_LOST) once the port is gone.

    What arrives while nobody waits is kept, the newest 64 KiB of it.
    """

    exclusive = True
    sets_baud = True
    """Whether it is here that the rate is set."""
    has_lines = True
    """Whether there are DTR and RTS."""
    hung_up = "the port was hung up: unplugged?"
    """How the other end's going is told."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.address = f"{SCHEME}:{path}"
        self.baud = _FIRST_BAUD
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"serial {path}")
        self._port: serial.Serial | None = None
        self._fd = -1
        self._is_pty = False
        self._ended = False
        self._lost = ""
        self._input = bytearray()
        self._length: Callable[[bytearray], int] | None = None
        self._waiter: asyncio.Future[bool] | None = None

    async def open(self) -> None:
        """Open and lock the port. On most boards this resets the device. Errors as :func:`open_serial`."""
        self._fd = await self._in_thread(self._open_port)
        self._lost = ""
        self._input.clear()
        asyncio.get_running_loop().add_reader(self._fd, self._on_readable)

    async def close(self) -> None:
        """Close the port for good, also where the caller is cancelled meanwhile. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._forget("the port was closed")
        closing = asyncio.get_running_loop().run_in_executor(self._thread, self._close_port)
        try:
            await asyncio.shield(closing)
        finally:
            self._thread.shutdown(wait=False)

    async def set_baud(self, baud: int) -> None:
        """Use ``baud`` bits per second. Raises Permanent(CONFIG_INVALID) where the port cannot."""
        if baud != self.baud:
            await self._in_thread(self._configure, baud)
            self.baud = baud

    async def pulse_reset(self) -> None:
        """Reset the board through DTR and RTS, as the capacitor of an Arduino expects it; input is dropped.

        A pseudo terminal has no such lines; there the port is opened anew, which is what its other end can
        see. Raises Permanent(UNSUPPORTED) where a real port has none.
        """
        if await self._in_thread(self._set_lines, False):
            await asyncio.sleep(_PULSE_S)
            await self._in_thread(self._set_lines, True)
        else:
            self._forget("the port is opened anew")
            await self._in_thread(self._close_port)
            await self.open()
        self.drop_input()

    async def keep_lines(self) -> None:
        """Leave DTR and RTS as they are when the port is closed (no HUPCL, termios(3)): where nothing moves on them, the next
        one to open the port does not reset the device."""
        await self._in_thread(self._keep_lines)

    def drop_input(self) -> None:
        """Forget what has arrived up to now, also what the system holds: as much as would be kept."""
        self._input.clear()
        for _ in range(_KEPT_BYTES // _READ_BYTES):
            self._on_readable()
            if not self._input:
                return
            self._input.clear()

    async def send(self, data: bytes) -> None:
        """Give all of ``data`` to the system, which is not yet the wire."""
        while data:
            self._check()
            try:
                data = data[os.write(self._fd, data) :]
            except BlockingIOError:
                await self._writable()
            except OSError as error:
                raise self._lose(error) from error

    async def receive(self, length: Callable[[bytearray], int], timeout_s: float | None) -> bytes | None:
        """The next message, or None where it is not complete after ``timeout_s`` (None: wait for ever).

        ``length`` is given what has arrived and says how many bytes the message at its beginning has, as far
        as can be told by now; it is asked again when more arrives. One receiver at a time.
        """
        wanted = length(self._input)
        if len(self._input) < wanted:
            self._check()
            if not await self._arrived(length, timeout_s):
                return None
            wanted = length(self._input)
        message = bytes(self._input[:wanted])
        del self._input[:wanted]
        return message

    async def quiet(self, silence_s: float) -> None:
        """Drop input until nothing has arrived for ``silence_s``, or ten times that has passed in vain."""
        end = asyncio.get_running_loop().time() + 10 * silence_s
        while await self.receive(one_byte, silence_s) and asyncio.get_running_loop().time() < end:
            self.drop_input()

    async def _arrived(self, length: Callable[[bytearray], int], timeout_s: float | None) -> bool:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[bool] = loop.create_future()
        self._length, self._waiter = length, waiter
        expiry = None if timeout_s is None else loop.call_later(timeout_s, _settle, waiter, False)
        try:
            done = await waiter
        finally:
            self._waiter = None
            if expiry is not None:
                expiry.cancel()
        self._check()
        return done

    def _on_readable(self) -> None:
        if self._fd < 0:
            return
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if not data:
            self._forget(self.hung_up)
            return
        self._input += data
        if self._waiter is None or self._length is None:
            del self._input[:-_KEPT_BYTES]
        elif len(self._input) >= self._length(self._input):
            _settle(self._waiter, True)

    async def _writable(self) -> None:
        loop, fd = asyncio.get_running_loop(), self._fd
        ready: asyncio.Future[bool] = loop.create_future()
        loop.add_writer(fd, _settle, ready, True)
        try:
            await ready
        finally:
            loop.remove_writer(fd)

    def _check(self) -> None:
        if self._lost:
            raise Transient(Reason.LINK_LOST, f"{self.path}: {self._lost}")

    def _lose(self, error: OSError) -> Transient:
        self._forget(f"{_text(error)}: unplugged?")
        return Transient(Reason.LINK_LOST, f"{self.path}: {self._lost}")

    def _forget(self, why: str) -> None:
        """Stop watching the descriptor, before it is closed and its number given to another file."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
        self._fd = -1
        self._lost = self._lost or why
        if self._waiter is not None:
            _settle(self._waiter, False)

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, call, *arguments)
        except OSError as error:
            raise self._translate(error) from error

    def _open_port(self) -> int:
        # inter_byte_timeout 0 is VMIN 1: without it a read gives nothing where nothing came, as at the end.
        # Kept here, not by the caller, which may be cancelled meanwhile: close() then finds it.
        self._port = serial.Serial(
            self.path, self.baud, timeout=0, write_timeout=0, inter_byte_timeout=0, exclusive=True
        )
        fd: int = self._port.fileno()
        self._is_pty = os.major(os.fstat(fd).st_rdev) in _PTY_MAJORS
        if not self._is_pty:
            # pyserial's lock is advisory, and few programs ask for it; on a pty this one would outlive us
            fcntl.ioctl(fd, termios.TIOCEXCL)
        return fd

    def _close_port(self) -> None:
        port, self._port = self._port, None
        if port is not None:
            with suppress(OSError, termios.error):
                # what could not be sent must not hold up the close
                port.reset_output_buffer()
            with suppress(OSError):
                port.close()

    def _configure(self, baud: int) -> None:
        try:
            self._opened().baudrate = baud
        except ValueError as error:
            raise Permanent(Reason.CONFIG_INVALID, f"{self.path}: {baud} baud: {error}") from error

    def _set_lines(self, active: bool) -> bool:
        """False where the port has no modem lines and needs none."""
        port = self._opened()
        try:
            port.dtr = active
            port.rts = active
        except OSError as error:
            if error.errno not in _NO_MODEM_LINES:
                raise
            if not self._is_pty:
                raise Permanent(
                    Reason.UNSUPPORTED,
                    f"{self.path} has no DTR and RTS lines to reset the board with; set reset = 'none'",
                ) from error
            return False
        return True

    def _keep_lines(self) -> None:
        fd = self._opened().fileno()
        with suppress(termios.error):
            attributes = termios.tcgetattr(fd)
            attributes[2] &= ~termios.HUPCL
            termios.tcsetattr(fd, termios.TCSANOW, attributes)

    def _opened(self) -> serial.Serial:
        if self._port is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return self._port

    def _translate(self, error: OSError) -> Transient:
        if self._fd >= 0:
            return self._lose(error)
        if error.errno in _BUSY:
            return Transient(Reason.LINK_BUSY, f"{self.path} is used by another program")
        cause = error.__context__
        if isinstance(cause, termios.error) and cause.args[0] == errno.ENOTTY:
            # pyserial opened it, and could set no rate: a file, or a device of another kind
            return Transient(Reason.DEVICE_ABSENT, f"{self.path} is no serial port")
        hint = (
            ": is the daemon's user in the port's group, usually dialout?"
            if error.errno in _FORBIDDEN
            else ""
        )
        return Transient(Reason.DEVICE_ABSENT, f"{self.path}: {_text(error)}{hint}")


def one_byte(_: bytearray) -> int:
    """The ``length`` of a message of one byte, for :meth:`SerialLink.receive`."""
    return 1


def _text(error: OSError) -> str:
    # pyserial puts its own sentence, with the path, where the system's text should be; a resolver's number is not the system's
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def _settle(waiter: asyncio.Future[bool], value: bool) -> None:
    if not waiter.done():
        waiter.set_result(value)
