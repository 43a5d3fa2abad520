"""Upgrades with a real apt, a real dpkg and a signed repository, in a system of their own."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helper_kit import Answers, Node, Repository, ask, make_deb, run, served, somebody_at_work, wait_for

from edged.helper import apt
from edged.helper.client import HelperClient, HelperGone
from edged.helper.protocol import Why
from edged.helper.state import Operation, Phase, State
from edged.helper.upgrade import Upgrades
from edged_firmware.errors import Reason, Transient

Debs = dict[str, Path]

# the helper uses no library, so that other versions of them change nothing
pytestmark = pytest.mark.slow


@pytest.fixture
def on_1_0(node: Node, debs: Debs, repository: Repository) -> Node:
    """A node on which 1.0 runs."""
    node.dpkg("-i", debs["1.0"])
    node.sources(repository)
    return node


def one(node: Node, folder: Path, verb: str, **fields: str) -> Answers:
    async def asked() -> Answers:
        async with served(node, folder) as client:
            return await ask(client, verb, **fields)

    return asyncio.run(asked())


def status(node: Node, folder: Path) -> dict[str, Any]:
    return one(node, folder, "status")[0]


def phases(answers: Answers) -> list[str]:
    return [answer["phase"] for answer in answers if answer.get("event") == "phase"]


def test_an_upgrade_that_goes_well(on_1_0: Node, tmp_path: Path) -> None:
    conffile = on_1_0.root / "etc/edged/edged.toml"
    conffile.write_text("changed = true\n")
    answers = one(on_1_0, tmp_path, "upgrade", version="2.0")
    assert phases(answers) == ["preparing", "installing", "watching"]
    assert answers[-1]["result"] == "ok" and on_1_0.status() == "ii 2.0"
    assert "2.0" in on_1_0.runs() and conffile.read_text() == "changed = true\n"
    found = status(on_1_0, tmp_path)
    assert (found["version"], found["whole"], found["previous"]) == ("2.0", True, "1.0")
    assert found["kept"] == ["1.0", "2.0"] and not found["interrupted"] and found["operation"] is None
    assert found["outcome"]["result"] == "ok" and found["outcome"]["ended"].endswith("Z")


def test_what_is_kept_is_what_was_signed_and_root_s_alone(
    on_1_0: Node, tmp_path: Path, repository: Repository
) -> None:
    one(on_1_0, tmp_path, "upgrade", version="2.0")
    for version in ("1.0", "2.0"):
        kept = on_1_0.state / "debs" / f"edged_{version}.deb"
        assert kept.read_bytes() == (repository.folder / f"edged_{version}_all.deb").read_bytes()
        assert kept.stat().st_mode & 0o077 == 0
    assert on_1_0.state.stat().st_mode & 0o077 == 0


def test_to_what_runs_already(on_1_0: Node, tmp_path: Path) -> None:
    answers = one(on_1_0, tmp_path, "upgrade", version="1.0")
    assert answers[-1]["result"] == "ok" and phases(answers) == ["preparing"]


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("9.9", Why.NOT_FOUND),
        ("0.9", Why.OLDER),
        ("2.1~depends", Why.REQUIRES_UNMET),
        ("3.0", Why.HASH_MISMATCH),
    ],
)
def test_refused_and_nothing_is_changed(on_1_0: Node, tmp_path: Path, version: str, why: Why) -> None:
    last = one(on_1_0, tmp_path, "upgrade", version=version)[-1]
    assert (last["result"], last["reason"]) == ("refused", why.value), last
    assert last["cure"] and last["detail"]
    assert on_1_0.status() == "ii 1.0" and "1.0" in on_1_0.runs()
    assert not (on_1_0.state / "in-progress").exists()


def test_a_repository_that_is_away_does_not_hide_the_one_that_is_there(
    on_1_0: Node, tmp_path: Path, repository: Repository
) -> None:
    with (on_1_0.root / "etc/apt/sources.list").open("a") as file:
        file.write(f"deb [signed-by={repository.keyring}] file:{tmp_path}/away ./\n")
    last = one(on_1_0, tmp_path, "upgrade", version="9.9")[-1]
    assert last["reason"] == "fetch_failed", "it may be in the one that is away"
    assert one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]["result"] == "ok"


def test_a_package_on_hold_stays(on_1_0: Node, tmp_path: Path) -> None:
    on_1_0.dpkg("--version")
    run("sh", "-c", "echo edged hold | dpkg --set-selections", env=on_1_0.environment)
    last = one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]
    assert (last["result"], last["reason"]) == ("refused", "requires_unmet")
    assert on_1_0.status() == "hi 1.0"


def test_no_way_back_no_way_forward(on_1_0: Node, tmp_path: Path, debs: Debs, repository: Repository) -> None:
    poor = Repository(tmp_path / "poor", repository.keyring.parent)
    poor.add(debs["2.0"])
    on_1_0.sources(poor)
    last = one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]
    assert (last["result"], last["reason"]) == ("refused", "no_fallback")
    assert on_1_0.status() == "ii 1.0"
    # what apt's hook kept is a way back
    on_1_0.keep_deb(debs["1.0"])
    on_1_0.keep_deb(done=True)
    assert one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]["result"] == "ok"


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("unsigned", Why.SIGNATURE_INVALID),
        ("another key", Why.SIGNATURE_INVALID),
        ("allowed by the node", Why.SIGNATURE_INVALID),
        ("changed index", Why.HASH_MISMATCH),
    ],
)
def test_what_apt_cannot_verify(
    on_1_0: Node, tmp_path: Path, debs: Debs, repository: Repository, how: str, why: Why
) -> None:
    other = Repository(tmp_path / "other", repository.keyring.parent)
    other.add(debs["1.0"], debs["2.0"])
    on_1_0.sources(other)
    if how in ("unsigned", "allowed by the node"):
        other.publish(sign=False)
    elif how == "changed index":
        text = (other.folder / "Packages").read_text()
        (other.folder / "Packages").write_text(text.replace("a test", "a tes!"))
    else:
        wrong = tmp_path / "empty.gpg"
        wrong.touch()
        line = (on_1_0.root / "etc/apt/sources.list").read_text()
        (on_1_0.root / "etc/apt/sources.list").write_text(line.replace(str(other.keyring), str(wrong)))
    if how == "allowed by the node":
        with (on_1_0.root / "apt.conf").open("a") as file:
            file.write('Acquire::AllowInsecureRepositories "true";\nAPT::Get::AllowUnauthenticated "true";\n')
    last = one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]
    assert (last["result"], last["reason"]) == ("refused", why.value), last
    assert on_1_0.status() == "ii 1.0"


@pytest.mark.parametrize("option", ["Check-Valid-Until", "Check-Date"])
def test_a_list_that_is_not_valid_any_more_is_not_read_whatever_the_node_allows(
    on_1_0: Node, tmp_path: Path, debs: Debs, repository: Repository, option: str
) -> None:
    """Somebody in between shows the list of yesterday."""
    other = Repository(tmp_path / "other", repository.keyring.parent)
    other.add(debs["1.0"], debs["2.0"])
    other.publish(valid_s=-60)
    on_1_0.sources(other)
    with (on_1_0.root / "apt.conf").open("a") as file:
        file.write(f'Acquire::{option} "false";\n')
    last = one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]
    assert (last["result"], last["reason"]) == ("refused", "fetch_failed"), last
    assert "expired" in last["detail"] and on_1_0.status() == "ii 1.0"
    other.publish(valid_s=3600)
    assert one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]["result"] == "ok"


def test_a_kept_file_that_is_not_what_was_signed_is_fetched_anew(
    on_1_0: Node, tmp_path: Path, repository: Repository
) -> None:
    """apt's hook keeps whatever comes in under the name, also what an operator has built."""
    (tmp_path / "made").mkdir()
    on_1_0.keep_deb(make_deb(tmp_path / "made", "1.0"))
    on_1_0.keep_deb(done=True)
    kept = on_1_0.state / "debs" / "edged_1.0.deb"
    signed = (repository.folder / "edged_1.0_all.deb").read_bytes()
    assert kept.read_bytes() != signed
    assert one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]["result"] == "ok"
    assert kept.read_bytes() == signed


