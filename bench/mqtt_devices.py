"""``python -m bench.mqtt_devices``: devices that pull, in a process of their own; the same for whoever serves them.

Settings are one JSON object on standard input: port, devices, size, chunk, qos (of the requests, 0 or 1). Each device connects,
says what it runs, waits for the offer, pulls chunk after chunk, and says that it runs the new version. Prints one JSON object:
seconds from the first offer to the last chunk, and the latency of each chunk at the median and at the 99th percentile.
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time


def _text(value: str) -> bytes:
    return struct.pack(">H", len(value)) + value.encode()


def _length(count: int) -> bytes:
    out = b""
    while True:
        count, low = divmod(count, 128)
        out += bytes([low | (128 if count else 0)])
        if not count:
            return out


def _publish(topic: str, payload: bytes, qos: int = 0, number: int = 0) -> bytes:
    """``number`` makes the packet's identifier, which a message with ``qos`` 1 has, and which is never 0."""
    identifier = struct.pack(">H", number % 65_535 + 1) if qos else b""
    body = _text(topic) + identifier + payload
    return bytes([0x30 | qos << 1]) + _length(len(body)) + body


async def _packet(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Topic and payload of the next message; of another packet an empty topic."""
    first = (await reader.readexactly(1))[0]
    length = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    body = await reader.readexactly(length)
    if first >> 4 != 3:
        return "", body
    size = body[0] << 8 | body[1]
    return body[2 : 2 + size].decode(), body[2 + size :]


async def _device(
    number: int, port: int, size: int, chunk: int, qos: int, took: list[float]
) -> tuple[float, float]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    body = _text("MQTT") + b"\4\x82\0\0" + _text("") + _text(f"token-{number}")
    writer.write(b"\x10" + _length(len(body)) + body)
    await reader.readexactly(4)
    told = {"current_fw_title": "pump", "current_fw_version": "1"}
    writer.write(_publish("v1/devices/me/telemetry", json.dumps(told).encode()))
    while (await _packet(reader))[0] != "v1/devices/me/attributes":
        pass
    begun = time.perf_counter()
    got = index = 0
    asked = str(chunk).encode()
    while got < size:
        sent = time.perf_counter()
        writer.write(_publish(f"v2/fw/request/1/chunk/{index}", asked, qos, index))
        topic = ""
        while not topic.startswith("v2/"):
            topic, payload = await _packet(reader)
        took.append(time.perf_counter() - sent)
        got += len(payload)
        index += 1
    ended = time.perf_counter()
    told = {"current_fw_title": "pump", "current_fw_version": "2", "fw_state": "UPDATED"}
    writer.write(_publish("v1/devices/me/telemetry", json.dumps(told).encode()))
    # DISCONNECT: a server may keep the connection for what comes next
    writer.write(b"\xe0\0")
    writer.close()
    await writer.wait_closed()
    return begun, ended


async def main() -> None:
    settings = json.loads(sys.stdin.readline())
    took: list[float] = []
    port, size, chunk, qos = (settings[name] for name in ("port", "size", "chunk", "qos"))
    spans = await asyncio.gather(
        *(_device(number, port, size, chunk, qos, took) for number in range(settings["devices"]))
    )
    took.sort()
    seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
    found = {"seconds": seconds, "median_s": took[len(took) // 2], "p99_s": took[len(took) * 99 // 100]}
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main())
