"""What a power cut in the middle of an upgrade leaves, and what a boot makes of it. A real dpkg, killed for real."""

from __future__ import annotations

import fcntl
import os
import random
import struct
import subprocess
import time
from pathlib import Path

import pytest
from helper_kit import LIBEXEC, Node, Repository, kill, make_deb, run, wait_for

Debs = dict[str, Path]

pytestmark = pytest.mark.slow

BLOCK = 'touch "$DPKG_ROOT/blocked"; sleep 60'


@pytest.fixture
def on_1_0(node: Node, debs: Debs) -> Node:
    """A node on which 1.0 runs; its package is kept, as an upgrade by apt left it."""
    node.keep_deb(debs["1.0"])
    node.dpkg("-i", debs["1.0"])
    node.keep_deb(done=True)
    assert not (node.state / "in-progress").exists()
    return node


def upgrade_and_cut(node: Node, deb: Path) -> None:
    """As apt does it, up to where a script of the package blocks; then the power dies."""
    node.keep_deb(deb)
    process = node.start_dpkg("-i", deb)
    try:
        wait_for(node.root / "blocked")
    finally:
        kill(process)
    (node.root / "blocked").unlink()


def assert_whole(node: Node, version: str, by: str) -> None:
    assert node.status() == f"ii {version}" and version in node.runs()
    assert node.dpkg("-V", "edged") == ""
    assert not (node.state / "in-progress").exists()
    note = node.note()
    assert (note["result"], note["version"], note["step"]) == ("recovered", version, by), note


def test_nothing_to_do(on_1_0: Node) -> None:
    assert on_1_0.recover() == ""
    assert not (on_1_0.state / "recovered").exists()


def test_a_cut_before_dpkg_began(on_1_0: Node, debs: Debs) -> None:
    on_1_0.keep_deb(debs["2.0"])
    assert (on_1_0.state / "in-progress").read_text() == "from=1.0\nto=2.0\n"
    on_1_0.recover()
    assert_whole(on_1_0, "1.0", "look")


def test_half_installed(node: Node, debs: Debs, tmp_path: Path) -> None:
    """Cut by the old package's script between the new files and the end of unpacking."""
    old = make_deb(
        tmp_path,
        "1.0",
        scripts={"postrm": f'[ "$1" != upgrade ] || [ -e "$DPKG_ROOT/second" ] || {{ {BLOCK}; }}'},
    )
    node.dpkg("-i", old)
    upgrade_and_cut(node, debs["2.0"])
    assert node.status() == "iHR1.0" and "2.0" in node.runs(), (
        "new files, and dpkg believes in the old version"
    )
    assert list((node.root / "var/lib/dpkg/updates").iterdir()), "and its journal is not merged"
    (node.root / "second").touch()
    node.recover()
    assert_whole(node, "2.0", "dpkg -i edged_2.0.deb")
    assert not list((node.root / "var/lib/dpkg/updates").iterdir())


def test_half_installed_before_a_file_was_written(on_1_0: Node, tmp_path: Path) -> None:
    new = make_deb(tmp_path, "2.0", scripts={"preinst": f'[ -e "$DPKG_ROOT/second" ] || {{ {BLOCK}; }}'})
    upgrade_and_cut(on_1_0, new)
    assert on_1_0.status()[1] == "H" and "1.0" in on_1_0.runs()
    (on_1_0.root / "second").touch()
    on_1_0.recover()
    assert_whole(on_1_0, "2.0", "dpkg -i edged_2.0.deb")


def test_unpacked(on_1_0: Node, debs: Debs) -> None:
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.dpkg("--unpack", debs["2.0"])
    assert on_1_0.status() == "iU 2.0"
    on_1_0.recover()
    assert_whole(on_1_0, "2.0", "dpkg --configure edged")


def test_half_configured(on_1_0: Node, tmp_path: Path) -> None:
    new = make_deb(tmp_path, "2.0", scripts={"postinst": f'[ -e "$DPKG_ROOT/second" ] || {{ {BLOCK}; }}'})
    upgrade_and_cut(on_1_0, new)
    assert on_1_0.status() == "iF 2.0"
    (on_1_0.root / "second").touch()
    on_1_0.recover()
    assert_whole(on_1_0, "2.0", "dpkg --configure edged")


@pytest.mark.parametrize(("script", "left"), [("exit 1", "iF"), ("exit 0", "ii")])
def test_other_packages_of_the_same_run_come_after_ours(
    on_1_0: Node, debs: Debs, tmp_path: Path, script: str, left: str
) -> None:
    """Its name is before ours, so that dpkg would take it first; what it lacks does not keep the daemon down."""
    on_1_0.keep_deb(debs["2.0"])
    other = make_deb(tmp_path, "5", name="another", scripts={"postinst": script})
    on_1_0.dpkg("--unpack", other, debs["2.0"])
    said = on_1_0.recover()
    assert_whole(on_1_0, "2.0", "dpkg --configure edged")
    assert on_1_0.status("another") == f"{left} 5"
    assert ("other packages were cut too" in said) == (left != "ii")


