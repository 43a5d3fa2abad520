"""The daemon as a process: it starts without a network, ends quickly, is alone on its state, and outlives faults."""

from __future__ import annotations

import asyncio
import grp
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from cli_kit import DEVICES, Listener, Place, eventually
from engine_kit import Publisher, published

from edged import app
from edged.cli.client import Client
from edged.clock import SystemClock
from edged.config import load
from edged.domain.job import Job, State
from edged.domain.reconcile import FIRMWARE, firmware_value
from edged.store import Store, Tx, audit, jobs, twins

DEAD_SERVER = "http://127.0.0.1:1/repo"
ACCEPTS = 0x10000
"""``__SO_ACCEPTCON`` in the flags of ``/proc/net/unix``."""


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return published(tmp_path_factory.mktemp("publisher"))


def test_starts_and_is_ready_without_a_network_and_says_what_is_missing(
    tmp_path: Path, publisher: Publisher
) -> None:
    place = Place(tmp_path, publisher, repository=DEAD_SERVER).write()
    with place.daemon() as process:
        assert place.told[0] == "READY=1"
        problems = eventually(lambda: place.client.get("status")["problems"])
        assert [problem["part"] for problem in problems] == ["trust"]
        assert problems[0]["reason"] == "fetch_failed"
        _wishes_wait_for_the_network(place)
        began = time.monotonic()
        process.terminate()
        assert process.wait(30) == 0
        assert time.monotonic() - began < 8, "it waited for somebody"
    assert not place.socket.exists()
    assert stat.S_IMODE(place.state.stat().st_mode) == 0o750
    assert stat.S_IMODE((place.state / "node-key.pem").stat().st_mode) == 0o600


def _wishes_wait_for_the_network(place: Place) -> None:
    """A wish stands though it cannot be checked now; another one follows it; an operator can end it."""
    said = place.run("deploy", "app@1.0.0", "--to", "one")
    assert said.code == 0
    assert said.out.startswith("Not checked yet, the repository does not answer: ")
    plan = place.run("plan", "app@1.0.0", "--to", "one")
    assert (plan.code, "cannot be checked now" in plan.out, "join" in plan.out) == (0, True, True)
    first = eventually(lambda: [job for job in place.client.get("jobs")["jobs"] if job["waiting"]])[0]
    assert first["waiting"]["reason"] == "fetch_failed"
    after = place.client.post("deployments", body={"release": "app@2.0.0", "devices": ["one"]})["devices"][0]
    assert (after["outcome"], after["job"], after["after"]) == ("after_active", None, first["id"])
    assert eventually(lambda: place.client.get("jobs", first["id"])["state"] == "cancelled")
    assert place.client.get("jobs", first["id"])["reason"] == "superseded"
    (second,) = eventually(lambda: place.client.get("jobs", state="active")["jobs"])
    assert second["release"] == "app@2.0.0"
    assert place.run("job", "cancel", second["id"]).code == 0
    assert place.run("job", "watch", second["id"]).code == 1
    assert place.client.get("jobs", second["id"])["reason"] == "cancelled"


def test_ends_at_once_even_while_somebody_watches_and_a_job_works(
    tmp_path: Path, publisher: Publisher
) -> None:
    place = Place(tmp_path, publisher, extra=_slow_device(tmp_path)).write()
    with place.daemon() as process:
        events = place.client.events()
        next(events)
        place.client.post("deployments", body={"release": "app@2.0.0", "devices": ["slow"]})
        eventually(lambda: place.client.get("devices", "slow")["job"]["state"] == "staging")
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert time.monotonic() - began < 8, "it waited for somebody"
        assert all(event is None or event["kind"] for event in events)
    with place.daemon():
        job = eventually(lambda: place.client.get("jobs", device="slow", state="succeeded")["jobs"])
        assert job[0]["release"] == "app@2.0.0"


def _slow_device(base: Path, speed: str = "slow") -> str:
    return DEVICES.partition("[[device]]")[0] + (
        f'[[device]]\nid = "slow"\nmodel = "widget"\nmapper = "fake"\naddress = "fake:{speed}/slow"\n'
        f'config = {{app = "1.0.0", slot_count = 2, file = "{base / "slow.flash"}"}}\n'
    )


def test_a_job_goes_on_after_the_daemon_was_killed_and_whoever_watches_sees_its_end(
    tmp_path: Path, publisher: Publisher
) -> None:
    place = Place(tmp_path, publisher, extra=_slow_device(tmp_path)).write()
    with place.daemon() as process:
        watcher = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "edged",
                "--config",
                place.config,
                "deploy",
                "app@2.0.0",
                "--to",
                "slow",
                "--wait",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        eventually(lambda: place.client.get("jobs", state="staging")["jobs"])
        process.kill()
        process.wait()
    assert watcher.poll() is None
    with place.daemon():
        out, _ = watcher.communicate(timeout=60)
        assert watcher.returncode == 0, out
        assert "slow: succeeded: runs app@2.0.0" in out
        assert place.client.get("audit", "verify")["intact"]


