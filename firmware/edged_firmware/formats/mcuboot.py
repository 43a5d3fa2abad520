"""Images for the boot loader MCUboot: header, TLV areas, hash (MCUboot ``docs/design.md``, "Image format").

Reads what ``imgtool sign`` made, so that what the device would refuse is refused here. Signatures are not looked at: the
public key is in the device. A trailer (``imgtool --pad``, ``--confirm``) is refused, because a device that is given
one boots the image without a trial.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from edged_firmware.errors import Reason, Refused

HEADER_BYTES: Final = 32

_HEADER: Final = struct.Struct("<IIHHIIBBHII")
_MAGIC: Final = 0x96F3B83D
_TLV_HEAD: Final = struct.Struct("<HH")
_TLV_MAGIC: Final = 0x6907
_PROTECTED_TLV_MAGIC: Final = 0x6908

_NON_BOOTABLE: Final = 0x10
_ENCRYPTED: Final = 0x04 | 0x08
_COMPRESSED: Final = 0x200 | 0x400

_KEY_HASH: Final = 0x01
_HASHES: Final[dict[int, str]] = {0x10: "sha256", 0x11: "sha384", 0x12: "sha512"}
_SIGNATURES: Final[dict[int, str]] = {
    0x20: "RSA-2048",
    0x21: "ECDSA-224",
    0x22: "ECDSA",
    0x23: "RSA-3072",
    0x24: "Ed25519",
}


class Digest(Protocol):
    """A hash object of :mod:`hashlib`."""

    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class McubootHeader:
    """The header (``struct image_header``). Offsets and lengths in bytes from the start of the file.

    ``version``: ``MAJOR.MINOR.REVISION``, with ``.BUILD`` where that is not 0, as the SMP server of Zephyr writes it.
    ``signed_bytes``: header, body and protected TLVs, over which the hash goes; the other TLVs follow.
    """

    version: str
    signed_bytes: int
    protected_bytes: int
    encrypted: bool


@dataclass(frozen=True, slots=True)
class McubootImage:
    """What an image says of itself. ``hash`` names it: the device tells it in its image state.

    ``hash_name``: as :mod:`hashlib` calls it. ``signature`` None: not signed. ``key_hash``: SHA-256 of the public key.
    """

    header: McubootHeader
    hash: bytes
    hash_name: str
    signature: str | None
    key_hash: bytes | None

    @property
    def version(self) -> str:
        return self.header.version

    def new_digest(self) -> Digest:
        """To be fed the first ``header.signed_bytes`` of the file; then it is for :meth:`check`."""
        return hashlib.new(self.hash_name)

    def check(self, digest: Digest) -> None:
        """Raises Refused(HASH_MISMATCH) where the bytes that ``digest`` was fed are not those that were hashed.

        An encrypted image passes: its hash is over the plain text, which only the device sees.
        """
        if not self.header.encrypted and digest.digest() != self.hash:
            raise Refused(
                Reason.HASH_MISMATCH,
                f"MCUboot image: header and body have the {self.hash_name} {digest.digest().hex()}, "
                f"the image says {self.hash.hex()}",
            )


def looks_like(head: bytes) -> bool:
    """True where ``head``, the first bytes of a file, begins as an MCUboot image does."""
    return len(head) >= 4 and int.from_bytes(head[:4], "little") == _MAGIC


def parse(data: bytes) -> McubootImage:
    """The image that is the whole of ``data``, with its hash checked.

    Raises Refused(IMAGE_INVALID), Refused(HASH_MISMATCH).
    """
    header = parse_header(data[:HEADER_BYTES], len(data))
    image = parse_tlvs(header, data[header.signed_bytes - header.protected_bytes :])
    digest = image.new_digest()
    digest.update(data[: header.signed_bytes])
    image.check(digest)
    return image


def parse_header(head: bytes, file_bytes: int) -> McubootHeader:
    """The header of an image in a file of ``file_bytes``; ``head`` are its first 32. Raises Refused(IMAGE_INVALID)."""
    if len(head) < HEADER_BYTES:
        raise _invalid(f"{len(head)} bytes are too short for a header of {HEADER_BYTES}")
    magic, _, header_bytes, protected, body, flags, major, minor, revision, build, _ = _HEADER.unpack(
        head[:HEADER_BYTES]
    )
    if magic != _MAGIC:
        raise _invalid(f"it begins with {magic:#010x}, not {_MAGIC:#010x}: was it signed with imgtool?")
    if flags & _NON_BOOTABLE:
        raise _invalid("its flags say that it cannot be booted")
    if flags & _COMPRESSED:
        raise _invalid("it is compressed: once it runs, the device tells another hash, and it cannot go back")
    signed = header_bytes + body + protected
    if header_bytes < HEADER_BYTES or signed + _TLV_HEAD.size > file_bytes:
        raise _invalid(
            f"header ({header_bytes}), body ({body}) and protected TLVs ({protected}) do not fit into {file_bytes} bytes"
        )
    version = f"{major}.{minor}.{revision}" + (f".{build}" if build else "")
    return McubootHeader(version, signed, protected, bool(flags & _ENCRYPTED))


def parse_tlvs(header: McubootHeader, tail: bytes) -> McubootImage:
    """The image with the TLVs in ``tail``: the rest of the file from its protected TLVs on. Raises Refused(IMAGE_INVALID)."""
    protected, rest = tail[: header.protected_bytes], tail[header.protected_bytes :]
    tlvs = _area(protected, _PROTECTED_TLV_MAGIC) if protected else []
    tlvs += _area(rest, _TLV_MAGIC)
    name, digest = _only_hash([(_HASHES[kind], value) for kind, value in tlvs if kind in _HASHES])
    found = dict(tlvs)
    return McubootImage(header, digest, name, _signature(found), found.get(_KEY_HASH))


def _only_hash(hashes: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Of several, a device tells the kind that it was built for, which nobody knows here."""
    if len(hashes) != 1:
        raise _invalid("it has two hashes" if hashes else "it has no hash")
    name, digest = hashes[0]
    if len(digest) != hashlib.new(name).digest_size:
        raise _invalid(f"its {name} has {len(digest)} bytes")
    return name, digest


def _signature(found: Mapping[int, bytes]) -> str | None:
    return next((name for kind, name in _SIGNATURES.items() if kind in found), None)


def _area(area: bytes, magic: int) -> list[tuple[int, bytes]]:
    """The TLVs of one area, which fills ``area``: type (16 bits) and value."""
    if len(area) < _TLV_HEAD.size:
        raise _invalid(f"{len(area)} bytes are too short for a TLV area")
    found_magic, total = _TLV_HEAD.unpack_from(area)
    if found_magic != magic:
        raise _invalid(f"a TLV area begins with {found_magic:#06x}, not {magic:#06x}")
    if total > len(area):
        raise _invalid(f"a TLV area of {total} bytes is cut after {len(area)}")
    if total < len(area):
        raise _invalid(
            f"{len(area) - total} bytes follow its end: give the file that imgtool makes without --pad and --confirm"
        )
    found: list[tuple[int, bytes]] = []
    at = _TLV_HEAD.size
    while at < total:
        if at + _TLV_HEAD.size > total:
            raise _invalid("a TLV is cut in its head")
        kind, length = _TLV_HEAD.unpack_from(area, at)
        at += _TLV_HEAD.size
        if at + length > total:
            raise _invalid(f"TLV {kind:#x} of {length} bytes goes beyond its area")
        found.append((kind, area[at : at + length]))
        at += length
    return found


def _invalid(text: str) -> Refused:
    return Refused(Reason.IMAGE_INVALID, f"MCUboot image: {text}")
