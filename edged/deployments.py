"""Wishes of an operator: which release a device should run, which property values it should have.

A wish for firmware is checked first, by the same rule as the engine's, so that a refusal is heard at once; where the
repository does not answer the wish stands, and the job waits. Each wish is one transaction: twin, audit row and job.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from edged.api import Device, JsonValue
from edged.config import Config, EngineSettings
from edged.devices import Attached, Devices, is_firmware
from edged.domain.admission import admit
from edged.domain.job import Job
from edged.domain.reconcile import FIRMWARE, firmware_value, release_of
from edged.engine import running
from edged.engine.events import Broadcast
from edged.engine.images import Images
from edged.engine.loop import Engine
from edged.engine.reconciler import reconcile_device, retry
from edged.engine.trust import Trust
from edged.errors import EdgedError, Permanent, Reason, Refused, Transient
from edged.sessions import DeviceUnit
from edged.store import audit, floors, jobs, outbox, twins
from edged.store.database import Store, Tx
from edged.views import Json, explain
from edged_firmware.facts import ReleaseRef, VerifiedRelease

log = logging.getLogger(__name__)

_NOT_USABLE = frozenset({Reason.HARDWARE_MISMATCH, Reason.CONFIG_INVALID, Reason.UNSUPPORTED})
# what a device may report, but for spaces: settings of Zephyr have slashes in their names
_PROPERTY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,126}")


class BadRequest(Permanent):
    """The request itself is wrong; reason ``REQUEST_INVALID``, the detail says what is allowed."""

    def __init__(self, detail: str) -> None:
        super().__init__(Reason.REQUEST_INVALID, detail)


@dataclass(frozen=True, slots=True)
class Target:
    """The devices of one wish: named ones, or all of a model. Exactly one of the two is given."""

    devices: tuple[str, ...] = ()
    model: str | None = None


@dataclass(frozen=True, slots=True)
class _Wished:
    """What a wish led to on one device. ``changed`` is the job that was made or asked to end."""

    answer: Json
    changed: Job | None


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What trust and admission say. ``release`` None: the repository did not answer (``offline`` says how)."""

    release: VerifiedRelease | None
    offline: Transient | None
    refused: Mapping[str, Refused]


