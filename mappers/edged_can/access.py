"""SecurityAccess (ISO 14229-1, 10.4) with one controller: seed, key, and no key that it refused once already."""

from __future__ import annotations

import asyncio
from typing import Final

from udsoncan import Request, services

from edged.api import Env
from edged.errors import Permanent, Reason, Transient
from edged_can.client import NegativeResponse, UdsClient
from edged_can.config import Security
from edged_can.refused import RefusedKeys
from edged_can.security import check_secret, key_for, secret_bytes

_REFUSED: Final = frozenset({0x35, 0x36})
"""invalidKey, exceededNumberOfAttempts."""
_CURE: Final = "that key is not sent again: correct the credential and restart edged"


class Access:
    """Unlocks one controller. ``name``: the device's id."""

    def __init__(self, client: UdsClient, env: Env, name: str, refused: RefusedKeys) -> None:
        self._client = client
        self._env = env
        self._name = name
        self._refused = refused

    async def check(self, settings: Security) -> None:
        """Raises Permanent: CONFIG_INVALID where the secret is not there, or cannot be that of the algorithm, PLUGIN_FAILED
        where the algorithm's plug-in cannot be imported."""
        secret = await self._secret_of(settings)
        try:
            await asyncio.to_thread(check_secret, settings.algorithm, secret)
        except Permanent as error:
            known = settings.credential and error.reason is Reason.CONFIG_INVALID
            named = f"credential {settings.credential!r}: " if known else ""
            raise Permanent(error.reason, f"{named}{error.detail}") from None

    async def unlock(self, settings: Security) -> None:
        """Nothing is sent for a seed of zeros: it says that the server is unlocked already.

        Raises NegativeResponse, Transient; Permanent: DEVICE_ERROR for a key that the device refuses, or refused before, or
        may have, CONFIG_INVALID for a secret that cannot be used, PLUGIN_FAILED for an algorithm that fails, STORAGE_FAILED
        where nobody knows what it refused.
        """
        secret = await self._secret_of(settings)
        before = await self._refused.why(self._env, self._name, settings, secret)
        if before:
            raise Permanent(Reason.DEVICE_ERROR, f"{before}; {_CURE}")
        level = settings.level
        seed = await self._client.ask(Request(services.SecurityAccess, level), bytes((level,)))
        if not seed:
            text = f"{self._name}: SecurityAccess: the answer has no seed"
            raise Transient(Reason.PROTOCOL_ERROR, text)
        if not any(seed):
            return
        key = await asyncio.to_thread(key_for, settings.algorithm, seed, secret, level)
        await self._send(settings, secret, key)

    async def _send(self, settings: Security, secret: bytes, key: bytes) -> None:
        """Whether it is taken is known when the device has answered."""
        request = Request(services.SecurityAccess, settings.level + 1, data=key)
        self._refused.sending(self._name, settings, secret)
        try:
            await self._client.ask(request, bytes((settings.level + 1,)))
        except NegativeResponse as error:
            if error.code in _REFUSED:
                await self._refused.add(self._env, self._name, settings, secret, error.detail)
                # a key that is wrong is wrong the next time, and the device is locked for longer
                raise Permanent(error.reason, f"{error.detail}; {_CURE}") from error
            self._refused.settled(self._name, settings)
            raise
        except Transient as error:
            if error.reason is not Reason.NO_RESPONSE:
                # the bus is gone, and the key did not get there
                self._refused.settled(self._name, settings)
            raise
        self._refused.settled(self._name, settings)

    async def _secret_of(self, settings: Security) -> bytes:
        text = await self._env.credential(settings.credential) if settings.credential else ""
        try:
            return secret_bytes(text)
        except ValueError:
            wrong = f"credential {settings.credential!r}: no hexadecimal digits after 'hex:'"
            raise Permanent(Reason.CONFIG_INVALID, wrong) from None
