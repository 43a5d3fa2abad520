"""The TUF client: python-tuf's ``ngclient`` with what an edge node needs besides.

What is added: durable writes of the cache, a time that is given, floors for versions and time that outlive
the cache, a grace for nodes that are off line, the last good metadata to verify again without a source, and a
refusal of delegated roles that are reached by two parents. Decisions about signatures, versions, hashes and
delegations stay python-tuf's. Images are not downloaded here.

Loaded on use only, by ``trust.verify`` and by the TUF command: it brings in the TUF libraries.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Final, cast
from urllib.parse import urlsplit
from urllib.request import url2pathname

import urllib3
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig
from tuf.ngclient.urllib3_fetcher import Urllib3Fetcher

from edged_firmware import keys
from edged_firmware.durable import fsync_folder, storage_error, write_durably
from edged_firmware.errors import Reason, Refused, Transient
from edged_firmware.facts import FACTS_KEY, ReleaseFacts, SignedTarget, VerifiedRelease
from edged_firmware.trust import RejectedTarget, RoleStatus, Seen, SeenRole, TrustReport, TrustRequest

keys.register()

#: Field of the timestamp role: when it was signed. TUF has only the expiry, which says nothing about "now".
ISSUED: Final = "edged_issued"
LAST_GOOD: Final = "last_good.json"

_TOP_LEVEL: Final = (Root.type, Timestamp.type, Snapshot.type, Targets.type)
_READ_BYTES: Final = 65536


class SourceFetcher(FetcherInterface):
    """Reads ``http(s)://`` through tuf's own pool and ``file://`` from a folder.

    ``socket_timeout_s``: longest silence of a server. An absent file is HTTP status 404 either way.
    ``authorization``: the Authorization header for the server; urllib3 keeps it from other hosts in a redirect.
    """

    def __init__(self, socket_timeout_s: float, authorization: str = "") -> None:
        # tuf declares whole seconds; urllib3, which gets it, takes fractions.
        self._http = Urllib3Fetcher(app_user_agent="edged")
        self._http.socket_timeout = socket_timeout_s  # type: ignore[assignment]
        if authorization:
            # tuf has no public way to set a header
            self._http._proxy_env._kw_args["headers"]["Authorization"] = authorization

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """As the interface says, but in memory: metadata is small, and a temporary file wears flash."""
        data = bytearray()
        with closing(cast(Generator[bytes, None, None], self.fetch(url))) as pieces:
            for piece in pieces:
                data += piece
                if len(data) > max_length:
                    raise tuf_errors.DownloadLengthMismatchError(f"{url} is longer than {max_length} bytes")
        return bytes(data)

    def _fetch(self, url: str) -> Generator[bytes, None, None]:
        if url.startswith("file://"):
            return _translated_reading(url, _read_file(_open_file(url)))
        return _translated_reading(url, self._http.fetch(url))


def base_url(source: str, folder: str) -> str:
    """The URL of ``folder`` in the release repository ``source``, which is a URL or a path."""
    root = source if "://" in source else Path(source).absolute().as_uri()
    return f"{root.rstrip('/')}/{folder}/"


class DurableUpdater(Updater):
    """An ``Updater`` whose cache survives a power cut and whose time is given.

    Arguments as ``Updater``; ``folder`` must exist. Private members of python-tuf 7 are used here, because
    there is no public way to set the time or to change how files are written; a test names each of them.
    """

    def __init__(
        self,
        folder: Path,
        metadata_url: str,
        fetcher: FetcherInterface,
        *,
        root: bytes,
        now: datetime,
        target_dir: Path | None = None,
        target_url: str | None = None,
    ) -> None:
        self._parents: dict[str, str] = {}
        self._make_history(folder)
        super().__init__(
            str(folder),
            metadata_url,
            None if target_dir is None else str(target_dir),
            target_url,
            fetcher,
            UpdaterConfig(),
            bootstrap=root,
        )
        self._trusted_set.reference_time = now

    def refreshed(self) -> Accepted:
        """Refresh, and return what was accepted. Raises the errors of ``tuf.api.exceptions``."""
        self.refresh()
        trusted = self._trusted_set
        return Accepted(trusted.root, trusted.timestamp, trusted.snapshot, trusted.targets)

    def _make_history(self, folder: Path) -> None:
        history = folder / "root_history"
        if not history.is_dir():
            history.mkdir()
            fsync_folder(folder)

    def _persist_file(self, filename: str, data: bytes) -> None:
        # ngclient renames without fsync: a power cut could leave an empty file.
        path = Path(filename)
        if path.is_symlink() or _read_or_none(path) != data:
            write_durably(path, data)

    def _update_root_symlink(self) -> None:
        # ngclient removes the link and makes it anew; between the two there is no root.json.
        version = self._trusted_set.root.version
        data = Path(self._dir, "root_history", f"{version}.root.json").read_bytes()
        self._persist_file(str(Path(self._dir, "root.json")), data)

    def _load_targets(self, role: str, parent_role: str) -> Targets:
        # In python-tuf 7.0.0 a role verified for one parent counts as verified for every other.
        known = self._parents.setdefault(role, parent_role)
        if known != parent_role:
            raise tuf_errors.RepositoryError(f"{role} is delegated by both {known} and {parent_role}")
        return super()._load_targets(role, parent_role)


class _LastGoodUpdater(DurableUpdater):
    """Verifies the last good metadata again, without a source and without a write."""

    def __init__(self, folder: Path, good: Mapping[str, bytes], *, root: bytes, now: datetime) -> None:
        self._good = good
        super().__init__(folder, "none:", _NoFetcher(), root=root, now=now)

    def _make_history(self, folder: Path) -> None:
        """Nothing is written off line."""

    def _persist_root(self, version: int, data: bytes) -> None:
        """Nothing is written off line."""

    def _persist_file(self, filename: str, data: bytes) -> None:
        """Nothing is written off line."""

    def _update_root_symlink(self) -> None:
        """Nothing is written off line."""

    def _load_local_metadata(self, rolename: str) -> bytes:
        # ngclient hides why a local file is refused and asks for a remote one, so all is "remote" here.
        raise FileNotFoundError(rolename)

    def _download_metadata(self, rolename: str, length: int, version: int | None = None) -> bytes:
        # ngclient has no off-line mode: it always fetches the timestamp (client workflow 5.4.1).
        if rolename in self._good:
            return self._good[rolename]
        raise tuf_errors.DownloadHTTPError(f"{rolename} is not among the last good metadata", 404)


class _NoFetcher(FetcherInterface):
    def _fetch(self, url: str) -> Iterator[bytes]:
        raise tuf_errors.DownloadHTTPError(f"off line: {url}", 404)


@dataclass(frozen=True, slots=True)
class Accepted:
    """The four top-level roles that ngclient accepted together."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    targets: Targets

    def roles(self) -> Mapping[str, Signed]:
        """By role name, in the order of the client workflow."""
        return dict(zip(_TOP_LEVEL, (self.root, self.timestamp, self.snapshot, self.targets), strict=True))


