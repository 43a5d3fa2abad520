"""Resumable, bounded download of one signed file from https, http or a folder.

What signed metadata say (length, SHA-256, chunk index) decides alone what is kept: a server, a mirror, a
cache or a USB stick is only believed chunk by chunk. So http will do where https is not to be had. Nothing
beyond the signed length is ever written.

A cut costs the chunk that was cut. A killed process may lose what had arrived at that moment and was not yet
written, 64 KiB at most, and a power cut what was not yet on the disk, ``sync_bytes`` at most.

Which answer means what:

- Refused: bytes arrived that are not the signed ones (CHUNK_MISMATCH, HASH_MISMATCH), or a file of another
  length is offered or sent (LENGTH_MISMATCH).
- Transient(FETCH_FAILED): everything else that goes wrong on the way, 404 and 410 included: a mirror may lag
  behind the metadata, and an absent file proves nothing about the release. Also redirects that are not
  followed.
- Transient(DISK_FULL, STORAGE_FAILED): the node's own disk.
- Permanent(UNSUPPORTED): a kind of address that this module does not know.

It verifies no signature, keeps no store of files, and decides about no further attempt.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit
from weakref import WeakValueDictionary

from edged_firmware.bandwidth import BandwidthCap
from edged_firmware.chunks import ChunkIndex
from edged_firmware.errors import Permanent, Reason, Refused, Transient
from edged_firmware.image import FileSource
from edged_firmware.part_file import Expected, PartFile, note_path, part_path

if TYPE_CHECKING:
    import aiohttp

__all__ = ["BandwidthCap", "Expected", "Fetched", "Fetcher", "note_path", "part_path"]

P = ParamSpec("P")
T = TypeVar("T")
Count = Callable[[str, int], None]

_PIECE_BYTES = 64 * 1024
#: So many bytes must arrive within the stall time. More than one, or a byte now and then holds a download for
#: ever.
_STALL_BYTES = 512
_MAX_REDIRECTS = 5
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True, slots=True)
class Fetched:
    """How a file was come by, in bytes: what was good at the start, and what came over the wire."""

    resumed_bytes: int
    fetched_bytes: int


class Fetcher:
    """Downloads files, several at once if asked; two downloads to one destination come one after the other.

    - ``session``: the caller's, who closes it; or what gives it, called once per http download. A session
      that carries ``auth`` of its own makes redirects unfollowed, since the library would send it to the
      other host; an Authorization header of the session is kept from other hosts by the library.
    - ``cap``: shared by all downloads of all fetchers that were given it.
    - ``count``: called with the kind of source ("https", "http", "file") and the bytes that arrived from it,
      good or not.
    - ``restarted``: called with the kind of source and the bytes that it sends again because it would not go
      on from where the part ends.
    - ``stall_s``: seconds within which an answer must begin, and then 512 more bytes arrive each time. Time
      spent waiting for ``cap`` does not count.
    - ``sync_bytes``: a power cut loses no more than these, and one chunk.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession | Callable[[], aiohttp.ClientSession],
        cap: BandwidthCap | None = None,
        count: Count | None = None,
        *,
        restarted: Count | None = None,
        stall_s: float = 30.0,
        sync_bytes: int = 4 * 1024 * 1024,
    ) -> None:
        self._session = session
        self._cap = cap
        self._count = count
        self._restarted = restarted
        self._stall_s = stall_s
        self._sync_bytes = sync_bytes
        self._piece = min(_PIECE_BYTES, cap.piece_bytes) if cap else _PIECE_BYTES
        self._locks: WeakValueDictionary[Path, asyncio.Lock] = WeakValueDictionary()

    async def fetch(
        self,
        url: str,
        dest: Path,
        expect: Expected,
        index: ChunkIndex | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Fetched:
        """Have ``dest`` hold the signed file, lastingly; at once where it does already.

        ``url`` is https, http, file or a plain path. ``on_progress`` is called with the bytes that are good
        and on disk. A part that a cut, an error or a cancellation left behind is verified and gone on with,
        from whatever source; without an ``index`` (the index itself, a small file) it starts over. Raises as
        the module says.
        """
        kind = _kind(url)
        lock = self._locks.setdefault(dest, asyncio.Lock())
        async with lock:
            part = PartFile(dest, expect, index, self._sync_bytes)
            if await _joined(part.is_done):
                return Fetched(expect.length, 0)
            return await self._fetch_part(_Download(url, kind, part, self._count, on_progress))

    async def _fetch_part(self, download: _Download) -> Fetched:
        part = download.part
        try:
            await _joined(part.open)
            download.resumed = part.have
            download.report()
            if part.have < part.length:
                await (self._from_folder if download.kind == "file" else self._from_server)(download)
            await _joined(part.finish)
        finally:
            part.close()
        return Fetched(download.resumed, download.arrived)

    async def _from_folder(self, download: _Download) -> None:
        part, path = download.part, _folder_path(download.url)
        with _translated(download.shown):
            size = (await asyncio.to_thread(path.stat)).st_size
        _check_length(download.shown, size, part.length)
        async with AsyncExitStack() as stack:
            with _translated(download.shown):
                source = await stack.enter_async_context(FileSource(path))
            read = partial(self._read_folder, download, source)
            await self._pour(download, part.have, read)

    async def _read_folder(self, download: _Download, source: FileSource) -> bytes:
        # No two reads are under way, and each goes on from where the part and what came so far end.
        at = download.resumed + download.arrived
        with _translated(download.shown):
            return download.arrive(await source.read_at(at, min(self._piece, download.part.length - at)))

    async def _from_server(self, download: _Download) -> None:
        import aiohttp

        session = self._session if isinstance(self._session, aiohttp.ClientSession) else self._session()
        # The second time round is for a server or a cache that makes a mess of ranges.
        for ranged in (download.part.have > 0, False):
            async with await self._ask(session, download, ranged) as response:
                start = _start(response, download, ranged)
                if start is not None:
                    await self._receive(download, response, start)
                    return

    async def _ask(
        self, session: aiohttp.ClientSession, download: _Download, ranged: bool
    ) -> aiohttp.ClientResponse:
        import aiohttp

        headers = {"Accept-Encoding": "identity"}
        if ranged:
            headers["Range"] = f"bytes={download.part.have}-"
            validator = await _joined(download.part.validator, download.shown)
            if validator:
                headers["If-Range"] = validator
        with _translated(download.shown):
            async with asyncio.timeout(self._stall_s):
                return await session.get(
                    download.url,
                    headers=headers,
                    allow_redirects=session.auth is None,
                    max_redirects=_MAX_REDIRECTS,
                    raise_for_status=False,
                    timeout=aiohttp.ClientTimeout(total=None),
                )

    async def _receive(self, download: _Download, response: aiohttp.ClientResponse, start: int) -> None:
        part = download.part
        if start < part.have and self._restarted:
            self._restarted(download.kind, part.have - start)
        await _joined(part.remember, download.shown, _validator(response))

        async def read() -> bytes:
            with _translated(download.shown):
                return await self._read_some(download, response.content)

        await self._pour(download, start, read)

    async def _read_some(self, download: _Download, content: aiohttp.StreamReader) -> bytes:
        """The next bytes of the body, enough of them to be no stall; nothing at its end."""
        some = bytearray()
        async with asyncio.timeout(self._stall_s):
            while len(some) < _STALL_BYTES:
                data = download.arrive(await _read_or_salvage(content, self._piece))
                if not data:
                    break
                some += data
        return bytes(some)

    async def _pour(self, download: _Download, at: int, read: Callable[[], Awaitable[bytes]]) -> None:
        """Put all that ``read`` gives into the part, from ``at`` on, each chunk as soon as it is whole."""
        part, held = download.part, bytearray()
        while data := await read():
            held += data
            whole = part.whole(at, len(held))
            if whole:
                await _joined(part.add, at, bytes(held[:whole]))
                del held[:whole]
                at += whole
                download.report()
            if at + len(held) > part.length:
                _check_length(download.shown, at + len(held), part.length)
            if self._cap:
                await self._cap.take(len(data))
        if at < part.length:
            raise _failed(download.shown, f"the body ended after {at + len(held)} of {part.length} bytes")


@dataclass(slots=True)
class _Download:
    """One call of ``fetch``: what is wanted, and the bytes so far."""

    url: str
    kind: str
    part: PartFile
    count: Count | None
    on_progress: Callable[[int], None] | None
    resumed: int = 0
    arrived: int = 0

    @property
    def shown(self) -> str:
        """The address without what may be secret: user, password, query."""
        if self.kind == "file":
            return self.url
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def arrive(self, data: bytes) -> bytes:
        if data:
            self.arrived += len(data)
            if self.count:
                self.count(self.kind, len(data))
        return data

    def report(self) -> None:
        if self.on_progress:
            self.on_progress(self.part.have)


async def _joined(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``call`` in a thread; returns, or lets a cancellation through, only when the thread is done with it.

    Else the part's descriptor could be closed, and its number be another file's, while a thread writes to it.
    """
    future = asyncio.get_running_loop().run_in_executor(None, partial(call, *args, **kwargs))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        raise


async def _read_or_salvage(content: aiohttp.StreamReader, n_bytes: int) -> bytes:
    """Up to ``n_bytes`` as soon as there are some; after an error first those that came before it.

    The library raises the error and keeps what it has, up to 128 KiB: on a bad link that is all there ever is.
    """
    try:
        return await content.read(n_bytes)
    except _io_errors():
        rest = getattr(content, "_read_nowait", lambda _: b"")(n_bytes)
        if not rest:
            raise
        return bytes(rest)


def _kind(url: str) -> str:
    """The kind of source. Raises Permanent(UNSUPPORTED)."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return "file"
    kind = scheme.lower()
    local = rest.startswith(("/", "localhost/"))
    if kind in ("http", "https") or (kind == "file" and local):
        return kind
    raise Permanent(Reason.UNSUPPORTED, f"{scheme}:// is not known here; https, http, file:/// and paths are")


def _folder_path(url: str) -> Path:
    return Path(unquote(urlsplit(url).path)) if "://" in url else Path(url)


def _start(response: aiohttp.ClientResponse, download: _Download, ranged: bool) -> int | None:
    """The offset of the body's first byte; None where a range was asked for and the answer is of no use."""
    part, shown = download.part, download.shown
    if response.status == 200:
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise _failed(shown, "the body is compressed, against the request")
        if response.content_length is not None:
            _check_length(shown, response.content_length, part.length)
        return 0
    if ranged and response.status == 206 and _is_rest(response, part):
        return part.have
    if ranged and response.status in (206, 416):
        return None
    raise _failed(shown, f"status {response.status}")


def _is_rest(response: aiohttp.ClientResponse, part: PartFile) -> bool:
    """Whether the range sent (RFC 9110, 14.4) begins where the part ends and lies in a file of its length."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if not match:
        return False
    first, last, total = match.groups()
    return int(first) == part.have and int(last) < part.length and total in ("*", str(part.length))


def _validator(response: aiohttp.ClientResponse) -> str | None:
    """What is fit for If-Range (RFC 9110, 13.1.5): a strong entity tag, else the date of the last change."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _check_length(shown: str, length: int, expected: int) -> None:
    if length != expected:
        text = f"{shown}: {length} bytes or more are offered, the metadata say {expected}"
        raise Refused(Reason.LENGTH_MISMATCH, text)


@contextmanager
def _translated(shown: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise _failed(shown, "stalled: too little came in time") from error
    except _io_errors() as error:
        # Not the whole of the library's text: it may hold the address with what is secret in it.
        raise _failed(shown, getattr(error, "strerror", None) or type(error).__name__) from error
    except Transient as error:
        raise _failed(shown, error.detail) from error


def _io_errors() -> tuple[type[Exception], ...]:
    """The library's and the system's. The library is loaded on use: a node that downloads nothing is 9 MiB smaller."""
    import aiohttp

    return aiohttp.ClientError, OSError


def _failed(shown: str, text: str) -> Transient:
    return Transient(Reason.FETCH_FAILED, f"{shown}: {text}")
