"""Metrics: right numbers, in a form that Prometheus takes and its own linter finds nothing in."""

from __future__ import annotations

import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from cli_kit import Place, eventually
from engine_kit import published
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as Reference
from prometheus_client.parser import text_string_to_metric_families

from edged.clock import SystemClock
from edged.domain.job import State
from edged.engine.observer import Observer
from edged.errors import Reason
from edged.metrics import DISK_BUCKETS_S, MOST_EVENTS, Histogram, Metrics, Snapshot
from edged.supervisor import UnitState
from edged.testing.ports import free_port

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

SNAPSHOT = Snapshot(
    writable=True,
    jobs={(State.STAGING, None): 2, (State.QUEUED, Reason.DEVICE_ABSENT): 1},
    twin_lag_s={"one": 12.5, 'odd "name"\\\n': 0.0},
    outbox={"hawkbit": 7},
    audit_seq=42,
    units={"one": UnitState.BACKING_OFF},
    restarts={"one": 3},
    plugins={"uart": True, "broken": False},
)


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


@given(st.lists(st.floats(0, 10), max_size=50) | st.lists(st.sampled_from(DISK_BUCKETS_S)))
def test_the_histogram_counts_as_the_library_does(seconds: list[float]) -> None:
    registry = CollectorRegistry()
    reference = Reference("x_seconds", "x", buckets=DISK_BUCKETS_S, registry=registry)
    ours = Histogram(DISK_BUCKETS_S)
    for one in seconds:
        reference.observe(one)
        ours.observe(one)
    wanted = samples(generate_latest(registry).decode())
    for bound, count in ours.buckets():
        assert value(wanted, "x_seconds_bucket", le=bound) == count
    assert value(wanted, "x_seconds_sum") == pytest.approx(ours.sum_s)


def test_what_passes_by_is_counted_where_it_belongs() -> None:
    metrics: Observer = (whole := Metrics(SystemClock(), {"one": "uno"}))
    metrics.job_ended(State.SUCCEEDED, None)
    metrics.job_ended(State.FAILED, Reason.CHUNK_MISMATCH)
    metrics.job_ended(State.FAILED, Reason.CHUNK_MISMATCH)
    metrics.fetched("https", 100)
    metrics.fetched("https", 50)
    metrics.sent("one", 4096)
    metrics.sent("gone", 1)
    metrics.utilisation("one", 0.93)
    metrics.chunk_verified(0.0002)
    metrics.chunk_written(4.0)
    metrics.trust_refreshed(30.0, online=False)
    whole.committed(0.003)
    found = samples(whole.render(SNAPSHOT)[0].decode())
    assert value(found, "edged_jobs_ended_total", state="succeeded", reason="") == 1
    assert value(found, "edged_jobs_ended_total", state="failed", reason="chunk_mismatch") == 2
    assert value(found, "edged_fetched_bytes_total", source="https") == 150
    assert value(found, "edged_sent_bytes_total", model="uno") == 4096
    assert value(found, "edged_sent_bytes_total", model="unknown") == 1
    assert value(found, "edged_link_utilisation_ratio", device="one") == 0.93
    assert value(found, "edged_chunk_verify_seconds_bucket", le="0.00025") == 1
    assert value(found, "edged_chunk_write_seconds_count") == 1
    assert value(found, "edged_store_commit_seconds_sum") == 0.003
    assert value(found, "edged_trust_stale_seconds") == 30
    assert value(found, "edged_trust_online") == 0


def test_what_mappers_count_is_bounded() -> None:
    metrics = Metrics(SystemClock(), {})
    for number in range(MOST_EVENTS + 5):
        metrics.mapper_event("dev-1", f"e{number}")
    metrics.mapper_event("dev-1", "e0")
    found = samples(metrics.render(SNAPSHOT)[0].decode())
    assert value(found, "edged_mapper_events_total", source="dev-1", event="e0") == 2
    assert value(found, "edged_mapper_events_total", source="", event="") == 5


def test_what_is_asked_is_shown_with_any_name() -> None:
    found = samples(Metrics(SystemClock(), {}).render(SNAPSHOT)[0].decode())
    assert value(found, "edged_jobs", state="queued", reason="device_absent") == 1
    assert value(found, "edged_twin_lag_seconds", device="one") == 12.5
    assert value(found, "edged_twin_lag_seconds", device='odd "name"\\\n') == 0
    assert value(found, "edged_outbox_events", consumer="hawkbit") == 7
    assert value(found, "edged_audit_head_seq") == 42
    assert value(found, "edged_plugin_up", plugin="broken") == 0
    assert value(found, "edged_device_state", device="one", state="backing_off") == 1
    assert value(found, "edged_device_state", device="one", state="running") == 0
    assert value(found, "edged_device_reconnects_total", device="one") == 3
    assert value(found, "edged_store_writable") == 1


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return str(response.read().decode())


def both_ended(text: str) -> str:
    """``text`` where it counts two jobs as ended."""
    ended = samples(text).get(("edged_jobs_ended_total", (("reason", ""), ("state", "succeeded"))))
    return text if ended == 2 else ""


def test_the_linter_finds_nothing_in_a_scrape_after_a_deployment(tmp_path: Path) -> None:
    port = free_port()
    place = Place(tmp_path / "node", published(tmp_path), listen=f"127.0.0.1:{port}").write()
    with place.daemon():
        answer = place.client.post("deployments", body={"release": "app@2.0.0", "model": "widget"})
        for item in answer["devices"]:
            eventually(lambda job=item["job"]: place.client.get("jobs", job)["state"] == "succeeded")
        # an end is in the rows before it is counted
        text = eventually(lambda: both_ended(scrape(port)))
        for path, method in (("/", "GET"), ("/metrics", "POST"), ("/v1/status", "GET")):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(
                    urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
                )
            caught.value.close()
            assert caught.value.code in (404, 405)
    found = samples(text)
    assert value(found, "edged_jobs", state="succeeded", reason="") == 2
    assert value(found, "edged_jobs_ended_total", state="succeeded", reason="") == 2
    assert value(found, "edged_sent_bytes_total", model="widget") == 2 * 2048
    assert value(found, "edged_fetched_bytes_total", source="file") > 2048
    assert value(found, "edged_store_commit_seconds_count") > 5
    assert value(found, "edged_twin_lag_seconds", device="one") == 0
    check = subprocess.run(
        ["promtool", "check", "metrics"], input=text, text=True, capture_output=True, check=False
    )
    assert (check.returncode, check.stdout, check.stderr) == (0, "", "")


def test_a_taken_port_is_said_and_does_not_stop_the_daemon(tmp_path: Path) -> None:
    port = free_port()
    first = Place(tmp_path / "one", extra="", listen=f"127.0.0.1:{port}").write()
    second = Place(tmp_path / "two", extra="", listen=f"127.0.0.1:{port}").write()
    with first.daemon(fake=False), second.daemon(fake=False):
        parts = {problem["part"]: problem["detail"] for problem in second.client.get("status")["problems"]}
        assert (
            parts["metrics"]
            == f"cannot listen on 127.0.0.1:{port}: Address already in use; see metrics.listen"
        )
