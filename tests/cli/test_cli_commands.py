"""Every command against a real daemon: what it says, as text and as JSON, and the exit code that it ends with."""

from __future__ import annotations

import json
import os
import pwd
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import pytest
from cli_kit import DEVICES, Place, eventually
from click.testing import CliRunner
from engine_kit import Publisher, published

from edged import cli
from edged.cli import doctor
from edged.cli.client import Client
from edged.cli.jobs import _progress, _time_text
from edged.config import Config, Node
from edged.testing.fake import fake_app


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return published(tmp_path_factory.mktemp("publisher"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, publisher: Publisher) -> Iterator[Place]:
    node = Place(tmp_path_factory.mktemp("node"), publisher).write()
    with node.daemon():
        eventually(lambda: node.client.get("status")["devices"]["running"] == 2)
        eventually(lambda: node.client.get("trust")["online"])
        yield node


def test_status_says_where_the_node_stands(place: Place) -> None:
    answer = place.run("status")
    assert answer.code == 0
    assert "devices   2 configured, 2 connected, 0 left out" in answer.out
    assert "3 releases, online" in answer.out
    found = place.run("status", "--json").json
    assert found["problems"] == []
    assert found["trust"]["releases"][0]["release"] == "app@1.0.0"


def test_devices_lists_what_each_runs(place: Place) -> None:
    assert [device["id"] for device in place.run("devices", "--json").json["devices"]] == ["one", "two"]
    lines = place.run("devices").out.splitlines()
    assert lines[0].split() == ["DEVICE", "MODEL", "STATE", "RUNS", "DESIRED", "JOB", "ADDRESS"]
    assert lines[1].split()[:3] == ["one", "widget", "running"]


def test_plan_then_deploy_then_show(place: Place) -> None:
    plan = place.run("plan", "app@1.0.0", "--model", "widget")
    assert plan.code == 0
    assert "app@1.0.0: 2.0 KiB, counter 1, to download: 2." in plan.out
    assert plan.out.count("install") == 2
    one, two = place.run("plan", "app@1.0.0", "--model", "widget", "--json").json["devices"]
    assert (one["read_out_bytes"], two["read_out_bytes"]) == (16384, 0), "one has one slot, two has two"
    done = place.run("deploy", "app@1.0.0", "--model", "widget", "--wait", "--yes")
    assert done.code == 0, done.out + done.err
    assert "one: succeeded: runs app@1.0.0 (version=1.0.0)" in done.out
    assert "two: succeeded: runs app@1.0.0 (version=1.0.0)" in done.out
    again = place.run("deploy", "app@1.0.0", "--to", "one", "--wait")
    assert (again.code, again.out) == (0, "one: runs app@1.0.0 already\n")
    assert place.run("plan", "app@1.0.0", "--to", "one", "--json").json["devices"][0]["action"] == "nothing"
    shown = place.run("device", "show", "one")
    assert "runs      app@1.0.0" in shown.out
    assert "floor     release counter 1" in shown.out
    assert place.run("device", "show", "one", "--json").json["jobs"][0]["state"] == "succeeded"


def test_a_deployment_that_fails_its_health_check_ends_with_1_and_says_why(place: Place) -> None:
    answer = place.run("deploy", "app@3.0.0", "--to", "two", "--wait", "--json")
    assert answer.code == 1
    job = answer.json["jobs"][0]
    assert (job["state"], job["reason"]) == ("reverted", "health_failed")
    assert "saw 'silence'" in job["detail"]
    shown = place.run("job", "show", job["id"])
    assert shown.code == 0
    assert "health_failed" in shown.out
    assert "reverting" in shown.out
    assert f"reverted, -, run {job['run']}" in shown.out
    (row,) = [line for line in place.run("jobs").out.splitlines() if line.startswith(job["id"])]
    assert row.split()[3:6] == ["reverted", "-", "health_failed"]
    watched = place.run("job", "watch", job["id"])
    assert (watched.code, watched.out.count("\n")) == (1, 1)
    retried = place.run("job", "retry", job["id"], "--json").json
    assert retried["retry_of"] == job["id"]
    lines = place.run("job", "watch", retried["id"], "--json")
    assert lines.code == 1
    assert json.loads(lines.out.splitlines()[-1])["state"] == "reverted"


def test_a_refusal_ends_with_3_and_one_line_with_its_cure(place: Place) -> None:
    answer = place.run("deploy", "ghost@1.0", "--to", "one")
    assert (answer.code, answer.out) == (3, "")
    assert answer.err.count("\n") == 1
    assert answer.err.startswith("edged: refused (release_unknown): the repository ")
    assert answer.err.endswith("; cure: publish the release, then edged trust refresh\n")
    as_json = place.run("deploy", "ghost@1.0", "--to", "one", "--json")
    assert as_json.code == 3
    assert (as_json.json["code"], as_json.json["reason"]) == ("refused", "release_unknown")
    plan = place.run("plan", "ghost@1.0", "--to", "one")
    assert plan.code == 3
    assert "one: refused (release_unknown)" in plan.out


def test_nobody_is_asked_about_a_plan_that_is_refused(place: Place) -> None:
    terminal, stdin = os.openpty()
    command = [
        sys.executable,
        "-m",
        "edged",
        "--config",
        str(place.config),
        "deploy",
        "ghost@1.0",
        "--to",
        "one",
    ]
    try:
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, check=False, timeout=60)
    finally:
        os.close(terminal)
        os.close(stdin)
    assert (done.returncode, done.stderr) == (3, "Nothing is deployed.\n")
    assert "one: refused (release_unknown)" in done.stdout
    assert "Deploy?" not in done.stdout


