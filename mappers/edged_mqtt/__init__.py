"""The mapper ``mqtt-thingsboard``, for devices that pull their firmware by ThingsBoard's device API, and the link ``mqtt:``.

- ``mqtt:listen@ADDRESS:PORT/NAME``: the device connects to an endpoint of this node, each with a credential of its own.
- ``mqtt:HOST:PORT/PREFIX``: the device is on a broker; its topics stand below PREFIX there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import cast

from edged.api import Device, Env, Identity, Link, LinkSpec, MapperSpec, Session, hookimpl
from edged.errors import Permanent, Reason, Transient
from edged_mqtt.acl import access_list
from edged_mqtt.config import (
    SCHEME,
    BrokerConfig,
    DeviceAddress,
    ListenAddress,
    ListenConfig,
    MqttConfig,
    claims,
    longest_call_s,
    parse_address,
    parse_config,
    parse_device,
    parse_link,
    parse_wire,
    wire_of,
)
from edged_mqtt.session import Memory, MqttSession
from edged_mqtt.thingsboard import Told
from edged_mqtt.wire import Credential, Proof, Wire

NAME = "mqtt-thingsboard"
PROTOCOL = "thingsboard"
LINGER_S = 60.0
"""Longer than a device's session rests after an error: the listener, and what is known of the device, stay meanwhile."""
PROBE_S = 5.0
"""So long is a device on a broker listened for."""


@hookimpl
def edged_mappers() -> Iterable[MapperSpec]:
    """The one protocol."""
    return [
        MapperSpec(
            NAME,
            _connect,
            parse_config,
            frozenset({PROTOCOL}),
            _probe,
            schemes=frozenset({SCHEME}),
            probe_disturbs=False,
            longest_call_s=longest_call_s,
            claims=claims,
        )
    ]


@hookimpl
def edged_links() -> Iterable[LinkSpec]:
    """Listeners and brokers."""
    return [
        LinkSpec(
            SCHEME, _open, parse_address, parse_link, wire=wire_of, linger_s=LINGER_S, access_list=access_list
        )
    ]


def _open(rest: str, env: Env) -> AbstractAsyncContextManager[Link]:
    address = parse_wire(rest)
    # TLS and the client's library: only for nodes that have such a wire
    if isinstance(address, ListenAddress):
        from edged_mqtt.endpoint import open_endpoint

        return open_endpoint(address, cast(ListenConfig, env.config), env)
    from edged_mqtt.broker import open_broker

    return open_broker(address, cast(BrokerConfig, env.config), env)


def _address(text: str) -> DeviceAddress:
    try:
        return parse_device(text.removeprefix(f"{SCHEME}:"))
    except ValueError as exc:
        raise Permanent(Reason.CONFIG_INVALID, f"address: found {text!r}; {exc}") from exc


@asynccontextmanager
async def _connect(device: Device, env: Env) -> AsyncIterator[Session]:
    config = device.config if isinstance(device.config, MqttConfig) else MqttConfig()
    address = _address(device.address)
    credential = await _credential(address, config, env)
    async with env.link(address.link) as link:
        wire = cast(Wire, link)
        session = MqttSession(device, address.place, config, wire, env)
        await session.recall()
        async with wire.seat(address.place, credential, session):
            try:
                await session.awaited()
                yield session
            finally:
                session.close()


async def _credential(address: DeviceAddress, config: MqttConfig, env: Env) -> Credential:
    proof = Proof(config.proof)
    if not isinstance(address.wire, ListenAddress) or proof is Proof.CERTIFICATE:
        return Credential(proof, address.place)
    return Credential(proof, address.place, await env.credential(config.credential or address.place))


async def _probe(address: str, env: Env) -> Identity | None:
    """Whether the device is there, and what it said on the connection that it has; one on a broker is listened for. Nothing is
    sent to it, and nothing taken from its session. Raises ``Transient(DEVICE_ABSENT)`` where it is not there and a listener
    refused somebody lately."""
    found = _address(address)
    async with env.link(found.link) as link:
        wire = cast(Wire, link)
        if wire.is_present(found.place) or await wire.hears(found.place, PROBE_S):
            memory = wire.memory(found.place).get("device") if wire.is_remembered(found.place) else None
            told = memory.told if isinstance(memory, Memory) else Told()
            said = {"title": told.title, "version": told.version, "state": told.state}
            detail = {"protocol": PROTOCOL} | {name: text for name, text in said.items() if text}
            return Identity(f"credential:{found.place}", found.place, detail)
        if refused := wire.refused(found.place):
            text = f"{found.place} is not there; refused lately: {refused}"
            raise Transient(Reason.DEVICE_ABSENT, text)
        return None
