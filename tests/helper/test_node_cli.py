"""``edged node``: what an operator types, and what it answers."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from helper_kit import ROOT, Node, Repository, served, somebody_at_work

from edged.cli.doctor import Finding, check_package
from edged.helper.state import Operation, Phase, State

Debs = dict[str, Path]

pytestmark = pytest.mark.slow


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edged", "node", *words, "--helper", str(folder / "helper.sock")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def typed(node: Node, folder: Path, *words: str, start_s: float = 3) -> subprocess.CompletedProcess[str]:
    async def asked() -> subprocess.CompletedProcess[str]:
        async with served(node, folder, start_s=start_s):
            return await asyncio.to_thread(command, folder, *words)

    return asyncio.run(asked())


@pytest.fixture
def on_1_0(node: Node, debs: Debs, repository: Repository) -> Node:
    node.dpkg("-i", debs["1.0"])
    node.sources(repository)
    return node


def test_upgrade_status_rollback(on_1_0: Node, tmp_path: Path) -> None:
    done = typed(on_1_0, tmp_path, "upgrade", "2.0")
    assert (done.returncode, done.stdout) == (0, "2.0 runs\n"), done.stderr
    assert done.stderr.splitlines() == ["preparing …", "installing …", "watching …"]
    status = typed(on_1_0, tmp_path, "status").stdout.splitlines()
    assert status[:2] == ["package   edged 2.0, whole", "kept      1.0, 2.0; before it ran 1.0"]
    assert status[2].startswith("last      upgrade from 1.0 to 2.0: ok, 2.0 runs (20")
    done = typed(on_1_0, tmp_path, "rollback", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["to_version"] == "1.0"
    assert on_1_0.status() == "ii 1.0"


def test_a_refusal_and_a_failure_have_their_exit_codes(on_1_0: Node, tmp_path: Path) -> None:
    done = typed(on_1_0, tmp_path, "upgrade", "9.9")
    assert done.returncode == 3 and done.stdout == ""
    assert (
        "edged: refused (not_found): no repository of this node has edged 9.9; cure: publish" in done.stderr
    )
    done = typed(on_1_0, tmp_path, "upgrade", "2.1~bad", "--json")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["reason"] == "health_failed" and "1.0 is back" in found["detail"] and found["cure"]
    done = typed(on_1_0, tmp_path, "upgrade", "../etc/passwd")
    assert done.returncode == 3 and "request_invalid" in done.stderr


def test_nobody_answers(tmp_path: Path) -> None:
    for words in (["status"], ["upgrade", "2.0"], ["rollback"], ["reboot"]):
        done = command(tmp_path, *words)
        assert done.returncode == 4 and "sudo" in done.stderr


def test_restart(on_1_0: Node, tmp_path: Path) -> None:
    done = typed(on_1_0, tmp_path, "reboot")
    assert (done.returncode, done.stdout) == (0, "The node restarts.\n") and on_1_0.reboots() == 1


def test_the_helper_goes_away_in_the_middle_and_the_next_one_answers(on_1_0: Node, tmp_path: Path) -> None:
    async def asked() -> subprocess.CompletedProcess[str]:
        async with served(on_1_0, tmp_path):
            waiting = asyncio.create_task(asyncio.to_thread(command, tmp_path, "upgrade", "2.0"))
            state = State(on_1_0.state)
            while (now := state.operation()) is None or now.phase is not Phase.WATCHING:
                await asyncio.sleep(0.05)
        async with served(on_1_0, tmp_path):
            return await waiting

    done = asyncio.run(asked())
    assert (done.returncode, done.stdout) == (0, "2.0 runs\n"), done.stderr


def test_status_shows_what_a_cut_left_and_what_a_boot_did(on_1_0: Node, tmp_path: Path, debs: Debs) -> None:
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.dpkg("--unpack", debs["2.0"])
    said = typed(on_1_0, tmp_path, "status").stdout
    assert (
        "package   edged 2.0, iU" in said
        and "PROBLEM   an upgrade was cut; cure: systemctl start edged-recover" in said
    )
    on_1_0.recover()
    said = typed(on_1_0, tmp_path, "status").stdout
    assert (
        "boot      upgrade to 2.0 was cut: recovered by dpkg --configure edged (20" in said
        and "PROBLEM" not in said
    )


def examined(node: Node, folder: Path) -> list[tuple[str, str, str, str]]:
    """What the doctor finds."""

    async def asked() -> list[Finding]:
        async with served(node, folder):
            return await asyncio.to_thread(lambda: list(check_package(folder / "helper.sock")))

    return [(one.level.value, one.what, one.detail, one.cure) for one in asyncio.run(asked())]


def test_the_doctor_shows_what_a_cut_left_and_what_a_boot_did(
    on_1_0: Node, tmp_path: Path, debs: Debs
) -> None:
    assert list(check_package(tmp_path / "helper.sock")) == [], "no package of which there is a helper"
    assert examined(on_1_0, tmp_path) == [("ok", "package", "edged 1.0, whole", "")]
    on_1_0.keep_deb(debs["2.0"])
    on_1_0.dpkg("--unpack", debs["2.0"])
    cut = ("fail", "package", "edged 2.0, iU; an upgrade was cut", "systemctl start edged-recover")
    assert examined(on_1_0, tmp_path) == [cut]
    on_1_0.recover()
    whole, boot = examined(on_1_0, tmp_path)
    assert whole == ("ok", "package", "edged 2.0, whole", "")
    assert boot[2].startswith("upgrade to 2.0 was cut: recovered by dpkg --configure edged (20")


def test_the_doctor_tells_of_an_upgrade_that_failed(on_1_0: Node, tmp_path: Path) -> None:
    assert typed(on_1_0, tmp_path, "upgrade", "2.1~bad").returncode == 1
    whole, last = examined(on_1_0, tmp_path)
    assert whole == ("ok", "package", "edged 1.0, whole", "")
    level, _, detail, cure = last
    assert (
        level == "warn" and "from 1.0 to 2.1~bad: failed (health_failed)" in detail and "journalctl" in cure
    )


@pytest.mark.parametrize("name", ["lock", "lock-frontend"])
def test_status_does_not_call_an_upgrade_by_apt_a_cut(
    on_1_0: Node, tmp_path: Path, debs: Debs, name: str
) -> None:
    with somebody_at_work(on_1_0, name):
        on_1_0.keep_deb(debs["2.0"])
        said = typed(on_1_0, tmp_path, "status").stdout
        assert "PROBLEM" not in said and "at work   apt or dpkg, started by somebody else\n" in said
    said = typed(on_1_0, tmp_path, "status").stdout
    assert "PROBLEM   an upgrade was cut" in said and "at work" not in said


def test_status_shows_what_is_at_work(on_1_0: Node, tmp_path: Path, debs: Debs) -> None:
    """Asked while the helper goes on with what a cut left, and has not given the daemon up yet."""
    state = State(on_1_0.state)
    state.keep("1.0", debs["1.0"].read_bytes())
    on_1_0.dpkg("-i", debs["2.1~bad"])
    state.begin(Operation("upgrade", "1.0", "2.1~bad", Phase.WATCHING))
    said = typed(on_1_0, tmp_path, "status", start_s=120).stdout
    assert "at work   upgrade from 1.0 to 2.1~bad: watching" in said
