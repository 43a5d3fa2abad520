"""Every metric of the daemon: its name, its help, where its number comes from.

Counts in plain Python and speaks the Prometheus format only when somebody scrapes: the library is loaded then. What can be
asked (jobs, twins, units) is asked at the scrape; only what passes by is counted here.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edged import __version__
from edged.clock import Clock
from edged.domain.job import State
from edged.errors import Reason
from edged.supervisor import UnitState

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FAST_BUCKETS_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.1, 1.0)
DISK_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
MOST_EVENTS = 10_000
"""Pairs of source and event that are counted apart."""
WIRE_BUCKETS_S = (0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Numbers of this moment, for the metrics. Lags in seconds; ``outbox`` has the events that wait, by consumer.

    What comes from the store is empty where it cannot be read, ``audit_seq`` is None then.
    """

    writable: bool
    jobs: Mapping[tuple[State, Reason | None], int]
    twin_lag_s: Mapping[str, float]
    outbox: Mapping[str, int]
    audit_seq: int | None
    units: Mapping[str, UnitState]
    restarts: Mapping[str, int]
    plugins: Mapping[str, bool]


class Histogram:
    """Counts of seconds by upper bound."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = tuple(bounds_s)
        self._counts = [0] * (len(self._bounds_s) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(self._bounds_s, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus wants them: ``(upper bound, count)``, the last bound is ``+Inf``."""
        found, total = [], 0
        for bound, count in zip([*map(str, self._bounds_s), "+Inf"], self._counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Metrics:
    """Implements ``engine.observer.Observer``. ``models`` has the model of each device."""

    def __init__(self, clock: Clock, models: Mapping[str, str]) -> None:
        self._clock = clock
        self._models = models
        self._ended: dict[tuple[State, Reason | None], int] = defaultdict(int)
        self._fetched: dict[str, int] = defaultdict(int)
        self._sent: dict[str, int] = defaultdict(int)
        self._events: dict[tuple[str, ...], int] = defaultdict(int)
        self._utilisation: dict[str, float] = {}
        self._chunk_verify = Histogram(FAST_BUCKETS_S)
        self._chunk_write = Histogram(WIRE_BUCKETS_S)
        self._commit = Histogram(DISK_BUCKETS_S)
        self._trust: tuple[float, float, bool] | None = None

    # -- what passes by

    def job_ended(self, state: State, reason: Reason | None) -> None:
        self._ended[state, reason] += 1

    def fetched(self, source: str, size_bytes: int) -> None:
        self._fetched[source] += size_bytes

    def sent(self, device: str, size_bytes: int) -> None:
        self._sent[self._models.get(device, "unknown")] += size_bytes

    def utilisation(self, device: str, ratio: float) -> None:
        self._utilisation[device] = ratio

    def chunk_verified(self, seconds: float) -> None:
        self._chunk_verify.observe(seconds)

    def chunk_written(self, seconds: float) -> None:
        self._chunk_write.observe(seconds)

    def trust_refreshed(self, stale_s: float, online: bool) -> None:
        self._trust = (self._clock.now().timestamp(), stale_s, online)

    def mapper_event(self, source: str, event: str) -> None:
        # a plugin that makes up names for ever must not fill the memory
        key = (
            (source, event)
            if (source, event) in self._events or len(self._events) < MOST_EVENTS
            else ("", "")
        )
        self._events[key] += 1

    def committed(self, seconds: float) -> None:
        """The store's ``observe``."""
        self._commit.observe(seconds)

    # -- the scrape

    def render(self, snapshot: Snapshot) -> tuple[bytes, str]:
        """The exposition of this moment, and its content type. May run on another thread than the counting."""
        from prometheus_client import CollectorRegistry, ProcessCollector
        from prometheus_client.exposition import generate_latest

        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Collected([*self._counted(), *_asked(snapshot)]))
        return generate_latest(registry), CONTENT_TYPE

    def _counted(self) -> Iterator[Metric]:
        yield _counter(
            "edged_jobs_ended",
            "Jobs that ended since the start",
            ("state", "reason"),
            {
                (state.value, reason.value if reason else ""): count
                for (state, reason), count in self._ended.copy().items()
            },
        )
        yield _counter(
            "edged_fetched_bytes", "Bytes downloaded, by kind of source", ("source",), _keyed(self._fetched)
        )
        yield _counter(
            "edged_sent_bytes",
            "Image bytes that devices acknowledged, by device model",
            ("model",),
            _keyed(self._sent),
        )
        yield _gauge(
            "edged_link_utilisation_ratio",
            "Bytes per second of the last transfer by the ceiling of its link",
            ("device",),
            _keyed(self._utilisation),
        )
        yield _counter(
            "edged_mapper_events",
            "What mappers count, by device or link",
            ("source", "event"),
            dict(self._events.copy()),
        )
        yield _histogram(
            "edged_chunk_verify_seconds", "Time to verify a chunk against its index", self._chunk_verify
        )
        yield _histogram("edged_chunk_write_seconds", "Time to write 4 KiB to a device", self._chunk_write)
        yield _histogram("edged_store_commit_seconds", "Time of a commit of the database", self._commit)
        if self._trust is not None:
            refreshed, stale_s, online = self._trust
            yield _gauge(
                "edged_trust_refresh_timestamp_seconds",
                "When the metadata was verified last",
                (),
                {(): refreshed},
            )
            yield _gauge(
                "edged_trust_stale_seconds",
                "How long ago the metadata expired; 0: it has not",
                (),
                {(): stale_s},
            )
            yield _gauge("edged_trust_online", "Whether the repository answered then", (), {(): online})


def _asked(snapshot: Snapshot) -> Iterator[Metric]:
    yield _gauge("edged_build_info", "The version that runs", ("version",), {(__version__,): 1})
    yield _gauge("edged_store_writable", "Whether the database takes writes", (), {(): snapshot.writable})
    yield _gauge(
        "edged_jobs",
        "Jobs by state, and by what they wait for or ended for",
        ("state", "reason"),
        {
            (state.value, reason.value if reason else ""): count
            for (state, reason), count in snapshot.jobs.items()
        },
    )
    yield _gauge(
        "edged_twin_lag_seconds",
        "How long the oldest unfulfilled wish waits",
        ("device",),
        _keyed(snapshot.twin_lag_s),
    )
    yield _gauge(
        "edged_outbox_events",
        "Events that a consumer has not acknowledged",
        ("consumer",),
        _keyed(snapshot.outbox),
    )
    if snapshot.audit_seq is not None:
        yield _gauge(
            "edged_audit_head_seq",
            "Number of the newest row of the audit trail",
            (),
            {(): snapshot.audit_seq},
        )
    yield _gauge("edged_plugin_up", "Whether the plugin is in use", ("plugin",), _keyed(snapshot.plugins))
    yield _gauge(
        "edged_device_state",
        "1 for the state that the device's unit is in",
        ("device", "state"),
        {
            (device, state.value): state is now
            for device, now in snapshot.units.items()
            for state in UnitState
        },
    )
    yield _counter(
        "edged_device_reconnects",
        "Times that the device's unit had to start again",
        ("device",),
        _keyed(snapshot.restarts),
    )


class _Collected:
    """A collector of metrics that are there already."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def _keyed(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(key,): value for key, value in dict(values).items()}


def _counter(name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _gauge(name: str, text: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, float(value))
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    return HistogramMetricFamily(name, text, buckets=histogram.buckets(), sum_value=histogram.sum_s)
