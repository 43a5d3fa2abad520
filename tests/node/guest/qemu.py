"""A Debian in a machine: its own kernel, clock, disks, CAN, serial ports, hot-plug, watchdog, and power to cut.

Always under TCG: a KVM that is there may still not carry Debian's kernels. Commands go through the guest agent,
machine control through QMP. The network is the guest's own: nothing outside can be reached, but for the ports of
the host's loopback that a test names in ``forwards``.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from guest.command import ENVIRONMENT, Done, Guest, GuestError, eventually
from guest.images import Image, run

_BOOT_S: Final = 240.0
_ANSWER_S: Final = 60.0
_QMP_S: Final = 120.0
_POLL_S: Final = (0.03, 0.5)
"""A command's end is asked for at first and at last this often: each question is work for an emulated guest."""
HOST_ADDRESS: Final = "10.0.2.100"
KERNEL_LINE: Final = (
    "root=/dev/vda rw console=ttyS0 mitigations=off no_timer_check quiet systemd.show_status=error panic=-1 "
    "net.ifnames=0 random.trust_cpu=on modprobe.blacklist=ahci,kvm_amd,powernow_k8,i2c_i801,lpc_ich,psmouse,pcspkr"
)
CAN: Final = ("-object", "can-bus,id=cb0", *("-device", "kvaser_pci,canbus=cb0") * 2)
"""Options for two CAN controllers on one bus, can0 and can1; vcan is in the kernel anyway."""

WATCHDOG: Final = ("-device", "i6300esb", "-action", "watchdog=reset")
"""Options for a watchdog on the PCI bus, /dev/watchdog0."""


@dataclass(frozen=True, slots=True)
class Serial:
    """A device of the host behind a serial port: ``port`` is its terminal.

    ``process`` is told each rise of DTR, which on such boards is their reset (see ``modem.c``).
    """

    port: Path
    process: int


class Channel:
    """One JSON object a line over a unix socket: QMP, and the guest agent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = b""

    def connect(self) -> None:
        """Raises OSError where nobody listens yet."""
        self._socket.connect(str(self._path))

    def send(self, message: Mapping[str, object]) -> None:
        """Raises GuestError where the other end is gone."""
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise GuestError(f"{self._path.name}: {error}") from error

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next object. Raises GuestError where none comes in time or the other end is gone."""
        self._socket.settimeout(timeout_s)
        while b"\n" not in self._buffer:
            try:
                more = self._socket.recv(65536)
            except OSError as error:
                raise GuestError(f"{self._path.name}: no answer within {timeout_s} s") from error
            if not more:
                raise GuestError(f"{self._path.name}: the machine is gone")
            self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        # the agent marks the start of an answer with a byte that is no JSON
        message: dict[str, Any] = json.loads(line.lstrip(b"\xff"))
        return message

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


