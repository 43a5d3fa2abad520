"""The store against a dict: whatever is done in whatever order, with restarts in between."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_kit import HandClock, make_job

from edged.domain.job import ACTIVE_STATES, SUCCESSORS, Job, State, Waiting
from edged.domain.twin import Value, change
from edged.errors import Reason, Refused
from edged.store import Store, Tx, floors, jobs, twins

T = TypeVar("T")
DEVICES = st.sampled_from(["uno", "mega"])
NAMES = st.sampled_from(["firmware", "led"])
VALUES = st.sampled_from([None, True, 1, 2.5, "on", {"name": "blink", "version": "1"}])


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.clock = HandClock()
        self.jobs: dict[str, Job] = {}
        self.twins: dict[tuple[str, str, str], Value] = {}
        self.floors: dict[str, int] = {}

    @initialize()
    def start(self) -> None:
        self.stack = AsyncExitStack()
        opened = Store.open(Path(self.folder.name) / "edged.db", self.clock)
        self.store: Store = self.runner.run(self.stack.enter_async_context(opened))
        assert self.store.read_only_reason is None

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.runner.run(self.stack.aclose())
        self.runner.close()
        self.folder.cleanup()

    def write(self, fn: Callable[[Tx], T]) -> T:
        return self.runner.run(self.store.write(fn))

    def active(self, device: str) -> list[Job]:
        return [job for job in self.jobs.values() if job.device == device and job.state in ACTIVE_STATES]

    @rule()
    def restart(self) -> None:
        self.runner.run(self.stack.aclose())
        self.start()

    @rule(minutes=st.integers(0, 90))
    def time_passes(self, minutes: int) -> None:
        self.clock.moment += timedelta(minutes=minutes)

    @rule(device=DEVICES, name=NAMES, value=VALUES, version=st.none() | st.integers(0, 5))
    def wish(self, device: str, name: str, value: object, version: int | None) -> None:
        key = (device, "desired", name)
        try:
            wanted = change(self.twins.get(key), value, self.clock.moment, "op", version=version)
        except Refused:
            with pytest.raises(Refused):
                self.write(lambda tx: twins.set_desired(tx, device, name, value, "op", version))
        else:
            assert self.write(lambda tx: twins.set_desired(tx, device, name, value, "op", version)) == wanted
            self.twins[key] = wanted

    @rule(device=DEVICES, name=NAMES, value=VALUES)
    def report(self, device: str, name: str, value: object) -> None:
        key = (device, "reported", name)
        wanted = change(self.twins.get(key), value, self.clock.moment, "device")
        assert self.write(lambda tx: twins.set_reported(tx, device, name, value, "device")) == wanted
        self.twins[key] = wanted

    @rule(device=DEVICES, version=st.integers(1, 3), run=st.integers(1, 3))
    def add_job(self, device: str, version: int, run: int) -> None:
        job = make_job(
            f"j{len(self.jobs)}",
            device=device,
            desired_version=version,
            run=run,
            created=self.clock.moment,
            updated=self.clock.moment,
        )
        taken = any(
            (j.device, j.desired_version, j.run) == (device, version, run) for j in self.jobs.values()
        )
        if self.active(device) or taken:
            with pytest.raises(jobs.Conflict):
                self.write(lambda tx: jobs.add(tx, job))
        else:
            self.write(lambda tx: jobs.add(tx, job))
            self.jobs[job.id] = job

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), state=st.sampled_from(State), minutes=st.none() | st.integers(0, 60))
    def advance(self, data: st.DataObject, state: State, minutes: int | None) -> None:
        old = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
        until = None if minutes is None else self.clock.moment + timedelta(minutes=minutes)
        waiting = None if until is None else Waiting(Reason.NO_RESPONSE, until)
        new = replace(old, state=state, waiting=waiting, reason=Reason.STALLED if state.ended else None)

        def step(tx: Tx) -> Job:
            stored = jobs.advance(tx, old, new, "step")
            if state is State.SUCCEEDED:
                floors.raise_to(tx, old.device, old.component, old.desired_version, old.release)
            return stored

        if old.state in ACTIVE_STATES and (state is old.state or state in SUCCESSORS[old.state]):
            self.jobs[old.id] = self.write(step)
            if state is State.SUCCEEDED:
                held = self.floors.get(old.device, 0)
                self.floors[old.device] = max(held, old.desired_version)
        else:
            with pytest.raises(ValueError, match="cannot go"):
                self.write(step)

    @precondition(lambda self: any(job.revision for job in self.jobs.values()))
    @rule(data=st.data())
    def stale_advance(self, data: st.DataObject) -> None:
        moved = sorted(job.id for job in self.jobs.values() if job.revision and job.state in ACTIVE_STATES)
        if moved:
            job = self.jobs[data.draw(st.sampled_from(moved))]
            stale = replace(job, revision=job.revision - 1)
            with pytest.raises(jobs.Conflict):
                self.write(lambda tx: jobs.advance(tx, stale, replace(stale, steps=stale.steps + 1), "late"))

    @rule(device=DEVICES)
    def fail_half_way(self, device: str) -> None:
        def step(tx: Tx) -> None:
            twins.set_desired(tx, device, "led", "half", "nobody")
            floors.raise_to(tx, device, "firmware", 99, "half@1")
            raise LookupError

        with contextlib.suppress(LookupError):
            self.write(step)

    @invariant()
    def same_as_the_model(self) -> None:
        if hasattr(self, "store"):
            self.runner.run(self.store.read(self.compare))

    def compare(self, tx: Tx) -> None:
        assert {job.id: job for job in jobs.find(tx)} == self.jobs
        found = {
            (device, side, name): value
            for device, twin in twins.all(tx).items()
            for side, values in (("desired", twin.desired), ("reported", twin.reported))
            for name, value in values.items()
        }
        assert json.dumps(sorted(map(repr, found.items()))) == json.dumps(
            sorted(map(repr, self.twins.items()))
        )
        assert {device: floor.counter for (device, _), floor in floors.all_floors(tx).items()} == self.floors
        for device in ("uno", "mega"):
            active = self.active(device)
            assert len(active) <= 1
            assert jobs.active_for(tx, device, "firmware") == (active[0] if active else None)
        self.compare_due(tx)

    def compare_due(self, tx: Tx) -> None:
        now = self.clock.moment
        active = [job for job in self.jobs.values() if job.state in ACTIVE_STATES]
        ready = [job for job in active if job.waiting is None or job.waiting.until <= now]
        ready.sort(key=lambda job: job.waiting.until if job.waiting else job.created)
        assert [job.id for job in jobs.due(tx, now)] == [job.id for job in ready]
        wakes = [now if job.waiting is None else job.waiting.until for job in active]
        assert jobs.next_due_at(tx, now) == min(wakes, default=None)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