def verify_with_tuf(request: TrustRequest) -> TrustReport:
    """The work of ``trust.verify``; see there for the errors."""
    if not request.root:
        raise Refused(Reason.TRUST_MISSING, "no root metadata is installed: run `edged trust init`")
    with _alone(request.metadata_dir):
        accepted, offline = _refresh(request)
        _check_layout(accepted.root)
        now = _proven_time(accepted, request.reference_time)
        _check_expiry(accepted, now, request.offline_grace)
        _check_floors(accepted, request.seen)
        if offline is None:
            _keep_last_good(request.metadata_dir)
    return _report(request, accepted, now, offline)


@contextmanager
def translated() -> Iterator[None]:
    """Turn the errors of python-tuf, and OSError of its cache, into those of ``edged_firmware.errors``."""
    try:
        yield
    except tuf_errors.UnsignedMetadataError as error:
        raise Refused(Reason.SIGNATURE_INVALID, str(error)) from error
    except tuf_errors.ExpiredMetadataError as error:
        raise Refused(Reason.METADATA_EXPIRED, str(error)) from error
    except tuf_errors.BadVersionNumberError as error:
        raise Refused(Reason.METADATA_ROLLBACK, str(error)) from error
    except (tuf_errors.RepositoryError, tuf_errors.DownloadLengthMismatchError) as error:
        raise Refused(Reason.METADATA_INVALID, _with_cause(error)) from error
    except tuf_errors.DownloadError as error:
        raise Transient(Reason.FETCH_FAILED, _with_cause(error)) from error
    except OSError as error:
        raise storage_error(error, Path(error.filename or "."), 0) from error


