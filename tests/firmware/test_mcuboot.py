"""Images for MCUboot: what is sound, and every way in which one is not."""

from __future__ import annotations

import hashlib
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from engine_kit import Publisher, write_quickly
from hypothesis import given
from hypothesis import strategies as st

from edged_firmware import release
from edged_firmware.errors import Permanent, Reason, Refused
from edged_firmware.formats import mcuboot

BODY = bytes(range(256)) * 4


def image(
    *,
    magic: int = 0x96F3B83D,
    head: int = 32,
    body: bytes = BODY,
    flags: int = 0,
    version: tuple[int, int, int, int] = (1, 2, 3, 0),
    protected: bytes = b"",
    tlvs: bytes | None = None,
    hashing: str = "sha256",
) -> bytes:
    """An image, by the letter of MCUboot's design document."""
    area = struct.pack("<HH", 0x6908, len(protected) + 4) + protected if protected else b""
    header = struct.pack("<IIHHIIBBHII", magic, 0, head, len(area), len(body), flags, *version, 0)
    signed = header.ljust(head, b"\0") + body + area
    if tlvs is None:
        kind = {"sha256": 0x10, "sha384": 0x11, "sha512": 0x12}[hashing]
        tlvs = tlv(kind, hashlib.new(hashing, signed).digest())
    return signed + struct.pack("<HH", 0x6907, len(tlvs) + 4) + tlvs


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("<HH", kind, len(value)) + value


def refused(data: bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        mcuboot.parse(data)
    return caught.value


@pytest.mark.parametrize("hashing", ["sha256", "sha384", "sha512"])
@pytest.mark.parametrize("protected", [b"", tlv(0x50, b"\1\2\3\4")])
def test_a_sound_image(hashing: str, protected: bytes) -> None:
    data = image(head=512, protected=protected, hashing=hashing)
    found = mcuboot.parse(data)
    assert (found.version, found.hash_name, found.signature) == ("1.2.3", hashing, None)
    assert found.hash == hashlib.new(hashing, data[: found.header.signed_bytes]).digest()
    assert mcuboot.looks_like(data) and not mcuboot.looks_like(data[1:]) and not mcuboot.looks_like(b"")


def test_who_signed_it_is_told() -> None:
    plain = image(version=(1, 0, 0, 7))
    tail = (
        tlv(0x10, hashlib.sha256(plain[: 32 + len(BODY)]).digest())
        + tlv(0x01, b"k" * 32)
        + tlv(0x24, bytes(64))
    )
    found = mcuboot.parse(image(version=(1, 0, 0, 7), tlvs=tail))
    assert (found.version, found.signature, found.key_hash) == ("1.0.0.7", "Ed25519", b"k" * 32)


def test_one_flipped_bit_in_what_is_hashed_is_found() -> None:
    data = image()
    for at in (4, 20, 32, 32 + len(BODY) - 1):
        damaged = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        error = refused(damaged)
        assert error.reason is Reason.HASH_MISMATCH, at
    assert "sha256" in error.detail


def test_the_hash_of_an_encrypted_image_is_the_device_s_to_check() -> None:
    data = image(flags=0x04, tlvs=tlv(0x10, bytes(32)))
    assert mcuboot.parse(data).header.encrypted


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "0 bytes are too short"),
        (image()[:31], "31 bytes are too short"),
        (image(magic=0x464C457F), "it begins with 0x464c457f"),
        (image(flags=0x10), "cannot be booted"),
        (image(head=16), "do not fit"),
        (image()[: 32 + len(BODY)], "do not fit"),
        (image()[:-1], "is cut after"),
        (image() + b"\xff" * 64, "64 bytes follow its end"),
        (image(tlvs=b""), "it has no hash"),
        (image(tlvs=tlv(0x10, bytes(31))), "its sha256 has 31 bytes"),
        (image(tlvs=tlv(0x10, bytes(32)) * 2), "two hashes"),
        (image(tlvs=tlv(0x12, bytes(64)) + tlv(0x10, bytes(32))), "two hashes"),
        (image(protected=tlv(0x10, bytes(32))), "two hashes"),
        (image(flags=0x200), "compressed"),
        (image(flags=0x400 | 0x800), "compressed"),
        (image(tlvs=tlv(0x10, bytes(32)) + b"\0"), "cut in its head"),
        (image(tlvs=struct.pack("<HH", 0x10, 500)), "beyond its area"),
        (image()[: 32 + len(BODY)] + bytes(40), "begins with 0x0000"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, text: str) -> None:
    error = refused(data)
    assert error.reason is Reason.IMAGE_INVALID and text in error.detail


