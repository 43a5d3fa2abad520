"""The power dies in the middle of the package's own upgrade, again and again on one disk, and each time the node comes back.

A real machine: what was not flushed is lost with the memory. The moments are drawn over the whole of ``apt-get install``.
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

CUTS = 8
SEED = 20261126
DEBS = "/srv/debs"
UPGRADE = "apt-get install --yes --allow-downgrades {deb}"


def start_upgrade(guest: Machine, deb: str) -> None:
    """In a unit of its own, as in an operator's session."""
    guest.run("systemd-run", "--quiet", "--collect", "--unit=operator", "sh", "-c", UPGRADE.format(deb=deb))


def dpkg(guest: Machine) -> str:
    return guest.sh("dpkg-query -W -f '${db:Status-Abbrev}|${Version}' edged")


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
        for one in (deb, newer_deb):
            guest.put(one, f"{DEBS}/{one.name}")
        # once to its end: the hook is there now, and keeps what comes in; and how long does it take?
        began = time.monotonic()
        guest.run("sh", "-c", UPGRADE.format(deb=f"{DEBS}/{newer_deb.name}"), timeout_s=300)
        took_s = time.monotonic() - began
        seen = []
        for number in range(CUTS):
            target = deb if number % 2 == 0 else newer_deb
            guest.sh("sync")
            start_upgrade(guest, f"{DEBS}/{target.name}")
            after_s = took_s * (number + chance.random()) / CUTS
            time.sleep(after_s)
            guest.kill()
            guest.start()
            eventually(
                lambda: guest.unit("edged-recover.service", "ActiveState") == "inactive",
                180,
                "the recovery's end",
            )
            eventually(lambda: guest.unit("edged.service", "ActiveState") == "active", 120, "the daemon")
            state, _, version = dpkg(guest).partition("|")
            assert state == "ii " and guest.run("dpkg", "--verify", "edged").out == ""
            assert guest.json("edged", "status", "--json")["version"] == version.replace("~", "")
            assert not guest.json("edged", "node", "status", "--json")["interrupted"]
            assert guest.run("apt-get", "check").code == 0
            seen.append(found_by_the_boot(guest))
            print(f"cut {number + 1} after {after_s:.1f} of {took_s:.1f} s: found {seen[-1]}, runs {version}")
        assert set(seen) - {"ii"}, f"no cut hit dpkg in its work: {seen}"
        # and the node restarts when it is told to
        guest.run("edged", "node", "reboot", check=False)
        eventually(guest.ended, 120, "the restart")
