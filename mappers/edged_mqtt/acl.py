"""The access list that a broker needs so that no device reaches another's topics, as mosquitto reads it. Pure.

A broker alone knows who sends what. A device is known to it by its user name, which is the last level of its prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from edged_mqtt.config import SCHEME, BrokerAddress, BrokerConfig, parse_device, parse_wire

WRITES: Final = (
    "v1/devices/me/telemetry",
    "v1/devices/me/attributes/request/+",
    "v1/devices/me/rpc/request/+",
    "v2/+/request/+/chunk/+",
)
READS: Final = (
    "v1/devices/me/attributes/response/+",
    "v1/devices/me/rpc/response/+",
    "v2/+/response/+/chunk/+",
    "v2/+/error",
)
BOTH: Final = ("v1/devices/me/attributes",)
"""Of a device, below its prefix."""

_HEAD = """\
# Who may use which topics at {link}, for mosquitto: no device reaches another's. Made by
#   edged mapper acl {link}
# from edged's configuration; make it anew when that has another device, and reload mosquitto.
#
# 1. Write this to /etc/mosquitto/edged.acl (owner root, group mosquitto, mode 0640).
# 2. In /etc/mosquitto/conf.d/edged.conf:
#      allow_anonymous false
#      password_file /etc/mosquitto/passwords
#      acl_file /etc/mosquitto/edged.acl
# 3. Once: install -o root -g mosquitto -m 0640 /dev/null /etc/mosquitto/passwords
#    A password for each user below: mosquitto_passwd /etc/mosquitto/passwords USER
# 4. systemctl reload mosquitto
"""


def access_list(rest: str, config: object, devices: Sequence[str]) -> str:
    """For the broker at ``rest`` with the table ``config``, and those of ``devices`` (addresses without the scheme) on it.

    Raises ValueError where there is no broker, none of the devices is on it, this node has no user name there, or two would
    have the same.
    """
    wire = parse_wire(rest)
    if not isinstance(wire, BrokerAddress):
        raise ValueError("it is this node's own endpoint, where a device reaches nobody's topics but its own")
    node = config.user if isinstance(config, BrokerConfig) else ""
    if not node:
        raise ValueError("user: the [[link]] table has none: by what name does the broker know this node?")
    prefixes = sorted(parsed.place for parsed in map(parse_device, devices) if parsed.wire == wire)
    if not prefixes:
        raise ValueError("no device of the configuration is on it")
    parts = [
        _HEAD.format(link=f"{SCHEME}:{wire}"),
        _entry(node, [f"readwrite {prefix}/#" for prefix in prefixes]),
    ]
    known = {node: "this node"}
    for prefix in prefixes:
        user = prefix.rpartition("/")[2]
        if user in known:
            raise ValueError(f"{known[user]} and {prefix} have the same user name {user!r}")
        known[user] = prefix
        kinds = (("write", WRITES), ("readwrite", BOTH), ("read", READS))
        parts.append(_entry(user, [f"{kind} {prefix}/{topic}" for kind, topics in kinds for topic in topics]))
    return "\n".join(parts)


def _entry(user: str, rights: Sequence[str]) -> str:
    return "\n".join([f"user {user}", *(f"topic {right}" for right in rights), ""])
