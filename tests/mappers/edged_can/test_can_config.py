"""The mapper's table, its properties, its keys, its frames' arithmetic: what can be told without a bus."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from can_kit import (
    LINKS,
    SPEC,
    Segments,
    bus_name,
    connected,
    device,
    fresh,
    on_bus,
    quiet,
    secret,
    soon,
    verified,
)
from hypothesis import given
from hypothesis import strategies as st
from uds_server import BASE, DEFAULT, SECRET, Controller, make_app

import edged_can
from edged.api import Desired, Device, HealthCheck, MapperSpec, Reported
from edged.errors import EdgedError, Permanent, Reason, Transient
from edged.links import LinkPool, ShortMemory, device_env
from edged_can import security
from edged_can.client import RefusedForGood, RefusedForNow, code_name, negative
from edged_can.config import TYPES, Property, Security, UdsConfig, parse
from edged_can.properties import WrongType, decode, encode, text_of
from edged_can.refused import RefusedKeys
from edged_can.session import UdsSession

FAULTS = [
    ({"baud": 1}, "baud: found an unknown key; allowed: address_bytes"),
    ({"request_id": True}, "request_id: found True; allowed: a whole number"),
    ({"request_id": 0x800}, "request_id: found 0x800; allowed: at most 0x7ff without extended_ids"),
    ({"response_id": 0x7E0}, "response_id: found 0x7e0, which is request_id too"),
    ({"target_address": 5}, "source_address: found one address of two"),
    ({"target_address": 256, "source_address": 1}, "target_address: found 256"),
    ({"target_address": True, "source_address": True}, "target_address: found True"),
    ({"padding": "cc"}, "padding: found 'cc'; allowed: a whole number from 0 to 255, or false"),
    ({"st_min": 200}, "st_min: found 200; allowed: 0 to 127"),
    ({"frame_bytes": 63}, "frame_bytes: found 63"),
    ({"bus_share": 0}, "bus_share: found 0"),
    ({"fd": 1}, "fd: found 1; allowed: true or false"),
    ({"sequence": ["dtc_off", "dtc_off"]}, "sequence: found"),
    ({"sequence": "dtc_off"}, "sequence: found 'dtc_off'; allowed: a list of"),
    ({"erase": 5}, "erase: found 5; allowed: a table"),
    ({"erase": {"parameters": ["crc16"]}}, "erase.parameters: found ['crc16']"),
    ({"check": {"ok": "0"}}, "check.ok: found '0'; allowed: pairs of hexadecimal digits"),
    ({"check": {"running": "01"}}, "check.running: found '01'; allowed: with a poll_s"),
    ({"check": {"running": "00", "poll_s": 0.5}}, "check.running: found '00', as ok begins"),
    ({"erase": {"running": "0a", "ok": "0A01", "poll_s": 1}}, "erase.running: found '0a', as ok begins"),
    ({"functional_id": 0x800}, "functional_id: found 0x800; allowed: at most 0x7ff without extended_ids"),
    ({"functional_id": 0}, "functional_id: found 0; allowed: a whole number from 1"),
    ({"functional_id": 0x7E8}, "functional_id: found 0x7e8, which is the device's own"),
    (
        {"functional_id": 0x7DF, "target_address": 1, "source_address": 2},
        "functional_address: found one address of two",
    ),
    (
        {"functional_id": 0x7E0, "target_address": 1, "source_address": 2, "functional_address": 1},
        "functional_id: found 0x7e0, which is the device's own",
    ),
    ({"communication_control": 4}, "communication_control: found 4; allowed: 1 or 2 or 3"),
    ({"exit_parameters": ["length"]}, "exit_parameters: found"),
    (
        {"functional_id": 0x7DF, "sequence": ["functional_dtc_off"], "dtc_record": "00" * 6},
        "dtc_record: found '000000000000'; allowed: at most 5 bytes",
    ),
    ({"sequence": ["functional_dtc_off"]}, "functional_id: found false; allowed: an identifier"),
    ({"sequence": ["fingerprint"]}, "fingerprint.record: found nothing"),
    ({"fingerprint": {"record": "{today}"}}, "fingerprint.record: found '{today}'; allowed: pairs of"),
    ({"fingerprint": {"serial": "\u00fc"}}, "fingerprint.serial: found '\u00fc'; allowed: printable ASCII"),
    (
        {"sequence": ["second_security_access"], "second_security": {"algorithm": "none"}},
        "second_security.algorithm: found 'none'; allowed: add, aes-cmac",
    ),
    ({"security": {"level": 2}}, "security.level: found 2; allowed: an odd number"),
    (
        {"security": {"algorithm": "none-such"}},
        "security.algorithm: found 'none-such'; allowed: add, aes-cmac",
    ),
    ({"security": {"credential": "../x"}}, "security.credential: found '../x'"),
    ({"security": {"algorithm": "aes-cmac"}}, "security.credential: found ''; allowed: the name of the file"),
    ({"sequence": ["programming_session", "security_access"]}, "security.credential: found ''"),
    ({"sequence": ["second_security_access"]}, "second_security.credential: found ''"),
    (
        {"properties": [{"name": "a", "did": 1, "type": "u8", "writable": True, "security": True}]},
        "security.credential: found ''",
    ),
    ({"version_did": 0, "check": {"per": "never"}}, "check: found nothing that is looked at"),
    ({"version_did": 0, "check": {"ok": ""}}, "check: found nothing that is looked at"),
    ({"erase": {"parameters": ["crc32"]}}, "erase.parameters: found ['crc32']"),
    ({"properties": {}}, "properties: found {}; allowed: a list of tables"),
    ({"properties": [5]}, "properties[0]: found 5; allowed: a table"),
    ({"properties": [{"name": "a", "did": 1}]}, "properties[0].type: found nothing; this key is required"),
    ({"properties": [{"name": "a", "did": 1, "type": "u8le"}]}, "properties[0].type: found 'u8le'"),
    ({"properties": [{"name": "a", "did": 1, "type": "u8"}] * 2}, "properties: found 'a' twice"),
    ({"properties": [{"name": "a", "did": 1, "type": "u8", "scale": 0}]}, "properties[0].scale: found 0"),
]


@pytest.mark.parametrize(("table", "says"), FAULTS)
def test_a_fault_is_one_line_with_what_is_allowed(table: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match="found") as caught:
        parse(table)
    assert any(line.startswith(says) for line in str(caught.value).splitlines()), caught.value


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ValueError, match="found") as caught:
        parse({"fd": 1, "reset": 0, "erase": {"per": "page", "routine": -1}, "nonsense": 1})
    assert len(str(caught.value).splitlines()) == 5


def test_the_longest_call_is_a_start() -> None:
    assert SPEC.longest_call_s is not None
    assert SPEC.longest_call_s(parse({"boot_s": 60, "settle_s": 2, "answer_s": 1})) == 64


def test_nothing_said_is_what_the_page_says() -> None:
    assert parse({}) == UdsConfig()


# -- properties


@given(st.sampled_from([name for name in TYPES if name[0] in "ui"]), st.data())
def test_whole_numbers_come_back(kind: str, data: st.DataObject) -> None:
    bits = int(kind[1:])
    low, high = (0, 2**bits - 1) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    value = data.draw(st.integers(low, high))
    for name in (kind, f"{kind}le") if bits > 8 else (kind,):
        prop = Property("x", 1, name)
        # a float has 53 bits
        held = encode(prop, value)
        assert len(held) == bits // 8
        found = decode(prop, held).value
        assert found == value if bits < 64 else isinstance(found, int)
        for beyond in (low - 1, high + 1) if bits < 64 else ():
            with pytest.raises(Permanent, match=r"x: found .*; allowed: a number from"):
                encode(prop, beyond)


@given(st.integers(0, 65535))
def test_scaled_values_come_back(raw: int) -> None:
    prop = Property("x", 1, "u16", scale=0.1, offset=-40, unit="bar")
    reported = decode(prop, raw.to_bytes(2, "big"))
    assert reported.unit == "bar" and isinstance(reported.value, float)
    assert reported.value == pytest.approx(raw * 0.1 - 40)
    assert encode(prop, reported.value) == raw.to_bytes(2, "big")


def test_texts_bytes_and_flags() -> None:
    assert decode(Property("x", 1, "text"), b"pump\0\0").value == "pump"
    assert encode(Property("x", 1, "text"), "pump") == b"pump"
    assert decode(Property("x", 1, "hex"), b"\x01\xff").value == "01ff"
    assert encode(Property("x", 1, "hex"), "01ff") == b"\x01\xff"
    assert decode(Property("x", 1, "bool"), b"\x01").value is True
    assert encode(Property("x", 1, "bool"), False) == b"\x00"
    assert decode(Property("x", 1, "f32"), b"\x7f\xc0\0\0").value is None, "JSON has no NaN"


@pytest.mark.parametrize(
    ("kind", "value", "allowed"),
    [
        ("u8", "7", "a number from 0 to 255"),
        ("u8", True, "a number from 0 to 255"),
        ("bool", 1, "true or false"),
        ("text", 5, "a text"),
        ("hex", "0", "hexadecimal digits"),
        ("f32", 1e99, "a number"),
        ("u8", math.nan, "a number from 0 to 255"),
        ("u8", math.inf, "a number from 0 to 255"),
        ("u8", None, "a number from 0 to 255"),
    ],
)
def test_what_a_type_cannot_hold_is_refused_with_what_it_can(kind: str, value: Any, allowed: str) -> None:
    with pytest.raises(Permanent, match=f"allowed: {allowed}") as caught:
        encode(Property("x", 1, kind), value)
    assert caught.value.reason is Reason.REQUEST_INVALID


def test_a_record_of_another_length_is_no_value() -> None:
    with pytest.raises(WrongType, match="answered 3 bytes, u16 has 2") as caught:
        decode(Property("x", 1, "u16"), bytes(3))
    assert caught.value.reason is Reason.PROTOCOL_ERROR


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (b"ECU-7\0\0", "ECU-7"),
        (b"  1.2.0 ", "1.2.0"),
        (b"\x01\x02", "0102"),
        (b"\xff\xff", ""),
        (b"\xc3\xa4", "c3a4"),
    ],
)
def test_identifications_are_text_or_digits(record: bytes, text: str) -> None:
    assert text_of(record) == text


POLLED = [
    {
        "name": "pressure",
        "did": 0x0101,
        "type": "u16",
        "scale": 0.1,
        "unit": "bar",
        "poll_s": 0.05,
        "writable": True,
    },
    {"name": "enabled", "did": 0x0102, "type": "bool", "poll_s": 0, "writable": True, "session": "extended"},
    {"name": "gone", "did": 0x0999, "type": "u8", "poll_s": 0.05},
]


def test_properties_are_polled_and_set() -> None:
    name, controller = bus_name(), Controller()

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", properties=POLLED)) as session:
            reports = session.reports()
            seen = [await anext(reports) for _ in range(4)]
            told = [("pressure", 0.0, "bar")] * 3
            assert [(one.name, one.value, one.unit) for one in seen] == [
                told[0],
                ("gone", None, None),
                *told[1:],
            ]
            await reports.aclose()
            told = await session.apply(Desired("pressure", 12.3, 1))
            assert told.value == pytest.approx(12.3) and controller.properties[0x0101] == b"\x00\x7b"
            assert (await session.apply(Desired("enabled", False, 1))).value is False
            assert controller.session == 1 and not controller.unlocked
            for name_, says in (
                ("gone", "cannot be set; properties that can: pressure, enabled"),
                ("x", "cannot"),
            ):
                with pytest.raises(Permanent, match=says):
                    await session.apply(Desired(name_, 1, 1))

    with on_bus(name, controller):
        asyncio.run(body())


@pytest.mark.parametrize(
    ("of", "factory", "desired", "raw", "writes"),
    [
        ({"type": "f32"}, bytes(4), 0.1, 0.10000000149, 1),
        ({"type": "u16", "scale": 0.1}, bytes(2), 12.34, 12.3, 1),
        ({"type": "hex"}, bytes(2), "AB12", "ab12", 1),
        ({"type": "text"}, b"fast\0\0", "fast", "fast", 0),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_a_type_rounds_is_told_as_it_was_desired_and_written_once(
    of: dict[str, Any], factory: bytes, desired: Any, raw: Any, writes: int
) -> None:
    """Else the wish would never come true, and each session would wear the device's memory."""
    name, controller = bus_name(), Controller()
    controller.properties[0x0103] = factory
    prop = {"name": "gain", "did": 0x0103, "poll_s": 0.05, "writable": True, **of}

    async def body() -> None:
        for life in range(3):
            async with connected(device(f"can:virtual@{name}", properties=[prop])) as session:
                reports = session.reports()
                if life:
                    assert (await anext(reports)).value == raw, "nobody has said yet what is desired"
                assert (await session.apply(Desired("gain", desired, 1))).value == desired
                assert (await anext(reports)).value == desired
                seen = await session.check_health(HealthCheck("property", "", "gain", 0))
                assert seen.evidence == str(raw)
                await reports.aclose()

    with on_bus(name, controller):
        asyncio.run(body())
    written = [request for request in controller.heard if request[:3] == b"\x2e\x01\x03"]
    assert len(written) == writes


