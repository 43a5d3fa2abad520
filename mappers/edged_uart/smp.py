"""SMP, the Simple Management Protocol of MCUmgr (Zephyr documentation, "SMP Protocol Specification"): one message.

A header of 8 bytes, then one CBOR map. Pure: knows no wire, no framing and no order of requests.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

import cbor2

from edged.errors import Permanent, Reason
from edged_uart import smp_cbor

HEADER_BYTES: Final = 8
VERSIONS: Final = (2, 1)
"""Of the header, in the order in which a client tries them: a server that knows only 1 does not answer 2."""

_HEADER: Final = struct.Struct(">BBHHBB")


class Op(IntEnum):
    """Kinds of messages; the answer to a request is one more."""

    READ = 0
    READ_ANSWER = 1
    WRITE = 2
    WRITE_ANSWER = 3


class Group(IntEnum):
    """The management groups that are spoken here."""

    OS = 0
    IMAGE = 1
    STATISTICS = 2
    SETTINGS = 3


@dataclass(frozen=True, slots=True)
class Command:
    """What is asked for: a command of a group, read or written."""

    op: Op
    group: int
    number: int

    def __str__(self) -> str:
        group = Group(self.group).name.lower() if self.group in list(Group) else str(self.group)
        return f"{self.op.name.lower()} {group}/{self.number}"


ECHO: Final = Command(Op.WRITE, Group.OS, 0)
RESET: Final = Command(Op.WRITE, Group.OS, 5)
PARAMETERS: Final = Command(Op.READ, Group.OS, 6)
APPLICATION_INFO: Final = Command(Op.READ, Group.OS, 7)
BOOTLOADER_INFO: Final = Command(Op.READ, Group.OS, 8)
IMAGE_STATE: Final = Command(Op.READ, Group.IMAGE, 0)
SET_IMAGE_STATE: Final = Command(Op.WRITE, Group.IMAGE, 0)
UPLOAD: Final = Command(Op.WRITE, Group.IMAGE, 1)
ERASE: Final = Command(Op.WRITE, Group.IMAGE, 5)
SLOT_INFO: Final = Command(Op.READ, Group.IMAGE, 6)
STATISTICS: Final = Command(Op.READ, Group.STATISTICS, 0)
STATISTICS_GROUPS: Final = Command(Op.READ, Group.STATISTICS, 1)
SETTING: Final = Command(Op.READ, Group.SETTINGS, 0)
SET_SETTING: Final = Command(Op.WRITE, Group.SETTINGS, 0)
COMMIT_SETTINGS: Final = Command(Op.WRITE, Group.SETTINGS, 2)
SAVE_SETTINGS: Final = Command(Op.WRITE, Group.SETTINGS, 3)


@dataclass(frozen=True, slots=True)
class Message:
    """One message. ``version`` is the header's, 1 or 2; ``body`` the CBOR map, decoded."""

    op: Op
    group: int
    number: int
    sequence: int
    body: Mapping[str, Any]
    version: int = 2

    def answers(self, command: Command, sequence: int) -> bool:
        """Is this the answer to that request?"""
        return (self.op, self.group, self.number, self.sequence) == (
            command.op + 1, command.group, command.number, sequence,
        )  # fmt: skip


class NotAMessageError(ValueError):
    """These bytes are no SMP message."""


class ErrorAnswer(Permanent):
    """The server refused. ``group`` is None for the codes that are the same for all groups (``enum mcumgr_err_t``)."""

    def __init__(self, command: Command, group: int | None, code: int) -> None:
        self.command = command
        self.group = group
        self.code = code
        self.name = _NAMES.get(group, {}).get(code, f"error {code}")
        whose = "" if group is None else f" of group {group}"
        super().__init__(
            Reason.DEVICE_ERROR, f"the device answered {self.name} (code {code}{whose}) to {command}"
        )

    @property
    def not_offered(self) -> bool:
        """The server does not know this command, or has nothing behind it."""
        return (self.group, self.code) in ((None, _ENOTSUP), (Group.SETTINGS, _SAVE_NOT_SUPPORTED))

    @property
    def passes(self) -> bool:
        """The server has no room, or is busy: it may take the same request a moment later."""
        return self.group is None and self.code in (_ENOMEM, _EBUSY)

    @property
    def is_too_large(self) -> bool:
        """The slot has no room for the image."""
        return (self.group, self.code) == (Group.IMAGE, _IMAGE_TOO_LARGE)

    @property
    def is_overrun(self) -> bool:
        """The piece goes beyond the end of what is uploaded."""
        return (self.group, self.code) == (Group.IMAGE, _IMAGE_DATA_OVERRUN)

    @property
    def is_of_version(self) -> bool:
        """The server does not know the version of the header."""
        return self.group is None and self.code in (_TOO_OLD, _TOO_NEW)


def encode(command: Command, sequence: int, body: Mapping[str, object], version: int = 2) -> bytes:
    """A request. ``sequence`` counts modulo 256."""
    payload = cbor2.dumps(dict(body))
    # version 2 is 1 on the wire: bits 3 and 4 of the first byte
    first = (version - 1) << 3 | command.op
    return _HEADER.pack(first, 0, len(payload), command.group, sequence & 0xFF, command.number) + payload


def message_bytes(header: bytes | bytearray) -> int:
    """How long the message is that begins with ``header``, 8 bytes at least."""
    _, _, length, _, _, _ = _HEADER.unpack_from(header)
    assert isinstance(length, int)
    return HEADER_BYTES + length


