"""The signed facts of a release, and the record of a release whose signatures were verified.

The facts stand in the ``custom`` field of the TUF target of the image (TUF specification 4.5), under the key
``"edged"``. They are only as good as the signature over them: this module reads and checks their shape, and
decides nothing about trust.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Self, cast

from edged_firmware.errors import Reason, Refused

FACTS_KEY: Final = "edged"
FACTS_VERSION: Final = 1

#: SQLite's INTEGER and a TPM's NV counter both end there.
COUNTER_MAX: Final = 2**63 - 1

ImageFormat = Literal["segments", "opaque"]
#: A floating-point number is left out on purpose: canonical JSON, over which TUF signs, has none.
ParamValue = str | int | bool

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~_-]{0,63}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~_:-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"[A-Za-z0-9.+~_/-]{1,255}")
_TEXT = re.compile(r"[\x20-\x7e]{1,128}")


@dataclass(frozen=True, slots=True, order=True)
class ReleaseRef:
    """A release by name and version, written ``NAME@VERSION``.

    Raises ``Refused(FACTS_INVALID)`` when either part has a character or a length that is not allowed;
    neither part can lead out of a folder.
    """

    name: str
    version: str

    def __post_init__(self) -> None:
        _match(_NAME, self.name, "name")
        _match(_VERSION, self.version, "version")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``NAME@VERSION``. Raises ``Refused(FACTS_INVALID)``."""
        name, at, version = text.partition("@")
        if not at:
            raise Refused(Reason.FACTS_INVALID, f"{text!r} is not a release: write NAME@VERSION")
        return cls(name, version)

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def image_path(self) -> str:
        """Name of the image's TUF target."""
        return f"{self.name}/{self.version}/image"

    @property
    def index_path(self) -> str:
        """Name of the chunk index's TUF target, where the publisher chose no other."""
        return f"{self.name}/{self.version}/chunks"


@dataclass(frozen=True, slots=True)
class Requirement:
    """Another component of the same device must run a release with at least this counter."""

    component: str
    counter: int


@dataclass(frozen=True, slots=True)
class FlashFacts:
    """How the image is to be flashed.

    ``protocol`` None: whatever the device's mapper speaks. ``params`` are the protocol's own: names to
    strings, integers or booleans.
    """

    protocol: str | None = None
    params: Mapping[str, ParamValue] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class ReleaseFacts:
    """What the publisher signed about one release.

    - ``release_counter``: 1 or more; a device never goes to a lower one.
    - ``identifies_as``: what the device answers when this release runs.
    - ``chunk_index``: name of the TUF target that holds the chunk index of the image.
    - ``format``: ``"segments"`` for the canonical container, ``"opaque"`` for the vendor's file unchanged.
    - ``source_sha256``: hex digest of the vendor's file.
    """

    name: str
    version: str
    models: tuple[str, ...]
    hardware_ids: tuple[str, ...]
    release_counter: int
    requires: tuple[Requirement, ...]
    flash: FlashFacts
    identifies_as: str
    chunk_index: str
    format: ImageFormat
    source_sha256: str

    @property
    def ref(self) -> ReleaseRef:
        """Name and version as one value."""
        return ReleaseRef(self.name, self.version)

    @classmethod
    def from_custom(cls, custom: Mapping[str, object]) -> Self:
        """Read the facts out of a target's ``custom`` (the mapping that has the key ``"edged"``).

        Keys that this version does not know are left alone, so that a later publisher may add some; a
        ``facts_version`` other than 1 is refused, because its known keys may mean something else.

        Raises ``Refused(FACTS_INVALID)`` with the name of the field at fault.
        """
        facts = _mapping(custom.get(FACTS_KEY), FACTS_KEY)
        if facts.get("facts_version") != FACTS_VERSION or isinstance(facts["facts_version"], bool):
            raise _bad("facts_version", f"must be {FACTS_VERSION}, is {facts.get('facts_version')!r}")
        ref = ReleaseRef(_string(facts, "name"), _string(facts, "version"))
        return cls(
            name=ref.name,
            version=ref.version,
            models=_texts(facts, "models", _MODEL, least=1),
            hardware_ids=_texts(facts, "hardware_ids", _TEXT, least=0),
            release_counter=_counter(facts.get("release_counter"), "release_counter"),
            requires=_requires(facts.get("requires", [])),
            flash=_flash(facts.get("flash", {})),
            identifies_as=_match(_TEXT, facts.get("identifies_as", ref.version), "identifies_as"),
            chunk_index=_target_path(facts.get("chunk_index"), "chunk_index"),
            format=_format(facts.get("format")),
            source_sha256=_match(_SHA256, facts.get("source_sha256"), "source_sha256"),
        )

    def to_custom(self) -> dict[str, object]:
        """The ``custom`` mapping to sign; the inverse of :meth:`from_custom`."""
        return {
            FACTS_KEY: {
                "facts_version": FACTS_VERSION,
                "name": self.name,
                "version": self.version,
                "models": list(self.models),
                "hardware_ids": list(self.hardware_ids),
                "release_counter": self.release_counter,
                "requires": [{"component": r.component, "counter": r.counter} for r in self.requires],
                "flash": {"protocol": self.flash.protocol, "params": dict(self.flash.params)},
                "identifies_as": self.identifies_as,
                "chunk_index": self.chunk_index,
                "format": self.format,
                "source_sha256": self.source_sha256,
            }
        }


