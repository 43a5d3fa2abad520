"""The power dies in the middle of the package's own upgrade, by apt and by the helper, and each time the node comes back.

A Debian upgrades in a container, where it is quick, on a disk of which every write and flush is logged. At many points of the
log the disk is made what it can be after a cut there: what was not flushed is lost in part, as with a disk whose own cache is
volatile. Each is booted. A machine of its own is cut too, and booted again with its own kernel. dpkg and the helper tell a
witness outside how far they are.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from guest import Container, Image, Machine, blklog
from guest.command import Guest, eventually
from guest.images import copy_disk, make_disk, run
from node_kit import ROOT
from repository_kit import (
    CRASHES,
    NEW,
    QUICK,
    QUICK_FILE,
    REPOSITORY,
    STATE,
    install_from,
    publish,
    small_package,
    version_of,
)

SEED: Final = 20261126
OTHER: Final = "another"
"""A package of the same run of apt; dpkg takes it before ours."""
PORT: Final = "/dev/virtio-ports/witness"
# the recovery's sandbox has no such device
TELL: Final = f"status-logger=cat 2>/dev/null >>{PORT} || cat >/dev/null\n"
REPORT: Final = ROOT / ".cache" / "upgrade-cuts.md"
SLOW_S: Final = 600.0
"""So long may the machine take for what takes a minute on a quiet host."""

POINTS: Final = (
    ("upgrade", 1, 1),  # dpkg has begun, and done nothing
    ("half-configured", 1, 1),  # the old package's script
    ("half-installed", 1, 3),  # files are unpacked
    ("unpacked", 2, 1),  # between the two halves of the work
    ("half-configured", 2, 3),  # the new package's script: users, compiled Python, the daemon's restart
    ("installed", 1, 1),  # before everything has reached the disk
    ("installing", 1, 2),  # by the helper
    ("watching", 1, 1),
    ("reverting", 1, 3),
)
"""Which word of dpkg or of the helper, for which time, and at how many points until the next one."""

WORDS: Final = re.compile(
    r"^(?:status: edged\S*: (\S+)|processing: (upgrade): edged\S*|(\w+) …)$", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Step:
    """What was told for the ``number``-th time; entries of the log from then on to what was told next."""

    word: str
    number: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Recorded:
    """An upgrade by apt and one by the helper that is not well, write for write."""

    image: Image
    base: Path
    log: Path
    writes: list[blklog.Write]
    steps: list[Step]
    old: str


@dataclass(frozen=True, slots=True)
class Cut:
    """One cut: where it was, what the boot found in dpkg, by which step that was mended, which version runs."""

    where: str
    found: str
    by: str
    runs: str
    outcome: str


@pytest.fixture(scope="module")
def base(
    images: dict[str, Image], repository: Path, deb: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The disk of a node that trusts the repository and runs what came from there."""
    folder = tmp_path_factory.mktemp("base")
    with Container(images["bookworm"], folder / "container") as guest:
        inside = guest.root / REPOSITORY.lstrip("/")
        shutil.copytree(repository, inside)
        other = [small_package(folder, OTHER, version) for version in ("1", "2")]
        publish(inside, *other)
        key = (inside / "edged.asc").read_bytes()
        install_from(guest, key, f"file:{REPOSITORY}", f"edged={version_of(deb)}", f"{OTHER}=1")
        guest.write(QUICK_FILE, QUICK)
        guest.write("/etc/dpkg/dpkg.cfg.d/witness", TELL)
        guest.stop()
        make_disk(guest.root, folder / "base.raw")
    return folder / "base.raw"


def start_upgrade(guest: Guest, *packages: str) -> None:
    """In a unit of its own, as in an operator's session."""
    words = ("apt-get", "install", "--yes", "--allow-downgrades", *packages)
    guest.run("systemd-run", "--quiet", "--collect", "--unit=operator", *words)


def start_helper(guest: Guest, version: str) -> None:
    """Ask for an upgrade; the phases are told to the witness."""
    command = f"edged node upgrade {version} 2>>{PORT}"
    guest.run("systemd-run", "--quiet", "--collect", "--unit=asker", "sh", "-c", command)


def told_by(witness: Path) -> list[tuple[str, int]]:
    """What was told, and up to which byte of the witness."""
    text = witness.read_text()
    ends = ((next(filter(None, found.groups())), found.end()) for found in WORDS.finditer(text))
    return [(word, len(text[:end].encode())) for word, end in ends]


