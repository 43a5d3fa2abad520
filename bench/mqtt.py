"""Devices that pull chunks over MQTT: edged's mapper against a bare responder, which has all in memory and checks nothing.

Both run in a process of their own with the same devices in another, in turn. The bare responder is the shortest server that
the protocol allows: asyncio streams, no credentials, no limits, no verification, no progress.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any, Final

from bench.figures import Figure, at_least, at_most
from edged.testing.ports import free_port
from edged_firmware.chunks import ChunkIndex, default_chunk_size

_CHUNK: Final = 4096
_ROUNDS: Final = 41
_ROUNDS_ACKED: Final = 7
"""Single pairs lie far apart, since a round takes half a second: a median of few says little."""


def run(*, quick: bool = False) -> list[Figure]:
    """Pulls per second one at a time, and two hundred devices at once."""
    size = 256 * 1024 if quick else 8 * 1024 * 1024
    pairs = [(_served("edged", 1, size), _served("bare", 1, size)) for _ in range(1 if quick else _ROUNDS)]
    acked = [
        (_served("edged", 1, size, 1), _served("bare", 1, size, 1))
        for _ in range(1 if quick else _ROUNDS_ACKED)
    ]
    devices, small = (10, 64 * 1024) if quick else (200, 512 * 1024)
    fleet = [
        (_served("edged", devices, small), _served("bare", devices, small)) for _ in range(1 if quick else 3)
    ]
    pulls = {"edged_pulls_per_s": [size / _CHUNK / edged["seconds"] for edged, _ in pairs]}
    pulls["bare_pulls_per_s"] = [size / _CHUNK / bare["seconds"] for _, bare in pairs]
    against = "a bare responder, same devices, in turn"
    return [
        Figure(
            name="mqtt.pulls",
            what=f"chunks of {_CHUNK} bytes pulled per second, one device: edged "
            f"(signed in chunks of {default_chunk_size(size)}) / bare responder",
            unit="ratio",
            against=against,
            samples=tuple(bare["seconds"] / edged["seconds"] for edged, bare in pairs),
            goal=at_least(1.0),
            detail=pulls,
        ),
        Figure(
            name="mqtt.pulls_acked",
            what="the same with requests that are acknowledged (QoS 1), as ThingsBoard's client sends them",
            unit="ratio",
            against=against,
            samples=tuple(bare["seconds"] / edged["seconds"] for edged, bare in acked),
            detail={"edged_pulls_per_s": [size / _CHUNK / edged["seconds"] for edged, _ in acked]},
        ),
        Figure(
            name="mqtt.cpu",
            what="processor time of edged for 1 MB pulled over MQTT",
            unit="s",
            against="one core",
            samples=tuple(edged["cpu_s"] / size * 1e6 for edged, _ in pairs),
            detail={"bare_s": [bare["cpu_s"] / size * 1e6 for _, bare in pairs]},
        ),
        Figure(
            name="mqtt.cpu_ratio",
            what="the same: edged / bare responder",
            unit="ratio",
            against=against,
            samples=tuple(edged["cpu_s"] / bare["cpu_s"] for edged, bare in pairs),
        ),
        Figure(
            name="mqtt.fleet",
            what=f"{devices} devices at once: chunks per second, edged / bare responder",
            unit="ratio",
            against=against,
            samples=tuple(bare["seconds"] / edged["seconds"] for edged, bare in fleet),
            detail={"edged_s": [edged["seconds"] for edged, _ in fleet]},
        ),
        Figure(
            name="mqtt.fleet_p99",
            what=f"{devices} devices at once: 99th percentile of a chunk's latency, edged / bare responder "
            f"(edged: {median(edged['p99_s'] for edged, _ in fleet) * 1000:.1f} ms)",
            unit="ratio",
            against=against,
            samples=tuple(edged["p99_s"] / bare["p99_s"] for edged, bare in fleet),
            detail={"edged_p99_s": [edged["p99_s"] for edged, _ in fleet]},
        ),
        Figure(
            name="mqtt.fleet_memory",
            what=f"{devices} devices at once: memory that the serving process grew by, per device",
            unit="KiB",
            against="the verified reader's 1 MiB for each transfer",
            samples=tuple(edged["grown_kib"] / devices for edged, _ in fleet),
            goal=at_most(1280),
        ),
    ]


def _served(who: str, devices: int, size: int, qos: int = 0) -> dict[str, float]:
    """One run of ``who`` as the server, in a process of its own."""
    command = [sys.executable, "-m", "bench.mqtt", who, str(devices), str(size), str(qos)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, float] = json.loads(done.stdout)
    return found


# -- the serving process


async def _pull(port: int, devices: int, size: int, qos: int) -> dict[str, Any]:
    """Start the devices, and wait for what they say."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.mqtt_devices",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    settings = {"port": port, "devices": devices, "size": size, "chunk": _CHUNK, "qos": qos}
    begun = time.process_time()
    out, _ = await process.communicate(json.dumps(settings).encode() + b"\n")
    found: dict[str, Any] = json.loads(out)
    return found | {"cpu_s": time.process_time() - begun}


