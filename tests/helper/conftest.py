"""Systems, packages and repositories for the tests of the helper."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helper_kit import BAD, HUNG, LATE, Node, Repository, make_deb

Debs = dict[str, Path]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node.create(tmp_path / "node")


@pytest.fixture(scope="session")
def debs(tmp_path_factory: pytest.TempPathFactory) -> Debs:
    """Packages by version. 2.0 is good; the others each have one thing wrong, which their version tells."""
    folder = tmp_path_factory.mktemp("debs")
    made = {version: make_deb(folder, version) for version in ("1.0", "2.0")}
    made["2.1~bad"] = make_deb(folder, "2.1~bad", health=BAD)
    made["2.1~late"] = make_deb(folder, "2.1~late", health=LATE)
    made["2.1~hung"] = make_deb(folder, "2.1~hung", health=HUNG)
    made["2.1~postinst"] = make_deb(folder, "2.1~postinst", scripts={"postinst": "exit 1"})
    made["2.1~depends"] = make_deb(folder, "2.1~depends", depends="what-nobody-has")
    return made


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory, debs: Debs) -> Iterator[Repository]:
    """With all of ``debs``, and one that was changed after it was signed: 3.0."""
    with tempfile.TemporaryDirectory(prefix="edged-keys-") as short:
        folder = tmp_path_factory.mktemp("repository")
        made = Repository.create(folder, Path(short) / "keys")
        try:
            made.add(*debs.values(), make_deb(tmp_path_factory.mktemp("more"), "3.0"))
            with (folder / "edged_3.0_all.deb").open("r+b") as file:
                file.seek(-100, 2)
                file.write(b"x" * 50)
            yield made
        finally:
            made.end()
