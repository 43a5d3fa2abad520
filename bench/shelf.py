"""Images on disk as the engine keeps and opens them, without a release behind them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Never, TypeVar

from edged.clock import SystemClock
from edged.config import EngineSettings
from edged.engine.images import ImageKey, Images
from edged.engine.observer import Silent
from edged.engine.transfer import Checkpoints, Meter, Status
from edged.store.artifacts import Artifacts
from edged.store.database import Store
from edged_firmware.chunks import ChunkIndex
from edged_firmware.durable import write_durably
from edged_firmware.fetch import Fetcher
from edged_firmware.image import pack

T = TypeVar("T")
_QUOTA_BYTES = 2**32


@dataclass(frozen=True, slots=True)
class Shelf:
    """The engine's images in a folder of their own."""

    images: Images
    artifacts: Artifacts

    async def put(self, segments: Sequence[tuple[int, bytes]], chunk_bytes: int) -> ImageKey:
        """Keep an image of ``segments``; opened by ``images.open`` like any other."""
        container = pack(segments)
        index = ChunkIndex.build(container, chunk_bytes).encode()
        return ImageKey(
            await self._adopt(container, "image"), await self._adopt(index, "index"), opaque=False
        )

    async def _adopt(self, data: bytes, kind: str) -> str:
        partial = self.artifacts.partial(hashlib.sha256(data).hexdigest())
        await asyncio.to_thread(write_durably, partial, data)
        return await self.artifacts.adopt(partial, kind, "bench")


@asynccontextmanager
async def shelf(folder: Path) -> AsyncIterator[Shelf]:
    """A shelf in ``folder``, which exists."""
    async with Store.open(folder / "edged.db", SystemClock()) as store:
        artifacts = Artifacts(store, folder / "artifacts", _QUOTA_BYTES)
        await artifacts.recover()
        fetcher = Fetcher(_no_session, cap=None, count=Silent().fetched)
        yield Shelf(Images(artifacts, fetcher, "", Silent()), artifacts)


def _no_session() -> Never:
    raise AssertionError("a benchmark downloads nothing")


def meter(image_bytes: int) -> Meter:
    """The engine's meter with its default bounds."""
    settings = EngineSettings()
    return Meter(
        SystemClock(),
        settings.stall_s,
        Checkpoints(settings.checkpoint_bytes, settings.checkpoint_s),
        image_bytes=image_bytes,
        observe_write=Silent().chunk_written,
    )


async def watched(gauge: Meter, call: Awaitable[T]) -> T | None:
    """Await a mapper's call as the engine does, with checkpoints that go nowhere."""
    return await gauge.watch(call, checkpoint=_checkpoint, tick=_tick, stop=asyncio.Event())


async def _checkpoint(done_bytes: int) -> None:
    return None


def _tick(status: Status) -> None:
    return None
