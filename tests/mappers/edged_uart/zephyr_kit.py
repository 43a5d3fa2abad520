"""A real device for the tests of SMP: MCUboot and Zephyr's SMP server on a micro:bit in QEMU, with flash that stays.

The firmware was built by others; it lies in the source distribution of ``smpclient``, which is fetched from the Python package
index, checked, and kept in ``.cache``. QEMU itself would restore the flash at each reset, and a revert would be a fake: so each
reset of the guest ends that QEMU, what its flash holds is read out, and a fresh one starts from that. A power cut is
the same, at any moment.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import select
import shutil
import socket
import subprocess
import tarfile
import threading
import time
import tty
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import intelhex
from peer_kit import ROOT, peer_python

SDIST: Final = "smpclient-7.3.0.tar.gz"
SDIST_SHA256: Final = "86aa4bc1c621805d97f449793a4077f049aa88a98a1e916bf59423d072bd2a3b"
SDIST_URL: Final = "https://files.pythonhosted.org/packages/7b/00/9777e2307e2132e284ceae4d40be8496d3930b63c65648bfd3e3be69763b/"
FLASH_BYTES: Final = 0x40000
SLOT_BYTES: Final = 0x1A000
SLOTS: Final = (0x8000, 0x22400)
"""Where an image lies in each; MCUboot swaps by offset here, so that the second begins after a sector for moving."""
FACTORY: Final = "zephyr_4.4.0_smp_server_0eae053d_qemu_cortex_m0_serial.merged.hex"
SIGNED: Final = "zephyr_4.4.0_smp_server_0eae053d_qemu_cortex_m0_serial.signed.bin"
BOARD: Final = "smp:qemu_cortex_m0/nrf51822"
LINE_BYTES_PER_S: Final = 11_520
"""115,200 baud."""
QUICK_LINE_BYTES_PER_S: Final = 46_080
_SLICE_S: Final = 0.001
_LINE_HOLDS_BYTES: Final = 64
_FIXTURES: Final = "tests/fixtures/smp-server"


def fixture(name: str) -> Path:
    """One of the source distribution's prebuilt servers."""
    return unpacked(f"{_FIXTURES}/{name}")


def unpacked(path: str) -> Path:
    """The file of the source distribution at ``path``, unpacked below ``.cache``."""
    folder = ROOT / ".cache" / "smp-server" / SDIST_SHA256[:12]
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if not file.exists():
            with tarfile.open(fileobj=io.BytesIO(_sdist(folder.parent / SDIST))) as archive:
                member = archive.extractfile(f"{SDIST.removesuffix('.tar.gz')}/{path}")
                assert member is not None, f"{SDIST} has no {path}"
                new = file.with_name(f"{file.name}.new")
                new.write_bytes(member.read())
            new.replace(file)
    return file


def _sdist(kept: Path) -> bytes:
    if not kept.exists():
        with urllib.request.urlopen(SDIST_URL + SDIST, timeout=120) as answer:
            data: bytes = answer.read()
        kept.with_suffix(".new").write_bytes(data)
        kept.with_suffix(".new").replace(kept)
    data = kept.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SDIST_SHA256:
        kept.unlink()
        raise AssertionError(f"{SDIST} has the sha256 {found}, not {SDIST_SHA256}")
    return data


def factory_flash() -> bytes:
    """The flash as it leaves the factory: boot loader, application version 0.0.0 in slot 0."""
    return flash_of(fixture(FACTORY), FLASH_BYTES)


def flash_of(hex_file: Path, size_bytes: int) -> bytes:
    """A flash that was erased, and got what ``hex_file`` has."""
    merged = intelhex.IntelHex(str(hex_file))
    merged.padding = 0xFF
    return bytes(merged.tobinarray(start=0, size=size_bytes))


def signed(version: str, *arguments: str, body: bytes | None = None) -> bytes:
    """The application (or ``body``) made an image of ``version`` by MCUboot's own imgtool; ``arguments`` are its."""
    if body is None:
        image = fixture(SIGNED).read_bytes()
        header = int.from_bytes(image[8:10], "little")
        body = image[header : header + int.from_bytes(image[12:16], "little")]
    folder = ROOT / ".cache" / "signed"
    name = hashlib.sha256(repr((version, arguments, body)).encode()).hexdigest()[:16]
    made = folder / f"{name}.signed.bin"
    if not made.exists() or any("key" in argument for argument in arguments):
        folder.mkdir(parents=True, exist_ok=True)
        source, new = folder / f"{name}.{os.getpid()}.bin", folder / f"{name}.{os.getpid()}.new"
        source.write_bytes(body)
        run_quietly(imgtool(), "sign", "--version", version, "--header-size", "0x200", "--pad-header",
             "--slot-size", hex(SLOT_BYTES), "--align", "4", *arguments, source, new)  # fmt: skip
        source.unlink()
        new.replace(made)
    return made.read_bytes()


