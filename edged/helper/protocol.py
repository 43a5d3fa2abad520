"""What is said on the helper's socket: one JSON object a line, one request for each connection. Pure.

A request is ``{"verb": …}``; an answer is any number of ``{"event": …}`` lines and then one that has ``result``: ``ok``,
``failed`` (it was tried) or ``refused`` (nothing was done), the last two with a ``reason`` and a ``detail``.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MOST_REQUEST_BYTES = 1024
MOST_DETAIL_CHARS = 500
SOCKET = "/run/edged-helper.sock"

# Policy 5.6.12, without colons in the upstream version. The last character is no sign: apt reads "edged=1.0-" as "remove it".
_VERSION = re.compile(r"(?:\d{1,9}:)?\d(?:[A-Za-z0-9.+~-]{0,62}[A-Za-z0-9])?", re.ASCII)


class Verb(StrEnum):
    """All that can be asked for."""

    STATUS = "status"
    UPGRADE = "upgrade"
    ROLLBACK = "rollback"
    REBOOT = "reboot"


class Why(StrEnum):
    """Why something was refused or failed. Where the daemon's list of reasons has the same thing, this has its word."""

    REQUEST_INVALID = "request_invalid"
    NOT_ALLOWED = "not_allowed"
    BUSY = "busy"
    STOPPING = "stopping"
    NOT_INSTALLED = "not_installed"
    NOT_FOUND = "not_found"
    OLDER = "older"
    REQUIRES_UNMET = "requires_unmet"
    NO_FALLBACK = "no_fallback"
    SIGNATURE_INVALID = "signature_invalid"
    HASH_MISMATCH = "hash_mismatch"
    FETCH_FAILED = "fetch_failed"
    DISK_FULL = "disk_full"
    STORAGE_FAILED = "storage_failed"
    INSTALL_FAILED = "install_failed"
    HEALTH_FAILED = "health_failed"
    REVERT_FAILED = "revert_failed"
    INTERRUPTED = "interrupted"
    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    REBOOT_FAILED = "reboot_failed"


CURES: dict[Why, str] = {
    Why.REQUEST_INVALID: "see edged node --help",
    Why.NOT_ALLOWED: "only root and the daemon may ask; use sudo",
    Why.BUSY: "wait for it to end; edged node status shows it",
    Why.STOPPING: "ask again in a moment",
    Why.NOT_INSTALLED: "the package is not installed, or not whole: systemctl start edged-recover",
    Why.NOT_FOUND: "publish that version in the repository; apt-cache policy edged shows what there is",
    Why.OLDER: "upgrades go forward; edged node rollback goes back to the version before",
    Why.REQUIRES_UNMET: "apt-get install --simulate edged=VERSION says what is in the way",
    Why.NO_FALLBACK: "publish the version that runs now in the repository too",
    Why.SIGNATURE_INVALID: "the repository is not signed by a key that apt trusts: see Signed-By in its sources file",
    Why.HASH_MISMATCH: "the file is not what was signed; copy the repository again from its source",
    Why.FETCH_FAILED: "check that the repository can be reached: apt-get update",
    Why.DISK_FULL: "free space below /var",
    Why.STORAGE_FAILED: "see journalctl -u edged-helper",
    Why.INSTALL_FAILED: "see journalctl -u edged-helper",
    Why.HEALTH_FAILED: "see journalctl -u edged for why the new version did not stay up",
    Why.REVERT_FAILED: "see journalctl -u edged-helper, then edged node rollback, or apt-get install --reinstall edged",
    Why.INTERRUPTED: "ask again",
    Why.ATTEMPTS_EXHAUSTED: "see journalctl -u edged-helper",
    Why.REBOOT_FAILED: "see journalctl -u edged-helper",
}
"""Reason to what a person can do."""


class Refusal(Exception):
    """Nothing was changed."""

    def __init__(self, why: Why, detail: str) -> None:
        super().__init__(detail)
        self.why = why
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Request:
    """A request that is in order. ``version`` is empty but with ``upgrade``."""

    verb: Verb
    version: str = ""


def parse(line: bytes) -> Request:
    """The request in ``line``. Raises :class:`Refusal` (``request_invalid``) for whatever is not exactly one."""
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise Refusal(Why.REQUEST_INVALID, "found no JSON object on one line of UTF-8") from exc
    if not isinstance(found, dict):
        raise Refusal(Why.REQUEST_INVALID, f"found {type(found).__name__}, expected an object")
    verb = found.pop("verb", None)
    if not isinstance(verb, str) or verb not in list(Verb):
        raise Refusal(Why.REQUEST_INVALID, f"verb: expected one of {', '.join(Verb)}")
    version = found.pop("version", "") if verb == Verb.UPGRADE else ""
    if found:
        raise Refusal(Why.REQUEST_INVALID, f"{verb} takes no {min(found)[:40]!r}")
    if verb == Verb.UPGRADE and not is_version(version):
        raise Refusal(Why.REQUEST_INVALID, "version: expected a version of a Debian package, like 1.2.0")
    return Request(Verb(verb), version)


def is_version(text: object) -> bool:
    """Whether ``text`` is a version that may be handed to apt and be a part of a file's name."""
    return isinstance(text, str) and _VERSION.fullmatch(text) is not None


def event(name: str, **fields: Any) -> bytes:
    """A line that is not the last."""
    return _line({"event": name, **fields})


def done(**fields: Any) -> bytes:
    """The last line, where all went well."""
    return _line({"result": "ok", **fields})


def refused(why: Why, detail: str) -> bytes:
    """The last line, where nothing was done."""
    return _line({"result": "refused", "reason": why.value, "detail": shortened(detail), "cure": CURES[why]})


def failed(why: Why, detail: str) -> bytes:
    """The last line, where it was tried."""
    return _line({"result": "failed", "reason": why.value, "detail": shortened(detail), "cure": CURES[why]})


def last(outcome: dict[str, Any]) -> bytes:
    """The last line of an upgrade: how it ended."""
    return _line(outcome)


def shortened(detail: str) -> str:
    """``detail`` as one line of bounded length."""
    text = " ".join(detail.split())
    return text if len(text) <= MOST_DETAIL_CHARS else text[: MOST_DETAIL_CHARS - 1] + "…"


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode() + b"\n"