def test_a_device_that_changes_what_was_desired_is_believed() -> None:
    name, controller = bus_name(), Controller()
    prop = {"name": "level", "did": 0x0101, "type": "u16", "scale": 0.1, "poll_s": 0.05, "writable": True}

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", properties=[prop])) as session:
            assert (await session.apply(Desired("level", 12.34, 1))).value == 12.34
            reports = session.reports()
            assert (await anext(reports)).value == 12.34
            controller.properties[0x0101] = b"\x00\x7c"
            assert (await anext(reports)).value == 12.4
            await reports.aclose()

    with on_bus(name, controller):
        asyncio.run(body())


def test_a_property_that_is_refused_is_null_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """In place of what the device said before; when it says it again, that."""
    name, controller = bus_name(), Controller()
    counted: list[tuple[str, str]] = []
    pool = LinkPool(LINKS, count=lambda source, event: counted.append((source, event)))
    (pressure, *_) = POLLED

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", properties=[pressure]), pool) as session:
            reports = session.reports()
            assert (await anext(reports)).value == 0.0
            record = controller.properties.pop(0x0101)
            assert await anext(reports) == Reported("pressure", None, "bar")
            following = asyncio.create_task(anext(reports))
            await soon(lambda: len(counted) >= 3)
            assert not following.done(), "it was told again and again"
            controller.properties[0x0101] = record
            assert (await following).value == 0.0
            controller.properties.pop(0x0101)
            assert (await anext(reports)).value is None
            await reports.aclose()

    with on_bus(name, controller):
        asyncio.run(body())
    assert set(counted) == {("ecu", "property_refused")}
    (said,) = [record.getMessage() for record in caplog.records if "is not told" in record.getMessage()]
    assert said.startswith(
        "property pressure is not told: ReadDataByIdentifier 0x0101: the device answered requestOut"
    )