class Deployments:
    """Checks wishes, writes them down, and tells the engine and the devices' units."""

    def __init__(
        self,
        config: Config,
        store: Store,
        devices: Devices,
        trust: Trust,
        images: Images,
        engine: Engine,
        broadcast: Broadcast,
    ) -> None:
        self._config = config
        self._store = store
        self._devices = devices
        self._trust = trust
        self._images = images
        self._engine = engine
        self._broadcast = broadcast

    # -- wishes

    async def deploy(self, release: str, target: Target, actor: str) -> Json:
        """``release`` (``NAME@VERSION``) is what the target's devices should run from now on.

        All or nothing. Raises ``Refused`` (recorded) where trust or policy is against it on any of them,
        ``BadRequest``, ``Permanent(DEVICE_UNKNOWN)``, ``Conflict`` and the store's errors.
        """
        ref, units = parse_release(release), self._units(target)
        verdict = await self._checked(ref, units, actor)
        settings, names = self._config.engine, [unit.device.id for unit in units]

        def change(tx: Tx) -> tuple[list[_Wished], int]:
            return [_wish(tx, device, str(ref), actor, settings) for device in names], outbox.head(tx)

        wished, events_after = await self._store.write(change)
        self._tell(names, wished)
        return {
            "release": str(ref),
            "verified": verdict.release is not None,
            "offline": explain(verdict.offline) if verdict.offline else None,
            "devices": [one.answer for one in wished],
            "events_after": events_after,
        }

    async def set_desired(self, device: str, values: Mapping[str, JsonValue], actor: str) -> Json:
        """Set desired property values of one device; ``firmware`` may be ``NAME@VERSION``, or null for no wish.

        Errors as :meth:`deploy`. Returns the deployment's answer for the device, where firmware was among them.
        """
        unit, plain = self._devices.unit(device), dict(values)
        _check_names(plain)
        wish = plain.pop(FIRMWARE, None)
        ref = (
            None
            if wish is None
            else parse_release(wish if isinstance(wish, str) else release_of(wish) or str(wish))
        )
        if ref is not None:
            await self._checked(ref, [unit], actor)
        settings, forget = self._config.engine, FIRMWARE in values and ref is None

        def change(tx: Tx) -> _Wished | None:
            for name, value in plain.items():
                _set(tx, device, name, value, actor)
            if forget:
                _set(tx, device, FIRMWARE, None, actor)
                changed = reconcile_device(tx, device, settings)
                return _Wished({"device": device, "job": None, "outcome": "no_wish"}, changed)
            return _wish(tx, device, str(ref), actor, settings) if ref is not None else None

        wished = await self._store.write(change)
        if wished is not None:
            self._tell([device], [wished])
        if plain:
            unit.refresh()
        self._broadcast.send({"kind": "desired", "device": device})
        return wished.answer if wished else {"device": device, "job": None, "outcome": "noted"}

    def _tell(self, devices: Sequence[str], wished: Sequence[_Wished]) -> None:
        for device, one in zip(devices, wished, strict=True):
            self._engine.device_changed(device)
            if one.changed is not None:
                self._engine.job_changed(one.changed)
        self._broadcast.send({"kind": "desired"})

    # -- checks

    async def _checked(self, ref: ReleaseRef, units: Sequence[DeviceUnit], actor: str) -> _Verdict:
        """Raises ``Refused``, after it was put on record."""
        verdict = await self._judge(ref, units)
        if not verdict.refused:
            return verdict
        errors = list(verdict.refused.values())
        detail = "; ".join(dict.fromkeys(error.detail for error in errors))
        data: dict[str, JsonValue] = {
            "release": str(ref),
            "devices": cast(list[JsonValue], sorted(verdict.refused)),
            "reason": errors[0].reason.value,
            "detail": detail,
        }
        log.warning("deployment refused", extra={"actor": actor, **data})
        try:
            await self._store.write(lambda tx: audit.append(tx, actor, "deploy.refused", data))
        except EdgedError as exc:
            log.warning("refusal not recorded", extra={"reason": exc.reason.value, "detail": exc.detail})
        raise Refused(errors[0].reason, detail)

    async def _judge(self, ref: ReleaseRef, units: Sequence[DeviceUnit]) -> _Verdict:
        try:
            release = await self._trust.resolve(str(ref))
        except Transient as exc:
            return _Verdict(None, exc, {})
        except Refused as exc:
            return _Verdict(None, None, {unit.device.id: exc for unit in units})
        refused = {}
        for unit in units:
            error = await self._admit(release, unit)
            if error is not None:
                refused[unit.device.id] = error
        return _Verdict(release, None, refused)

    async def _admit(self, release: VerifiedRelease, unit: DeviceUnit) -> Refused | None:
        known = await running.known_of(self._store, unit, FIRMWARE)
        try:
            admit(release.facts, known)
        except Refused as exc:
            return exc
        return None

    def _units(self, target: Target) -> list[DeviceUnit]:
        if bool(target.devices) == (target.model is not None):
            raise BadRequest("name either devices or a model")
        if target.model is None:
            return [self._devices.unit(device) for device in dict.fromkeys(target.devices)]
        units = [unit for unit in self._devices.sessions.all() if unit.device.model == target.model]
        if not units:
            models = sorted({unit.device.model for unit in self._devices.sessions.all()})
            raise Permanent(
                Reason.DEVICE_UNKNOWN,
                f"no device of model {target.model!r} is in use; models: {', '.join(models) or 'none'}",
            )
        return units

    # -- plans

    async def plan(self, release: str, target: Target) -> Json:
        """What :meth:`deploy` would do, device by device; changes nothing. Errors as there, but for ``Refused``.

        ``refused`` also where the job would end at once, by what is known of the device now.
        """
        ref, units = parse_release(release), self._units(target)
        verdict = await self._judge(ref, units)
        found = verdict.release
        missing = await self._missing_bytes(found) if found else None
        plans = [await self._plan_device(ref, unit, verdict) for unit in units]
        return {
            "release": str(ref),
            "release_counter": found.facts.release_counter if found else None,
            "image_bytes": found.image.length if found else None,
            "fetch_bytes": missing,
            "offline": explain(verdict.offline) if verdict.offline else None,
            "devices": cast(list[JsonValue], plans),
        }

    async def _missing_bytes(self, release: VerifiedRelease) -> int | None:
        try:
            return await self._images.missing_bytes(release)
        except EdgedError:
            return None

    async def _plan_device(self, ref: ReleaseRef, unit: DeviceUnit, verdict: _Verdict) -> Json:
        device = unit.device.id
        twin, active, floor = await self._store.read(
            lambda tx: (
                twins.get(tx, device),
                jobs.active_for(tx, device, FIRMWARE),
                floors.get(tx, device, FIRMWARE),
            )
        )
        reported = twin.reported.get(FIRMWARE)
        runs = release_of(reported.value) if reported else None
        attached = self._devices.attached.get(device)
        action = _action(str(ref), runs, active)
        refused: EdgedError | None = verdict.refused.get(device)
        if refused is None and action == "install":
            refused = _misfit(unit) or await self._no_way_back(unit, attached, runs)
        ceiling = attached.traits.ceiling_bytes_per_s if attached else None
        size = verdict.release.image.length if verdict.release else None
        read_out = _read_out_bytes(unit.device, attached)
        return {
            "device": device,
            "model": unit.device.model,
            "runs": runs,
            "floor": floor,
            "action": "refuse" if refused else action,
            "active_job": active.id if active else None,
            "refused": explain(refused) if refused else None,
            "ceiling_bytes_per_s": ceiling,
            "read_out_bytes": read_out,
            "estimated_minutes": round((size + read_out) / ceiling / 60, 2) if size and ceiling else None,
            "unit_state": unit.unit.state.value,
        }

    async def _no_way_back(
        self, unit: DeviceUnit, attached: Attached | None, runs: str | None
    ) -> Refused | None:
        """Why the job would find nothing that the device could go back to; None where it would, or where nobody has asked."""
        device = unit.device
        if attached is None or attached.traits.slot_count > 1 or attached.traits.identify_disturbs:
            return None
        allowed = self._config.models[device.model].policy.without_fallback
        if allowed or runs is not None or _read_out_bytes(device, attached):
            return None
        if await running.left_behind(self._store, device.id, FIRMWARE) is not None:
            return None
        told = await running.told(self._store, self._trust, unit, FIRMWARE, attached.active)
        return running.unknown(device, attached.active) if told is None else None


