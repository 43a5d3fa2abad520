"""A device with MCUboot and an SMP server that does not exist: written from Zephyr's SMP documents and MCUboot's design, and
not from edged's own client, of which nothing is imported.

It is strict where real ones are: it answers one request after the other, drops what is damaged or too long, keeps of an upload
only what is in its flash when it resets, boots only a whole image with a key that it knows, and goes back from what was
not confirmed. It lives in a thread of its own behind a pseudo terminal.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import os
import select
import struct
import termios
import threading
import time
import tty
import zlib
from binascii import Error as Base64Error
from binascii import crc_hqx
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import cbor2

from edged.testing.fake import Effects, Steady
from edged.testing.faults import PowerCut

MAGIC: Final = 0x96F3B83D
HANGS: Final = b"HANGS"
SICK: Final = b"SICK"
_HEAD: Final = 0x20
_KNOWN_GROUPS: Final = (0, 1, 2, 3)
_WORD: Final = 8
_FLUSHED: Final = 1
"""TIOCPKT_FLUSHREAD, see tty_ioctl(4)."""


def make_image(
    version: tuple[int, int, int], body: bytes, *, key: bytes | None = None, damaged: bool = False
) -> bytes:
    """An image in MCUboot's format. ``key``: the public key whose hash it carries, with a signature that nobody can check."""
    header = struct.pack("<IIHHIIBBHII", MAGIC, 0, _HEAD, 0, len(body), 0, *version, 0, 0)
    digest = hashlib.sha256(header + body).digest()
    tlvs = struct.pack("<HH", 0x10, 32) + digest
    if key is not None:
        tlvs += struct.pack("<HH", 0x01, 32) + hashlib.sha256(key).digest()
        tlvs += struct.pack("<HH", 0x24, 64) + bytes(64)
    if damaged:
        body = bytes([body[0] ^ 1]) + body[1:]
    return header + body + struct.pack("<HH", 0x6907, len(tlvs) + 4) + tlvs


@dataclass(frozen=True, slots=True)
class Read:
    """What the bytes of a slot say."""

    version: str
    digest: bytes
    key_hash: bytes | None
    body: bytes
    whole: bool


def read_image(flash: bytes) -> Read | None:
    """None where there is no image with a hash; ``whole``: header and body have that hash."""
    magic, _, head, _, size, _, major, minor, revision, _, _ = struct.unpack_from("<IIHHIIBBHII", flash)
    if magic != MAGIC or head + size + 4 > len(flash):
        return None
    at = head + size
    tlv_magic, total = struct.unpack_from("<HH", flash, at)
    if tlv_magic != 0x6907:
        return None
    found, end, at = {}, at + total, at + 4
    while at + 4 <= min(end, len(flash)):
        kind, length = struct.unpack_from("<HH", flash, at)
        found[kind] = flash[at + 4 : at + 4 + length]
        at += 4 + length
    digest = found.get(0x10)
    if digest is None or len(digest) != 32:
        return None
    whole = hashlib.sha256(flash[: head + size]).digest() == digest
    return Read(f"{major}.{minor}.{revision}", digest, found.get(0x01), flash[head : head + size], whole)


@dataclass
class Counts:
    """What the device was made to do. ``stored``: image bytes that went into its flash."""

    boots: int = 0
    trial_boots: int = 0
    stored: int = 0
    erases: int = 0
    messages: int = 0
    dropped: int = 0
    settings_written: int = 0


@dataclass
class Ram:
    """What a reset forgets."""

    offset: int = 0
    size: int = 0
    sha: bytes = b""
    packet: bytearray | None = None
    line: bytearray = field(default_factory=bytearray)
    settings: dict[str, bytes] = field(default_factory=dict)


Filter = Callable[[bytes], bytes]


def untouched(data: bytes) -> bytes:
    return data


