"""What a run of the gate insists on; a plugin of pytest."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a run that skipped a test has failed")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A skip is for a contributor's machine that lacks a package; the gate of a landing (``CI``, make) skips nothing."""
    insists = session.config.getoption("no_skips") or os.environ.get("CI")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if insists and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("\nfailed: it skipped tests, each of which is named below", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
