"""What the tests of trust share: a publisher, a client, a static server, and forged metadata."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from edged_firmware import release
from edged_firmware.facts import ReleaseRef
from edged_firmware.keys import Ed25519Signer, create_signer, load_signers
from edged_firmware.repository import Folder, State, describe, load_state
from edged_firmware.trust import SeenRole, TrustReport, TrustRequest, verify

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)


def write_quickly(path: Path, data: bytes) -> None:
    """A write without fsync, where a test is not about power cuts."""
    path.write_bytes(data)


@dataclass
class Publisher:
    """A repository with its keys below ``base``."""

    base: Path
    now: datetime = NOW
    write: Callable[[Path, bytes], None] = write_quickly

    @property
    def repo(self) -> Path:
        return self.base / "repo"

    @property
    def keys(self) -> Path:
        return self.base / "keys"

    @property
    def root(self) -> bytes:
        return (self.repo / "metadata" / "1.root.json").read_bytes()

    @property
    def signers(self) -> Mapping[str, Ed25519Signer]:
        return load_signers([self.keys], None)

    def init(self, **options: Any) -> Publisher:
        release.init(self.repo, self.keys, self.now, write=self.write, **options)
        return self

    def add(self, ref: str, content: bytes | None = None, **facts: Any) -> release.ListedRelease:
        parsed = ReleaseRef.parse(ref)
        file = self.base / "firmware.bin"
        file.write_bytes(content if content is not None else ref.encode() * 500)
        draft = release.Draft(parsed.name, parsed.version, ("uno",), format="opaque")
        return release.add(self.repo, file, replace(draft, **facts), write=self.write)

    def publish(self, *refs: str, **options: Any) -> release.Published:
        for ref in refs:
            self.add(ref)
        return release.publish(self.repo, [self.keys], self.now, write=self.write, **options)

    def rotate(self, *roles: str) -> release.Published:
        return release.renew_root(self.repo, [self.keys], self.now, rotate=roles, write=self.write)

    def state(self) -> State:
        return load_state(Folder(self.repo), (self.keys / "trusted-root.json").read_bytes())

    def signers_of(self, role: str) -> list[Ed25519Signer]:
        signers = self.signers
        return [signers[keyid] for keyid in self.state().root.signed.roles[role].keyids]

    def image(self, ref: str) -> str:
        return next(line.sha256 for line in release.list_releases(self.repo) if str(line.ref) == ref)


@dataclass
class Client:
    """A node: keeps ``seen`` and the time floor as the daemon does."""

    folder: Path
    root: bytes
    source: str | None
    now: datetime = NOW
    seen: Mapping[str, SeenRole] = field(default_factory=dict)
    time_floor: datetime | None = None
    grace: timedelta = timedelta(0)

    def request(self, **changes: Any) -> TrustRequest:
        request = TrustRequest(
            root=self.root,
            source=self.source,
            metadata_dir=self.folder,
            now=self.now,
            build_time=NOW - 30 * DAY,
            time_floor=self.time_floor,
            seen=self.seen,
            offline_grace_s=self.grace.total_seconds(),
            socket_timeout_s=20.0,
            timeout_s=60.0,
        )
        return replace(request, **changes)

    def verify(self, **changes: Any) -> TrustReport:
        report = verify(self.request(**changes))
        self.seen, self.time_floor = report.seen, report.time_floor
        return report

    def lose_cache(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def refs(report: TrustReport) -> list[str]:
    return [str(found.ref) for found in report.releases]


def versions(report: TrustReport) -> dict[str, int]:
    return {status.role: status.version for status in report.roles}


def foreign_signer(base: Path) -> Ed25519Signer:
    """A key that no root lists."""
    base.mkdir(exist_ok=True)
    return create_signer(base, "foreign", None)


def signed_bytes(metadata: Metadata[Any], signers: Iterable[Ed25519Signer]) -> bytes:
    metadata.signatures.clear()
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes(JSONSerializer(compact=True))


def forge(
    publisher: Publisher,
    change: Callable[[Targets, Snapshot, Timestamp], object] = lambda *_: None,
    *,
    targets_by: Iterable[Ed25519Signer] | None = None,
    snapshot_by: Iterable[Ed25519Signer] | None = None,
    timestamp_by: Iterable[Ed25519Signer] | None = None,
    describe_targets: bool = True,
    mangle_targets: Callable[[bytes], bytes] = bytes,
) -> None:
    """Write a next state whose content and signers are chosen; by default it is an honest one."""
    state = publisher.state()
    targets, snapshot, timestamp = state.targets.signed, state.snapshot.signed, state.timestamp.signed
    for signed in (targets, snapshot, timestamp):
        signed.version += 1
    change(targets, snapshot, timestamp)
    folder = Folder(publisher.repo)
    data = signed_bytes(state.targets, publisher.signers_of("targets") if targets_by is None else targets_by)
    data = mangle_targets(data)
    folder.role("targets", targets.version).write_bytes(data)
    if describe_targets:
        snapshot.meta["targets.json"] = describe(targets.version, data)
    data = signed_bytes(
        state.snapshot, publisher.signers_of("snapshot") if snapshot_by is None else snapshot_by
    )
    folder.role("snapshot", snapshot.version).write_bytes(data)
    timestamp.snapshot_meta = describe(snapshot.version, data)
    data = signed_bytes(
        state.timestamp, publisher.signers_of("timestamp") if timestamp_by is None else timestamp_by
    )
    folder.timestamp.write_bytes(data)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