@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    for begin in (b"", image()[:32], image()[:12]):
        assert refused(begin + data).reason in (Reason.IMAGE_INVALID, Reason.HASH_MISMATCH)


@given(st.integers(0, len(image()) - 1), st.integers(0, 7))
def test_any_flipped_bit_is_refused(at: int, bit: int) -> None:
    data = bytearray(image())
    data[at] ^= 1 << bit
    try:
        found = mcuboot.parse(bytes(data))
    except Refused:
        return
    # only what nothing protects: whether the bytes are encrypted is for the device to see
    assert found.header.encrypted


def test_a_release_of_it_is_known_by_its_hash(tmp_path: Path) -> None:
    publisher = Publisher(tmp_path).init()
    file = tmp_path / "zephyr.signed.bin"
    file.write_bytes(image())
    draft = release.Draft("sensor", "1.2.3", ("node",), protocol="smp")
    release.add(publisher.repo, file, draft, write=write_quickly)
    release.publish(publisher.repo, [publisher.base / "keys"], datetime.now(UTC), write=write_quickly)
    (listed,) = release.list_releases(publisher.repo)
    assert listed.size_bytes == len(image()) and listed.sha256 == hashlib.sha256(image()).hexdigest()
    signed = (publisher.repo / "metadata" / "2.targets.json").read_text()
    assert f'"identifies_as":"{mcuboot.parse(image()).hash.hex()}"' in signed


@pytest.mark.parametrize(
    ("data", "draft", "recognised"),
    [
        (image(), {}, True),
        (image(), {"identifies_as": "9"}, True),
        (image(), {"base_address": 0x1000}, False),
        (image(), {"protocol": "stk500v1"}, False),
        (image(), {"format": "bin"}, False),
        (image()[1:], {}, False),
        (b"", {"format": "mcuboot"}, None),
        (image()[:-1], {}, None),
    ],
    ids=["it is one", "named", "address", "protocol", "format", "it is none", "empty", "cut"],
)
def test_an_image_is_recognised_where_nobody_says_what_it_is(
    tmp_path: Path, data: bytes, draft: dict[str, Any], recognised: bool | None
) -> None:
    publisher = Publisher(tmp_path).init()
    file = tmp_path / "zephyr.signed.bin"
    file.write_bytes(data)
    made = release.Draft("sensor", "1.2.3", ("node",), **draft)
    if recognised is None:
        with pytest.raises(Refused) as caught:
            release.add(publisher.repo, file, made, write=write_quickly)
        assert caught.value.reason is Reason.IMAGE_INVALID
        return
    release.add(publisher.repo, file, made, write=write_quickly)
    (listed,) = release.list_releases(publisher.repo)
    assert (listed.sha256 == hashlib.sha256(data).hexdigest()) is recognised
    release.publish(publisher.repo, [publisher.base / "keys"], datetime.now(UTC), write=write_quickly)
    signed = (publisher.repo / "metadata" / "2.targets.json").read_text()
    known_by = draft.get("identifies_as", mcuboot.parse(data).hash.hex() if recognised else "1.2.3")
    assert f'"identifies_as":"{known_by}"' in signed
    assert f'"format":"{"opaque" if recognised else "segments"}"' in signed


@pytest.mark.parametrize(
    ("data", "draft", "reason"),
    [
        (image()[:-1], {}, Reason.IMAGE_INVALID),
        (b":00000001FF\n", {}, Reason.IMAGE_INVALID),
        (image(), {"flash_size_bytes": 1000}, Reason.IMAGE_TOO_LARGE),
        (BODY, {"protocol": None, "format": "mcuboot"}, Reason.IMAGE_INVALID),
    ],
)
def test_a_release_of_what_is_none_is_refused(
    tmp_path: Path, data: bytes, draft: dict[str, object], reason: Reason
) -> None:
    publisher = Publisher(tmp_path).init()
    file = tmp_path / "zephyr.signed.bin"
    file.write_bytes(data)
    options = {"protocol": "smp", **draft}
    with pytest.raises((Refused, Permanent)) as caught:
        release.add(
            publisher.repo, file, release.Draft("sensor", "1", ("node",), **options), write=write_quickly
        )  # type: ignore[arg-type]
    assert caught.value.reason is reason
    assert not release.list_releases(publisher.repo)