def test_what_ours_needs_was_not_set_up_either(on_1_0: Node, tmp_path: Path) -> None:
    new = make_deb(tmp_path, "2.0", depends="library")
    on_1_0.keep_deb(new)
    on_1_0.dpkg("--unpack", make_deb(tmp_path, "5", name="library"), new)
    on_1_0.recover()
    assert_whole(on_1_0, "2.0", "dpkg --configure -a")


@pytest.mark.parametrize("script", ["preinst", "postinst"])
def test_a_new_version_that_cannot_be_installed_gives_way_to_the_old_one(
    on_1_0: Node, tmp_path: Path, script: str
) -> None:
    new = make_deb(tmp_path, "2.0", scripts={script: f'[ ! -e "$DPKG_ROOT/second" ] || exit 1; {BLOCK}'})
    upgrade_and_cut(on_1_0, new)
    (on_1_0.root / "second").touch()
    on_1_0.recover()
    assert_whole(on_1_0, "1.0", on_1_0.note()["step"])


@pytest.mark.parametrize("how", ["empty", "short", "missing"])
def test_torn_files(on_1_0: Node, debs: Debs, how: str) -> None:
    """dpkg had ended, and not everything had reached the disk."""
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.dpkg("-i", debs["2.0"])
    torn = on_1_0.root / "usr/lib/edged/app.py"
    if how == "missing":
        torn.unlink()
    else:
        torn.write_text("" if how == "empty" else torn.read_text()[:5])
    assert "damaged" in on_1_0.recover()
    assert_whole(on_1_0, "2.0", "dpkg -i edged_2.0.deb")


def test_compiled_python_that_is_torn_goes(on_1_0: Node, debs: Debs) -> None:
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.dpkg("-i", debs["2.0"])
    cache = on_1_0.root / "usr/lib/edged/__pycache__"
    cache.mkdir()
    torn = cache / "app.cpython-311.pyc"
    torn.write_bytes(b"torn")
    on_1_0.recover()
    assert not torn.exists() or torn.read_bytes() != b"torn"


def test_a_changed_conffile_is_no_damage_and_stays(on_1_0: Node, debs: Debs) -> None:
    conffile = on_1_0.root / "etc/edged/edged.toml"
    conffile.write_text("changed = true\n")
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.dpkg("--force-confold", "-i", debs["2.0"])
    on_1_0.recover()
    assert on_1_0.note()["step"] == "look" and conffile.read_text() == "changed = true\n"
    (on_1_0.root / "usr/lib/edged/app.py").unlink()
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.recover()
    assert_whole_but_conffile(on_1_0)
    assert conffile.read_text() == "changed = true\n"


def assert_whole_but_conffile(node: Node) -> None:
    assert node.status() == "ii 2.0" and node.note()["result"] == "recovered"


def test_without_a_mark_what_apt_kept_last_is_what_there_is(on_1_0: Node, debs: Debs, tmp_path: Path) -> None:
    """An operator ran dpkg without apt."""
    new = make_deb(tmp_path, "2.0", scripts={"preinst": BLOCK})
    process = on_1_0.start_dpkg("-i", new)
    try:
        wait_for(on_1_0.root / "blocked")
    finally:
        kill(process)
    assert on_1_0.status()[1] == "H" and not (on_1_0.state / "in-progress").exists()
    on_1_0.recover()
    assert_whole(on_1_0, "1.0", "dpkg -i edged_1.0.deb")


def test_nothing_kept_is_said_and_ends(node: Node, debs: Debs, tmp_path: Path) -> None:
    node.dpkg("-i", debs["1.0"])
    new = make_deb(tmp_path, "2.0", scripts={"preinst": BLOCK})
    process = node.start_dpkg("-i", new)
    try:
        wait_for(node.root / "blocked")
    finally:
        kill(process)
    began = time.monotonic()
    assert "apt-get install --reinstall edged" in node.recover(code=1)
    assert time.monotonic() - began < 30
    assert node.note()["result"] == "failed"
    # the operator's cure is one
    node.dpkg("-i", debs["2.0"])
    assert node.recover() == ""


def test_a_package_that_goes_is_not_brought_back(on_1_0: Node, debs: Debs, tmp_path: Path) -> None:
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.dpkg("-r", "edged")
    on_1_0.recover()
    assert on_1_0.status() == "rc 1.0" and not (on_1_0.state / "in-progress").exists()
    on_1_0.dpkg("-P", "edged")
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.recover()
    assert on_1_0.status() in ("", "un ") and not (on_1_0.state / "in-progress").exists()


