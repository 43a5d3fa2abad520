"""Keys that devices refused. A controller counts wrong keys and locks itself after a few, some of them for good: what was
refused is remembered for as long as the daemon runs, over sessions and jobs, and sent again only with another secret."""

from __future__ import annotations

import hashlib

from edged_can.config import Security


class RefusedKeys:
    """Which device refused which secret, by level. Of a secret its digest is kept."""

    def __init__(self) -> None:
        self._why: dict[tuple[str, int], tuple[bytes, str]] = {}

    def add(self, device: str, settings: Security, secret: bytes, why: str) -> None:
        """``why``: what the device said."""
        self._why[device, settings.level] = _digest(settings, secret), why

    def why(self, device: str, settings: Security, secret: bytes) -> str:
        """What the device said to a key by this secret; empty where it refused none."""
        digest, why = self._why.get((device, settings.level), (b"", ""))
        return why if digest == _digest(settings, secret) else ""


def _digest(settings: Security, secret: bytes) -> bytes:
    return hashlib.sha256(settings.algorithm.encode() + b"\0" + secret).digest()
