"""udsoncan with can-isotp and edged flash the same image into the same controller, over the same serial adapter.

Pairs, in alternating order: sessions, key, erase, download, check with a checksum; then what the controller holds. Once on a
bus of 500 kbit/s, where both wait for the bus, and once on one without limit, where each is as fast as it can be. The peer
reads its image from memory; edged verifies every byte as it reads it. CPU is that of the client's process, per megabyte.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import can
import isotp
import udsoncan
from udsoncan.client import Client
from udsoncan.connections import PythonIsoTpConnection

import edged_can
from bench.can_bus import LONGEST_BLOCK
from bench.figures import Figure, at_least, at_most, median
from edged.api import Device, Image, Phase, SupportsFirmware
from edged.links import LinkPool, device_env
from edged_can.address import CanAddress
from edged_can.frames import ceiling_bytes_per_s
from edged_firmware.chunks import ChunkIndex
from edged_firmware.image import MemorySource, pack

_BASE: Final = 0x08000000
_BITRATE: Final = 500_000
_CHUNK_BYTES: Final = 4096
_FREE_PAIRS: Final = 41
"""A quarter of a second each, which another program on the machine stretches by half."""
_SECRET: Final = b"\x5a\xa5\x0f\xf0"
_CEILING: Final = ceiling_bytes_per_s(
    CanAddress("slcan", "", _BITRATE), extended=False, fd=False, frame_bytes=8, overhead=1
)


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of wall time, of it while blocks were sent, and of the processor."""

    whole_s: float
    transfer_s: float
    cpu_s: float


