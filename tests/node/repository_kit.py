"""Signed apt repositories for guests, as ``make apt-repo`` makes them, with versions that are well and some that are not."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from typing import Final

from guest.command import Guest
from package_kit import run

REPOSITORY: Final = "/srv/apt"
"""Where guests have it."""

NEW, CRASHES, LATE, BROKEN = "0.2.0~rc1", "0.3.0~crashes", "0.3.0~late", "0.3.0~broken"
STATE: Final = "/var/lib/edged-helper"
QUICK_FILE: Final = "/etc/systemd/system/edged-helper.service.d/quick.conf"
QUICK: Final = (
    "[Service]\nExecStart=\nExecStart=/usr/libexec/edged-helper --start-s 300 --health-s 5 --idle-s 3\n"
)
"""A helper that judges sooner."""

READY_AND_GONE = """#!/usr/bin/python3 -I
import os, socket, time
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
    sock.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
time.sleep(3)
raise SystemExit(1)
"""


def changed(deb: Path, folder: Path, version: str, files: dict[str, str]) -> Path:
    """``deb`` as ``version``, with these files in it replaced; each is as whole as dpkg can tell."""
    tree = folder / version
    run("dpkg-deb", "--raw-extract", str(deb), str(tree))
    control = tree / "DEBIAN" / "control"
    control.write_text(
        re.sub(r"^Version: .*$", f"Version: {version}", control.read_text(), flags=re.MULTILINE)
    )
    sums = tree / "DEBIAN" / "md5sums"
    for name, text in files.items():
        (tree / name).write_text(text)
        (tree / name).chmod(0o755)
        digest = hashlib.md5(text.encode()).hexdigest()
        sums.write_text(
            re.sub(rf"^\w+  {re.escape(name)}$", f"{digest}  {name}", sums.read_text(), flags=re.MULTILINE)
        )
    made = folder / f"edged_{version}_all.deb"
    run("dpkg-deb", "--root-owner-group", "-Zgzip", "--build", str(tree), str(made))
    shutil.rmtree(tree)
    return made


def small_package(folder: Path, name: str, version: str) -> Path:
    """A package with one file in it."""
    tree = folder / f"{name}-{version}"
    text, control = f"{name} {version}\n", tree / "DEBIAN"
    control.mkdir(parents=True)
    (tree / "opt").mkdir()
    (tree / "opt" / name).write_text(text)
    (control / "md5sums").write_text(f"{hashlib.md5(text.encode()).hexdigest()}  opt/{name}\n")
    (control / "control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: all\n"
        "Maintainer: nobody <nobody@example.org>\nDescription: a test\n"
    )
    made = folder / f"{name}_{version}_all.deb"
    run("dpkg-deb", "--root-owner-group", "--build", str(tree), str(made))
    return made


def version_of(deb: Path) -> str:
    """A package's version, by its file's name."""
    return deb.name.split("_")[1]


def publish(folder: Path, *debs: Path) -> Path:
    """Put packages into the repository ``folder``, which is returned."""
    folder.mkdir(exist_ok=True)
    # apt reads it as a user of its own
    folder.chmod(0o755)
    run("packaging/apt-repo.sh", str(folder), *map(str, debs))
    return folder


def ill_versions(newer_deb: Path, folder: Path) -> list[Path]:
    """Packages of versions that are not well, in ways of their own."""
    return [
        changed(newer_deb, folder, CRASHES, {"usr/bin/edged": "#!/bin/sh\nexit 1\n"}),
        changed(newer_deb, folder, LATE, {"usr/bin/edged": READY_AND_GONE}),
        changed(newer_deb, folder, BROKEN, {"DEBIAN/postinst": "#!/bin/sh\nexit 1\n"}),
    ]


def install_from(guest: Guest, key: bytes, url: str, *packages: str, timeout_s: float = 300) -> None:
    """The commands of docs/packaging.md for a node, once; ``key`` is ``edged.asc``."""
    guest.write("/root/edged.asc", key.decode())
    guest.run("install", "-D", "-m", "644", "/root/edged.asc", "/etc/apt/keyrings/edged.asc")
    source = f"deb [signed-by=/etc/apt/keyrings/edged.asc] {url} ./"
    guest.sh(f"echo '{source}' > /etc/apt/sources.list.d/edged.list")
    guest.run("apt-get", "update", "--error-on=any", timeout_s=timeout_s)
    guest.run("apt-get", "install", "--yes", *packages, timeout_s=timeout_s)
