"""The publisher's side: make a release repository, add releases, sign them, renew and rotate keys.

:func:`publish` writes every file durably and the timestamp last, so that a client sees either the old state
or the new one, whenever it looks and wherever the power is cut. Nothing here is needed on a node.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

from tuf.api.metadata import Metadata, Root, Signed, Snapshot, TargetFile, Targets, Timestamp

from edged_firmware.chunks import ChunkIndex, default_chunk_size
from edged_firmware.durable import fsync_folder, storage_error, write_durably
from edged_firmware.errors import Permanent, Reason, Refused
from edged_firmware.facts import (
    FACTS_KEY,
    FlashFacts,
    ImageFormat,
    ParamValue,
    ReleaseFacts,
    ReleaseRef,
    Requirement,
    SignedTarget,
)
from edged_firmware.image import pack
from edged_firmware.keys import create_signer, load_signers
from edged_firmware.repository import (
    ROLES,
    TRUSTED_ROOT,
    Folder,
    Signers,
    State,
    Write,
    describe,
    keys_at_hand,
    load_root,
    load_state,
    make_folder,
    renew,
    require_keys,
    sign_role,
    stamp,
)
from edged_firmware.trust_client import translated

FileFormat = Literal["auto", "bin", "hex", "opaque", "mcuboot"]


@dataclass(frozen=True, slots=True)
class RoleKeys:
    """How many keys a role has, and how many of them must sign."""

    keys: int
    threshold: int


DEFAULT_KEYS: Final[Mapping[str, RoleKeys]] = {
    Root.type: RoleKeys(3, 2),
    Targets.type: RoleKeys(2, 2),
    Snapshot.type: RoleKeys(1, 1),
    Timestamp.type: RoleKeys(1, 1),
}
DEFAULT_EXPIRY: Final[Mapping[str, timedelta]] = {
    Root.type: timedelta(days=365),
    Targets.type: timedelta(days=90),
    Snapshot.type: timedelta(days=7),
    Timestamp.type: timedelta(days=7),
}


#: Signed beside the targets, so that what was withdrawn is not forgotten: highest counter per model, and
#: the digest of each withdrawn image.
_COUNTERS: Final = "edged_counters"
_WITHDRAWN: Final = "edged_withdrawn"


@dataclass(frozen=True, slots=True)
class Draft:
    """What the publisher says about a file; the rest of the facts is found out.

    ``release_counter`` None: one more than the highest of any release for one of the models.
    ``format``: ``auto`` takes the file of flash protocol ``smp`` for an MCUboot image, and one that begins as such where
    neither protocol nor address is named. ``identifies_as`` None: the hash of an MCUboot image in hex, else the version.
    ``base_address``: of a raw binary. ``flash_size_bytes`` None: not checked.
    ``chunk_size_bytes`` None: 4 KiB below 1 MiB, else 64 KiB.
    """

    name: str
    version: str
    models: tuple[str, ...]
    hardware_ids: tuple[str, ...] = ()
    release_counter: int | None = None
    allow_lower_counter: bool = False
    requires: tuple[Requirement, ...] = ()
    protocol: str | None = None
    params: Mapping[str, ParamValue] = field(default_factory=dict, hash=False)
    identifies_as: str | None = None
    format: FileFormat = "auto"
    base_address: int = 0
    flash_size_bytes: int | None = None
    chunk_size_bytes: int | None = None

    @property
    def ref(self) -> ReleaseRef:
        """Name and version as one value."""
        return ReleaseRef(self.name, self.version)


ReleaseStatus = Literal["published", "staged", "withdrawing"]


@dataclass(frozen=True, slots=True)
class ListedRelease:
    """One line of :func:`list_releases`. ``size_bytes`` and ``sha256`` are the image's."""

    ref: ReleaseRef
    status: ReleaseStatus
    models: tuple[str, ...]
    release_counter: int
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, object]:
        """A JSON object with one key per field."""
        return {
            "release": str(self.ref),
            "status": self.status,
            "models": list(self.models),
            "release_counter": self.release_counter,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
        }


