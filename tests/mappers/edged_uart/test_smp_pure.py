"""SMP without a wire: messages, framings, what a setting's bytes mean, a device's table."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.errors import Permanent, Reason
from edged_uart import smp, smp_cbor
from edged_uart.smp import Command, ErrorAnswer, Message, NotAMessageError, Op
from edged_uart.smp_config import Setting, SmpConfig, parse_smp
from edged_uart.smp_framing import Cobs, Console, Framing, Raw, crc16, stuff, unstuff
from edged_uart.smp_kept import Lines
from edged_uart.smp_upload import Window

FRAMINGS: dict[str, Callable[[], Framing]] = {
    "console": Console,
    "short lines": lambda: Console(16),
    "raw": Raw,
    "cobs": Cobs,
}
framings = pytest.mark.parametrize("make", FRAMINGS.values(), ids=FRAMINGS)

bodies = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=6),
    st.one_of(st.integers(-(2**63), 2**63 - 1), st.binary(max_size=300), st.text(max_size=20), st.booleans()),
    max_size=5,
)
answers = st.builds(
    lambda op, group, number, sequence, body: smp.encode(Command(op, group, number), sequence, body),
    st.sampled_from([Op.READ_ANSWER, Op.WRITE_ANSWER]),
    st.sampled_from(list(smp.Group)),
    st.integers(0, 255),
    st.integers(0, 255),
    bodies,
)


def fed(framing: Framing, data: bytes, cuts: list[int]) -> list[bytes]:
    """What comes out where ``data`` arrives in pieces that end at ``cuts``."""
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {len(data)})
    begins = [0, *ends[:-1]]
    return [one for begin, end in zip(begins, ends, strict=True) for one in framing.feed(data[begin:end])]


# -- lines


def test_lines_are_those_of_the_image_that_runs() -> None:
    lines = Lines()
    lines.take("since the port was opened")
    lines.belong_to("old")
    assert list(lines.newest) == ["since the port was opened"] and not lines.is_from_start
    lines.begin_reset()
    lines.take("the old one, still")
    lines.belong_to("new")
    assert not lines.newest and lines.is_from_start and lines.evidence == ""
    lines.take("ready")
    lines.begin_session()
    lines.belong_to("new")
    assert list(lines.newest) == ["ready"] and lines.is_from_start, "the session was lost, and not the device"
    lines.begin_session()
    lines.belong_to("old")
    assert not lines.newest and not lines.is_from_start


def test_a_banner_begins_anew_and_vouches_for_what_follows() -> None:
    lines = Lines()
    for line in ("before", "*** Booting Zephyr OS ***", "", "ready"):
        lines.take(line)
    lines.belong_to("new")
    assert list(lines.newest) == ["*** Booting Zephyr OS ***", "", "ready"] and lines.is_from_start
    assert lines.evidence == "*** Booting Zephyr OS ***\nready"
    lines.begin_session()
    lines.belong_to("other")
    assert not lines.newest, "that banner was heard in another session"
    lines.begin_reset()
    lines.begin_session()
    lines.take("whoever says it")
    lines.belong_to("other")
    assert not lines.newest, "the session was lost in the reset"


# -- messages


def test_the_example_of_the_specification() -> None:
    """OS group, echo, header version 2: 0x0a is version 1 on the wire in bits 3 and 4, and the operation "write"."""
    message = smp.encode(smp.ECHO, 7, {"d": "hi"})
    assert message == bytes.fromhex("0a00 0006 0000 07 00") + b"\xa1adbhi"
    assert smp.encode(smp.ECHO, 7, {"d": "hi"}, version=1)[0] == 0x02


nested = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.floats(allow_nan=False),
        st.integers(-(2**64), 2**64 - 1),
        st.text(),
        st.binary(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text(max_size=4), nested, max_size=4))
def test_any_body_without_tags_is_decoded(body: dict[str, Any]) -> None:
    assert smp_cbor.decode(cbor2.dumps(body)) == body


@pytest.mark.parametrize(
    ("data", "body"),
    [
        ("a0", {}),
        ("bf61610161629f010203ffff", {"a": 1, "b": [1, 2, 3]}),
        ("bf6161bfffff", {"a": {}}),
        ("a17f61616162ff5f4101420203ff", {"ab": b"\1\2\3"}),
        ("a16161" + "81" * 14 + "80", {"a": [[[[[[[[[[[[[[[]]]]]]]]]]]]]]]}),
    ],
    ids=["empty", "indefinite lengths", "empty and indefinite", "strings in pieces", "fifteen arrays"],
)
def test_a_body_may_be_written_in_any_way(data: str, body: dict[str, Any]) -> None:
    """Zephyr's encoder writes maps and arrays of indefinite length (RFC 8949, 3.2)."""
    assert smp_cbor.decode(bytes.fromhex(data)) == body


