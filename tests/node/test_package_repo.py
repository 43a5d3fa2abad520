"""The signed apt repository, as apt of this machine sees it through a web server; nothing is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from package_kit import ROOT, deb, run
from web import serving

pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True, slots=True)
class Node:
    """apt with lists, cache and sources of its own, that trusts one repository."""

    folder: Path
    clock: str = ""

    def apt(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Call apt-get or apt-cache; its output is in English. The clock is ahead by ``clock``, as faketime takes it."""
        (self.folder / "lists/partial").mkdir(parents=True, exist_ok=True)
        (self.folder / "archives/partial").mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        options = {
            "Dir::State::lists": self.folder / "lists",
            "Dir::State::status": self.folder / "status",
            "Dir::Cache": self.folder,
            "Dir::Etc::sourcelist": self.folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "APT::Sandbox::User": "root",
            "Acquire::Check-Date": "true",
            "Acquire::Check-Valid-Until": "true",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        ahead = ["faketime", "-f", self.clock] if self.clock else []
        return subprocess.run(
            [*ahead, command[0], *words, *command[1:]],
            cwd=self.folder,
            env=os.environ | {"LC_ALL": "C.UTF-8"},
            capture_output=True,
            text=True,
        )

    def update(self) -> str:
        """What apt complains about; empty where all is well. It asks anew: a list of the same second would look unchanged."""
        shutil.rmtree(self.folder / "lists", ignore_errors=True)
        done = self.apt("apt-get", "update", "--error-on=any")
        assert (done.returncode == 0) == (done.stderr == ""), done.stderr
        return done.stderr

    def versions(self) -> list[str]:
        """What apt would install, newest first."""
        out = self.apt("apt-cache", "madison", "edged").stdout
        return [line.split("|")[1].strip() for line in out.splitlines()]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


@pytest.fixture
def node(repository: Path, tmp_path: Path) -> Iterator[Node]:
    folder = tmp_path / "node"
    folder.mkdir()
    with serving(repository) as url:
        (folder / "sources.list").write_text(f"deb [signed-by={folder}/edged.asc] {url} ./\n")
        yield Node(folder)


def publish(repository: Path, *debs: Path, **env: str) -> str:
    return run("packaging/apt-repo.sh", str(repository), *(str(path) for path in debs), env=env)


def trust(node: Node, repository: Path) -> None:
    """Bring the key to the node, as an operator does by a way that he trusts."""
    (node.folder / "edged.asc").write_bytes((repository / "edged.asc").read_bytes())


def small(folder: Path, version: str, note: str = "") -> Path:
    """A package with the name and nothing in it."""
    control = folder / f"tree-{version}" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True, exist_ok=True)
    control.write_text(
        f"Package: edged\nVersion: {version}\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: test {note}\n"
    )
    path = folder / f"edged_{version}_all.deb"
    build = ("dpkg-deb", "--root-owner-group", "--build")
    run(*build, str(control.parent.parent), str(path), env={"SOURCE_DATE_EPOCH": "0"})
    return path


def test_apt_finds_installs_and_goes_back(repository: Path, node: Node, tmp_path: Path) -> None:
    """What was published earlier stays, and is fetched byte for byte."""
    package = deb()
    version = package.field("Version")
    out = publish(repository, package.path)
    assert "1 versions of edged" in out and "throw-away key" in out
    trust(node, repository)
    assert node.update() == ""
    assert node.versions() == [version]

    newer = f"{version}+newer"
    assert "2 versions of edged" in publish(repository, small(tmp_path, newer))
    assert node.update() == ""
    assert node.versions() == [newer, version]
    done = node.apt("apt-get", "download", f"edged={version}")
    assert done.returncode == 0, done.stderr
    assert (node.folder / package.path.name).read_bytes() == package.path.read_bytes()


def test_a_list_that_nobody_signed_is_refused(repository: Path, node: Node, tmp_path: Path) -> None:
    publish(repository, small(tmp_path, "1.0"))
    trust(node, repository)
    for name in ("InRelease", "Packages"):
        assert node.update() == ""
        good = (repository / name).read_bytes()
        (repository / name).write_bytes(good.replace(b"edged", b"edgee", 1))
        # what is named by its digest is asked for first, then what is compressed
        shutil.rmtree(repository / "by-hash", ignore_errors=True)
        (repository / "Packages.gz").unlink(missing_ok=True)
        said = node.update()
        assert re.search("BADSIG|invalid|Hash Sum mismatch|unexpected size", said), said
        (repository / name).write_bytes(good)