def test_twins_are_read_and_set(place: Place) -> None:
    answer = place.run("twin", "set", "one", "level=5", 'name="7"', "mode=auto", "on=true")
    assert (answer.code, answer.out) == (
        0,
        "one: noted. What the device did not take, and why: edged device show one\n",
    )
    desired = place.run("twin", "get", "one", "--json").json["desired"]
    assert {name: desired[name]["value"] for name in ("level", "name", "mode", "on")} == {
        "level": 5,
        "name": "7",
        "mode": "auto",
        "on": True,
    }
    assert desired["level"]["source"] == "root"
    assert "level" in place.run("twin", "get", "one").out
    setting = place.run("twin", "set", "one", "setting.app/interval=9")
    assert setting.code == 0, setting.err
    assert place.run("twin", "get", "one", "--json").json["desired"]["setting.app/interval"]["value"] == 9
    job = place.run("twin", "set", "one", "firmware=app@2.0.0", "--json").json
    assert job["outcome"] == "created"
    assert place.run("job", "watch", job["job"]).code == 0
    assert place.run("twin", "set", "one", "nonsense").code == 2
    assert place.run("twin", "set", "one", "firmware=app").code == 2


def test_a_value_cannot_command_the_terminal(odd: Place) -> None:
    # the hardware is not what was configured, so that nobody tells it of wishes, nor takes its reports
    answer = odd.run("twin", "set", "other", r'evil="\u001b[31m\u202eexe\u009b2J\nPROBLEM"', "tame=grün")
    assert answer.code == 0, answer.err
    for words in (["twin", "get", "other"], ["device", "show", "other"]):
        lines = odd.run(*words).out.splitlines()
        (line,) = [line for line in lines if line.startswith("evil")]
        assert line.split() == ["evil", r"\x1b[31m\u202eexe\x9b2J\nPROBLEM", "-"]
        (tame,) = [line for line in lines if line.startswith("tame")]
        assert tame.split() == ["tame", "grün", "-"]
        assert tame.rindex("-") == line.rindex("-"), "columns are as wide as what is shown"
    held = odd.run("twin", "get", "other", "--json").json["desired"]["evil"]["value"]
    assert held == "\x1b[31m\u202eexe\x9b2J\nPROBLEM"
    assert odd.run("twin", "set", "other", "evil=null", "tame=null").code == 0