def steps_of(witness: Path, samples: list[blklog.Sample], entries: int) -> list[Step]:
    """Where in the log each told step is; a sample is later than what it holds, by some hundredths of a second."""
    lengths = [sample.told_bytes for sample in samples]
    told = [(word, samples[bisect_right(lengths, end - 1)].entries) for word, end in told_by(witness)]
    words = [word for word, _ in told]
    ends = [first for _, first in told[1:]] + [entries]
    return [
        Step(word, words[: number + 1].count(word), first, max(first + 1, last))
        for number, ((word, first), last) in enumerate(zip(told, ends, strict=True))
    ]


@pytest.fixture(scope="module")
def recorded(
    images: dict[str, Image], base: Path, deb: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recorded:
    folder, image = tmp_path_factory.mktemp("recorded"), images["bookworm"]
    disk, log, witness = copy_disk(base, folder / "disk.raw"), folder / "log.raw", folder / "witness.log"
    witness.touch()
    with (
        blklog.exported(disk, log, folder) as exported,
        Container(image, folder / "container", binds={PORT: witness}, disk=exported) as guest,
        blklog.sampled(witness, log) as samples,
    ):
        start_upgrade(guest, f"edged={NEW}", f"{OTHER}=2")
        ended(guest, "operator")
        assert_well(guest)
        start_helper(guest, CRASHES)
        ended(guest, "asker")
        assert outcome(guest)["reason"] == "health_failed" and version(guest) == NEW
        # seen by the sampler: the last step ends here
        entries, told_bytes = blklog.entries(log), witness.stat().st_size
        eventually(
            lambda: samples[-1].entries >= entries and samples[-1].told_bytes >= told_bytes,
            60,
            "the last sample",
        )
    return Recorded(image, base, log, blklog.parse(log), steps_of(witness, samples, entries), version_of(deb))


def ended(guest: Guest, unit: str) -> None:
    """Return when a unit of :func:`start_upgrade` or :func:`start_helper` has ended."""
    eventually(
        lambda: guest.unit(f"{unit}.service", "ActiveState") in ("inactive", "failed"),
        SLOW_S,
        f"{unit}'s end",
    )


def outcome(guest: Guest) -> dict[str, str]:
    """How the helper's last upgrade ended; empty where there was none."""
    return json.loads(guest.sh(f"cat {STATE}/outcome.json 2>/dev/null || echo '{{}}'")) or {}


def version(guest: Guest) -> str:
    return guest.sh("dpkg-query -W -f '${Version}' edged")


def found_by_the_boot(guest: Guest) -> tuple[str, str]:
    """dpkg's letters as the recovery found them, and by what it made the package whole; ``ii`` where it had nothing to do."""
    said = guest.run("journalctl", "--boot", "-o", "cat", "-u", "edged-recover.service", "--no-pager").out
    found = re.search(r"was interrupted; edged \S+ is '(.*)'", said)
    by = re.search(r"is whole, by: (.*)", said)
    return found[1].strip() if found else "ii", by[1] if by else "-"


def assert_well(guest: Guest) -> None:
    """What the helper was in has ended, the package is whole, and the daemon of that version answers."""
    eventually(
        lambda: guest.unit("edged-recover.service", "ActiveState") == "inactive", SLOW_S, "the recovery's end"
    )
    eventually(
        lambda: guest.run("test", "-e", f"{STATE}/operation.json", check=False).code == 1,
        SLOW_S,
        "the end of the helper's upgrade",
    )
    eventually(lambda: guest.unit("edged.service", "ActiveState") == "active", SLOW_S, "the daemon")
    found = guest.json("edged", "node", "status", "--json", timeout_s=120)
    assert found["whole"] and not found["interrupted"], found
    assert guest.run("dpkg", "--verify", "edged").out == ""
    mend_the_other(guest)
    assert guest.run("dpkg", "--audit").out == ""
    assert guest.run("apt-get", "check").code == 0
    running = guest.json("edged", "status", "--json", timeout_s=120)["version"]
    assert running == found["version"].replace("~", "")


def mend_the_other(guest: Guest) -> None:
    """Its file is not kept: one that was cut in its unpacking is the operator's to install again, as dpkg says."""
    if letters(guest, OTHER) != "ii ":
        guest.run("apt-get", "install", "--yes", "--reinstall", OTHER, timeout_s=120)
    assert letters(guest, OTHER) == "ii "


def letters(guest: Guest, package: str) -> str:
    return guest.sh(f"dpkg-query -W -f '${{db:Status-Abbrev}}' {package}")


def points(recorded: Recorded, chance: random.Random) -> Iterator[tuple[str, int, int]]:
    """Word, its number and a point of the log for each cut."""
    for word, number, count in POINTS:
        (step,) = (one for one in recorded.steps if (one.word, one.number) == (word, number))
        for _ in range(count):
            yield word, number, chance.randint(step.first, step.last - 1)


def cut(recorded: Recorded, point: int, where: str, folder: Path, chance: random.Random) -> Cut:
    """Make the disk what a cut at ``point`` leaves, boot on it, and see that all is well."""
    disk, writes = folder / "disk.raw", recorded.writes
    blklog.crash(writes, recorded.log, recorded.base, disk, point, chance, kept=blklog.durable(writes, point))
    look(disk, folder / "mnt")
    with Container(recorded.image, folder / "container", disk=disk) as guest:
        assert_well(guest)
        found, by = found_by_the_boot(guest)
        last = outcome(guest)
        told = f"{last['result']}, {last['reason']}" if last else "-"
        seen = Cut(where, found, by, version(guest), told)
    disk.unlink()
    return seen


def look(disk: Path, folder: Path) -> None:
    """The file system is whole when its journal was replayed, as a boot does it."""
    folder.mkdir()
    run("mount", "-o", "loop", str(disk), str(folder))
    run("umount", str(folder))
    run("e2fsck", "-fn", str(disk))


@pytest.mark.timeout(3000)
def test_cut_anywhere_in_an_upgrade_the_node_comes_back(recorded: Recorded, tmp_path: Path) -> None:
    chance, cuts = random.Random(SEED), []
    for word, number, point in points(recorded, chance):
        folder = tmp_path / str(len(cuts))
        folder.mkdir()
        one = cut(recorded, point, f"{word} {number}", folder, chance)
        cuts.append(one)
        print(one)
        by_helper = word in ("installing", "watching", "reverting")
        assert one.runs in ((NEW,) if by_helper else (recorded.old, NEW)), one
        assert one.outcome != "ok, ", one
    report(cuts)
    assert any("H" in one.found for one in cuts) and any("F" in one.found for one in cuts), cuts
    assert any(one.outcome == "failed, health_failed" for one in cuts), cuts


def report(cuts: list[Cut]) -> None:
    """Keep the table of all cuts."""
    lines = [
        "| cut after | dpkg at the boot | made whole by | runs | helper's upgrade |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {one.where} | `{one.found}` | {one.by} | {one.runs} | {one.outcome} |" for one in cuts]
    REPORT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


@pytest.mark.timeout(3000)
def test_a_machine_that_was_cut_boots_again(bookworm: Image, base: Path, tmp_path: Path) -> None:
    """With its own kernel, after a cut in dpkg's work for the helper, which goes on; and it restarts where it is told to."""
    disk = copy_disk(base, tmp_path / "disk.raw")
    with Machine(bookworm, disk, tmp_path / "vm") as guest:
        assert "ttyUSB" in guest.sh("cat /proc/devices"), (
            "the daemon may open no port that is plugged in later"
        )
        old = version(guest)
        start_helper(guest, NEW)
        eventually(lambda: letters(guest, "edged") != "ii ", SLOW_S, "dpkg at work", every_s=1)
        time.sleep(random.Random(SEED).uniform(0, 6))
        guest.kill()
        guest.start()
        assert_well(guest)
        print(f"the boot found {found_by_the_boot(guest)}; {version(guest)} runs, {outcome(guest)}")
        ends = {NEW: ("ok", ""), old: ("failed", "interrupted")}
        assert (outcome(guest)["result"], outcome(guest)["reason"]) == ends[version(guest)]
        reboot_soon(guest)
        eventually(guest.ended, SLOW_S, "the restart")


def reboot_soon(guest: Guest) -> None:
    """Not while somebody waits for an answer of the machine, which is away at once."""
    guest.run("systemd-run", "--quiet", "--collect", "--on-active=2", "edged", "node", "reboot")
