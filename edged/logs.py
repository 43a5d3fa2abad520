"""One line per event on standard error: ``key=value`` or JSON, with whatever ``extra`` fields the caller gave.

Under journald each line begins with its priority (``<4>``, sd-daemon(3)), so that ``journalctl -p warning`` works.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

from edged.clock import to_text
from edged.config import LogSettings

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN = re.compile(r"[^\s\"=\\\x00-\x1f\x7f]+")
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


def set_up(
    settings: LogSettings, stream: TextIO = sys.stderr, environment: Mapping[str, str] = os.environ
) -> None:
    """Send all log records to ``stream`` from now on, in the configured form and from the configured level up."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(settings.format, priorities=_is_journal(stream, environment)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.level.upper())


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """What one record says: time, level, logger, event, then the caller's own fields, then an exception."""
    fields: dict[str, object] = {
        "time": _time(record),
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": record.getMessage(),
    }
    for key, value in vars(record).items():
        if key not in _STANDARD and value not in (None, ""):
            fields[key] = value
    if record.exc_info:
        fields["exception"] = logging.Formatter().formatException(record.exc_info)
    return fields


class LineFormatter(logging.Formatter):
    """``form`` is ``keyvalue`` or ``json``; ``priorities``: begin each line with ``<N>``."""

    def __init__(self, form: str, *, priorities: bool = False) -> None:
        super().__init__()
        self._json = form == "json"
        self._priorities = priorities

    def format(self, record: logging.LogRecord) -> str:
        fields = fields_of(record)
        if self._json:
            line = json.dumps(fields, default=str)
        else:
            line = " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())
        return f"<{_priority(record.levelno)}>{line}" if self._priorities else line


def _quoted(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    # what is no visible character must not command the terminal that the log is read at
    if text.isprintable():
        return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)
    return json.dumps(text)


def _time(record: logging.LogRecord) -> str:
    return to_text(datetime.fromtimestamp(record.created, UTC))


def _priority(level: int) -> int:
    return next((priority for least, priority in _PRIORITIES if level >= least), 7)


def _is_journal(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether ``stream`` is the one that systemd connected to the journal (JOURNAL_STREAM, systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