def imgtool() -> Path:
    return peer_python("imgtool").with_name("imgtool")


def run_quietly(*command: str | Path) -> None:
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


@dataclass(frozen=True, slots=True)
class Machine:
    """What QEMU is told. ``loaded``: files of the source distribution and where they go (None: as the file says). ``up``: what
    the application prints when it has started. ``flash_stays``: the flash can be read out, so that it outlives QEMU."""

    cpu: str
    name: str
    up: bytes
    loaded: tuple[tuple[str, int | None], ...] = ()
    flash_stays: bool = False


MICROBIT: Final = Machine("cortex-m0", "microbit", b"smp_sample: build time", flash_stays=True)


def mps2(build: str) -> Machine:
    """An Arm development board with another build of the server; its flash is simulated, and gone with QEMU.

    Its log goes elsewhere: it is taken to be up at once, and hears what comes too early later.
    """
    return Machine(
        "cortex-m3", "mps2-an385", b"", ((f"{build}.hex", None), (f"{build}.signed.bin", 0x20050000))
    )


MPS2_CONSOLE: Final = mps2("zephyr_4.4.0_smp_server_0eae053d_mps2_an385_serial_recovery_buf2048")
MPS2_RAW: Final = mps2("zephyr_f33aa2bc4a43_smp_server_27c54835_mps2_an385_serial_recovery_raw")
MPS2_RAW_AND_COBS: Final = mps2("zephyr_f33aa2bc4a43_smp_server_fa39f8c2_mps2_an385_serial_recovery_raw_cobs")
"""The application speaks raw, the boot loader in recovery COBS."""


Filter = Callable[[bytes], bytes]


def untouched(data: bytes) -> bytes:
    return data


class Paced:
    """One direction of a line: what was put in comes out as fast as the line carries it, in slices."""

    def __init__(self, bytes_per_s: float) -> None:
        self._byte_s = 1 / bytes_per_s
        self._slice_bytes = max(1, int(bytes_per_s * _SLICE_S))
        self._waiting = bytearray()
        self._free_at = 0.0

    @property
    def full(self) -> bool:
        return len(self._waiting) > _LINE_HOLDS_BYTES

    @property
    def pause_s(self) -> float | None:
        """Until something comes out; None where nothing waits."""
        return max(0.0, self._free_at - time.monotonic()) if self._waiting else None

    def put(self, data: bytes) -> None:
        self._free_at = max(self._free_at, time.monotonic())
        self._waiting += data

    def due(self) -> bytes:
        found = bytearray()
        now = time.monotonic()
        while self._waiting and self._free_at <= now:
            data = self._waiting[: self._slice_bytes]
            del self._waiting[: self._slice_bytes]
            self._free_at += len(data) * self._byte_s
            found += data
        return bytes(found)


