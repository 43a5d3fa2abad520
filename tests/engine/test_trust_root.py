"""A root of trust that is there and cannot be read is a refusal, not the end of the daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from engine_kit import Place, Publisher

from edged.errors import Reason, Refused
from edged.testing.node import life


def test_a_root_that_cannot_be_read_is_said(
    tmp_path: Path, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "state", publisher)
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name.endswith("root.json"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            monkeypatch.setattr(Path, "read_bytes", read_bytes)
            with pytest.raises(Refused, match="Permission denied") as caught:
                await node.trust.refresh()
            assert caught.value.reason is Reason.TRUST_MISSING
            assert node.trust.failure is caught.value

    asyncio.run(run())
