"""What the installed package costs a node: size, memory, time to start, and what it writes to its disk.

Printed as a table, and kept in ``.cache/node-figures.md``. The bounds are wide: they catch what is out of hand, not a
slow machine.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from guest import Container, Image
from guest.images import run
from node_kit import RELEASES, ROOT, board, configure, deploy, ended, install, make_releases

from edged.testing.demo import DEVICE

pytestmark = pytest.mark.timeout(1200)

PORT: Final = "/dev/ttyACM0"
REPORT: Final = ROOT / ".cache" / "node-figures.md"
IDLE_S: Final = 60.0
STARTS: Final = 3
DAY_S: Final = 86_400
REFRESHES_PER_DAY: Final = 24
IMAGE_BYTES: Final = 20_000
SECTOR_BYTES: Final = 512
MIB: Final = 1024 * 1024


@contextlib.contextmanager
def state_disk(folder: Path) -> Iterator[Path]:
    """A small ext4 of its own for the state, so that every byte that reaches the disk is counted: also its journal's.

    Its tables are written when it is made: the kernel would else write their 4 MiB at some time after the mount.
    """
    disk, mount = folder / "state.raw", folder / "state"
    mount.mkdir()
    at_once = "lazy_itable_init=0,lazy_journal_init=0"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-E", at_once, str(disk), "64M")
    run("mount", "-o", "loop", str(disk), str(mount))
    try:
        yield mount
    finally:
        run("umount", str(mount))


def written_bytes(mount: Path) -> int:
    """What the disk behind ``mount`` has been given to write, with nothing held back."""
    run("sync", "-f", str(mount))
    device = mount.stat().st_dev
    fields = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()
    return int(fields[6]) * SECTOR_BYTES


def memory_kib(guest: Container) -> dict[str, int]:
    """VmRSS and Pss of the daemon."""
    pid = guest.unit("edged.service", "MainPID")
    lines = guest.sh(f"cat /proc/{pid}/status /proc/{pid}/smaps_rollup").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS:", "Pss:"))}


def start_s(guest: Container) -> float:
    """From the start of the unit to READY=1."""
    guest.run("systemctl", "stop", "edged.service")
    began = time.monotonic()
    guest.run("systemctl", "start", "edged.service")
    return time.monotonic() - began


def test_what_the_package_costs(bookworm: Image, deb: Path, tmp_path: Path) -> None:
    releases = make_releases(tmp_path / "releases", ("1.0.0", "2.0.0"), IMAGE_BYTES)
    rows: dict[str, str] = {}
    with board(tmp_path / "board") as avr, state_disk(tmp_path) as state:
        binds = {PORT: avr.port.resolve(), RELEASES: releases.folder, "/var/lib/edged": state}
        with Container(bookworm, tmp_path / "guest", binds=binds) as guest:
            guest.sh(f"chgrp dialout {PORT} && chmod 660 {PORT}")
            began = time.monotonic()
            install(guest, deb)
            rows["apt install, s (container)"] = f"{time.monotonic() - began:.1f}"
            package, whole = deb.stat().st_size, int(guest.sh("du -sb /usr/lib/edged | cut -f1"))
            rows["package, MiB"] = f"{package / MIB:.2f}"
            rows["installed, with compiled modules, MiB"] = f"{whole / MIB:.1f}"
            configure(guest, {DEVICE: f"serial:{PORT}"}, flash_bytes=30_000)
            assert ended(guest, deploy(guest, "1.0.0"), 300)["state"] == "succeeded"
            starts = sorted(start_s(guest) for _ in range(STARTS))
            rows["start to READY, s (container, median)"] = f"{starts[STARTS // 2]:.2f}"
            before = written_bytes(state)
            time.sleep(IDLE_S)
            idle = (written_bytes(state) - before) / IDLE_S * DAY_S
            memory = memory_kib(guest)
            rows["memory idle, MiB: VmRSS, Pss"] = f"{memory['VmRSS'] / 1024:.1f}, {memory['Pss'] / 1024:.1f}"
            before = written_bytes(state)
            guest.run("edged", "trust", "refresh")
            refresh = written_bytes(state) - before
            before = written_bytes(state)
            assert ended(guest, deploy(guest, "2.0.0"), 300)["state"] == "succeeded"
            flash = written_bytes(state) - before
    day = idle + refresh * REFRESHES_PER_DAY
    rows["written per day idle, a device reporting each second, MiB"] = f"{day / MIB:.1f}"
    rows["of it by hourly refreshes of the metadata, MiB"] = f"{refresh * REFRESHES_PER_DAY / MIB:.2f}"
    rows[f"written per update of {IMAGE_BYTES / 1000:.0f} kB, KiB"] = f"{flash / 1024:.0f}"
    table = "\n".join(
        ["| what | figure |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    )
    REPORT.write_text(table + "\n")
    print(f"\n{table}")
    assert package < 3 * MIB and whole < 40 * MIB
    assert memory["VmRSS"] < 60 * 1024
    assert 0 < flash < 20 * MIB and day < 2000 * MIB
