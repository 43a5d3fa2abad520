"""The package in the hands of an operator, on each Debian: installed by apt, configured, used, upgraded, removed, purged.

In containers: the daemon's sandbox is as systemd makes it there, but for the device rules, which the host's control
groups do not offer; ``test_machine.py`` proves those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from guest import Container, Image
from guest.command import eventually
from guest.images import run
from node_kit import (
    RELEASES,
    SOCKET,
    Releases,
    board,
    configure,
    deploy,
    ended,
    install,
    job,
    make_releases,
    standing_still,
    written,
)

from edged.testing.avr import SimulatedAvr
from edged.testing.demo import DEVICE

PORT = "/dev/ttyACM0"
VERSIONS = ("1.0.0", "2.0.0", "3.0.0")
FILLER_BYTES = 6000
GET = """
import http.client, socket, sys
connection = http.client.HTTPConnection("edged")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(sys.argv[1])
connection.request("GET", "/v1/status")
print(connection.getresponse().status)
"""


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    return make_releases(tmp_path_factory.mktemp("releases"), VERSIONS, FILLER_BYTES)


@contextmanager
def node(image: Image, folder: Path, releases: Releases) -> Iterator[tuple[Container, SimulatedAvr]]:
    """A fresh Debian with a board at ``PORT``."""
    with board(folder / "board") as avr:
        # the device node itself: a container has terminals of its own below /dev/pts
        binds = {PORT: avr.port.resolve(), RELEASES: releases.folder}
        with Container(image, folder / "guest", binds=binds) as guest:
            guest.sh(f"chgrp dialout {PORT} && chmod 660 {PORT}")
            yield guest, avr


def steady(guest: Container) -> None:
    """The daemon runs, and never had to be started again."""
    assert guest.unit("edged.service", "ActiveState") == "active", guest.journal("edged.service")
    assert guest.unit("edged.service", "NRestarts") == "0", guest.journal("edged.service")
    assert "Traceback" not in guest.journal("edged.service")


def test_installed_it_runs_and_waits_for_an_operator(
    suite_image: Image, tmp_path: Path, releases: Releases, deb: Path
) -> None:
    with node(suite_image, tmp_path, releases) as (guest, avr):
        opens = avr.stats().opens
        install(guest, deb)
        steady(guest)
        # told after READY=1, and shown by systemd when it has read its socket
        status_line = eventually(lambda: guest.unit("edged.service", "StatusText"), 60, "the status line")
        assert status_line.startswith("unprovisioned")
        assert guest.unit("edged.service", "UnitFileState") == "enabled"
        assert guest.run("systemctl", "is-system-running").out.strip() == "running"
        assert guest.run("dpkg", "--verify", "edged").out == ""
        status = guest.json("edged", "status", "--json")
        assert status["devices"]["configured"] == 0
        doctor = guest.run("edged", "doctor", check=False)
        assert "trust" in doctor.out, doctor
        guest.sh("sleep 3")
        steady(guest)
        assert avr.stats().opens == opens, "a port was opened that nobody configured"


def test_only_members_of_the_group_reach_the_api(
    suite_image: Image, tmp_path: Path, releases: Releases, deb: Path
) -> None:
    with node(suite_image, tmp_path, releases) as (guest, _):
        install(guest, deb)
        assert guest.sh(f"stat -c '%a %G' {SOCKET}") == "660 edged"
        guest.run("useradd", "--groups", "edged", "alice")
        guest.run("useradd", "mallory")
        assert guest.python(GET, SOCKET, user="alice") == "200"
        assert guest.run("edged", "status", user="alice").code == 0
        for user in ("nobody", "mallory"):
            refused = guest.run("edged", "status", user=user, check=False)
            assert refused.code == 4 and "edged" in refused.err, refused
            with pytest.raises(AssertionError, match="PermissionError"):
                guest.python(GET, SOCKET, user=user)
        private = ("/var/lib/edged/node-key.pem", "/var/lib/edged/edged.db", "/etc/edged/credentials")
        for path in private:
            assert guest.run("test", "-e", path).code == 0
            assert guest.run("cat", path, user="alice", check=False).code == 1
        helper = guest.python(CONNECT, "/run/edged-helper.sock", user="alice")
        assert helper == "PermissionError"
        assert guest.python(CONNECT, "/run/edged-helper.sock", user="_edged") == "connected"


CONNECT = """
import socket, sys
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
except OSError as error:
    print(type(error).__name__)
else:
    print("connected")
