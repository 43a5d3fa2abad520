"""Which release a device runs: what our record says of it, and what it says itself."""

from __future__ import annotations

import json

from edged.api import Device, Slot
from edged.domain import admission
from edged.domain.job import Fallback, State
from edged.domain.reconcile import release_of
from edged.engine.trust import Trust
from edged.errors import Reason, Refused
from edged.sessions import DeviceUnit
from edged.store import floors, jobs, twins
from edged.store.database import Store
from edged_firmware.facts import VerifiedRelease


async def known_of(store: Store, unit: DeviceUnit, component: str) -> admission.Admission:
    """What a release is held against before it may go onto the device."""
    counters = await store.read(lambda tx: floors.counters(tx, unit.device.id))
    return admission.Admission(
        device=unit.device,
        floor=counters.get(component, 0),
        component_counters=counters,
        flash_protocols=unit.spec.flash_protocols,
        flash_params=unit.spec.flash_params,
    )


async def recorded(store: Store, device: str, component: str) -> str | None:
    """``NAME@VERSION`` by our record."""
    twin = await store.read(lambda tx: twins.get(tx, device))
    reported = twin.reported.get(component)
    return release_of(reported.value) if reported else None


async def told(
    store: Store, trust: Trust, unit: DeviceUnit, component: str, active: Slot | None
) -> VerifiedRelease | None:
    """The release that the device's own answer means, among those that may be flashed back: that its counter is below the floor
    does not matter, since it is there already. Of a device that tells a version and no name only what has the name that our
    record says, where that says one: the version may be another firmware's."""
    if active is None or active.runs is None:
        return None
    known, record = await known_of(store, unit, component), await recorded(store, unit.device.id, component)
    name = record.partition("@")[0] if record and active.runs_name is None else None

    def fits(release: VerifiedRelease) -> bool:
        return name in (None, release.facts.name) and _may_go_back(release, known)

    installed = await _installed(store, unit.device.id, component)
    return admission.told(active, list(filter(fits, installed)), list(filter(fits, await trust.published())))


async def left_behind(store: Store, device: str, component: str) -> Fallback | None:
    """The fallback of a job that ended between two images: what the flash holds now is no way back."""
    last = await store.read(lambda tx: jobs.last_touched(tx, device, component))
    return last.fallback if last is not None and last.state is State.FAILED else None


def unknown(device: Device, active: Slot | None) -> Refused:
    """The refusal where nobody knows what a device with one slot runs, and its flash cannot be read."""
    if active is None or active.runs is None:
        return Refused(
            Reason.NO_FALLBACK,
            f"nobody knows what {device.id} runs, it does not say so, and its flash cannot be read: there is no way back",
        )
    said = f"{active.runs_name} {active.runs}" if active.runs_name else active.runs
    return Refused(
        Reason.NO_FALLBACK,
        f"{device.id} says that it runs {said}, which is not one known release, and its flash cannot be read: "
        "there is no way back",
    )


async def _installed(store: Store, device: str, component: str) -> list[VerifiedRelease]:
    """What this node installed there, newest first, as it was verified then: also what was withdrawn since."""
    done = await store.read(lambda tx: jobs.find(tx, device=device, states=(State.SUCCEEDED,)))
    return [
        VerifiedRelease.from_json(json.loads(job.verified))
        for job in done
        if job.verified is not None and job.component == component
    ]


def _may_go_back(release: VerifiedRelease, known: admission.Admission) -> bool:
    try:
        admission.check_made_for(release.facts, known)
    except Refused:
        return False
    return True
