"""smpclient and edged upload the same image into the same device: MCUboot and Zephyr's SMP server, in QEMU.

Pairs, in alternating order, each on a device that was started for it; both must leave the same bytes in the slot. Each client
is a process of its own, and tells the seconds and the processor time of its upload alone. edged's part is all of ``stage``:
reading the image through its chunk index, checking its hash, asking for the state before and after. The line between client and
QEMU carries 11,520 bytes a second each way, as 115,200 baud do; the processor behind it is QEMU's, which writes flash at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.figures import Figure, at_most, median

ROOT: Final = Path(__file__).parent.parent
# the device and the peer's environment are those of the tests
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "mappers" / "edged_uart")]

import zephyr_kit  # noqa: E402
from peer_kit import peer_python  # noqa: E402

_BODY_BYTES: Final = 16 * 1024

_EDGED: Final = """
import asyncio, json, sys, time
from pathlib import Path
import edged_uart
from edged.api import Device
from edged.links import LinkPool, device_env
from edged_firmware.chunks import ChunkIndex
from edged_firmware.image import FileSource, Image

async def main(port, file, window):
    (spec,) = (spec for spec in edged_uart.edged_mappers() if spec.name == "uart-smp")
    links = {link.scheme: link for link in edged_uart.edged_links()}
    table = {"window": int(window), "boot_loader": "reverts"}
    device = Device("node", "node", spec.name, f"serial:{port}", config=spec.parse_config(table))
    index = ChunkIndex.build(Path(file).read_bytes(), 4096)
    async with spec.connect(device, device_env("node", LinkPool(links))) as session:
        await session.identify()
        async with FileSource(Path(file)) as source:
            image = await Image.open(source, index, opaque=True)
            began, cpu = time.monotonic(), time.process_time()
            await session.stage(image, lambda *_: None)
            print(json.dumps([time.monotonic() - began, time.process_time() - cpu]))

asyncio.run(main(*sys.argv[1:]))
"""

_SMPCLIENT: Final = """
import asyncio, json, sys, time
from smpclient import SMPClient
from smpclient.transport.serial import SMPSerialTransport

async def main(port, file):
    data = open(file, "rb").read()
    async with SMPClient(SMPSerialTransport(), port) as client:
        began, cpu = time.monotonic(), time.process_time()
        async for offset in client.upload(data):
            pass
        assert offset == len(data)
        print(json.dumps([time.monotonic() - began, time.process_time() - cpu]))

asyncio.run(main(*sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of wall time and of the processor."""

    wall_s: float
    cpu_s: float


Client = Callable[[str, Path], list[str]]


def _by_edged(port: str, file: Path) -> list[str]:
    return [sys.executable, "-c", _EDGED, port, str(file), "0"]


def _by_edged_in_turn(port: str, file: Path) -> list[str]:
    return [sys.executable, "-c", _EDGED, port, str(file), "1"]


def _by_smpclient(port: str, file: Path) -> list[str]:
    return [str(peer_python("smpclient")), "-c", _SMPCLIENT, port, str(file)]


def _upload(client: Client, image: bytes) -> Took:
    with tempfile.TemporaryDirectory(prefix="edged-bench-") as folder:
        file = Path(folder) / "image"
        file.write_bytes(image)
        with zephyr_kit.Zephyr(Path(folder), bytes_per_s=zephyr_kit.LINE_BYTES_PER_S) as device:
            device.await_application()
            done = subprocess.run(client(device.port, file), capture_output=True, text=True, check=True)
            if device.slot(1, len(image)) != image:
                raise RuntimeError("the slot does not hold the image")
    return Took(*json.loads(done.stdout))


def run(*, quick: bool = False) -> list[Figure]:
    """Ratios to smpclient: goal 1.0 at most for the time; the processor's for information."""
    image = zephyr_kit.signed("1.0.0", body=bytes(range(256)) * (_BODY_BYTES // 256))
    clients: list[Client] = [_by_smpclient, _by_edged, _by_edged_in_turn]
    took: dict[Client, list[Took]] = {client: [] for client in clients}
    for number in range(1 if quick else 7):
        for client in clients if number % 2 else reversed(clients):
            took[client].append(_upload(client, image))
    peer, edged, in_turn = (took[client] for client in clients)
    against = "smpclient's upload, same device, same file, in turn"
    detail = {
        "image_bytes": len(image),
        "smpclient_s": [one.wall_s for one in peer],
        "edged_s": [one.wall_s for one in edged],
        "edged_one_at_a_time_s": [one.wall_s for one in in_turn],
    }
    return [
        Figure(
            name="smp_upload",
            what=f"{len(image):,} bytes uploaded by SMP and listed by the device: edged / smpclient, wall time",
            unit="ratio",
            against=against,
            samples=tuple(ours.wall_s / theirs.wall_s for ours, theirs in zip(edged, peer, strict=True)),
            goal=at_most(1.0),
            detail=detail,
        ),
        Figure(
            name="smp_upload_one_at_a_time",
            what="the same, with one request at a time as smpclient has it",
            unit="ratio",
            against=against,
            samples=tuple(ours.wall_s / theirs.wall_s for ours, theirs in zip(in_turn, peer, strict=True)),
            goal=at_most(1.0),
        ),
        Figure(
            name="smp_utilisation",
            what="edged by SMP: image bytes a second, of what the line carries",
            unit="ratio",
            against="115,200 baud; base64, frames, headers and CBOR leave 67.5 % of it with this device's buffers",
            samples=tuple(len(image) / one.wall_s / zephyr_kit.LINE_BYTES_PER_S for one in edged),
        ),
        Figure(
            name="smp_cpu",
            what="the same upload: edged / smpclient, processor time of the client",
            unit="ratio",
            against=f"smpclient, {_cpu_s_per_mb(peer, image):.2f} s of the processor for each MB",
            samples=tuple(ours.cpu_s / theirs.cpu_s for ours, theirs in zip(edged, peer, strict=True)),
            detail={
                "edged_cpu_s_per_mb": _cpu_s_per_mb(edged, image),
                "smpclient_cpu_s_per_mb": _cpu_s_per_mb(peer, image),
            },
        ),
        Figure(
            name="smp_cpu_per_mb",
            what="processor time of edged for 1 MB by SMP",
            unit="s",
            against="one core",
            samples=tuple(one.cpu_s / len(image) * 1e6 for one in edged),
        ),
    ]


def _cpu_s_per_mb(took: list[Took], image: bytes) -> float:
    return median(one.cpu_s for one in took) / len(image) * 1e6
