from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from store_kit import START, HandClock, make_job, raw, read, write

from edged.domain.job import ACTIVE_STATES, END_STATES, SUCCESSORS, Fallback, Job, State, Waiting
from edged.errors import Reason, Transient
from edged.store import Tx, jobs

MINUTE = timedelta(minutes=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "edged.db"


def end(
    job: Job, state: State = State.CANCELLED, reason: Reason | None = Reason.CANCELLED
) -> Callable[[Tx], Job]:
    return lambda tx: jobs.advance(tx, job, replace(job, state=state, reason=reason), "end")


def place(tx: Tx, job: Job) -> Job:
    """Store ``job`` in any state, along a legal way."""
    start = replace(job, state=State.QUEUED, reason=None, touched=False, revision=0, updated=job.created)
    jobs.add(tx, start)
    at = start
    for state in way_to(job.state):
        at = jobs.advance(tx, at, replace(job, state=state, revision=0), "step")
    return at


def way_to(state: State) -> list[State]:
    ways: dict[State, list[State]] = {State.QUEUED: []}
    edge = [State.QUEUED]
    while edge:
        here = edge.pop(0)
        for there in sorted(SUCCESSORS.get(here, frozenset())):
            if there not in ways:
                ways[there] = [*ways[here], there]
                edge.append(there)
    return ways[state]


def test_everything_that_a_job_holds_comes_back(path: Path) -> None:
    full = make_job(
        state=State.QUEUED,
        attempts=3,
        steps=9,
        trial_boots=1,
        touched=True,
        cancel=Reason.SUPERSEDED,
        waiting=Waiting(Reason.DEVICE_ABSENT, START + MINUTE, "no answer"),
        detail="detail ü",
        verified='{"image": {"sha256": "00"}}',
        fallback=Fallback("aa", "bb", True, None),
        no_fallback=True,
        done_bytes=5,
        total_bytes=10,
    )
    write(path, lambda tx: jobs.add(tx, full))
    assert read(path, lambda tx: jobs.get(tx, "j1")) == full
    assert read(path, lambda tx: jobs.get(tx, "j2")) is None
    retry = make_job("j2", run=2, retry_of="j1", fallback=Fallback("aa", "bb", False, "blink@0.9"))
    _, stored = write(path, end(full), lambda tx: (jobs.add(tx, retry), jobs.get(tx, "j2"))[1])
    assert stored == retry


def test_one_active_job_for_a_component(path: Path) -> None:
    write(path, lambda tx: jobs.add(tx, make_job()))
    with pytest.raises(jobs.Conflict, match="j1"):
        write(path, lambda tx: jobs.add(tx, make_job("j2", desired_version=2)))
    write(
        path,
        lambda tx: jobs.add(tx, make_job("j3", component="firmware.radio")),
        lambda tx: jobs.add(tx, make_job("j4", device="mega")),
        end(make_job()),
        lambda tx: jobs.add(tx, make_job("j2", desired_version=2)),
    )
    assert {job.id for job in read(path, jobs.find)} == {"j1", "j2", "j3", "j4"}


def test_the_schema_itself_holds_one_active_job_and_one_row_for_a_run(path: Path) -> None:
    write(path, lambda tx: jobs.add(tx, make_job()))
    copy = """
        INSERT INTO job SELECT 99, 'x', device, component, release, {version}, run, source, created, updated,
            deadline, {state}, revision, attempts, steps, trial_boots, touched, cancel, waiting_reason,
            waiting_until, waiting_detail, {reason}, detail, verified, fallback, no_fallback, done_bytes,
            total_bytes, retry_of FROM job
        """
    with raw(path) as conn:
        with pytest.raises(Exception, match=r"job\.device, job\.component"):
            conn.execute(copy.format(version=2, state="state", reason="reason"))
        with pytest.raises(Exception, match=r"job\.desired_version, job\.run"):
            conn.execute(copy.format(version=1, state="'failed'", reason="'stalled'"))
        with pytest.raises(Exception, match="CHECK"):
            conn.execute(copy.format(version=2, state="'lost'", reason="reason"))
        with pytest.raises(Exception, match="CHECK"):
            conn.execute(copy.format(version=2, state="'failed'", reason="NULL"))
        with pytest.raises(Exception, match="CHECK"):
            conn.execute("UPDATE job SET verified = 'not json'")
        with pytest.raises(Exception, match="cannot store TEXT"):
            conn.execute("UPDATE job SET attempts = 'three'")


def test_a_run_is_made_once(path: Path) -> None:
    write(path, lambda tx: jobs.add(tx, make_job()), end(make_job()))
    with pytest.raises(jobs.Conflict, match="run 1"):
        write(path, lambda tx: jobs.add(tx, make_job("j2")))


def test_only_a_new_job_is_added(path: Path) -> None:
    for job in (make_job(state=State.FAILED, reason=Reason.STALLED), make_job(revision=1)):
        with pytest.raises(ValueError, match="not new"):
            write(path, lambda tx, job=job: jobs.add(tx, job))


def test_advance_is_compare_and_set(path: Path) -> None:
    job = make_job()
    fetching = replace(job, state=State.FETCHING)
    clock = HandClock()
    clock.moment += MINUTE
    _, stored = write(
        path,
        lambda tx: jobs.add(tx, job),
        lambda tx: jobs.advance(tx, job, fetching, "admitted", "by the test"),
        clock=clock,
    )
    assert stored == replace(fetching, revision=1, updated=START + MINUTE)
    assert read(path, lambda tx: jobs.get(tx, "j1")) == stored
    with pytest.raises(jobs.Conflict) as caught:
        write(path, end(job))
    assert isinstance(caught.value, Transient)
    assert read(path, lambda tx: jobs.get(tx, "j1")) == stored
    assert len(read(path, lambda tx: jobs.history(tx, "j1"))) == 2, (
        "what did not happen is not in the history"
    )


@pytest.mark.parametrize("state", list(State))
def test_only_the_domains_ways_can_be_gone(path: Path, state: State) -> None:
    allowed = SUCCESSORS.get(state, frozenset()) | ({state} if state in ACTIVE_STATES else set())

    def check(tx: Tx) -> set[State]:
        at = place(tx, make_job(state=state, reason=Reason.STALLED))
        gone = set()
        for to in State:
            tx.db.execute("SAVEPOINT attempt")
            try:
                jobs.advance(tx, at, replace(at, state=to, reason=Reason.STALLED), "try")
            except ValueError as error:
                assert "cannot go" in str(error)
            else:
                gone.add(to)
            tx.db.execute("ROLLBACK TO attempt")
        return gone

    assert write(path, check) == [allowed]


@pytest.mark.parametrize(
    "change",
    [
        {"id": "x"},
        {"device": "x"},
        {"component": "x"},
        {"release": "x@1"},
        {"desired_version": 2},
        {"run": 2},
        {"created": START - MINUTE},
        {"retry_of": "x"},
        {"touched": False},
    ],
)
def test_what_a_job_is_cannot_change(path: Path, change: dict[str, Any]) -> None:
    job = make_job(touched=True)
    with pytest.raises(ValueError, match="cannot"):
        write(
            path,
            lambda tx: jobs.add(tx, job),
            lambda tx: jobs.advance(tx, job, replace(job, **change), "change"),
        )


def test_no_end_without_a_reason(path: Path) -> None:
    with pytest.raises(ValueError, match="without a reason"):
        write(path, lambda tx: jobs.add(tx, make_job()), end(make_job(), reason=None))


def test_the_history_tells_each_change_with_its_reason(path: Path) -> None:
    job = make_job()
    waits = replace(job, waiting=Waiting(Reason.DEVICE_ABSENT, START + MINUTE))

    def step(tx: Tx) -> None:
        jobs.add(tx, job)
        waiting = jobs.advance(tx, job, waits, "wait", "no port")
        jobs.advance(
            tx,
            waiting,
            replace(waiting, state=State.CANCELLED, reason=Reason.SUPERSEDED, waiting=None),
            "end",
        )

    write(path, step)
    found = [
        (entry.from_state, entry.to_state, entry.reason, entry.event, entry.detail)
        for entry in read(path, lambda tx: jobs.history(tx, "j1"))
    ]
    assert found == [
        (None, State.QUEUED, None, "created", "operator"),
        (State.QUEUED, State.QUEUED, Reason.DEVICE_ABSENT, "wait", "no port"),
        (State.QUEUED, State.CANCELLED, Reason.SUPERSEDED, "end", ""),
    ]


def test_a_checkpoint_is_compare_and_set_without_history(path: Path) -> None:
    job = make_job(attempts=2)
    _, stored = write(path, lambda tx: jobs.add(tx, job), lambda tx: jobs.checkpoint(tx, job, 512, 1024))
    assert (stored.done_bytes, stored.total_bytes, stored.attempts, stored.revision) == (512, 1024, 0, 1)
    assert read(path, lambda tx: jobs.get(tx, "j1")) == stored
    assert len(read(path, lambda tx: jobs.history(tx, "j1"))) == 1
    with pytest.raises(jobs.Conflict):
        write(path, lambda tx: jobs.checkpoint(tx, job, 1024, 1024))
    with pytest.raises(ValueError, match="ended"):
        write(path, lambda tx: jobs.checkpoint(tx, end(stored)(tx), 1024, 1024))


def test_due_and_when_the_next_is(path: Path) -> None:
    def waiting(job_id: str, minutes: int) -> Job:
        return make_job(job_id, device=job_id, waiting=Waiting(Reason.NO_RESPONSE, START + minutes * MINUTE))

    def add_all(tx: Tx) -> None:
        for job in (waiting("late", 9), waiting("soon", 1), make_job("now"), waiting("over", 0)):
            jobs.add(tx, job)
        end(make_job("now"))(tx)
        jobs.add(tx, make_job("now2", run=2))

    def due(minutes: int, limit: int = 10) -> list[str]:
        return [job.id for job in read(path, lambda tx: jobs.due(tx, START + minutes * MINUTE, limit))]

    assert read(path, lambda tx: jobs.next_due_at(tx, START)) is None
    write(path, add_all)
    # who is due for longest comes first, or a few that wait in vain would have every turn
    assert due(0) == ["over", "now2"]
    assert due(1) == ["over", "now2", "soon"]
    assert due(9, 3) == ["over", "now2", "soon"]
    set_back = read(path, lambda tx: jobs.due(tx, START, longest_wait=5 * MINUTE))
    assert [job.id for job in set_back] == ["over", "now2", "late"]
    assert read(path, lambda tx: jobs.next_due_at(tx, START)) == START
    write(path, end(make_job("now2", run=2)), end(waiting("over", 0)))
    assert read(path, lambda tx: jobs.next_due_at(tx, START)) == START + MINUTE
    assert read(path, lambda tx: jobs.next_due_at(tx, START, besides=["soon"])) == START + 9 * MINUTE


def test_finding(path: Path) -> None:
    def add_all(tx: Tx) -> None:
        for n in range(1, 6):
            jobs.add(tx, make_job(f"j{n}", device="uno" if n % 2 else "mega", desired_version=n))
            end(make_job(f"j{n}", device="uno" if n % 2 else "mega", desired_version=n))(tx)
        jobs.add(tx, make_job("j6", desired_version=5, run=2, retry_of="j5"))

    def ids(**wanted: Any) -> list[str]:
        return [job.id for job in read(path, lambda tx: jobs.find(tx, **wanted))]

    write(path, add_all)
    assert ids() == ["j6", "j5", "j4", "j3", "j2", "j1"]
    assert ids(device="uno", limit=2) == ["j6", "j5"]
    assert ids(states=END_STATES, device="uno") == ["j5", "j3", "j1"]
    assert ids(states=ACTIVE_STATES) == ["j6"]
    assert ids(states=[]) == []

    def ones(tx: Tx) -> list[str | None]:
        found = (
            jobs.active_for(tx, "uno", "firmware"),
            jobs.active_for(tx, "mega", "firmware"),
            jobs.last_for(tx, "uno", "firmware", 5),
            jobs.last_for(tx, "uno", "firmware", 3),
            jobs.last_for(tx, "uno", "firmware", 4),
        )
        return [job and job.id for job in found]

    assert read(path, ones) == ["j6", None, "j6", "j3", None]
    counted = {(State.CANCELLED, Reason.CANCELLED): 5, (State.QUEUED, None): 1}
    assert read(path, jobs.count_by_state_and_reason) == counted


def test_the_newest_runs_of_one_source_end_where_another_asked(path: Path) -> None:
    def make(run: int, source: str, hours: int) -> Callable[[Tx], Job]:
        created = START + timedelta(hours=hours)
        return lambda tx: place(
            tx, make_job(f"j{run}", run=run, source=source, created=created, state=State.SUCCEEDED)
        )

    runs = [(1, "operator", 0), (2, "drift", 1), (3, "operator", 2), (4, "drift", 3), (5, "drift", 4)]
    write(path, *[make(*run) for run in runs])

    def newest(source: str, limit: int = 9, version: int = 1) -> tuple[int, ...]:
        times = read(path, lambda tx: jobs.newest_of(tx, "uno", "firmware", version, source, limit))
        return tuple((time - START) // timedelta(hours=1) for time in times)

    assert newest("drift") == (4, 3)
    assert newest("drift", limit=1) == (4,)
    assert newest("operator") == newest("drift", version=2) == ()
    assert read(path, lambda tx: jobs.devices_with(tx, "drift")) == {"uno"}
    assert read(path, lambda tx: jobs.devices_with(tx, "cloud")) == frozenset()


def test_pruning_keeps_what_says_what_a_device_runs(path: Path) -> None:
    ends = [
        (State.SUCCEEDED, None),
        (State.SUCCEEDED, None),
        (State.FAILED, Reason.STALLED),
        (State.FAILED, Reason.STALLED),
    ]

    def add_all(tx: Tx) -> None:
        for n, (state, reason) in enumerate(ends, 1):
            place(tx, make_job(f"j{n}", desired_version=n, state=state, reason=reason))
        jobs.add(tx, make_job("j5", device="mega"))

    write(path, add_all)
    before, after = write(path, lambda tx: jobs.prune(tx, START), lambda tx: jobs.prune(tx, START + MINUTE))
    assert (before, after) == (0, 2)
    assert [job.id for job in read(path, jobs.find)] == ["j5", "j4", "j2"]
    assert read(path, lambda tx: jobs.history(tx, "j1")) == []
    assert read(path, lambda tx: len(jobs.history(tx, "j2"))) > 0


def test_a_retry_outlives_what_it_retries(path: Path) -> None:
    def step(tx: Tx) -> None:
        place(tx, make_job("j1", state=State.FAILED, reason=Reason.STALLED))
        jobs.add(tx, make_job("j2", run=2, retry_of="j1"))

    assert write(path, step, lambda tx: jobs.prune(tx, START + MINUTE))[1] == 1
    retry = read(path, lambda tx: jobs.get(tx, "j2"))
    assert retry is not None
    assert retry.retry_of is None


def test_a_device_that_is_gone_leaves_only_its_active_job(path: Path) -> None:
    def step(tx: Tx) -> int:
        place(tx, make_job("j1", state=State.SUCCEEDED))
        jobs.add(tx, make_job("j2", desired_version=2))
        return jobs.forget(tx, "uno")

    assert write(path, step) == [1]
    assert [job.id for job in read(path, jobs.find)] == ["j2"]
