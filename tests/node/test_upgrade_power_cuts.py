"""The power dies in the middle of the package's own upgrade, again and again on one disk, and each time the node comes back.

A real machine: what was not flushed is lost with the memory. dpkg tells a witness outside how far it is; the power goes
at each of its steps, and some time into the long ones.
"""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest
from guest import Image, Machine
from guest.command import eventually
from guest.images import copy_disk
from node_kit import install

SEED = 20261126
DEBS = "/srv/debs"
UPGRADE = "apt-get install --yes --allow-downgrades {deb}"
# the recovery's sandbox has no such device
TELL = "status-logger=cat 2>/dev/null >/dev/virtio-ports/witness || cat >/dev/null\n"

MOMENTS = (
    ("upgrade", 1, 0.0),  # dpkg has begun, and done nothing
    ("half-configured", 1, 0.3),  # the old package's script
    ("half-installed", 1, 0.0),
    ("half-installed", 1, 1.0),  # files are unpacked
    ("half-installed", 1, 3.0),
    ("unpacked", 2, 0.5),  # between the two halves of the work
    ("half-configured", 2, 0.0),
    ("half-configured", 2, 3.0),  # the new package's script: users, compiled Python, the daemon's restart
    ("half-configured", 2, 6.0),
    ("installed", 1, 0.5),  # before everything has reached the disk
)
"""Which word of dpkg, for which time in this upgrade, and at most how long after it, seconds."""


def start_upgrade(guest: Machine, deb: str) -> None:
    """In a unit of its own, as in an operator's session."""
    guest.run("systemd-run", "--quiet", "--collect", "--unit=operator", "sh", "-c", UPGRADE.format(deb=deb))


def await_step(guest: Machine, since: int, word: str, time_nr: int) -> None:
    """Return when dpkg has said ``word`` so often, after ``since`` bytes of the witness."""

    def said() -> bool:
        told = guest.witness.read_text()[since:]
        return len(re.findall(rf"^(?:status: edged\S*|processing): {word}\b", told, re.MULTILINE)) >= time_nr

    eventually(said, 300, f"dpkg's {word}", every_s=0.005)


def reboot_soon(guest: Machine) -> None:
    """Not while somebody waits for an answer of the machine, which is away at once."""
    guest.run("systemd-run", "--quiet", "--collect", "--on-active=2", "edged", "node", "reboot")


def found_by_the_boot(guest: Machine) -> str:
    """dpkg's letters as the recovery found them; ``ii`` where it had nothing to do."""
    said = guest.run("journalctl", "--boot", "-o", "cat", "-u", "edged-recover.service", "--no-pager").out
    found = re.search(r"was interrupted; edged \S+ is '(.*)'", said)
    return found[1].strip() if found else "ii"


@pytest.mark.timeout(3000)
def test_cut_anywhere_in_the_upgrade_the_node_comes_back(
    bookworm: Image, tmp_path: Path, deb: Path, newer_deb: Path
) -> None:
    chance = random.Random(SEED)
    disk = copy_disk(bookworm.disk, tmp_path / "disk.raw")
    with Machine(bookworm, disk, tmp_path / "vm") as guest:
        install(guest, deb)
        assert "ttyUSB" in guest.sh("cat /proc/devices"), (
            "the daemon may open no port that is plugged in later"
        )
        guest.write("/etc/dpkg/dpkg.cfg.d/witness", TELL)
        for one in (deb, newer_deb):
            guest.put(one, f"{DEBS}/{one.name}")
        seen = []
        for word, time_nr, most_s in MOMENTS:
            target = newer_deb if version(guest) in deb.name else deb
            guest.sh("sync")
            since = len(guest.witness.read_text())
            start_upgrade(guest, f"{DEBS}/{target.name}")
            await_step(guest, since, word, time_nr)
            time.sleep(chance.uniform(0, most_s))
            guest.kill()
            guest.start()
            assert_well(guest)
            seen.append(found_by_the_boot(guest))
            print(f"cut at {word} {time_nr}: the boot found {seen[-1]}, {version(guest)} runs")
        assert any("H" in one for one in seen) and any("F" in one for one in seen), seen
        # and the node restarts when it is told to
        reboot_soon(guest)
        eventually(guest.ended, 120, "the restart")


def version(guest: Machine) -> str:
    return guest.sh("dpkg-query -W -f '${Version}' edged")


def assert_well(guest: Machine) -> None:
    """The package is whole, and the daemon of that version answers."""
    eventually(
        lambda: guest.unit("edged-recover.service", "ActiveState") == "inactive", 240, "the recovery's end"
    )
    eventually(lambda: guest.unit("edged.service", "ActiveState") == "active", 120, "the daemon")
    found = guest.json("edged", "node", "status", "--json")
    assert found["whole"] and not found["interrupted"], found
    assert guest.run("dpkg", "--verify", "edged").out == ""
    assert guest.run("apt-get", "check").code == 0
    assert guest.json("edged", "status", "--json")["version"] == found["version"].replace("~", "")