async def _packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    first = (await reader.readexactly(1))[0]
    length = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return first, await reader.readexactly(length)


def _answer(body: bytes, image: bytes, qos: int) -> bytes:
    """The chunk that is asked for; empty where none is."""
    topic_size = body[0] << 8 | body[1]
    topic, payload = body[2 : 2 + topic_size].decode(), body[2 + topic_size + 2 * qos :]
    if not topic.startswith("v2/fw/request/"):
        return b""
    index, count = int(topic.rpartition("/")[2]), int(payload)
    answer = topic.replace("request", "response").encode()
    whole = len(answer).to_bytes(2, "big") + answer + image[index * count : (index + 1) * count]
    size, left = b"", len(whole)
    while True:
        left, low = divmod(left, 128)
        size += bytes([low | (128 if left else 0)])
        if not left:
            return b"\x30" + size + whole


def _puback(body: bytes) -> bytes:
    begin = 2 + (body[0] << 8 | body[1])
    return b"\x40\2" + body[begin : begin + 2]


async def _bare(devices: int, size: int, qos: int) -> dict[str, Any]:
    image = os.urandom(size)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                first, body = await _packet(reader)
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            if first == 0x10:
                writer.write(b"\x20\2\0\0\x30\x1a\0\x18v1/devices/me/attributes")
            elif answer := _answer(body, image, first >> 1 & 1):
                writer.write(_puback(body) + answer if first & 2 else answer)
                await writer.drain()
            elif b"UPDATED" in body:
                writer.close()
                return

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        return await _pull(server.sockets[0].getsockname()[1], devices, size, qos)


async def _edged(devices: int, size: int, qos: int, folder: Path) -> dict[str, Any]:
    import edged_mqtt
    from edged.api import Device, SupportsFirmware
    from edged.links import LinkPool, device_env
    from edged_firmware.image import FileSource, Image, Label
    from edged_mqtt.config import MqttConfig

    data = os.urandom(size)
    path = folder / "image"
    path.write_bytes(data)
    index = ChunkIndex.build(data, default_chunk_size(size))
    del data
    port = free_port()
    pool = LinkPool({link.scheme: link for link in edged_mqtt.edged_links()})
    (spec,) = edged_mqtt.edged_mappers()

    async def serve(number: int) -> None:
        (folder / f"edged_device-{number}").write_text(f"token-{number}")
        address = f"mqtt:listen@127.0.0.1:{port}/device-{number}"
        device = Device(f"device-{number}", "pump", spec.name, address, config=MqttConfig())
        async with AsyncExitStack() as stack:
            env = device_env(device.id, pool)
            session = await stack.enter_async_context(spec.connect(device, env))
            source = await stack.enter_async_context(FileSource(path))
            image = await Image.open(source, index, opaque=True, label=Label("pump", "2"))
            assert isinstance(session, SupportsFirmware)
            await session.slots()
            await session.stage(image, lambda phase, done, total: None)

    os.environ["CREDENTIALS_DIRECTORY"] = str(folder)
    serving = [asyncio.create_task(serve(number)) for number in range(devices)]
    # all seats are taken by then
    await asyncio.sleep(0.5 + devices / 100)
    found, *_ = await asyncio.gather(_pull(port, devices, size, qos), *serving)
    return found


def _main() -> None:
    who, devices, size, qos = sys.argv[1], *map(int, sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        import edged_mqtt.endpoint  # noqa: F401 - what is loaded anyway is no growth

        before = _peak_kib()
        work = _edged(devices, size, qos, Path(folder)) if who == "edged" else _bare(devices, size, qos)
        found = asyncio.run(work)
        print(json.dumps(found | {"grown_kib": _peak_kib() - before}))


def _peak_kib() -> int:
    # not ru_maxrss: that begins with what the process had that started this one
    told = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in told if line.startswith("VmHWM"))


if __name__ == "__main__":
    _main()