def test_a_second_daemon_on_the_same_state_is_refused_and_names_the_first(tmp_path: Path) -> None:
    place = Place(tmp_path, extra="").write()
    with place.daemon() as process:
        second = place.spawn(fake=False)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 1
        assert err.count("\n") == 1
        says = f"another edged (pid {process.pid}) uses {place.state}; cure: stop it, or set another node.state_dir\n"
        assert err.endswith(says)
        assert place.client.get("status")["pid"] == process.pid


def test_the_socket_is_for_its_group_alone(tmp_path: Path) -> None:
    group = next(item for item in grp.getgrall() if item.gr_gid != os.getgid())
    place = Place(tmp_path, extra="", group=group.gr_name).write()
    with place.daemon(fake=False):
        status = place.socket.stat()
        assert stat.S_IMODE(status.st_mode) == 0o660
        assert status.st_gid == group.gr_gid


def test_a_missing_group_is_said_and_does_not_stop_the_daemon(tmp_path: Path) -> None:
    place = Place(tmp_path, extra="", group="no-such-group").write()
    with place.daemon(fake=False):
        assert stat.S_IMODE(place.socket.stat().st_mode) == 0o660
        parts = {problem["part"]: problem["detail"] for problem in place.client.get("status")["problems"]}
        assert "group 'no-such-group' does not exist" in parts["api"]


def test_replaces_a_stale_socket_but_nothing_else(tmp_path: Path) -> None:
    place = Place(tmp_path, extra="").write()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(place.socket))
    with place.daemon(fake=False):
        assert place.client.get("status")["node"] == "node-1"
    place.socket.write_text("somebody's file")
    second = place.spawn(fake=False)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "is no socket" in err
    assert place.socket.read_text() == "somebody's file"


def test_does_not_take_the_socket_of_a_living_process(tmp_path: Path) -> None:
    place = Place(tmp_path, extra="").write()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(place.socket))
        other.listen()
        second = place.spawn(fake=False)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 1
        assert "another process answers" in err


def listens(path: Path) -> bool:
    """Whether a connection would be taken there: between bind() and listen() the socket is there and refuses."""
    rows = [row.split() for row in Path("/proc/net/unix").read_text().splitlines()]
    return any(row[-1] == str(path) and int(row[3], 16) & ACCEPTS for row in rows[1:])


@contextmanager
def activated(place: Place, where: Path, name: str = "api") -> Iterator[subprocess.Popen[str]]:
    """The daemon as a socket unit starts it: by the first connection to ``where``, which is open already."""
    python_path = f"PYTHONPATH={os.pathsep.join(sys.path)}"
    activate = ["systemd-socket-activate", "-l", str(where), f"--fdname={name}", "-E", python_path]
    daemon = [sys.executable, "-m", "edged", "--config", str(place.config), "run"]
    process = subprocess.Popen([*activate, *daemon], stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: listens(where))
        yield process
    finally:
        process.kill()
        process.communicate()


def test_serves_on_the_socket_that_systemd_opened_and_leaves_it_there(tmp_path: Path) -> None:
    place = Place(tmp_path, extra="", group="no-such-group").write()
    with activated(place, place.socket) as process:
        before = place.socket.stat()
        status = place.client.get("status")
        assert status["pid"] == process.pid
        assert not [problem for problem in status["problems"] if problem["part"] == "api"]
        after = place.socket.stat()
        assert (after.st_ino, after.st_mode, after.st_gid) == (before.st_ino, before.st_mode, before.st_gid)
        process.terminate()
        assert process.wait(30) == 0
        assert place.socket.stat().st_ino == before.st_ino


def test_a_socket_unit_at_another_place_is_served_and_said(tmp_path: Path) -> None:
    place, elsewhere = Place(tmp_path, extra="").write(), tmp_path / "elsewhere.sock"
    with activated(place, elsewhere):
        problems = Client(elsewhere).get("status")["problems"]
        details = {problem["part"]: problem["detail"] for problem in problems}
        assert details["api"].startswith(
            f"edged.socket listens at {elsewhere}, api.socket says {place.socket}"
        )
        assert not place.socket.exists()


def test_a_socket_of_another_name_is_not_the_apis(tmp_path: Path) -> None:
    place, elsewhere = Place(tmp_path, extra="").write(), tmp_path / "elsewhere.sock"
    with activated(place, elsewhere, "other"), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(elsewhere))
        eventually(lambda: listens(place.socket))
        assert place.client.get("status")["node"] == "node-1"


