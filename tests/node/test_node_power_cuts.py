"""The power of a whole node fails while jobs run: file system, database, jobs, audit trail and devices.

A machine is killed, which loses all that its kernel had not written to its raw disks, and is booted again on them. A
witness in the guest wishes for one release after the other and tells a file outside what the API has acknowledged.
Then the same with a disk whose cache is volatile too, at many points of one run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from guest import Container, Image, Machine, Serial, blklog
from guest.command import eventually
from guest.images import copy_disk, make_disk, run
from node_kit import API, ENDED, RELEASES, ROOT, Releases, board, configure, install, make_releases

from edged.testing.avr import SimulatedAvr

CUTS: Final = 20
NODES: Final = 2
"""They run at the same time, one for each of two cores."""
IN_A_FLASH: Final = 3
POINTS: Final = 60
DEVICES: Final = ("pump-1", "pump-2")
PORTS: Final = ("/dev/ttyS1", "/dev/ttyS2")
VERSIONS: Final = tuple(f"{number}.0.0" for number in range(1, 31))
FILLER_BYTES: Final = 5000
STATE_MIB: Final = 64
READY_S: Final = 600.0
ENGINE: Final = r"\n[engine]\nmax_attempts = 100\nmax_steps = 1000\nmax_trial_boots = 100\n"
REPORT: Final = ROOT / ".cache" / "power-cuts.md"
WITNESS_UNIT: Final = """\
[Service]
ExecStart=/usr/bin/python3 -I /srv/witness.py /dev/virtio-ports/witness {devices}
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class Disks:
    """An installed node: its system, and its state on a disk of its own."""

    image: Image
    system: Path
    state: Path
    releases: Releases


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What a witness had been told."""

    jobs: frozenset[str]
    states: frozenset[tuple[str, str]]
    audit: frozenset[tuple[int, str]]
    devices: frozenset[str]
    lives: int
    broken: tuple[str, ...]


@dataclass
class Cut:
    """One cut of the power: where it fell, what the database then held, what was missing from it."""

    where: str
    states: tuple[str, ...]
    acknowledged: int
    lost: int
    boot_s: float


@dataclass
class Campaign:
    """One node, killed again and again."""

    name: str
    cuts: list[Cut] = field(default_factory=list)
    jobs: Counter[str] = field(default_factory=Counter)
    end: str = ""


@pytest.fixture(scope="module")
def disks(images: dict[str, Image], deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Disks:
    """Installed and configured in a container, where it is quick; then the container's tree is a machine's disks."""
    folder, image = tmp_path_factory.mktemp("disks"), images["bookworm"]
    releases = make_releases(folder / "made", VERSIONS, FILLER_BYTES)
    with Container(image, folder / "container") as guest:
        shutil.copytree(releases.folder, guest.root / RELEASES.lstrip("/"))
        install(guest, deb)
        ports = {device: f"serial:{port}" for device, port in zip(DEVICES, PORTS, strict=True)}
        # a machine that others hold up answers late; what a job may bear is not the question here
        guest.sh(f"printf '{ENGINE}' >>/etc/edged/edged.toml")
        configure(guest, ports, device_config="answer_s = 5")
        guest.run("systemctl", "stop", "edged.service")
        guest.put(Path(__file__).with_name("witness.py"), "/srv/witness.py")
        guest.write("/etc/systemd/system/witness.service", WITNESS_UNIT.format(devices=" ".join(DEVICES)))
        guest.run("systemctl", "enable", "witness.service")
        guest.sh("echo '/dev/vdb /var/lib/edged ext4 defaults 0 2' >>/etc/fstab")
        guest.stop()
        state = guest.root / "var/lib/edged"
        make_disk(state, folder / "state.raw", STATE_MIB)
        for part in state.iterdir():
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        make_disk(guest.root, folder / "system.raw")
    return Disks(image, folder / "system.raw", folder / "state.raw", releases)


def acknowledged(witness: Path, size: int | None = None) -> Acknowledged:
    """What the first ``size`` bytes of the witness say; a line that was cut short says nothing."""
    text = witness.read_bytes()[:size].decode() if witness.exists() else ""
    facts = [
        json.loads(line) for line in text.splitlines(keepends=True) if line[0] == "{" and line[-1] == "\n"
    ]
    return Acknowledged(
        frozenset(fact["job"] for fact in facts if "job" in fact),
        frozenset((fact["job"], fact["state"]) for fact in facts if fact.get("state")),
        frozenset((fact["audit"], fact["hash"]) for fact in facts if "audit" in fact),
        frozenset(fact["device"] for fact in facts if "device" in fact),
        sum("life" in fact for fact in facts),
        tuple(
            json.dumps(fact["intact"]) for fact in facts if "life" in fact and not fact["intact"]["intact"]
        ),
    )


def rows(told: Acknowledged) -> int:
    """How many jobs and audit rows that is."""
    return len(told.jobs) + len(told.audit)


@contextlib.contextmanager
def mounted(disk: Path, folder: Path) -> Iterator[Path]:
    """The file system of a disk after a cut: its journal is replayed, as at a boot."""
    folder.mkdir(exist_ok=True)
    run("mount", "-o", "loop", str(disk), str(folder))
    try:
        yield folder
    finally:
        run("umount", str(folder))


@dataclass(frozen=True, slots=True)
class Found:
    """What lies on a state disk after a cut."""

    states: tuple[str, ...]
    lost: int
    sound: str
    most_at_once: int


def look(disk: Path, folder: Path, told: Acknowledged) -> Found:
    """Check file system and database of ``disk``, which is changed by that, against what was acknowledged."""
    with mounted(disk, folder) as state:
        found = _look_at(state / "edged.db", told)
    run("e2fsck", "-fn", str(disk))
    return found


def _look_at(database: Path, told: Acknowledged) -> Found:
    try:
        with contextlib.closing(sqlite3.connect(database)) as connection:
            sound = connection.execute("PRAGMA integrity_check").fetchone()[0]
            jobs = connection.execute("SELECT id, device, state FROM job ORDER BY seq").fetchall()
            audit = set(connection.execute("SELECT seq, hash FROM audit").fetchall())
            history = set(connection.execute("SELECT job, to_state FROM job_history").fetchall())
    except sqlite3.DatabaseError as error:
        return Found((), rows(told), str(error), 0)
    active = [(device, state) for _, device, state in jobs if state not in ENDED]
    lost = len(told.jobs - {job for job, _, _ in jobs}) + len(told.audit - audit) + len(told.states - history)
    at_once = Counter(device for device, _ in active)
    states = tuple(sorted(state for _, state in active)) or ("none active",)
    return Found(states, lost, sound, max(at_once.values(), default=0))


@contextlib.contextmanager
def node(
    disks: Disks, folder: Path, state: str, *, kernel_line: str = ""
) -> Iterator[tuple[Machine, dict[str, SimulatedAvr]]]:
    """A node with its boards, not yet booted. ``state`` is the option of its second disk."""
    with contextlib.ExitStack() as stack:
        boards = {device: stack.enter_context(board(folder / device)) for device in DEVICES}
        serials = [Serial(avr.port, avr.pid) for avr in boards.values()]
        machine = Machine(
            disks.image,
            folder / "system.raw",
            folder / "machine",
            serials=serials,
            state=state,
            kernel_line=kernel_line,
            power_on=False,
        )
        yield stack.enter_context(machine), boards


def raw(disk: Path) -> str:
    return f"driver=raw,node-name=state,file.driver=file,file.filename={disk}"


OVER: Final = threading.Event()
"""Set where the tests are ended, so that no thread goes on with its node."""


def told_more(machine: Machine, by: Callable[[Acknowledged], int], what: str) -> None:
    """Return when the witness has been told more than now of what ``by`` counts."""
    before = by(acknowledged(machine.witness))

    def more() -> bool:
        assert not OVER.is_set() and not machine.ended(), machine.console_end()
        return by(acknowledged(machine.witness)) > before

    eventually(more, READY_S, what, every_s=0.1)


def live(machine: Machine) -> float:
    """Boot until the daemon has answered the witness; how long that took."""
    began = time.monotonic()
    machine.start(wait=False)
    told_more(machine, lambda told: told.lives, "the daemon's answer after the boot")
    return time.monotonic() - began


def flashes(told: Acknowledged) -> int:
    """How many jobs the witness saw write their device."""
    return sum(state == "staging" for _, state in told.states)


def let_run(machine: Machine, number: int, dice: random.Random) -> tuple[str, float]:
    """Boot, and return when it is time for the cut ``number``: where that is, and how long the boot took.

    Each fifth falls into the boot, one into a flash, so that this is not left to chance; the others between the answer to the
    boot and some seconds of a job at work.
    """
    if number % 5 == 4:
        after_s = dice.uniform(3, 20)
        machine.start(wait=False)
        time.sleep(after_s)
        return f"boot, after {after_s:.1f} s", 0.0
    boot_s = live(machine)
    if number == IN_A_FLASH:
        told_more(machine, flashes, "a device that is written")
        after_s = dice.uniform(0, 1)
        time.sleep(after_s)
        return f"a flash, after {after_s:.1f} s", boot_s
    told_more(machine, lambda told: len(told.states), "a job that goes on")
    after_s = dice.uniform(0, 6)
    time.sleep(after_s)
    return f"jobs, after {after_s:.1f} s", boot_s


def campaign(number: int, disks: Disks, folder: Path) -> Campaign:
    """Boot, let jobs run, kill, look, and again; then let the last jobs end, and look at everything."""
    dice, told = random.Random(2026 + number), Campaign(f"node {number}")
    folder.mkdir()
    copy_disk(disks.system, folder / "system.raw")
    state = copy_disk(disks.state, folder / "state.raw")
    with node(disks, folder, raw(state)) as (machine, boards):
        for cut in range(CUTS // NODES):
            where, boot_s = let_run(machine, cut, dice)
            machine.kill()
            said = acknowledged(machine.witness)
            found = look(copy_disk(state, folder / "look.raw"), folder / "mnt", said)
            acks = rows(said)
            told.cuts.append(Cut(where, found.states, acks, found.lost, boot_s))
            assert found.sound == "ok" and found.most_at_once <= 1 and found.lost == 0, (found, told)
        _end(machine, boards, disks, told)
        for disk in (state, folder / "system.raw"):
            run("e2fsck", "-fn", str(disk))
        broken = acknowledged(machine.witness).broken
        assert not broken, f"an audit trail that is not intact: {broken}"
    return told


def _end(machine: Machine, boards: dict[str, SimulatedAvr], disks: Disks, told: Campaign) -> None:
    """The last life: all jobs end, each device holds the image of its last job."""
    live(machine)
    machine.await_agent()

    def rest() -> list[Any]:
        program = f'{API}\nprint(json.dumps(ask("GET", "jobs?limit=100")["jobs"]))'
        jobs: list[Any] = json.loads(machine.python(program, timeout_s=120))
        return jobs if all(job["state"] in ENDED for job in jobs) else []

    eventually(
        lambda: len(acknowledged(machine.witness).devices) == len(DEVICES), 240, "a job for each device"
    )
    machine.run("touch", "/run/enough")
    jobs = eventually(rest, 300, "the end of the last jobs", every_s=2)
    told.jobs.update(job["state"] for job in jobs)
    assert set(told.jobs) == {"succeeded"}, told.jobs
    for device, avr in boards.items():
        last = max(int(job["release"].split("@")[1].split(".")[0]) for job in jobs if job["device"] == device)
        assert disks.releases.differing(f"{last}.0.0", avr.flash()) == 0, f"{device} holds another image"
        told.end += f"{device}: {last}.0.0, byte for byte; "
    told.end += machine.run("edged", "audit", "verify", timeout_s=120).out.strip()
    assert "Intact" in told.end, told.end
    machine.power_off()


@pytest.mark.timeout(3600)
def test_twenty_power_cuts_lose_nothing_that_was_acknowledged(disks: Disks, tmp_path: Path) -> None:
    try:
        with ThreadPoolExecutor(NODES) as pool:
            running = [
                pool.submit(campaign, number, disks, tmp_path / str(number)) for number in range(NODES)
            ]
            try:
                campaigns = [one.result() for one in running]
            except BaseException:
                OVER.set()
                raise
    finally:
        OVER.clear()
    table = report(campaigns)
    REPORT.write_text(table)
    print(f"\n{table}")
    cuts = [cut for one in campaigns for cut in one.cuts]
    assert len(cuts) == CUTS
    hit = [cut for cut in cuts if cut.states != ("none active",)]
    assert len(hit) >= CUTS // 2, "the cuts met no jobs"
    assert any("staging" in cut.states for cut in cuts), "no cut met a device that was being written"
    assert all(sum(one.jobs.values()) >= 2 for one in campaigns)


def report(campaigns: list[Campaign]) -> str:
    """The table of all cuts."""
    lines = [
        "| node | cut | where it fell | jobs in state | acknowledged | lost | boot to ready, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in campaigns:
        lines += [
            f"| {one.name} | {number} | {cut.where} | {', '.join(cut.states)} | {cut.acknowledged} "
            f"| {cut.lost} | {cut.boot_s:.1f} |"
            for number, cut in enumerate(one.cuts, 1)
        ]
    ends = [f"{one.name}: {dict(one.jobs)}; {one.end}" for one in campaigns]
    return "\n".join([*lines, "", *ends]) + "\n"


@pytest.mark.timeout(1800)
def test_a_volatile_disk_cache_loses_nothing_that_was_acknowledged(disks: Disks, tmp_path: Path) -> None:
    copy_disk(disks.system, tmp_path / "system.raw")
    state, log = copy_disk(disks.state, tmp_path / "state.raw"), tmp_path / "log.raw"
    base = copy_disk(state, tmp_path / "base.raw")
    with node(disks, tmp_path, blklog.options(state, log)) as (machine, _):
        with blklog.sampled(machine.witness, log) as samples:
            live(machine)
            first = blklog.entries(log)
            time.sleep(40)
            eventually(lambda: blklog.entries(log) - first > 2 * POINTS, READY_S, "enough that was written")
            eventually(lambda: rows(acknowledged(machine.witness)) > 10, READY_S, "enough to lose")
        machine.kill()
        witness = machine.witness
    writes = blklog.parse(log)
    dice = random.Random(2026)
    assert len(writes) - first > POINTS, "hardly anything was written"
    points = sorted(dice.sample(range(first, len(writes)), POINTS))
    target, mnt = tmp_path / "target.raw", tmp_path / "mnt"
    told_at = []
    for point in points:
        blklog.crash(writes, log, base, target, point, dice, kept=blklog.durable(writes, point))
        told_bytes = max((sample.told_bytes for sample in samples if sample.entries <= point), default=0)
        told = acknowledged(witness, told_bytes)
        found = look(target, mnt, told)
        assert (found.sound, found.lost, found.most_at_once <= 1) == ("ok", 0, True), f"{point}: {found}"
        told_at.append(rows(told))
    assert max(told_at) > 10 and sum(map(bool, told_at)) > POINTS / 2, f"hardly anything to lose: {told_at}"
    # the same check on a disk that lies about its flushes: it must find what is missing
    blklog.crash(writes, log, base, target, first, dice, kept=first)
    liar = look(target, mnt, acknowledged(witness))
    assert liar.lost > 0
    print(
        f"{POINTS} points of {len(writes)} writes, up to {max(told_at)} acknowledged rows and jobs: none lost"
    )


PAGE: Final = (
    (ROOT / "docs/boards/README.md").read_text().partition("\n## Read-only root\n")[2].partition("\n## ")[0]
)
"""What the page says of a root that is read-only."""


def block(kind: str) -> str:
    """The page's block of that kind."""
    (found,) = re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def make_read_only(system: Path, state: Path, folder: Path) -> None:
    """As the page says; the rest is what every such system has: tmpfs where others write."""
    run("e2label", str(state), "edged")
    with mounted(system, folder) as root:
        temporary = ("/tmp", "/var/tmp", "/var/log", "/var/lib/systemd")
        lines = ["/dev/vda / ext4 ro 0 1", *(f"tmpfs {path} tmpfs mode=1777 0 0" for path in temporary)]
        (root / "etc/fstab").write_text("\n".join([*lines, block("")]))
        drop_in = root / "etc/systemd/system/edged.service.d/override.conf"
        drop_in.parent.mkdir()
        drop_in.write_text(block("ini"))