SLOW = "(?i)" + "".join(f"[\1-{chr(0x10FFFF - number)}]" for number in range(500))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (cbor2.dumps({"a": cbor2.CBORTag(35, SLOW)}), "a tag"),
        (b"\xa1\xc2\x59\x0b\xb8" + b"\xff" * 3000 + b"\0", "a tag"),
        (cbor2.dumps({"rc": 1 << 20_000}), "a tag"),
        (bytes.fromhex("a1d81cd9303981d81d0000"), "a tag"),
        (cbor2.dumps({1: 2}), "no text"),
        (cbor2.dumps({"a": [{b"b": 2}]}), "no text"),
        (b"\x81\x01", "no map"),
        (b"\x01", "no map"),
        (b"\xa1\x61a", "cut"),
        (b"\xa1\x61a\x43ab", "its only item"),
        (b"\xa1\x61a\x82\x43ab", "cut"),
        (b"\xa1\x61a\x18", "cut"),
        (b"\xa0\0", "its only item"),
        (b"\xa1\x61a\xff", "break"),
        (b"\xbf\x61a\xff", "break"),
        (b"\xff", "break"),
        (b"\xa1\x61a\x1c", "a head of 0x1c"),
        (b"\xa1\x61a\x1f", "a head of 0x1f"),
        (b"\xa1\x61a\x5f\x61a\xff", "pieces"),
        (b"\xa1\x61a" + b"\x81" * 40 + b"\0", "levels"),
        (b"\xa1\x61a\x9b" + b"\xff" * 8 + b"\0" * 60_000, "items"),
        (b"\xa1\x61a\x61\xff", "unicode|utf-8"),
    ],
)
def test_what_no_server_answers_is_no_message_and_costs_nothing(data: bytes, why: str) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match=why):
        smp_cbor.decode(data)
    assert time.process_time() - begun < 0.2
    with pytest.raises(NotAMessageError):
        smp.decode(bytes((9, 0)) + len(data).to_bytes(2, "big") + bytes((0, 1, 0, 0)) + data)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_body_or_none(data: bytes) -> None:
    with suppress(ValueError):
        assert isinstance(smp_cbor.decode(b"\xa1\x61a" + data), dict)


@given(
    st.sampled_from(list(Op)),
    st.integers(0, 65535),
    st.integers(0, 255),
    st.integers(0, 511),
    bodies,
    st.sampled_from([1, 2]),
)
def test_what_was_encoded_is_decoded(
    op: Op, group: int, number: int, sequence: int, body: dict[str, object], version: int
) -> None:
    data = smp.encode(Command(op, group, number), sequence, body, version)
    assert smp.decode(data) == Message(op, group, number, sequence & 0xFF, body, version)
    assert smp.message_bytes(data) == len(data)


@given(st.binary(max_size=200))
def test_garbage_is_no_message(data: bytes) -> None:
    try:
        found = smp.decode(data)
    except NotAMessageError:
        return
    assert isinstance(found.body, dict)


@given(st.binary(max_size=64))
def test_a_body_that_is_no_single_map_is_no_message(payload: bytes) -> None:
    header = bytes((3, 0)) + len(payload).to_bytes(2, "big") + bytes(4)
    try:
        found = smp.decode(header + payload)
    except NotAMessageError:
        return
    assert found.op is Op.WRITE_ANSWER and isinstance(found.body, dict)


@pytest.mark.parametrize(
    "payload", [b"\x9f" * 3000, b"\xbf\x61a" * 2000, b"\xbb" + b"\xff" * 8, b"\x5b" + b"\xff" * 8]
)
def test_what_would_exhaust_a_careless_reader_is_no_message(payload: bytes) -> None:
    with pytest.raises(NotAMessageError):
        smp.decode(bytes((1, 0)) + len(payload).to_bytes(2, "big") + bytes(4) + payload)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"rc": 8}, "ENOTSUP"),
        ({"err": {"group": 1, "rc": 9}}, "NO_FREE_SLOT"),
        ({"err": {"group": 3, "rc": 3}}, "KEY_NOT_FOUND"),
        ({"err": {"group": 64, "rc": 5}}, "error 5"),
        ({"rc": 256}, "error 256"),
    ],
)
def test_a_refusal_is_told_by_the_name_of_the_specification(body: dict[str, object], name: str) -> None:
    with pytest.raises(Permanent) as caught:
        smp.check(smp.UPLOAD, body)
    assert isinstance(caught.value, ErrorAnswer) and caught.value.name == name
    assert caught.value.reason is Reason.DEVICE_ERROR and "write image/1" in caught.value.detail