@dataclass(frozen=True, slots=True)
class Published:
    """What :func:`publish` signed: releases added and withdrawn; version and expiry of each role."""

    added: tuple[ReleaseRef, ...]
    withdrawn: tuple[ReleaseRef, ...]
    signed_roles: tuple[str, ...]
    versions: Mapping[str, int]
    expires: Mapping[str, datetime]

    def to_json(self) -> dict[str, object]:
        """A JSON object with one key per field; times in ISO 8601."""
        return {
            "added": [str(ref) for ref in self.added],
            "withdrawn": [str(ref) for ref in self.withdrawn],
            "signed_roles": list(self.signed_roles),
            "versions": dict(self.versions),
            "expires": {role: time.isoformat() for role, time in self.expires.items()},
        }


def init(
    repo_dir: Path,
    keys_dir: Path,
    now: datetime,
    *,
    role_keys: Mapping[str, RoleKeys] = DEFAULT_KEYS,
    expiry: Mapping[str, timedelta] = DEFAULT_EXPIRY,
    password: bytes | None = None,
    write: Write = write_durably,
) -> Path:
    """Make keys and an empty, signed repository. Returns the root metadata that nodes are to trust.

    Raises ``Permanent(CONFIG_INVALID)`` when there is one already, when the keys would lie in it, or when a
    threshold cannot be reached; Transient for the disk.
    """
    folder = Folder(repo_dir, write)
    _check_init(folder, keys_dir, role_keys)
    make_folder(keys_dir, 0o700)
    signers = {
        role: [create_signer(keys_dir, role, password) for _ in range(role_keys[role].keys)] for role in ROLES
    }
    root = Root(consistent_snapshot=True)
    for role, its_signers in signers.items():
        for signer in its_signers:
            root.add_key(signer.public_key, role)
        root.roles[role].threshold = role_keys[role].threshold
    by_id = {signer.public_key.keyid: signer for its in signers.values() for signer in its}
    state = _empty_state(root)
    renew(root, now, expiry[Root.type])
    content = sign_role(Metadata(root), [root], by_id)
    folder.put(folder.role(Root.type, 1), content)
    write_durably(keys_dir / TRUSTED_ROOT, content)
    _sign_from(Targets.type, folder, state, by_id, now, expiry)
    return folder.role(Root.type, 1)


def add(repo_dir: Path, file: Path, draft: Draft, *, write: Write = write_durably) -> ListedRelease:
    """Put a firmware file into the repository, to be signed by the next :func:`publish`.

    The same file with the same facts may be added again, which undoes a :func:`remove`.

    Raises Refused: FACTS_INVALID (a field at fault, or the version exists with other content), COUNTER_LOWER,
    IMAGE_INVALID, IMAGE_TOO_LARGE. Raises ``Permanent(CONFIG_INVALID)`` when the file cannot be read, and
    Transient for the disk.
    """
    folder = Folder(repo_dir, write)
    known = _known(folder)
    source = _read_source(file)
    image, kind, identifies_as = _convert(file, source, draft)
    facts = _facts(replace(draft, identifies_as=draft.identifies_as or identifies_as), known, source, kind)
    chunks = ChunkIndex.build(image, draft.chunk_size_bytes or default_chunk_size(len(image))).encode()
    targets = {
        facts.ref.image_path: _target(facts.ref.image_path, image, facts.to_custom()),
        facts.ref.index_path: _target(facts.ref.index_path, chunks),
    }
    _check_new(facts.ref, targets, known)
    if facts.ref.image_path in known.published:
        _delete(_staged_file(folder, facts.ref))
        return _listed(known.published[facts.ref.image_path], "published")
    for path, data in ((facts.ref.image_path, image), (facts.ref.index_path, chunks)):
        folder.put(folder.target(_signed(targets[path]).url_path), data)
    _stage(folder, facts.ref, {"targets": {path: target.to_dict() for path, target in targets.items()}})
    return _listed(targets[facts.ref.image_path], "staged")


