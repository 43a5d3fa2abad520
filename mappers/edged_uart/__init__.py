"""Mappers for devices on a serial line, and the links ``serial:`` and ``socket:``.

- ``uart-stk500``: optiboot, ATmegaBOOT and their like (Arduino Uno, Nano).
- ``uart-stk500v2``: stk500boot (Arduino Mega 2560).
- ``uart-smp``: MCUboot with an SMP server in the application (Zephyr, Mynewt): two slots.

The application's side of the first two is lines of text: ``name=value`` is a property, and a line or the answer to a question
can prove that it is well.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from edged.api import Device, Env, Identity, LinkSpec, MapperSpec, Session, hookimpl
from edged.errors import Permanent, Reason, Transient
from edged_uart import socket_link
from edged_uart.config import UartConfig, parse_v1, parse_v2
from edged_uart.link import SCHEME, SerialLink, open_serial, parse_address, split_baud
from edged_uart.session import BootLoader, UartSession
from edged_uart.smp_config import PROTOCOL, SmpConfig, longest_call_s, parse_smp
from edged_uart.smp_kept import Kept
from edged_uart.stk500v1 import Stk500v1
from edged_uart.stk500v2 import Stk500v2

if TYPE_CHECKING:
    from edged_uart.smp_session import SmpSession

_PROBED_BAUDS = (115200, 57600)

MakeLoader = Callable[[SerialLink, UartConfig], BootLoader]


@hookimpl
def edged_mappers() -> Iterable[MapperSpec]:
    """The three protocols."""
    return [
        _spec("uart-stk500", "stk500v1", parse_v1, _v1),
        _spec("uart-stk500v2", "stk500v2", parse_v2, _v2),
        MapperSpec(
            "uart-smp",
            _SmpConnecting().connect,
            parse_smp,
            frozenset({PROTOCOL}),
            _probe_smp,
            schemes=frozenset({SCHEME, socket_link.SCHEME}),
            probe_disturbs=False,
            longest_call_s=longest_call_s,
        ),
    ]


@hookimpl
def edged_links() -> Iterable[LinkSpec]:
    """The serial port, and one behind a terminal server."""
    return [
        LinkSpec(SCHEME, open_serial, parse_address),
        LinkSpec(socket_link.SCHEME, socket_link.open_socket, socket_link.parse_address),
    ]


def _v1(link: SerialLink, config: UartConfig) -> BootLoader:
    return Stk500v1(link, config.answer_s, page_at_once=config.pacing == "page")


def _v2(link: SerialLink, config: UartConfig) -> BootLoader:
    return Stk500v2(link, config.answer_s, page_by_page=config.erase == "page")


def _spec(
    name: str, protocol: str, parse: Callable[[Mapping[str, object]], UartConfig], make: MakeLoader
) -> MapperSpec:
    def connect(device: Device, env: Env) -> AbstractAsyncContextManager[Session]:
        return _connect(device, env, make)

    async def probe(address: str, env: Env) -> Identity | None:
        return await _probe(Device("probe", "", name, address), env, make)

    return MapperSpec(name, connect, parse, frozenset({protocol}), probe, schemes=frozenset({SCHEME}))


@asynccontextmanager
async def _connect(device: Device, env: Env, make: MakeLoader) -> AsyncIterator[UartSession]:
    config = device.config if isinstance(device.config, UartConfig) else UartConfig()
    async with _port(device, env) as link:
        session = UartSession(device, config, link, make(link, config))
        yield session
        await session.rest()


@asynccontextmanager
async def _port(device: Device, env: Env) -> AsyncIterator[SerialLink]:
    async with env.link(device.address) as link:
        if not isinstance(link, SerialLink):
            raise Permanent(Reason.UNSUPPORTED, f"{device.address}: {device.mapper} needs a {SCHEME}: link")
        yield link


class _SmpConnecting:
    """Opens sessions, and holds what outlives them, by device."""

    def __init__(self) -> None:
        self._kept: dict[str, Kept] = {}

    @asynccontextmanager
    async def connect(self, device: Device, env: Env) -> AsyncIterator[SmpSession]:
        await _loaded("edged_uart.smp_session")
        from edged_uart.smp_session import SmpSession

        config = device.config if isinstance(device.config, SmpConfig) else SmpConfig()
        async with _port(device, env) as link:
            if config.reset == "dtr" and not link.has_lines:
                text = f"reset: found 'dtr'; allowed: 'none', since {device.address} has no DTR and RTS lines"
                raise Permanent(Reason.CONFIG_INVALID, text)
            await link.keep_lines()
            yield SmpSession(device, config, link, env, self._kept.setdefault(device.id, Kept()))


async def _probe_smp(address: str, env: Env) -> Identity | None:
    await _loaded("edged_uart.smp_probe")
    from edged_uart.smp_probe import probe

    return await probe(address, env)


async def _loaded(name: str) -> None:
    """Have a module imported in a thread when it is needed first: an idle daemon stays small."""
    await asyncio.to_thread(importlib.import_module, name)


async def _probe(device: Device, env: Env, make: MakeLoader) -> Identity | None:
    address, named = split_baud(device.address)
    async with env.link(address) as link:
        if not isinstance(link, SerialLink):
            return None
        for baud in _PROBED_BAUDS if named is None else (named,):
            config = UartConfig(baud=baud)
            session = UartSession(device, config, link, make(link, config))
            try:
                identity = await session.identify()
            except Transient as error:
                if error.reason not in (Reason.NO_RESPONSE, Reason.PROTOCOL_ERROR):
                    raise
                continue
            await session.rest()
            return identity
    return None
