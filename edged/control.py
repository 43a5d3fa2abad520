"""What an operator can ask: the operations of the local API, as methods that return JSON objects.

Knows nothing of HTTP, and writes no wish itself: those are in ``deployments``. Raises the errors of ``edged.errors``; the
server and the command line turn them into codes.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar, cast

from edged import BUILD_TIME, __version__
from edged.api import Identity, JsonValue, SupportsFirmware
from edged.clock import Clock, from_text, to_text
from edged.config import Config, DeviceSettings
from edged.deployments import BadRequest, Deployments
from edged.devices import Devices, LeftOut
from edged.domain import reasons, steps
from edged.domain.job import Job, State
from edged.domain.reconcile import DRIFT, FIRMWARE, release_of
from edged.domain.twin import Value, delta
from edged.engine.events import Broadcast, Event
from edged.engine.loop import Engine
from edged.engine.reconciler import cancel, left_alone, retry
from edged.engine.trust import Trust
from edged.errors import EdgedError, Permanent, Reason
from edged.links import InUse, device_env
from edged.metrics import Snapshot
from edged.plugins import Plugins
from edged.sessions import expect, plugin_call
from edged.store import audit, floors, jobs, outbox, twins
from edged.store.database import Store, Tx
from edged.store.node_key import NodeKey
from edged.supervisor import UnitState
from edged.views import (
    Json,
    attached_json,
    entry_json,
    event_json,
    explain,
    explain_reason,
    job_json,
    plugin_json,
    record_json,
    report_json,
    trust_json,
    twin_json,
)

T = TypeVar("T")

PROBE_TIMEOUT_S = 30.0
EVENTS_POLL_S = 1.0
"""Events that nobody announced (the engine's own new jobs) are seen after so many seconds."""
MOST_ROWS = 1000
_LIVE = frozenset({"progress", "reported"})


@dataclass(frozen=True, slots=True)
class Parts:
    """What the operations work with; built once by the composition root. ``started``: when the daemon did."""

    config: Config
    store: Store
    clock: Clock
    plugins: Plugins
    devices: Devices
    trust: Trust
    engine: Engine
    broadcast: Broadcast
    deployments: Deployments
    key: NodeKey
    started: datetime


class Control:
    """The operations. Limits are bounded by :data:`MOST_ROWS`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.deployments = parts.deployments
        self.faults: dict[str, str] = {}
        """What does not work in this daemon, by part, for ``status``: a port that is taken, a group that is missing."""

    async def _read(self, fn: Callable[[Tx], T]) -> T:
        return await self._parts.store.read(fn)

    # -- the node

    async def status(self) -> Json:
        """The node at a glance: store, engine, devices, jobs, trust, and ``problems`` with their cures.

        ``jobs`` and ``audit_seq`` are null where the database cannot be read.
        """
        parts = self._parts
        units = parts.devices.sessions.all()
        snapshot = await self.snapshot()
        # the first use of the key loads the cryptography library
        public_key = await asyncio.to_thread(lambda: parts.key.public_hex)
        return {
            "node": parts.config.node.id,
            "version": __version__,
            "pid": os.getpid(),
            "started": to_text(parts.started),
            "time": to_text(parts.clock.now()),
            "state_dir": str(parts.config.node.state_dir),
            "public_key": public_key,
            "read_only": parts.store.read_only_reason,
            "running_jobs": len(parts.engine.running),
            "jobs": _jobs_by_state(snapshot),
            "devices": {
                "configured": len(parts.config.device),
                "running": sum(unit.unit.state is UnitState.RUNNING for unit in units),
                "left_out": len(parts.devices.left_out),
            },
            "trust": trust_json(parts.trust, parts.config.trust.repository),
            "plugins": [plugin_json(state) for state in parts.plugins.states],
            "audit_seq": snapshot.audit_seq,
            "problems": cast(list[JsonValue], [*self._problems(), *await self._left_alone_problems()]),
        }

    def _problems(self) -> list[Json]:
        parts = self._parts
        found: list[Json] = []
        if parts.store.read_only_reason is not None:
            why = f"nothing is written and no job runs: {parts.store.read_only_reason}"
            cure = "sudo edged doctor says what is wrong with it; where it is damaged, restore a copy, or move it away"
            found.append({"part": "store", **explain_reason(Reason.STORAGE_FAILED, why), "cure": cure})
        if parts.clock.now() < from_text(BUILD_TIME):
            why = f"the clock says {to_text(parts.clock.now())}, which is before this version was made"
            found.append({"part": "clock", "reason": None, "detail": why, "cure": "set the clock (NTP, RTC)"})
        if parts.trust.failure is not None:
            found.append({"part": "trust", **explain(parts.trust.failure)})
        for state in parts.plugins.states:
            if state.problem:
                text = f"plugin {state.name} ({state.distribution}): {state.problem}"
                cure = "install a version of it that fits, or remove it"
                found.append({"part": "plugin", **explain_reason(Reason.PLUGIN_FAILED, text), "cure": cure})
        for missing in parts.devices.left_out.values():
            text = f"{missing.settings.id} is left out: {missing.detail}"
            cure = "correct what edged check-config names, then systemctl restart edged"
            found.append({"part": "device", **explain_reason(missing.reason, text), "cure": cure})
        found += self._device_problems()
        found += [
            {"part": part, "reason": None, "detail": text, "cure": ""} for part, text in self.faults.items()
        ]
        return found

    def _device_problems(self) -> Iterator[Json]:
        """Of devices that are not just away: who has to see to them."""
        for one in self._parts.devices.sessions.all():
            reason, detail = one.unit.reason, f"{one.device.id}: {one.unit.detail}"
            if reason is not None and reasons.kind(reason) is not reasons.Kind.WAITING:
                yield {"part": "device", **explain_reason(reason, detail)}

    async def _left_alone_problems(self) -> list[Json]:
        try:
            found = await self._read(self._all_left_alone)
        except EdgedError:
            return []  # the store's own problem is told already
        return [
            {"part": "firmware", **why, "detail": f"{device} {why['detail']}"}
            for device, why in found.items()
        ]

    def _all_left_alone(self, tx: Tx) -> dict[str, Json]:
        """By device, why it is not brought back to what it should run."""
        settings = self._parts.config.engine
        drifted = jobs.devices_with(tx, DRIFT) & self._parts.config.devices.keys()
        looked = {device: left_alone(tx, device, settings) for device in sorted(drifted)}
        return {device: explain_reason(why.reason, why.detail) for device, why in looked.items() if why}

    async def snapshot(self) -> Snapshot:
        """Numbers for the metrics."""
        parts, now = self._parts, self._parts.clock.now()
        known = set(parts.config.devices)

        def look(
            tx: Tx,
        ) -> tuple[dict[tuple[State, Reason | None], int], dict[str, float], dict[str, int], int]:
            lags = {device: _lag_s(twin, now) for device, twin in twins.all(tx).items() if device in known}
            return jobs.count_by_state_and_reason(tx), lags, outbox.depth(tx), audit.head(tx).seq

        try:
            counts, lags, depth, seq = await self._read(look)
        except EdgedError:
            counts, lags, depth, seq = {}, {}, {}, None
        units = parts.devices.sessions.all()
        return Snapshot(
            writable=parts.store.read_only_reason is None,
            jobs=counts,
            twin_lag_s=lags,
            outbox=depth,
            audit_seq=seq,
            units={unit.device.id: unit.unit.state for unit in units},
            restarts={unit.device.id: unit.unit.restarts for unit in units},
            plugins={state.name: not state.problem for state in parts.plugins.states},
        )

    # -- devices

    async def devices(self) -> Json:
        """All configured devices, with what each runs and should run."""
        known, active, alone, counters = await self._read(
            lambda tx: (
                twins.all(tx),
                _active(tx),
                self._all_left_alone(tx),
                {key[0]: floor.counter for key, floor in floors.all_floors(tx).items()},
            )
        )
        return {
            "devices": [
                self._device(settings, known.get(settings.id, twins.Twin()), active.get(settings.id))
                | {"floor": counters.get(settings.id, 0), "left_alone": alone.get(settings.id)}
                for settings in self._parts.config.device
            ]
        }

    async def device(self, device: str) -> Json:
        """One device: state, twin, last jobs. Raises ``Permanent(DEVICE_UNKNOWN)``."""
        settings = self._settings(device)
        twin, active, last, floor, alone = await self._read(
            lambda tx: (
                twins.get(tx, device),
                jobs.active_for(tx, device, FIRMWARE),
                jobs.find(tx, device=device, limit=10),
                floors.get(tx, device, FIRMWARE),
                left_alone(tx, device, self._parts.config.engine),
            )
        )
        attached = self._parts.devices.attached.get(device)
        model = self._parts.config.models[settings.model]
        return self._device(settings, twin, active) | {
            "floor": floor,
            "left_alone": explain_reason(alone.reason, alone.detail) if alone else None,
            "hardware_ids": list(model.hardware_ids),
            "flash_size": model.flash_size,
            "attached": attached_json(attached, twin) if attached else None,
            "twin": twin_json(twin),
            "jobs": [job_json(job) for job in last],
        }

    def _settings(self, device: str) -> DeviceSettings:
        try:
            return self._parts.config.devices[device]
        except KeyError:
            known = ", ".join(sorted(self._parts.config.devices)) or "none is configured"
            raise Permanent(Reason.DEVICE_UNKNOWN, f"no device {device!r}; devices: {known}") from None

    def _device(self, settings: DeviceSettings, twin: twins.Twin, active: Job | None) -> Json:
        reported, desired = twin.reported.get(FIRMWARE), twin.desired.get(FIRMWARE)
        return {
            "id": settings.id,
            "model": settings.model,
            "mapper": settings.mapper,
            "address": settings.address,
            "watch": settings.watch,
            **self._unit_state(settings),
            "runs": _release(reported),
            "desired": _release(desired),
            "job": job_json(active) if active else None,
        }

    def _unit_state(self, settings: DeviceSettings) -> Json:
        missing = self._parts.devices.left_out.get(settings.id)
        if isinstance(missing, LeftOut):
            return {"state": "left_out", **explain_reason(missing.reason, missing.detail), "restarts": 0}
        unit = self._parts.devices.sessions[settings.id].unit
        idle = not settings.watch and unit.state is UnitState.STARTING
        state = "idle" if idle else unit.state.value
        return {"state": state, **explain_reason(unit.reason, unit.detail), "restarts": unit.restarts}

    async def twin(self, device: str) -> Json:
        """The twin of a device. Raises ``Permanent(DEVICE_UNKNOWN)``."""
        self._settings(device)
        return {"device": device, **twin_json(await self._read(lambda tx: twins.get(tx, device)))}

    # -- jobs

    async def jobs(self, device: str | None, state: str | None, limit: int) -> Json:
        """Jobs, newest first; ``state`` is a job's state, ``active`` or ``ended``. Raises ``BadRequest``."""
        states = _states(state)
        if device is not None:
            self._settings(device)
        found = await self._read(
            lambda tx: jobs.find(tx, device=device, states=states, limit=min(limit, MOST_ROWS))
        )
        return {"jobs": [job_json(job) for job in found]}

    async def job(self, job_id: str) -> Json:
        """One job with its history; ``events_after`` is where to listen on. Raises ``Permanent(JOB_UNKNOWN)``."""
        job, entries, head = await self._read(
            lambda tx: (_get_job(tx, job_id), jobs.history(tx, job_id), outbox.head(tx))
        )
        return job_json(job) | {"history": [entry_json(entry) for entry in entries], "events_after": head}

    async def cancel_job(self, job_id: str, actor: str) -> Json:
        """Ask for the end of a job; a device that was changed goes back first.

        Raises ``Permanent``: JOB_UNKNOWN; UNSUPPORTED where it has ended, or where the device has nothing to go back to.
        """

        def change(tx: Tx) -> Job:
            job = _get_job(tx, job_id)
            if job.state.ended:
                raise Permanent(Reason.UNSUPPORTED, f"job {job.id} has ended already: {job.state}")
            if not steps.can_cancel(job):
                raise Permanent(
                    Reason.UNSUPPORTED,
                    f"{job.device} is between two images and has none to go back to; let it finish",
                )
            return cancel(tx, job, Reason.CANCELLED, actor)

        return self._changed(await self._parts.store.write(change))

    async def retry_job(self, job_id: str, actor: str) -> Json:
        """A new run of an ended job.

        Raises ``Permanent``: JOB_UNKNOWN; UNSUPPORTED where it has not ended; SUPERSEDED. ``Conflict`` where another runs.
        """
        settings = self._parts.config.engine
        return self._changed(
            await self._parts.store.write(lambda tx: retry(tx, _get_job(tx, job_id), actor, settings))
        )

    def _changed(self, job: Job) -> Json:
        self._parts.engine.job_changed(job)
        self._parts.broadcast.send({"kind": "job", "job": job.id, "device": job.device})
        return job_json(job)

    # -- mappers

    async def mappers(self) -> Json:
        """The plugins, the mappers and the links that there are."""
        plugins = self._parts.plugins
        return {
            "mappers": [
                {
                    "name": spec.name,
                    "flash_protocols": cast(list[JsonValue], sorted(spec.flash_protocols)),
                    "probes": spec.probe is not None,
                    "probe_disturbs": spec.probe_disturbs,
                }
                for spec in plugins.mappers.values()
            ],
            "schemes": cast(list[JsonValue], sorted(plugins.links)),
            "plugins": [plugin_json(state) for state in plugins.states],
        }

    async def probe(self, mapper: str, address: str) -> Json:
        """Who answers at ``address``? May disturb the device. ``identity`` is null where nobody of this kind does.

        Raises ``Permanent(UNSUPPORTED)`` and what the mapper raises.
        """
        spec = self._parts.plugins.mapper(mapper)
        if spec.probe is None:
            raise Permanent(Reason.UNSUPPORTED, f"mapper {mapper} cannot probe")
        if not spec.reaches(address):
            schemes = ", ".join(f"{scheme}:" for scheme in sorted(spec.schemes))
            raise Permanent(Reason.UNSUPPORTED, f"mapper {mapper} asks at {schemes} only, not at {address!r}")
        env = device_env(f"probe {address}", self._parts.devices.pool)
        try:
            identity = await plugin_call(PROBE_TIMEOUT_S, spec.probe, address, env)
        except InUse as exc:
            if exc.user in self._parts.config.devices:
                exc.cure = f"it is a device of this node: edged mapper probe --device {exc.user}"
            raise
        found: Json = {"mapper": mapper, "address": address, "identity": None}
        if identity is not None:
            identity = expect(Identity, identity)
            found["identity"] = _identity(identity.hardware_id, identity.serial_number, identity.detail)
        return found

    async def probe_all(self, address: str) -> Json:
        """Ask each mapper that can do so without disturbing a device, one after the other, since a wire may be exclusive.

        ``answers``: those of :meth:`probe` with an identity; ``problems``: what went wrong, by mapper; ``failure``: why nobody
        could be heard, where that is not just silence; ``not_asked``: mappers whose probe may reset the device.
        Raises ``Permanent(UNSUPPORTED)`` where no mapper can ask at such an address.
        """
        plugins = self._parts.plugins
        able = [spec for spec in plugins.mappers.values() if spec.probe is not None and spec.reaches(address)]
        if address.partition(":")[0] not in plugins.links or not able:
            schemes = ", ".join(f"{scheme}:" for scheme in sorted(plugins.links)) or "none is installed"
            raise Permanent(
                Reason.UNSUPPORTED, f"no mapper asks at {address!r}; an address begins with one of: {schemes}"
            )
        answers: list[JsonValue] = []
        errors: dict[str, EdgedError] = {}
        for spec in able:
            if spec.probe_disturbs:
                continue
            try:
                found = await self.probe(spec.name, address)
            except EdgedError as exc:
                errors[spec.name] = exc
            else:
                answers += [found] if found["identity"] else []
        not_asked: list[JsonValue] = [spec.name for spec in able if spec.probe_disturbs]
        return {
            "address": address,
            "answers": answers,
            "problems": {name: str(error) for name, error in errors.items()},
            "failure": None if answers else _why_unheard(errors),
            "not_asked": not_asked,
        }

    async def probe_device(self, device: str) -> Json:
        """Borrow the device's session and ask who it is and what it runs. Disturbs the device. Raises as the mapper."""
        unit = self._parts.devices.unit(device)
        async with unit.lease(self._parts.config.engine.lease_s) as lease, _probe_limit():
            identity = expect(Identity, await plugin_call(PROBE_TIMEOUT_S, lease.session.identify))
            slots: list[JsonValue] = []
            if isinstance(lease.session, SupportsFirmware):
                slots = [
                    {"name": slot.name, "active": slot.active, "runs": slot.runs, "confirmed": slot.confirmed}
                    for slot in (await plugin_call(PROBE_TIMEOUT_S, lease.session.slots)).slots
                ]
        return {
            "mapper": unit.spec.name,
            "address": unit.device.address,
            "identity": _identity(identity.hardware_id, identity.serial_number, identity.detail),
            "slots": slots,
        }

    # -- trust and audit

    async def trust(self) -> Json:
        """What this node trusts, as it knows it now."""
        return trust_json(self._parts.trust, self._parts.config.trust.repository)

    async def init_trust(self, root: str, actor: str, *, replace: bool) -> Json:
        """Trust the root metadata ``root`` (JSON text) from now on. Errors as :meth:`edged.engine.trust.Trust.init`."""
        await self._parts.trust.init(root.encode(), actor, replace_root=replace)
        return await self.trust()

    async def refresh_trust(self) -> Json:
        """Verify the repository's metadata now. Raises ``Refused`` or ``Transient``."""
        await self._parts.trust.refresh()
        return await self.trust()

    async def audit(self, after: int | None, limit: int) -> Json:
        """Rows of the audit trail after number ``after``; None: the newest."""
        limit = min(limit, MOST_ROWS)

        def look(tx: Tx) -> tuple[audit.Record, ...]:
            return audit.list(tx, max(audit.head(tx).seq - limit, 0) if after is None else after, limit)

        return {"records": [record_json(record) for record in await self._read(look)]}

    async def verify_audit(self) -> Json:
        """Check the whole trail against this node's key; in many short reads, since the engine reads there too."""
        key = await asyncio.to_thread(lambda: self._parts.key.public_key)
        found = audit.Verifying()
        while not found.ended:
            found = await self._read(lambda tx, so_far=found: audit.verify_more(tx, so_far, key))  # type: ignore[misc]
        return report_json(found.report) | {"key": self._parts.key.public_hex}

    # -- events

    async def events_from(self, after: int | None) -> int:
        """Where to begin to listen: ``after``, or the newest event. Raises ``BadRequest`` for what was never used."""
        newest = await self._read(outbox.head)
        if after is not None and after > newest:
            raise BadRequest(f"after: found {after}, the newest event is {newest}")
        return newest if after is None else after

    async def events(
        self, after: int, job: str | None = None, device: str | None = None
    ) -> AsyncIterator[Json | None]:
        """Durable events after number ``after``, and live ones between them, without end.

        ``job`` and ``device`` restrict to one. None is yielded where nothing happened for a second: a sign of life.
        """
        seq = after
        with self._parts.broadcast.watch() as queue:
            while True:
                durable = await self._read(lambda tx, seq=seq: outbox.after(tx, seq, MOST_ROWS))  # type: ignore[misc]
                for event in durable:
                    seq = event.seq
                    if (job is None or event.job == job) and (device is None or event.device == device):
                        yield event_json(event)
                if len(durable) < MOST_ROWS:
                    live = await _next_live(queue)
                    if live is None or _concerns(live, job, device):
                        yield live


async def _next_live(queue: asyncio.Queue[Event]) -> Event | None:
    """The next live event; None where none came in time, or where a durable one was announced."""
    try:
        async with asyncio.timeout(EVENTS_POLL_S):
            event = await queue.get()
    except TimeoutError:
        return None
    return event if event.get("kind") in _LIVE else None


def _concerns(event: Event, job: str | None, device: str | None) -> bool:
    return (job is None or event.get("job") == job) and (device is None or event.get("device") == device)


def _why_unheard(errors: Mapping[str, EdgedError]) -> Json | None:
    """The first error that is another than silence, with its ``mapper``."""
    told = ((name, error) for name, error in errors.items() if error.reason is not Reason.NO_RESPONSE)
    return next(({"mapper": name, **explain(error)} for name, error in told), None)


def _probe_limit() -> asyncio.Timeout:
    return asyncio.timeout(PROBE_TIMEOUT_S)


def _identity(hardware_id: str, serial_number: str | None, detail: Mapping[str, str]) -> Json:
    return {"hardware_id": hardware_id, "serial_number": serial_number, "detail": dict(detail)}


def _get_job(tx: Tx, job_id: str) -> Job:
    job = jobs.get(tx, job_id)
    if job is None:
        raise Permanent(Reason.JOB_UNKNOWN, f"no job {job_id!r}; see edged jobs")
    return job


def _states(text: str | None) -> list[State] | None:
    if text is None:
        return None
    if text in ("active", "ended"):
        return [state for state in State if state.ended is (text == "ended")]
    try:
        return [State(text)]
    except ValueError:
        allowed = ", ".join(["active", "ended", *State])
        raise BadRequest(f"state: found {text!r}; allowed: {allowed}") from None


def _jobs_by_state(snapshot: Snapshot) -> Json | None:
    if snapshot.audit_seq is None:
        return None
    counts = Counter[str]()
    for (state, _), count in snapshot.jobs.items():
        counts[state.value] += count
    return dict(counts)


def _active(tx: Tx) -> dict[str, Job]:
    return {job.device: job for job in jobs.find(tx, states=_states("active"), limit=MOST_ROWS)}


def _release(value: Value | None) -> str | None:
    return release_of(value.value) if value else None


def _lag_s(twin: twins.Twin, now: datetime) -> float:
    """How long the oldest wish has waited; 0 where all are fulfilled."""
    waits = [(now - wish.time).total_seconds() for wish in delta(twin.desired, twin.reported).values()]
    return max(0.0, *waits) if waits else 0.0
