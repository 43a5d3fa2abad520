"""Functional addressing (ISO 14229-2; ISO 15765-2, 9.3.1): requests in one frame that every controller on the bus hears.

None is answered: who asks all at once is not to be flooded. Whoever was told to be quiet hears of a tester until
:meth:`Everyone.release`; where the daemon is gone before that, each goes back by itself after S3 server.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

from udsoncan import Request, services

from edged.errors import Transient
from edged_can.client import KEEP_ALIVE_S
from edged_can.config import UdsConfig
from edged_can.frames import Frame
from edged_can.link import CanLink

_P3_S: Final = 0.05
"""ISO 14229-2, table 5: P3 client_Func is P2 server_max at least, from a request without a response to the next one."""
_FRAME_BYTES: Final = 8
_DEFAULT_SESSION: Final = 1


class Everyone:
    """All controllers on a bus that listen to ``functional_id``."""

    def __init__(self, link: CanLink, config: UdsConfig) -> None:
        self._link = link
        self._config = config
        self._held = asyncio.Event()

    async def hold(self, request: Request) -> None:
        """Tell everyone, and keep them at it. Raises Transient(LINK_LOST)."""
        self._held.set()
        await self._tell(request)
        await asyncio.sleep(_P3_S)

    async def release(self) -> None:
        """Everyone may go on as before, where they were held: the default session ends all that was turned off (10.2).

        Raises Transient(LINK_LOST).
        """
        if self._held.is_set():
            self._held.clear()
            await self._tell(services.DiagnosticSessionControl.make_request(_DEFAULT_SESSION))
            await asyncio.sleep(_P3_S)

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Within the block everyone hears of a tester while they are held, whatever else is asked meanwhile."""
        task = asyncio.create_task(self._keep_alive())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _keep_alive(self) -> None:
        request = services.TesterPresent.make_request()
        while True:
            await self._held.wait()
            await asyncio.sleep(KEEP_ALIVE_S)
            if self._held.is_set():
                with suppress(Transient):
                    # whoever asks next is told what is wrong with the bus
                    await self._tell(request)

    async def _tell(self, request: Request) -> None:
        config, padding = self._config, self._config.shape.padding
        payload = request.get_payload(suppress_positive_response=True)
        # N_TA comes first, where there is one (ISO 15765-2, 10.3)
        target = b"" if config.functional_address is False else bytes((int(config.functional_address),))
        data = target + bytes((len(payload),)) + payload
        if padding is not None:
            data = data.ljust(_FRAME_BYTES, bytes((padding,)))
        await self._link.send(Frame(int(config.functional_id), data, config.extended_ids, config.fd))