@contextmanager
def _controller(bitrate: int, size: int) -> Iterator[str]:
    """The port of a fresh controller, in a process of its own; at the end it must have stored the image once."""
    command = [sys.executable, "-m", "bench.can_bus", str(bitrate)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        if f'"written": {size},' not in process.stdout.read():
            raise RuntimeError("the controller did not store the image once")


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def by_edged(bitrate: int, data: bytes) -> Took:
    """Through the mapper, as the engine does it."""
    with _controller(bitrate, len(data)) as port:
        return asyncio.run(_stage(port, data))


async def _stage(port: str, data: bytes) -> Took:
    (spec,) = edged_can.edged_mappers()
    links = {link.scheme: link for link in edged_can.edged_links()}
    table = {
        "sequence": ["extended_session", "programming_session", "security_access"],
        "security": {"algorithm": "bench"},
        "check": {"parameters": ["crc32"]},
        # the peer does not wait for controllers that reset either
        "settle_s": 0,
    }
    device = Device(
        id="ecu",
        model="ecu",
        mapper=spec.name,
        address=f"can:slcan@{port}@{_BITRATE}",
        flash_base=_BASE,
        config=_parsed(spec.parse_config, table),
    )
    file = pack([(_BASE, data)])
    moved: list[float] = []

    def progress(phase: Phase, done_bytes: int, total_bytes: int) -> None:
        if phase is Phase.WRITE:
            moved.append(time.monotonic())

    async with spec.connect(device, device_env(device.id, LinkPool(links))) as session:
        assert isinstance(session, SupportsFirmware)
        image = await Image.open(MemorySource(file), ChunkIndex.build(file, _CHUNK_BYTES))
        began, cpu = time.monotonic(), _cpu_s()
        await session.stage(image, progress)
        return Took(time.monotonic() - began, moved[-1] - moved[0], _cpu_s() - cpu)


def _parsed(parse: Callable[[dict[str, object]], object], table: dict[str, object]) -> object:
    """With the bench's own key, which is no secret."""
    from edged_can import security

    security.BUILT_IN = {**security.BUILT_IN, "bench": lambda seed, secret, level: _key(seed)}  # type: ignore[misc]
    return parse(table)


def _key(seed: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(seed, _SECRET, strict=True))


def by_udsoncan(bitrate: int, data: bytes) -> Took:
    """As somebody writes it with udsoncan and can-isotp."""
    with _controller(bitrate, len(data)) as port:
        bus = can.Bus(
            interface="slcan",
            channel=port,
            bitrate=_BITRATE,
            timeout=0.1,
            sleep_after_open=0.1,
            ignore_config=True,
        )
        address = isotp.Address(isotp.AddressingMode.Normal_11bits, txid=0x7E0, rxid=0x7E8)
        stack = isotp.CanStack(bus=bus, address=address, params={"tx_padding": 0xCC})
        config: dict[str, Any] = dict(udsoncan.configs.default_client_config)
        config |= {
            "security_algo": lambda level, seed, params=None: _key(seed),
            "use_server_timing": False,
            "p2_timeout": 4,
        }
        try:
            with Client(PythonIsoTpConnection(stack), request_timeout=10, config=config) as client:
                return _flash(client, data)
        finally:
            bus.shutdown()


def _flash(client: Client, data: bytes) -> Took:
    began, cpu = time.monotonic(), _cpu_s()
    client.change_session(3)
    client.change_session(2)
    client.unlock_security_access(1)
    client.start_routine(0xFF00, b"\x44" + _BASE.to_bytes(4, "big") + len(data).to_bytes(4, "big"))
    answer = client.request_download(udsoncan.MemoryLocation(_BASE, len(data), 32, 32))
    size = min(answer.service_data.max_length, LONGEST_BLOCK) - 2
    moved = []
    for number, offset in enumerate(range(0, len(data), size), 1):
        client.transfer_data(number & 0xFF, data[offset : offset + size])
        moved.append(time.monotonic())
    client.request_transfer_exit()
    checked = client.start_routine(0xFF01, zlib.crc32(data).to_bytes(4, "big"))
    if checked.service_data.routine_status_record != b"\x00":
        raise RuntimeError("the controller does not hold the image")
    return Took(time.monotonic() - began, moved[-1] - moved[0], _cpu_s() - cpu)


def _pairs(count: int, bitrate: int, data: bytes) -> list[tuple[Took, Took]]:
    """``count`` times (peer, edged), each time in the other order."""
    pairs = []
    for number in range(count):
        if number % 2:
            late = by_edged(bitrate, data)
            pairs.append((by_udsoncan(bitrate, data), late))
        else:
            pairs.append((by_udsoncan(bitrate, data), by_edged(bitrate, data)))
    return pairs


def run(*, quick: bool) -> list[Figure]:
    """Time against time, both against the bus, and what it costs."""
    count, free_count = (1, 1) if quick else (7, _FREE_PAIRS)
    data = random.Random(7).randbytes(12_000 if quick else 60_000)
    paced, paced_load = _pairs(count, _BITRATE, data), round(os.getloadavg()[0], 2)
    free, free_load = _pairs(free_count, 0, data), round(os.getloadavg()[0], 2)
    moved = len(data) - (LONGEST_BLOCK - 2)
    megabytes = len(data) / 1e6
    peer = "udsoncan with can-isotp, same controller and adapter, in turn"
    return [
        _ratio(
            "can.paced",
            f"{len(data):,} bytes by UDS at 500 kbit/s: edged / udsoncan, wall time",
            peer,
            paced,
            paced_load,
        ),
        *(
            Figure(
                name=f"can.{name}_share",
                what=f"{name}: share of the bus while blocks are sent",
                unit="ratio",
                against=f"{_CEILING / 1000:.1f} kB/s, what 500 kbit/s carry in frames of 7 bytes",
                samples=tuple(moved / pair[which].transfer_s / _CEILING for pair in paced),
                goal=at_least(0.90) if which else None,
                load=paced_load,
            )
            for which, name in enumerate(("udsoncan", "edged"))
        ),
        _ratio("can.free", "the same on a bus without limit", peer, free, free_load),
        Figure(
            name="can.cpu",
            what="CPU of the client per megabyte, bus without limit "
            f"(edged: {median(edged.cpu_s for _, edged in free) / megabytes:.2f} s)",
            unit="ratio",
            against=peer,
            samples=tuple(edged.cpu_s / other.cpu_s for other, edged in free),
            detail={
                "edged_s_per_mb": median(edged.cpu_s for _, edged in free) / megabytes,
                "udsoncan_s_per_mb": median(other.cpu_s for other, _ in free) / megabytes,
                "edged_s_per_mb_paced": median(edged.cpu_s for _, edged in paced) / megabytes,
                "udsoncan_s_per_mb_paced": median(other.cpu_s for other, _ in paced) / megabytes,
            },
            load=free_load,
        ),
    ]


def _ratio(name: str, what: str, against: str, pairs: list[tuple[Took, Took]], load: float) -> Figure:
    return Figure(
        name=name,
        what=what,
        unit="ratio",
        against=against,
        samples=tuple(edged.whole_s / other.whole_s for other, edged in pairs),
        goal=at_most(1.02),
        detail={
            "edged_s": [edged.whole_s for _, edged in pairs],
            "udsoncan_s": [other.whole_s for other, _ in pairs],
        },
        load=load,
    )
