"""SecurityAccess (ISO 14229-1, 10.4): the key for a seed.

How a key comes from a seed is each manufacturer's own. Some simple ways are built in; any other comes as a plug-in: an
entry point in the group ``edged.seed_key`` whose name is the algorithm's, and which names a function like those below. It
runs in a thread, and may take its time.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Final

from edged.errors import Permanent, Reason

GROUP: Final = "edged.seed_key"

SeedKey = Callable[[bytes, bytes, int], bytes]
"""``(seed, secret, level) -> key``. ``secret``: the bytes of the credential, empty where none is named; ``level``: the
requestSeed subfunction. Raises ValueError for a secret or a seed that it cannot use."""


def key_for(algorithm: str, seed: bytes, secret: bytes, level: int) -> bytes:
    """The key. Blocks. Raises Permanent: CONFIG_INVALID where the algorithm is not known or cannot use the secret,
    PLUGIN_FAILED for whatever else a plug-in does."""
    call = _find(algorithm)
    try:
        key = call(seed, secret, level)
    except ValueError as error:
        # a plug-in's text may hold what it was given
        text = str(error) if algorithm in BUILT_IN else "it cannot use its secret, or the seed"
        raise Permanent(Reason.CONFIG_INVALID, f"security algorithm {algorithm!r}: {text}") from None
    except Exception as error:  # noqa: BLE001 - the plugin boundary; its text may hold the secret
        text = f"security algorithm {algorithm!r} raised {type(error).__name__}"
        raise Permanent(Reason.PLUGIN_FAILED, text) from None
    if not isinstance(key, bytes | bytearray):
        text = f"security algorithm {algorithm!r} returned {type(key).__name__}, not bytes"
        raise Permanent(Reason.PLUGIN_FAILED, text)
    return bytes(key)


def check_secret(algorithm: str, secret: bytes) -> None:
    """Whether the algorithm is there, and can use the secret if it is built in; a plug-in's own can only be asked with a seed.

    Blocks: a plug-in is imported. Raises Permanent: CONFIG_INVALID, PLUGIN_FAILED.
    """
    _find(algorithm)
    try:
        _RULES.get(algorithm, _any)(secret)
    except ValueError as error:
        raise Permanent(Reason.CONFIG_INVALID, f"security algorithm {algorithm!r}: {error}") from None


def needs_secret(algorithm: str) -> bool:
    """Whether it is known to need one: all that are built in do, of a plug-in's nobody knows."""
    return algorithm in _RULES


def known() -> frozenset[str]:
    """The names of all algorithms that are installed."""
    return frozenset(BUILT_IN) | {found.name for found in entry_points(group=GROUP)}


def secret_bytes(text: str) -> bytes:
    """A credential's bytes: of hexadecimal digits after ``hex:``, else the text itself. Raises ValueError."""
    return bytes.fromhex(text.removeprefix("hex:")) if text.startswith("hex:") else text.encode()


def xor(seed: bytes, secret: bytes, level: int) -> bytes:
    """Each byte of the seed with the secret's, which is repeated."""
    _need(secret)
    return bytes(byte ^ secret[at % len(secret)] for at, byte in enumerate(seed))


def add(seed: bytes, secret: bytes, level: int) -> bytes:
    """Seed and secret as big-endian numbers, their sum cut to the length of the seed."""
    _need(secret)
    total = int.from_bytes(seed, "big") + int.from_bytes(secret, "big")
    bits = 8 * len(seed)
    return (total & ((1 << bits) - 1)).to_bytes(len(seed), "big")


def hmac_sha256(seed: bytes, secret: bytes, level: int) -> bytes:
    """HMAC-SHA-256 of the seed (RFC 2104), cut to the length of the seed."""
    _need(secret)
    digest: bytes = hmac.digest(secret, seed, "sha256")
    return digest[: len(seed)]


def aes_cmac(seed: bytes, secret: bytes, level: int) -> bytes:
    """AES-CMAC of the seed (RFC 4493); the secret is the key of 16 or 32 bytes."""
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.cmac import CMAC

    _aes_key(secret)
    mac = CMAC(AES(secret))
    mac.update(seed)
    return mac.finalize()


def _need(secret: bytes) -> None:
    if not secret:
        raise ValueError("it needs a secret: name a credential")


def _aes_key(secret: bytes) -> None:
    _need(secret)
    if len(secret) not in (16, 32):
        raise ValueError(f"the secret has {len(secret)} bytes; allowed: 16 or 32, such as hex:00112233...")


def _any(secret: bytes) -> None:
    return None


BUILT_IN: Final[Mapping[str, SeedKey]] = {
    "xor": xor,
    "add": add,
    "hmac-sha256": hmac_sha256,
    "aes-cmac": aes_cmac,
}
_RULES: Final[Mapping[str, Callable[[bytes], None]]] = {
    "xor": _need,
    "add": _need,
    "hmac-sha256": _need,
    "aes-cmac": _aes_key,
}
"""What each takes for a secret, whatever the seed."""


def _find(algorithm: str) -> SeedKey:
    """Raises Permanent: CONFIG_INVALID where it is not installed, PLUGIN_FAILED where it cannot be imported."""
    if algorithm in BUILT_IN:
        return BUILT_IN[algorithm]
    for found in entry_points(group=GROUP, name=algorithm):
        try:
            loaded: SeedKey = found.load()
        except Exception as error:
            # a module's import runs its own code
            raise Permanent(Reason.PLUGIN_FAILED, f"security algorithm {algorithm!r}: {error!r}") from error
        return loaded
    text = f"security algorithm {algorithm!r}: not installed; known: {', '.join(sorted(known()))}"
    raise Permanent(Reason.CONFIG_INVALID, text)