def _with_cause(error: Exception) -> str:
    told = [str(part) for part in (error, error.__cause__) if part is not None and str(part)]
    return ": ".join(told) or type(error).__name__


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the cache folder for one run: ``Updater`` says that it does not share one."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error(error, folder, 0) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _refresh(request: TrustRequest) -> tuple[Accepted, Transient | None]:
    """What is accepted now, and why the source did not answer (None: it did)."""
    _check_root(request)
    if request.source is None:
        absent = Transient(Reason.FETCH_FAILED, "no release repository is named: set trust.repository")
        return _from_last_good(request, absent), absent
    try:
        with translated():
            return _online_updater(request, request.source).refreshed(), None
    except Transient as error:
        if error.reason is not Reason.FETCH_FAILED:
            raise
        return _from_last_good(request, error), error


def _check_root(request: TrustRequest) -> None:
    """Client workflow 5.1: the trusted root. Raises ``Refused(TRUST_MISSING)``."""
    try:
        _LastGoodUpdater(request.metadata_dir, {}, root=request.root, now=request.reference_time)
    except tuf_errors.RepositoryError as error:
        raise Refused(
            Reason.TRUST_MISSING, f"the root of trust is no root metadata signed by itself: {error}"
        ) from error


def _online_updater(request: TrustRequest, source: str) -> DurableUpdater:
    return DurableUpdater(
        request.metadata_dir,
        base_url(source, "metadata"),
        SourceFetcher(request.socket_timeout_s, request.authorization),
        root=request.root,
        now=request.reference_time - request.offline_grace,
    )


def _from_last_good(request: TrustRequest, why: Transient) -> Accepted:
    """Verify again what was good the last time. Raises ``why`` when that is lost or no longer holds.

    Only expiry is told apart: it is what the grace is about, and going on line is its cure.
    """
    now = request.reference_time - request.offline_grace
    good = _load_last_good(request.metadata_dir)
    try:
        with translated():
            return _LastGoodUpdater(request.metadata_dir, good, root=request.root, now=now).refreshed()
    except Refused as error:
        if error.reason is Reason.METADATA_EXPIRED:
            raise Refused(error.reason, f"{error.detail}; {why.detail}") from error
        raise Transient(why.reason, f"{why.detail}; the last good metadata: {error.detail}") from error
    except Transient as error:
        raise Transient(why.reason, f"{why.detail}; there is no last good metadata") from error