def remove(repo_dir: Path, ref: ReleaseRef, *, write: Write = write_durably) -> ReleaseStatus | None:
    """Undo an :func:`add`, or withdraw a published release with the next :func:`publish`.

    Returns the release's new status; None when it is gone. A withdrawn version never comes back with other
    content, and its counter is not given out again. Raises ``Refused(RELEASE_UNKNOWN)``, and Transient for
    the disk.
    """
    folder = Folder(repo_dir, write)
    known = _known(folder)
    if ref.image_path in known.published:
        _stage(folder, ref, {"withdraw": [ref.image_path, ref.index_path]})
        return "withdrawing"
    if ref.image_path not in known.staged:
        raise Refused(Reason.RELEASE_UNKNOWN, f"{ref} is not in {repo_dir}")
    staged = [known.staged[path] for path in (ref.image_path, ref.index_path)]
    _delete(_staged_file(folder, ref))
    for target in staged:
        _delete(folder.target(_signed(target).url_path))
    return None


def list_releases(repo_dir: Path) -> tuple[ListedRelease, ...]:
    """All releases, published and staged, by name and version. Signatures are not verified."""
    known = _known(Folder(repo_dir))
    published: Iterator[tuple[TargetFile, ReleaseStatus]] = (
        (target, "withdrawing" if path in known.withdrawing else "published")
        for path, target in known.published.items()
    )
    staged: Iterator[tuple[TargetFile, ReleaseStatus]] = (
        (target, "staged") for target in known.staged.values()
    )
    lines = [
        _listed(target, status)
        for group in (published, staged)
        for target, status in group
        if _is_image(target)
    ]
    return tuple(sorted(lines, key=lambda line: line.ref))


def publish(
    repo_dir: Path,
    keys_dirs: Sequence[Path],
    now: datetime,
    *,
    expiry: Mapping[str, timedelta] = DEFAULT_EXPIRY,
    password: bytes | None = None,
    write: Write = write_durably,
) -> Published:
    """Sign what is staged, and renew what expires: targets, snapshot, then timestamp.

    With nothing staged the targets are signed anew only if their keys are at hand, so that a machine that has
    nothing but the keys of snapshot and timestamp can keep a repository fresh.

    Raises Refused: TRUST_MISSING (keys), SIGNATURE_INVALID and METADATA_INVALID (the folder holds what was
    not signed with these keys), METADATA_EXPIRED (root), HASH_MISMATCH (a staged file was changed). Raises
    Transient for the disk.
    """
    folder = Folder(repo_dir, write)
    signers = load_signers(keys_dirs, password)
    state = load_state(folder, _trusted_root(keys_dirs))
    root = state.root.signed
    if root.is_expired(now):
        raise Refused(
            Reason.METADATA_EXPIRED,
            f"root version {root.version} expired at {root.expires.isoformat()}: `edged release renew-root`",
        )
    staged = _load_staged(folder)
    _merge(folder, state.targets.signed, staged)
    first = Snapshot.type
    if staged or keys_at_hand(Targets.type, root, signers) >= root.roles[Targets.type].threshold:
        first = Targets.type
    signed_roles = _sign_from(first, folder, state, signers, now, expiry)
    _clear(folder, staged, state.targets.signed)
    return _published(state, staged, signed_roles)


