"""``python -m bench.can_bus BITRATE``: a controller behind a serial CAN adapter, on a bus that gives every frame its time.

Prints the adapter's port, serves until its input ends, then prints what the controller did as JSON. The controller is the
tests' own, which is written from the standard and flashed there by clients that others wrote. BITRATE 0: a bus without limit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import sys
import time
import tty
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "mappers" / "edged_can"))

import can  # noqa: F401 - by now, or the first answer waits for it
from uds_server import Controller, OnBus

from edged_can.address import CanAddress
from edged_can.frames import wire_s

LONGEST_BLOCK: Final = 4095
_AHEAD_S: Final = 0.001
"""A sleep is late by tens of microseconds: frames wait for their time together, and are right on average."""


class PacedAdapter:
    """A pseudo terminal that speaks LAWICEL's protocol, as much of it as python-can uses, in place of a python-can bus."""

    def __init__(self, bitrate: int) -> None:
        self._master, slave = os.openpty()
        tty.setraw(slave)
        self.port = os.ttyname(slave)
        self._slave = slave
        self._lines: list[bytes] = []
        self._rest = b""
        self._frame_s = (
            wire_s(8, CanAddress("slcan", "", bitrate), extended=False, fd=False) if bitrate else 0.0
        )
        self._free_at = time.monotonic()

    def recv(self, timeout_s: float) -> Any:
        while not self._lines:
            if not select.select([self._master], [], [], 0)[0]:
                # nothing is waiting: the bus has been idle until the next frame comes
                if not select.select([self._master], [], [], timeout_s)[0]:
                    return None
                self._free_at = max(self._free_at, time.monotonic())
            # no more than a few frames at once: what is not read yet is what the sender waits for
            *lines, self._rest = (self._rest + os.read(self._master, 256)).split(b"\r")
            self._lines = [line for line in lines if line[:1] == b"t"]
        line = self._lines.pop(0)
        self._take_time()
        size = int(line[4:5])
        return SimpleNamespace(
            arbitration_id=int(line[1:4], 16),
            is_extended_id=False,
            is_error_frame=False,
            data=bytes.fromhex(line[5 : 5 + 2 * size].decode()),
        )

    def send(self, message: Any) -> None:
        self._take_time()
        os.write(
            self._master,
            f"t{message.arbitration_id:03X}{len(message.data)}{message.data.hex().upper()}\r".encode(),
        )

    def shutdown(self) -> None:
        os.close(self._slave)
        os.close(self._master)

    def _take_time(self) -> None:
        if not self._frame_s:
            return
        # what waits in the adapter follows at once, however late this process is
        self._free_at += self._frame_s
        ahead_s = self._free_at - time.monotonic()
        if ahead_s > _AHEAD_S:
            time.sleep(ahead_s)


def main() -> None:
    controller = Controller(longest_block=LONGEST_BLOCK, boot_s=0)
    adapter = PacedAdapter(int(sys.argv[1]))
    with OnBus(controller, adapter):
        print(adapter.port, flush=True)
        sys.stdin.read()
    print(json.dumps(dataclasses.asdict(controller.counts)))


if __name__ == "__main__":
    main()
