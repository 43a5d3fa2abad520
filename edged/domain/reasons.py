"""What a reason means to a person and to a script: its kind, its exit code, its cure."""

from __future__ import annotations

from enum import StrEnum

from edged.errors import Reason


class Kind(StrEnum):
    """The reaction that a reason asks for."""

    REFUSED = "refused"
    FAILED = "failed"
    WAITING = "waiting"
    CANCELLED = "cancelled"


EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_UNREACHABLE = 4

_REFUSED = frozenset(
    {
        Reason.TRUST_MISSING,
        Reason.SIGNATURE_INVALID,
        Reason.METADATA_INVALID,
        Reason.METADATA_EXPIRED,
        Reason.METADATA_ROLLBACK,
        Reason.RELEASE_UNKNOWN,
        Reason.FACTS_INVALID,
        Reason.INDEX_MISMATCH,
        Reason.CHUNK_MISMATCH,
        Reason.LENGTH_MISMATCH,
        Reason.HASH_MISMATCH,
        Reason.MODEL_MISMATCH,
        Reason.HARDWARE_MISMATCH,
        Reason.PROTOCOL_MISMATCH,
        Reason.COUNTER_LOWER,
        Reason.REQUIRES_UNMET,
        Reason.IMAGE_INVALID,
        Reason.IMAGE_TOO_LARGE,
        Reason.NO_FALLBACK,
        Reason.STALE_VERSION,
    }
)
_WAITING = frozenset(
    {
        Reason.DEVICE_ABSENT,
        Reason.DEVICE_BUSY,
        Reason.LINK_LOST,
        Reason.LINK_BUSY,
        Reason.NO_RESPONSE,
        Reason.STALLED,
        Reason.FETCH_FAILED,
        Reason.DISK_FULL,
    }
)
_CANCELLED = frozenset({Reason.CANCELLED, Reason.SUPERSEDED})

_CURES: dict[Reason, str] = {
    Reason.TRUST_MISSING: "give the node a root of trust: edged trust init ROOT.json",
    Reason.SIGNATURE_INVALID: "the repository is not signed by the keys that this node trusts; compare with edged trust show",
    Reason.METADATA_EXPIRED: "publish the repository again (edged release publish), or check the node's clock",
    Reason.METADATA_ROLLBACK: "the repository is older than what this node has seen; serve the newest one",
    Reason.RELEASE_UNKNOWN: "publish the release, then edged trust refresh",
    Reason.CHUNK_MISMATCH: "the image is not what was signed; copy the repository again from its source",
    Reason.INDEX_MISMATCH: "the chunk index is not what was signed; copy the repository again from its source",
    Reason.LENGTH_MISMATCH: "the file is cut short or too long; copy the repository again from its source",
    Reason.HASH_MISMATCH: "the file is not what was signed; copy the repository again from its source",
    Reason.MODEL_MISMATCH: "choose a release that names this device's model",
    Reason.HARDWARE_MISMATCH: "choose a release for this hardware; or the wiring, or the device's file, is wrong",
    Reason.PROTOCOL_MISMATCH: "the release is made for another flash protocol; choose the mapper that speaks it",
    Reason.COUNTER_LOWER: "sign the older image again with a new, higher release counter",
    Reason.REQUIRES_UNMET: "install first what the release requires",
    Reason.IMAGE_TOO_LARGE: "the image does not fit into the device's flash",
    Reason.NO_FALLBACK: "publish the release that runs now, if the device tells its version; "
    "or set policy.without_fallback = true in the model",
    Reason.DEVICE_ABSENT: "connect the device; where its address names a port, the daemon's user must be able to open it; "
    "the job goes on by itself",
    Reason.DEVICE_BUSY: "see what the device says: it, or the machine around it, is to come to rest; the job goes on by itself",
    Reason.NO_RESPONSE: "check power, wiring and baud rate; the job goes on by itself",
    Reason.STALLED: "check the link; the job goes on by itself",
    Reason.FETCH_FAILED: "check that the repository can be reached; the job goes on by itself",
    Reason.VERIFY_FAILED: "the flash does not keep what was written: check the supply voltage, replace the device",
    Reason.DEVICE_REVERTED: "the new image did not survive its trial boot; see edged job show",
    Reason.REVERT_FAILED: "the device may be between two images: see edged job show, cure what it names, then edged job retry",
    Reason.RUNS_EXHAUSTED: "find out who or what changes the device, then edged deploy again",
    Reason.STORAGE_FAILED: "edged doctor says what the disk or the database lacks",
    Reason.LINK_BUSY: "close the program that uses the port; the job goes on by itself",
    Reason.LINK_LOST: "reconnect the device; the job goes on by itself",
    Reason.HEALTH_FAILED: "the new image did not pass its health check; see edged job show",
    Reason.DISK_FULL: "free space in the state folder; the job goes on by itself",
}


def kind(reason: Reason) -> Kind:
    """The kind of ``reason``; what is neither a refusal, a wait nor a cancellation is a failure."""
    if reason in _REFUSED:
        return Kind.REFUSED
    if reason in _WAITING:
        return Kind.WAITING
    return Kind.CANCELLED if reason in _CANCELLED else Kind.FAILED


def exit_code(reason: Reason | None) -> int:
    """The exit code of a command that ended for ``reason``; None is success."""
    if reason is None:
        return EXIT_DONE
    return EXIT_REFUSED if kind(reason) is Kind.REFUSED else EXIT_FAILED


def cure(reason: Reason) -> str:
    """What an operator can do about it; empty where there is nothing general to say."""
    return _CURES.get(reason, "")
