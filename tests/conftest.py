"""What every test may use."""

from __future__ import annotations

import os

import pytest
from engine_kit import Publisher, published
from hypothesis import settings

pytest_plugins = ["edged.testing.pytest_plugin"]

# how long an example takes says more about the machine than about the code
settings.register_profile("edged", deadline=None)
settings.load_profile("edged")


@pytest.fixture(scope="session")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    """A signed repository with the releases of :func:`engine_kit.published`; to be copied before it is changed."""
    return published(tmp_path_factory.mktemp("publisher"))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skip is for a contributor's machine that lacks a package; the gate of a landing (``CI``) skips nothing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
