"""What the engine costs where no wire bounds it: verified chunks per second, against SHA-256 alone over the same bytes.

The way is the one of a real job: an image file in the artifact folder, opened with its chunk index, read by a mapper that keeps
what it reads in memory and reports each chunk to the engine's meter. The peer hashes the same chunks, which lie in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.figures import Figure, at_least
from bench.shelf import Shelf, meter, shelf, watched
from edged.api import Image, Phase, Progress
from edged.engine.images import ImageKey

CHUNK_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds of wall time and of CPU, all threads."""

    wall_s: float
    cpu_s: float


def _now() -> Took:
    return Took(time.perf_counter(), time.process_time())


def _since(began: Took) -> Took:
    now = _now()
    return Took(now.wall_s - began.wall_s, now.cpu_s - began.cpu_s)


def _hash_alone(data: bytes) -> Took:
    view, began = memoryview(data), _now()
    for offset in range(0, len(data), CHUNK_BYTES):
        hashlib.sha256(view[offset : offset + CHUNK_BYTES]).digest()
    return _since(began)


async def _stage(image: Image, progress: Progress, flash: bytearray) -> None:
    """A mapper without a wire."""
    (segment,) = image.segments
    for offset in range(0, segment.length, CHUNK_BYTES):
        size = min(CHUNK_BYTES, segment.length - offset)
        flash[offset : offset + size] = await image.read(0, offset, size)
        progress(Phase.WRITE, offset + size, segment.length)


async def _read(image: Image) -> None:
    (segment,) = image.segments
    for offset in range(0, segment.length, CHUNK_BYTES):
        await image.read(0, offset, min(CHUNK_BYTES, segment.length - offset))


async def _timed_read(images: Shelf, key: ImageKey) -> Took:
    began = _now()
    async with images.images.open(key) as image:
        await _read(image)
    return _since(began)


async def _timed_stage(images: Shelf, key: ImageKey, data: bytes) -> Took:
    flash = bytearray(len(data))
    began = _now()
    async with images.images.open(key) as image:
        gauge = meter(image.size_bytes)
        await watched(gauge, _stage(image, gauge, flash))
    took = _since(began)
    if flash != data:
        raise RuntimeError("what was staged is not the image")
    return took


async def _measure(size_bytes: int, repeats: int) -> list[Figure]:
    data = os.urandom(size_bytes)
    alone, read, staged = [], [], []
    with tempfile.TemporaryDirectory(prefix="edged-bench-") as folder:
        async with shelf(Path(folder)) as images:
            key = await images.put([(0, data)], CHUNK_BYTES)
            for _ in range(repeats):
                alone.append(_hash_alone(data))
                read.append(await _timed_read(images, key))
                staged.append(await _timed_stage(images, key, data))
    chunks = size_bytes / CHUNK_BYTES
    return [
        Figure(
            name=f"engine.{name}",
            what=what,
            unit="ratio",
            against="hashlib.sha256 over the same chunks in memory",
            samples=tuple(peer.wall_s / mine.wall_s for peer, mine in zip(alone, runs, strict=True)),
            goal=at_least(0.5),
            detail={
                "chunks_per_s": [chunks / mine.wall_s for mine in runs],
                "sha256_alone_chunks_per_s": [chunks / peer.wall_s for peer in alone],
                "cpu_ratio": [peer.cpu_s / mine.cpu_s for peer, mine in zip(alone, runs, strict=True)],
            },
        )
        for name, what, runs in (
            ("read", "verified 64 KiB chunks per second, `image.read`", read),
            ("stage", "verified 64 KiB chunks per second, staged through the engine's meter", staged),
        )
    ]


def run(*, quick: bool) -> list[Figure]:
    """``image.read``, and a whole stage into memory."""
    return asyncio.run(_measure(4 * 2**20 if quick else 256 * 2**20, 1 if quick else 7))
