"""Log lines: one event, one line, whatever the values are; readable by people, by ``jq`` and by journald."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterator

import pytest

from edged.config import LogSettings
from edged.logs import LineFormatter, set_up


@pytest.fixture(autouse=True)
def _own_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def record(message: str, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("edged.test").makeRecord(
        "edged.test", level, "f", 1, message, (), None, extra=extra
    )
    made.created = 1764000000.5
    return made


def test_key_and_value_with_quotes_only_where_they_are_needed() -> None:
    line = LineFormatter("keyvalue").format(
        record("job ended", device="plc-1", detail='said "no"\nand left', ok=True)
    )
    assert line == (
        'time=2025-11-24T16:00:00.500Z level=info logger=edged.test event="job ended" device=plc-1 '
        r'detail="said \"no\"\nand left" ok=true'
    )


@pytest.mark.parametrize("bad", ["\x1b[31m", "\x9b2J", "\u202eexe", "\x7f", "a\nb=c", "\ud800"])
def test_what_is_no_visible_character_is_escaped(bad: str) -> None:
    record = logging.makeLogRecord({"msg": "event", "detail": f"grün{bad}"})
    line = LineFormatter("keyvalue").format(record)
    assert line.isprintable()
    assert line.endswith(f" detail={json.dumps(f'grün{bad}')}")


def test_empty_fields_are_left_out_but_zero_is_not() -> None:
    line = LineFormatter("keyvalue").format(record("x", reason="", job=None, count=0, ok=False))
    assert line.endswith("event=x count=0 ok=false")


def test_json_has_the_same_fields() -> None:
    fields = json.loads(LineFormatter("json").format(record("job ended", device="plc-1", count=3, path=os)))
    assert fields["event"] == "job ended"
    assert (fields["device"], fields["count"]) == ("plc-1", 3)
    assert "module 'os'" in fields["path"]


@pytest.mark.parametrize("form", ["json", "keyvalue"])
def test_an_exception_is_one_line_too(form: str) -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        made = record("crashed")
        made.exc_info = sys.exc_info()
    line = LineFormatter(form).format(made)
    assert "\n" not in line
    assert "ValueError: first" in line


def test_under_journald_the_priority_comes_first() -> None:
    formatter = LineFormatter("keyvalue", priorities=True)
    levels = (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
    assert [formatter.format(record("x", level))[:3] for level in levels] == [
        "<2>",
        "<3>",
        "<4>",
        "<6>",
        "<7>",
    ]


def test_journald_is_known_by_its_stream(tmp_path: object) -> None:
    read, write = os.pipe()
    status = os.fstat(write)
    with os.fdopen(read) as out, os.fdopen(write, "w") as stream:
        set_up(LogSettings(level="warning"), stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        logging.getLogger("edged.test").info("not shown")
        logging.getLogger("edged.test").warning("shown")
        stream.flush()
        assert out.readline().startswith("<4>time=")
    stream_without_number = io.StringIO()
    set_up(LogSettings(format="json"), stream_without_number, {"JOURNAL_STREAM": "1:2"})
    logging.getLogger("edged.test").info("plain")
    assert json.loads(stream_without_number.getvalue())["event"] == "plain"