@pytest.mark.parametrize(
    "body", [{}, {"rc": 0}, {"off": 3, "rc": 0}, {"err": {"group": 1, "rc": 0}}, {"err": "x"}]
)
def test_a_success_is_none(body: dict[str, object]) -> None:
    assert smp.check(smp.UPLOAD, body) == body


# -- framings


@framings
@given(data=st.data())
def test_messages_come_out_whole_wherever_they_are_cut(
    make: Callable[[], Framing], data: st.DataObject
) -> None:
    messages = data.draw(st.lists(answers, max_size=4))
    framing = make()
    wire = b"".join(framing.encode(message) for message in messages)
    assert fed(framing, wire, data.draw(st.lists(st.integers(0, 5000), max_size=8))) == messages


@framings
@given(answer=answers)
def test_byte_by_byte(make: Callable[[], Framing], answer: bytes) -> None:
    framing = make()
    assert [one for byte in framing.encode(answer) for one in framing.feed(bytes([byte]))] == [answer]


@framings
@given(garbage=st.binary(max_size=400))
def test_garbage_is_survived(make: Callable[[], Framing], garbage: bytes) -> None:
    """Whatever came before: after a time-out the next message is understood."""
    framing = make()
    framing.feed(garbage)
    framing.forget()
    # what ends a line or a frame of the garbage
    framing.feed(b"" if isinstance(framing, Raw) else b"\n" if isinstance(framing, Console) else b"\0")
    answer = smp.encode(Command(Op.READ_ANSWER, 0, 6), 1, {"buf_size": 384})
    assert framing.feed(framing.encode(answer)) == [answer]


@pytest.mark.parametrize("make", [Console, Cobs], ids=["console", "cobs"])
@given(data=st.data())
def test_a_flipped_lost_or_doubled_byte_never_makes_another_message(
    make: Callable[[], Framing], data: st.DataObject
) -> None:
    """CRC-16 finds every burst of up to 16 bits: one byte that is another, missing or there twice is such a one."""
    answer = data.draw(answers)
    framing = make()
    wire = bytearray(framing.encode(answer))
    at = data.draw(st.integers(0, len(wire) - 1))
    change = data.draw(st.sampled_from(["flip", "lose", "double"]))
    if change == "flip":
        wire[at] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "lose":
        del wire[at]
    else:
        wire.insert(at, wire[at])
    found = framing.feed(bytes(wire))
    assert found in ([], [answer])
    # and the one after it is found again; a frame whose end is missing takes the next one with it
    framing.feed(b"\n" if make is Console else b"\0")
    assert answer in framing.feed(framing.encode(answer))


def test_the_application_s_own_lines_share_the_console() -> None:
    framing = Console(16)
    answer = smp.encode(Command(Op.READ_ANSWER, 0, 6), 1, {"buf_size": 384, "buf_count": 4})
    first, *following = framing.encode(answer).splitlines(keepends=True)
    wire = b"uptime=3\r\n" + b"uart:~$ " + first + b"[00:01] <inf> x: y\r\n" + b"".join(following) + b"bye\n"
    assert framing.feed(wire) == [answer]
    assert list(framing.text_lines()) == ["uptime=3", "uart:~$ ", "[00:01] <inf> x: y", "bye"]
    assert list(framing.text_lines()) == []


@given(st.integers(16, 300), st.binary(min_size=8, max_size=700))
def test_no_line_is_longer_than_allowed(line_bytes: int, message: bytes) -> None:
    lines = Console(line_bytes).encode(message).splitlines(keepends=True)
    assert max(map(len, lines)) <= line_bytes
    assert lines[0].startswith(b"\x06\x09") and all(line.startswith(b"\x04\x14") for line in lines[1:])
    packet = base64.b64decode(b"".join(line[2:-1] for line in lines))
    assert packet == (len(message) + 2).to_bytes(2, "big") + message + crc16(message)


def test_a_line_that_does_not_end_costs_no_memory() -> None:
    framing = Console()
    for _ in range(100):
        framing.feed(b"x" * 10_000)
    assert len(framing._line) <= 4096


def test_the_crc_of_the_catalogue() -> None:
    assert crc16(b"123456789") == bytes.fromhex("31c3")


