"""A controller with a UDS server, from ISO 14229-1:2020 and ISO 15765-2:2016: a second implementation, in nothing shared with
the mapper, with can-isotp or with udsoncan.

:class:`Controller` has the memory, the boot loader's and the application's behaviour; it is given whole requests and gives
whole answers. :class:`IsoTp` cuts them into frames. :class:`OnBus` runs both in a thread on a python-can bus; the same file
is run with sockets of the kernel where there are some (``python uds_server.py INTERFACE``). Standard library only, but for
python-can where a bus of its is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import socket
import struct
import sys
import threading
import time
import types
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

DEFAULT, PROGRAMMING, EXTENDED = 1, 2, 3
PENDING = 0x78
ERASED = 0xFF
SECRET = b"\x5a\xa5\x0f\xf0"
SECOND_SECRET = b"\x13\x57\x9b\xdf"
FINGERPRINT = 0xF15A
SILENT_TO_ALL = frozenset({0x11, 0x12, 0x31, 0x7E, 0x7F})
"""Nobody says to a question to everyone that he is not the one who was meant (ISO 14229-1, 8.7.3)."""
BASE = 0x08000000
_HEAD = struct.Struct(">4s16sHI")
_EXTENT = struct.Struct(">II")


class Effects(Protocol):
    """Where the power may be cut; ``edged.testing.faults.Faults`` is one."""

    def effect(
        self, name: str, apply: Callable[[], None], torn: Callable[[], None] | None = None
    ) -> None: ...


class Steady:
    def effect(self, name: str, apply: Callable[[], None], torn: Callable[[], None] | None = None) -> None:
        apply()


def make_app(
    version: str, sizes: tuple[int, ...] = (3000, 1500), gap: int = 0x2000
) -> list[tuple[int, bytes]]:
    """Segments of an application that the boot loader starts: a head with their checksum, then what nobody would compress."""
    dice = random.Random(version)
    parts = [bytearray(dice.randbytes(size)) for size in sizes]
    extents = [(BASE + number * gap, len(part)) for number, part in enumerate(parts)]
    table = b"".join(_EXTENT.pack(*extent) for extent in extents)
    head_bytes = _HEAD.size + len(table)
    body = b"".join([bytes(parts[0][head_bytes:]), *map(bytes, parts[1:])])
    head = _HEAD.pack(b"UDSA", version.encode(), len(parts), zlib.crc32(body)) + table
    parts[0][:head_bytes] = head
    return [(address, bytes(part)) for (address, _), part in zip(extents, parts, strict=True)]


class Negative(Exception):
    """A negative response with this code."""

    def __init__(self, code: int) -> None:
        self.code = code


@dataclass
class Counts:
    blocks: int = 0
    written: int = 0
    erased: int = 0
    resets: int = 0
    downloads: int = 0
    seeds: int = 0
    wrong_keys: int = 0
    polls: int = 0
    to_all: int = 0
    pending: int = 0
    testers: int = 0


@dataclass
class Controller:
    """One controller. Flash and what is in ``properties`` survive a reset; nothing else does.

    ``refuses_repeats``: a block that was repeated ends the transfer with requestSequenceError, as some do, in place of being
    acknowledged. ``slow_erase_s``: erasing takes so long, and the client is asked for time. ``endless``: it is asked for ever.
    ``never_boots``: it stays in its boot loader; ``lingers_s``: it is there for so long after a start, and answers.
    ``starts_anew_s``: it gets into its programming session by a start, after it has answered, and hears nothing for so long.
    ``resets_after_s``: from its answer to a reset to the reset. ``refuses_download``: with this code.
    ``locked_for_s``: after three wrong keys. ``programming_level``: of SecurityAccess, without which nothing is erased.
    ``needs_fingerprint``: nothing is erased before somebody has said who he is, with that many bytes. ``background_s``: erasing
    and checking go on for so long after their start, and requestRoutineResults tells how they went. ``application_only``:
    services that its boot loader does not have. ``sector_bytes``: what is erased at once. ``bad_blocks``: so many are not
    taken (generalProgrammingFailure), and end the transfer.
    """

    hardware: bytes = b"ECU-7"
    serial: bytes = b"SN0001"
    size: int = 0x10000
    longest_block: int = 258
    refuses_repeats: bool = False
    slow_erase_s: float = 0.0
    endless: bool = False
    never_boots: bool = False
    boot_s: float = 0.0
    lingers_s: float = 0.0
    starts_anew_s: float = 0.0
    resets_after_s: float = 0.0
    refuses_download: int = 0
    locked_for_s: float = 10.0
    s3_s: float = 5.0
    p2_star_s: float = 5.0
    pending_every_s: float = 0.3
    programming_level: int = 1
    needs_fingerprint: int = 0
    background_s: float = 0.0
    application_only: frozenset[int] = frozenset()
    sector_bytes: int = 1
    bad_blocks: int = 0
    secrets: dict[int, bytes] = field(default_factory=lambda: {1: SECRET, 3: SECOND_SECRET})
    effects: Effects = field(default_factory=Steady)
    flash: bytearray = field(default_factory=bytearray)
    properties: dict[int, bytes] = field(default_factory=lambda: {0x0101: bytes(2), 0x0102: b"\x01"})
    counts: Counts = field(default_factory=Counts)
    heard: list[bytes] = field(default_factory=list)
    heard_by_all: list[bytes] = field(default_factory=list)
    exits: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.flash:
            self.flash = bytearray([ERASED]) * self.size
        self._reset()

    # -- what tests look at

    @property
    def version(self) -> bytes | None:
        """Of the application that is whole."""
        head = bytes(self.flash[: _HEAD.size])
        magic, version, count, checksum = _HEAD.unpack(head)
        if magic != b"UDSA" or not 0 < count < 16:
            return None
        at = _HEAD.size + count * _EXTENT.size
        extents = list(_EXTENT.iter_unpack(bytes(self.flash[_HEAD.size : at])))
        body = b"".join(self.held(address, length) for address, length in extents)[at:]
        if any(address < BASE or address + length > BASE + self.size for address, length in extents):
            return None
        return version.rstrip(b"\0") if zlib.crc32(body) == checksum else None

    def held(self, address: int, length: int) -> bytes:
        return bytes(self.flash[address - BASE : address - BASE + length])

    def install(self, segments: list[tuple[int, bytes]]) -> None:
        """As it leaves the factory."""
        for address, data in segments:
            self.flash[address - BASE : address - BASE + len(data)] = data
        self._reset()

    # -- life

    def _reset(self) -> None:
        self.session = DEFAULT
        self.runs = None if self.never_boots else self.version
        self.unlocked = 0  # the level
        self.seed: tuple[int, bytes] | None = None
        self.fingerprinted = False
        self.started: dict[int, tuple[float, Callable[[], bytes]]] = {}
        self.transfer: tuple[int, int] | None = None  # next address, bytes that are left
        self.transferred: list[tuple[int, int]] = []
        self.expected = 1
        self.last_block = -1
        self.dtc_on = True
        self.talks = True
        self.asked_at = time.monotonic()
        self.deaf_until = self.application_at = 0.0
        self.locked_until = 0.0
        self.tries = 0

    def tick(self) -> None:
        """S3server: without a tester it leaves the session (ISO 14229-2, 7.2), and with it all that depends on it."""
        if self.session != DEFAULT and time.monotonic() - self.asked_at > self.s3_s:
            self._leave()

    def _leave(self) -> None:
        self.session, self.unlocked, self.transfer, self.seed = DEFAULT, 0, None, None
        self.dtc_on = self.talks = True

    def answer(self, request: bytes, to_all: bool = False) -> Iterator[bytes | float]:
        """Answers, and seconds that pass before the next one. ``to_all``: it came by functional addressing."""
        if time.monotonic() < self.deaf_until or not request:
            return
        self.tick()
        (self.heard_by_all if to_all else self.heard).append(request)
        self.counts.to_all += to_all
        service = request[0]
        try:
            yield from self._answer(service, request[1:])
        except Negative as no:
            if not (to_all and no.code in SILENT_TO_ALL):
                yield bytes((0x7F, service, no.code))
        self.asked_at = time.monotonic()

    def _answer(self, service: int, data: bytes) -> Iterator[bytes | float]:
        handlers: dict[int, Callable[[bytes], Iterator[bytes | float]]] = {
            0x10: self._session_control,
            0x11: self._reset_service,
            0x22: self._read,
            0x27: self._security,
            0x28: self._communication,
            0x2E: self._write,
            0x31: self._routine,
            0x34: self._download,
            0x36: self._transfer_data,
            0x37: self._transfer_exit,
            0x3E: self._tester,
            0x85: self._dtc,
        }
        if service not in handlers or (self.runs is None and service in self.application_only):
            raise Negative(0x11)
        if service in (0x34, 0x36, 0x37) and self.session != PROGRAMMING:
            raise Negative(0x7F)
        if service in (0x27, 0x28, 0x85) and self.session == DEFAULT:
            raise Negative(0x7F)
        if not data and service != 0x37:
            raise Negative(0x13)
        yield from handlers[service](data)

    def _session_control(self, data: bytes) -> Iterator[bytes | float]:
        kind = data[0] & 0x7F
        if kind not in (DEFAULT, PROGRAMMING, EXTENDED):
            raise Negative(0x12)
        if kind == PROGRAMMING and self.session == DEFAULT and self.runs is not None:
            # an application is told first, so that it may stop what it does
            raise Negative(0x22)
        # what was turned off stays so between the other sessions; every change locks (10.2.1, 10.4.1)
        self.unlocked, self.transfer, self.seed = 0, None, None
        if kind == DEFAULT:
            self._leave()
        self.session = kind
        if kind == PROGRAMMING and self.starts_anew_s:
            self.deaf_until = time.monotonic() + self.starts_anew_s
        yield from _unless_suppressed(
            data[0], bytes((0x50, kind)) + struct.pack(">HH", 50, int(self.p2_star_s * 100))
        )

    def _reset_service(self, data: bytes) -> Iterator[bytes | float]:
        if data[0] & 0x7F not in (1, 3):
            raise Negative(0x12)
        yield from _unless_suppressed(data[0], bytes((0x51, data[0] & 0x7F)))
        yield self.resets_after_s
        self.effects.effect("device.reset", self.boot)

    def boot(self) -> None:
        """A reset, by request or by its power."""
        self.counts.resets += 1
        self._reset()
        self.deaf_until = time.monotonic() + self.boot_s
        self.application_at = self.deaf_until + self.lingers_s

    def _read(self, data: bytes) -> Iterator[bytes | float]:
        if len(data) != 2:
            raise Negative(0x13)
        (did,) = struct.unpack(">H", data)
        known = {
            0xF191: self.hardware,
            0xF18C: self.serial,
            0xF186: bytes((self.session,)),
            **self.properties,
        }
        if self.runs is not None and time.monotonic() >= self.application_at:
            known[0xF189] = self.runs
        if did not in known:
            raise Negative(0x31)
        yield b"\x62" + data + known[did]

    def _write(self, data: bytes) -> Iterator[bytes | float]:
        (did,) = struct.unpack(">H", data[:2])
        if did == FINGERPRINT and self.needs_fingerprint:
            yield from self._write_fingerprint(data)
            return
        if did not in self.properties:
            raise Negative(0x31)
        if len(data) - 2 != len(self.properties[did]):
            raise Negative(0x13)
        if did == 0x0102 and self.session != EXTENDED:
            raise Negative(0x7F)
        self.properties[did] = data[2:]
        yield b"\x6e" + data[:2]

    def _write_fingerprint(self, data: bytes) -> Iterator[bytes | float]:
        if self.session != PROGRAMMING:
            raise Negative(0x7F)
        if self.unlocked != self.programming_level:
            raise Negative(0x33)
        if len(data) - 2 != self.needs_fingerprint:
            raise Negative(0x13)
        self.properties[FINGERPRINT] = data[2:]
        self.fingerprinted = True
        yield b"\x6e" + data[:2]

    def _security(self, data: bytes) -> Iterator[bytes | float]:
        level = data[0] & 0x7F
        if level - (1 - level % 2) not in self.secrets:
            raise Negative(0x12)
        if level % 2:
            if time.monotonic() < self.locked_until:
                raise Negative(0x37)
            self.counts.seeds += 1
            seed = bytes(4) if self.unlocked == level else os.urandom(3) + b"\x01"
            self.seed = level, seed
            yield bytes((0x67, level)) + seed
            return
        if self.seed is None or self.seed[0] != level - 1:
            raise Negative(0x24)
        (_, seed), self.seed = self.seed, None
        if data[1:] != bytes(a ^ b for a, b in zip(seed, self.secrets[level - 1], strict=True)):
            self.counts.wrong_keys += 1
            self.tries += 1
            if self.tries >= 3:
                self.tries, self.locked_until = 0, time.monotonic() + self.locked_for_s
                raise Negative(0x36)
            raise Negative(0x35)
        # one level is unlocked at a time (10.4.1)
        self.unlocked, self.tries = level - 1, 0
        yield bytes((0x67, level))

    def _communication(self, data: bytes) -> Iterator[bytes | float]:
        self.talks = data[0] & 0x7F == 0
        yield from _unless_suppressed(data[0], bytes((0x68, data[0] & 0x7F)))

    def _dtc(self, data: bytes) -> Iterator[bytes | float]:
        self.dtc_on = data[0] & 0x7F == 1
        yield from _unless_suppressed(data[0], bytes((0xC5, data[0] & 0x7F)))

    def _tester(self, data: bytes) -> Iterator[bytes | float]:
        self.counts.testers += 1
        yield from _unless_suppressed(data[0], b"\x7e\x00")

    def _routine(self, data: bytes) -> Iterator[bytes | float]:
        if len(data) < 3:
            raise Negative(0x13)
        kind, routine = data[0] & 0x7F, int.from_bytes(data[1:3], "big")
        if kind not in (1, 3) or (kind == 3 and not self.background_s):
            raise Negative(0x12)
        answer = b"\x71" + bytes((kind,)) + data[1:3]
        if routine == 0x0203:
            yield answer + b"\x00"
            return
        if self.session != PROGRAMMING:
            raise Negative(0x7F)
        if self.unlocked != self.programming_level:
            raise Negative(0x33)
        if routine not in (0xFF00, 0xFF01):
            raise Negative(0x31)
        yield answer + (self._results(routine) if kind == 3 else (yield from self._start(routine, data[3:])))

    def _start(self, routine: int, data: bytes) -> Generator[bytes | float, None, bytes]:
        """The status. What goes on in the background has done its work when it is asked for it."""
        if routine == 0xFF01:
            work = functools.partial(self._check, data)
        else:
            if self.needs_fingerprint and not self.fingerprinted:
                raise Negative(0x22)
            address, length = self._extent(data)
            yield from self._takes(self.slow_erase_s, 0x31)
            work = functools.partial(self._erase, address, length)
        if not self.background_s:
            return work()
        self.started[routine] = time.monotonic() + self.background_s, work
        return b"\x01"

    def _results(self, routine: int) -> bytes:
        """requestRoutineResults: 01 while it is at work, then how it went; it was started before (13.2.4)."""
        self.counts.polls += 1
        if routine not in self.started:
            raise Negative(0x24)
        due, work = self.started[routine]
        if time.monotonic() < due:
            return b"\x01"
        del self.started[routine]
        return work() or b"\x00"

    def _erase(self, address: int, length: int) -> bytes:
        first = (address - BASE) // self.sector_bytes * self.sector_bytes
        end = -(-(address - BASE + length) // self.sector_bytes) * self.sector_bytes

        def erase(part: int = end - first) -> None:
            self.flash[first : first + part] = bytes([ERASED]) * part

        self.effects.effect("device.erase", erase, lambda: erase(length // 2))
        self.counts.erased += length
        return b""

    def _takes(self, seconds: float, service: int) -> Iterator[bytes | float]:
        """requestCorrectlyReceived-ResponsePending until it is done."""
        end = time.monotonic() + seconds
        while self.endless or time.monotonic() < end:
            self.counts.pending += 1
            yield bytes((0x7F, service, PENDING))
            yield (
                self.pending_every_s
                if self.endless
                else min(self.pending_every_s, max(0.0, end - time.monotonic()))
            )

    def _check(self, data: bytes) -> bytes:
        """The checksum of what was downloaded, as the flash holds it now; without one, the application's own."""
        held = b"".join(self.held(address, length) for address, length in self.transferred)
        good = data == zlib.crc32(held).to_bytes(4, "big") if data else self.version is not None
        return b"\x00" if good else b"\x01"

    def _extent(self, data: bytes) -> tuple[int, int]:
        """addressAndLengthFormatIdentifier, address and length (annex H)."""
        if not data:
            raise Negative(0x13)
        length_bytes, address_bytes = data[0] >> 4, data[0] & 0xF
        if len(data) != 1 + length_bytes + address_bytes:
            raise Negative(0x13)
        address = int.from_bytes(data[1 : 1 + address_bytes], "big")
        length = int.from_bytes(data[1 + address_bytes :], "big")
        if address < BASE or not length or address + length > BASE + self.size:
            raise Negative(0x31)
        return address, length

    def _download(self, data: bytes) -> Iterator[bytes | float]:
        if self.unlocked != self.programming_level:
            raise Negative(0x33)
        if self.started:
            raise Negative(0x22)
        if self.refuses_download:
            raise Negative(self.refuses_download)
        address, length = self._extent(data[1:])
        if data[0]:
            raise Negative(0x31)
        self.counts.downloads += 1
        self.transfer, self.expected, self.last_block = (address, length), 1, -1
        self.transferred = [extent for extent in self.transferred if extent[0] != address] + [
            (address, length)
        ]
        yield b"\x74\x20" + struct.pack(">H", self.longest_block)

    def _transfer_data(self, data: bytes) -> Iterator[bytes | float]:
        if self.transfer is None:
            raise Negative(0x24)
        counter, block = data[0], data[1:]
        if counter == self.last_block and not self.refuses_repeats:
            # a repeated block is acknowledged and not written again (14.5.2.3)
            yield bytes((0x76, counter))
            return
        if counter == self.last_block:
            self.transfer = None
            raise Negative(0x24)
        if counter != self.expected:
            self.transfer = None
            raise Negative(0x73)
        address, left = self.transfer
        if len(block) > left or len(data) + 1 > self.longest_block or not block:
            self.transfer = None
            raise Negative(0x71 if len(block) > left else 0x13)
        if self.bad_blocks:
            self.bad_blocks -= 1
            self.transfer = None
            raise Negative(0x72)
        self._program(address, block)
        self.transfer = address + len(block), left - len(block)
        self.last_block, self.expected = counter, (counter + 1) & 0xFF
        yield bytes((0x76, counter))

    def _program(self, address: int, block: bytes) -> None:
        """Bits of flash go from 1 to 0 only; what was not erased is not what was sent."""
        at = address - BASE

        def program(part: int = len(block)) -> None:
            for offset in range(part):
                self.flash[at + offset] &= block[offset]

        self.effects.effect("device.block", program, lambda: program(len(block) // 2))
        self.counts.blocks += 1
        self.counts.written += len(block)

    def _transfer_exit(self, data: bytes) -> Iterator[bytes | float]:
        if self.transfer is None or self.transfer[1]:
            raise Negative(0x24)
        self.transfer = None
        self.exits.append(data)
        yield b"\x77"


def _unless_suppressed(subfunction: int, answer: bytes) -> Iterator[bytes]:
    if not subfunction & 0x80:
        yield answer


@dataclass(frozen=True)
class Wiring:
    """Identifiers, as the *server* sees them, and how it wants to be sent to."""

    receives: int = 0x7E0
    sends: int = 0x7E8
    extended: bool = False
    own: int | None = None
    tester: int | None = None
    fd: bool = False
    frame_bytes: int = 8
    block_size: int = 0
    st_min: int = 0
    padding: int | None = 0x55
    functional: int | None = None
    all: int | None = None  # with extended addressing, the address of everyone


class IsoTp:
    """ISO 15765-2 for one server: frames in, frames out; time is asked for, nothing waits but :meth:`send`."""

    N_CR_S = 20.0
    """No second, as it is to be: the machine of a test may stand still for so long in the middle of a message."""
    N_BS_S = 1.0

    def __init__(self, wiring: Wiring, put: Callable[[bytes], None]) -> None:
        self.wiring = wiring
        self._put = put
        self._data = bytearray()
        self._length = 0
        self._sequence = 0
        self._until_control = 0
        self._since = 0.0
        self.controls: deque[tuple[int, int, int]] = deque()
        self.aborted = 0

    @property
    def _room(self) -> int:
        return self.wiring.frame_bytes - (0 if self.wiring.own is None else 1)

    def feed(self, frame: bytes) -> bytes | None:
        """A message, where ``frame`` completes one."""
        if self.wiring.own is not None:
            if frame[:1] != bytes((self.wiring.own,)):
                return None
            frame = frame[1:]
        if self._length and time.monotonic() - self._since > self.N_CR_S:
            self._abort()
        kind = frame[0] >> 4 if frame else 0xF
        if kind == 0:
            return self._single(frame)
        if kind == 1:
            return self._first(frame)
        if kind == 2:
            return self._consecutive(frame)
        if kind == 3 and len(frame) >= 3:
            self.controls.append((frame[0] & 0xF, frame[1], frame[2]))
        return None

    def single(self, frame: bytes) -> bytes | None:
        """The message of a frame to everyone. It has one frame only, and disturbs no message that is under way."""
        length = frame[0] if frame else 0
        return bytes(frame[1 : 1 + length]) if 0 < length < min(8, len(frame)) else None

    def _single(self, frame: bytes) -> bytes | None:
        length, at = (frame[0] & 0xF, 1) if frame[0] & 0xF else (frame[1] if len(frame) > 1 else 0, 2)
        if self._length:
            self._abort()
        return bytes(frame[at : at + length]) if 0 < length <= len(frame) - at else None

    def _first(self, frame: bytes) -> bytes | None:
        if self._length:
            self._abort()
        self._length = (frame[0] & 0xF) << 8 | frame[1]
        self._data = bytearray(frame[2:])
        self._sequence = 1
        self._control()
        return None

    def _consecutive(self, frame: bytes) -> bytes | None:
        if not self._length:
            return None
        if frame[0] & 0xF != self._sequence:
            self._abort()
            return None
        self._sequence = (self._sequence + 1) & 0xF
        self._since = time.monotonic()
        self._data += frame[1:]
        if len(self._data) >= self._length:
            message = bytes(self._data[: self._length])
            self._length = 0
            return message
        self._until_control -= 1
        if self.wiring.block_size and self._until_control == 0:
            self._control()
        return None

    def _control(self) -> None:
        self._until_control = self.wiring.block_size
        self._since = time.monotonic()
        self._frame(bytes((0x30, self.wiring.block_size, self.wiring.st_min)))

    def _abort(self) -> None:
        self.aborted += 1
        self._length = 0

    def send(self, message: bytes, control: Callable[[float], tuple[int, int, int] | None]) -> None:
        """Frames of ``message``; ``control(seconds)`` is the next flow control, None where none came."""
        room = self._room
        if len(message) <= min(7, room - 1):
            self._frame(bytes((len(message),)) + message)
            return
        if len(message) <= room - 2 and self.wiring.fd:
            self._frame(bytes((0, len(message))) + message)
            return
        self.controls.clear()
        self._frame(struct.pack(">H", 0x1000 | len(message)) + message[: room - 2])
        at, sequence = room - 2, 1
        while at < len(message):
            found = control(self.N_BS_S)
            if found is None or found[0] == 2:
                return
            if found[0] == 1:
                continue
            for _ in range(found[1] or 0xFFFF):
                self._frame(bytes((0x20 | sequence,)) + message[at : at + room - 1])
                at, sequence = at + room - 1, (sequence + 1) & 0xF
                if at >= len(message):
                    return
                time.sleep(found[2] / 1000 if found[2] < 0x80 else 0.001)

    def _frame(self, data: bytes) -> None:
        if self.wiring.tester is not None:
            data = bytes((self.wiring.tester,)) + data
        if self.wiring.fd and len(data) > 8:
            size = next(size for size in (12, 16, 20, 24, 32, 48, 64) if size >= len(data))
            data = data.ljust(size, bytes((self.wiring.padding or 0,)))
        elif self.wiring.padding is not None:
            data = data.ljust(8, bytes((self.wiring.padding,)))
        self._put(data)


Wire = Callable[[str, bytes], list[bytes]]
"""What becomes of a frame on its way ``in`` to the server or ``out`` of it: none, itself, others."""


class OnBus:
    """A controller in a thread on a python-can bus, from ``with`` to its end. ``dead``: the power was cut."""

    def __init__(
        self, controller: Controller, bus: Any, wiring: Wiring | None = None, wire: Wire | None = None
    ) -> None:
        self.controller = controller
        self.wiring = wiring or Wiring()
        self.dead = False
        self.frames = 0
        self.fault: BaseException | None = None
        self.wire: Wire = wire or (lambda way, frame: [frame])
        self._bus = bus
        self._isotp = IsoTp(self.wiring, self._put)
        self._to_all: deque[bytes] = deque()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    @property
    def aborted(self) -> int:
        """Messages that the server gave up in their middle."""
        return self._isotp.aborted

    def __enter__(self) -> OnBus:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._bus.shutdown()
        if self.fault is not None:
            raise self.fault

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                message = self._next(0.05)
                while self._to_all:
                    self._serve(self._to_all.popleft(), to_all=True)
                if message is not None:
                    self._serve(message)
        except BaseException as fault:  # noqa: BLE001 - told to whoever made it, or the power, of which the flash is left
            self.dead = True
            if not isinstance(fault, Exception):
                self._say_dead()
            elif not self._stop.is_set():
                self.fault = fault

    def _say_dead(self) -> None:
        """The node's power went too: nothing is gained by waiting for the answer until its time is over."""
        import can

        self._bus.send(can.Message(arbitration_id=0x40, data=bytes(8), is_error_frame=True))

    def _serve(self, request: bytes, to_all: bool = False) -> None:
        for answer in self.controller.answer(request, to_all):
            if isinstance(answer, float):
                self._stop.wait(answer)
            else:
                self._isotp.send(answer, self._flow_control)
            if self._stop.is_set():
                return

    def _next(self, timeout_s: float) -> bytes | None:
        message = self._bus.recv(timeout_s)
        wiring = self.wiring
        if message is None or message.is_error_frame:
            return None
        if (message.arbitration_id, message.is_extended_id) == (wiring.functional, wiring.extended):
            data, address = bytes(message.data), b"" if wiring.all is None else bytes((wiring.all,))
            if data.startswith(address):
                whole = self._isotp.single(data[len(address) :])
                self._to_all.extend([whole] if whole else [])
                return None
        if (message.arbitration_id, message.is_extended_id) != (wiring.receives, wiring.extended):
            return None
        whole = None
        for frame in self.wire("in", bytes(message.data)):
            self.frames += 1
            whole = self._isotp.feed(frame) or whole
        return whole

    def _flow_control(self, timeout_s: float) -> tuple[int, int, int] | None:
        end = time.monotonic() + timeout_s
        while not self._isotp.controls and time.monotonic() < end and not self._stop.is_set():
            self._next(0.02)
        return self._isotp.controls.popleft() if self._isotp.controls else None

    def _put(self, data: bytes) -> None:
        if isinstance(self._bus, KernelBus):
            self._bus.send(self.wiring, data)
            return
        import can

        for frame in self.wire("out", data):
            self._bus.send(
                can.Message(
                    arbitration_id=self.wiring.sends,
                    data=frame,
                    is_extended_id=self.wiring.extended,
                    is_fd=self.wiring.fd,
                    bitrate_switch=self.wiring.fd,
                )
            )


class KernelBus:
    """Raw frames of an interface of the kernel (linux/can.h), as much like a bus of python-can as is needed."""

    def __init__(self, interface: str) -> None:
        self._socket = socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
        self._socket.setsockopt(socket.SOL_CAN_RAW, socket.CAN_RAW_FD_FRAMES, 1)
        self._socket.bind((interface,))

    def recv(self, timeout_s: float) -> Any:
        self._socket.settimeout(timeout_s)
        try:
            raw = self._socket.recv(72)
        except TimeoutError:
            return None
        except OSError:
            # the interface is down for a while
            time.sleep(timeout_s)
            return None
        word, length = struct.unpack_from("=IB", raw)
        extended = bool(word & 0x80000000)
        return types.SimpleNamespace(
            arbitration_id=word & (0x1FFFFFFF if extended else 0x7FF),
            is_extended_id=extended,
            is_error_frame=bool(word & 0x20000000),
            data=raw[8 : 8 + length],
        )

    def send(self, wiring: Wiring, data: bytes) -> None:
        word = wiring.sends | (0x80000000 if wiring.extended else 0)
        shape = "=IBB2x64s" if wiring.fd else "=IB3x8s"
        fields = (word, len(data), 0x01, data) if wiring.fd else (word, len(data), data)
        with contextlib.suppress(OSError):
            self._socket.send(struct.pack(shape, *fields))

    def shutdown(self) -> None:
        self._socket.close()


def main() -> None:
    """``uds_server.py INTERFACE FLASH_FILE [WIRING]``: a controller whose flash is a file; counts go to FLASH_FILE.json."""
    interface, file = sys.argv[1], Path(sys.argv[2])
    wiring = Wiring(**json.loads(sys.argv[3])) if len(sys.argv) > 3 else Wiring()
    controller = Controller(flash=bytearray(file.read_bytes()), boot_s=0.2, longest_block=1026)
    with OnBus(controller, KernelBus(interface), wiring) as server:
        seen = -1
        while not server.dead:
            time.sleep(0.05)
            now = len(controller.heard)
            if now != seen:
                seen = now
                for name, data in (
                    (f"{file}.json", json.dumps(dataclasses.asdict(controller.counts)).encode()),
                    (str(file), bytes(controller.flash)),
                ):
                    Path(f"{name}.new").write_bytes(data)
                    Path(f"{name}.new").replace(name)


if __name__ == "__main__":
    main()
