"""Records as the local API shows them: JSON objects; times in RFC 3339, sizes in bytes, reasons with their cure."""

from __future__ import annotations

from edged.api import JsonValue
from edged.clock import to_text
from edged.devices import Attached
from edged.domain import reasons
from edged.domain.job import Job
from edged.domain.twin import Value, delta
from edged.engine.trust import Trust
from edged.errors import EdgedError, Reason
from edged.plugins import PluginState
from edged.store import audit, jobs, outbox, twins

Json = dict[str, JsonValue]


def explain(error: EdgedError) -> Json:
    """``{reason, detail, cure}`` of an error."""
    return explain_reason(error.reason, error.detail, error.cure)


def explain_reason(reason: Reason | None, detail: str, cure: str = "") -> Json:
    """``{reason, detail, cure}``; ``reason`` may be None. ``cure`` empty: that of the reason."""
    return {
        "reason": reason.value if reason else None,
        "detail": detail,
        "cure": cure or (reasons.cure(reason) if reason else ""),
    }


def job_json(job: Job) -> Json:
    """A job; ``detail`` and ``cure`` are of what it waits for, where it waits."""
    waiting = job.waiting
    cause = waiting.reason if waiting else job.reason
    return {
        "id": job.id,
        "device": job.device,
        "component": job.component,
        "release": job.release,
        "state": job.state.value,
        "reason": job.reason.value if job.reason else None,
        "detail": waiting.detail if waiting else job.detail,
        "cure": reasons.cure(cause) if cause else "",
        "waiting": {"reason": waiting.reason.value, "until": to_text(waiting.until)} if waiting else None,
        "cancel": job.cancel.value if job.cancel else None,
        "done_bytes": job.done_bytes,
        "total_bytes": job.total_bytes,
        "attempts": job.attempts,
        "steps": job.steps,
        "trial_boots": job.trial_boots,
        "touched": job.touched,
        "run": job.run,
        "retry_of": job.retry_of,
        "source": job.source,
        "desired_version": job.desired_version,
        "fallback": job.fallback.release or "read-out" if job.fallback else None,
        "created": to_text(job.created),
        "updated": to_text(job.updated),
        "deadline": to_text(job.deadline),
    }


def value_json(value: Value) -> Json:
    """One side of a twin property."""
    return {
        "value": value.value,
        "version": value.version,
        "time": to_text(value.time),
        "source": value.source,
        "unit": value.unit,
    }


def twin_json(twin: twins.Twin) -> Json:
    """Both sides of a twin, and what differs between them."""
    return {
        "desired": {name: value_json(value) for name, value in twin.desired.items()},
        "reported": {name: value_json(value) for name, value in twin.reported.items()},
        "delta": {name: value.value for name, value in delta(twin.desired, twin.reported).items()},
    }


def entry_json(entry: jobs.Entry) -> Json:
    """One line of a job's history."""
    return {
        "time": to_text(entry.time),
        "from": entry.from_state.value if entry.from_state else None,
        "to": entry.to_state.value,
        "event": entry.event,
        "reason": entry.reason.value if entry.reason else None,
        "detail": entry.detail,
    }


def event_json(event: outbox.Event) -> Json:
    """A durable event: its payload, with number, time and kind."""
    payload = event.payload if isinstance(event.payload, dict) else {"value": event.payload}
    return {**payload, "seq": event.seq, "time": to_text(event.time), "kind": event.kind, "key": event.key}


def record_json(record: audit.Record) -> Json:
    """A row of the audit trail."""
    return {
        "seq": record.seq,
        "time": to_text(record.ts),
        "actor": record.actor,
        "event": record.event,
        "data": dict(record.data),
        "hash": record.hash,
    }


def report_json(report: audit.AuditReport) -> Json:
    """What a check of the audit trail found."""
    return {
        "intact": report.intact,
        "rows": report.rows,
        "first_bad_seq": report.first_bad_seq,
        "detail": report.reason,
        "signed_heads": report.signed_heads,
    }


def attached_json(attached: Attached, twin: twins.Twin) -> Json:
    """What a device said when its session was opened last. ``twin``: what it has by now was not rejected."""
    identity, behind = attached.identity, delta(twin.desired, twin.reported)
    return {
        "time": to_text(attached.time),
        "slot_count": attached.traits.slot_count,
        "ceiling_bytes_per_s": attached.traits.ceiling_bytes_per_s,
        "hardware_id": identity.hardware_id if identity else None,
        "serial_number": identity.serial_number if identity else None,
        "rejected": {name: why for name, why in attached.rejected.items() if name in behind},
    }


def plugin_json(state: PluginState) -> Json:
    """A plugin as it was found; ``problem`` is empty where it is in use."""
    return {
        "name": state.name,
        "distribution": state.distribution,
        "problem": state.problem,
        "mappers": list(state.mappers),
        "schemes": list(state.schemes),
    }


def trust_json(trust: Trust, repository: str) -> Json:
    """What this node trusts now, as its last report says; ``online`` None before the first."""
    report = trust.report
    return {
        "repository": repository,
        "root": str(trust.root_path),
        "online": report.online if report else None,
        "stale_s": report.stale_seconds if report else None,
        "offline_because": (report.offline_because or None) if report else None,
        "roles": [
            {"role": role.role, "version": role.version, "expires": to_text(role.expires)}
            for role in (report.roles if report else ())
        ],
        "releases": [
            {
                "release": str(release.ref),
                "models": list(release.facts.models),
                "release_counter": release.facts.release_counter,
                "size_bytes": release.image.length,
            }
            for release in (report.releases if report else ())
        ],
        "rejected": [
            {"path": target.path, **explain_reason(target.reason, target.detail)}
            for target in (report.rejected if report else ())
        ],
        "failure": explain(trust.failure) if trust.failure else None,
    }
