"""avrdude and edged flash the same file into the same simulated board: a real optiboot at 115,200 baud.

Pairs, in alternating order, each from the same flash content; both must leave the same bytes. avrdude writes and verifies
(``-D -U flash:w``); edged opens the port, identifies, writes and reads back, and leaves. What edged's whole job costs, with
the read-out of the fallback and the health check, is measured apart, against avrdude reading the flash and then writing it.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import intelhex

import edged_uart
from bench.figures import Figure, at_most, median
from bench.fleet import LINE_BYTES_PER_S, OVERLAPPED, PAGE_BYTES, STOP_AND_WAIT
from bench.shelf import meter, shelf, watched
from edged import config, plugins
from edged.api import Device, Phase, SupportsFirmware
from edged.domain.job import State
from edged.links import LinkPool, device_env
from edged.testing import demo
from edged.testing.avr import OPTIBOOT_328P, SimulatedAvr, build_app
from edged.testing.node import life

_BOARD: Final = OPTIBOOT_328P
_CHUNK_BYTES: Final = 4096
_BEFORE, _AFTER = demo.GOOD
_PHASE: Final = re.compile(r"(Writing|Reading) \| #+ \| 100% +([0-9.]+) ?s")


@dataclass(frozen=True, slots=True)
class Files:
    """The application that is in the flash at first, and the one that is to be."""

    before: Path
    after: Path

    @property
    def wanted(self) -> bytes:
        return _bytes(self.after)


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds: all of it, and the part in which pages are written and read back."""

    whole_s: float
    transfer_s: float


def _bytes(hex_file: Path) -> bytes:
    return bytes(intelhex.IntelHex(str(hex_file)).tobinarray(start=0))


@contextmanager
def _board(files: Files) -> Iterator[SimulatedAvr]:
    """A fresh board with the old application; at the end it must hold the new one, byte for byte."""
    with tempfile.TemporaryDirectory(prefix="edged-bench-") as folder:
        with SimulatedAvr(Path(folder), _BOARD, application=files.before) as board:
            yield board
            held, wanted = board.flash()[: _BOARD.boot_at], files.wanted
        if held != wanted + b"\xff" * (_BOARD.boot_at - len(wanted)):
            raise RuntimeError("the flash does not hold the application")


def _avrdude(board: SimulatedAvr, *memories: str) -> Took:
    command = [
        *(
            "avrdude",
            "-p",
            _BOARD.part,
            "-c",
            _BOARD.programmer,
            "-P",
            str(board.port),
            "-b",
            str(_BOARD.baud),
        ),
        "-D",
        *(word for memory in memories for word in ("-U", memory)),
    ]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    whole_s = time.monotonic() - began
    return Took(whole_s, sum(float(seconds) for _, seconds in _PHASE.findall(done.stderr)[-2:]))


def by_avrdude(files: Files) -> Took:
    """Write and verify."""
    with _board(files) as board:
        return _avrdude(board, f"flash:w:{files.after}:i")


def by_avrdude_with_read_out(files: Files) -> Took:
    """Keep what the flash holds, then write and verify."""
    with _board(files) as board:
        return _avrdude(board, "flash:r:/dev/null:r", f"flash:w:{files.after}:i")


def by_edged(files: Files) -> Took:
    """Open, identify, write, read back, leave."""
    with _board(files) as board:
        return asyncio.run(_stage(board, files))


async def _stage(board: SimulatedAvr, files: Files) -> Took:
    (spec,) = (spec for spec in edged_uart.edged_mappers() if spec.name == "uart-stk500")
    links = {link.scheme: link for link in edged_uart.edged_links()}
    device = Device(
        id="board",
        model="board",
        mapper=spec.name,
        address=f"serial:{board.port}",
        hardware_ids=(f"avr:{_BOARD.signature.hex()}",),
        flash_size_bytes=_BOARD.boot_at,
        config=spec.parse_config({"baud": _BOARD.baud}),
    )
    with tempfile.TemporaryDirectory(prefix="edged-bench-") as folder:
        async with shelf(Path(folder)) as images:
            key = await images.put([(0, files.wanted)], _CHUNK_BYTES)
            began = time.monotonic()
            moved = [began, began]
            async with (
                spec.connect(device, device_env(device.id, LinkPool(links))) as session,
                images.images.open(key) as image,
            ):
                await session.identify()
                assert isinstance(session, SupportsFirmware)
                gauge = meter(image.size_bytes)

                def progress(phase: Phase, done_bytes: int, total_bytes: int) -> None:
                    gauge(phase, done_bytes, total_bytes)
                    moved[0 if phase is Phase.COMPARE else 1] = time.monotonic()

                await watched(gauge, session.stage(image, progress))
            return Took(time.monotonic() - began, moved[1] - moved[0])