class Zephyr:
    """The device. ``port`` is its serial line, a pseudo terminal that stays through resets.

    ``boots`` counts power-ups and resets; ``is_up``: the application has started since. ``tap`` keeps what was sent to it.
    ``to_device`` and ``from_device`` may change what goes over the wire. ``bytes_per_s``: what the line carries; Zephyr's
    driver has room for two lines, and loses some where they come as fast as QEMU can take them.
    """

    def __init__(
        self,
        folder: Path,
        flash: bytes | None = None,
        *,
        bytes_per_s: float = QUICK_LINE_BYTES_PER_S,
        machine: Machine = MICROBIT,
    ) -> None:
        self._machine = machine
        self._folder = folder
        self._flash = flash if flash is not None else factory_flash()
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        self.port = os.ttyname(self._slave)
        self.boots = 0
        self.tap = bytearray()
        self.said = bytearray()
        self.to_device: Filter = untouched
        self.from_device: Filter = untouched
        self._down, self._up = Paced(bytes_per_s), Paced(bytes_per_s)
        self._lock = threading.RLock()
        self.is_up, self._booted_at = False, 0
        self._serial: socket.socket | None = None
        self._qmp: socket.socket | None = None
        self._qemu: subprocess.Popen[bytes] | None = None
        self._events: list[dict[str, Any]] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._pump, name="zephyr", daemon=True)

    def __enter__(self) -> Self:
        self._start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(20)
        self._kill()
        os.close(self._master)
        os.close(self._slave)

    # -- what a test does to it

    def flash(self) -> bytes:
        """What the flash holds now."""
        with self._lock:
            self._ask("stop")
            self._save()
            self._ask("cont")
            return self._flash

    def slot(self, number: int, length: int) -> bytes:
        return self.flash()[SLOTS[number] :][:length]

    def cut_power(self, change: Filter = untouched) -> None:
        """Off and on again, wherever it is; ``change`` may damage the flash meanwhile."""
        with self._lock:
            self._ask("stop")
            self._again(change)

    def await_application(self, timeout_s: float = 20) -> None:
        """Until it listens."""
        deadline = time.monotonic() + timeout_s
        while not self.is_up:
            assert time.monotonic() < deadline, bytes(self.said[-500:])
            time.sleep(0.01)

    def hang(self) -> None:
        """The processor stops for good; only a reset helps."""
        with self._lock:
            self._ask("stop")

    # -- QEMU

    def _again(self, change: Filter = untouched) -> None:
        self._save()
        self._kill()
        self._flash = change(self._flash)
        self._start()

    def _save(self) -> None:
        file = self._folder / "saved.bin"
        # the processor's view: what the flash controller has not written back would be missed by pmemsave
        self._ask("memsave", val=0, size=FLASH_BYTES, filename=str(file))
        self._flash = file.read_bytes()
        assert len(self._flash) == FLASH_BYTES

    def _start(self) -> None:
        listeners = [self._listener(name) for name in ("serial", "qmp")]
        machine = self._machine
        command = [
            "qemu-system-arm", "-cpu", machine.cpu, "-machine", machine.name, "-display", "none", "-monitor", "none",
            "-chardev", f"socket,id=con,path={self._folder}/serial", "-serial", "chardev:con",
            "-chardev", f"socket,id=qmp,path={self._folder}/qmp", "-mon", "chardev=qmp,mode=control",
        ]  # fmt: skip
        if machine.flash_stays:
            image = self._folder / "flash.bin"
            image.write_bytes(self._flash)
            command += ["-action", "reboot=shutdown,shutdown=pause"]
            command += ["-device", f"loader,file={image},addr=0,force-raw=on"]
        for name, address in machine.loaded:
            at = "" if address is None else f",addr={address:#x}"
            command += ["-device", f"loader,file={fixture(name)}{at}"]
        self._qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=self._folder)
        self._serial, self._qmp = (self._accepted(listener) for listener in listeners)
        self._lines = self._qmp.makefile("r")
        json.loads(self._lines.readline())
        self._ask("qmp_capabilities")
        self.boots += 1
        self.is_up, self._booted_at = False, len(self.said)

    def _listener(self, name: str) -> socket.socket:
        path = self._folder / name
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(20)
        return listener

    def _accepted(self, listener: socket.socket) -> socket.socket:
        with listener:
            connection, _ = listener.accept()
        connection.settimeout(20)
        return connection

    def _kill(self) -> None:
        assert self._qemu is not None and self._serial is not None and self._qmp is not None
        self._qemu.kill()
        self._qemu.wait()
        self._lines.close()
        self._serial.close()
        self._qmp.close()

    def _ask(self, command: str, **arguments: object) -> None:
        assert self._qmp is not None
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while "return" not in (answer := json.loads(self._lines.readline())):
            assert "error" not in answer, answer
            self._events.append(answer)

    # -- the wire, and resets

    def _pump(self) -> None:
        while not self._ending.is_set():
            with self._lock:
                self._look()
            # whoever waits for the lock gets it
            time.sleep(0)

    def _look(self) -> None:
        assert self._serial is not None and self._qmp is not None
        pauses = [pause for way in (self._down, self._up) if (pause := way.pause_s) is not None]
        sources = [self._serial, self._qmp, *([] if self._down.full else [self._master])]
        ready, _, _ = select.select(sources, [], [], min([0.02, *pauses]))
        if self._qmp in ready:
            self._events.append(json.loads(self._lines.readline()))
        if self._master in ready:
            self._down.put(os.read(self._master, 1024))
        if self._serial in ready:
            self._up.put(self._serial.recv(4096))
        self._carry(self._serial)
        events, self._events = self._events, []
        if any(event.get("event") == "SHUTDOWN" for event in events):
            self._again()

    def _carry(self, serial: socket.socket) -> None:
        data = self._down.due()
        self.tap += data
        # a receiver that is not switched on yet hears nothing; QEMU's would keep a byte and then be stuck with it
        if self.is_up and (data := self.to_device(data)):
            serial.sendall(data)
        data = self._up.due()
        self.said += data
        self.is_up = self.is_up or self._machine.up in self.said[self._booted_at :]
        if data := self.from_device(data):
            os.write(self._master, data)


QEMU: Final = shutil.which("qemu-system-arm")
