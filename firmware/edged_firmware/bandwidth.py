"""A bound on bytes per second that several downloads share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class BandwidthCap:
    """A token bucket: over any ``t`` seconds no more than ``(t + 1) * bytes_per_s`` bytes and one piece each.

    ``clock`` gives seconds that never go back (the event loop's where it is None), ``sleep`` waits for
    seconds. Raises ValueError where ``bytes_per_s`` is not above 0.
    """

    def __init__(
        self,
        bytes_per_s: float,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"a cap of {bytes_per_s} bytes per second lets nothing through")
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._paid_until = float("-inf")

    @property
    def piece_bytes(self) -> int:
        """How many bytes to take at once, at most, so that no wait is longer than about half a second."""
        return max(512, int(self._bytes_per_s / 2))

    async def take(self, n_bytes: int) -> None:
        """Wait until ``n_bytes``, which have arrived already, are within the cap.

        Who is cancelled in here has paid all the same: the bytes went over the wire.
        """
        now = self._clock() if self._clock else asyncio.get_running_loop().time()
        self._paid_until = max(self._paid_until, now - 1.0) + n_bytes / self._bytes_per_s
        if self._paid_until > now:
            await self._sleep(self._paid_until - now)
