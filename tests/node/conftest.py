"""Guests for the tests of the package on real Debian systems. ``make test-node`` runs them; ``make test`` never does."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from guest import SUITES, Image
from guest.images import images as all_images
from node_kit import build_package
from repository_kit import ill_versions, publish

LONGEST = ("test_node_power_cuts.py", "test_upgrade_power_cuts.py", "test_machine.py", "test_machine_can.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that at the end no worker is left alone with one; and time enough for a busy machine."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def images() -> dict[str, Image]:
    """Every suite's image by name; built at the same time where the cache lacks them."""
    return all_images()


@pytest.fixture(params=SUITES)
def suite_image(request: pytest.FixtureRequest, images: dict[str, Image]) -> Image:
    """The image of each suite in turn."""
    return images[request.param]


@pytest.fixture
def bookworm(images: dict[str, Image]) -> Image:
    """The image of the oldest suite that is supported."""
    return images["bookworm"]


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    """Guests need root: to mount, and to make a tree that belongs to many users."""
    assert os.geteuid() == 0, "tests/node boots guests, which needs root: sudo make test-node"
    assert shutil.which("systemd-nspawn"), "run packaging/setup-dev.sh --node"
    # whoever ends the tests from outside does not leave guests behind: each block ends as by Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def deb() -> Path:
    """The package of this checkout."""
    return build_package()


@pytest.fixture(scope="session")
def newer_deb() -> Path:
    """The same under a higher version, to be upgraded to."""
    return build_package("0.2.0~rc1")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory, deb: Path, newer_deb: Path) -> Path:
    """A signed repository with what runs, a good version and bad ones."""
    ill = ill_versions(newer_deb, tmp_path_factory.mktemp("ill"))
    return publish(tmp_path_factory.mktemp("repository"), deb, newer_deb, *ill)