def renew_root(
    repo_dir: Path,
    keys_dirs: Sequence[Path],
    now: datetime,
    *,
    rotate: Iterable[str] = (),
    expiry: Mapping[str, timedelta] = DEFAULT_EXPIRY,
    password: bytes | None = None,
    write: Write = write_durably,
) -> Published:
    """Sign root N+1 with N's keys and its own, with a new expiry; give the roles in ``rotate`` new keys.

    New keys go to the first of ``keys_dirs``. A role other than root is rotated in two steps, so that no
    client is ever without a valid state: a root with its old and new keys, everything signed with both, then
    a root with the new keys alone. Only then is a thief of the old key locked out, and only then do clients
    forget versions that he signed (client workflow 5.3.11).

    Raises as :func:`publish`, and ``Permanent(CONFIG_INVALID)`` for a role that there is not.
    """
    folder = Folder(repo_dir, write)
    names = tuple(dict.fromkeys(rotate))
    if unknown := set(names) - set(ROLES):
        raise Permanent(
            Reason.CONFIG_INVALID, f"{', '.join(sorted(unknown))}: the roles are {', '.join(ROLES)}"
        )
    state = load_state(folder, _trusted_root(keys_dirs))
    old = state.root.signed
    _require_rotation_keys(names, old, load_signers(keys_dirs, password))
    outgoing = {role: tuple(old.roles[role].keyids) for role in names}
    fresh = {
        role: [create_signer(keys_dirs[0], role, password).public_key for _ in outgoing[role]]
        for role in names
    }
    signers = load_signers(keys_dirs, password)
    both = copy.deepcopy(old)
    for role, its_keys in fresh.items():
        for key in its_keys:
            both.add_key(key, role)
    _revoke(both, {role: keyids for role, keyids in outgoing.items() if role == Root.type})
    _write_root(folder, both, old, signers, now, expiry)
    online = {role: keyids for role, keyids in outgoing.items() if role != Root.type}
    signed_roles: tuple[str, ...] = (Root.type,)
    if online:
        state = load_state(folder, _trusted_root(keys_dirs))
        signed_roles += _sign_from(Targets.type, folder, state, signers, now, expiry)
        only_new = copy.deepcopy(both)
        _revoke(only_new, online)
        _write_root(folder, only_new, both, signers, now, expiry)
    _keep_trusted_root(folder, keys_dirs)
    return _published(load_state(folder, _trusted_root(keys_dirs)), (), signed_roles)


@dataclass(frozen=True, slots=True)
class _Staged:
    """One file of ``.staged``: targets to add, or names of targets to withdraw."""

    path: Path
    targets: Mapping[str, TargetFile]
    withdraw: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """What the repository holds, unverified: for default values and for lists."""

    published: Mapping[str, TargetFile]
    staged: Mapping[str, TargetFile]
    withdrawing: frozenset[str]
    counters: Mapping[str, int]
    withdrawn: Mapping[str, str]


def _check_init(folder: Folder, keys_dir: Path, role_keys: Mapping[str, RoleKeys]) -> None:
    if folder.timestamp.exists():
        raise Permanent(Reason.CONFIG_INVALID, f"{folder.path} is a release repository already")
    if keys_dir.resolve().is_relative_to(folder.path.resolve()):
        raise Permanent(
            Reason.CONFIG_INVALID, f"{keys_dir} is inside the repository, whose files everybody may read"
        )
    for role, want in role_keys.items():
        if not 1 <= want.threshold <= want.keys:
            raise Permanent(
                Reason.CONFIG_INVALID,
                f"{role}: a threshold of {want.threshold} does not fit {want.keys} keys",
            )


def _empty_state(root: Root) -> State:
    state = State(Metadata(root), Metadata(Targets()), Metadata(Snapshot()), Metadata(Timestamp()))
    for metadata in (state.root, state.targets, state.snapshot, state.timestamp):
        # Signing raises the version by one, and the first is 1.
        metadata.signed.version = 0
    return state


def _sign_from(
    first: str, folder: Folder, state: State, signers: Signers, now: datetime, expiry: Mapping[str, timedelta]
) -> tuple[str, ...]:
    """Sign and write ``first`` and the roles that name it; all keys are checked before the first write.

    ``state`` is changed in place.
    """
    roles = (Targets.type, Snapshot.type, Timestamp.type) if first == Targets.type else ROLES[2:]
    root, snapshot, timestamp = state.root.signed, state.snapshot.signed, state.timestamp.signed
    for role in roles:
        require_keys(role, root, signers)
    if first == Targets.type:
        renew(state.targets.signed, now, expiry[Targets.type])
        data = sign_role(state.targets, [root], signers)
        snapshot.meta["targets.json"] = describe(state.targets.signed.version, data)
        folder.put(folder.role(Targets.type, state.targets.signed.version), data)
    renew(snapshot, now, expiry[Snapshot.type])
    data = sign_role(state.snapshot, [root], signers)
    timestamp.snapshot_meta = describe(snapshot.version, data)
    folder.put(folder.role(Snapshot.type, snapshot.version), data)
    renew(timestamp, now, expiry[Timestamp.type])
    stamp(timestamp, now)
    folder.put(folder.timestamp, sign_role(state.timestamp, [root], signers))
    return roles