def test_a_property_of_another_type_is_null_and_silences_no_other(caplog: pytest.LogCaptureFixture) -> None:
    name, controller = bus_name(), Controller()
    counted: list[tuple[str, str]] = []
    pool = LinkPool(LINKS, count=lambda source, event: counted.append((source, event)))
    wrong = {"name": "wrong", "did": 0x0101, "type": "u32", "poll_s": 0.05}
    other = {"name": "enabled", "did": 0x0102, "type": "bool", "poll_s": 0.05}

    async def body() -> list[Reported]:
        async with connected(device(f"can:virtual@{name}", properties=[wrong, other]), pool) as session:
            ill = await session.check_health(HealthCheck("property", "0", "wrong", 0.1))
            assert not ill.healthy and ill.evidence == "wrong: the device answered 2 bytes, u32 has 4"
            reports = session.reports()
            seen = [await anext(reports) for _ in range(5)]
            await reports.aclose()
            return seen

    with on_bus(name, controller):
        seen = asyncio.run(body())
    assert seen == [Reported("wrong", None), *[Reported("enabled", True)] * 4]
    assert set(counted) == {("ecu", "property_mistyped")} and len(counted) >= 3
    (said,) = [record.getMessage() for record in caplog.records if "is not told" in record.getMessage()]
    assert said == "property wrong is not told: wrong: the device answered 2 bytes, u32 has 4"


