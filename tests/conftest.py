"""What every test may use."""

from __future__ import annotations

import pytest
from engine_kit import Publisher, published
from hypothesis import settings

pytest_plugins = ["edged.testing.pytest_plugin", "gate"]

# how long an example takes says more about the machine than about the code
settings.register_profile("edged", deadline=None)
settings.load_profile("edged")


@pytest.fixture(scope="session")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    """A signed repository with the releases of :func:`engine_kit.published`; to be copied before it is changed."""
    return published(tmp_path_factory.mktemp("publisher"))