def test_a_value_without_an_encoding_is_refused_and_one_that_is_there_is_shown(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = place.run("twin", "set", "one", r'x="\ud800"')
    assert answer.code == 2
    assert answer.err.startswith("edged: bad request (request_invalid): the body is not JSON: ")
    twin = place.client.get("devices", "one", "twin")
    side = {"value": "\ud800", "version": 1, "time": "", "source": "device", "unit": None}
    monkeypatch.setattr(Client, "get", lambda *_, **__: twin | {"reported": {"x": side}})
    assert "\\ud800" in place.run("twin", "get", "one").out


def test_all_that_is_shown_goes_through_one_place() -> None:
    """What shows nothing but a publisher's own files, or the demo's own texts, is free to use lines."""
    free = {"context.py", "release.py", "demo.py", "tuf.py"}
    folder = Path(cli.__file__).parent
    assert not [
        path.name
        for path in folder.glob("*.py")
        if path.name not in free and "click.echo" in path.read_text()
    ]


def test_jobs_are_listed_and_filtered(place: Place) -> None:
    assert place.run("jobs", "--state", "active", "--json").json == {"jobs": []}
    assert place.run("jobs", "--state", "active").out == "No jobs.\n"
    ended = place.run("jobs", "--device", "one", "--state", "ended", "--json").json["jobs"]
    assert {job["device"] for job in ended} == {"one"}
    assert place.run("jobs").out.startswith("JOB ")
    assert place.run("jobs", "--state", "odd").code == 2
    assert place.run("jobs", "--device", "nine").code == 1
    ended_id = ended[0]["id"]
    cancelled = place.run("job", "cancel", ended_id)
    assert cancelled.code == 1
    assert f"job {ended_id} has ended already" in cancelled.err
    assert place.run("job", "show", "01X").code == 1


def test_mappers_are_listed_and_asked(place: Place) -> None:
    assert {"fake", "serial"} <= set(place.run("mapper", "list", "--json").json["schemes"])
    rows = [line.split() for line in place.run("mapper", "list").out.splitlines()]
    assert ["fake", "fake", "yes"] in rows
    assert place.run("mapper", "probe", "fake", "fake:bus/two").out == "hardware  fake:1\nserial    two\n"
    assert "runs 1.0.0, active" in place.run("mapper", "probe", "--device", "two").out
    assert (
        place.run("mapper", "probe", "--device", "two", "--json").json["identity"]["serial_number"] == "two"
    )
    missing = place.run("mapper", "probe", "fake", "fake:bus/nine")
    assert missing.code == 1
    assert "no_response" in missing.err
    assert place.run("mapper", "probe").code == 2


def test_an_address_is_asked_without_a_mappers_name(place: Place) -> None:
    """Only mappers that touch nothing ask, and only at wires that they can use; who is left out is named."""
    assert (
        place.run("mapper", "probe", "fake:bus/two").out
        == "mapper    fake\nhardware  fake:1\nserial    two\n"
    )
    found = place.run("mapper", "probe", "fake:bus/two", "--json").json
    assert [answer["identity"]["serial_number"] for answer in found["answers"]] == ["two"]
    assert (found["problems"], found["not_asked"]) == ({}, [])
    absent = place.run("mapper", "probe", "fake:bus/nine")
    assert (absent.code, absent.out) == (1, "")
    assert absent.err.startswith("fake: ") and "fake:bus/nine" in absent.err
    assert "nobody answers at fake:bus/nine; cure: check power" in absent.err
    resets = place.run("mapper", "probe", "serial:/dev/ttyEDGED0")
    assert resets.code == 1 and "failed (device_absent): uart-smp: /dev/ttyEDGED0: No such file" in resets.err
    assert "not asked, since it may reset the device: uart-stk500, uart-stk500v2" in resets.err
    nowhere = place.run("mapper", "probe", "rope:1")
    assert nowhere.code == 1 and "an address begins with one of: can:, fake:, " in nowhere.err
    other = place.run("mapper", "probe", "uart-stk500", "fake:bus/two")
    assert other.code == 1 and "mapper uart-stk500 asks at serial: only, not at 'fake:bus/two'" in other.err


def test_trust_is_set_shown_and_refreshed(place: Place, publisher: Publisher, tmp_path: Path) -> None:
    assert "app@2.0.0" in place.run("trust", "show").out
    assert place.run("trust", "refresh", "--json").json["online"] is True
    said = place.run("trust", "init", str(publisher.root), "--json")
    assert said.json.get("failure") is None and said.code == 0, said
    assert (place.state / "trust" / "root.json").read_bytes() == publisher.root.read_bytes()
    other = Publisher(tmp_path).init()
    said = place.run("trust", "init", str(other.root))
    assert said.code == 1
    assert "--replace" in said.err
    wrong = place.run("trust", "init", str(other.root), "--replace")
    assert wrong.code == 3
    assert "signature_invalid" in wrong.err
    assert (place.state / "trust" / "root.json").read_bytes() == publisher.root.read_bytes()
    (tmp_path / "noise").write_bytes(b"\xff\xfe")
    assert place.run("trust", "init", str(tmp_path / "noise")).code == 2


def test_the_audit_trail_is_listed_and_checked_with_and_without_the_daemon(place: Place) -> None:
    records = place.run("audit", "list", "--after", "0", "--limit", "3", "--json").json["records"]
    assert [record["seq"] for record in records] == [1, 2, 3]
    assert place.run("audit", "list", "--limit", "1").out.count("\n") == 1
    online = place.run("audit", "verify", "--json").json
    assert online["intact"]
    assert online["signed_heads"] >= 1
    assert place.run("audit", "verify", "--offline", "--json").json == online
    assert place.run("audit", "verify", "--offline").out.startswith(f"Intact: {online['rows']} rows")


def test_the_doctor_finds_a_node_well(place: Place) -> None:
    answer = place.run("doctor", "--json")
    findings = {finding["what"]: finding for finding in answer.json["findings"]}
    wanted = ("config", "state", "database", "trust", "clock", "disk", "daemon")
    assert {what: findings[what]["level"] for what in wanted} == dict.fromkeys(wanted, "ok")
    # the mapper of the tests is not installed, so that the doctor, a process of its own, must miss it
    assert findings["device"]["level"] == "fail"
    assert answer.code == 1


def test_the_python_module_is_the_same_command(place: Place) -> None:
    command = [sys.executable, "-m", "edged", "--socket", str(place.socket), "status", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["node"] == "node-1"


READ_ONLY = [
    ["status"],
    ["devices"],
    ["device", "show", "one"],
    ["twin", "get", "one"],
    ["plan", "app@1.0.0", "--to", "one"],
    ["jobs"],
    ["job", "show", "01X"],
    ["job", "watch", "01X"],
    ["mapper", "list"],
    ["trust", "show"],
    ["audit", "list"],
    ["audit", "verify"],
]
WRITING = [
    ["twin", "set", "one", "x=1"],
    ["deploy", "app@1.0.0", "--to", "one", "--yes"],
    ["job", "cancel", "01X"],
    ["job", "retry", "01X"],
    ["mapper", "probe", "--device", "one"],
    ["trust", "refresh"],
]


@pytest.mark.parametrize("words", READ_ONLY + WRITING, ids=" ".join)
def test_without_a_daemon_a_command_ends_with_4_and_says_how_to_start_it(
    tmp_path: Path, words: list[str]
) -> None:
    place = Place(tmp_path).write()
    answer = place.run(*words)
    assert (answer.code, answer.out) == (4, "")
    assert answer.err == (
        f"edged: unreachable: the daemon does not answer at {place.socket}: No such file or directory; "
        "cure: start it (systemctl start edged; journalctl -u edged says why it ended), or name its socket with --socket\n"
    )
    assert place.run(*words, "--json").json["code"] == "unreachable"


@pytest.mark.parametrize("command", ["run", "check-config"])
def test_a_faulty_configuration_ends_with_2_and_every_fault_on_a_line(tmp_path: Path, command: str) -> None:
    models = DEVICES.partition("[[device]]")[0]
    place = Place(tmp_path, extra=models + '[storage]\nkeep_jobs_days = "long"\n[nonsense]\nx = 1\n').write()
    answer = place.run(command)
    assert answer.code == 2
    lines = answer.err.splitlines()
    assert len(lines) == 2
    assert any("keep_jobs_days: found 'long'; allowed: a number" in line for line in lines)
    assert any("nonsense: found an unknown key" in line for line in lines)
    missing = Place(tmp_path / "nowhere").run(command)
    assert missing.code == 2
    assert "cannot be read: No such file or directory" in missing.err


def test_check_config_asks_the_mappers_too(tmp_path: Path) -> None:
    place = Place(tmp_path).write()
    answer = place.run("check-config", "--json")
    assert answer.code == 2
    assert answer.json["problems"][0].startswith(f"{place.config}: device[0].mapper: found 'fake'; allowed: ")
    sound = Place(tmp_path / "sound", extra=DEVICES.partition("[[device]]")[0]).write()
    assert sound.run("check-config", "--json").json == {"problems": [], "models": 1, "devices": 0}
    assert sound.run("check-config").out.endswith(": 1 model, 0 devices, no fault.\n")


def test_the_doctor_needs_no_daemon_and_says_the_cures(tmp_path: Path, publisher: Publisher) -> None:
    serial = (
        '[[device]]\nid = "plc"\nmodel = "widget"\nmapper = "none"\naddress = "serial:by-id/usb-nothing"\n'
    )
    place = Place(tmp_path, extra=DEVICES.partition("[[device]]")[0] + serial).write()
    answer = place.run("doctor")
    assert answer.code == 1
    assert "warn  state     " in answer.out
    assert (
        "fail  trust     no root of trust: no release can be installed; cure: edged trust init ROOT.json"
        in answer.out
    )
    assert (
        "warn  port      plc: /dev/serial/by-id/usb-nothing is not there; cure: connect the device"
        in answer.out
    )
    assert "warn  daemon    the daemon does not answer" in answer.out
    place.config.write_text("[")
    broken = place.run("doctor", "--json")
    assert broken.code == 1
    assert [finding["what"] for finding in broken.json["findings"]] == ["config"]


def test_the_doctor_of_somebody_who_may_not_look_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path).write()
    place.state.mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place.state and allowed(path, mode))
    monkeypatch.setattr(Path, "exists", _not_below(place.state, Path.exists))
    monkeypatch.setattr(Path, "is_file", _not_below(place.state, Path.is_file))
    found = [
        (finding["what"], finding["level"]) for finding in place.run("doctor", "--json").json["findings"]
    ]
    assert ("state", "warn") in found
    assert not {what for what, _ in found} & {"database", "trust"}