def test_health_is_what_an_identifier_or_a_property_says() -> None:
    name, controller = bus_name(), Controller()
    controller.install(make_app("1.2.0"))

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", properties=POLLED)) as session:
            well = await session.check_health(HealthCheck("property", "^1.2.0$", "0xF189", 1))
            assert well.healthy and well.evidence == "1.2.0"
            ill = await session.check_health(HealthCheck("property", "^9", "pressure", 0.2))
            assert not ill.healthy and ill.evidence == "0.0"
            switch = await session.check_health(HealthCheck("property", "^true$", "enabled", 0.2))
            assert switch.healthy and switch.evidence == "true"
            gone = await session.check_health(HealthCheck("property", "x", "0999", 0.2))
            assert not gone.healthy and "requestOutOfRange (0x31)" in gone.evidence
            for check, says in (
                (HealthCheck("line", "x"), "known: property"),
                (HealthCheck("property", "x", "what?"), "neither a property nor a data identifier"),
            ):
                with pytest.raises(Permanent, match=says):
                    await session.check_health(check)

    with on_bus(name, controller):
        asyncio.run(body())


def test_a_session_is_left_again_whose_beginning_nobody_heard_of() -> None:
    """Polls would keep the controller in it, open and unguarded."""
    name, controller, lost = bus_name(), Controller(), 0

    def wire(way: str, frame: bytes) -> list[bytes]:
        nonlocal lost
        begins = way == "out" and frame[1:3] == b"\x50\x03"
        lost += begins
        return [] if begins else [frame]

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", properties=POLLED, answer_s=1)) as session:
            with pytest.raises(Transient, match="no answer") as caught:
                await session.apply(Desired("enabled", False, 1))
            assert caught.value.reason is Reason.NO_RESPONSE
            assert lost == 1 and controller.session == DEFAULT
            assert controller.heard[-2:] == [b"\x10\x03", b"\x10\x01"]

    with on_bus(name, controller, wire=wire):
        asyncio.run(body())
    assert controller.properties[0x0102] == b"\x01"