def decode(data: bytes) -> Message:
    """The message that is the whole of ``data``. Raises NotAMessageError."""
    if len(data) < HEADER_BYTES or len(data) != message_bytes(data):
        raise NotAMessageError(f"{len(data)} bytes")
    first, _, _, group, sequence, number = _HEADER.unpack_from(data)
    if first & 0x07 not in list(Op):
        raise NotAMessageError(f"operation {first & 0x07}")
    body = _body(data[HEADER_BYTES:])
    return Message(Op(first & 0x07), group, number, sequence, body, (first >> 3 & 0x03) + 1)


def _body(payload: bytes) -> Mapping[str, Any]:
    if not payload:
        return {}
    try:
        return smp_cbor.decode(payload)
    except ValueError as error:
        raise NotAMessageError(f"no CBOR map: {error}") from error


def check(command: Command, body: Mapping[str, Any]) -> Mapping[str, Any]:
    """``body``, unless it says that the server refused ``command``. Raises ErrorAnswer.

    Version 2 has ``{"err": {"group": g, "rc": n}}``, version 1 ``{"rc": n}``; 0 is success.
    """
    error = body.get("err")
    if isinstance(error, dict) and _whole(error.get("rc")):
        raise ErrorAnswer(command, _whole(error.get("group")), _whole(error["rc"]))
    if _whole(body.get("rc")):
        raise ErrorAnswer(command, None, _whole(body["rc"]))
    return body


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


_ENOMEM: Final = 2
_ENOTSUP: Final = 8
_EBUSY: Final = 10
_TOO_OLD: Final = 12
_TOO_NEW: Final = 13
_IMAGE_TOO_LARGE: Final = 30
_IMAGE_DATA_OVERRUN: Final = 31
_SAVE_NOT_SUPPORTED: Final = 8

_COMMON: Final = {
    1: "EUNKNOWN", 2: "ENOMEM", 3: "EINVAL", 4: "ETIMEOUT", 5: "ENOENT", 6: "EBADSTATE", 7: "EMSGSIZE",
    8: "ENOTSUP", 9: "ECORRUPT", 10: "EBUSY", 11: "EACCESSDENIED", 12: "UNSUPPORTED_TOO_OLD",
    13: "UNSUPPORTED_TOO_NEW",
}  # fmt: skip
_IMAGE: Final = {
    1: "UNKNOWN", 2: "FLASH_CONFIG_QUERY_FAIL", 3: "NO_IMAGE", 4: "NO_TLVS", 5: "INVALID_TLV",
    6: "TLV_MULTIPLE_HASHES_FOUND", 7: "TLV_INVALID_SIZE", 8: "HASH_NOT_FOUND", 9: "NO_FREE_SLOT",
    10: "FLASH_OPEN_FAILED", 11: "FLASH_READ_FAILED", 12: "FLASH_WRITE_FAILED", 13: "FLASH_ERASE_FAILED",
    14: "INVALID_SLOT", 15: "NO_FREE_MEMORY", 16: "FLASH_CONTEXT_ALREADY_SET", 17: "FLASH_CONTEXT_NOT_SET",
    18: "FLASH_AREA_DEVICE_NULL", 19: "INVALID_PAGE_OFFSET", 20: "INVALID_OFFSET", 21: "INVALID_LENGTH",
    22: "INVALID_IMAGE_HEADER", 23: "INVALID_IMAGE_HEADER_MAGIC", 24: "INVALID_HASH",
    25: "INVALID_FLASH_ADDRESS", 26: "VERSION_GET_FAILED", 27: "CURRENT_VERSION_IS_NEWER",
    28: "IMAGE_ALREADY_PENDING", 29: "INVALID_IMAGE_VECTOR_TABLE", 30: "INVALID_IMAGE_TOO_LARGE",
    31: "INVALID_IMAGE_DATA_OVERRUN", 32: "IMAGE_CONFIRMATION_DENIED",
    33: "IMAGE_SETTING_TEST_TO_ACTIVE_DENIED",
}  # fmt: skip
_OS: Final = {
    1: "UNKNOWN", 2: "INVALID_FORMAT", 3: "QUERY_YIELDS_NO_ANSWER", 4: "RTC_NOT_SET", 5: "RTC_COMMAND_FAILED",
    6: "QUERY_RESPONSE_VALUE_NOT_VALID",
}  # fmt: skip
_STATISTICS: Final = {
    1: "UNKNOWN", 2: "INVALID_GROUP", 3: "INVALID_STAT_NAME", 4: "INVALID_STAT_SIZE", 5: "WALK_ABORTED",
}  # fmt: skip
_SETTINGS: Final = {
    1: "UNKNOWN", 2: "KEY_TOO_LONG", 3: "KEY_NOT_FOUND", 4: "READ_NOT_SUPPORTED", 5: "ROOT_KEY_NOT_FOUND",
    6: "WRITE_NOT_SUPPORTED", 7: "DELETE_NOT_SUPPORTED", 8: "SAVE_NOT_SUPPORTED",
}  # fmt: skip
_NAMES: Final[dict[int | None, dict[int, str]]] = {
    None: _COMMON,
    Group.OS: _OS,
    Group.IMAGE: _IMAGE,
    Group.STATISTICS: _STATISTICS,
    Group.SETTINGS: _SETTINGS,
}
