"""Keys that a device refused. A controller counts wrong keys and locks itself after a few, some of them for good: what was
refused is remembered over sessions, jobs and restarts, and sent again only with another secret. A key whose answer did not
come may have been refused too: after some of them in a row, by one secret, the daemon sends it no more.

Of a secret a slow digest with a salt is stored: secrets of a few bytes could be found from a fast one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from typing import Any, Final, NamedTuple

from edged.api import Env
from edged.errors import EdgedError
from edged_can.config import Security

_SALT_BYTES: Final = 16
_KEPT: Final = 16
"""Of the secrets that a device refused at one level, the newest."""
_UNANSWERED: Final = 2
"""So many keys in a row may have no answer: where a device locks itself, it mostly does so after the third."""
_ROUNDS, _BLOCK = 2**14, 8
"""scrypt's n and r (RFC 7914): 16 MiB, and some 50 ms of a small node, once for each key to a device that refused one."""


class _Last(NamedTuple):
    """The secret of the last key that was sent, which the device did not take so far; how many by that secret in a row had no
    answer; ``why``: what it said, empty: nothing."""

    digest: bytes
    unanswered: int
    why: str = ""


class RefusedKeys:
    """Which secrets each device refused, by level. Stored by the device's ``env``, and here for where that fails."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, int], dict[str, Any]] = {}
        self._last: dict[tuple[str, int], _Last] = {}
        self._pepper = os.urandom(_SALT_BYTES)
        self._storing: set[asyncio.Task[None]] = set()

    def sending(self, device: str, settings: Security, secret: bytes) -> None:
        """A key by this secret is about to be sent."""
        digest, before = self._quick(settings, secret), self._last.get((device, settings.level))
        count = before.unanswered if before is not None and before.digest == digest else 0
        self._last[device, settings.level] = _Last(digest, count + 1)

    def settled(self, device: str, settings: Security) -> None:
        """The device took the key, or said something of it that is no refusal, or it did not get there."""
        self._last.pop((device, settings.level), None)

    async def add(self, env: Env, device: str, settings: Security, secret: bytes, why: str) -> None:
        """``why``: what the device said. It is known at once, and stored also where nobody waits for that any more. What
        cannot be stored is remembered until the daemon ends, and logged."""
        self._last[device, settings.level] = _Last(self._quick(settings, secret), 0, why)
        storing = asyncio.create_task(self._store(env, device, settings, secret, why))
        self._storing.add(storing)
        storing.add_done_callback(self._storing.discard)
        await asyncio.shield(storing)

    async def _store(self, env: Env, device: str, settings: Security, secret: bytes, why: str) -> None:
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
        last = self._last.get((device, settings.level))
        if last is not None and last.digest == self._quick(settings, secret):
            if last.why:
                return last.why
            if last.unanswered >= _UNANSWERED:
                return f"{device}: SecurityAccess: {last.unanswered} keys had no answer, and may have been refused"
        known = await self._known(env, device, settings)
        if not known:
            return ""
        digest = await asyncio.to_thread(_digest, settings, secret, bytes.fromhex(known["salt"]))
        return str(known["refused"].get(digest, ""))

    async def _known(self, env: Env, device: str, settings: Security) -> dict[str, Any]:
        """The salt, and by digest what the device said; empty where it refused nothing."""
        found = self._records.get((device, settings.level))
        return found or json.loads(await env.recall(_key(settings)) or "{}")

    def _quick(self, settings: Security, secret: bytes) -> bytes:
        """Which secret it was, for as long as the daemon runs."""
        return hashlib.blake2b(_what(settings, secret), key=self._pepper).digest()


def _key(settings: Security) -> str:
    return f"refused-key/{settings.level}"


def _what(settings: Security, secret: bytes) -> bytes:
    """The credential's name is in it: by another one, an operator says that the device takes by now what it refused."""
    return f"{settings.algorithm}\0{settings.credential}\0".encode() + secret


def _digest(settings: Security, secret: bytes, salt: bytes) -> str:
    return hashlib.scrypt(_what(settings, secret), salt=salt, n=_ROUNDS, r=_BLOCK, p=1).hex()
