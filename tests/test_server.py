"""The local API over its real socket: codes, errors with their cures, and the stream of events."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from cli_kit import Place, eventually
from engine_kit import published

from edged.cli.client import ApiError
from edged.errors import Reason


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    base = tmp_path_factory.mktemp("server")
    node = Place(base / "node", published(base)).write()
    with node.daemon():
        eventually(lambda: node.client.get("status")["devices"]["running"] == 2)
        eventually(lambda: node.client.get("trust")["online"])
        yield node


def ask(place: Place, method: str, target: str, body: bytes | None = None) -> tuple[int, Any]:
    """Status and JSON of one raw request."""
    connection = http.client.HTTPConnection("edged")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(60)
    connection.sock.connect(str(place.socket))
    try:
        connection.request(method, target, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.mark.parametrize(
    ("method", "target", "body", "status", "code", "says"),
    [
        (
            "PATCH",
            "/v1/devices/one/twin",
            b"{",
            400,
            "bad_request",
            "the body is not JSON: Expecting property name",
        ),
        ("PATCH", "/v1/devices/one/twin", b"[]", 400, "bad_request", "not a JSON object but list"),
        ("PATCH", "/v1/devices/one/twin", b'{"desired": {"x": NaN}}', 400, "bad_request", "NaN is not JSON"),
        (
            "PATCH",
            "/v1/devices/one/twin",
            b'{"desired": {"x": 1e999}}',
            400,
            "bad_request",
            "is not JSON: Out of range",
        ),
        (
            "PATCH",
            "/v1/devices/one/twin",
            b'{"desired": {"x": "\\ud800"}}',
            400,
            "bad_request",
            "surrogates not allowed",
        ),
        (
            "PATCH",
            "/v1/devices/one/twin",
            b'{"desired": {"\\ud800": 1}}',
            400,
            "bad_request",
            "surrogates not allowed",
        ),
        ("POST", "/v1/trust", b'{"root": "\\ud800"}', 400, "bad_request", "surrogates not allowed"),
        ("GET", "/v1/jobs/%ED%A0%80", None, 404, "not_found", "no job"),
        ("GET", "/v1/jobs?device=%ED%A0%80", None, 404, "not_found", "no device"),
        ("PATCH", "/v1/devices/one/twin", b"[" * 100_000, 400, "bad_request", "the body is not JSON"),
        ("PATCH", "/v1/devices/one/twin", b"\xff\xfe", 400, "bad_request", "the body is not JSON"),
        ("PATCH", "/v1/devices/one/twin", b'{"desired": {}}', 400, "bad_request", "no property is given"),
        (
            "PATCH",
            "/v1/devices/one/twin",
            b'{"desired": {"a b": 1}}',
            400,
            "bad_request",
            "is no name of a property",
        ),
        (
            "PATCH",
            "/v1/devices/one/twin",
            b'{"desired": {"firmware": 7}}',
            400,
            "bad_request",
            "write NAME@VERSION",
        ),
        (
            "PATCH",
            "/v1/devices/one/twin",
            b'{"desired": {"firmware.radio": "a@1"}}',
            409,
            "conflict",
            "one component",
        ),
        ("PATCH", "/v1/devices/nine/twin", b'{"desired": {"x": 1}}', 404, "not_found", "devices: one, two"),
        ("POST", "/v1/deployments", b" " * 2_000_000, 400, "bad_request", "larger than 1048576 bytes"),
        ("POST", "/v1/deployments", b"{}", 400, "bad_request", "release: found None; allowed: a text"),
        (
            "POST",
            "/v1/deployments",
            b'{"release": "app@2.0.0"}',
            400,
            "bad_request",
            "name either devices or a model",
        ),
        (
            "POST",
            "/v1/deployments",
            b'{"release": "app", "devices": ["one"]}',
            400,
            "bad_request",
            "NAME@VERSION",
        ),
        (
            "POST",
            "/v1/deployments",
            b'{"release": "app@9", "devices": ["one"]}',
            403,
            "refused",
            "has no app@9",
        ),
        (
            "POST",
            "/v1/deployments",
            b'{"release": "app@2.0.0", "devices": "one"}',
            400,
            "bad_request",
            "a list",
        ),
        (
            "POST",
            "/v1/deployments",
            b'{"release": "app@2.0.0", "model": "x"}',
            404,
            "not_found",
            "models: widget",
        ),
        ("GET", "/v1/devices/nine", None, 404, "not_found", "no device 'nine'; devices: one, two"),
        (
            "GET",
            "/v1/jobs?state=odd",
            None,
            400,
            "bad_request",
            "found 'odd'; allowed: active, ended, queued",
        ),
        ("GET", "/v1/jobs?limit=-1", None, 400, "bad_request", "limit: found '-1'"),
        ("GET", "/v1/jobs/01X", None, 404, "not_found", "no job '01X'"),
        ("POST", "/v1/jobs/01X/cancel", b"", 404, "not_found", "no job '01X'"),
        ("POST", "/v1/jobs/01X/retry", b"{}", 404, "not_found", "no job '01X'"),
        (
            "POST",
            "/v1/mappers/warp/probe",
            b'{"address": "x:y"}',
            409,
            "conflict",
            "no mapper 'warp'; mappers: can-uds, fake, ",
        ),
        (
            "POST",
            "/v1/mappers/fake/probe",
            b'{"address": "fake:bus/nine"}',
            503,
            "unavailable",
            "does not answer",
        ),
        ("POST", "/v1/trust", b'{"root": "{}"}', 403, "refused", ""),
        ("GET", "/v1/events?after=99999999", None, 400, "bad_request", "the newest event is"),
        ("DELETE", "/v1/status", None, 400, "bad_request", "DELETE is not allowed; allowed: GET"),
        ("GET", "/v2/status", None, 404, "not_found", "no operation at /v2/status"),
    ],
)
def test_every_error_has_its_code_and_a_text(
    place: Place, method: str, target: str, body: bytes | None, status: int, code: str, says: str
) -> None:
    found, answer = ask(place, method, target, body)
    assert (found, answer["code"]) == (status, code), answer
    assert set(answer) == {"code", "reason", "detail", "cure"}
    assert answer["reason"] in set(Reason)
    assert says in answer["detail"]


def test_a_refusal_is_on_record_with_who_asked(place: Place) -> None:
    with pytest.raises(ApiError) as caught:
        place.client.post("deployments", body={"release": "ghost@1", "devices": ["one", "two"]})
    assert (caught.value.code, caught.value.reason) == ("refused", "release_unknown")
    assert caught.value.cure == "publish the release, then edged trust refresh"
    newest = place.client.get("audit", limit=1)["records"][0]
    assert (newest["actor"], newest["event"]) == ("root", "deploy.refused")
    assert newest["data"]["devices"] == ["one", "two"]
    assert newest["data"]["reason"] == "release_unknown"
    assert place.client.get("devices", "one", "twin")["desired"] == {}


def test_events_are_resumed_where_they_ended_without_a_gap_or_a_repeat(place: Place) -> None:
    begin = place.client.get("jobs", _deploy(place, "one", "app@1.0.0"))["events_after"]
    eventually(lambda: not place.client.get("jobs", state="active")["jobs"])
    first = _durable(place, 0, 2)
    rest = _durable(place, first[-1]["seq"], 3)
    again = _durable(place, 0, 5)
    assert [event["seq"] for event in first + rest] == [event["seq"] for event in again]
    assert again[0]["kind"] == "desired"
    assert begin >= again[1]["seq"]
    assert len({event["key"] for event in again}) == 5


def test_live_progress_comes_between_durable_events_in_their_order(place: Place) -> None:
    head = place.client.get("jobs", _deploy(place, "two", "app@1.0.0"))["events_after"]
    eventually(lambda: not place.client.get("jobs", state="active")["jobs"])
    events = place.client.events(head, device="two")
    job = _deploy(place, "two", "app@2.0.0")
    states = []
    for event in events:
        if event is not None and event["kind"] == "job" and event["job"] == job:
            states.append(event["state"])
            if event["state"] == "succeeded":
                break
        assert event is None or event["device"] == "two"
    wanted = ["queued", "fetching", "ready", "staging", "activating", "verifying", "succeeded"]
    assert list(dict.fromkeys(states)) == wanted


def test_one_deployment_is_one_wish_however_often_it_is_said(place: Place) -> None:
    job = _deploy(place, "one", "app@2.0.0")
    eventually(lambda: not place.client.get("jobs", state="active")["jobs"])
    answer = place.client.post("deployments", body={"release": "app@2.0.0", "devices": ["one", "one"]})
    assert [item["outcome"] for item in answer["devices"]] == ["up_to_date"]
    assert place.client.get("jobs", device="one")["jobs"][0]["id"] == job


def test_a_lower_counter_is_refused_before_a_job_is_made(place: Place) -> None:
    _deploy(place, "one", "app@2.0.0")
    eventually(lambda: not place.client.get("jobs", state="active")["jobs"])
    before = place.client.get("jobs", device="one")["jobs"]
    status, answer = ask(place, "POST", "/v1/deployments", b'{"release": "app@1.0.0", "model": "widget"}')
    assert (status, answer["reason"]) == (403, "counter_lower")
    assert answer["cure"] == "sign the older image again with a new, higher release counter"
    assert place.client.get("jobs", device="one")["jobs"] == before


def test_a_failed_release_is_tried_again_only_when_somebody_says_so(place: Place) -> None:
    _deploy(place, "one", "app@2.0.0")
    eventually(lambda: not place.client.get("jobs", state="active")["jobs"])
    first = _deploy(place, "one", "app@3.0.0")
    eventually(lambda: place.client.get("jobs", first)["state"] == "reverted")
    again = place.client.post("deployments", body={"release": "app@3.0.0", "devices": ["one"]})["devices"][0]
    assert again["outcome"] == "retried"
    eventually(lambda: place.client.get("jobs", again["job"])["state"] == "reverted")
    third = place.client.post("jobs", again["job"], "retry")
    assert (third["run"], third["retry_of"]) == (3, again["job"])
    eventually(lambda: place.client.get("jobs", third["id"])["state"] == "reverted")
    with pytest.raises(ApiError) as caught:
        place.client.post("jobs", third["id"], "cancel")
    assert "has ended already: reverted" in caught.value.detail


def test_taking_a_wish_back_makes_no_job(place: Place) -> None:
    answer = place.client.patch("devices", "one", "twin", body={"desired": {"firmware": None}})
    assert answer == {"device": "one", "job": None, "outcome": "no_wish"}
    assert place.client.get("devices", "one")["desired"] is None


def test_a_file_of_the_socket_is_no_way_in_for_http_of_others(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(place.socket))
        sock.sendall(b"\x00\x01garbage\r\n\r\n")
        assert b"400" in sock.recv(4096)
    assert place.client.get("status")["node"] == "node-1"


def _deploy(place: Place, device: str, release: str) -> str:
    """The job's id, of a new job or of the last."""
    item = place.client.post("deployments", body={"release": release, "devices": [device]})["devices"][0]
    return str(item["job"] or place.client.get("jobs", device=device)["jobs"][0]["id"])


def _durable(place: Place, after: int, count: int) -> list[Any]:
    found: list[Any] = []
    quiet = 0
    for event in place.client.events(after):
        quiet += event is None
        assert quiet < 10, found
        if event is not None and "seq" in event:
            found.append(event)
        if len(found) == count:
            break
    return found


def test_the_socket_serves_many_at_once(place: Place) -> None:
    streams = [place.client.events() for _ in range(5)]
    for stream in streams:
        next(stream)
    assert place.client.get("status")["node"] == "node-1"