def _write_root(
    folder: Folder, new: Root, old: Root, signers: Signers, now: datetime, expiry: Mapping[str, timedelta]
) -> None:
    renew(new, now, expiry[Root.type])
    folder.put(folder.role(Root.type, new.version), sign_role(Metadata(new), [old, new], signers))


def _require_rotation_keys(names: Iterable[str], root: Root, signers: Signers) -> None:
    """Fail before new keys are made. The first step of a rotation signs all roles."""
    for role in ROLES if set(names) - {Root.type} else (Root.type,):
        require_keys(role, root, signers)


def _revoke(root: Root, outgoing: Mapping[str, Iterable[str]]) -> None:
    for role, keyids in outgoing.items():
        for keyid in keyids:
            root.revoke_key(keyid, role)


def _published(state: State, staged: Iterable[_Staged], signed_roles: tuple[str, ...]) -> Published:
    signed: dict[str, Signed] = {
        Root.type: state.root.signed,
        Targets.type: state.targets.signed,
        Snapshot.type: state.snapshot.signed,
        Timestamp.type: state.timestamp.signed,
    }
    changes = tuple(staged)
    return Published(
        added=tuple(
            _ref(target) for item in changes for target in item.targets.values() if _is_image(target)
        ),
        withdrawn=tuple(
            _ref_of_path(path) for item in changes for path in item.withdraw if path.endswith("/image")
        ),
        signed_roles=signed_roles,
        versions={role: item.version for role, item in signed.items()},
        expires={role: item.expires for role, item in signed.items()},
    )


def _trusted_root(keys_dirs: Sequence[Path]) -> bytes:
    for path in (folder / TRUSTED_ROOT for folder in keys_dirs):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise Permanent(Reason.CONFIG_INVALID, f"cannot read {path}: {error.strerror}") from error
    raise Refused(
        Reason.TRUST_MISSING,
        f"no {TRUSTED_ROOT} in {', '.join(map(str, keys_dirs))}: name the folder of `edged release init`",
    )


def _keep_trusted_root(folder: Folder, keys_dirs: Sequence[Path]) -> None:
    trusted = _trusted_root(keys_dirs)
    with translated():
        newest = load_root(folder, trusted).signed.version
        content = folder.role(Root.type, newest).read_bytes()
    for keys_dir in keys_dirs:
        if (keys_dir / TRUSTED_ROOT).exists() and content != trusted:
            write_durably(keys_dir / TRUSTED_ROOT, content)