def test_feeds_the_watchdog_while_store_and_engine_live(tmp_path: Path) -> None:
    place = Place(tmp_path).write()
    listener_path = tmp_path / "watchdog.sock"
    with Listener(listener_path) as listener:
        process = place.spawn(NOTIFY_SOCKET=str(listener_path), WATCHDOG_USEC="300000")
        try:
            for wanted in ("READY=1", "WATCHDOG=1", "WATCHDOG=1", "WATCHDOG=1"):
                listener.hear(wanted, process)
        finally:
            process.kill()
            process.communicate()


def test_the_status_line_follows_the_trust_at_once(tmp_path: Path, publisher: Publisher) -> None:
    """Not with the next sign of life: here nobody asked for one."""
    place = Place(tmp_path, repository=str(publisher.repo)).write()
    with Listener(tmp_path / "notify.sock") as listener:
        process = place.spawn(NOTIFY_SOCKET=str(tmp_path / "notify.sock"))
        try:
            listener.hear("STATUS=unprovisioned: no root of trust", process)
            assert place.run("trust", "init", str(publisher.root)).code == 0
            assert listener.hear("STATUS=2 devices", process)[-1] == "STATUS=2 devices"
        finally:
            process.kill()
            process.communicate()


def test_a_damaged_database_keeps_the_daemon_up_for_the_operator(
    tmp_path: Path, publisher: Publisher
) -> None:
    place = Place(tmp_path, publisher).write()
    with place.daemon():
        pass
    _damage(place.state / "edged.db")
    with place.daemon(WATCHDOG_USEC="300000"):
        status = place.client.get("status")
        assert "damaged" in status["read_only"]
        assert status["problems"][0]["part"] == "store"
        assert status["problems"][0]["cure"]
        assert (status["jobs"], status["audit_seq"]) == (None, None)
        said = place.run("status").out
        assert "jobs      unknown; 0 at work now" in said
        assert "audit     unknown, key" in said
        answer = place.run("deploy", "app@2.0.0", "--to", "one", "--yes")
        assert (answer.code, answer.out) == (1, "")
        assert "storage_failed" in answer.err
        assert place.run("mapper", "list").code == 0


def _damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100:4096] = bytes(3996)
    path.write_bytes(data)


def test_a_device_that_cannot_be_used_is_left_out_with_its_reason_and_the_rest_run(tmp_path: Path) -> None:
    bad = (
        '[[device]]\nid = "alien"\nmodel = "widget"\nmapper = "warp"\naddress = "fake:bus/alien"\n'
        '[[device]]\nid = "typo"\nmodel = "widget"\nmapper = "fake"\naddress = "fake:bus/typo"\n'
        "config = {slots = 2}\n"
        '[[device]]\nid = "crossed"\nmodel = "widget"\nmapper = "fake"\naddress = "serial:by-id/one"\n'
        '[[device]]\nid = "unwired"\nmodel = "widget"\nmapper = "fake"\naddress = "rope:1"\n'
    )
    place = Place(tmp_path, extra=DEVICES + bad).write()
    with place.daemon():
        eventually(lambda: place.client.get("status")["devices"]["running"] == 2)
        devices = {device["id"]: device for device in place.client.get("devices")["devices"]}
        assert {name for name, device in devices.items() if device["state"] == "left_out"} == {
            "alien",
            "crossed",
            "typo",
            "unwired",
        }
        assert "mapper: found 'warp'; allowed: can-uds, fake" in devices["alien"]["detail"]
        assert "slots: found an unknown key" in devices["typo"]["detail"]
        assert (
            "address: found 'serial:by-id/one'; allowed: an address that begins with one of: fake:"
            in devices["crossed"]["detail"]
        )
        assert (
            "address: found 'rope:1'; allowed: an address that begins with one of: fake:"
            in devices["unwired"]["detail"]
        )
        answer = place.run("deploy", "app@2.0.0", "--to", "alien")
        assert answer.code == 1
        assert "alien is left out: mapper: found 'warp'" in answer.err
        told = [line for line in place.run("status").out.splitlines() if " is left out: " in line]
        assert len(told) == 4
        assert all(
            line.endswith("; cure: correct what edged check-config names, then systemctl restart edged")
            for line in told
        )


