"""64 devices at 115,200 baud flashed at once, from one process on one event loop.

The devices are simulated by another process (``fleet.c``), which takes the time of each byte on each line. Two protocols:
STK500 through the real mapper, which waits for an answer twice per page; and frames with a window, which keeps the line full.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import edged_uart
from bench.figures import Figure, at_least, at_most, median
from bench.shelf import Shelf, meter, shelf, watched
from bench.windowed import DATA_BYTES, FRAME_BYTES, WindowedSession
from edged.api import Device, SupportsFirmware
from edged.engine.images import ImageKey
from edged.links import LinkPool, device_env
from edged_uart.link import SerialLink

BAUD: Final = 115200
LINE_BYTES_PER_S: Final = BAUD / 10
DEVICES: Final = 64
PAGE_BYTES: Final = 128
STOP_AND_WAIT: Final = PAGE_BYTES / (PAGE_BYTES + 13)
"""Of the line, where each command waits for the answer to the one before (AVR061): Load Address 4 bytes and 2 back, then
133 and 2 back to program a page, or 5 and 130 back to read it."""
OVERLAPPED: Final = PAGE_BYTES / (PAGE_BYTES + 11)
"""Of the line, where the answer to Load Address comes while the next command is being sent, as edged does it."""
SIGNATURE: Final = "avr:1e950f"
_FLASH_BYTES: Final = 120 * 1024
_CHUNK_BYTES: Final = 4096
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")

Flash = Callable[[int, Shelf, ImageKey], Awaitable[float]]
"""Flash device n; returns when its transfer began (monotonic seconds)."""


@dataclass(frozen=True, slots=True)
class Run:
    """One fleet flashed. Seconds of wall time and of CPU; ``own_cpu_s`` is this process's."""

    whole_s: float
    transfer_s: float
    own_cpu_s: float
    simulator_cpu_s: float
    load: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """The running simulator."""

    folder: Path
    pid: int

    def port(self, number: int) -> Path:
        return self.folder / f"tty{number}"

    def holds(self, number: int, length: int) -> bytes:
        """The first ``length`` bytes of a device's flash."""
        with (self.folder / "flash").open("rb") as file:
            file.seek(number * _FLASH_BYTES)
            return file.read(length)

    def cpu_s(self) -> float:
        """What the simulator has used so far (proc(5): utime, stime)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


@contextmanager
def fleet(mode: str, devices: int) -> Iterator[Fleet]:
    """Build and run the simulator."""
    with tempfile.TemporaryDirectory(prefix="edged-bench-") as name:
        folder = Path(name)
        source, program = Path(__file__).with_name("fleet.c"), folder / "fleet"
        subprocess.run(["gcc", "-O2", "-std=gnu11", "-o", str(program), str(source)], check=True)
        command = [
            *(str(program), "--mode", mode, "--devices", str(devices), "--baud", str(BAUD)),
            *("--flash-bytes", str(_FLASH_BYTES), "--folder", name),
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            said = process.stdout.readline()
            if said != b"ready\n":
                raise RuntimeError(f"the simulator said {said!r}")
            # leaving the block closes its standard input, at which it ends
            yield Fleet(folder, process.pid)


async def _flash_all(mode: str, devices: int, size_bytes: int) -> Run:
    data = random.Random(mode).randbytes(size_bytes)
    with fleet(mode, devices) as boards, tempfile.TemporaryDirectory(prefix="edged-bench-") as name:
        async with shelf(Path(name)) as images:
            key = await images.put([(0, data)], _CHUNK_BYTES)
            flash = _by_stk500(boards) if mode == "stk500" else _by_window(boards)
            run = await _timed(boards, devices, lambda number: flash(number, images, key))
        for number in range(devices):
            if boards.holds(number, size_bytes) != data:
                raise RuntimeError(f"device {number} does not hold the image")
    return run


async def _timed(boards: Fleet, devices: int, flash: Callable[[int], Awaitable[float]]) -> Run:
    used, simulated, began = _own_cpu_s(), boards.cpu_s(), time.monotonic()
    transfers = await asyncio.gather(*(flash(number) for number in range(devices)))
    ended = time.monotonic()
    return Run(
        whole_s=ended - began,
        transfer_s=ended - min(transfers),
        own_cpu_s=_own_cpu_s() - used,
        simulator_cpu_s=boards.cpu_s() - simulated,
        load=round(os.getloadavg()[0], 2),
    )


def _own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _by_stk500(boards: Fleet) -> Flash:
    (spec,) = (spec for spec in edged_uart.edged_mappers() if spec.name == "uart-stk500")
    pool = LinkPool({link.scheme: link for link in edged_uart.edged_links()})

    async def flash(number: int, images: Shelf, key: ImageKey) -> float:
        device = Device(
            id=f"board-{number}",
            model="board",
            mapper=spec.name,
            address=f"serial:{boards.port(number)}",
            hardware_ids=(SIGNATURE,),
            flash_size_bytes=_FLASH_BYTES,
            config=spec.parse_config({"baud": BAUD, "page_bytes": PAGE_BYTES}),
        )
        async with (
            spec.connect(device, device_env(device.id, pool)) as session,
            images.images.open(key) as image,
        ):
            await session.identify()
            assert isinstance(session, SupportsFirmware)
            began = time.monotonic()
            gauge = meter(image.size_bytes)
            await watched(gauge, session.stage(image, gauge))
            return began

    return flash


def _by_window(boards: Fleet) -> Flash:
    async def flash(number: int, images: Shelf, key: ImageKey) -> float:
        async with _opened(boards.port(number)) as link, images.images.open(key) as image:
            began = time.monotonic()
            gauge = meter(image.size_bytes)
            await watched(gauge, WindowedSession(link).stage(image, gauge))
            return began

    return flash


@asynccontextmanager
async def _opened(port: Path) -> AsyncIterator[SerialLink]:
    link = SerialLink(str(port))
    try:
        await link.open()
        await link.set_baud(BAUD)
        yield link
    finally:
        await link.close()


def run(*, quick: bool) -> list[Figure]:
    """Both protocols."""
    devices, repeats = (4, 1) if quick else (DEVICES, 3)
    # 17 and 11 s: with STK500 every byte goes over the line twice
    stk_bytes, window_bytes = (2048, 4096) if quick else (88 * 1024, 120 * 1024)
    figures: list[Figure] = []
    for mode, size_bytes in (("stk500", stk_bytes), ("window", window_bytes)):
        runs = [asyncio.run(_flash_all(mode, devices, size_bytes)) for _ in range(repeats)]
        figures += _figures(mode, devices, size_bytes, runs)
    return figures


def _figures(mode: str, devices: int, size_bytes: int, runs: list[Run]) -> list[Figure]:
    stk = mode == "stk500"
    moved = devices * size_bytes * (2 if stk else 1)
    line = devices * LINE_BYTES_PER_S
    ceiling = OVERLAPPED if stk else DATA_BYTES / FRAME_BYTES
    of_line = [moved / run.whole_s / line for run in runs]
    load = median(run.load for run in runs)
    detail = {
        "devices": devices,
        "image_bytes": size_bytes,
        "whole_s": [run.whole_s for run in runs],
        "transfer_s": [run.transfer_s for run in runs],
        "utilisation_of_line": of_line,
        "utilisation_of_ceiling_transfer_only": [moved / run.transfer_s / line / ceiling for run in runs],
        "ceiling_of_line": ceiling,
        "loads": [run.load for run in runs],
    }
    what = f"{devices} devices at once, " + ("STK500 (128-byte pages)" if stk else "window of 8 frames")
    figures = [
        Figure(
            name=f"fleet.{mode}.utilisation",
            what=f"{what}: utilisation, whole wall time",
            unit="ratio",
            against=f"the ceiling of how it asks, {ceiling:.1%} of the line" if stk else "the line",
            samples=tuple(used / ceiling for used in of_line) if stk else tuple(of_line),
            goal=at_least(0.97) if stk else at_least(0.95),
            detail=detail,
            load=load,
        ),
        Figure(
            name=f"fleet.{mode}.cpu",
            what=f"{what}: CPU of the flashing process",
            unit="ratio",
            against="one core",
            samples=tuple(run.own_cpu_s / run.whole_s for run in runs),
            load=load,
            goal=at_most(1.0),
        ),
        Figure(
            name=f"fleet.{mode}.simulator_cpu",
            what=f"{what}: CPU of the simulator",
            unit="ratio",
            against="one core",
            samples=tuple(run.simulator_cpu_s / run.whole_s for run in runs),
            load=load,
        ),
    ]
    if stk:
        figures.append(
            Figure(
                name="fleet.stk500.stop_and_wait",
                what=f"{what}: the same against stop-and-wait, as avrdude asks",
                unit="ratio",
                against=f"the ceiling of stop-and-wait, {STOP_AND_WAIT:.1%} of the line",
                samples=tuple(used / STOP_AND_WAIT for used in of_line),
                load=load,
            )
        )
    return figures
