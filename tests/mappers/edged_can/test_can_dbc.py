"""Raw frames with a DBC file: signals into the twin, commands out of it, and what is wrong with a file."""

from __future__ import annotations

import asyncio
import math
import struct
import sys
import time
from pathlib import Path
from typing import Any

import can
import pytest
from can_kit import bus_name, connected, device, on_bus, virtual
from uds_server import Controller

from edged.api import Desired
from edged.errors import Permanent, Reason, Transient
from edged_can.dbc import load
from edged_can.frames import Frame

DBC = """VERSION ""
NS_ :
BS_:
BU_: ECU
BO_ 291 Engine: 8 ECU
 SG_ Speed : 0|16@1+ (0.25,0) [0|16383.75] "rpm" Vector__XXX
 SG_ Temperature : 16|8@1- (1,-40) [-168|87] "degC" Vector__XXX
 SG_ Mode : 24|8@1+ (1,0) [0|255] "" Vector__XXX
BO_ 2566844161 Setpoint: 4 ECU
 SG_ Speed : 0|16@1+ (0.25,0) [0|4000] "rpm" ECU
 SG_ Enable : 16|1@1+ (1,0) [0|1] "" ECU
VAL_ 291 Mode 0 "off" 1 "run" ;
"""
SIGNALS = ("Engine.Speed", "Engine.Temperature", "Engine.Mode")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "drive.dbc"
    path.write_text(DBC)
    return str(path)


def frame(speed: int, temperature: int = 60, mode: int = 1) -> bytes:
    return speed.to_bytes(2, "little") + bytes((temperature, mode, 0, 0, 0, 0))


def test_signals_have_names_values_and_units(file: str) -> None:
    signals = load(file, SIGNALS, (), 1.0)
    clock = [0.0]
    told = list(signals.decode(Frame(0x123, frame(8000)), lambda: clock[0]))
    assert [(one.name, one.value, one.unit) for one in told] == [
        ("Engine.Speed", 2000.0, "rpm"),
        ("Engine.Temperature", 20, "degC"),
        ("Engine.Mode", "run", None),
    ]
    assert not list(signals.decode(Frame(0x123, frame(9000)), lambda: clock[0])), "too soon"
    clock[0] = 1.0
    assert [one.value for one in signals.decode(Frame(0x123, frame(9000, mode=7)), lambda: clock[0])][
        ::2
    ] == [2250.0, 7]
    clock[0] = 2.0
    assert not list(signals.decode(Frame(0x123, b"\x01"), lambda: clock[0])), "too short"


def test_commands_are_frames_with_the_rest_at_its_initial_value(file: str) -> None:
    signals = load(file, (), ("Setpoint.Speed",), 1.0)
    assert signals.encode("Setpoint.Speed", 1000) == Frame(0x18FEEF01, b"\xa0\x0f\0\0", extended=True)
    for value in (4001, -1, "fast", None):
        with pytest.raises(Permanent, match=r"Setpoint\.Speed: found") as caught:
            signals.encode("Setpoint.Speed", value)
        assert caught.value.reason is Reason.REQUEST_INVALID