def _load_last_good(folder: Path) -> Mapping[str, bytes]:
    """The three roles as they were accepted together; empty when lost, torn or unreadable."""
    try:
        data = json.loads((folder / LAST_GOOD).read_bytes())
        return {role: str(data[role]).encode() for role in _TOP_LEVEL[1:]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _keep_last_good(folder: Path) -> None:
    # One file, because ngclient's cache may be half new when the line is cut between two roles.
    try:
        good = {role: (folder / f"{role}.json").read_text("utf-8") for role in _TOP_LEVEL[1:]}
    except OSError as error:
        raise storage_error(error, folder, 0) from error
    data = json.dumps(good).encode()
    path = folder / LAST_GOOD
    if _read_or_none(path) != data:
        write_durably(path, data)


def _proven_time(accepted: Accepted, now: datetime) -> datetime:
    """The later of ``now`` and the signed time of the timestamp."""
    issued = _issued(accepted.timestamp)
    return now if issued is None else max(now, issued)


def _issued(timestamp: Timestamp) -> datetime | None:
    text = timestamp.unrecognized_fields.get(ISSUED)
    if text is None:
        return None
    try:
        issued = datetime.fromisoformat(text)
        in_order = issued <= timestamp.expires
    except (TypeError, ValueError) as error:
        raise Refused(Reason.METADATA_INVALID, f"timestamp: {ISSUED} {text!r} is no time in UTC") from error
    if not in_order:
        raise Refused(Reason.METADATA_INVALID, f"timestamp: {ISSUED} {text} is after its expiry")
    return issued.astimezone(UTC)


def _check_layout(root: Root) -> None:
    """Without consistent snapshots a mirror that is being written shows a mix (specification 6.2)."""
    if not root.consistent_snapshot:
        raise Refused(Reason.METADATA_INVALID, "the repository has no consistent snapshots, which are needed")


def _check_expiry(accepted: Accepted, now: datetime, grace: timedelta) -> None:
    """Client workflow 5.3.10, 5.4.4, 5.5.6, 5.6.6, with the grace for timestamp and snapshot alone.

    ngclient has one time for all roles and was given ``now - grace``.
    """
    graces = {
        Root.type: timedelta(0),
        Targets.type: timedelta(0),
        Timestamp.type: grace,
        Snapshot.type: grace,
    }
    for role, signed in accepted.roles().items():
        if signed.is_expired(now - graces[role]):
            raise Refused(
                Reason.METADATA_EXPIRED,
                f"{role} version {signed.version} expired at {signed.expires.isoformat()}, it is "
                f"{now.isoformat(timespec='seconds')}: let the publisher sign a new one, or check the clock",
            )


def _check_floors(accepted: Accepted, seen: Seen) -> None:
    """Client workflow 5.4.3 and 5.5.5 for a cache that was lost or rolled back."""
    for role, signed in accepted.roles().items():
        floor = seen.get(role)
        if floor is None or signed.version >= floor.version or _recovering(role, accepted.root, floor):
            continue
        raise Refused(
            Reason.METADATA_ROLLBACK, f"{role} version {signed.version} is below {floor.version}, seen before"
        )


def _recovering(role: str, root: Root, seen: SeenRole) -> bool:
    """Client workflow 5.3.11: was a key of the role taken away since the floor was seen?"""
    return role != Root.type and not set(seen.keyids) <= set(root.roles[role].keyids)


def _report(
    request: TrustRequest, accepted: Accepted, now: datetime, offline: Transient | None
) -> TrustReport:
    releases, rejected = _releases(accepted.targets)
    proven = _issued(accepted.timestamp) or request.build_time
    first_expiry = min(accepted.timestamp.expires, accepted.snapshot.expires)
    return TrustReport(
        releases=releases,
        rejected=rejected,
        roles=tuple(
            RoleStatus(role, signed.version, signed.expires) for role, signed in accepted.roles().items()
        ),
        seen={
            role: SeenRole(signed.version, tuple(sorted(accepted.root.roles[role].keyids)))
            for role, signed in accepted.roles().items()
        },
        time_floor=max(request.build_time, request.time_floor or request.build_time, proven).astimezone(UTC),
        now=now,
        online=offline is None,
        offline_because=offline.detail if offline else "",
        stale_seconds=max(0.0, (now - first_expiry).total_seconds()),
    )


def _releases(targets: Targets) -> tuple[tuple[VerifiedRelease, ...], tuple[RejectedTarget, ...]]:
    """The releases among the targets, and the targets that say they are one and are not."""
    releases: list[VerifiedRelease] = []
    rejected: list[RejectedTarget] = []
    for path, target in sorted(targets.targets.items()):
        custom = target.unrecognized_fields.get("custom")
        if not isinstance(custom, Mapping) or FACTS_KEY not in custom:
            continue
        try:
            releases.append(_release(path, target, custom, targets.targets))
        except Refused as error:
            rejected.append(RejectedTarget(path, error.reason, error.detail))
    return tuple(releases), tuple(rejected)


def _release(
    path: str, target: TargetFile, custom: Mapping[str, object], all_targets: Mapping[str, TargetFile]
) -> VerifiedRelease:
    facts = ReleaseFacts.from_custom(custom)
    if path != facts.ref.image_path:
        raise Refused(Reason.FACTS_INVALID, f"name, version: {facts.ref} belongs at {facts.ref.image_path}")
    index = all_targets.get(facts.chunk_index)
    if index is None:
        raise Refused(Reason.INDEX_MISMATCH, f"chunk_index: there is no target {facts.chunk_index}")
    return VerifiedRelease(facts, _signed_target(path, target), _signed_target(facts.chunk_index, index))


def _signed_target(path: str, target: TargetFile) -> SignedTarget:
    return SignedTarget(path, target.length, target.hashes.get("sha256", ""))


def _open_file(url: str) -> BinaryIO:
    # The last part is a role's name as ngclient quoted it, and is the file's name as it stands.
    folder, _, name = urlsplit(url).path.rpartition("/")
    path = Path(url2pathname(folder), name)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise tuf_errors.DownloadHTTPError(f"{path} is no file", 404)
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise tuf_errors.DownloadHTTPError(f"{path} is not there", 404) from error


def _read_file(file: BinaryIO) -> Generator[bytes, None, None]:
    with file:
        while piece := file.read(_READ_BYTES):
            yield piece


def _translated_reading(url: str, pieces: Iterator[bytes]) -> Generator[bytes, None, None]:
    """The same bytes; what breaks while they are read becomes a DownloadError, as ngclient expects."""
    try:
        yield from pieces
    except (OSError, urllib3.exceptions.HTTPError) as error:
        raise tuf_errors.DownloadError(f"{url} broke off") from error


def _read_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None