def test_the_doctor_names_the_files_that_the_daemon_cannot_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path).write()
    place.state.mkdir()
    for name in ("edged.db", "node-key.pem"):
        (place.state / name).touch()
    assert f"ok    state     {place.state}, mode" in place.run("doctor").out
    look = Path.lstat

    def after_a_restore_by_root(path: Path) -> os.stat_result:
        found = look(path)
        mine = path.name != "node-key.pem"
        return found if mine else os.stat_result((*found[:4], found.st_uid + 1, *found[5:]))

    monkeypatch.setattr(Path, "lstat", after_a_restore_by_root)
    answer = place.run("doctor")
    owner = pwd.getpwuid(os.getuid()).pw_name
    assert answer.code == 1
    assert (
        f"fail  state     not everything in {place.state} is {owner}'s, as the folder is: "
        f"1 file, first {place.state}/node-key.pem; cure: sudo chown -R {owner}: {place.state}\n"
    ) in answer.out


def test_the_doctor_of_another_user_blames_no_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = tmp_path / "tty"
    port.touch()
    serial = f'[[device]]\nid = "plc"\nmodel = "widget"\nmapper = "none"\naddress = "serial:{port}"\n'
    place = Place(tmp_path, extra=DEVICES.partition("[[device]]")[0] + serial).write()
    assert (
        f"fail  port      plc: {port} is no serial port; cure: correct the address" in place.run("doctor").out
    )
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != port and allowed(path, mode))
    mine = place.run("doctor").out
    assert f"fail  port      plc: user {os.getuid()} may not open {port}; cure: add the daemon's user" in mine
    place.state.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: place.state.stat().st_uid + 1)
    assert "warn  port      plc: user" in place.run("doctor").out


