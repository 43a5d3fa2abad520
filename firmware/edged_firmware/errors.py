"""The roots of the one exception tree, and the closed list of reasons.

Two branches mean two reactions::

    EdgedError
    ├── Transient    the world is in the way: the same step may succeed later, try again
    ├── Permanent    the step cannot succeed: stop, and say why
    └── Refused      not trusted or not allowed: stop before a byte is sent, and put it on record

Every one of them carries a :class:`Reason`, so that no refusal, wait or end state is without a cause.
``edged.errors`` names them again for the daemon and for plugin authors.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why something was refused, failed, waits or ended. The values are stored and sent: never rename one."""

    # trust
    TRUST_MISSING = "trust_missing"
    SIGNATURE_INVALID = "signature_invalid"
    METADATA_INVALID = "metadata_invalid"
    METADATA_EXPIRED = "metadata_expired"
    METADATA_ROLLBACK = "metadata_rollback"
    RELEASE_UNKNOWN = "release_unknown"
    FACTS_INVALID = "facts_invalid"
    INDEX_MISMATCH = "index_mismatch"
    CHUNK_MISMATCH = "chunk_mismatch"
    LENGTH_MISMATCH = "length_mismatch"
    HASH_MISMATCH = "hash_mismatch"
    # policy
    MODEL_MISMATCH = "model_mismatch"
    HARDWARE_MISMATCH = "hardware_mismatch"
    PROTOCOL_MISMATCH = "protocol_mismatch"
    COUNTER_LOWER = "counter_lower"
    REQUIRES_UNMET = "requires_unmet"
    IMAGE_INVALID = "image_invalid"
    IMAGE_TOO_LARGE = "image_too_large"
    NO_FALLBACK = "no_fallback"
    # the device and its link
    DEVICE_ABSENT = "device_absent"
    DEVICE_BUSY = "device_busy"
    DEVICE_ERROR = "device_error"
    LINK_LOST = "link_lost"
    LINK_BUSY = "link_busy"
    NO_RESPONSE = "no_response"
    STALLED = "stalled"
    PROTOCOL_ERROR = "protocol_error"
    VERIFY_FAILED = "verify_failed"
    HEALTH_FAILED = "health_failed"
    DEVICE_REVERTED = "device_reverted"
    # the node
    FETCH_FAILED = "fetch_failed"
    DISK_FULL = "disk_full"
    STORAGE_FAILED = "storage_failed"
    CONFIG_INVALID = "config_invalid"
    DEVICE_UNKNOWN = "device_unknown"
    JOB_UNKNOWN = "job_unknown"
    REQUEST_INVALID = "request_invalid"
    PLUGIN_FAILED = "plugin_failed"
    UNSUPPORTED = "unsupported"
    # bounds and wishes
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    STEPS_EXHAUSTED = "steps_exhausted"
    RUNS_EXHAUSTED = "runs_exhausted"
    DEADLINE_PASSED = "deadline_passed"
    REVERT_FAILED = "revert_failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    STALE_VERSION = "stale_version"


class EdgedError(Exception):
    """Base of all errors that edged raises on purpose.

    ``reason`` is from the closed list; ``detail`` is one sentence for a person: what was found, what was
    expected. ``cure`` is what helps in this very case; empty: what helps for ``reason`` in general.
    """

    def __init__(self, reason: Reason, detail: str = "", cure: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}" if self.detail else self.reason.value


class Transient(EdgedError):
    """Try again later: the device is absent, the link is lost, a server does not answer."""


class Permanent(EdgedError):
    """Stop: trying again cannot help. The image does not verify on the device, the device says no."""


class Refused(EdgedError):
    """Stop before a byte is sent: not trusted, or not allowed by policy."""
