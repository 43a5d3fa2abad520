"""What every test of the CAN mapper has: the secret that unlocks the simulated controller."""

from __future__ import annotations

from pathlib import Path

import pytest
from can_kit import secret


@pytest.fixture(autouse=True)
def credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret(monkeypatch, tmp_path)
