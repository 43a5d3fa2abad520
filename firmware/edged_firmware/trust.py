"""Which releases may be installed: the question, the answer, and a child process that finds it.

:func:`verify` runs the TUF client workflow over a release repository and returns every release whose
signatures hold. :func:`verify_in_child` does the same in a short-lived process, so that a long-running daemon
never loads the TUF libraries: importing this module does not import them.

The time is given, never asked for. Metadata is fetched here; images are not.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self, cast

from edged_firmware.errors import EdgedError, Permanent, Reason, Refused, Transient
from edged_firmware.facts import VerifiedRelease

#: Exit codes of the worker process; the error itself is JSON on its standard output.
EXIT_REPORT: Final = 0
EXIT_ERROR: Final = 3

_ERRORS: Final[Mapping[str, type[EdgedError]]] = {
    "transient": Transient,
    "permanent": Permanent,
    "refused": Refused,
}


@dataclass(frozen=True, slots=True)
class SeenRole:
    """The highest version of a role that was ever accepted, and the ids of the keys that the role had then.

    The floor holds as long as the role keeps those keys: when one of them is taken away by a newer root, a
    lower version is legal (TUF client workflow 5.3.11, recovery from a fast-forward attack).
    """

    version: int
    keyids: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`."""
        return cls(int(data["version"]), tuple(data["keyids"]))

    def to_json(self) -> dict[str, object]:
        """``{"version": int, "keyids": [str]}``."""
        return {"version": self.version, "keyids": list(self.keyids)}


Seen = Mapping[str, SeenRole]


def seen_from_json(data: Mapping[str, Any]) -> dict[str, SeenRole]:
    """Inverse of :func:`seen_to_json`."""
    return {role: SeenRole.from_json(item) for role, item in data.items()}


def seen_to_json(seen: Seen) -> dict[str, object]:
    """A JSON object, role to :meth:`SeenRole.to_json`, to be stored by the caller."""
    return {role: item.to_json() for role, item in seen.items()}


