"""The images on this node's disk: fetched and verified, read out of a device, opened for flashing."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from edged.api import Image
from edged.domain.job import Fallback
from edged.engine.observer import Observer
from edged.errors import Reason, Transient
from edged.store.artifacts import Artifacts
from edged_firmware.chunks import ChunkIndex
from edged_firmware.durable import write_durably
from edged_firmware.facts import ParamValue, ReleaseRef, SignedTarget, VerifiedRelease
from edged_firmware.fetch import Expected, Fetcher
from edged_firmware.image import FileSource, Label, pack

Progress = Callable[[int, int], None]
READ_OUT_CHUNK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ImageKey:
    """An image on disk by what it is: digests of the image file and of its chunk index; how it is flashed, and what it is
    called."""

    image_sha256: str
    index_sha256: str
    opaque: bool
    params: tuple[tuple[str, ParamValue], ...] = ()
    label: Label | None = None

    @classmethod
    def of_release(cls, release: VerifiedRelease) -> ImageKey:
        facts = release.facts
        params = tuple(sorted(facts.flash.params.items()))
        label = Label(facts.name, facts.identifies_as)
        return cls(release.image.sha256, release.index.sha256, facts.format == "opaque", params, label)

    @classmethod
    def of_fallback(cls, fallback: Fallback) -> ImageKey:
        params = tuple(sorted(fallback.params.items()))
        label = None
        if fallback.release and fallback.identifies_as:
            label = Label(ReleaseRef.parse(fallback.release).name, fallback.identifies_as)
        return cls(fallback.image_sha256, fallback.index_sha256, fallback.opaque, params, label)


class Images:
    """``repository`` is the URL or folder that releases come from; empty where the node has none."""

    def __init__(self, artifacts: Artifacts, fetcher: Fetcher, repository: str, observer: Observer) -> None:
        self._artifacts = artifacts
        self._fetcher = fetcher
        self._repository = repository.rstrip("/")
        self._observer = observer
        self._alone: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def verify(self, key: ImageKey) -> bool:
        """Are both files on disk, with the digests that they are named by? Reads and hashes all of them."""
        return await self._is_whole(key.index_sha256) and await self._is_whole(key.image_sha256)

    async def _is_whole(self, sha256: str) -> bool:
        path = await self._artifacts.locate(sha256)
        return path is not None and await asyncio.to_thread(_digest, path) == sha256

    async def missing_bytes(self, release: VerifiedRelease) -> int:
        """How many bytes a fetch of ``release`` would bring."""
        wanted = 0
        for target in (release.index, release.image):
            if await self._artifacts.locate(target.sha256) is None:
                wanted += target.length
        return wanted

    async def fetch(self, release: VerifiedRelease, progress: Progress) -> None:
        """Bring index and image to disk, as far as they are not there whole; goes on where it was cut.

        One fetch at a time per image, however many devices want it. Raises ``Transient`` (no answer, disk full) or
        ``Refused`` (not what was signed).
        """
        async with self._lock(release.index.sha256):
            if not await self._is_whole(release.index.sha256):
                await self._bring(release.index, None, "index", progress)
        async with self._lock(release.image.sha256):
            if not await self._is_whole(release.image.sha256):
                index = await self._index(release.index.sha256)
                await self._bring(release.image, index, "image", progress)

    def _lock(self, sha256: str) -> asyncio.Lock:
        """One writer per file: several devices may want the same release, or hold the same flash."""
        return self._alone.setdefault(sha256, asyncio.Lock())

    async def _bring(
        self, target: SignedTarget, index: ChunkIndex | None, kind: str, progress: Progress
    ) -> None:
        if not self._repository:
            raise Transient(Reason.FETCH_FAILED, "the node has no release repository: set trust.repository")
        await self._artifacts.room_for(target.length, target.sha256)
        url = f"{self._repository}/targets/{target.url_path}"
        partial = self._artifacts.partial(target.sha256)
        await self._fetcher.fetch(
            url,
            partial,
            Expected(target.length, target.sha256),
            index,
            lambda done: progress(done, target.length),
        )
        await self._artifacts.adopt(partial, kind, url, target.sha256)

    async def keep(self, segments: Sequence[tuple[int, bytes]], source: str) -> ImageKey:
        """Keep bytes that a device holds, as an image with an index of its own."""
        container = pack(segments)
        index = ChunkIndex.build(container, READ_OUT_CHUNK_BYTES).encode()
        await self._artifacts.room_for(len(container) + len(index))
        index_sha256 = await self._keep_file(index, "index", source)
        return ImageKey(await self._keep_file(container, "read_out", source), index_sha256, opaque=False)

    async def _keep_file(self, data: bytes, kind: str, source: str) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        async with self._lock(sha256):
            partial = self._artifacts.partial(sha256)
            await asyncio.to_thread(write_durably, partial, data)
            return await self._artifacts.adopt(partial, kind, source, sha256)

    @asynccontextmanager
    async def open(self, key: ImageKey) -> AsyncIterator[Image]:
        """The verified reader. Raises ``Refused`` where the files are not what ``key`` says."""
        index = await self._index(key.index_sha256)
        async with FileSource(self._artifacts.path(key.image_sha256)) as source:
            observe = self._observer.chunk_verified
            yield await Image.open(source, index, key.opaque, observe, dict(key.params), key.label)

    async def _index(self, sha256: str) -> ChunkIndex:
        path = self._artifacts.path(sha256)
        try:
            return ChunkIndex.decode(await asyncio.to_thread(path.read_bytes))
        except OSError as exc:
            raise Transient(Reason.STORAGE_FAILED, f"{path}: {exc.strerror}") from exc

    async def discard(self, key: ImageKey) -> None:
        """Forget files that turned out to be damaged; the next fetch brings them anew."""
        for sha256 in (key.image_sha256, key.index_sha256):
            # what cannot be removed now is still not whole, and is replaced
            with suppress(OSError):
                await asyncio.to_thread(self._artifacts.path(sha256).unlink)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