def _read_source(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Permanent(Reason.CONFIG_INVALID, f"cannot read {file}: {error.strerror}") from error


def _convert(file: Path, source: bytes, draft: Draft) -> tuple[bytes, ImageFormat, str | None]:
    """The bytes to sign (the canonical container, or the vendor's file as it is), and by what the device will tell them."""
    if draft.format == "opaque":
        if not source:
            raise Refused(Reason.IMAGE_INVALID, f"{file} is empty")
        return source, "opaque", None
    if _is_mcuboot(source, draft):
        return source, "opaque", _mcuboot_hash(source, draft)
    # On use: the parsers of other formats bring libraries along.
    from edged_firmware.formats import check_fits, load

    try:
        segments = load(file, draft.format, draft.base_address)
    except ValueError as error:
        raise Permanent(Reason.CONFIG_INVALID, str(error)) from error
    if draft.flash_size_bytes is not None:
        check_fits(segments, draft.flash_size_bytes)
    return pack(segments), "segments", None


def _is_mcuboot(source: bytes, draft: Draft) -> bool:
    """Whether the file is an MCUboot image: the draft's format says it, else its protocol; where it names neither of them and
    no address, the file itself."""
    if draft.format != "auto":
        return draft.format == "mcuboot"
    if draft.protocol is not None or draft.base_address:
        return draft.protocol == "smp"
    from edged_firmware.formats import mcuboot

    return mcuboot.looks_like(source)


def _mcuboot_hash(source: bytes, draft: Draft) -> str:
    """The hash that names the image, in hex."""
    from edged_firmware.formats import check_fits, mcuboot

    if draft.flash_size_bytes is not None:
        check_fits([(0, source)], draft.flash_size_bytes)
    return mcuboot.parse(source).hash.hex()


def _facts(draft: Draft, known: _Known, source: bytes, kind: ImageFormat) -> ReleaseFacts:
    facts = ReleaseFacts(
        name=draft.ref.name,
        version=draft.ref.version,
        models=draft.models,
        hardware_ids=draft.hardware_ids,
        release_counter=_counter(draft, known),
        requires=draft.requires,
        flash=FlashFacts(draft.protocol, dict(draft.params)),
        identifies_as=draft.identifies_as or draft.version,
        chunk_index=draft.ref.index_path,
        format=kind,
        source_sha256=hashlib.sha256(source).hexdigest(),
    )
    return ReleaseFacts.from_custom(facts.to_custom())


def _counter(draft: Draft, known: _Known) -> int:
    same = {**known.published, **known.staged}.get(draft.ref.image_path)
    if same is not None:
        return draft.release_counter or _facts_of(same).release_counter
    highest = max((known.counters.get(model, 0) for model in draft.models), default=0)
    if draft.release_counter is None:
        return highest + 1
    if draft.release_counter < highest and not draft.allow_lower_counter:
        raise Refused(
            Reason.COUNTER_LOWER,
            f"release counter {draft.release_counter} is below {highest}, which a release for "
            f"{', '.join(draft.models)} has: devices would refuse it",
        )
    return draft.release_counter


def _check_new(ref: ReleaseRef, targets: Mapping[str, TargetFile], known: _Known) -> None:
    """A version means one content, for ever: nodes may have it already."""
    image = targets[ref.image_path]
    existing = {**known.staged, **known.published}.get(ref.image_path, image)
    withdrawn = known.withdrawn.get(str(ref), image.hashes["sha256"])
    if existing.to_dict() != image.to_dict() or withdrawn != image.hashes["sha256"]:
        raise Refused(
            Reason.FACTS_INVALID,
            f"version: {ref} is there with other content or facts: choose another version, or remove it "
            "first if it was never published",
        )


def _target(path: str, data: bytes, custom: Mapping[str, object] | None = None) -> TargetFile:
    target = TargetFile.from_data(path, data, ["sha256"])
    if custom is not None:
        target.unrecognized_fields["custom"] = dict(custom)
    return target


def _signed(target: TargetFile) -> SignedTarget:
    return SignedTarget(target.path, target.length, target.hashes["sha256"])


def _is_image(target: TargetFile) -> bool:
    return FACTS_KEY in (target.custom or {})


def _facts_of(target: TargetFile) -> ReleaseFacts:
    return ReleaseFacts.from_custom(target.custom or {})


def _ref(target: TargetFile) -> ReleaseRef:
    return _facts_of(target).ref


def _ref_of_path(path: str) -> ReleaseRef:
    name, version, _ = path.split("/")
    return ReleaseRef(name, version)


def _listed(target: TargetFile, status: ReleaseStatus) -> ListedRelease:
    facts = _facts_of(target)
    return ListedRelease(
        facts.ref, status, facts.models, facts.release_counter, target.length, target.hashes["sha256"]
    )


def _known(folder: Folder) -> _Known:
    targets = _newest_targets(folder)
    staged = _load_staged(folder)
    added = {path: target for item in staged for path, target in item.targets.items()}
    return _Known(
        published=targets.targets,
        staged={path: target for path, target in added.items() if path not in targets.targets},
        withdrawing=frozenset(path for item in staged for path in item.withdraw),
        counters=_counters(targets, added.values()),
        withdrawn=targets.unrecognized_fields.get(_WITHDRAWN, {}),
    )


def _newest_targets(folder: Folder) -> Targets:
    if not folder.timestamp.is_file():
        raise Refused(
            Reason.TRUST_MISSING,
            f"{folder.path} is no release repository: make one with `edged release init`",
        )
    with translated():
        timestamp = Metadata[Timestamp].from_file(str(folder.timestamp)).signed
        snapshot_file = folder.role(Snapshot.type, timestamp.snapshot_meta.version)
        snapshot = Metadata[Snapshot].from_file(str(snapshot_file)).signed
        targets_file = folder.role(Targets.type, snapshot.meta["targets.json"].version)
        return Metadata[Targets].from_file(str(targets_file)).signed


def _counters(targets: Targets, added: Iterable[TargetFile]) -> dict[str, int]:
    """Highest counter per model, over all that is or was published and all that is staged."""
    counters: dict[str, int] = dict(targets.unrecognized_fields.get(_COUNTERS, {}))
    for target in (*targets.targets.values(), *added):
        if _is_image(target):
            facts = _facts_of(target)
            for model in facts.models:
                counters[model] = max(counters.get(model, 0), facts.release_counter)
    return counters


def _staged_file(folder: Folder, ref: ReleaseRef) -> Path:
    return folder.staged / f"{ref}.json"


def _stage(folder: Folder, ref: ReleaseRef, change: Mapping[str, object]) -> None:
    folder.put(_staged_file(folder, ref), json.dumps(change, indent=1, sort_keys=True).encode())


def _load_staged(folder: Folder) -> tuple[_Staged, ...]:
    return tuple(_read_staged(path) for path in sorted(folder.staged.glob("*.json")))


def _read_staged(path: Path) -> _Staged:
    try:
        data: dict[str, Any] = json.loads(path.read_bytes())
        targets = {name: TargetFile.from_dict(item, name) for name, item in data.get("targets", {}).items()}
        return _Staged(path, targets, tuple(data.get("withdraw", ())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Permanent(
            Reason.CONFIG_INVALID, f"{path} cannot be read, add the release again: {error}"
        ) from error


def _merge(folder: Folder, targets: Targets, staged: Iterable[_Staged]) -> None:
    """Apply the staged changes to ``targets``."""
    gone: list[TargetFile] = []
    withdrawn: dict[str, str] = dict(targets.unrecognized_fields.get(_WITHDRAWN, {}))
    for item in staged:
        for target in item.targets.values():
            _check_file(folder, target)
        targets.targets.update(item.targets)
        gone += [targets.targets[path] for path in item.withdraw if path in targets.targets]
    targets.unrecognized_fields[_COUNTERS] = _counters(targets, ())
    for target in gone:
        del targets.targets[target.path]
        if _is_image(target):
            withdrawn[str(_ref(target))] = target.hashes["sha256"]
    if withdrawn:
        targets.unrecognized_fields[_WITHDRAWN] = withdrawn


def _check_file(folder: Folder, target: TargetFile) -> None:
    path = folder.target(_signed(target).url_path)
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise Permanent(
            Reason.CONFIG_INVALID, f"cannot read {path}, add the release again: {error}"
        ) from error
    if digest != target.hashes["sha256"]:
        raise Refused(
            Reason.HASH_MISMATCH, f"{path} has changed since it was added: remove it and add it again"
        )


def _clear(folder: Folder, staged: Sequence[_Staged], targets: Targets) -> None:
    """After the timestamp: a cut before or within this leaves staged files for the next publish."""
    kept = {_signed(target).url_path for target in targets.targets.values()}
    for item in staged:
        for path in item.withdraw:
            _delete_versions(folder, path, kept)
        _delete(item.path)


def _delete_versions(folder: Folder, path: str, kept: Collection[str]) -> None:
    """Delete the files of the target ``path`` but for those that are still signed."""
    parent, _, name = path.rpartition("/")
    for file in folder.target(parent).glob(f"*.{name}"):
        if f"{parent}/{file.name}" not in kept:
            _delete(file)


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, path, 0) from error
    if path.parent.is_dir():
        fsync_folder(path.parent)
