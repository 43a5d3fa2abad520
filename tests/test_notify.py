"""sd_notify: what systemd hears, and silence where nobody listens."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from edged.notify import Notifier


@pytest.mark.parametrize("abstract", [False, True])
def test_says_the_states_of_the_protocol(tmp_path: Path, abstract: bool) -> None:
    address = f"@edged-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + address[1:] if abstract else address)
        listener.settimeout(20)
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
        notifier.ready()
        notifier.status("two\nlines")
        notifier.watchdog()
        notifier.stopping()
        heard = [listener.recv(4096).decode() for _ in range(4)]
    assert heard == ["READY=1", "STATUS=two lines", "WATCHDOG=1", "STOPPING=1"]


def test_is_silent_where_nobody_listens(tmp_path: Path) -> None:
    Notifier.from_environment({}).ready()
    Notifier(str(tmp_path / "nobody")).ready()


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_for_this_process_alone(environment: dict[str, str], wanted: float | None) -> None:
    assert Notifier.from_environment({"NOTIFY_SOCKET": "/x", **environment}).watchdog_s == wanted