def test_a_plan_counts_what_is_read_out_before_anything_is_written(
    tmp_path: Path, publisher: Publisher
) -> None:
    place = Place(tmp_path, publisher, extra=DEVICES.replace("fake:bus", "fake:slow")).write()
    with place.daemon():
        eventually(lambda: place.client.get("status")["devices"]["running"] == 2)
        plan = place.run("plan", "app@2.0.0", "--model", "widget", "--json").json
        one, two = plan["devices"]
        seconds = [(plan["image_bytes"] + read_out) / 2000 for read_out in (16384, 0)]
        assert [one["estimated_minutes"], two["estimated_minutes"]] == [round(s / 60, 2) for s in seconds]


ODD_DEVICES = """
[[device]]
id = "line"
model = "widget"
mapper = "fake"
address = "fake:line/line"
config = {app = "1.0.0"}
[[device]]
id = "blind"
model = "widget"
mapper = "fake"
address = "fake:bus/blind"
config = {app = "0.5.0", reads_back = false}
[[device]]
id = "other"
model = "gizmo"
mapper = "fake"
address = "fake:bus/other"
config = {app = "1.0.0"}
[[model]]
id = "gizmo"
hardware_ids = ["fake:9"]
"""


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, publisher: Publisher) -> Iterator[Place]:
    """A node with devices that are not as they should be, and one on a wire of its own."""
    mine = publisher.copy(tmp_path_factory.mktemp("odd") / "publisher")
    mine.add("4.0.0", fake_app("4.0.0"), models=("widget", "gizmo"))
    mine.publish()
    node = Place(tmp_path_factory.mktemp("odd-node"), mine, extra=DEVICES + ODD_DEVICES).write()
    with node.daemon():
        eventually(lambda: node.client.get("status")["devices"]["running"] == 4)
        eventually(lambda: node.client.get("devices", "other")["reason"] == "hardware_mismatch")
        eventually(lambda: node.client.get("trust")["online"])
        yield node


