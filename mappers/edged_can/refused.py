"""Keys that a device refused. A controller counts wrong keys and locks itself after a few, some of them for good: what was
refused is remembered over sessions, jobs and restarts, and sent again only with another secret.

Of a secret a slow digest with a salt is kept: secrets of a few bytes could be found from a fast one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from typing import Final

from edged.api import Env
from edged.errors import EdgedError
from edged_can.config import Security

_SALT_BYTES: Final = 16
_ROUNDS, _BLOCK = 2**14, 8
"""scrypt's n and r (RFC 7914): 16 MiB, and some 50 ms of a small node, once for each key to a device that refused one."""


class RefusedKeys:
    """Which secret each device refused last, by level. Stored by the device's ``env``, and here for where that fails."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, int], str] = {}

    async def add(self, env: Env, device: str, settings: Security, secret: bytes, why: str) -> None:
        """``why``: what the device said. What cannot be stored is remembered until the daemon ends, and logged."""
        salt = os.urandom(_SALT_BYTES)
        digest = await asyncio.to_thread(_digest, settings, secret, salt)
        record = json.dumps({"salt": salt.hex(), "digest": digest, "why": why})
        self._records[device, settings.level] = record
        try:
            await env.remember(_key(settings), record)
        except EdgedError as error:
            env.log.warning(
                "a key that the device refused could not be stored: it may be sent once more after a restart",
                extra={"detail": str(error)},
            )

    async def why(self, env: Env, device: str, settings: Security, secret: bytes) -> str:
        """What the device said to a key by this secret; empty where it refused none. Errors as :meth:`edged.api.Env.recall`."""
        text = self._records.get((device, settings.level)) or await env.recall(_key(settings))
        if not text:
            return ""
        record = json.loads(text)
        digest = await asyncio.to_thread(_digest, settings, secret, bytes.fromhex(record["salt"]))
        return str(record["why"]) if digest == record["digest"] else ""


def _key(settings: Security) -> str:
    return f"refused-key/{settings.level}"


def _digest(settings: Security, secret: bytes, salt: bytes) -> str:
    """The credential's name is in it: by another one, an operator says that the device takes by now what it refused."""
    what = f"{settings.algorithm}\0{settings.credential}\0".encode() + secret
    return hashlib.scrypt(what, salt=salt, n=_ROUNDS, r=_BLOCK, p=1).hex()
