"""The node's own Ed25519 key (RFC 8032): it signs the audit head, and nothing that is flashed.

One PEM file (PKCS #8, not encrypted: the daemon starts without a person), mode 0600, made at the first start.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edged.errors import Permanent, Reason
from edged_firmware.durable import write_durably

from .files import locked_folder

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["FILE_NAME", "NodeKey"]

FILE_NAME: Final = "node-key.pem"


class NodeKey:
    """The key in memory; made by :meth:`load_or_create`."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

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
            return cls(_read(path))
        except OSError as error:
            raise Permanent(Reason.STORAGE_FAILED, f"{path}: {error.strerror}") from error

    @property
    def public_key(self) -> Ed25519PublicKey:
        """What :func:`edged.store.audit.verify` takes."""
        return self._private.public_key()

    @property
    def public_hex(self) -> str:
        """The public key, 32 bytes in hex."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self.public_key.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()

    def sign(self, message: bytes) -> bytes:
        """The signature of ``message``, 64 bytes."""
        return self._private.sign(message)


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


def _read(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise Permanent(Reason.STORAGE_FAILED, f"{path} is not a private key in PEM: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise Permanent(Reason.STORAGE_FAILED, f"{path} is not an Ed25519 key")
    return key
