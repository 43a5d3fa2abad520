"""Run in a guest inside the sandbox of edged.service: tries what the daemon needs, and what it must not have.

Prints one JSON object: what came of each attempt, "ok" or the name of the error. Standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
CAN_ISOTP = getattr(socket, "CAN_ISOTP", 6)
SOL_CAN_ISOTP = 106
CAN_ISOTP_RECV_FC = 2
CLONE_NEWUSER = 0x10000000
ISOTP_BYTES = 200


def serial(path: str) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))


def can_raw(sender: str, receiver: str) -> None:
    """One frame from one interface to the other (or to itself)."""
    kind = (socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
    with socket.socket(*kind) as out, socket.socket(*kind) as back:
        out.bind((sender,))
        back.bind((receiver,))
        back.settimeout(10)
        frame = struct.pack("=IB3x8s", 0x123, 5, b"edged")
        out.send(frame)
        assert back.recv(16) == frame


def can_isotp(sender: str, receiver: str) -> None:
    """A message of many frames, with the kernel's ISO 15765-2 flow control."""
    kind = (socket.AF_CAN, socket.SOCK_DGRAM, CAN_ISOTP)
    with socket.socket(*kind) as out, socket.socket(*kind) as back:
        # ten milliseconds from frame to frame: a controller keeps five that its driver has not fetched yet
        back.setsockopt(SOL_CAN_ISOTP, CAN_ISOTP_RECV_FC, bytes([0, 10, 0]))
        out.bind((sender, 0x7E0, 0x7E8))
        back.bind((receiver, 0x7E8, 0x7E0))
        back.settimeout(20)
        message = bytes(range(ISOTP_BYTES))
        out.send(message)
        assert back.recv(4096) == message


def broker(port: int, authority: str) -> None:
    """MQTT 3.1.1: CONNECT over TLS, answered by CONNACK with code 0 (3.1, 3.2)."""
    context = ssl.create_default_context(cafile=authority)
    plain = socket.create_connection(("127.0.0.1", port), 20)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as line:
        body = b"\x00\x04MQTT\x04\x02\x00\x3c\x00\x05edged"
        line.sendall(b"\x10" + bytes([len(body)]) + body)
        assert line.recv(4) == b"\x20\x02\x00\x00"


def state() -> None:
    mine = Path(os.environ["STATE_DIRECTORY"], "probe")
    mine.write_text("x")
    mine.unlink()


def threads_and_callbacks() -> None:
    """What a compiled library may need where memory is never writable and executable."""
    compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(lambda a, b: 0)
    LIBC.qsort((ctypes.c_int * 2)(2, 1), 2, 4, compare)


def write(path: str) -> None:
    Path(path).write_text("x")


def read(path: str) -> None:
    with Path(path).open("rb") as file:
        file.read(1)


def look_into(path: str) -> None:
    list(Path(path).iterdir())


def called(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def packet() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def raw_ip() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close()


def executable_memory() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def set_user_id() -> None:
    mine = Path(os.environ["STATE_DIRECTORY"], "probe")
    mine.write_text("x")
    try:
        mine.chmod(0o4755)
    finally:
        mine.unlink()


def see_init() -> None:
    Path("/proc/1").stat()


def main() -> None:
    setting = json.loads(sys.argv[1])
    attempts: dict[str, Callable[[], object]] = {
        **{f"serial {path}": partial(serial, path) for path in setting["ports"]},
        **{f"raw CAN {a}->{b}": partial(can_raw, a, b) for a, b in setting["can"]},
        **{f"ISO-TP {a}->{b}": partial(can_isotp, a, b) for a, b in setting["can"]},
        "TLS broker": lambda: broker(setting["broker"], setting["authority"]),
        "state": state,
        "callbacks": threads_and_callbacks,
        "no: write /etc": lambda: write("/etc/edged/probe"),
        "no: write /usr": lambda: write("/usr/lib/edged/probe"),
        "no: write /var/lib": lambda: write("/var/lib/probe"),
        "no: write /run": lambda: write("/run/probe"),
        "no: read disk": lambda: read("/dev/vda"),
        "no: read kernel log": lambda: read("/dev/kmsg"),
        "no: read memory": lambda: read("/dev/mem"),
        "no: read shadow": lambda: read("/etc/shadow"),
        "no: read credentials": partial(look_into, "/etc/edged/credentials"),
        "no: read home": partial(look_into, "/root"),
        "no: see init": see_init,
        "no: kill init": lambda: os.kill(1, signal.SIGWINCH),
        "no: packet socket": packet,
        "no: raw IP socket": raw_ip,
        "no: user namespace": lambda: called(LIBC.unshare(CLONE_NEWUSER)),
        "no: mount": lambda: called(LIBC.mount(b"x", b"/tmp", b"tmpfs", 0, None)),
        "no: real time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
        "no: clock": lambda: called(LIBC.settimeofday((ctypes.c_long * 2)(1, 0), None)),
        "no: reboot": lambda: called(LIBC.reboot(0)),
        "no: executable memory": executable_memory,
        "no: set-user-ID file": set_user_id,
        "no: become root": lambda: os.setuid(0),
    }
    print(json.dumps({name: outcome(attempt) for name, attempt in attempts.items()}))


def outcome(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except ssl.SSLError as error:
        return str(error)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    except AssertionError:
        return "other bytes"
    return "ok"


if __name__ == "__main__":
    main()