# -- keys


@pytest.mark.parametrize(
    ("algorithm", "seed", "secret_", "key"),
    [
        ("xor", b"\x01\x02\x03\x04", b"\xff\x0f", b"\xfe\x0d\xfc\x0b"),
        ("add", b"\xff\xff", b"\x00\x02", b"\x00\x01"),
        # RFC 4231, test case 2, cut to the seed's length
        (
            "hmac-sha256",
            b"what do ya want for nothing?",
            b"Jefe",
            bytes.fromhex("5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b9"),
        ),
        # RFC 4493, example 2
        (
            "aes-cmac",
            bytes.fromhex("6bc1bee22e409f96e93d7e117393172a"),
            bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c"),
            bytes.fromhex("070a16b46b4d4144f79bdd9dd04a287c"),
        ),
    ],
)
def test_keys_of_the_built_in_algorithms(algorithm: str, seed: bytes, secret_: bytes, key: bytes) -> None:
    assert security.key_for(algorithm, seed, secret_, 1) == key


@pytest.mark.parametrize("algorithm", sorted(security.BUILT_IN))
def test_an_algorithm_without_its_secret_says_so(algorithm: str) -> None:
    with pytest.raises(Permanent, match="secret") as caught:
        security.key_for(algorithm, b"\x01", b"", 1)
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_a_device_that_is_never_unlocked_needs_no_secret_until_it_is_to_be_flashed() -> None:
    name, controller = bus_name(), Controller()
    to = device(f"can:virtual@{name}", security={}, properties=POLLED)

    async def body() -> None:
        async with connected(to) as session:
            await session.identify()
            assert (await anext(session.reports())).name
            controller.heard.clear()
            with pytest.raises(Permanent, match="'xor': it needs a secret: name a credential") as caught:
                await session.stage(await verified(make_app("1.2.0")), quiet)
            assert caught.value.reason is Reason.CONFIG_INVALID
            assert controller.heard == []

    with on_bus(name, controller):
        asyncio.run(body())


def test_secrets_are_texts_or_digits() -> None:
    assert security.secret_bytes("hex:00ff") == b"\x00\xff"
    assert security.secret_bytes("plain") == b"plain"


class Full(ShortMemory):
    """A node whose disk is full."""

    async def remember(self, user: str, key: str, text: str) -> None:
        raise Transient(Reason.DISK_FULL, "no space left")


def test_a_refused_key_that_cannot_be_stored_is_not_sent_again_while_the_daemon_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret(monkeypatch, tmp_path, "hex:00000001")
    name, controller = bus_name(), Controller()
    to, env = device(f"can:virtual@{name}"), device_env("ecu", LinkPool(LINKS, memory=Full()))
    (spec,) = edged_can.edged_mappers()

    async def body() -> None:
        for says in ("invalidKey", "that key is not sent again"):
            async with spec.connect(to, env) as session:
                assert isinstance(session, UdsSession)
                with pytest.raises(Permanent, match=says):
                    await session.stage(await verified(make_app("1.2.0")), quiet)

    with on_bus(name, controller):
        asyncio.run(body())
    assert controller.counts.wrong_keys == 1
    assert [record.__dict__["detail"] for record in caplog.records] == ["disk_full: no space left"]


