"""Run as a process of its own that fetches and says how far it is, so that it can be killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aiohttp

from edged_firmware.chunks import ChunkIndex
from edged_firmware.fetch import Expected, Fetcher


async def main(url: str, dest: str, length: str, sha256: str, index: str) -> None:
    def say(kind: str, n_bytes: int) -> None:
        print("arrived", n_bytes, flush=True)

    def report(good: int) -> None:
        print("good", good, flush=True)

    decoded = ChunkIndex.decode(Path(index).read_bytes())
    async with aiohttp.ClientSession() as session:
        fetcher = Fetcher(session, count=say)
        await fetcher.fetch(url, Path(dest), Expected(int(length), sha256), decoded, report)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
