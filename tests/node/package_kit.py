"""The Debian package for tests: built once, and looked into without being installed."""

from __future__ import annotations

import io
import lzma
import os
import re
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
TREE: Final = "usr/lib/edged"
BUILD_S: Final = 600


@dataclass(frozen=True, slots=True)
class Deb:
    """A package that was built. ``files`` by their path below the root, without the folders; ``control`` by name."""

    path: Path
    members: tuple[tarfile.TarInfo, ...]
    files: Mapping[str, bytes]
    control: Mapping[str, bytes]

    def field(self, name: str) -> str:
        """A field of the control file; empty where there is none."""
        found = re.search(rf"^{name}: (.*)$", self.control["control"].decode(), re.MULTILINE)
        return found[1] if found else ""

    def script(self, name: str) -> str:
        """A maintainer script, or what tells of conffiles."""
        return self.control[name].decode()

    def unpack(self, folder: Path) -> Path:
        """Its files below ``folder``, which is returned; nothing is run."""
        run("dpkg-deb", "--extract", str(self.path), str(folder))
        return folder


def run(*command: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout_s: float = 120) -> str:
    """What a command prints; its exit code must be 0."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, (
        f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout


@cache
def deb(version: str = "") -> Deb:
    """The package of this checkout; with ``version`` built as that one. Once for a run of the tests."""
    return read(build(version=version))


def build(checkout: Path = ROOT, version: str = "", env: Mapping[str, str] | None = None) -> Path:
    """Build in ``checkout``, and return the file that it says it made."""
    variables = {**(env or {}), "VERSION": version}
    out = run("packaging/build-deb.sh", cwd=checkout, env=variables, timeout_s=BUILD_S)
    found = re.search(r"^(dist/edged_\S+_all\.deb): \d+ bytes$", out, re.MULTILINE)
    assert found is not None, out
    return checkout / found[1]


def read(path: Path) -> Deb:
    """Look into a package as dpkg stores it: two archives, of which the second must be xz."""
    members = run("ar", "t", str(path)).split()
    assert members == ["debian-binary", "control.tar.xz", "data.tar.xz"], members
    control, _ = _tar(path, "control.tar.xz")
    files, infos = _tar(path, "data.tar.xz")
    return Deb(path, infos, files, control)


def _tar(path: Path, member: str) -> tuple[dict[str, bytes], tuple[tarfile.TarInfo, ...]]:
    packed = subprocess.run(["ar", "p", str(path), member], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(packed))) as archive:
        infos = tuple(archive.getmembers())
        files = {info.name.removeprefix("./"): archive.extractfile(info) for info in infos if info.isfile()}
        return {name: file.read() for name, file in files.items() if file is not None}, infos
