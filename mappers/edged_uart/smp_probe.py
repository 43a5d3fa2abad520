"""Who speaks SMP at an address: each usual rate and each framing is tried. Only asks; neither resets nor stops anything."""

from __future__ import annotations

from typing import Final

from edged.api import Device, Env, Identity
from edged.errors import Reason, Transient
from edged_uart.link import SerialLink, split_baud
from edged_uart.smp_config import SmpConfig
from edged_uart.smp_session import SmpSession

_FIRST_BAUD: Final = 115200
_OTHER_BAUDS: Final = (57600, 1_000_000, 921_600, 460_800, 230_400, 9600)
# raw first: a server that expects it would take a line of the console for a long message, and wait for its end
_FRAMINGS: Final = ("raw", "console", "cobs")
_OTHER_FRAMINGS: Final = ("raw", "console")
_ANSWER_S: Final = 0.5
_OTHER_ANSWER_S: Final = 0.2
_REST_S: Final = 0.2


async def probe(address: str, env: Env) -> Identity | None:
    """None where nobody answers. An address that names a rate is asked at that one only."""
    address, baud = split_baud(address)
    async with env.link(address) as link:
        if not isinstance(link, SerialLink):
            return None
        for config in _configs(baud if link.sets_baud else _FIRST_BAUD):
            try:
                return await SmpSession(
                    Device("probe", "", "uart-smp", address), config, link, env
                ).identify()
            except Transient as error:
                if error.reason not in (Reason.NO_RESPONSE, Reason.PROTOCOL_ERROR):
                    raise
            await link.quiet(_REST_S)
    return None


def _configs(baud: int | None) -> list[SmpConfig]:
    """What is tried, in this order. COBS is spoken by boot loaders in recovery only: it is not worth its time at odd rates."""
    first = [SmpConfig(baud=baud or _FIRST_BAUD, framing=one, answer_s=_ANSWER_S) for one in _FRAMINGS]
    if baud is not None:
        return first
    return first + [
        SmpConfig(baud=other, framing=framing, answer_s=_OTHER_ANSWER_S)
        for other in _OTHER_BAUDS
        for framing in _OTHER_FRAMINGS
    ]