def _misfit(unit: DeviceUnit) -> EdgedError | None:
    """Why the device cannot be used as it is configured, or is another one: its job would end for it."""
    reason, detail = unit.unit.reason, unit.unit.detail
    if reason in _NOT_USABLE:
        return Permanent(reason, detail)
    return None


def parse_release(text: str) -> ReleaseRef:
    """``NAME@VERSION``. Raises ``BadRequest``."""
    try:
        return ReleaseRef.parse(text)
    except Refused as exc:
        raise BadRequest(exc.detail) from exc


def _check_names(values: Mapping[str, JsonValue]) -> None:
    if not values:
        raise BadRequest("no property is given; write name=value")
    for name in values:
        if not _PROPERTY.fullmatch(name):
            raise BadRequest(f"{name!r} is no name of a property: {_PROPERTY.pattern}")
        if is_firmware(name) and name != FIRMWARE:
            raise Permanent(Reason.UNSUPPORTED, f"{name}: this version flashes one component, {FIRMWARE}")


def _set(tx: Tx, device: str, name: str, value: JsonValue, actor: str) -> int:
    """The desired version; a change is on record and told to whoever watches."""
    before = twins.get(tx, device).desired.get(name)
    wish = twins.set_desired(tx, device, name, value, actor)
    if wish != before:
        data: dict[str, JsonValue] = {"device": device, "name": name, "value": value, "version": wish.version}
        audit.append(tx, actor, "twin.desired", data)
        outbox.put(tx, "desired", device, None, data, f"desired:{device}:{name}:{wish.version}")
    return wish.version


def _wish(tx: Tx, device: str, release: str, actor: str, settings: EngineSettings) -> _Wished:
    """Set the device's desired firmware and make what follows: a job, a new run of an ended one, or nothing."""
    version = _set(tx, device, FIRMWARE, firmware_value(release), actor)
    made = reconcile_device(tx, device, settings)
    if made is not None and made.cancel is None:
        return _Wished(_answer(device, made, "created"), made)
    active = jobs.active_for(tx, device, FIRMWARE)
    if active is not None:
        return _beside(device, active, version, made)
    reported = twins.get(tx, device).reported.get(FIRMWARE)
    if reported is not None and release_of(reported.value) == release:
        return _Wished(
            {"device": device, "job": None, "outcome": "up_to_date", "desired_version": version}, None
        )
    last = jobs.last_for(tx, device, FIRMWARE, version)
    assert last is not None, "a wish that is not fulfilled and has no job gets one"
    again = retry(tx, last, actor, settings)
    return _Wished(_answer(device, again, "retried"), again)


def _beside(device: str, active: Job, version: int, changed: Job | None) -> _Wished:
    """Another job is not ended yet: this wish is the same, or comes after it."""
    if active.desired_version != version:
        answer = _answer(device, None, "after_active") | {"after": active.id, "desired_version": version}
        return _Wished(answer, changed)
    if active.cancel is not None:
        raise jobs.Conflict(f"job {active.id} of {device} is being cancelled; deploy again when it has ended")
    return _Wished(_answer(device, active, "under_way"), changed)


def _answer(device: str, job: Job | None, outcome: str) -> Json:
    return {
        "device": device,
        "job": job.id if job else None,
        "outcome": outcome,
        "desired_version": job.desired_version if job else None,
    }


def _read_out_bytes(device: Device, attached: Attached | None) -> int:
    """What is read before the first byte is written, as the way back of a device with one slot."""
    if attached is None or attached.traits.slot_count > 1 or not attached.reads_back:
        return 0
    return device.flash_size_bytes or 0


def _action(release: str, runs: str | None, active: Job | None) -> str:
    if active is not None:
        return "join" if active.release == release and active.cancel is None else "after_active"
    return "nothing" if runs == release else "install"