class Machine(Guest):
    """A machine that boots ``disk`` with ``image``'s kernel: a raw file, a qcow2 by its name, or a ``-blockdev`` option with
    the node name "system".

    ``folder`` gets its sockets, ``console.log`` and ``witness.log``: what the guest writes to
    ``/dev/virtio-ports/witness`` is there, whatever happens to the guest afterwards. ``serials`` are ttyS1, ttyS2
    and up, ``hotplug`` are adapters for :meth:`plug`. ``state`` is the ``-blockdev`` option of a second disk,
    /dev/vdb, with the node name "state". Use it as a context manager: it boots, unless ``power_on`` is False, and
    its end is a power cut.
    """

    def __init__(
        self,
        image: Image,
        disk: Path | str,
        folder: Path,
        *,
        serials: Sequence[Serial] = (),
        hotplug: Mapping[str, Serial] | None = None,
        state: str = "",
        forwards: Sequence[int] = (),
        options: Sequence[str] = (),
        kernel_line: str = "",
        cpus: int = 1,
        memory_mib: int = 512,
        power_on: bool = True,
    ) -> None:
        self.image, self.disk, self.folder = image, disk, folder
        self.witness = folder / "witness.log"
        self.console = folder / "console.log"
        self.boot_s = 0.0
        self._serials, self._hotplug = serials, hotplug or {}
        self._state, self._forwards, self._options = state, forwards, options
        self._kernel_line = f"{KERNEL_LINE} {kernel_line}"
        self._cpus, self._memory_mib, self._power_on = cpus, memory_mib, power_on
        self._process: subprocess.Popen[bytes] | None = None
        self._channels: list[Channel] = []
        self._snapshot = ""

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._power_on:
            try:
                self.start()
            except BaseException:
                self.kill()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def start(self, *, snapshot: str = "", wait: bool = True) -> None:
        """Power on: boot, or go on from ``snapshot`` of the disk. Returns when all that boots is up, or at once."""
        assert self._process is None, "the machine runs already"
        began = time.monotonic()
        self._snapshot = snapshot
        environment = os.environ | self._modem_environment()
        with (self.folder / "qemu.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        self._channels.append(self._connect("qmp"))
        self._qmp.receive(_QMP_S)
        self.qmp("qmp_capabilities")
        self._channels.append(self._connect("agent"))
        if wait:
            self.await_agent()
            if not snapshot:
                self.await_boot(_BOOT_S)
            self.boot_s = time.monotonic() - began

    def kill(self) -> None:
        """Cut the power: what the guest had not flushed to its disks is lost. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        while self._channels:
            self._channels.pop().close()

    def power_off(self) -> None:
        """Shut down in good order."""
        assert self._process is not None
        self._agent.send({"execute": "guest-shutdown", "arguments": {"mode": "powerdown"}})
        try:
            self._process.wait(_BOOT_S)
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"no end of the shutdown within {_BOOT_S} s") from error
        finally:
            self.kill()

    def ended(self) -> bool:
        """The machine is off, whoever turned it off."""
        return self._process is None or self._process.poll() is not None

    @property
    def pid(self) -> int:
        """QEMU's process."""
        assert self._process is not None
        return self._process.pid

    def qmp(self, command: str, **arguments: object) -> Any:
        """A QMP command's answer. Raises GuestError for its error."""
        self._qmp.send({"execute": command, "arguments": arguments})
        while True:
            answer = self._qmp.receive(_QMP_S)
            if "error" in answer:
                raise GuestError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def monitor(self, line: str) -> None:
        """A line for the human monitor. Raises GuestError where it answers anything."""
        said = self.qmp("human-monitor-command", **{"command-line": line})
        if said.strip():
            raise GuestError(f"{line}: {said.strip()}")

    def save(self, snapshot: str) -> None:
        """Keep memory and disk (qcow2) as they are now, for a later start from there."""
        self.monitor(f"savevm {snapshot}")

    def plug(self, name: str) -> None:
        """Plug in the USB serial adapter ``name`` of ``hotplug``."""
        self.qmp("device_add", driver="usb-serial", id=name, chardev=f"c-{name}", bus="usb.0", serial=name)

    def unplug(self, name: str) -> None:
        """Pull the adapter out."""
        self.qmp("device_del", id=name)

    def await_agent(self) -> None:
        """Return when the guest runs commands. Raises GuestError."""
        deadline = time.monotonic() + _BOOT_S
        mark = time.monotonic_ns() % 1_000_000_007
        self._agent.send({"execute": "guest-sync", "arguments": {"id": mark}})
        while True:
            try:
                if self._agent.receive(max(deadline - time.monotonic(), 0.1)).get("return") == mark:
                    return
            except GuestError as error:
                raise GuestError(f"{error}; the console: {self.console_end()}") from error

    def execute(self, command: tuple[str, ...], stdin: bytes, timeout_s: float) -> Done:
        """Run ``command`` through the guest agent."""
        asked: dict[str, object] = {
            "path": command[0],
            "arg": list(command[1:]),
            "env": [f"{name}={value}" for name, value in ENVIRONMENT.items()],
            "capture-output": True,
        }
        if stdin:
            asked["input-data"] = base64.b64encode(stdin).decode()
        pid = self._ask("guest-exec", asked)["pid"]
        deadline, pause_s = time.monotonic() + timeout_s, _POLL_S[0]
        while True:
            status = self._ask("guest-exec-status", {"pid": pid})
            if status["exited"]:
                out, err = (
                    base64.b64decode(status.get(key, "")).decode(errors="replace")
                    for key in ("out-data", "err-data")
                )
                return Done(command, status.get("exitcode", 128 + status.get("signal", 0)), out, err)
            if time.monotonic() > deadline:
                raise GuestError(f"{' '.join(command)}: no end within {timeout_s} s; {self.console_end()}")
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.3, _POLL_S[1])

    @property
    def _qmp(self) -> Channel:
        return self._channels[0]

    @property
    def _agent(self) -> Channel:
        return self._channels[1]

    def _ask(self, command: str, arguments: Mapping[str, object]) -> dict[str, Any]:
        self._agent.send({"execute": command, "arguments": arguments})
        answer = self._agent.receive(_ANSWER_S)
        if "error" in answer:
            raise GuestError(f"{command}: {answer['error']['desc']}")
        result: dict[str, Any] = answer["return"]
        return result

    def _connect(self, name: str) -> Channel:
        def connected() -> Channel | None:
            channel = Channel(self.folder / f"{name}.sock")
            try:
                channel.connect()
            except OSError:
                channel.close()
                if self.ended():
                    said = (self.folder / "qemu.log").read_text(errors="replace")
                    raise GuestError(f"QEMU ended: {said[-2000:]}") from None
                return None
            return channel

        return eventually(connected, _QMP_S, f"QEMU's socket {name}", every_s=0.02)

    def console_end(self) -> str:
        """What the guest's kernel and systemd said last."""
        return self.console.read_text(errors="replace")[-1500:] if self.console.exists() else "nothing said"

    def _modem_environment(self) -> dict[str, str]:
        lines = [*self._serials, *self._hotplug.values()]
        if not lines:
            return {}
        told = ",".join(f"{serial.port.resolve()}={serial.process}" for serial in lines)
        return {"LD_PRELOAD": str(modem_library(self.image.folder.parent)), "GUEST_DTR": told}

    def _command(self) -> list[str]:
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-machine", "q35", "-accel", "tcg", "-cpu", "qemu64", "-smp", str(self._cpus)),
            *(
                "-m",
                f"{self._memory_mib}M",
                "-kernel",
                str(self.image.kernel),
                "-initrd",
                str(self.image.initrd),
            ),
            *("-append", self._kernel_line, "-rtc", "base=utc"),
            *("-qmp", f"unix:{self.folder}/qmp.sock,server=on,wait=off"),
            *("-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console"),
            *_system(self.disk),
            *("-device", "virtio-blk-pci,drive=system"),
            *("-device", "virtio-serial"),
            *("-chardev", f"socket,id=agent,path={self.folder}/agent.sock,server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
            *("-chardev", f"file,id=witness,path={self.witness},append=on"),
            *("-device", "virtserialport,chardev=witness,name=witness"),
            *("-device", "qemu-xhci,id=usb"),
            *self._options,
        ]
        for number, serial in enumerate(self._serials, 1):
            command += ["-chardev", f"serial,id=s{number},path={serial.port.resolve()}"]
            # only the first can be at the ISA bus: a ttyS2 there shares its interrupt with ttyS0, and either loses some of it
            plug = (
                ["-serial", f"chardev:s{number}"]
                if number == 1
                else ["-device", f"pci-serial,chardev=s{number}"]
            )
            command += plug
        for name, serial in self._hotplug.items():
            command += ["-chardev", f"serial,id=c-{name},path={serial.port.resolve()}"]
        if self._state:
            command += ["-blockdev", self._state, "-device", "virtio-blk-pci,drive=state"]
        if self._forwards:
            command += ["-netdev", self._network(), "-device", "virtio-net-pci,netdev=net"]
        if self._snapshot:
            command += ["-loadvm", self._snapshot]
        return command

    def _network(self) -> str:
        # the form tcp:...-tcp:... would mix parallel connections into one
        ways = (
            f",guestfwd=tcp:{HOST_ADDRESS}:{port}-cmd:socat - TCP:127.0.0.1:{port}" for port in self._forwards
        )
        return "user,id=net,restrict=on" + "".join(ways)


def _system(disk: Path | str) -> tuple[str, str]:
    if isinstance(disk, str):
        return "-blockdev", disk
    kind = "qcow2" if disk.suffix == ".qcow2" else "raw"
    return "-drive", f"file={disk},format={kind},if=none,id=system,cache=unsafe"


def modem_library(cache: Path) -> Path:
    """The shared object of ``modem.c``, built where it is missing or older. Raises GuestError."""
    source, library = Path(__file__).with_name("modem.c"), cache / "modem.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        # two machines of one process may start at the same moment
        made = library.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        run("gcc", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(made), str(source), "-ldl")
        made.rename(library)
    return library
