"""Ed25519 keys of the TUF roles: sign, verify, and the PEM files that hold the private halves.

securesystemslib's own signer needs a newer ``cryptography`` than Debian 12 has, and its verifier falls back
to a slow one written in Python there; these two classes need only 38.0.4. Loads securesystemslib.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import KEY_FOR_TYPE_AND_SCHEME, Key, SecretsHandler, Signature, Signer

from edged_firmware.durable import write_durably
from edged_firmware.errors import Permanent, Reason, Refused

ED25519: Final = "ed25519"


class Ed25519Key(Key):
    """The public half of an Ed25519 key; ``keyval["public"]`` is 32 bytes in hex (TUF specification 4.2)."""

    @classmethod
    def from_dict(cls, keyid: str, key_dict: dict[str, Any]) -> Ed25519Key:
        """Read a key of metadata. Raises ValueError or KeyError, which tuf translates."""
        keytype, scheme, keyval = cls._from_dict(key_dict)
        if len(bytes.fromhex(keyval["public"])) != 32:
            raise ValueError("an Ed25519 public key has 32 bytes")
        return cls(keyid, keytype, scheme, keyval, key_dict)

    def to_dict(self) -> dict[str, Any]:
        """The key as it stands in metadata."""
        return self._to_dict()

    def verify_signature(self, signature: Signature, data: bytes) -> None:
        """Raises UnverifiedSignatureError when ``signature`` is not this key's over ``data`` (RFC 8032)."""
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.keyval["public"]))
            public.verify(bytes.fromhex(signature.signature), data)
        except InvalidSignature as error:
            raise UnverifiedSignatureError(f"not signed by {self.keyid}") from error
        except (ValueError, UnsupportedAlgorithm) as error:
            raise VerificationError(f"no Ed25519 signature by {self.keyid}: {error}") from error


def register() -> None:
    """Make securesystemslib use :class:`Ed25519Key` for every Ed25519 key that it reads from metadata."""
    KEY_FOR_TYPE_AND_SCHEME[(ED25519, ED25519)] = Ed25519Key


class Ed25519Signer(Signer):
    """Signs with an Ed25519 private key held in memory."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self._public = _public_key(private)

    @property
    def public_key(self) -> Key:
        """The key to put into root metadata."""
        return self._public

    def sign(self, payload: bytes) -> Signature:
        """Signature of ``payload`` (RFC 8032)."""
        return Signature(self._public.keyid, self._private.sign(payload).hex())

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> Ed25519Signer:
        """``file2:PATH`` style addresses are not used here: :func:`load_signers` reads folders of keys."""
        raise ValueError(f"{priv_key_uri}: read keys with load_signers")


def create_signer(folder: Path, role: str, password: bytes | None) -> Ed25519Signer:
    """Make a key and keep it as ``folder/ROLE-KEYID8.pem`` (PKCS #8, mode 0600).

    It is encrypted if a password is given. Raises Transient for a disk that is full or fails.
    """
    private = Ed25519PrivateKey.generate()
    signer = Ed25519Signer(private)
    encryption: KeySerializationEncryption = BestAvailableEncryption(password) if password else NoEncryption()
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
    write_durably(folder / f"{role}-{signer.public_key.keyid[:8]}.pem", pem, 0o600)
    return signer


def load_signers(folders: Iterable[Path], password: bytes | None) -> Mapping[str, Ed25519Signer]:
    """All keys ``*.pem`` of the folders, by key id.

    Raises ``Refused(TRUST_MISSING)`` for a file that is no Ed25519 key or needs another password, and
    ``Permanent(CONFIG_INVALID)`` for one that cannot be read.
    """
    paths = [path for folder in folders for path in sorted(folder.glob("*.pem"))]
    signers = [_load_signer(path, password) for path in paths]
    return {signer.public_key.keyid: signer for signer in signers}


def _load_signer(path: Path, password: bytes | None) -> Ed25519Signer:
    try:
        pem = path.read_bytes()
    except OSError as error:
        raise Permanent(Reason.CONFIG_INVALID, f"cannot read the key {path}: {error.strerror}") from error
    encrypted = b"ENCRYPTED" in pem
    try:
        private = load_pem_private_key(pem, password if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = "it needs the right password in EDGED_KEY_PASSWORD" if encrypted else "it is no PKCS #8 key"
        raise Refused(Reason.TRUST_MISSING, f"cannot use the key {path}: {why}") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise Refused(Reason.TRUST_MISSING, f"cannot use the key {path}: only Ed25519 keys are")
    return Ed25519Signer(private)


def _public_key(private: Ed25519PrivateKey) -> Ed25519Key:
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    content = {"keytype": ED25519, "scheme": ED25519, "keyval": {"public": raw.hex()}}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return Ed25519Key(hashlib.sha256(canonical).hexdigest(), ED25519, ED25519, {"public": raw.hex()})
