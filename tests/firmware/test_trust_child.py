"""The child process: the same answers, and nothing left behind when it is cancelled or too slow."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from engine_kit import until
from trust_kit import DAY, NOW, Client, Publisher, refs

from edged_firmware.errors import Permanent, Reason, Refused, Transient
from edged_firmware.trust import TrustRequest, error_from_json, error_to_json, verify, verify_in_child


@pytest.fixture
def client(tmp_path: Path) -> Client:
    publisher = Publisher(tmp_path).init()
    publisher.publish("blink@1.0")
    return Client(tmp_path / "cache", publisher.root, str(publisher.repo))


@pytest.fixture
def deaf_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_the_child_reports_what_verify_reports(client: Client) -> None:
    assert asyncio.run(verify_in_child(client.request())) == verify(client.request())


def test_the_child_raises_what_verify_raises(client: Client) -> None:
    with pytest.raises(Refused) as refusal:
        asyncio.run(verify_in_child(client.request(now=NOW + 8 * DAY)))
    assert refusal.value.reason is Reason.METADATA_EXPIRED
    with pytest.raises(Transient) as error:
        asyncio.run(verify_in_child(client.request(source="http://127.0.0.1:9")))
    assert error.value.reason is Reason.FETCH_FAILED


def test_a_cancelled_child_is_gone(client: Client, deaf_server: str) -> None:
    async def cancel() -> None:
        request = client.request(source=deaf_server, socket_timeout_s=20.0)
        task = asyncio.create_task(verify_in_child(request))
        await until(children)
        task.cancel()
        async with asyncio.timeout(20):
            with pytest.raises(asyncio.CancelledError):
                await asyncio.shield(task)
        assert not children()

    asyncio.run(cancel())


def test_a_slow_child_is_ended(client: Client, deaf_server: str) -> None:
    request = client.request(source=deaf_server, socket_timeout_s=20.0, timeout_s=0.5)
    with pytest.raises(Transient, match=r"longer than 0\.5 s"):
        asyncio.run(verify_in_child(request))
    assert not children()


def test_a_child_that_outlives_its_parent_ends_by_itself(client: Client, deaf_server: str) -> None:
    request = client.request(source=deaf_server, socket_timeout_s=20.0, timeout_s=0.2)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-m", "edged_firmware.trust_worker"],
        input=json.dumps(request.to_json()).encode(),
        env=env,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode < 0


def test_a_child_that_breaks_is_to_be_tried_again_with_its_last_words(client: Client) -> None:
    broken: TrustRequest = replace(client.request(), offline_grace_s="none")  # type: ignore[arg-type]
    with pytest.raises(Transient, match="ended with 1: TypeError"):
        asyncio.run(verify_in_child(broken))


def test_a_module_in_the_current_folder_is_not_loaded(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tuf.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert refs(asyncio.run(verify_in_child(client.request()))) == ["blink@1.0"]


@pytest.mark.parametrize("kind", [Transient, Permanent, Refused])
def test_an_error_survives_json(kind: type[Transient] | type[Permanent] | type[Refused]) -> None:
    error = error_from_json(error_to_json(kind(Reason.DISK_FULL, "why")))
    assert (type(error), error.reason, error.detail) == (kind, Reason.DISK_FULL, "why")
