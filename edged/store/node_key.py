"""The node's own Ed25519 key (RFC 8032): it signs the audit head, and nothing that is flashed.

One PEM file (PKCS #8, not encrypted: the daemon starts without a person), mode 0600, made at the first start.
The cryptography library comes with the first signature: it is a seventh of an idle daemon's memory.
"""

from __future__ import annotations

import base64
import binascii
import stat
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edged.errors import Permanent, Reason
from edged_firmware.durable import write_durably

from .files import locked_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["FILE_NAME", "NodeKey", "public_hex"]

FILE_NAME: Final = "node-key.pem"
_PEM: Final = [b"-----BEGIN PRIVATE KEY-----", b"-----END PRIVATE KEY-----"]
_PKCS8: Final = bytes.fromhex("302e020100300506032b657004220420")
"""RFC 8410 7: all of an Ed25519 private key but the key, which is any 32 bytes and the last ones."""
_SEED_BYTES: Final = 32


class NodeKey:
    """The key in memory; made by :meth:`load_or_create`."""

    def __init__(self, pem: bytes, path: Path) -> None:
        self._pem = pem
        self._path = path

    @cached_property
    def _private(self) -> Ed25519PrivateKey:
        return _parse(self._pem, self._path)

    @classmethod
    def load_or_create(cls, folder: Path) -> NodeKey:
        """Read the key from ``folder``, or make one that is lasting before this returns. Blocks.

        Processes that start together get the same key. A key that cannot be used is never replaced: the
        signatures that it made would be nobody's.

        Raises ``Permanent(STORAGE_FAILED)`` where the file is not such a key, can be read by others, or the
        folder cannot be used; ``Transient(DISK_FULL)``.
        """
        path = folder / FILE_NAME
        try:
            with locked_folder(folder):
                if not path.exists():
                    _create(path)
            _check_mode(path)
            key = cls(path.read_bytes(), path)
        except OSError as error:
            raise Permanent(Reason.STORAGE_FAILED, f"{path}: {error.strerror}") from error
        if not _is_plain(key._pem):
            # perhaps a key in another form, perhaps none: to be said now, not when the first job ends
            key.public_key  # noqa: B018
        return key

    @property
    def public_key(self) -> Ed25519PublicKey:
        """What :func:`edged.store.audit.verify` takes."""
        return self._private.public_key()

    @property
    def public_hex(self) -> str:
        """:func:`public_hex` of this key."""
        return public_hex(self.public_key)

    def sign(self, message: bytes) -> bytes:
        """The signature of ``message``, 64 bytes."""
        return self._private.sign(message)


def public_hex(key: Ed25519PublicKey) -> str:
    """The public key, 32 bytes in hex."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()


def _create(path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_durably(path, pem, 0o600)


def _check_mode(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise Permanent(
            Reason.STORAGE_FAILED,
            f"{path} has mode {mode:04o}, others can read it: if nobody did, chmod 0600 {path.name}",
        )


def _is_plain(pem: bytes) -> bool:
    """Whether ``pem`` is such a key in the form in which it was written."""
    lines = pem.strip().splitlines()
    try:
        der = base64.b64decode(b"".join(lines[1:-1]), validate=True)
    except binascii.Error:
        return False
    return [*lines[:1], *lines[-1:]] == _PEM and der[:-_SEED_BYTES] == _PKCS8


def _parse(pem: bytes, path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Permanent(Reason.STORAGE_FAILED, f"{path} is not a private key in PEM: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Permanent(Reason.STORAGE_FAILED, f"{path} is not an Ed25519 key")
    return key
