"""Mapper for controllers that are flashed by UDS (ISO 14229) over ISO-TP (ISO 15765-2), and the link ``can:``.

``can-uds`` speaks to one controller on a bus that others share. What heavy libraries it needs are imported when the first
bus is opened.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

from edged.api import Device, Env, Identity, LinkSpec, MapperSpec, Session, hookimpl
from edged.errors import Permanent, Reason
from edged_can.address import SCHEME, parse_address
from edged_can.config import UdsConfig, claims, longest_call_s, parse
from edged_can.link import CanLink, Turns, loaded, open_can
from edged_can.refused import RefusedKeys

NAME: Final = "can-uds"


@hookimpl
def edged_mappers() -> Iterable[MapperSpec]:
    """UDS."""
    return [
        MapperSpec(
            NAME,
            _Connecting().connect,
            parse,
            frozenset({"uds"}),
            _probe,
            flash_params=frozenset({"data_format"}),
            schemes=frozenset({SCHEME}),
            probe_disturbs=False,
            longest_call_s=longest_call_s,
            claims=claims,
        )
    ]


@hookimpl
def edged_links() -> Iterable[LinkSpec]:
    """The CAN bus."""
    return [LinkSpec(SCHEME, open_can, parse_address)]


class _Connecting:
    """Opens sessions. What outlives them are the keys that devices refused, until when to leave alone a device that could not
    be told that the tester goes, and who programs on each bus, by whatever address it was opened."""

    def __init__(self) -> None:
        self._refused = RefusedKeys()
        self._alone_until: dict[str, float] = {}
        self._turns: dict[str, Turns] = {}

    @asynccontextmanager
    async def connect(self, device: Device, env: Env) -> AsyncIterator[Session]:
        config = device.config if isinstance(device.config, UdsConfig) else UdsConfig()
        async with env.link(device.address) as link:
            module = await loaded("edged_can.session")
            bus = _bus(link, device.address)
            turns = self._turns.setdefault(bus.bus.place, Turns(bus.address))
            async with module.connected(
                device, config, bus, env, self._refused, self._alone_until, turns
            ) as session:
                yield session


async def _probe(address: str, env: Env) -> Identity | None:
    async with env.link(address) as link:
        module = await loaded("edged_can.probe")
        found: Identity | None = await module.probe(_bus(link, address))
        return found


def _bus(link: object, address: str) -> CanLink:
    if not hasattr(link, "transport"):
        raise Permanent(Reason.UNSUPPORTED, f"{address}: {NAME} needs a {SCHEME}: link")
    return link  # type: ignore[return-value]
