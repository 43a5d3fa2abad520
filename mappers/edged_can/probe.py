"""Who answers UDS on a bus: TesterPresent and ReadDataByIdentifier, which change nothing, to the usual identifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from edged.api import Identity
from edged.errors import Reason, Transient
from edged_can.client import NegativeResponse, Timing, UdsClient
from edged_can.config import UdsConfig
from edged_can.link import CanLink
from edged_can.properties import text_of

_IDENTIFIERS: Final = tuple((0x7E0 + number, 0x7E8 + number) for number in range(8))
"""Of physical requests and their responses (ISO 15765-4, 10.5)."""
_ANSWER_S: Final = 0.3
_UNKNOWN: Final = "unknown"


async def probe(link: CanLink) -> Identity | None:
    """The first that answers; all that do stand in its detail, by request identifier. Raises Transient(LINK_LOST)."""
    found: dict[int, Mapping[str, str]] = {}
    detail = {"protocol": "uds"}
    for request_id, response_id in _IDENTIFIERS:
        if link.speaks_to(response_id, False):
            # it would take the answers for its own, and break off what it is sending
            detail[f"{request_id:#x}"] = "a session of this node is open, so it was not asked"
        elif (told := await _ask(link, request_id, response_id)) is not None:
            found[request_id] = told
            detail[f"{request_id:#x}"] = _line(told)
    if len(detail) == 1:
        return None
    first = next(iter(found.values()), {"hardware": _UNKNOWN})
    return Identity(f"uds:{first['hardware']}", first.get("serial"), detail)


async def _ask(link: CanLink, request_id: int, response_id: int) -> Mapping[str, str] | None:
    """What the controller at these identifiers tells of itself, None where nobody answers."""
    config = UdsConfig(request_id=request_id, response_id=response_id)
    async with link.transport(config.peer, config.shape) as transport:
        client = UdsClient(transport, Timing(_ANSWER_S, _ANSWER_S), f"{request_id:#x}")
        try:
            await client.is_there()
        except Transient as error:
            if error.reason in (Reason.NO_RESPONSE, Reason.PROTOCOL_ERROR):
                return None
            raise
        dids = {"hardware": config.hardware_did, "version": config.version_did, "serial": config.serial_did}
        told = {name: await _read(client, did) for name, did in dids.items()}
    return {"hardware": _UNKNOWN} | {name: text for name, text in told.items() if text}


async def _read(client: UdsClient, did: int) -> str:
    try:
        return text_of(await client.read(did))
    except (NegativeResponse, Transient):
        return ""


def _line(told: Mapping[str, str]) -> str:
    runs = f"runs {told['version']}" if "version" in told else "tells no version"
    return f"uds:{told['hardware']}, {runs}"