def test_a_probe_ends_with_the_cause_that_it_met(odd: Place) -> None:
    busy = odd.run("mapper", "probe", "fake:line/line")
    assert (busy.code, busy.out) == (1, "")
    assert busy.err == (
        "edged: failed (link_busy): fake: fake:line is in use by line; "
        "cure: it is a device of this node: edged mapper probe --device line\n"
    )
    named = odd.run("mapper", "probe", "fake", "fake:line/line")
    assert named.code == 1 and named.err.endswith("edged mapper probe --device line\n")
    wrong = odd.run("mapper", "probe", "fake:bus")
    assert wrong.err == "edged: failed (config_invalid): fake: fake:bus: write fake:BUS/NAME\n"
    failure = odd.run("mapper", "probe", "fake:bus", "--json")
    assert failure.json["reason"] == "config_invalid"


def test_status_tells_of_a_device_that_somebody_has_to_see_to(odd: Place) -> None:
    (problem,) = odd.run("status", "--json").json["problems"]
    assert (problem["part"], problem["reason"]) == ("device", "hardware_mismatch")
    assert "PROBLEM   device: other: hardware fake:1 answered at fake:bus/other;" in odd.run("status").out


def test_a_plan_foresees_what_would_end_the_job_at_once(odd: Place) -> None:
    plan = odd.run("plan", "app@4.0.0", "--model", "gizmo")
    assert plan.code == 3
    assert "other: refused (hardware_mismatch): hardware fake:1 answered" in plan.out
    plan = odd.run("plan", "app@4.0.0", "--to", "blind", "--to", "two", "--json")
    assert plan.code == 3
    blind, two = plan.json["devices"]
    assert (two["action"], two["refused"]) == ("install", None)
    assert blind["action"] == "refuse"
    assert blind["refused"]["reason"] == "no_fallback"
    assert "blind says that it runs 0.5.0" in blind["refused"]["detail"]
    deployed = odd.run("deploy", "app@4.0.0", "--to", "blind", "--yes", "--wait")
    assert (deployed.code, "no_fallback" in deployed.out) == (3, True)


