"""pytest: a test that takes ``edged_conformance`` runs once for each check of the conformance kit.

Loaded by ``pytest_plugins = ["edged.testing.pytest_plugin"]`` in a ``conftest.py``.
"""

from __future__ import annotations

import pytest

from edged.testing.conformance import CHECKS

_NAME = "edged_conformance"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if _NAME in metafunc.fixturenames:
        metafunc.parametrize(_NAME, CHECKS, ids=[check.__name__ for check in CHECKS])