@pytest.mark.parametrize("cancels", [False, True], ids=["late", "cancelled"])
def test_a_key_that_may_have_been_refused_is_not_sent_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancels: bool
) -> None:
    """The device answers later than anybody waits, or nobody waits: most lock themselves after three."""
    heard = 0

    def wire(way: str, frame: bytes) -> list[bytes]:
        nonlocal heard
        heard += way == "out" and frame[1:4] == b"\x7f\x27\x35"
        return [] if frame[1:4] == b"\x7f\x27\x35" else [frame]

    secret(monkeypatch, tmp_path, "hex:00000001")
    name, controller = bus_name(), Controller()
    to, pool, spec = device(f"can:virtual@{name}", answer_s=1), LinkPool(LINKS), fresh()

    async def body() -> None:
        for number in range(2):
            attempting = asyncio.create_task(_prepared(to, pool, spec))
            if cancels:
                await soon(lambda before=number: heard > before)  # type: ignore[misc]
                attempting.cancel()
            with pytest.raises((Transient, asyncio.CancelledError)):
                await attempting
        with pytest.raises(
            Permanent, match="2 keys had no answer, and may have been refused; that key is"
        ) as e:
            await _prepared(to, pool, spec)
        assert e.value.reason is Reason.DEVICE_ERROR
        assert controller.counts.wrong_keys == heard == 2
        secret(monkeypatch, tmp_path, f"hex:{SECRET.hex()}")
        await _prepared(to, pool, spec)

    with on_bus(name, controller, wire=wire):
        asyncio.run(body())


def test_a_key_whose_answer_was_lost_once_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[bytes] = []

    def wire(way: str, frame: bytes) -> list[bytes]:
        """Loses every other answer to a key."""
        if way == "out" and frame[1:3] == b"\x67\x02":
            lost.append(frame)
            return [] if len(lost) % 2 else [frame]
        return [frame]

    secret(monkeypatch, tmp_path)
    name, controller = bus_name(), Controller()
    to, pool, spec = device(f"can:virtual@{name}", answer_s=1), LinkPool(LINKS), fresh()

    async def body() -> None:
        for _ in range(3):
            with pytest.raises(Transient):
                await _prepared(to, pool, spec)
            await _prepared(to, pool, spec)

    with on_bus(name, controller, wire=wire):
        asyncio.run(body())
    assert len(lost) == 6


def test_a_refusal_is_stored_though_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret(monkeypatch, tmp_path, "hex:00000001")
    name, controller = bus_name(), Controller()
    to, pool = device(f"can:virtual@{name}"), LinkPool(LINKS)

    async def body() -> None:
        digests, going = _held_digests(monkeypatch)
        attempting = asyncio.create_task(_prepared(to, pool, fresh()))
        assert await asyncio.to_thread(digests.wait, 20)
        attempting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempting
        going.set()
        async with asyncio.timeout(20):
            while await device_env("ecu", pool).recall("refused-key/1") is None:
                await asyncio.sleep(0.01)
        with pytest.raises(Permanent, match="invalidKey"):
            await _prepared(to, pool, fresh())

    with on_bus(name, controller):
        asyncio.run(body())
    assert controller.counts.wrong_keys == 1


async def _prepared(to: Device, pool: LinkPool, spec: MapperSpec) -> None:
    async with connected(to, pool, spec) as session:
        await session.prepare(await verified(make_app("1.2.0")))