def test_the_node_is_not_restarted_while_a_device_is_between_two_images(
    tmp_path: Path, publisher: Publisher
) -> None:
    """Exit code 4 is the helper's absence: so far it came."""
    mine = publisher.copy(tmp_path / "publisher")
    # six seconds on that wire, and nothing is read out before: what it runs is published
    mine.add("4.0.0", fake_app("4.0.0", 12 * 1024))
    mine.publish()
    devices = DEVICES.replace("fake:bus", "fake:slow").replace(
        '{app = "1.0.0"}', '{app = "1.0.0", reads_back = false}'
    )
    place = Place(tmp_path / "node", mine, extra=devices).write()
    restart = ("node", "reboot", "--helper", str(tmp_path / "helper.sock"))
    assert place.run(*restart).code == 4, "no daemon answers"
    with place.daemon():
        assert place.run(*restart).code == 4
        assert place.run("deploy", "app@4.0.0", "--to", "one", "--yes").code == 0
        eventually(lambda: place.client.get("devices", "one")["job"]["state"] == "staging")
        refused = place.run(*restart)
        assert refused.code == 3
        assert "refused (busy): one: between two images; cure: wait for the jobs" in refused.err
        assert place.run(*restart, "--now").code == 4


@pytest.mark.parametrize(
    ("state", "done", "total", "text"),
    [
        ("queued", 0, 0, "-"),
        ("fetching", 0, 100, "-"),
        ("staging", 50, 100, "50 %"),
        ("verifying", 99, 100, "99 %"),
        ("succeeded", 0, 100, "100 %"),
        ("reverting", 99, 100, "-"),
        ("reverted", 99, 100, "-"),
        ("failed", 50, 100, "-"),
    ],
)
def test_how_much_is_done_is_said_where_it_is_known(state: str, done: int, total: int, text: str) -> None:
    assert _progress({"state": state, "done_bytes": done, "total_bytes": total}) == text


@pytest.mark.parametrize(
    ("minutes", "action", "text"),
    [
        (0.01, "install", "1 s"),
        (1.5, "install", "90 s"),
        (3.2, "install", "3 min"),
        (None, "install", "-"),
        (1, "nothing", "-"),
    ],
)
def test_a_plan_says_the_time_for_a_person(minutes: float | None, action: str, text: str) -> None:
    assert _time_text({"estimated_minutes": minutes, "action": action}) == text


def _not_below(folder: Path, look: Callable[[Path], bool]) -> Callable[[Path], bool]:
    """``look`` as it is for somebody who may not enter ``folder``."""

    def denied(path: Path) -> bool:
        if folder in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    return denied


def test_the_doctor_passes_on_what_the_daemon_says_of_a_device(tmp_path: Path, publisher: Publisher) -> None:
    missing = f'[[device]]\nid = "plc"\nmodel = "widget"\nmapper = "uart-stk500"\naddress = "serial:{tmp_path}/tty"\n'
    place = Place(tmp_path, publisher, extra=DEVICES.partition("[[device]]")[0] + missing).write()
    with place.daemon():
        eventually(lambda: place.client.get("devices")["devices"][0]["reason"] == "device_absent")
        answer = place.run("doctor")
        assert "1 configured, 0 connected, 0 left out; edged devices says why" in place.run("status").out
    assert f"warn  device    plc, the daemon says: device_absent: {tmp_path}/tty: No such file" in answer.out


