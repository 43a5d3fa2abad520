"""What a watcher shows: bars at a terminal, lines elsewhere; it goes on after the daemon was away."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_kit import DEVICES, Place
from engine_kit import published

from edged.cli import watch
from edged.cli.client import ApiError, Client, Unreachable
from edged.testing.fake import fake_app


def job(state: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": "01J",
        "device": "plc-1",
        "release": "blink@1.2",
        "state": state,
        "reason": None,
        "detail": "",
        "cure": "",
        "waiting": None,
    } | fields


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (job("staging"), "plc-1: staging"),
        (job("succeeded", detail="version=1.2"), "plc-1: succeeded: runs blink@1.2 (version=1.2)"),
        (job("succeeded"), "plc-1: succeeded: runs blink@1.2"),
        (
            job("failed", reason="counter_lower", detail="1 < 2", cure="sign it again"),
            "plc-1: failed: counter_lower: 1 < 2; cure: sign it again",
        ),
        (
            job(
                "queued",
                waiting={"reason": "device_absent", "until": "x"},
                detail="no port",
                cure="connect it",
            ),
            "plc-1: queued, waits: device_absent: no port; cure: connect it",
        ),
    ],
)
def test_a_job_in_one_line(found: dict[str, Any], line: str) -> None:
    assert watch.describe(found) == line


@pytest.mark.parametrize(
    ("done", "total", "speed", "text"),
    [
        (450, 1000, 100.0, "write 45 %, 100 B/s, 6 s left"),
        (1000, 1000, 11_264.0, "write 100 %, 11.0 KiB/s, 0 s left"),
        (0, 1000, None, "write 0 %"),
    ],
)
def test_progress_in_words(done: int, total: int, speed: float | None, text: str) -> None:
    event = {"phase": "write", "done_bytes": done, "total_bytes": total, "bytes_per_s": speed}
    assert watch.progress_text(event) == text


class _Scripted(Client):
    """A daemon that goes away and comes back."""

    def __init__(self, script: list[Any], states: list[str | Exception]) -> None:
        super().__init__(Path("/nowhere"))
        self.script = script
        self.states = states
        self.asked_after: list[int | None] = []

    def events(self, after: int | None = None, **query: object) -> Iterator[dict[str, Any] | None]:
        self.asked_after.append(after)
        for item in self.script.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item

    def get(self, *path: str, **query: object) -> dict[str, Any]:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return job(state)


GONE = Unreachable("gone", "start it")


def event(seq: int, state: str) -> dict[str, Any]:
    return {"kind": "job", "seq": seq, "job": "01J", "device": "plc-1", "state": state}


def test_goes_on_after_the_last_event_when_the_daemon_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch.time, "sleep", lambda _: None)
    client = _Scripted(
        [[None, event(7, "staging"), GONE], [event(9, "succeeded")]],
        ["queued", "staging", GONE, ApiError("unavailable", None, "", ""), "staging", "succeeded"],
    )
    ended = watch.watch_jobs(client, {"plc-1": "01J"}, 3, quiet=True)
    assert [item["state"] for item in ended] == ["succeeded"]
    assert client.asked_after == [3, 7]


def test_gives_up_when_the_daemon_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "RECONNECT_S", 0.0)
    client = _Scripted([[GONE]], ["queued", GONE])
    with pytest.raises(Unreachable):
        watch.watch_jobs(client, {"plc-1": "01J"}, 3, quiet=True)


def test_a_job_that_is_not_made_yet_is_the_next_one_of_its_device() -> None:
    made = event(5, "queued") | {"job": "01K"}
    client = _Scripted(
        [[event(4, "cancelled"), made, event(6, "succeeded") | {"job": "01K"}]], ["queued", "succeeded"]
    )
    assert len(watch.watch_jobs(client, {"plc-1": None}, 3, quiet=True)) == 1


def test_bars_at_a_terminal(tmp_path: Path) -> None:
    speed = DEVICES.partition("[[device]]")[0] + (
        '[[device]]\nid = "slow"\nmodel = "widget"\nmapper = "fake"\naddress = "fake:slow/slow"\n'
        'config = {app = "1.0.0", slot_count = 2, reads_back = false}\n'
    )
    publisher = published(tmp_path)
    # four seconds on that wire: the command loads its bars meanwhile
    publisher.add("4.0.0", fake_app("4.0.0", 8192))
    publisher.publish()
    place = Place(tmp_path / "node", publisher, extra=speed).write()
    command = [
        sys.executable,
        "-m",
        "edged",
        "--config",
        str(place.config),
        "deploy",
        "app@4.0.0",
        "--to",
        "slow",
        "--wait",
    ]
    with place.daemon():
        code, text = _at_terminal(command)
    assert code == 0, text
    assert "Deploy? [y/N]" in text
    assert "slow write" in text
    assert "KiB/s" in text
    assert "s left" in text
    assert "slow: succeeded: runs app@4.0.0 (version=4.0.0)" in text


def _at_terminal(command: list[str]) -> tuple[int, str]:
    """Run ``command`` at a terminal of 100 columns where somebody types ``y``; its code, and what the screen got."""
    master, slave = pty.openpty()
    environment = os.environ | {"COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    os.write(master, b"y\n")
    seen = io.BytesIO()
    try:
        while data := os.read(master, 65536):
            seen.write(data)
    except OSError:
        pass  # the terminal is closed with its last process
    finally:
        os.close(master)
    return process.wait(30), seen.getvalue().decode()