def test_nothing_goes_back_to_a_file_that_is_not_what_was_signed(on_1_0: Node, tmp_path: Path) -> None:
    one(on_1_0, tmp_path, "upgrade", version="2.0")
    (tmp_path / "made").mkdir()
    State(on_1_0.state).keep("1.0", make_deb(tmp_path / "made", "1.0").read_bytes())
    last = one(on_1_0, tmp_path, "rollback")[-1]
    assert (last["result"], last["reason"]) == ("refused", "no_fallback"), last
    assert on_1_0.status() == "ii 2.0"


def test_an_index_that_was_read_without_a_signature_is_not_enough(
    on_1_0: Node, tmp_path: Path, debs: Debs, repository: Repository
) -> None:
    """Somebody ran ``apt-get update --allow-insecure-repositories`` before: apt knows the version, and does not trust it."""
    other = Repository(tmp_path / "other", repository.keyring.parent)
    other.add(debs["1.0"], debs["2.0"])
    other.publish(sign=False)
    on_1_0.sources(other)
    run("apt-get", "-c", on_1_0.root / "apt.conf", "update", "--allow-insecure-repositories")
    assert "2.0" in run("apt-cache", "-c", on_1_0.root / "apt.conf", "madison", "edged")
    on_1_0.keep_deb(debs["1.0"])
    on_1_0.keep_deb(done=True)
    last = one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]
    assert (last["result"], last["reason"]) == ("refused", "signature_invalid"), last
    assert on_1_0.status() == "ii 1.0"


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("2.1~bad", "health_failed"),
        ("2.1~late", "health_failed"),
        ("2.1~hung", "health_failed"),
        ("2.1~postinst", "install_failed"),
    ],
)
def test_a_version_that_is_not_well_goes_back(on_1_0: Node, tmp_path: Path, version: str, why: str) -> None:
    answers = one(on_1_0, tmp_path, "upgrade", version=version)
    assert phases(answers)[-1] == "reverting"
    assert (answers[-1]["result"], answers[-1]["reason"], answers[-1]["reverted"]) == ("failed", why, True)
    assert on_1_0.status() == "ii 1.0" and "1.0" in on_1_0.runs()
    found = status(on_1_0, tmp_path)
    assert found["whole"] and not found["interrupted"] and "1.0" in found["kept"]
    assert one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]["result"] == "ok", (
        "the next one is not in the way"
    )