def _held_digests(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """The slow digest waits: it has begun, and it may go on."""
    begun, going = threading.Event(), threading.Event()
    scrypt = hashlib.scrypt

    def held(*args: Any, **kwargs: Any) -> bytes:
        begun.set()
        assert going.wait(40)
        return scrypt(*args, **kwargs)

    monkeypatch.setattr("edged_can.refused.hashlib.scrypt", held)
    return begun, going


def test_none_of_the_keys_that_were_refused_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the one before the last, nor after a restart; the right one is."""
    name, controller = bus_name(), Controller()
    to, pool = device(f"can:virtual@{name}"), LinkPool(LINKS)

    async def body() -> None:
        for key in ("hex:00000001", "hex:00000002", "hex:00000001", f"hex:{SECRET.hex()}"):
            secret(monkeypatch, tmp_path, key)
            async with connected(to, pool) as session:
                if key.startswith("hex:0"):
                    with pytest.raises(Permanent, match="invalidKey"):
                        await session.prepare(await verified(make_app("1.2.0")))
                else:
                    await session.prepare(await verified(make_app("1.2.0")))

    with on_bus(name, controller):
        asyncio.run(body())
    assert controller.counts.wrong_keys == 2 and controller.unlocked == 0


def test_an_answer_without_a_seed_unlocks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Seedless(Controller):
        def _security(self, data: bytes) -> Iterator[bytes | float]:
            yield b"\x67" + data[:1]

    secret(monkeypatch, tmp_path)
    name, controller = bus_name(), Seedless()

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}")) as session:
            with pytest.raises(Transient, match="the answer has no seed") as caught:
                await session.prepare(await verified(make_app("1.2.0")))
            assert caught.value.reason is Reason.PROTOCOL_ERROR

    with on_bus(name, controller):
        asyncio.run(body())


def test_a_health_check_ends_when_it_is_to_though_the_device_puts_it_off() -> None:
    class Slow(Controller):
        def _read(self, data: bytes) -> Iterator[bytes | float]:
            yield from self._takes(4, 0x22)
            yield from super()._read(data)

    name, controller = bus_name(), Slow(pending_every_s=0.1)

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", answer_s=0.3)) as session:
            began = time.monotonic()
            health = await session.check_health(HealthCheck("property", "1", "F189", 1.0))
            assert not health.healthy and "asked for more time" in health.evidence
            assert time.monotonic() - began < 2

    with on_bus(name, controller):
        asyncio.run(body())


def test_a_device_is_left_alone_also_where_the_first_to_wait_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret(monkeypatch, tmp_path)
    name, controller, deaf = bus_name(), Controller(), list[bool]()
    to, pool, spec = device(f"can:virtual@{name}", answer_s=1), LinkPool(LINKS), fresh()

    def wire(way: str, frame: bytes) -> list[bytes]:
        return [] if deaf and way == "in" and frame[1:3] == b"\x10\x01" else [frame]

    async def connect() -> None:
        async with connected(to, pool, spec):
            pass

    async def body() -> float:
        async with connected(to, pool, spec) as session:
            await session.prepare(await verified(make_app("1.2.0")))
            deaf.append(True)
            left = time.monotonic()
        task = asyncio.create_task(connect())
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.wait([task])
        await connect()
        return time.monotonic() - left

    with on_bus(name, controller, wire=wire):
        assert asyncio.run(body()) >= 5


def test_what_is_stored_of_a_refused_key_does_not_tell_the_secret() -> None:
    """Another credential's name, by which an operator says that the device takes it by now, is another key."""
    pool, guessable = LinkPool({}), b"\x00\x01"
    env, settings = device_env("ecu", pool), Security(credential="ecu")

    async def body() -> tuple[str, str]:
        await RefusedKeys().add(env, "ecu", settings, guessable, "no")
        fresh = RefusedKeys()
        assert await fresh.why(env, "ecu", settings, guessable) == "no"
        for other in (replace(settings, credential="ecu-new"), replace(settings, level=3)):
            assert await fresh.why(env, "ecu", other, guessable) == ""
        assert await fresh.why(env, "ecu", settings, b"\x00\x02") == ""
        assert await fresh.why(device_env("ecu-2", pool), "ecu-2", settings, guessable) == ""
        once = await env.recall("refused-key/1")
        other = device_env("ecu-2", pool)
        await RefusedKeys().add(other, "ecu-2", settings, guessable, "no")
        return str(once), str(await other.recall("refused-key/1"))

    once, again = asyncio.run(body())
    assert once != again, "without a salt, a digest of few bytes is looked up"


def _plug_in(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    entry = EntryPoint("acme", where, security.GROUP)

    def installed(*, group: str, name: str = "acme") -> list[EntryPoint]:
        return [entry] if (group, name) == (security.GROUP, "acme") else []

    monkeypatch.setattr(security, "entry_points", installed)


async def staged(to: Device) -> None:
    """One image, by a session of its own."""
    async with connected(to) as session:
        await session.stage(await verified(make_app("1.2.0")), quiet)


def acme(seed: bytes, secret_: bytes, level: int) -> bytes:
    """The plug-in of these tests: the server's own rule, and the level in its secret."""
    assert level == 1
    return bytes(a ^ b for a, b in zip(seed, secret_, strict=True))


def test_a_plug_ins_algorithm_unlocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _plug_in(monkeypatch, "test_can_config:acme")
    secret(monkeypatch, tmp_path)
    name, controller = bus_name(), Controller()
    to = device(f"can:virtual@{name}", security={"algorithm": "acme", "credential": "ecu"})

    with on_bus(name, controller):
        asyncio.run(staged(to))
    assert controller.counts.seeds == 1 and controller.counts.wrong_keys == 0


def broken(seed: bytes, secret_: bytes, level: int) -> bytes:
    """A plug-in's fault, with what it was given in its text."""
    raise KeyError(secret_.hex())


def test_what_a_plug_in_raises_does_not_tell_the_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _plug_in(monkeypatch, "test_can_config:broken")
    secret(monkeypatch, tmp_path)
    name, controller = bus_name(), Controller()
    to = device(f"can:virtual@{name}", security={"algorithm": "acme", "credential": "ecu"})

    with on_bus(name, controller), pytest.raises(Permanent, match="'acme' raised KeyError") as caught:
        asyncio.run(staged(to))
    assert caught.value.reason is Reason.PLUGIN_FAILED and controller.counts.erased == 0
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert SECRET.hex() not in told


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (None, "No module named"),
        ("", "has no attribute 'key'"),
        ("def key(:", "SyntaxError"),
        ("raise RuntimeError('no licence')", "RuntimeError.*no licence"),
    ],
)
def test_a_plug_in_that_cannot_be_imported_is_told_with_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str | None, says: str
) -> None:
    """Before anything is asked of it."""
    module = tmp_path.name
    if body is not None:
        (tmp_path / f"{module}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    _plug_in(monkeypatch, f"{module}:key")
    secret(monkeypatch, tmp_path)
    name, controller = bus_name(), Controller()
    to = device(f"can:virtual@{name}", security={"algorithm": "acme", "credential": "ecu"})

    async def connect() -> None:
        async with connected(to):
            pass

    with on_bus(name, controller), pytest.raises(Permanent, match=f"'acme'.*{says}") as caught:
        asyncio.run(connect())
    assert caught.value.reason is Reason.PLUGIN_FAILED and controller.heard == []


# -- negative responses


@pytest.mark.parametrize(
    ("code", "name", "kind"),
    [
        (0x22, "conditionsNotCorrect", RefusedForNow),
        (0x31, "requestOutOfRange", RefusedForGood),
        (0x33, "securityAccessDenied", RefusedForGood),
        (0x35, "invalidKey", RefusedForGood),
        (0x37, "requiredTimeDelayNotExpired", RefusedForNow),
        (0x70, "uploadDownloadNotAccepted", RefusedForNow),
        (0x72, "generalProgrammingFailure", RefusedForGood),
        (0x73, "wrongBlockSequenceCounter", RefusedForNow),
        (0x78, "requestCorrectlyReceived-ResponsePending", RefusedForGood),
        (0x93, "voltageTooLow", RefusedForNow),
        (0xF5, "a code of its manufacturer", RefusedForGood),
    ],
)
def test_negative_responses_have_the_standards_names(code: int, name: str, kind: type[EdgedError]) -> None:
    assert code_name(code) == name
    error = negative("TransferData", code)
    assert type(error) is kind and error.reason is Reason.DEVICE_ERROR and name in error.detail


# -- what is refused before a byte is sent


@pytest.mark.parametrize(
    ("segments", "config", "says", "reason"),
    [
        ([(BASE + 0xFFF0, bytes(64))], {}, "the image ends at 0x8010030", Reason.IMAGE_TOO_LARGE),
        (
            [(BASE, bytes(300))],
            {"address_bytes": 2},
            "the address 0x8000000 does not fit into 2",
            Reason.IMAGE_TOO_LARGE,
        ),
        (
            [(BASE, bytes(300))],
            {"length_bytes": 1},
            "the length 0x12c does not fit into 1",
            Reason.IMAGE_TOO_LARGE,
        ),
        (
            [(BASE, bytes(200)), (BASE + 0x1000, bytes(300))],
            {"length_bytes": 1},
            "the length 0x12c does not fit into 1",
            Reason.IMAGE_TOO_LARGE,
        ),
        (
            [(BASE, bytes(200)), (BASE + 0x1000, bytes(200))],
            {
                "length_bytes": 1,
                "check": {"routine": 0xFF01, "parameters": ["length", "crc32"], "per": "image"},
            },
            "the length 0x10c8 does not fit into 1",
            Reason.IMAGE_TOO_LARGE,
        ),
        (
            [(BASE - 0x100, bytes(200)), (BASE + 0x1000, bytes(200))],
            {},
            "begins at 0x7ffff00; ecu begins at 0x8000000",
            Reason.IMAGE_TOO_LARGE,
        ),
    ],
)
def test_an_image_that_does_not_fit_erases_nothing(
    segments: Segments, config: dict[str, Any], says: str, reason: Reason, tmp_path: Path, monkeypatch: Any
) -> None:
    secret(monkeypatch, tmp_path)
    name, controller = bus_name(), Controller()

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", **config)) as session:
            await session.stage(await verified(segments), quiet)

    with on_bus(name, controller), pytest.raises(Permanent, match=says) as caught:
        asyncio.run(body())
    assert caught.value.reason is reason
    assert controller.counts.erased == controller.counts.written == 0