@pytest.mark.parametrize(
    ("plain", "stuffed"),
    [
        ("", "01"),
        ("00", "0101"),
        ("0000", "010101"),
        ("11220033", "031122 0233"),
        ("11000000", "0211 010101"),
    ],
)
def test_byte_stuffing_of_the_paper(plain: str, stuffed: str) -> None:
    assert stuff(bytes.fromhex(plain)) == bytes.fromhex(stuffed)


@given(st.lists(st.one_of(st.binary(max_size=300), st.just(b"\1" * 254), st.just(b"\0"))).map(b"".join))
def test_byte_stuffing_has_no_zero_and_comes_back(data: bytes) -> None:
    assert 0 not in stuff(data)
    assert unstuff(stuff(data)) == data


@given(st.binary(max_size=300))
def test_what_is_no_byte_stuffing_is_an_error(data: bytes) -> None:
    try:
        unstuff(data)
    except ValueError:
        assert data


# -- settings, and the table


@pytest.mark.parametrize(
    ("kind", "data", "value"),
    [
        ("text", "6869", "hi"),
        ("bytes", "00ff", "00ff"),
        ("bool", "01", True),
        ("uint8", "ff", 255),
        ("int8", "ff", -1),
        ("uint32", "e8030000", 1000),
        ("int64", "ffffffffffffffff", -1),
        ("float32", "0000c03f", 1.5),
    ],
)
def test_a_setting_is_a_value(kind: str, data: str, value: str | float) -> None:
    setting = Setting(kind)
    assert setting.value(bytes.fromhex(data)) == value
    assert setting.data(value) == bytes.fromhex(data)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("uint8", 256), ("uint8", -1), ("uint8", "1"), ("uint8", True), ("uint8", 1.5), ("bool", 1), ("text", 1),
        ("bytes", "x"), ("float32", None), ("float32", 1e300),
    ],
)  # fmt: skip
def test_what_is_not_of_its_type_is_refused(kind: str, value: object) -> None:
    with pytest.raises(ValueError, match=r"found|hex"):
        Setting(kind).data(value)  # type: ignore[arg-type]


@given(st.sampled_from(["int8", "uint16", "float64", "bool"]), st.binary(max_size=12))
def test_bytes_of_another_length_are_no_number(kind: str, data: bytes) -> None:
    setting = Setting(kind)
    try:
        value = setting.value(data)
    except ValueError:
        return
    assert setting.value(setting.data(value)) == value or value != value


@given(most=st.integers(1, 32), answers=st.lists(st.booleans(), max_size=300))
def test_a_window_stays_in_its_bounds_and_halves_with_each_loss(most: int, answers: list[bool]) -> None:
    window = Window(most, most)
    for good in answers:
        before, window = window, window.after_answer() if good else window.after_loss()
        assert 1 <= window.size <= most
        assert window.size - before.size in (0, 1) if good else window.size == max(1, before.size // 2)


@given(most=st.integers(2, 32), losses=st.integers(1, 20))
def test_a_window_grows_by_one_after_a_run_that_doubles_with_each_loss(most: int, losses: int) -> None:
    window = Window(most, most)
    for _ in range(losses):
        window = window.after_loss()
    shrunk, run = window.size, 0
    while window.size == shrunk:
        window, run = window.after_answer(), run + 1
    assert window.size == shrunk + 1 and run == min(1024, 8 * 2**losses)
    while window.size < most:
        window = window.after_answer()
    assert window.after_answer() == window


def test_a_table_is_a_configuration() -> None:
    assert parse_smp({}) == SmpConfig()
    found = parse_smp(
        {"baud": 57600, "statistics": [], "settings": {"app/interval": {"type": "uint32", "unit": "s"}}}
    )
    assert found == SmpConfig(baud=57600, statistics=(), settings={"app/interval": Setting("uint32", "s")})


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"bauds": 1}, "bauds: found an unknown key; allowed: answer_s, baud, boot_loader, boot_s"),
        ({"framing": "slip"}, "framing: found 'slip'; allowed: 'console' or 'raw' or 'cobs'"),
        ({"window": 33}, "window: found 33; allowed: a whole number from 0 to 32"),
        ({"window": True}, "window: found True"),
        ({"answer_s": "1"}, "answer_s: found '1'; allowed: a number of seconds from 0.05 to 60"),
        ({"statistics": "all"}, "statistics: found 'all'; allowed: a list"),
        ({"settings": {"x": {"type": "int128"}}}, "settings.x.type: found 'int128'; allowed: 'text'"),
        ({"settings": {"x": {"typ": "int8"}}}, "settings.x.typ: found an unknown key; allowed: type, unit"),
    ],
)
def test_a_fault_in_the_table_is_named(table: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_smp(table)
    assert text in str(caught.value)
