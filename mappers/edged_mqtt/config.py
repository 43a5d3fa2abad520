"""Addresses of ``mqtt:``, and the tables of links and devices, checked key by key."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from edged.tables import (
    flag,
    key,
    named_values,
    one_of,
    printable,
    read,
    refuse,
    seconds,
    text,
    whole,
)

SCHEME: Final = "mqtt"
ALLOWED_ADDRESSES: Final = (
    "mqtt:listen@ADDRESS:PORT/NAME for a device that connects to this node, such as mqtt:listen@0.0.0.0:8883/pump-1; "
    "mqtt:HOST:PORT/PREFIX for one on a broker, such as mqtt:localhost:1883/devices/pump-1 (in a [[link]] table without /NAME "
    "or /PREFIX)"
)
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_LEVEL = re.compile(r"[^\x00-\x20/+#$][^\x00-\x1f/+#]{0,127}")
_ATTRIBUTE: Final = text(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,126}", "the name of an attribute")
_FILE: Final = text(r"/[^\x00-\x1f]{0,4095}", "an absolute path") | ""
_SECRET: Final = text(_NAME.pattern, "the name of a secret") | ""
_UNIT: Final = text(r"[!-~]{1,32}", "a UCUM code")


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where this node listens. ``host`` is an IP address."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.host).is_loopback

    def __str__(self) -> str:
        return f"listen@{_bracketed(self.host)}:{self.port}"


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """A broker that this node connects to. ``host`` is a name or an IP address."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        return f"{_bracketed(self.host)}:{self.port}"


@dataclass(frozen=True, slots=True)
class DeviceAddress:
    """A device on a wire. ``place``: its name at a listener, or the prefix of its topics on a broker."""

    wire: ListenAddress | BrokerAddress
    place: str

    @property
    def link(self) -> str:
        """What the wire is opened by."""
        return f"{SCHEME}:{self.wire}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def parse_wire(rest: str) -> ListenAddress | BrokerAddress:
    """The part of a link's address after ``mqtt:``. Raises ValueError."""
    listens = rest.startswith("listen@")
    host, colon, port = rest.removeprefix("listen@").rpartition(":")
    if host[:1] + host[-1:] == "[]":
        host = str(ipaddress.IPv6Address(host[1:-1]))
    elif listens:
        host = str(ipaddress.IPv4Address(host))
    elif not _HOST.fullmatch(host):
        raise ValueError(f"{host!r} is no host")
    if not colon or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"{port!r} is no port")
    return ListenAddress(host, int(port)) if listens else BrokerAddress(host, int(port))


def parse_device(rest: str) -> DeviceAddress:
    """The part of a device's address after ``mqtt:``. Raises ValueError with what is allowed."""
    wire, slash, place = rest.partition("/")
    try:
        parsed = parse_wire(wire)
    except ValueError as exc:
        raise ValueError(f"allowed: {ALLOWED_ADDRESSES} ({exc})") from exc
    if isinstance(parsed, ListenAddress):
        fits = _NAME.fullmatch(place) is not None
    else:
        fits = 0 < len(place) <= 256 and all(_LEVEL.fullmatch(level) for level in place.split("/"))
    if not slash or not fits:
        raise ValueError(f"allowed: {ALLOWED_ADDRESSES} ({place!r} is no {_place_word(parsed)})")
    return DeviceAddress(parsed, place)


def _place_word(wire: ListenAddress | BrokerAddress) -> str:
    return "name" if isinstance(wire, ListenAddress) else "prefix of topics"


def parse_address(rest: str) -> ListenAddress | BrokerAddress | DeviceAddress:
    """Of a device or of a link; for :class:`edged.api.LinkSpec`. Raises ValueError with what is allowed."""
    if "/" in rest:
        return parse_device(rest)
    try:
        return parse_wire(rest)
    except ValueError as exc:
        raise ValueError(f"allowed: {ALLOWED_ADDRESSES} ({exc})") from exc


def wire_of(rest: str) -> str:
    """For :attr:`edged.api.LinkSpec.wire`. Raises ValueError as :func:`parse_address`."""
    found = parse_address(rest)
    return str(found.wire if isinstance(found, DeviceAddress) else found)


@dataclass(frozen=True, slots=True)
class ListenConfig:
    """The table of a listener.

    - ``certificate``: file of the server's certificate, with those between it and the root; empty: no TLS.
    - ``key_credential``: name of the secret that is its key.
    - ``client_ca``: file of the authorities whose certificates devices may show; empty: none is asked for.
    - ``client_certificates``: ``"optional"``, or ``"required"``: nobody connects without one; needs ``client_ca``.
    - ``plain``: also without TLS on an address that is not loopback.
    - ``connections``: of so many devices at a time; who has not shown a credential yet is counted apart.
    - ``longest_silence_s``: of whom nothing is heard for so long its connection is ended, whatever keep-alive it asked for.
    """

    certificate: str = key("", _FILE)
    key_credential: str = key("mqtt-key", _SECRET)
    client_ca: str = key("", _FILE)
    client_certificates: str = key("optional", one_of("optional", "required"))
    plain: bool = key(False, flag())
    connections: int = key(1024, whole(1, 65_536))
    longest_silence_s: float = key(1800.0, seconds(2, 86_400))


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """The table of a broker.

    - ``tls``: connect with TLS. ``plain``: ``ca``, ``certificate`` and ``credential`` may stand here without it, also where the
      broker is not on loopback. ``ca``: file of the authorities that may vouch for the broker; empty: the system's.
    - ``user``, ``credential``: user name, and name of the secret that is its password; empty: none.
    - ``certificate``, ``key_credential``: this node's own certificate and the secret that is its key; empty: none.
    - ``client_id``: with one the broker keeps what devices say while this node is away; empty: one that the broker makes up.
    - ``keep_alive_s``: the broker is asked whether it is there so often.
    - ``largest_message_bytes``: of a message to a device; it goes through the memory of both whole.
    """

    tls: bool = key(False, flag())
    plain: bool = key(False, flag())
    ca: str = key("", _FILE)
    user: str = key("", printable())
    credential: str = key("", _SECRET)
    certificate: str = key("", _FILE)
    key_credential: str = key("mqtt-client-key", _SECRET)
    client_id: str = key("", printable())
    keep_alive_s: int = key(30, whole(5, 3600))
    largest_message_bytes: int = key(1024 * 1024, whole(1024, 256_000_000))


