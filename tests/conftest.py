"""What every test may use."""

from __future__ import annotations

import pytest
from engine_kit import Publisher, published

pytest_plugins = ["edged.testing.pytest_plugin"]


@pytest.fixture(scope="session")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    """A signed repository with the releases of :func:`engine_kit.published`; to be copied before it is changed."""
    return published(tmp_path_factory.mktemp("publisher"))
