"""May this release go onto this device? Every refusal has its reason; nothing is sent before all of them passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from edged.api import Device, Identity, Segment, Slot
from edged.errors import Reason, Refused
from edged_firmware.facts import ReleaseFacts, VerifiedRelease


@dataclass(frozen=True, slots=True)
class Admission:
    """What is known of the device besides its configuration.

    ``floor``: the counter of the newest release that succeeded (0: none). ``component_counters``: the floors of the
    device's components, for ``requires``. ``flash_protocols``: what the mapper can flash; ``flash_params``: which of the
    protocol's parameters it heeds.
    """

    device: Device
    floor: int
    component_counters: Mapping[str, int]
    flash_protocols: AbstractSet[str]
    flash_params: AbstractSet[str] = frozenset()


def admit(facts: ReleaseFacts, known: Admission) -> None:
    """Check a release's signed facts, in this order: model, hardware, protocol with its parameters, counter, requirements.

    Raises ``Refused`` with the first reason that applies.
    """
    check_made_for(facts, known)
    device = known.device
    if facts.release_counter < known.floor:
        raise Refused(
            Reason.COUNTER_LOWER,
            f"{facts.ref} has release counter {facts.release_counter}, lower than the floor {known.floor} of {device.id}",
        )
    for need in facts.requires:
        held = known.component_counters.get(need.component, 0)
        if held < need.counter:
            raise Refused(
                Reason.REQUIRES_UNMET,
                f"{facts.ref} requires {need.component} with release counter {need.counter} or higher; "
                f"{device.id} has {held}",
            )


def check_made_for(facts: ReleaseFacts, known: Admission) -> None:
    """The part of :func:`admit` that holds for a way back, too: model, hardware, protocol with its parameters."""
    device = known.device
    if device.model not in facts.models:
        raise Refused(
            Reason.MODEL_MISMATCH,
            f"{facts.ref} is for model {', '.join(facts.models)}; {device.id} is a {device.model}",
        )
    if facts.hardware_ids and device.hardware_ids and not set(facts.hardware_ids) & set(device.hardware_ids):
        raise Refused(
            Reason.HARDWARE_MISMATCH,
            f"{facts.ref} is for hardware {', '.join(facts.hardware_ids)}; "
            f"{device.id} is {', '.join(device.hardware_ids)}",
        )
    if facts.flash.protocol and facts.flash.protocol not in known.flash_protocols:
        raise Refused(
            Reason.PROTOCOL_MISMATCH,
            f"{facts.ref} is flashed by {facts.flash.protocol}; "
            f"mapper {device.mapper} speaks {', '.join(sorted(known.flash_protocols)) or 'no flash protocol'}",
        )
    unknown = sorted(facts.flash.params.keys() - known.flash_params)
    if unknown:
        raise Refused(
            Reason.PROTOCOL_MISMATCH,
            f"{facts.ref} is to be flashed with {', '.join(unknown)}, which mapper {device.mapper} does not know; "
            f"it knows {', '.join(sorted(known.flash_params)) or 'no parameter'}",
        )


def runs(facts: ReleaseFacts, slot: Slot | None) -> bool | None:
    """Whether ``slot`` runs the release that ``facts`` describe; None where the device cannot tell."""
    if slot is None or slot.runs is None:
        return None
    return slot.runs == facts.identifies_as and slot.runs_name in (None, facts.name)


def told(
    active: Slot, installed: Sequence[VerifiedRelease], published: Sequence[VerifiedRelease]
) -> VerifiedRelease | None:
    """The release that ``active`` says it runs: of those that were ``installed`` on the device the first (newest first), else
    the one of those ``published`` for it. None where it means none of them, or could mean several published ones."""
    ours = next((release for release in installed if runs(release.facts, active)), None)
    meant = [release for release in published if runs(release.facts, active)]
    return ours or (meant[0] if len(meant) == 1 else None)


def check_identity(device: Device, hardware_ids: tuple[str, ...], identity: Identity) -> None:
    """Is it the device that the configuration and the release mean?

    Raises ``Refused(HARDWARE_MISMATCH)`` where the hardware id that answered is not among either's.
    """
    for allowed, whose in ((device.hardware_ids, f"device {device.id}"), (hardware_ids, "the release")):
        if allowed and identity.hardware_id not in allowed:
            raise Refused(
                Reason.HARDWARE_MISMATCH,
                f"hardware {identity.hardware_id} answered at {device.address}; "
                f"{whose} allows {', '.join(allowed)}",
            )


def check_bounds(device: Device, segments: tuple[Segment, ...]) -> None:
    """Does the image lie inside the device's flash?

    Raises ``Refused(IMAGE_TOO_LARGE)`` naming the first address outside. A device without a configured size is not
    checked here; its mapper knows the part.
    """
    if device.flash_size_bytes is None:
        return
    end = device.flash_base + device.flash_size_bytes
    for segment in segments:
        if segment.address < device.flash_base or segment.address + segment.length > end:
            raise Refused(
                Reason.IMAGE_TOO_LARGE,
                f"segment {segment.address:#x}+{segment.length:#x} lies outside the flash "
                f"{device.flash_base:#x}..{end:#x} of {device.id}",
            )