"""


def test_configured_it_flashes_and_tells(
    suite_image: Image, tmp_path: Path, releases: Releases, deb: Path
) -> None:
    with node(suite_image, tmp_path, releases) as (guest, avr):
        install(guest, deb)
        configure(guest, {DEVICE: f"serial:{PORT}"})
        done = guest.run("edged", "deploy", "blink@1.0.0", "--to", DEVICE, "--wait", "--yes", timeout_s=600)
        assert "succeeded" in done.out
        assert releases.differing("1.0.0", avr.flash()) == 0
        steady(guest)
        # systemd hears of it at once, and shows it when it has read its socket
        eventually(lambda: guest.unit("edged.service", "StatusText") == "1 devices", 300, "the status line")
        metrics = guest.python(SCRAPE, "http://127.0.0.1:9464/metrics")
        assert 'edged_jobs{reason="",state="succeeded"} 1.0\n' in metrics
        guest.run("journalctl", "--sync")
        lines = guest.run("journalctl", "-u", "edged.service", "-o", "json", "--no-pager").out
        assert "succeeded" in lines and DEVICE in lines
        assert guest.run("edged", "audit", "verify").out.startswith("Intact")
        refused = guest.run(
            "edged", "deploy", "blink@9.9.9", "--to", DEVICE, "--wait", "--yes", check=False, timeout_s=600
        )
        assert refused.code == 3, refused


SCRAPE = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())
"""


CONFFILE = "/etc/edged/edged.toml"
KEEP_MINE = ("-o", "Dpkg::Options::=--force-confold")
CHANGED = "# what the newer version says here\n"


def with_another_conffile(deb: Path, folder: Path) -> Path:
    """The same package, whose edged.toml is not that of the version before: dpkg has to choose."""
    tree, changed = folder / "tree", folder / deb.name
    run("dpkg-deb", "--raw-extract", str(deb), str(tree))
    with (tree / CONFFILE.lstrip("/")).open("a") as file:
        file.write(CHANGED)
    run("dpkg-deb", "--build", "--root-owner-group", str(tree), str(changed))
    return changed


def test_upgraded_and_downgraded_in_the_middle_of_jobs(
    suite_image: Image, tmp_path: Path, releases: Releases, deb: Path, newer_deb: Path
) -> None:
    with node(suite_image, tmp_path, releases) as (guest, avr):
        install(guest, deb)
        configure(guest, {DEVICE: f"serial:{PORT}"})
        old = guest.run("edged", "--version").out
        newer = with_another_conffile(newer_deb, tmp_path)
        for version, package, options in (
            ("1.0.0", newer, KEEP_MINE),
            ("2.0.0", deb, (*KEEP_MINE, "--allow-downgrades")),
        ):
            before = avr.stats().pages_written
            wished = deploy(guest, version)
            written(avr, 5, 300)
            # apt takes longer than what is left of a flash
            with standing_still(avr):
                assert job(guest, wished)["state"] == "staging"
                install(guest, package, *options)
            assert ended(guest, wished, 300)["state"] == "succeeded"
            assert releases.differing(version, avr.flash()) == 0
            assert len(guest.json("edged", "jobs", "--json")["jobs"]) == int(version[0])
            # what was written before the upgrade is found, not written again
            assert avr.stats().pages_written - before < 2 * FILLER_BYTES / 128
            steady(guest)
            assert (guest.run("edged", "--version").out == old) == (package == deb)
            assert f'"{RELEASES}"' in guest.run("cat", CONFFILE).out, "the conffile was replaced"
            if package == newer:
                assert CHANGED in guest.run("cat", f"{CONFFILE}.dpkg-dist").out, (
                    "the new one is not beside it"
                )
        assert guest.run("edged", "audit", "verify").out.startswith("Intact")


def test_removed_it_keeps_what_it_knew_and_purged_nothing(
    suite_image: Image, tmp_path: Path, releases: Releases, deb: Path
) -> None:
    with node(suite_image, tmp_path, releases) as (guest, avr):
        before = set(guest.sh(FILES).splitlines())
        install(guest, deb)
        configure(guest, {DEVICE: f"serial:{PORT}"})
        assert ended(guest, deploy(guest, "1.0.0"), 300)["state"] == "succeeded"
        key = guest.run("sha256sum", "/var/lib/edged/node-key.pem").out
        guest.run("apt-get", "remove", "-y", "edged")
        assert guest.run("pgrep", "-u", "_edged", check=False).code == 1, "the daemon still runs"
        assert guest.run("test", "-e", SOCKET, check=False).code == 1
        assert guest.run("test", "-e", "/usr/lib/edged", check=False).code == 1
        assert guest.run("sha256sum", "/var/lib/edged/node-key.pem").out == key
        assert guest.run("apt-get", "check").code == 0, "what apt calls at each run is gone with the package"
        install(guest, deb)
        assert [found["state"] for found in guest.json("edged", "jobs", "--json")["jobs"]] == ["succeeded"]
        assert ended(guest, deploy(guest, "2.0.0"), 300)["state"] == "succeeded"
        assert releases.differing("2.0.0", avr.flash()) == 0
        guest.run("apt-get", "purge", "-y", "edged")
        left = set(guest.sh(FILES).splitlines()) - before
        assert not left, f"purge leaves {left}"
        assert guest.run("getent", "passwd", "_edged").code == 0, "its number could be given to another"


FILES = """
find / -xdev '(' -path /proc -o -path /sys -o -path /run -o -path /tmp -o -path /var/tmp -o -path /var/log
    -o -path /var/cache -o -path /var/lib/dpkg -o -path /var/lib/systemd -o -path /var/lib/apt ')' -prune
    -o -print | grep -vE '/__pycache__(/|$)|^/etc/(passwd|group|shadow|gshadow|subuid|subgid)-?$'
""".replace("\n    -o", " -o").strip()