@pytest.mark.parametrize(
    ("text", "signals", "says"),
    [
        (DBC, ("Engine.Sped",), "found 'Engine.Sped'; the file has Engine.Mode, Engine.Speed"),
        (DBC, ("Motor.Speed",), "found 'Motor.Speed'"),
        ("this is no DBC", SIGNALS, "dbc: "),
        (None, SIGNALS, "No such file"),
    ],
)
def test_a_file_or_a_name_that_is_wrong_is_told(
    tmp_path: Path, text: str | None, signals: tuple[str, ...], says: str
) -> None:
    path = tmp_path / "x.dbc"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Permanent, match=says) as caught:
        load(str(path), signals, (), 1.0)
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_without_cantools_the_cure_is_named(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cantools", None)
    with pytest.raises(Permanent, match="pip install --target /opt/edged/plugins cantools") as caught:
        load(file, SIGNALS, (), 1.0)
    assert caught.value.reason is Reason.UNSUPPORTED


def test_frames_are_reported_while_there_is_always_a_poll_due(file: str) -> None:
    """The answers take longer than the interval at which they are asked for."""
    name = bus_name()
    other = virtual(name)
    many = [{"name": f"p{number}", "did": 0x0101, "type": "u16", "poll_s": 0.1} for number in range(6)]
    asked = 0

    def slow(way: str, data: bytes) -> list[bytes]:
        nonlocal asked
        if way == "out":
            asked += 1
            if asked % 10 == 0:
                other.send(can.Message(arbitration_id=0x123, data=frame(8000), is_extended_id=False))
            time.sleep(0.02)
        return [data]

    async def body() -> list[str]:
        table = {
            "dbc": file,
            "signals": ["Engine.Speed"],
            "signals_s": 0,
            "properties": many,
            "answer_s": 5,
        }
        async with connected(device(f"can:virtual@{name}", **table)) as session:
            reports = session.reports()
            seen = [(await anext(reports)).name for _ in range(60)]
            await reports.aclose()
            return seen

    with on_bus(name, Controller(), wire=slow):
        seen = asyncio.run(body())
    other.shutdown()
    assert 4 <= seen.count("Engine.Speed") <= 6
    assert all(8 <= seen.count(f"p{number}") <= 11 for number in range(6))


def test_a_device_reports_its_frames_beside_what_is_polled_and_takes_commands(file: str) -> None:
    name = bus_name()
    other = virtual(name)
    table: dict[str, Any] = {
        "dbc": file,
        "signals": list(SIGNALS),
        "signals_s": 0,
        "commands": ["Setpoint.Speed"],
        "properties": [{"name": "pressure", "did": 0x0101, "type": "u16", "poll_s": 0.05}],
    }

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", **table)) as session:
            reports, seen = session.reports(), set()
            async with asyncio.timeout(10):
                while seen != {"pressure", *SIGNALS}:
                    other.send(can.Message(arbitration_id=0x123, data=frame(8000), is_extended_id=False))
                    seen.add((await anext(reports)).name)
            told = await session.apply(Desired("Setpoint.Speed", 1000, 1))
            assert (told.name, told.value) == ("Setpoint.Speed", 1000)
            with pytest.raises(Permanent, match=r"properties that can: Setpoint\.Speed"):
                await session.apply(Desired("Engine.Speed", 1, 1))
            other.send(can.Message(arbitration_id=0x40, data=bytes(8), is_error_frame=True))
            with pytest.raises(Transient, match="bus off"):
                async with asyncio.timeout(5):
                    async for _ in reports:
                        pass

    with on_bus(name, Controller()):
        asyncio.run(body())
    heard = []
    while (message := other.recv(0)) is not None:
        heard.append((message.arbitration_id, message.is_extended_id, bytes(message.data)))
    other.shutdown()
    assert (0x18FEEF01, True, b"\xa0\x0f\0\0") in heard


PAGES = """VERSION ""
NS_ :
BS_:
BU_: ECU
BO_ 256 Paged: 8 ECU
 SG_ Page M : 0|8@1+ (1,0) [0|255] "" ECU
 SG_ A m0 : 8|8@1+ (1,0) [0|255] "" ECU
 SG_ B m1 : 8|8@1+ (1,0) [0|255] "" ECU
BO_ 257 Real: 8 ECU
 SG_ F : 0|32@1- (1,0) [0|0] "bar" ECU
 SG_ G : 32|32@1- (1,0) [0|0] "" ECU
BO_ 258 Long: 18 ECU
 SG_ A : 0|8@1+ (1,0) [0|255] "" ECU
 SG_ B : 128|8@1+ (1,0) [0|255] "" ECU
SIG_VALTYPE_ 257 F : 1;
SIG_VALTYPE_ 257 G : 1;
"""


@pytest.fixture
def pages(tmp_path: Path) -> str:
    path = tmp_path / "pages.dbc"
    path.write_text(PAGES)
    return str(path)


def test_each_page_of_a_multiplexed_frame_has_its_turn(pages: str) -> None:
    """They alternate in the time of the bus, and a common due time would meet the same one each time."""
    signals, told = load(pages, ("Paged.A", "Paged.B"), (), 1.0), []
    for tick in range(100):
        told += signals.decode(Frame(256, bytes((tick % 2, tick)) + bytes(6)), lambda at=tick / 10: at)  # type: ignore[misc]
    names = [one.name for one in told]
    assert names.count("Paged.A") == names.count("Paged.B") == 10


def test_a_number_that_json_does_not_have_is_none(pages: str) -> None:
    signals = load(pages, ("Real.F", "Real.G"), (), 0)
    for raw in (math.nan, math.inf, -math.inf):
        (first, second) = signals.decode(Frame(257, struct.pack("<ff", raw, 1.5)), lambda: 0.0)
        assert (first.value, first.unit, second.value) == (None, "bar", 1.5)


def test_a_command_of_more_than_eight_bytes_is_a_frame_of_can_fd(pages: str) -> None:
    signals = load(pages, (), ("Long.B",), 0, fd=True)
    assert signals.encode("Long.B", 7) == Frame(258, bytes(16) + b"\x07" + bytes(3), fd=True)
    with pytest.raises(Permanent, match=r"'Long.B', whose frame of 18 bytes is of CAN FD") as caught:
        load(pages, (), ("Long.B",), 0)
    assert caught.value.reason is Reason.CONFIG_INVALID


@pytest.mark.parametrize("data_bitrate", ["", "@500000/2000000"])
def test_whether_a_command_can_be_sent_is_said_with_the_device(pages: str, data_bitrate: str) -> None:
    name = bus_name()
    watcher = virtual(name)

    async def body() -> None:
        to = device(f"can:virtual@{name}{data_bitrate}", dbc=pages, commands=["Long.B"])
        async with connected(to) as session:
            await session.apply(Desired("Long.B", 7, 1))

    if data_bitrate:
        asyncio.run(body())
        sent = watcher.recv(1)
        assert sent is not None and sent.is_fd and len(sent.data) == 20
    else:
        with pytest.raises(Permanent, match="data bit rate"):
            asyncio.run(body())
    watcher.shutdown()