class SmpServer:
    """The device. ``port`` leads to its serial line and stays through resets and :meth:`plug`.

    ``keys``: public keys that its boot loader knows; empty: it wants no signature. ``versions``: headers that it answers.
    ``line_bytes_per_s``: what the line carries in each direction, 0: no limit. ``erase_s``: erasing a slot. ``hello``: lines
    that the application prints when it starts. ``mode``: of MCUboot, None where the command is not offered. ``checks``: it
    tells after an upload whether the SHA-256 matched. ``resets_on_open``: its reset is wired to the line's DTR, which a
    pseudo terminal does not have: whoever opens it resets the device. ``erases_pending``: also what is to be booted.
    ``confirms_itself``: whatever application runs. ``refuses``: headers by version that it answers with an error, and which.
    """

    def __init__(
        self,
        folder: Path,
        application: bytes,
        *,
        framing: str = "console",
        buffer_bytes: int = 384,
        buffer_count: int = 4,
        versions: tuple[int, ...] = (1, 2),
        slot_bytes: int = 0x10000,
        keys: tuple[bytes, ...] = (),
        boot_s: float = 0.05,
        reset_s: float = 0.02,
        erase_s: float = 0.0,
        line_bytes_per_s: float = 0.0,
        hello: tuple[str, ...] = (),
        mode: int | None = 1,
        checks: bool = False,
        tells_parameters: bool = True,
        resets_on_open: bool = False,
        erases_pending: bool = False,
        confirms_itself: bool = False,
        refuses: dict[int, int] | None = None,
        settings: dict[str, bytes] | None = None,
        statistics: dict[str, dict[str, int]] | None = None,
    ) -> None:
        self.port = folder / "tty-smp"
        self.slots = [bytearray(b"\xff" * slot_bytes) for _ in range(2)]
        self.slots[0][: len(application)] = application
        self.pending = False
        self.permanent = False
        self.confirmed = True
        self.saved = dict(settings or {})
        self.statistics = statistics or {}
        self.keys = keys
        self.mode = mode
        self.checks = checks
        self.erase_s = erase_s
        self.versions = versions
        self.counts = Counts()
        self.received = bytearray()
        self.log: list[tuple[int, int, int, dict[str, Any]]] = []
        self.effects: Effects = Steady()
        self.to_device: Filter = untouched
        self.from_device: Filter = untouched
        self.on_request: Callable[[int, int, dict[str, Any]], bool] | None = None
        self._framing = framing
        self._buffer_bytes, self._buffer_count = buffer_bytes, buffer_count
        self._boot_s, self._reset_s = boot_s, reset_s
        self._byte_s = 1 / line_bytes_per_s if line_bytes_per_s else 0.0
        self._hello = hello
        self._tells_parameters = tells_parameters
        self._resets_on_open = resets_on_open
        self._erases_pending = erases_pending
        self.confirms_itself = confirms_itself
        self._refuses = refuses or {}
        self._ram = Ram()
        self._up_at = 0.0
        self._reset_at: float | None = None
        self._powered = True
        self._hangs = False
        self._master = self._slave = -1
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="smp-server", daemon=True)

    def __enter__(self) -> Self:
        self.plug()
        self._boot()
        # it has been on for a while
        self._up_at = time.monotonic()
        self._turn()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(10)
        self.unplug()

    # -- what a test does to it

    @property
    def runs(self) -> str:
        image = read_image(bytes(self.slots[0]))
        return image.version if image else ""

    def unplug(self) -> None:
        with self._lock:
            if self._master >= 0:
                os.close(self._slave)
                os.close(self._master)
            self._master = self._slave = -1
            self.port.unlink(missing_ok=True)

    def plug(self) -> None:
        with self._lock:
            self._master, self._slave = os.openpty()
            tty.setraw(self._slave)
            if self._resets_on_open:
                # packet mode: the kernel tells of the flush with which a port is opened
                fcntl.ioctl(self._master, termios.TIOCPKT, struct.pack("i", 1))
            self.port.symlink_to(os.ttyname(self._slave))

    def power(self, effects: Effects | None = None) -> None:
        """Off and on again: what is in RAM is lost, and what was half done stays so."""
        with self._lock:
            self.effects = effects or Steady()
            self._powered = True
            try:
                self._boot()
            except PowerCut:
                self._powered = False

    def say(self, text: str) -> None:
        self._write(text.encode() + b"\r\n")

    # -- boot loader

    def _boot(self) -> None:
        self._ram = Ram(settings=dict(self.saved))
        self._reset_at, self._hangs = None, False
        self.effects.effect("device.boot", self._swap)
        self._up_at = time.monotonic() + self._boot_s
        running = read_image(bytes(self.slots[0]))
        self._hangs = running is None or running.body.startswith(HANGS)

    def _swap(self) -> None:
        self.counts.boots += 1
        if self.pending:
            self.pending = False
            if not self._is_bootable(self.slots[1]):
                self.slots[1][:] = b"\xff" * len(self.slots[1])
                return
            self.counts.trial_boots += 1
            self.slots.reverse()
            self.confirmed, self.permanent = self.permanent or self.confirms_itself, False
        elif not self.confirmed:
            self.slots.reverse()
            self.confirmed = True

    def _is_bootable(self, slot: bytearray) -> bool:
        image = read_image(bytes(slot))
        known = {hashlib.sha256(key).digest() for key in self.keys}
        return image is not None and image.whole and (not known or image.key_hash in known)

    # -- wire

    def _serve(self) -> None:
        while not self._ending.is_set():
            try:
                with self._lock:
                    self._turn()
            except PowerCut:
                self._powered = False
            # whoever waits for the lock gets it
            time.sleep(0 if self._master >= 0 else 0.01)

    def _turn(self) -> None:
        if self._powered and self._reset_at is not None and time.monotonic() >= self._reset_at:
            self._boot()
        if self._up_at and self._powered and time.monotonic() >= self._up_at:
            self._up_at = 0.0
            if not self._hangs:
                for line in self._hello:
                    self.say(line)
        if self._master < 0:
            return
        ready, _, _ = select.select([self._master], [], [], 0.005)
        if not ready:
            return
        try:
            data = self.to_device(self._read())
        except OSError:
            return
        self._spend(len(data))
        # off, starting, or out of its mind: nobody listens
        if self._powered and not self._hangs and not self._up_at:
            for message in self._messages(data):
                self._answer(message)

    def _read(self) -> bytes:
        data = os.read(self._master, 4096)
        if not self._resets_on_open:
            return data
        if data[0] & _FLUSHED:
            self._boot()
        return data[1:] if data[0] == 0 else b""

    def _spend(self, count: int) -> None:
        if self._byte_s:
            time.sleep(count * self._byte_s)

    def _write(self, data: bytes) -> None:
        self._spend(len(data))
        data = self.from_device(data)
        while data and self._master >= 0:
            data = data[os.write(self._master, data) :]

    # -- framing

    def _messages(self, data: bytes) -> list[bytes]:
        if self._framing == "console":
            return self._from_console(data)
        self._ram.line += data
        if self._framing == "cobs":
            *frames, rest = bytes(self._ram.line).split(b"\0")
            self._ram.line = bytearray(rest)
            return [message for frame in frames if (message := _uncobs(frame))]
        return self._from_raw()

    def _from_raw(self) -> list[bytes]:
        found, line = [], self._ram.line
        while len(line) >= 8:
            length = 8 + struct.unpack_from(">H", line, 2)[0]
            if line[0] & 7 not in (0, 2) or line[1] or line[4] or line[5] > 3 or length > self._buffer_bytes:
                # a UART between messages starts again after a pause; here at once
                del line[:1]
                continue
            if len(line) < length:
                break
            found.append(bytes(line[:length]))
            del line[:length]
        return found

    def _from_console(self, data: bytes) -> list[bytes]:
        found = []
        self._ram.line += data
        while (end := self._ram.line.find(b"\n")) >= 0:
            line = bytes(self._ram.line[: end + 1])
            del self._ram.line[: end + 1]
            if len(line) <= 128 and (message := self._console_line(line)):
                found.append(message)
        if len(self._ram.line) > 128:
            self._ram.line.clear()
        return found

    def _console_line(self, line: bytes) -> bytes | None:
        mark, text = line[:2], line[2:-1]
        if mark == b"\x06\x09":
            self._ram.packet = bytearray()
        elif mark != b"\x04\x14" or self._ram.packet is None:
            return None
        packet = self._ram.packet
        assert packet is not None
        try:
            packet += base64.b64decode(text, validate=True)
        except Base64Error:
            self._ram.packet = None
            return None
        if len(packet) < 2 or len(packet) - 2 < (length := packet[0] << 8 | packet[1]):
            return None
        self._ram.packet = None
        if len(packet) - 2 != length or len(packet) > self._buffer_bytes or crc_hqx(bytes(packet[2:]), 0):
            self.counts.dropped += 1
            return None
        return bytes(packet[2:-2])

    def _frame(self, message: bytes) -> bytes:
        if self._framing == "raw":
            return message
        body = message + struct.pack(">H", crc_hqx(message, 0))
        if self._framing == "cobs":
            return _cobs(body) + b"\0"
        text = base64.b64encode(struct.pack(">H", len(body)) + body)
        lines = [text[at : at + 124] for at in range(0, len(text), 124)]
        return b"".join(
            (b"\x04\x14" if number else b"\x06\x09") + line + b"\n" for number, line in enumerate(lines)
        )

    # -- requests

    def _answer(self, message: bytes) -> None:
        first, _, length, group, sequence, number = struct.unpack_from(">BBHHBB", message)
        if len(message) != 8 + length or first & 7 not in (0, 2):
            return
        version = (first >> 3 & 3) + 1
        if version not in self.versions:
            return
        self.counts.messages += 1
        self.received += message
        try:
            body = cbor2.loads(message[8:]) if length else {}
        except Exception:  # noqa: BLE001 - whatever a library makes of garbage
            return
        if not isinstance(body, dict):
            return
        self.log.append((first & 7, group, number, body))
        if self.on_request is not None and not self.on_request(group, number, body):
            return
        refused = self._refuses.get(version)
        answer = (0, refused) if refused else self._do(first & 7, group, number, body)
        if isinstance(answer, tuple):
            code_group, code = answer
            answer = (
                {"err": {"group": code_group, "rc": code}} if version == 2 and code_group else {"rc": code}
            )
        payload = cbor2.dumps(answer)
        head = struct.pack(">BBHHBB", first + 1, 0, len(payload), group, sequence, number)
        self._write(self._frame(head + payload))

    def _do(self, op: int, group: int, number: int, body: dict[str, Any]) -> dict[str, Any] | tuple[int, int]:
        handler = getattr(self, f"_do_{group}_{number}_{'w' if op else 'r'}", None)
        if handler is None:
            return 0, 8
        result: dict[str, Any] | tuple[int, int] = handler(body)
        return result

    def _do_0_0_w(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"r": body.get("d", "")}

    def _do_0_5_w(self, body: dict[str, Any]) -> dict[str, Any]:
        self._reset_at = time.monotonic() + self._reset_s
        return {}

    def _do_0_6_r(self, body: dict[str, Any]) -> dict[str, Any] | tuple[int, int]:
        if not self._tells_parameters:
            return 0, 8
        return {"buf_size": self._buffer_bytes, "buf_count": self._buffer_count}

    def _do_0_7_r(self, body: dict[str, Any]) -> dict[str, Any]:
        words = {"i": "simulated/edged", "s": "Simulated", "v": "1.0"}
        wanted = body.get("format", "s")
        return {"output": " ".join(words[one] for one in ("sv" if wanted == "a" else wanted) if one in words)}

    def _do_0_8_r(self, body: dict[str, Any]) -> dict[str, Any] | tuple[int, int]:
        return (0, 8) if self.mode is None else {"bootloader": "MCUboot", "mode": self.mode}

    def _do_1_0_r(self, body: dict[str, Any]) -> dict[str, Any]:
        images = []
        for number, slot in enumerate(self.slots):
            image = read_image(bytes(slot))
            if image is not None:
                flags = {
                    "bootable": True,
                    "active": number == 0,
                    "confirmed": self.confirmed if number == 0 else not self.confirmed,
                    "pending": number == 1 and self.pending,
                    "permanent": number == 1 and self.permanent,
                }
                images.append(
                    {"image": 0, "slot": number, "version": image.version, "hash": image.digest, **flags}
                )
        return {"images": images, "splitStatus": 0}

    def _do_1_0_w(self, body: dict[str, Any]) -> dict[str, Any] | tuple[int, int]:
        wanted, confirm = body.get("hash"), body.get("confirm", False)
        running, other = (read_image(bytes(slot)) for slot in self.slots)
        if wanted is None and not confirm:
            return 1, 24
        if wanted is None or (running is not None and running.digest == wanted):
            if not confirm:
                return 1, 33
            self.effects.effect("device.confirm", self._confirm)
            return self._do_1_0_r({})
        if other is None or other.digest != wanted:
            return 1, 8
        if self.pending or not self.confirmed:
            return 1, 28
        self.effects.effect("device.pending", lambda: self._set_pending(confirm))
        return self._do_1_0_r({})

    def _confirm(self) -> None:
        self.confirmed = True

    def _set_pending(self, permanent: bool) -> None:
        self.pending, self.permanent = True, permanent

    def _do_1_1_w(self, body: dict[str, Any]) -> dict[str, Any] | tuple[int, int]:
        offset, data, ram = body.get("off"), body.get("data", b""), self._ram
        if not isinstance(offset, int) or not isinstance(data, bytes):
            return 1, 20
        if offset == 0:
            refusal = self._begin(body, data)
            if refusal is not None:
                return refusal
        if offset != ram.offset or not ram.size:
            return {"off": ram.offset}
        if offset + len(data) > ram.size:
            return 1, 31
        self._store(offset, data)
        ram.offset += len(data)
        answer: dict[str, Any] = {"off": ram.offset}
        if ram.offset == ram.size:
            if self.checks and ram.sha:
                answer["match"] = hashlib.sha256(bytes(self.slots[1][: ram.size])).digest() == ram.sha
            self._ram.offset = self._ram.size = 0
            self._ram.sha = b""
        return answer

    def _begin(self, body: dict[str, Any], data: bytes) -> dict[str, Any] | tuple[int, int] | None:
        size, sha, ram = body.get("len"), body.get("sha", b""), self._ram
        if not isinstance(size, int):
            return 1, 21
        if len(data) < 32:
            return 1, 22
        if struct.unpack_from("<I", data)[0] != MAGIC:
            return 1, 23
        if size > len(self.slots[1]):
            return 1, 30
        if ram.size and sha and sha == ram.sha:
            return {"off": ram.offset} if ram.offset else None
        if self.pending or not self.confirmed:
            return 1, 9
        time.sleep(self.erase_s)
        self.effects.effect("device.erase", self._erase)
        ram.offset, ram.size, ram.sha = 0, size, sha
        return None

    def _erase(self) -> None:
        self.counts.erases += 1
        self.pending = self.permanent = False
        self.slots[1][:] = b"\xff" * len(self.slots[1])

    def _store(self, offset: int, data: bytes) -> None:
        def whole() -> None:
            self.slots[1][offset : offset + len(data)] = data
            self.counts.stored += len(data)

        def torn() -> None:
            half = len(data) // 2 // _WORD * _WORD
            self.slots[1][offset : offset + half] = data[:half]
            self.counts.stored += half

        self.effects.effect("device.page", whole, torn)

    def _do_1_5_w(self, body: dict[str, Any]) -> dict[str, Any] | tuple[int, int]:
        if body.get("slot", 1) != 1 or not self.confirmed or (self.pending and not self._erases_pending):
            return 1, 9
        self.effects.effect("device.erase", self._erase)
        self._ram.offset, self._ram.size, self._ram.sha = 0, 0, b""
        return {}

    def _do_1_6_r(self, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "images": [{"image": 0, "slots": [{"slot": n, "size": len(s)} for n, s in enumerate(self.slots)]}]
        }

    def _do_2_0_r(self, body: dict[str, Any]) -> dict[str, Any] | tuple[int, int]:
        name = body.get("name")
        return {"name": name, "fields": self.statistics[name]} if name in self.statistics else (2, 2)

    def _do_2_1_r(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"stat_list": list(self.statistics)}

    def _do_3_0_r(self, body: dict[str, Any]) -> dict[str, Any] | tuple[int, int]:
        value = self._ram.settings.get(str(body.get("name")))
        return (3, 3) if value is None else {"val": value}

    def _do_3_0_w(self, body: dict[str, Any]) -> dict[str, Any] | tuple[int, int]:
        name, value = body.get("name"), body.get("val")
        if name not in self._ram.settings or not isinstance(value, bytes):
            return 3, 5
        self.counts.settings_written += 1
        self._ram.settings[name] = value
        return {}

    def _do_3_2_w(self, body: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _do_3_3_w(self, body: dict[str, Any]) -> dict[str, Any]:
        self.saved = dict(self._ram.settings)
        return {}


class DirectXip(SmpServer):
    """The boot loader built for direct XIP with revert: images stay in their slots, the one that runs changes, and one that ran
    and was not confirmed is erased at the next boot. ``crashes``: the watchdog resets whatever is tried."""

    def __init__(self, folder: Path, application: bytes, *, crashes: bool = False) -> None:
        super().__init__(folder, application, mode=5)
        self.crashes = crashes
        self._running = 0

    @property
    def runs(self) -> str:
        image = read_image(bytes(self.slots[self._running]))
        return image.version if image else ""

    def _swap(self) -> None:
        self.counts.boots += 1
        if self.pending:
            self.pending = False
            if not self._is_bootable(self.slots[1 - self._running]):
                self._blank(1 - self._running)
                return
            self.counts.trial_boots += 1
            self._running = 1 - self._running
            self.confirmed, self.permanent = self.permanent, False
            if self.crashes:
                self._swap()
        elif not self.confirmed:
            self._blank(self._running)
            self._running, self.confirmed = 1 - self._running, True

    def _blank(self, slot: int) -> None:
        self.slots[slot][:] = b"\xff" * len(self.slots[slot])

    def _do(self, op: int, group: int, number: int, body: dict[str, Any]) -> dict[str, Any] | tuple[int, int]:
        """As the server that swaps does it, with the slot that runs in the first place."""
        slot = body.get("slot")
        if self._running and group == 1:
            self.slots.reverse()
            body = body if slot is None else {**body, "slot": 1 - slot}
        try:
            answer = super()._do(op, group, number, body)
        finally:
            if self._running and group == 1:
                self.slots.reverse()
        if self._running and (group, number) == (1, 0) and isinstance(answer, dict):
            answer["images"] = [one | {"slot": 1 - one["slot"]} for one in reversed(answer["images"])]
        return answer


def _cobs(data: bytes) -> bytes:
    out, block = bytearray(), bytearray()
    for byte in data + b"\0":
        if byte:
            block.append(byte)
        if not byte or len(block) == 254:
            out.append(len(block) + 1)
            out += block
            block.clear()
    return bytes(out)


def _uncobs(frame: bytes) -> bytes | None:
    out, at = bytearray(), 0
    while at < len(frame):
        code = frame[at]
        if not code or at + code > len(frame):
            return None
        out += frame[at + 1 : at + code]
        at += code
        if code < 255 and at < len(frame):
            out.append(0)
    return bytes(out[:-2]) if len(out) > 2 and not crc_hqx(bytes(out), 0) else None


def body_of(size_bytes: int, seed: int) -> bytes:
    """Bytes that do not repeat."""
    made = b""
    while len(made) < size_bytes:
        made += hashlib.sha256(struct.pack(">II", seed, zlib.crc32(made))).digest()
    return made[:size_bytes]
