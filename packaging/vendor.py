"""Unpacks locked pure-Python wheels into the package's private tree, and refuses whatever is not such a wheel.

Called by ``packaging/debian/rules``, with the standard library only and without a network:

    vendor.py REQUIREMENTS WHEELS TREE

``REQUIREMENTS`` is the export of ``uv.lock``: every wheel in the folder ``WHEELS`` must have one of its hashes, but for
edged's own, which was built beside it. Of the metadata stay ``METADATA``, by which libraries find versions, and
``entry_points.txt``, by which plugins are found; the rest has paths and dates of the build in it. Licences are in
``debian/copyright``.
"""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from pathlib import Path, PurePosixPath

OWN = "edged-"
METADATA = {"METADATA", "entry_points.txt"}
UNREAD = ("securesystemslib/_vendor/ed25519/test_data/",)
"""Test data that a wheel brings along: 2.4 MB that nobody reads."""


class Refusal(Exception):
    """What stands in a wheel's place is not what was locked, or is not pure Python."""


def main(arguments: list[str]) -> None:
    """Raises ``Refusal``; the tree is then of no use."""
    requirements, wheels, tree = (Path(argument) for argument in arguments)
    locked = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", requirements.read_text(encoding="utf-8")))
    found = sorted(wheels.glob("*.whl"))
    expected = len(re.findall(r"^[A-Za-z0-9]", requirements.read_text(encoding="utf-8"), re.MULTILINE)) + 1
    if len(found) != expected:
        raise Refusal(f"{wheels}: {len(found)} wheels, expected {expected}")
    for wheel in found:
        check(wheel, locked)
        unpack(wheel, tree)


def check(wheel: Path, locked: set[str]) -> None:
    """Raises ``Refusal`` for a wheel that is not pure, or not locked."""
    if not wheel.name.endswith("-none-any.whl"):
        raise Refusal(f"{wheel.name}: made for one kind of machine; the package is for all")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest not in locked and not wheel.name.startswith(OWN):
        raise Refusal(f"{wheel.name}: its hash {digest} is not in uv.lock")


def unpack(wheel: Path, tree: Path) -> None:
    """Write the wheel's modules below ``tree``: no shebang, no scripts, nothing that is there already."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith("/") or not wanted(PurePosixPath(name)):
                continue
            data = archive.read(name)
            if data.startswith(b"\x7fELF"):
                raise Refusal(f"{wheel.name}: {name} is compiled")
            write(tree / name, data)


def wanted(name: PurePosixPath) -> bool:
    """Whether a file of a wheel belongs into the tree."""
    top = name.parts[0]
    if top.endswith(".data"):
        return False
    if top.endswith(".dist-info"):
        return name.parts[1:] in {(part,) for part in METADATA}
    return not str(name).startswith(UNREAD) and name.name != ".gitignore"


def write(path: Path, data: bytes) -> None:
    """Raises ``Refusal`` where two wheels bring the same file."""
    if path.exists():
        raise Refusal(f"{path} comes from two wheels")
    path.parent.mkdir(parents=True, exist_ok=True)
    # the line stays, so that tracebacks name the right one
    path.write_bytes(re.sub(rb"\A#![^\n]*", b"#", data))
    path.chmod(0o644)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refusal as refusal:
        sys.exit(f"vendor.py: {refusal}")