@dataclass(frozen=True, slots=True)
class MqttConfig:
    """The table of a device.

    - ``proof``: how it shows who it is at a listener: ``"token"``: its access token as user name; ``"password"``: user name
      NAME and password; ``"certificate"``: a client certificate with common name NAME.
    - ``credential``: name of the secret with token or password; empty: NAME of its address.
    - ``component``: ``"fw"`` or ``"sw"``: which of the protocol's two packages its releases are.
    - ``title``: what it calls its firmware; empty: the release's name.
    - ``checksum``: the algorithm that it is given one of.
    - ``hardware_key``: the attribute in which it tells its hardware at each connection; empty: its credential says who it is.
    - ``report_s``: so long may it take to say what it runs. ``silence_s``: it is silent in a download for so long at most.
      ``install_s``: from the last chunk to the new version.
    - ``rounds``: so often may it fetch one image. ``largest_chunk_bytes``: of what it may ask for at once; 0: the image.
    - ``confirm_s``: so long a property that it was given is awaited from it.
    - ``units``: UCUM codes of what it reports, by name.
    """

    proof: str = key("token", one_of("token", "password", "certificate"))
    credential: str = key("", _SECRET)
    component: str = key("fw", one_of("fw", "sw"))
    title: str = key("", printable())
    checksum: str = key("SHA256", one_of("SHA256", "SHA384", "SHA512", "MD5", "CRC32"))
    hardware_key: str = key("", _ATTRIBUTE | "")
    report_s: float = key(10.0, seconds(0.1, 3600))
    silence_s: float = key(30.0, seconds(0.1, 3600))
    install_s: float = key(600.0, seconds(0.1, 604_800))
    rounds: int = key(3, whole(1, 100))
    largest_chunk_bytes: int = key(0, whole(0, 2**28))
    confirm_s: float = key(5.0, seconds(0, 3600))
    units: Mapping[str, str] = named_values(_ATTRIBUTE, _UNIT, "names and UCUM codes")


def claims(address: str, config: object) -> frozenset[str]:
    """See :attr:`edged.api.MapperSpec.claims`: its place on the wire, and the token that it is known by there. A user name is
    the place; on a broker it is the broker that knows devices."""
    assert isinstance(config, MqttConfig)
    found = parse_device(address.partition(":")[2])
    own = {f"{found.place} at {found.link}"}
    if isinstance(found.wire, ListenAddress) and config.proof == "token":
        own.add(f"the token {config.credential or found.place!r} at {found.link}")
    return frozenset(own)


def longest_call_s(config: object) -> float:
    """See :attr:`edged.api.MapperSpec.longest_call_s`: a device is asked who it is and what it runs, or takes a property."""
    return max(config.report_s, config.confirm_s) if isinstance(config, MqttConfig) else 0.0


def parse_link(values: Mapping[str, object], rest: str) -> ListenConfig | BrokerConfig:
    """The ``[[link]]`` table of the address ``mqtt:REST``. Raises ValueError: a line for each fault."""
    address = parse_wire(rest)
    if isinstance(address, ListenAddress):
        listener = read(ListenConfig, values)
        refuse(_listener_faults(listener, address))
        return listener
    broker = read(BrokerConfig, values)
    refuse(_broker_faults(broker, address))
    return broker


def _listener_faults(config: ListenConfig, address: ListenAddress) -> Iterator[str]:
    if not config.certificate and not (address.is_loopback or config.plain):
        yield (
            "certificate: found none, so that anybody on the way could read the devices' tokens; allowed: a file, with its key "
            "in key_credential, or plain = true"
        )
    if config.client_ca and not config.certificate:
        yield "client_ca: found a file, but no certificate: without TLS no device is asked for one; allowed: with certificate"
    if config.client_certificates == "required" and not config.client_ca:
        yield (
            "client_certificates: found 'required', but no client_ca: a device without one would be let in; allowed: with "
            "client_ca"
        )


def _broker_faults(config: BrokerConfig, address: BrokerAddress) -> Iterator[str]:
    if config.tls or config.plain or address.is_loopback:
        return
    for name in ("ca", "certificate", "credential"):
        if getattr(config, name):
            yield (
                f"{name}: found one, but no TLS: password and firmware would go to {address.host} in the clear; allowed: with "
                "tls = true, or with plain = true"
            )


def parse_config(values: Mapping[str, object]) -> MqttConfig:
    """A ``[device.config]`` table. Raises ValueError: a line for each fault."""
    return read(MqttConfig, values)