def by_job(files: Files) -> Took:
    """A whole job of the engine: trust, fetch, read-out of the fallback, write, read back, boot, health."""
    with tempfile.TemporaryDirectory(prefix="edged-bench-") as folder, _board(files) as board:
        return asyncio.run(_job(board, files, Path(folder)))


def described(board: SimulatedAvr, files: Files) -> demo.Bench:
    """The board and its releases, in the words of the demo."""
    return demo.Bench(
        title=_BOARD.name,
        mapper="uart-stk500",
        protocol="stk500v1",
        address=f"serial:{board.port}",
        hardware_id=f"avr:{_BOARD.signature.hex()}",
        flash_bytes=_BOARD.boot_at,
        health='kind = "line"\npattern = "edged-app .* {identifies_as} ready"\ntimeout_s = 5',
        daemon=(),
        images={_BEFORE: files.before, _AFTER: files.after},
    )


async def _job(board: SimulatedAvr, files: Files, folder: Path) -> Took:
    bench = described(board, files)
    settings = config.load(demo.configure(bench, demo.publish(bench, folder), folder))
    async with life(settings, plugins.discover(())) as node:
        began = time.monotonic()
        await node.want(demo.DEVICE, f"blink@{_AFTER}")
        job = await node.ended(demo.DEVICE, timeout_s=120)
        whole_s = time.monotonic() - began
    if job.state is not State.SUCCEEDED:
        raise RuntimeError(f"the job ended {job.state}: {job.detail}")
    return Took(whole_s, whole_s)


def applications(size_bytes: int) -> Files:
    """Two applications of about that size that differ in every page but the first few."""
    filler = max(0, size_bytes - 1200)
    return Files(*(build_app(version=version, filler_bytes=filler) for version in (_BEFORE, _AFTER)))


def _pairs(
    count: int, first: Callable[[Files], Took], second: Callable[[Files], Took], files: Files
) -> list[tuple[Took, Took]]:
    """``count`` times both, each time in the other order."""
    pairs = []
    for number in range(count):
        if number % 2:
            late = second(files)
            pairs.append((first(files), late))
        else:
            pairs.append((first(files), second(files)))
    return pairs


def run(*, quick: bool) -> list[Figure]:
    """Time against time, and both against the protocol."""
    files = applications(4_000 if quick else 28_000)
    plain = _pairs(1 if quick else 7, by_avrdude, by_edged, files)
    load = round(os.getloadavg()[0], 2)
    whole = _pairs(1 if quick else 3, by_avrdude_with_read_out, by_job, files)
    pages = -(-len(files.wanted) // PAGE_BYTES)
    moved = 2 * pages * PAGE_BYTES
    return [
        Figure(
            name="flash.whole",
            what=f"{len(files.wanted):,} bytes flashed and verified: edged / avrdude, wall time",
            unit="ratio",
            against="avrdude, same board, same file, in turn",
            samples=tuple(edged.whole_s / avrdude.whole_s for avrdude, edged in plain),
            goal=at_most(1.02),
            detail={
                "avrdude_s": [avrdude.whole_s for avrdude, _ in plain],
                "edged_s": [edged.whole_s for _, edged in plain],
            },
            load=load,
        ),
        Figure(
            name="flash.transfer",
            what="the same, only while pages move (write, read back)",
            unit="ratio",
            against="avrdude's own count of its two phases",
            samples=tuple(edged.transfer_s / avrdude.transfer_s for avrdude, edged in plain),
            goal=at_most(1.02),
            load=load,
        ),
        _utilisation("avrdude", STOP_AND_WAIT, moved, [avrdude for avrdude, _ in plain], load),
        _utilisation("edged", OVERLAPPED, moved, [edged for _, edged in plain], load),
        Figure(
            name="flash.job",
            what="a whole job (trust, fetch, read-out of the fallback, write, read back, boot, health), wall time",
            unit="ratio",
            against="avrdude: read the flash, then write and verify",
            samples=tuple(edged.whole_s / avrdude.whole_s for avrdude, edged in whole),
            detail={
                "avrdude_s": [avrdude.whole_s for avrdude, _ in whole],
                "edged_s": [edged.whole_s for _, edged in whole],
                "edged_s_median": median(edged.whole_s for _, edged in whole),
            },
        ),
    ]


def _utilisation(who: str, ceiling: float, moved_bytes: int, runs: list[Took], load: float) -> Figure:
    of_line = [moved_bytes / run.transfer_s / LINE_BYTES_PER_S for run in runs]
    return Figure(
        name=f"flash.{who}_utilisation",
        what=f"{who}: utilisation while pages move",
        unit="ratio",
        against=f"the ceiling of how it asks, {ceiling:.1%} of the line",
        samples=tuple(used / ceiling for used in of_line),
        detail={"of_line": of_line},
        load=load,
    )
