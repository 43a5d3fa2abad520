"""A release repository on disk: where its files are, its signed state, and how a role is signed and written.

It is a plain folder that any static web server or USB stick can hold::

    metadata/   N.root.json, N.targets.json, N.snapshot.json, timestamp.json
    targets/    NAME/VERSION/SHA256.image and SHA256.chunks
    .staged/    what was added and is not signed yet; not for clients

Nothing here decides what is released. Keys are elsewhere, never in this folder. Loads the TUF libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, T, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from edged_firmware import keys
from edged_firmware.durable import fsync_folder, storage_error, write_durably
from edged_firmware.errors import Reason, Refused
from edged_firmware.keys import Ed25519Signer
from edged_firmware.trust_client import ISSUED, translated

keys.register()

ROLES: Final = (Root.type, Targets.type, Snapshot.type, Timestamp.type)
#: The file beside the keys from which the publisher's own chain of trust starts.
TRUSTED_ROOT: Final = "trusted-root.json"

#: How a file of the repository is written: path, content. ``durable.write_durably`` but for tests.
Write = Callable[[Path, bytes], None]
Signers = Mapping[str, Ed25519Signer]


@dataclass(frozen=True, slots=True)
class Folder:
    """The places in a release repository, and the way to write there."""

    path: Path
    write: Write = write_durably

    @property
    def timestamp(self) -> Path:
        """The one file of the metadata that changes; it is written last."""
        return self.path / "metadata" / "timestamp.json"

    @property
    def staged(self) -> Path:
        """The folder of what is not signed yet."""
        return self.path / ".staged"

    def role(self, role: str, version: int) -> Path:
        """The file of one version of root, targets or snapshot."""
        return self.path / "metadata" / f"{version}.{role}.json"

    def target(self, url_path: str) -> Path:
        """The file of a target, by its place below ``targets/``."""
        return self.path / "targets" / url_path

    def put(self, path: Path, data: bytes) -> None:
        """Write a file, with the folders that it needs. Raises Transient for the disk."""
        make_folder(path.parent)
        self.write(path, data)


@dataclass(frozen=True, slots=True)
class State:
    """The signed state of a repository, each signature verified; expiry is not looked at."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]


def make_folder(path: Path, mode: int = 0o755) -> None:
    """Make a folder and its parents, lastingly. Raises Transient for the disk."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir(mode, exist_ok=True)
    except OSError as error:
        raise storage_error(error, path, 0) from error
    fsync_folder(path.parent)


def load_state(folder: Folder, trusted_root: bytes) -> State:
    """Read and verify what is signed: root chain, timestamp, snapshot, targets.

    A publisher who signs anew what stands in the folder must know that it was he who signed it before.
    Raises Refused: SIGNATURE_INVALID, METADATA_INVALID, TRUST_MISSING (no repository there).
    """
    if not folder.timestamp.is_file():
        raise Refused(
            Reason.TRUST_MISSING,
            f"{folder.path} is no release repository: make one with `edged release init`",
        )
    with translated():
        root = load_root(folder, trusted_root)
        timestamp = _load(Timestamp, folder.timestamp, root)
        snapshot = _load(Snapshot, folder.role(Snapshot.type, timestamp.signed.snapshot_meta.version), root)
        targets = _load(
            Targets, folder.role(Targets.type, snapshot.signed.meta["targets.json"].version), root
        )
    return State(root, targets, snapshot, timestamp)


def load_root(folder: Folder, trusted_root: bytes) -> Metadata[Root]:
    """The newest root, reached from the trusted one step by step (client workflow 5.3).

    Raises the errors of ``tuf.api.exceptions``, and OSError.
    """
    root = Metadata[Root].from_bytes(trusted_root)
    root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
    while (path := folder.role(Root.type, root.signed.version + 1)).exists():
        newer = _load(Root, path, root)
        newer.signed.verify_delegate(Root.type, newer.signed_bytes, newer.signatures)
        root = newer
    return root


def sign_role(metadata: Metadata[T], roots: Iterable[Root], signers: Signers) -> bytes:
    """Sign with every key at hand that one of ``roots`` lists for the role, and return the file's content.

    Raises ``Refused(TRUST_MISSING)`` when the keys at hand do not reach the threshold of each of the roots.
    """
    role = metadata.signed.type
    metadata.signatures.clear()
    for root in roots:
        require_keys(role, root, signers)
        for keyid in root.roles[role].keyids:
            if keyid in signers:
                metadata.sign(signers[keyid], append=True)
    return metadata.to_bytes(JSONSerializer(compact=True, validate=True))


def require_keys(role: str, root: Root, signers: Signers) -> None:
    """Raises ``Refused(TRUST_MISSING)`` when fewer keys of the role are at hand than its threshold."""
    found, needed = keys_at_hand(role, root, signers), root.roles[role].threshold
    if found < needed:
        raise Refused(
            Reason.TRUST_MISSING,
            f"{role} needs {needed} signatures and {found} of its keys are there: where are the others?",
        )


def keys_at_hand(role: str, root: Root, signers: Signers) -> int:
    """How many of the role's keys can sign here."""
    return sum(keyid in signers for keyid in root.roles[role].keyids)


def renew(signed: Signed, now: datetime, lasts: timedelta) -> None:
    """Raise the version by one and let it expire ``lasts`` after ``now``."""
    signed.version += 1
    signed.expires = now.astimezone(UTC) + lasts


def describe(version: int, data: bytes) -> MetaFile:
    """How a parent names a file: version, length and SHA-256, so that no other mix of files is accepted."""
    return MetaFile.from_data(version, data, ["sha256"])


def stamp(timestamp: Timestamp, now: datetime) -> None:
    """Write down when the timestamp is signed."""
    timestamp.unrecognized_fields[ISSUED] = now.astimezone(UTC).isoformat(timespec="seconds")


def _load(kind: type[T], path: Path, root: Metadata[Root]) -> Metadata[T]:
    metadata = Metadata[T].from_bytes(path.read_bytes())
    root.signed.verify_delegate(kind.type, metadata.signed_bytes, metadata.signatures)
    if not isinstance(metadata.signed, kind):
        raise Refused(Reason.METADATA_INVALID, f"{path}: is of type {metadata.signed.type}, not {kind.type}")
    return metadata