def test_a_shutdown_waits_for_dpkg(on_1_0: Node, tmp_path: Path) -> None:
    """systemd tells the script, and kills all that is left when it ends."""
    script = 'touch "$DPKG_ROOT/blocked"; sleep 2'
    new = make_deb(tmp_path, "2.0", scripts={"postinst": script})
    on_1_0.keep_deb(new)
    on_1_0.dpkg("--unpack", new)
    recovering = subprocess.Popen(
        [LIBEXEC / "edged-recover"], env=os.environ | on_1_0.environment, start_new_session=True
    )
    try:
        wait_for(on_1_0.root / "blocked")
        recovering.terminate()
        assert recovering.wait(30) == 0
    finally:
        kill(recovering)
    assert_whole(on_1_0, "2.0", "dpkg --configure edged")


def hold_lock(node: Node, name: str) -> int:
    """Take dpkg's lock, as another dpkg of this system would."""
    fd = os.open(node.root / "var/lib/dpkg" / name, os.O_RDWR | os.O_CREAT, 0o640)
    fcntl.lockf(fd, fcntl.LOCK_EX)
    return fd


@pytest.mark.parametrize("name", ["lock", "lock-frontend"])
def test_somebody_else_has_the_lock(on_1_0: Node, debs: Debs, name: str) -> None:
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.dpkg("--unpack", debs["2.0"])
    fd = hold_lock(on_1_0, name)
    try:
        process = subprocess.Popen(
            [LIBEXEC / "edged-recover"],
            env=os.environ | on_1_0.environment | {"EDGED_HELPER_LOCK_TRIES": "20"},
        )
        time.sleep(2)
        assert process.poll() is None and on_1_0.status() == "iU 2.0"
    finally:
        os.close(fd)
    assert process.wait(60) == 0
    assert_whole(on_1_0, "2.0", "dpkg --configure edged")


def test_a_lock_that_is_never_free_does_not_hold_the_boot_up_for_ever(on_1_0: Node, debs: Debs) -> None:
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.dpkg("--unpack", debs["2.0"])
    fd = hold_lock(on_1_0, "lock-frontend")
    try:
        on_1_0.recover(code=1, lock_tries=1)
    finally:
        os.close(fd)
    assert (on_1_0.state / "in-progress").exists(), "the next boot tries again"
    on_1_0.recover()
    assert_whole(on_1_0, "2.0", "dpkg --configure edged")


@pytest.mark.parametrize("installed", ["1.0", ""])
def test_started_while_apt_is_about_to_begin_it_leaves_the_mark_alone(
    node: Node, debs: Debs, installed: str
) -> None:
    """An operator took an upgrade at work for one that was cut."""
    if installed:
        node.dpkg("-i", debs["1.0"])
    fd = hold_lock(node, "lock-frontend")
    try:
        node.keep_deb(debs["2.0"])
        assert "at work" in node.recover(code=1, lock_tries=1)
        assert (node.state / "in-progress").exists() and not (node.state / "recovered").exists()
    finally:
        os.close(fd)


def test_what_apt_ends_meanwhile_is_no_cut(on_1_0: Node, debs: Debs) -> None:
    fd = hold_lock(on_1_0, "lock-frontend")
    try:
        on_1_0.keep_deb(debs["2.0"])
        process = subprocess.Popen(
            [LIBEXEC / "edged-recover"],
            env=os.environ | on_1_0.environment | {"EDGED_HELPER_LOCK_TRIES": "20"},
        )
        time.sleep(1)
        assert process.poll() is None and (on_1_0.state / "in-progress").exists()
        on_1_0.keep_deb(done=True)
    finally:
        os.close(fd)
    assert process.wait(60) == 0
    assert on_1_0.status() == "ii 1.0" and not (on_1_0.state / "recovered").exists()


def test_a_lock_file_that_was_left_is_no_lock(on_1_0: Node, debs: Debs) -> None:
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.dpkg("--unpack", debs["2.0"])
    for name in ("lock", "lock-frontend"):
        (on_1_0.root / "var/lib/dpkg" / name).write_bytes(struct.pack("q", 1))
    on_1_0.recover()
    assert_whole(on_1_0, "2.0", "dpkg --configure edged")


def duration_s(node: Node, deb: Path) -> float:
    """How long dpkg takes to install it."""
    began = time.monotonic()
    node.dpkg("-i", deb)
    return time.monotonic() - began


