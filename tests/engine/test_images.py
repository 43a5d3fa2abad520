"""Images on disk: an index that is signed but of another image, and leftovers of downloads."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from engine_kit import Place, Publisher

from edged.errors import Reason, Refused
from edged.testing.node import life
from edged_firmware.fetch import part_path


def _progress(done_bytes: int, total_bytes: int) -> None:
    return None


def test_a_signed_index_of_another_image_is_refused(tmp_path: Path, publisher: Publisher) -> None:
    """Both files are what was signed, and do not belong together: nothing of the image is kept."""
    other = publisher.copy(tmp_path / "publisher")
    other.add("4.0.0", bytes(5000), name="other", protocol="fake")
    other.publish()
    place = Place(tmp_path / "state", other)
    place.device()

    async def run() -> Reason:
        async with life(place.config, place.plugins) as node:
            await node.trust.refresh()
            release = await node.trust.resolve("app@2.0.0")
            stranger = await node.trust.resolve("other@4.0.0")
            mixed = replace(release, index=stranger.index)
            with pytest.raises(Refused) as caught:
                await node.images.fetch(mixed, _progress)
            return caught.value.reason

    assert asyncio.run(run()) is Reason.INDEX_MISMATCH


def test_leftovers_of_downloads_go_at_the_next_start(tmp_path: Path, publisher: Publisher) -> None:
    place = Place(tmp_path / "state", publisher)
    partial = tmp_path / "state" / "artifacts" / "partial"
    partial.mkdir(parents=True)
    leftover = part_path(partial / ("a" * 64))
    leftover.write_bytes(b"half")

    async def run() -> None:
        async with life(place.config, place.plugins):
            pass

    asyncio.run(run())
    assert not leftover.exists()