def test_a_node_that_reads_while_it_is_published_gets_what_belongs_together(
    repository: Path, node: Node, tmp_path: Path
) -> None:
    """The new index is there, and the signed list is still the old one."""
    publish(repository, small(tmp_path, "1.0"))
    trust(node, repository)
    old = (repository / "InRelease").read_bytes()
    publish(repository, small(tmp_path, "2.0"))
    new = (repository / "InRelease").read_bytes()
    (repository / "InRelease").write_bytes(old)
    assert node.update() == "" and node.versions() == ["1.0"]
    (repository / "InRelease").write_bytes(new)
    assert node.update() == "" and node.versions() == ["2.0", "1.0"]
    assert not list(repository.rglob("*.tmp"))


def test_indexes_of_the_last_lists_stay_and_older_ones_go(
    repository: Path, node: Node, tmp_path: Path
) -> None:
    package = small(tmp_path, "1.0")
    publish(repository, package)
    folders = [repository / "by-hash" / name for name in ("SHA256", "SHA512")]
    for folder in folders:
        for number in range(40):
            (folder / f"{number:064x}").touch()
            os.utime(folder / f"{number:064x}", (number, number))
    publish(repository, package)
    for folder in folders:
        left = {path.name for path in folder.iterdir()}
        assert {f"{number:064x}" for number in range(10, 40)} < left and len(left) == 32
    trust(node, repository)
    assert node.update() == "" and node.versions() == ["1.0"]


def test_a_package_that_was_changed_is_refused(repository: Path, node: Node, tmp_path: Path) -> None:
    published = repository / "edged_1.0_all.deb"
    publish(repository, small(tmp_path, "1.0"))
    trust(node, repository)
    assert node.update() == ""
    data = bytearray(published.read_bytes())
    data[-1] ^= 1
    published.write_bytes(data)
    done = node.apt("apt-get", "download", "edged=1.0")
    assert done.returncode != 0 and "Hash Sum mismatch" in done.stderr


@pytest.fixture
def own_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """gpg with a key of a publisher, as he has it; gone afterwards."""
    home = Path(run("mktemp", "-d").strip())
    try:
        gpg = ["gpg", "--homedir", str(home), "--batch", "--passphrase", ""]
        run(*gpg, "--quick-generate-key", "publisher@example.org", "ed25519", "sign", "never")
        yield {"GNUPGHOME": str(home), "EDGED_APT_KEY": "publisher@example.org"}
    finally:
        run("gpgconf", "--homedir", str(home), "--kill", "all")
        # its agent removes its sockets meanwhile
        run("rm", "-rf", str(home))


def test_a_publishers_own_key(repository: Path, node: Node, tmp_path: Path, own_key: dict[str, str]) -> None:
    """The throw-away key's signature is worth nothing to a node that trusts the publisher's."""
    out = publish(repository, small(tmp_path, "1.0"), **own_key)
    assert "throw-away" not in out
    trust(node, repository)
    assert node.update() == ""
    publish(repository, small(tmp_path, "2.0"))
    assert "NO_PUBKEY" in node.update()
    publish(repository, small(tmp_path, "2.0"), **own_key)
    assert node.update() == ""


def test_a_version_is_published_once(repository: Path, tmp_path: Path, own_key: dict[str, str]) -> None:
    publish(repository, small(tmp_path, "1.0"), **own_key)
    publish(repository, small(tmp_path, "1.0"), **own_key)
    before = (repository / "InRelease").read_bytes()
    done = subprocess.run(
        ["packaging/apt-repo.sh", str(repository), str(small(tmp_path, "1.0", note="changed"))],
        cwd=ROOT,
        env=os.environ | own_key,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "a version is published once" in done.stderr
    assert (repository / "InRelease").read_bytes() == before


def test_an_old_list_is_refused_in_the_end(repository: Path, node: Node, tmp_path: Path) -> None:
    publish(repository, small(tmp_path, "1.0"), EDGED_APT_VALID_DAYS="30")
    trust(node, repository)
    assert node.update() == ""
    assert "is expired" in Node(node.folder, clock="+31d").update()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    done = subprocess.run(
        ["packaging/apt-repo.sh", str(tmp_path), "dist/none.deb"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1 and "build it with: make deb" in done.stderr
    assert list(tmp_path.iterdir()) == []