@dataclass(frozen=True, slots=True)
class SignedTarget:
    """A TUF target as signed: its name, length in bytes and SHA-256 in hex."""

    path: str
    length: int
    sha256: str

    def __post_init__(self) -> None:
        _target_path(self.path, "path")
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 0:
            raise _bad("length", f"must be 0 or more, is {self.length!r}")
        _match(_SHA256, self.sha256, "sha256")

    @property
    def url_path(self) -> str:
        """Where the file stands below ``targets/`` (TUF specification 6.2: consistent snapshots)."""
        folder, slash, name = self.path.rpartition("/")
        return f"{folder}{slash}{self.sha256}.{name}"

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        """Inverse of :meth:`to_json`. Raises ``Refused(FACTS_INVALID)``."""
        return cls(_string(data, "path"), cast(int, data.get("length")), _string(data, "sha256"))

    def to_json(self) -> dict[str, object]:
        """A JSON object with the three fields."""
        return {"path": self.path, "length": self.length, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class VerifiedRelease:
    """A release whose signatures were verified: its facts, its image and its chunk index.

    Only ``trust.verify`` makes one from metadata; the daemon keeps it as JSON on the job's row.
    """

    facts: ReleaseFacts
    image: SignedTarget
    index: SignedTarget

    @property
    def ref(self) -> ReleaseRef:
        """Name and version as one value."""
        return self.facts.ref

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Self:
        """Inverse of :meth:`to_json`. Raises ``Refused(FACTS_INVALID)`` naming the field."""
        return cls(
            facts=ReleaseFacts.from_custom(_mapping(data.get("facts"), "facts")),
            image=SignedTarget.from_json(_mapping(data.get("image"), "image")),
            index=SignedTarget.from_json(_mapping(data.get("index"), "index")),
        )

    def to_json(self) -> dict[str, object]:
        """``{"facts": custom, "image": {path, length, sha256}, "index": {path, length, sha256}}``."""
        return {"facts": self.facts.to_custom(), "image": self.image.to_json(), "index": self.index.to_json()}


def _bad(name: str, why: str) -> Refused:
    return Refused(Reason.FACTS_INVALID, f"{name}: {why}")


def _match(pattern: re.Pattern[str], value: object, name: str) -> str:
    if not isinstance(value, str) or pattern.fullmatch(value) is None:
        raise _bad(name, f"{_shown(value)} does not match {pattern.pattern}")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _mapping(value: object, name: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _bad(name, f"must be an object, is {_shown(value)}")
    return cast(Mapping[str, object], value)


def _string(data: Mapping[str, object], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise _bad(name, f"must be a string, is {_shown(value)}")
    return value


def _list(value: object, name: str) -> Sequence[object]:
    if not isinstance(value, list | tuple):
        raise _bad(name, f"must be a list, is {_shown(value)}")
    return value


def _texts(data: Mapping[str, object], name: str, pattern: re.Pattern[str], *, least: int) -> tuple[str, ...]:
    values = _list(data.get(name, []), name)
    if len(values) < least:
        raise _bad(name, f"must have at least {least}")
    return tuple(_match(pattern, value, f"{name}[{i}]") for i, value in enumerate(values))


def _counter(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= COUNTER_MAX:
        raise _bad(name, f"must be an integer from 1, is {_shown(value)}")
    return value


def _requires(value: object) -> tuple[Requirement, ...]:
    return tuple(_requirement(item, f"requires[{i}]") for i, item in enumerate(_list(value, "requires")))


def _requirement(value: object, name: str) -> Requirement:
    item = _mapping(value, name)
    return Requirement(
        component=_match(_NAME, item.get("component"), f"{name}.component"),
        counter=_counter(item.get("counter"), f"{name}.counter"),
    )


def _flash(value: object) -> FlashFacts:
    flash = _mapping(value, "flash")
    protocol = flash.get("protocol")
    return FlashFacts(
        protocol=None if protocol is None else _match(_NAME, protocol, "flash.protocol"),
        params=_params(_mapping(flash.get("params", {}), "flash.params")),
    )


def _params(params: Mapping[str, object]) -> dict[str, ParamValue]:
    for name, value in params.items():
        if not isinstance(value, str | int):
            raise _bad(
                f"flash.params.{name}", f"must be a string, an integer or a boolean, is {_shown(value)}"
            )
    return cast(dict[str, ParamValue], dict(params))


def _target_path(value: object, name: str) -> str:
    text = _match(_PATH, value, name)
    if any(part in ("", ".", "..") for part in text.split("/")):
        raise _bad(name, f"{_shown(value)} is not the name of a target")
    return text


def _format(value: object) -> ImageFormat:
    if value not in ("segments", "opaque"):
        raise _bad("format", f'must be "segments" or "opaque", is {_shown(value)}')
    return value
