"""Keys that a device refused. A controller counts wrong keys and locks itself after a few, some of them for good: what was
refused is remembered over sessions, jobs and restarts, and sent again only with another secret.

Of a secret a slow digest with a salt is kept: secrets of a few bytes could be found from a fast one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from typing import Any, Final

from edged.api import Env
from edged.errors import EdgedError
from edged_can.config import Security

_SALT_BYTES: Final = 16
_KEPT: Final = 16
"""Of the secrets that a device refused at one level, the newest."""
_ROUNDS, _BLOCK = 2**14, 8
"""scrypt's n and r (RFC 7914): 16 MiB, and some 50 ms of a small node, once for each key to a device that refused one."""


class RefusedKeys:
    """Which secrets each device refused, by level. Stored by the device's ``env``, and here for where that fails."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, int], dict[str, Any]] = {}

    async def add(self, env: Env, device: str, settings: Security, secret: bytes, why: str) -> None:
        """``why``: what the device said. What cannot be stored is remembered until the daemon ends, and logged."""
        known = await self._known(env, device, settings)
        salt = str(known.get("salt") or os.urandom(_SALT_BYTES).hex())
        digest = await asyncio.to_thread(_digest, settings, secret, bytes.fromhex(salt))
        newest = [*known.get("refused", {}).items(), (digest, why)][-_KEPT:]
        record = self._records[device, settings.level] = {"salt": salt, "refused": dict(newest)}
        try:
            await env.remember(_key(settings), json.dumps(record))
        except EdgedError as error:
            env.log.warning(
                "a key that the device refused could not be stored: it may be sent once more after a restart",
                extra={"detail": str(error)},
            )

    async def why(self, env: Env, device: str, settings: Security, secret: bytes) -> str:
        """What the device said to a key by this secret; empty where it refused none. Errors as :meth:`edged.api.Env.recall`."""
        known = await self._known(env, device, settings)
        if not known:
            return ""
        digest = await asyncio.to_thread(_digest, settings, secret, bytes.fromhex(known["salt"]))
        return str(known["refused"].get(digest, ""))

    async def _known(self, env: Env, device: str, settings: Security) -> dict[str, Any]:
        """The salt, and by digest what the device said; empty where it refused nothing."""
        found = self._records.get((device, settings.level))
        return found or json.loads(await env.recall(_key(settings)) or "{}")


def _key(settings: Security) -> str:
    return f"refused-key/{settings.level}"


def _digest(settings: Security, secret: bytes, salt: bytes) -> str:
    """The credential's name is in it: by another one, an operator says that the device takes by now what it refused."""
    what = f"{settings.algorithm}\0{settings.credential}\0".encode() + secret
    return hashlib.scrypt(what, salt=salt, n=_ROUNDS, r=_BLOCK, p=1).hex()