def test_a_configuration_that_is_named_and_not_there_reaches_no_other_daemon(tmp_path: Path) -> None:
    answer = CliRunner().invoke(cli.main, ["--config", str(tmp_path / "slip.toml"), "status"])
    assert answer.exit_code == 2
    assert "slip.toml: cannot be read: No such file or directory" in answer.stderr


def test_a_trail_that_was_changed_is_found_offline(tmp_path: Path, publisher: Publisher) -> None:
    import sqlite3

    place = Place(tmp_path, publisher).write()
    with place.daemon():
        assert place.run("deploy", "app@2.0.0", "--to", "one", "--wait").code == 0
    with sqlite3.connect(place.state / "edged.db") as db:
        db.execute("DROP TRIGGER audit_no_update")
        db.execute("UPDATE audit SET actor = 'nobody' WHERE seq = 4")
    db.close()
    answer = place.run("audit", "verify", "--offline")
    assert answer.code == 1
    assert answer.err == "NOT INTACT at row 4: row 4 is not what was written\n"
    assert place.run("audit", "verify", "--offline", "--json").json["first_bad_seq"] == 4
    (place.state / "edged.db").write_bytes(b"no database at all, but some text that is long enough")
    unreadable = place.run("audit", "verify", "--offline")
    assert unreadable.code == 1
    assert "file is not a database" in unreadable.err


def test_a_database_that_may_not_be_written_to_is_not_called_damaged() -> None:
    """Its user lost the right to the folder, as by a backup that root put back; to move the file away would lose the floors."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with closing(sqlite3.connect(folder / "edged.db")) as db:
            db.execute("PRAGMA journal_mode = wal")
            db.execute("CREATE TABLE job (id TEXT)")
        (folder / "edged.db").chmod(0o644)
        (finding,) = _as_somebody_without_rights(folder, _database_findings)
    assert "edged.db: " in finding["detail"]
    assert finding["level"] == "fail"
    assert finding["cure"].startswith("leave the file where it is, it need not be damaged: ")


def _database_findings(folder: Path) -> list[dict[str, str]]:
    config = Config(node=Node(id="node-1", state_dir=folder))
    return [asdict(finding) for finding in doctor.check_database(config)]


def _as_somebody_without_rights(folder: Path, look: Callable[[Path], Any]) -> Any:
    """What ``look`` finds in a process that may read the folder and not write to it: whoever runs the tests may be root."""
    folder.chmod(0o555)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setuid(pwd.getpwnam("nobody").pw_uid)
            os.write(writer, json.dumps(look(folder)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    folder.chmod(0o755)
    with os.fdopen(reader) as pipe:
        return json.loads(pipe.read())


def _all_commands(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            if name == "demo":
                continue
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _all_commands(inner, (*words, name))
    else:
        yield " ".join(words), command


OURS = list(_all_commands(cli.main))


@pytest.mark.parametrize(("name", "command"), OURS, ids=[name for name, _ in OURS])
def test_every_command_has_json_and_an_example_that_names_it(name: str, command: click.Command) -> None:
    assert any("--json" in parameter.opts for parameter in command.params)
    assert f"edged {name}" in (command.help or "").replace("edged --config ./edged.toml", "edged")


def test_the_list_of_commands_says_what_each_says_of_itself() -> None:
    for name, (_, line) in cli.COMMANDS.items():
        if name == "demo":
            continue
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command is not None
        assert " ".join((command.help or "").partition("\n\n")[0].split()).startswith(line), name


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from edged.cli import main;"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0;"
        "print([name for name in ('asyncio', 'aiohttp', 'rich', 'sqlite_utils', 'cattrs', 'tuf') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