def test_a_device_that_is_left_alone_is_told_with_its_cure(tmp_path: Path, publisher: Publisher) -> None:
    place = Place(tmp_path, publisher).write()
    place.state.mkdir()
    asyncio.run(_brought_back_often(place.state / "edged.db"))
    said = (
        "runs_exhausted: was brought back to app@2.0.0 3 times within 24 h and came back with another version; "
        "cure: find out who or what changes the device, then edged deploy again"
    )
    with place.daemon():
        eventually(lambda: place.client.get("status")["devices"]["running"] == 2)
        (problem,) = place.client.get("status")["problems"]
        assert (problem["part"], problem["reason"]) == ("firmware", "runs_exhausted")
        assert problem["detail"].startswith("one was brought back to app@2.0.0 3 times")
        assert place.run("status").out.splitlines()[-1].endswith(said.partition("; ")[2])
        assert f"one: {said}" in place.run("devices").out
        assert f"desired   app@2.0.0: {said}" in place.run("device", "show", "one").out
        assert place.client.get("devices", "two")["left_alone"] is None
        assert len(place.client.get("jobs", device="one")["jobs"]) == 4
        done = place.run("deploy", "app@2.0.0", "--to", "one", "--wait", "--yes")
        assert done.code == 0, done.err
        assert place.client.get("status")["problems"] == []


async def _brought_back_often(database: Path) -> None:
    """As if a device had been brought back three times today, and were back with something else again."""

    def run(tx: Tx, number: int) -> None:
        job = Job(
            id=f"01JOB{number}", device="one", component=FIRMWARE, release="app@2.0.0", desired_version=1, run=number,
            source="drift" if number > 1 else "root", created=tx.now, updated=tx.now, deadline=tx.now,
        )  # fmt: skip
        jobs.add(tx, job)
        for state in (State.FETCHING, State.READY, State.VERIFYING, State.SUCCEEDED):
            job = jobs.advance(tx, job, replace(job, state=state), "step")

    async with Store.open(database, SystemClock()) as store:
        await store.write(
            lambda tx: twins.set_desired(tx, "one", FIRMWARE, firmware_value("app@2.0.0"), "root")
        )
        for number in range(1, 5):
            await store.write(lambda tx, number=number: run(tx, number))  # type: ignore[misc]


def test_a_check_of_the_audit_trail_lets_others_read(tmp_path: Path) -> None:
    place = Place(tmp_path, extra="").write()
    many = 10 * audit.VERIFY_ROWS

    async def run() -> None:
        async with app.build(load(place.config)) as daemon:
            store = daemon.parts.store
            await store.write(lambda tx: [audit.append(tx, "root", "event", {"n": n}) for n in range(many)])
            check = asyncio.create_task(daemon.control.verify_audit())
            reads = 0
            while not check.done():
                await store.read(audit.head)
                reads += 1
            assert (await check)["rows"] == many
            assert reads >= 5

    asyncio.run(run())


def test_the_wrong_hardware_is_seen_before_anything_is_sent(tmp_path: Path) -> None:
    place = Place(tmp_path, extra=DEVICES.replace('"fake:1"', '"fake:9"')).write()
    with place.daemon():
        device = eventually(lambda: [d for d in place.client.get("devices")["devices"] if d["reason"]])[0]
        assert device["reason"] == "hardware_mismatch"
        assert "hardware fake:1 answered at fake:bus/one; device one allows fake:9" in device["detail"]
        assert device["cure"]


def test_what_devices_report_is_kept_and_what_they_should_have_is_told_them(tmp_path: Path) -> None:
    place = Place(tmp_path, extra=DEVICES + "[storage]\nreport_interval_s = 0.5\n").write()
    with place.daemon():
        eventually(lambda: "app_version" in place.client.get("devices", "one", "twin")["reported"])
        assert place.run("twin", "set", "one", "interval=5", "name=pump").code == 0
        found = eventually(
            lambda: (twin := place.client.get("devices", "one", "twin"))["delta"] == {} and twin
        )
        assert found["reported"]["interval"]["value"] == 5
        assert found["reported"]["uptime"]["unit"] == "s"
    with place.daemon():
        assert place.client.get("devices", "one", "twin")["reported"]["interval"]["value"] == 5


_WITH_A_HANGING_MAPPER = """
import asyncio, sys
from contextlib import asynccontextmanager, suppress
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from edged import app
from edged.config import load
from edged.testing.fake import FakePlugin

class Hanging(FakePlugin):
    @asynccontextmanager
    async def _connect(self, device, env):
        async with super()._connect(device, env) as session:
            try:
                yield session
            finally:
                while True:
                    with suppress(asyncio.CancelledError):
                        await asyncio.sleep(3600)

app.END_S, app.HUNG_S = 3.0, 0.1
app.main(load(Path(sys.argv[1])), [("fake", Hanging())])
"""


def test_ends_within_seconds_though_a_mapper_does_not(tmp_path: Path, publisher: Publisher) -> None:
    place = Place(tmp_path, publisher).write()
    process = subprocess.Popen(
        [sys.executable, "-c", _WITH_A_HANGING_MAPPER, str(place.config)], stderr=subprocess.PIPE, text=True
    )
    try:
        eventually(lambda: listens(place.socket))
        eventually(lambda: place.client.get("status")["devices"]["running"])
        process.terminate()
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert "waiting for the end" in said
    assert "cut off: a plugin did not end" in said