def test_cut_at_random_again_and_again(on_1_0: Node, tmp_path: Path) -> None:
    """dpkg is killed at some moment, the recovery too, and a last boot makes it whole, every time."""
    chance = random.Random(20261126)
    big = [make_deb(tmp_path, version, size_bytes=6_000_000) for version in ("2.0", "2.1")]
    # the shortest: by one that was held up, every cut would come after the end
    took_s = min(duration_s(on_1_0, deb) for deb in (*big, big[0]))
    seen = set()
    for number in range(12):
        deb = big[(number + 1) % 2]
        on_1_0.keep_deb(deb)
        process = on_1_0.start_dpkg("-i", deb)
        time.sleep(chance.uniform(0, took_s * 1.1))
        kill(process)
        seen.add(on_1_0.status()[:3])
        recovering = subprocess.Popen(
            [LIBEXEC / "edged-recover"],
            env=os.environ | on_1_0.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(chance.uniform(0, took_s))
        kill(recovering)
        on_1_0.recover()
        assert on_1_0.status()[:3] == "ii " and on_1_0.dpkg("-V", "edged") == "", number
    assert len(seen) > 1, f"every cut came at the same moment: {seen}"


# -- what apt calls


def test_apt_keeps_the_package_and_the_mark_only_as_long_as_dpkg_works(
    node: Node, debs: Debs, repository: Repository
) -> None:
    node.sources(repository)
    configuration = ("-c", node.root / "apt.conf", "-q")
    run("apt-get", *configuration, "update")
    witness = node.root / "witness"
    script = node.root / "bin/edged-keep-deb"
    text = script.read_text()
    script.write_text(f"{text.replace('exec ', '')}ls {node.state} {node.state}/debs >>{witness}\n")
    run("apt-get", *configuration, "install", "--yes", "edged=1.0")
    run("apt-get", *configuration, "install", "--yes", "edged=2.0")
    assert node.status() == "ii 2.0"
    assert "in-progress" in witness.read_text()
    assert sorted(path.name for path in (node.state / "debs").iterdir()) == ["edged_1.0.deb", "edged_2.0.deb"]
    assert not (node.state / "in-progress").exists()
    assert (node.state / "previous").read_text() == "1.0\n"


def test_apt_goes_on_where_nothing_can_be_kept(node: Node, debs: Debs, repository: Repository) -> None:
    node.state.rmdir()
    node.state.symlink_to("/proc")
    node.sources(repository)
    run("apt-get", "-c", node.root / "apt.conf", "-q", "update")
    said = run("apt-get", "-c", node.root / "apt.conf", "-q", "install", "--yes", "edged=1.0")
    assert "cannot keep" in said and node.status() == "ii 1.0"


def test_apt_goes_on_where_the_package_is_gone(node: Node, debs: Debs, repository: Repository) -> None:
    """The conffile stays when the package is removed; what it calls does not."""
    node.sources(repository)
    (node.root / "bin/edged-keep-deb").unlink()
    run("apt-get", "-c", node.root / "apt.conf", "-q", "update")
    said = run("apt-get", "-c", node.root / "apt.conf", "-q", "install", "--yes", "edged=1.0")
    assert node.status() == "ii 1.0" and "not found" not in said


def test_a_failed_upgrade_keeps_the_mark_and_a_boot_puts_the_old_one_back(
    on_1_0: Node, debs: Debs, repository: Repository
) -> None:
    on_1_0.sources(repository)
    run("apt-get", "-c", on_1_0.root / "apt.conf", "-q", "update")
    run("apt-get", "-c", on_1_0.root / "apt.conf", "-q", "install", "--yes", "edged=2.1~postinst", code=100)
    assert on_1_0.status() == "iF 2.1~postinst"
    on_1_0.recover()
    assert_whole(on_1_0, "1.0", "dpkg -i edged_1.0.deb")


def test_packages_of_others_and_odd_names_are_left_alone(node: Node, tmp_path: Path, debs: Debs) -> None:
    other = make_deb(tmp_path, "1.0", name="part")
    odd = tmp_path / "a name with spaces.deb"
    odd.write_bytes(debs["1.0"].read_bytes())
    broken = tmp_path / "edged_9.9_all.deb"
    broken.write_bytes(b"no package")
    node.keep_deb(other, broken, tmp_path / "missing.deb")
    assert not (node.state / "debs").exists() and not (node.state / "in-progress").exists()
    node.keep_deb(other, odd)
    assert [path.name for path in (node.state / "debs").iterdir()] == ["edged_1.0.deb"]
    assert (node.state / "in-progress").read_text() == "from=\nto=1.0\n"


@pytest.mark.parametrize("script", ["edged-keep-deb", "edged-recover"])
def test_scripts_are_plain_shell(script: str) -> None:
    run("shellcheck", "--shell=sh", LIBEXEC / script)
    run("dash", "-n", LIBEXEC / script)