async def at_the_end(client: HelperClient) -> dict[str, Any]:
    """The status when no upgrade is at work any more."""
    while (found := await client.status())["operation"] is not None:
        await asyncio.sleep(0.1)
    return found


async def gone_on(node: Node, folder: Path) -> dict[str, Any]:
    """The status when a new helper has gone on with what there was."""
    async with served(node, folder) as client:
        return await at_the_end(client)


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """apt gives up a lock after a second."""
    options = tuple(re.sub(r"(?<=Lock::Timeout=)\d+", "1", word) for word in apt.OPTIONS)
    assert options != apt.OPTIONS
    monkeypatch.setattr(apt, "OPTIONS", options)


def test_a_lock_of_somebody_else_does_not_keep_a_version_that_is_not_well(
    on_1_0: Node, tmp_path: Path, debs: Debs, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    cut_off(on_1_0, debs, left(Phase.REVERTING, "2.1~bad", reason="health_failed"), "2.1~bad", marked=False)

    async def asked() -> dict[str, Any]:
        async with served(on_1_0, tmp_path) as client:
            with somebody_at_work(on_1_0):
                await asyncio.sleep(5)
                assert (await client.status())["operation"]["phase"] == "reverting"
            return await at_the_end(client)

    found = asyncio.run(asked())
    assert found["outcome"]["reason"] == "health_failed" and found["outcome"]["reverted"], found
    assert on_1_0.status() == "ii 1.0" and not found["interrupted"]


def test_a_helper_that_ends_while_it_waits_for_a_lock_leaves_the_rest_to_the_next(
    on_1_0: Node, tmp_path: Path, debs: Debs
) -> None:
    """Somebody's apt may wait for an answer for days."""
    cut_off(on_1_0, debs, left(Phase.REVERTING, "2.1~bad", reason="health_failed"), "2.1~bad", marked=False)

    async def ended() -> None:
        upgrades = Upgrades(State(on_1_0.state), on_1_0.apt(), on_1_0.systemd())
        await upgrades.resume()
        await asyncio.sleep(1)
        assert upgrades.busy
        await upgrades.stop()

    with somebody_at_work(on_1_0, "lock"):
        asyncio.run(ended())
    operation = State(on_1_0.state).operation()
    assert operation is not None and operation.phase is Phase.REVERTING
    assert on_1_0.status() == "ii 2.1~bad" and State(on_1_0.state).outcome() is None
    found = asyncio.run(gone_on(on_1_0, tmp_path))
    assert found["outcome"]["reason"] == "health_failed" and found["outcome"]["reverted"], found
    assert on_1_0.status() == "ii 1.0"


def test_what_somebody_else_installs_while_it_is_waited_for_stays(
    on_1_0: Node, tmp_path: Path, debs: Debs
) -> None:
    cut_off(on_1_0, debs, left(Phase.REVERTING, "2.1~bad", reason="health_failed"), "2.0", marked=False)
    found = asyncio.run(gone_on(on_1_0, tmp_path))
    assert (found["outcome"]["reason"], found["version"]) == ("interrupted", "2.0"), found
    assert "2.0" in found["outcome"]["detail"]


def test_dpkg_without_apt_has_a_mark_too(on_1_0: Node, tmp_path: Path, debs: Debs) -> None:
    """apt failed, and what it calls when it has ended has taken the mark away."""
    (tmp_path / "made").mkdir()
    seen = '[ ! -e "$DPKG_ROOT/var/lib/edged-helper/in-progress" ] || touch "$DPKG_ROOT/was-marked"'
    old = make_deb(tmp_path / "made", "1.0", scripts={"preinst": seen})
    cut_off(on_1_0, debs, left(Phase.REVERTING, "2.1~bad", reason="health_failed"), "2.1~bad", marked=False)
    State(on_1_0.state).keep("1.0", old.read_bytes())
    with (on_1_0.root / "apt.conf").open("a") as file:
        file.write('Dir::Bin::dpkg "/bin/false";\n')

    found = asyncio.run(gone_on(on_1_0, tmp_path))
    assert found["outcome"]["reverted"] and on_1_0.status() == "ii 1.0", found
    assert (on_1_0.root / "was-marked").exists()


def test_going_back_by_itself_keeps_the_way_back_that_there_was(on_1_0: Node, tmp_path: Path) -> None:
    one(on_1_0, tmp_path, "upgrade", version="2.0")
    assert one(on_1_0, tmp_path, "upgrade", version="2.1~bad")[-1]["reverted"]
    assert status(on_1_0, tmp_path)["kept"] == ["1.0", "2.0"]
    assert one(on_1_0, tmp_path, "rollback")[-1]["result"] == "ok"
    assert on_1_0.status() == "ii 1.0"


def test_rollback(on_1_0: Node, tmp_path: Path) -> None:
    last = one(on_1_0, tmp_path, "rollback")[-1]
    assert (last["result"], last["reason"]) == ("refused", "no_fallback"), "nothing ran before"
    one(on_1_0, tmp_path, "upgrade", version="2.0")
    on_1_0.sources()
    assert one(on_1_0, tmp_path, "rollback")[-1]["result"] == "ok", "needs no repository"
    assert on_1_0.status() == "ii 1.0"
    last = one(on_1_0, tmp_path, "rollback")[-1]
    assert (last["result"], last["reason"]) == ("refused", "no_fallback"), "what ran before is newer"
    assert on_1_0.status() == "ii 1.0"


def test_a_damaged_way_back_is_none(on_1_0: Node, tmp_path: Path) -> None:
    one(on_1_0, tmp_path, "upgrade", version="2.0")
    (on_1_0.state / "debs" / "edged_1.0.deb").write_bytes(b"torn")
    last = one(on_1_0, tmp_path, "rollback")[-1]
    assert (last["result"], last["reason"]) == ("refused", "no_fallback")
    assert on_1_0.status() == "ii 2.0"


def test_a_daemon_that_was_stopped_is_not_judged(on_1_0: Node, tmp_path: Path) -> None:
    on_1_0.stopped(True)
    assert one(on_1_0, tmp_path, "upgrade", version="2.1~bad")[-1]["result"] == "ok"
    assert on_1_0.status() == "ii 2.1~bad"


def test_a_node_without_the_package(node: Node, tmp_path: Path, repository: Repository) -> None:
    node.sources(repository)
    last = one(node, tmp_path, "upgrade", version="2.0")[-1]
    assert (last["result"], last["reason"]) == ("refused", "not_installed")
    assert status(node, tmp_path)["version"] == ""


def test_a_package_that_cannot_be_kept_is_not_installed(on_1_0: Node, tmp_path: Path) -> None:
    async def asked() -> Answers:
        async with served(on_1_0, tmp_path) as client:
            (on_1_0.state / "debs").rmdir()
            (on_1_0.state / "debs").touch()
            return await ask(client, "upgrade", version="2.0")

    last = asyncio.run(asked())[-1]
    assert (last["result"], last["reason"]) == ("refused", "storage_failed")
    assert on_1_0.status() == "ii 1.0"


def test_a_disk_that_is_full_before_dpkg_began_changes_nothing(
    on_1_0: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = State.begin

    def full(state: State, operation: Operation) -> None:
        if operation.phase is not Phase.PREPARING:
            raise Transient(Reason.DISK_FULL, "no space")
        begin(state, operation)

    monkeypatch.setattr(State, "begin", full)
    last = one(on_1_0, tmp_path, "upgrade", version="2.0")[-1]
    assert (last["result"], last["reason"]) == ("refused", "disk_full"), last
    assert on_1_0.status() == "ii 1.0"


def test_one_at_a_time_and_the_asker_may_go(on_1_0: Node, tmp_path: Path) -> None:
    async def asked() -> None:
        async with served(on_1_0, tmp_path) as client:
            first = client.upgrade("2.0")
            assert (await anext(first))["phase"] == "preparing"
            for verb, fields in (("upgrade", {"version": "2.0"}), ("rollback", {}), ("reboot", {})):
                (answer,) = await ask(client, verb, **fields)
                assert (answer["result"], answer["reason"]) == ("refused", "busy")
            assert (await client.status())["operation"]["to_version"] == "2.0"
            await first.aclose()  # type: ignore[attr-defined]
            while (found := await client.status())["operation"] is not None or found["outcome"] is None:
                await asyncio.sleep(0.1)
            assert found["outcome"]["result"] == "ok"

    asyncio.run(asked())
    assert on_1_0.status() == "ii 2.0" and on_1_0.reboots() == 0


def test_restart_of_the_node(on_1_0: Node, tmp_path: Path) -> None:
    answers = one(on_1_0, tmp_path, "reboot")
    assert [answers[0]["event"], answers[-1]["result"]] == ["rebooting", "ok"]
    assert on_1_0.reboots() == 1


# -- the helper goes away in the middle


def test_told_to_end_while_it_watches_the_next_one_goes_on(on_1_0: Node, tmp_path: Path) -> None:
    async def first() -> None:
        async with served(on_1_0, tmp_path) as client:
            with pytest.raises(HelperGone):
                async for answer in client.upgrade("2.0"):
                    if answer.get("phase") == "watching":
                        raise HelperGone

    asyncio.run(first())
    left = State(on_1_0.state).operation()
    assert left is not None and left.phase is Phase.WATCHING and on_1_0.status() == "ii 2.0"
    found = asyncio.run(gone_on(on_1_0, tmp_path))
    assert found["outcome"]["result"] == "ok" and found["version"] == "2.0"


def test_told_to_end_it_waits_for_a_dpkg_that_sets_up_what_others_left(on_1_0: Node, tmp_path: Path) -> None:
    slow = make_deb(
        tmp_path,
        "1",
        name="part",
        scripts={"postinst": 'touch "$DPKG_ROOT/begun"; sleep 2; touch "$DPKG_ROOT/ended"'},
    )
    on_1_0.dpkg("--unpack", slow)

    async def asked() -> None:
        async with served(on_1_0, tmp_path) as client:
            assert (await anext(client.upgrade("2.0")))["phase"] == "preparing"
            await asyncio.to_thread(wait_for, on_1_0.root / "begun")

    asyncio.run(asked())
    assert (on_1_0.root / "ended").exists(), "dpkg was killed in its work"
    assert on_1_0.status() == "ii 1.0"


def test_what_an_operator_installs_meanwhile_stays(on_1_0: Node, tmp_path: Path, debs: Debs) -> None:
    other = make_deb(tmp_path, "2.5")

    async def asked() -> dict[str, Any]:
        async with served(on_1_0, tmp_path, health_s=60) as client:
            async for answer in client.upgrade("2.0"):
                if answer.get("phase") == "watching":
                    await asyncio.to_thread(on_1_0.dpkg, "-i", other)
        return answer

    last = asyncio.run(asked())
    assert (last["result"], last["reason"]) == ("failed", "interrupted"), last
    assert on_1_0.status() == "ii 2.5" and "2.5" in on_1_0.runs()


def left(phase: Phase, to: str = "2.0", **more: Any) -> Operation:
    return Operation("upgrade", "1.0", to, phase, **more)


def cut_off(node: Node, debs: Debs, operation: Operation, installed: str, *, marked: bool) -> None:
    """What a cut in that phase leaves."""
    state = State(node.state)
    for version in ("1.0", operation.to_version):
        state.keep(version, debs[version].read_bytes())
    state.begin(operation)
    if installed != "1.0":
        node.dpkg("-i", debs[installed])
    if marked:
        state.mark(operation.from_version, operation.to_version)


@pytest.mark.parametrize(
    ("operation", "installed", "marked", "result", "reason", "runs"),
    [
        (left(Phase.PREPARING), "1.0", False, "failed", "interrupted", "1.0"),
        (left(Phase.INSTALLING), "1.0", True, "failed", "interrupted", "1.0"),
        (left(Phase.INSTALLING), "2.0", True, "ok", "", "2.0"),
        (left(Phase.INSTALLING), "2.0", False, "ok", "", "2.0"),
        (left(Phase.INSTALLING, "2.1~bad"), "2.1~bad", True, "failed", "health_failed", "1.0"),
        (left(Phase.WATCHING), "2.0", False, "ok", "", "2.0"),
        (left(Phase.WATCHING, "2.1~bad"), "2.1~bad", False, "failed", "health_failed", "1.0"),
        (left(Phase.REVERTING, "2.1~bad", reason="health_failed"), "2.1~bad", True, "failed", "health_failed", "1.0"),
        (left(Phase.REVERTING, "2.1~bad", reason="health_failed"), "1.0", False, "failed", "health_failed", "1.0"),
        (left(Phase.WATCHING, lives=4), "2.0", False, "failed", "attempts_exhausted", "2.0"),
    ],
)  # fmt: skip
def test_a_cut_in_each_phase_is_gone_on_from(
    on_1_0: Node, tmp_path: Path, debs: Debs, operation: Operation, installed: str, marked: bool, result: str, reason: str,
    runs: str,
) -> None:  # fmt: skip
    cut_off(on_1_0, debs, operation, installed, marked=marked)

    found = asyncio.run(gone_on(on_1_0, tmp_path))
    assert (found["outcome"]["result"], found["outcome"]["reason"]) == (result, reason), found
    assert on_1_0.status() == f"ii {runs}" and runs in on_1_0.runs()
    assert not found["interrupted"]


def test_a_cut_while_dpkg_was_at_work(on_1_0: Node, tmp_path: Path, debs: Debs) -> None:
    cut_off(on_1_0, debs, left(Phase.INSTALLING), "1.0", marked=True)
    on_1_0.dpkg("--unpack", debs["2.0"])
    assert on_1_0.status() == "iU 2.0"

    found = asyncio.run(gone_on(on_1_0, tmp_path))
    assert found["outcome"]["result"] == "ok" and on_1_0.status() == "ii 2.0"
    assert found["recovered"]["result"] == "recovered"


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"phase": "nonsense"}', '{"phase": "watching", "extra": 1}']
)
def test_an_operation_that_cannot_be_read_is_set_aside(on_1_0: Node, tmp_path: Path, text: str) -> None:
    (on_1_0.state / "operation.json").write_text(text)
    assert status(on_1_0, tmp_path)["operation"] is None
    assert (on_1_0.state / "operation.bad").read_text() == text


def test_an_outcome_that_cannot_be_read_is_none(on_1_0: Node, tmp_path: Path) -> None:
    for text in ("{", "[]", ""):
        (on_1_0.state / "outcome.json").write_text(text)
        assert status(on_1_0, tmp_path)["outcome"] is None


def test_what_was_written_down_is_json_that_anybody_reads(on_1_0: Node, tmp_path: Path) -> None:
    one(on_1_0, tmp_path, "upgrade", version="2.0")
    outcome = json.loads((on_1_0.state / "outcome.json").read_text())
    assert outcome["to_version"] == "2.0" and not (on_1_0.state / "operation.json").exists()


def test_a_dependency_that_comes_with_it(
    on_1_0: Node, tmp_path: Path, debs: Debs, repository: Repository
) -> None:
    more = Repository(tmp_path / "more", repository.keyring.parent)
    more.folder.mkdir(exist_ok=True)
    made = tmp_path / "made"
    made.mkdir()
    more.add(debs["1.0"], make_deb(made, "4.0", depends="part"), make_deb(made, "1", name="part"))
    on_1_0.sources(more)
    assert one(on_1_0, tmp_path, "upgrade", version="4.0")[-1]["result"] == "ok"
    assert on_1_0.status() == "ii 4.0"