@dataclass(frozen=True, slots=True)
class TrustRequest:
    """What to verify, against which root, at what time.

    - ``root``: bytes of the root metadata that the owner installed, where the chain of trust starts.
    - ``source``: the release repository (the folder that holds ``metadata/``), as an ``http(s)://`` or
      ``file://`` URL or a path; None when there is none at the moment.
    - ``metadata_dir``: the cache; made when it is not there, and safe to lose.
    - ``now``: the clock; of it, ``build_time`` and ``time_floor`` the latest counts. All have a zone.
    - ``seen``: what the last report returned as ``seen``; it outlives the cache.
    - ``offline_grace_s``: for so long after its expiry a timestamp or snapshot is still accepted. An expired
      root or targets never is. It holds whether or not the source answers, because whoever can serve old
      files can as well cut the line.
    - ``authorization``: what an http server wants as the Authorization header; empty: nothing. It goes to the child
      process through a pipe.
    - ``socket_timeout_s``: longest silence of a server; ``timeout_s``: of the whole run in a child process.
    """

    root: bytes
    source: str | None
    metadata_dir: Path
    now: datetime
    build_time: datetime
    time_floor: datetime | None = None
    seen: Seen = field(default_factory=dict, hash=False)
    offline_grace_s: float = 0.0
    authorization: str = field(default="", repr=False)
    socket_timeout_s: float = 30.0
    timeout_s: float = 120.0

    @property
    def reference_time(self) -> datetime:
        """The latest of clock, build time and floor, in UTC."""
        return max(self.now, self.build_time, self.time_floor or self.now).astimezone(UTC)

    @property
    def offline_grace(self) -> timedelta:
        """The grace as a duration."""
        return timedelta(seconds=self.offline_grace_s)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`."""
        floor = data["time_floor"]
        return cls(
            root=base64.b64decode(data["root"]),
            source=data["source"],
            metadata_dir=Path(data["metadata_dir"]),
            now=datetime.fromisoformat(data["now"]),
            build_time=datetime.fromisoformat(data["build_time"]),
            time_floor=None if floor is None else datetime.fromisoformat(floor),
            seen=seen_from_json(data["seen"]),
            offline_grace_s=data["offline_grace_s"],
            authorization=data["authorization"],
            socket_timeout_s=data["socket_timeout_s"],
            timeout_s=data["timeout_s"],
        )

    def to_json(self) -> dict[str, object]:
        """A JSON object; the root as base64, times in ISO 8601."""
        return {
            "root": base64.b64encode(self.root).decode(),
            "source": self.source,
            "metadata_dir": str(self.metadata_dir),
            "now": self.now.isoformat(),
            "build_time": self.build_time.isoformat(),
            "time_floor": None if self.time_floor is None else self.time_floor.isoformat(),
            "seen": seen_to_json(self.seen),
            "offline_grace_s": self.offline_grace_s,
            "authorization": self.authorization,
            "socket_timeout_s": self.socket_timeout_s,
            "timeout_s": self.timeout_s,
        }


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """Version and expiry of one accepted role: root, timestamp, snapshot or targets."""

    role: str
    version: int
    expires: datetime


@dataclass(frozen=True, slots=True)
class RejectedTarget:
    """A target that is signed but cannot be a release, and why."""

    path: str
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class TrustReport:
    """What was verified.

    - ``releases``: sorted by target name; ``rejected``: signed targets with facts that cannot be used.
    - ``seen``: to be stored, and given to the next request.
    - ``time_floor``: the latest time that is proven by a signature or was given as build time or floor; to be
      stored likewise. The clock is not in it: a clock that once jumped ahead must not stop updates for good.
    - ``now``: the time that was used, the later of the floor and the clock.
    - ``online``: False when the source did not answer and the last good metadata was verified again.
    - ``offline_because``: why the source did not answer; empty when it did.
    - ``stale_seconds``: how long ago the timestamp or the snapshot expired; 0.0 when neither has.
    """

    releases: tuple[VerifiedRelease, ...]
    rejected: tuple[RejectedTarget, ...]
    roles: tuple[RoleStatus, ...]
    seen: Seen = field(hash=False)
    time_floor: datetime
    now: datetime
    online: bool
    stale_seconds: float
    offline_because: str = ""

    @property
    def offline(self) -> bool:
        """The opposite of ``online``."""
        return not self.online

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`. Raises ``Refused(FACTS_INVALID)`` for a release that is none."""
        return cls(
            releases=tuple(VerifiedRelease.from_json(item) for item in data["releases"]),
            rejected=tuple(
                RejectedTarget(item["path"], Reason(item["reason"]), item["detail"])
                for item in data["rejected"]
            ),
            roles=tuple(
                RoleStatus(item["role"], item["version"], datetime.fromisoformat(item["expires"]))
                for item in data["roles"]
            ),
            seen=seen_from_json(data["seen"]),
            time_floor=datetime.fromisoformat(data["time_floor"]),
            now=datetime.fromisoformat(data["now"]),
            online=data["online"],
            stale_seconds=data["stale_seconds"],
            offline_because=data["offline_because"],
        )

    def to_json(self) -> dict[str, object]:
        """A JSON object; times in ISO 8601."""
        return {
            "releases": [release.to_json() for release in self.releases],
            "rejected": [
                {"path": item.path, "reason": item.reason.value, "detail": item.detail}
                for item in self.rejected
            ],
            "roles": [
                {"role": item.role, "version": item.version, "expires": item.expires.isoformat()}
                for item in self.roles
            ],
            "seen": seen_to_json(self.seen),
            "time_floor": self.time_floor.isoformat(),
            "now": self.now.isoformat(),
            "online": self.online,
            "stale_seconds": self.stale_seconds,
            "offline_because": self.offline_because,
        }


def verify(request: TrustRequest) -> TrustReport:
    """Run the TUF client workflow (specification 5) and return what it proves.

    Blocks, and loads the TUF libraries. One run at a time for a cache folder; a second one waits.

    Raises Refused: TRUST_MISSING (no root that is signed by itself), SIGNATURE_INVALID, METADATA_EXPIRED,
    METADATA_ROLLBACK (below ``seen``, or below the cache), METADATA_INVALID (unreadable, mixed, too long).
    Raises Transient: FETCH_FAILED (no answer, and no last good metadata to fall back on), DISK_FULL and
    STORAGE_FAILED for the cache.
    """
    from edged_firmware.trust_client import verify_with_tuf

    return verify_with_tuf(request)


async def verify_in_child(request: TrustRequest) -> TrustReport:
    """:func:`verify` in a process of its own, which is gone when this returns, raises or is cancelled.

    Raises as :func:`verify`, and Transient(FETCH_FAILED) when the process takes longer than
    ``request.timeout_s`` or ends without an answer.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "edged_firmware.trust_worker",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_worker_environment(),
    )
    try:
        async with asyncio.timeout(request.timeout_s):
            out, err = await process.communicate(json.dumps(request.to_json()).encode())
    except TimeoutError as error:
        raise Transient(
            Reason.FETCH_FAILED, f"verifying {request.source} took longer than {request.timeout_s:g} s"
        ) from error
    finally:
        await _end(process)
    return _answer(process.returncode, out, err)


def error_to_json(error: EdgedError) -> dict[str, object]:
    """``{"error": branch, "reason": reason, "detail": text}``; the inverse is :func:`error_from_json`."""
    branch = next(name for name, kind in _ERRORS.items() if isinstance(error, kind))
    return {"error": branch, "reason": error.reason.value, "detail": error.detail}


def error_from_json(data: Mapping[str, Any]) -> EdgedError:
    """The error that :func:`error_to_json` wrote down."""
    return _ERRORS[data["error"]](Reason(data["reason"]), data["detail"])


def _worker_environment() -> dict[str, str]:
    # The child must see the same libraries as its parent, and nothing from the folder it is started in (-P).
    return os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await asyncio.shield(asyncio.ensure_future(process.wait()))


def _answer(code: int | None, out: bytes, err: bytes) -> TrustReport:
    if code == EXIT_REPORT:
        return TrustReport.from_json(json.loads(out))
    if code == EXIT_ERROR:
        raise error_from_json(cast(Mapping[str, Any], json.loads(out)))
    last = err.decode(errors="replace").strip().rpartition("\n")[2]
    raise Transient(Reason.FETCH_FAILED, f"the verifying process ended with {code}: {last or 'no message'}")