@pytest.mark.timeout(1800)
def test_a_root_that_is_read_only_and_a_power_cut(disks: Disks, tmp_path: Path) -> None:
    system, state = (
        copy_disk(disks.system, tmp_path / "system.raw"),
        copy_disk(disks.state, tmp_path / "state.raw"),
    )
    make_read_only(system, state, tmp_path / "mnt")
    before = hashlib.sha256(system.read_bytes()).digest()
    with node(disks, tmp_path, raw(state), kernel_line="ro") as (machine, _):
        live(machine)
        told_more(machine, lambda told: len(told.states), "a job that goes on")
        machine.kill()
        said = acknowledged(machine.witness)
        found = look(copy_disk(state, tmp_path / "look.raw"), tmp_path / "mnt", said)
        assert (found.sound, found.lost) == ("ok", 0), found
        live(machine)
        machine.await_agent()
        machine.await_boot(READY_S)
        assert machine.run("touch", "/usr/lib/edged/written", check=False).code == 1, (
            "the root can be written"
        )
        mounted_by = machine.sh("findmnt -no FSTYPE,OPTIONS /var/lib/edged").split()
        assert mounted_by == ["ext4", "rw,noatime"], "not by the page's line"
        assert machine.unit("edged.service", "NRestarts") == "0"
        eventually(
            lambda: any(state == "succeeded" for _, state in acknowledged(machine.witness).states),
            300,
            "a job",
        )
        machine.power_off()
    assert hashlib.sha256(system.read_bytes()).digest() == before, "the root was written to"
