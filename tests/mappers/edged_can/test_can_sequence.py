"""The programming sequence beyond its simplest form: everyone on the bus is told, fingerprints, routines that go on after their
start, other levels of SecurityAccess. The server's side of it is driven by udsoncan with can-isotp too."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
import time
import tomllib
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import can
import isotp
import pytest
import udsoncan
from can_kit import (
    LINKS,
    bus_name,
    connected,
    device,
    fresh,
    on_bus,
    on_write,
    quiet,
    secret,
    soon,
    verified,
    virtual,
)
from test_can_clients import udsoncan_client
from uds_server import SECOND_SECRET, Controller, Negative, Wiring, make_app
from udsoncan.client import Client
from udsoncan.connections import PythonIsoTpConnection
from udsoncan.exceptions import NegativeResponseException

from edged.api import Phase, Segment
from edged.clock import SystemClock
from edged.errors import Permanent, Reason, Transient
from edged.links import LinkPool
from edged_can.config import Fingerprint, Routine, UdsConfig
from edged_can.programming import erased_together, fingerprint

APP = make_app("1.2.0", (1200, 600))
ALL = 0x7DF
ECU = Wiring(functional=ALL)
NEIGHBOUR = Wiring(receives=0x7E1, sends=0x7E9, functional=ALL)
SEQUENCE = [
    "functional_extended_session",
    "functional_dtc_off",
    "functional_communication_off",
    "programming_session",
    "security_access",
]
EVERYONE = {"functional_id": ALL, "sequence": SEQUENCE}
POLLED = {
    "erase": {"poll_s": 0.05, "running": "01", "ok": "00"},
    "check": {"parameters": ["crc32"], "poll_s": 0.05, "running": "01"},
}


@pytest.fixture(autouse=True)
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret(monkeypatch, tmp_path)
    (tmp_path / "edged_second").write_text(f"hex:{SECOND_SECRET.hex()}")


@contextmanager
def two(bus: str, ecu: Controller, neighbour: Controller) -> Iterator[list[bytes]]:
    """Both alive on the bus; what the neighbour says."""
    said: list[bytes] = []

    def listen(way: str, frame: bytes) -> list[bytes]:
        if way == "out":
            said.append(frame)
        return [frame]

    with on_bus(bus, ecu, ECU), on_bus(bus, neighbour, NEIGHBOUR, listen):
        yield said


async def stage(bus: str, progress: Any = quiet, **config: Any) -> None:
    async with connected(device(f"can:virtual@{bus}", **config)) as session:
        await session.stage(await verified(APP), progress)
        await session.activate()


def holds(controller: Controller) -> bool:
    return all(controller.held(at, len(data)) == data for at, data in APP)


def test_a_controller_that_hears_nothing_while_it_boots_is_waited_for() -> None:
    """For longer than an answer may take."""
    bus, ecu = bus_name(), Controller(boot_s=2.5)

    async def body() -> str | None:
        async with connected(device(f"can:virtual@{bus}", answer_s=1, boot_s=20)) as session:
            await session.stage(await verified(APP), quiet)
            await session.activate()
            return (await session.slots()).slots[0].runs

    with on_bus(bus, ecu, ECU):
        assert asyncio.run(body()) == "1.2.0"


# -- functional addressing


def test_everyone_is_quiet_until_the_update_is_over_and_none_answers() -> None:
    bus, ecu, neighbour = bus_name(), Controller(), Controller(hardware=b"ECU-9")
    states: set[tuple[int, bool, bool]] = set()

    def progress(phase: Phase, done_bytes: int, total_bytes: int) -> None:
        states.add((neighbour.session, neighbour.dtc_on, neighbour.talks))

    with two(bus, ecu, neighbour) as said:
        asyncio.run(stage(bus, progress, **EVERYONE))
        # the last frame may still be on its way
        asyncio.run(soon(lambda: neighbour.session == 1))
    assert states == {(3, False, False)}
    assert holds(ecu) and ecu.runs == b"1.2.0"
    assert neighbour.dtc_on and neighbour.talks
    assert neighbour.heard_by_all == [b"\x10\x83", b"\x85\x82", b"\x28\x83\x01", b"\x10\x81"]
    assert said == neighbour.heard == []


@pytest.mark.parametrize("padding", [0xAA, False])
@pytest.mark.parametrize("extended", [False, True])
def test_what_everyone_hears_is_one_frame_each(extended: bool, padding: int | bool) -> None:
    bus = bus_name()
    everyone = 0x18DB33F1 if extended else 0x7DF
    wiring = Wiring(
        receives=0x18DA10F1 if extended else 0x7E0, sends=0x18DAF110 if extended else 0x7E8, extended=extended
    )
    watcher = virtual(bus, can_filters=[{"can_id": everyone, "can_mask": 0x1FFFFFFF, "extended": extended}])

    async def body() -> None:
        to = device(
            f"can:virtual@{bus}", wiring=wiring, functional_id=everyone, sequence=SEQUENCE, padding=padding
        )
        async with connected(to) as session:
            await session.stage(await verified(APP), quiet)

    ecu = Controller()
    with on_bus(bus, ecu, Wiring(**{**wiring.__dict__, "functional": everyone})):
        asyncio.run(body())
    frames = list(iter(lambda: watcher.recv(0.1), None))
    watcher.shutdown()
    fill = b"" if padding is False else bytes((int(padding),))
    bare = [b"\x02\x10\x83", b"\x02\x85\x82", b"\x03\x28\x83\x01", b"\x02\x10\x81"]
    assert [bytes(frame.data) for frame in frames] == [data.ljust(8, fill) if fill else data for data in bare]
    assert all(frame.is_extended_id is extended for frame in frames)


def test_nothing_follows_a_request_to_everyone_at_once() -> None:
    """P3 client, also from the last one to what the device itself is asked (ISO 14229-2, table 5)."""
    bus, ecu, neighbour = bus_name(), Controller(), Controller()
    watcher = virtual(bus)

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}", wiring=ECU, **EVERYONE)) as session:
            await session.prepare(await verified(APP))

    with two(bus, ecu, neighbour):
        asyncio.run(body())
    seen = list(iter(lambda: watcher.recv(0.1), None))
    watcher.shutdown()
    asked = [frame for frame in seen if frame.arbitration_id in (ALL, ECU.receives)]
    after = [
        later.timestamp - earlier.timestamp
        for earlier, later in itertools.pairwise(asked)
        if earlier.arbitration_id == ALL
    ]
    assert len(after) == 4 and min(after) >= 0.05
    assert bytes(asked[-1].data).startswith(b"\x02\x10\x01") and ecu.session == 1


def test_everyone_has_an_address_with_extended_addressing() -> None:
    """It is the first byte, and the identifier may be the one of all requests."""
    bus, ecu, neighbour = bus_name(), Controller(), Controller()
    wirings = [
        Wiring(receives=0x6F1, sends=0x600 + own, own=own, tester=0xF1, functional=0x6F1, all=0xDF)
        for own in (0x12, 0x13)
    ]

    async def body() -> None:
        table = {**EVERYONE, "functional_id": 0x6F1, "functional_address": 0xDF}
        async with connected(device(f"can:virtual@{bus}", wiring=wirings[0], **table)) as session:
            await session.stage(await verified(APP), quiet)
            await session.activate()

    with on_bus(bus, ecu, wirings[0]), on_bus(bus, neighbour, wirings[1]):
        asyncio.run(body())
        asyncio.run(soon(lambda: neighbour.session == 1))
    assert holds(ecu) and ecu.runs == b"1.2.0" and neighbour.heard == []
    assert neighbour.heard_by_all == [b"\x10\x83", b"\x85\x82", b"\x28\x83\x01", b"\x10\x81"]


def test_what_is_turned_off_and_what_a_transfer_ends_with_are_configured() -> None:
    bus, ecu = bus_name(), Controller()
    table: dict[str, Any] = {
        "communication_control": 1,
        "communication_type": 3,
        "dtc_record": "ffffff",
        "exit_parameters": ["crc32", "sha256"],
    }
    with on_bus(bus, ecu):
        asyncio.run(stage(bus, **table))
    assert holds(ecu) and ecu.runs == b"1.2.0"
    assert b"\x85\x02\xff\xff\xff" in ecu.heard and b"\x28\x01\x03" in ecu.heard
    assert ecu.exits == [
        zlib.crc32(data).to_bytes(4, "big") + hashlib.sha256(data).digest() for _, data in APP
    ]


def test_everyone_hears_of_a_tester_while_one_is_slow() -> None:
    """S3 of the neighbour is short; the physical channel is busy with an erase all that time."""
    bus, ecu, neighbour = bus_name(), Controller(slow_erase_s=5.2), Controller(s3_s=4.5)
    states: list[int] = []

    def progress(phase: Phase, done_bytes: int, total_bytes: int) -> None:
        neighbour.tick()
        states.append(neighbour.session)

    with two(bus, ecu, neighbour) as said:
        asyncio.run(stage(bus, progress, **EVERYONE, erase={"per": "image"}))
    assert states and set(states) == {3}
    assert b"\x3e\x80" in neighbour.heard_by_all and said == []


def test_everyone_is_let_go_where_a_transfer_is_cancelled() -> None:
    bus, ecu, neighbour = bus_name(), Controller(), Controller()

    async def body() -> None:
        half = asyncio.Event()

        def progress(done_bytes: int, total_bytes: int) -> None:
            if done_bytes * 2 > total_bytes:
                half.set()

        task = asyncio.create_task(stage(bus, on_write(progress), **EVERYONE))
        await half.wait()
        assert neighbour.session == 3
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        await soon(lambda: neighbour.session == ecu.session == 1)

    with two(bus, ecu, neighbour):
        asyncio.run(body())
    assert neighbour.dtc_on and neighbour.talks and 0 < ecu.counts.written < 1800


@pytest.mark.parametrize("spelling", ["", "@500000"])
@pytest.mark.parametrize("quiet_one", ["ecu", "other"])
def test_one_that_tells_everyone_does_not_begin_beside_another_update(quiet_one: str, spelling: str) -> None:
    """It would throw the other out of its session; the engine tries again later. Also where the bus is opened twice, since
    its address is written in two ways."""
    bus, pool, ecu, other = bus_name(), LinkPool(LINKS), Controller(), Controller()
    tables: dict[str, dict[str, Any]] = {"ecu": {}, "other": {}, quiet_one: EVERYONE}
    address, spec = f"can:virtual@{bus}", fresh()

    async def body() -> None:
        async with (
            connected(device(address, "ecu", ECU, **tables["ecu"]), pool, spec) as first,
            connected(
                device(address + spelling, "other", NEIGHBOUR, **tables["other"]), pool, spec
            ) as second,
        ):
            begun = asyncio.Event()
            task = asyncio.create_task(
                first.stage(await verified(APP), on_write(lambda done, total: begun.set()))
            )
            await begun.wait()
            with pytest.raises(Transient, match="ecu is being programmed") as caught:
                await second.stage(await verified(APP), quiet)
            assert caught.value.reason is Reason.LINK_BUSY
            assert other.heard == []
            await task
            await first.activate()
            await second.stage(await verified(APP), quiet)
            await second.activate()

    with two(bus, ecu, other):
        asyncio.run(body())
    assert holds(ecu) and holds(other)
    assert ecu.counts.downloads == other.counts.downloads == 2


# -- fingerprints


def test_a_fingerprint_is_written_before_the_erase() -> None:
    class Noon(SystemClock):
        def now(self) -> datetime:
            return datetime(2026, 3, 9, 12, 34, 56, tzinfo=UTC)

    bus, ecu = bus_name(), Controller(needs_fingerprint=9)
    to = device(
        f"can:virtual@{bus}",
        sequence=["extended_session", "programming_session", "security_access", "fingerprint"],
        fingerprint={"record": "{yymmdd}{serial}00", "serial": "N-007"},
    )

    async def body() -> None:
        async with connected(to, LinkPool(LINKS, clock=Noon())) as session:
            await session.stage(await verified(APP), quiet)

    with on_bus(bus, ecu):
        asyncio.run(body())
    assert ecu.properties[0xF15A] == b"\x26\x03\x09N-007\x00"
    asked = [request[0] for request in ecu.heard]
    assert holds(ecu) and asked.index(0x2E) < asked.index(0x31)


def test_without_its_fingerprint_such_a_device_erases_nothing() -> None:
    bus, ecu = bus_name(), Controller(needs_fingerprint=9)
    with on_bus(bus, ecu), pytest.raises(Transient, match=r"conditionsNotCorrect \(0x22\)"):
        asyncio.run(stage(bus))
    assert ecu.counts.erased == 0


@pytest.mark.parametrize(
    ("record", "data"),
    [
        ("", ""),
        ("00ffAb", "00ffab"),
        ("{yymmdd}", "260309"),
        ("{yyyymmdd}01{hhmmss}", "20260309" + "01" + "123456"),
        ("01{serial}{serial}", "01" + "4142" * 2),
    ],
)
def test_what_a_fingerprint_says(record: str, data: str) -> None:
    now = datetime(2026, 3, 9, 12, 34, 56, tzinfo=UTC)
    assert fingerprint(Fingerprint(record=record, serial="AB"), now).hex() == data


# -- routines that go on after their start


def test_results_are_asked_for_until_a_routine_is_done() -> None:
    bus, ecu = bus_name(), Controller(background_s=0.3)
    with on_bus(bus, ecu):
        asyncio.run(stage(bus, **POLLED))
    assert holds(ecu) and ecu.runs == b"1.2.0"
    # two erases and a check, each asked for more than once
    assert ecu.counts.polls >= 6 and ecu.counts.erased == 1800


def test_an_erase_of_several_segments_is_told_of() -> None:
    bus, told = bus_name(), list[tuple[Phase, int, int]]()

    with on_bus(bus, Controller()):
        asyncio.run(stage(bus, lambda *report: told.append(report)))
    assert told[:3] == [(Phase.ERASE, done, 1800) for done in (0, 1200, 1800)]
    assert told[-1] == (Phase.WRITE, 1800, 1800) and {phase for phase, *_ in told[3:]} == {Phase.WRITE}


def test_a_check_that_fails_in_the_background_is_no_success() -> None:
    bus, ecu = bus_name(), Controller(background_s=0.1)

    def spoil(done_bytes: int, total_bytes: int) -> None:
        ecu.flash[5] ^= 1

    with (
        on_bus(bus, ecu),
        pytest.raises(Permanent, match="the check routine 0xff01 answered 01, not 00") as caught,
    ):
        asyncio.run(
            stage(bus, on_write(spoil), erase=POLLED["erase"], check={**POLLED["check"], "running": "02"})
        )
    assert caught.value.reason is Reason.VERIFY_FAILED and ecu.counts.resets == 0


def test_a_routine_that_never_ends_is_given_up() -> None:
    bus, ecu = bus_name(), Controller(background_s=60)
    began = time.monotonic()
    with (
        on_bus(bus, ecu),
        pytest.raises(Transient, match="the erase routine 0xff00 is at work after 2 s") as caught,
    ):
        asyncio.run(stage(bus, pending_s=2, **POLLED))
    assert caught.value.reason is Reason.NO_RESPONSE
    assert time.monotonic() - began >= 2 and ecu.counts.downloads == 0 and ecu.counts.polls >= 5


def test_a_reset_while_a_routine_is_at_work_is_not_its_success() -> None:
    """Its results are then of nothing that was started (0x24), or of no session (0x7F)."""
    bus, ecu = bus_name(), Controller(background_s=60)

    async def body() -> None:
        task = asyncio.create_task(stage(bus, **POLLED))
        await soon(lambda: ecu.counts.polls >= 2)
        ecu.boot()
        with pytest.raises(Transient, match="RoutineControl: the device answered"):
            await task

    with on_bus(bus, ecu):
        asyncio.run(body())
    assert ecu.counts.downloads == ecu.counts.erased == 0


# -- what only an application has


def test_preconditions_are_asked_of_an_application_only() -> None:
    """The boot loader does not know the routine, and nothing that it could be about goes on."""
    bus, ecu = bus_name(), Controller()
    table: dict[str, Any] = {
        "sequence": ["extended_session", "check_preconditions", "programming_session", "security_access"],
        "precondition_routine": 0x0999,
    }
    with on_bus(bus, ecu):
        asyncio.run(stage(bus, **table))
        assert holds(ecu) and ecu.runs == b"1.2.0"
        with pytest.raises(Transient, match="RoutineControl: the device answered"):
            asyncio.run(stage(bus, **table))
    assert ecu.counts.erased == 1800


@pytest.mark.parametrize(
    ("step", "refused"),
    [("extended_session", b"\x10\x03"), ("dtc_off", b"\x85\x02"), ("communication_off", b"\x28\x03")],
)
@pytest.mark.parametrize("code", [0x11, 0x12, 0x7E, 0x7F, 0x22])
def test_what_a_boot_loader_does_not_support_is_passed_over(step: str, refused: bytes, code: int) -> None:
    class Picky(Controller):
        def _answer(self, service: int, data: bytes) -> Iterator[bytes | float]:
            if bytes((service, *data)).startswith(refused):
                raise Negative(code)
            yield from super()._answer(service, data)

    bus, ecu = bus_name(), Picky()

    async def body() -> None:
        sequence = [step, "programming_session", "security_access"]
        async with connected(device(f"can:virtual@{bus}", sequence=sequence)) as session:
            await session.prepare(await verified(APP))

    with on_bus(bus, ecu):
        if code == 0x22:
            with pytest.raises(Transient, match="conditionsNotCorrect"):
                asyncio.run(body())
        else:
            asyncio.run(body())
    assert ecu.counts.seeds == (code != 0x22)


# -- levels


def test_a_second_level_has_a_secret_of_its_own() -> None:
    bus, ecu = bus_name(), Controller(programming_level=3)
    with on_bus(bus, ecu):
        with pytest.raises(Transient, match="securityAccessDenied"):
            asyncio.run(stage(bus))
        assert ecu.counts.erased == 0
        asyncio.run(
            stage(
                bus,
                sequence=[
                    "extended_session",
                    "security_access",
                    "programming_session",
                    "second_security_access",
                ],
                second_security={"level": 3, "algorithm": "xor", "credential": "second"},
            )
        )
    assert holds(ecu) and ecu.counts.wrong_keys == 0
    assert [request[1] for request in ecu.heard[-40:] if request[0] == 0x27][-4:] == [1, 2, 3, 4]


# -- the page


def test_the_sequence_of_the_page_flashes_a_controller(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "can.md").read_text()
    fences = [tomllib.loads(block.split("```")[0]) for block in page.split("```toml\n")[1:]]
    (table,) = (fence["model"]["config"] for fence in fences if "functional_id" in str(fence))
    (tmp_path / "edged_drive-programming").write_text(f"hex:{SECOND_SECRET.hex()}")
    assert table["second_security"]["algorithm"] == "aes-cmac"
    table["second_security"]["algorithm"] = "xor"
    level = table["second_security"]["level"]
    bus, neighbour = bus_name(), Controller()
    ecu = Controller(
        programming_level=level, secrets={level: SECOND_SECRET}, needs_fingerprint=9, background_s=0.2
    )
    with two(bus, ecu, neighbour):
        asyncio.run(stage(bus, **table))
    assert holds(ecu) and ecu.runs == b"1.2.0"
    assert ecu.properties[0xF15A].endswith(b"NODE-7")
    assert ecu.heard_by_all[:3] == neighbour.heard_by_all[:3] == [b"\x10\x83", b"\x85\x82", b"\x28\x83\x01"]


# -- the server's side, driven by others


@contextmanager
def functional_client(bus: Any) -> Iterator[Client]:
    address = isotp.Address(isotp.AddressingMode.Normal_11bits, txid=ALL, rxid=0x7EF)
    stack = isotp.CanStack(bus=bus, address=address, params={"tx_padding": 0xCC})
    with Client(PythonIsoTpConnection(stack), request_timeout=20) as client:
        yield client


def wait_for_results(client: Client, routine: int) -> bytes:
    for _ in range(100):
        status: bytes = client.get_routine_result(routine).service_data.routine_status_record
        if status != b"\x01":
            return status
        threading.Event().wait(0.02)
    raise AssertionError("it never ended")


def test_udsoncan_runs_the_whole_sequence() -> None:
    bus = bus_name()
    ecu, neighbour = Controller(needs_fingerprint=3, background_s=0.1, programming_level=3), Controller()
    keys = {1: b"\x5a\xa5\x0f\xf0", 3: SECOND_SECRET}

    def key(level: int, seed: bytes, params: Any = None) -> bytes:
        return bytes(a ^ b for a, b in zip(seed, keys[level], strict=True))

    with ExitStack() as stack:
        said = stack.enter_context(two(bus, ecu, neighbour))
        buses = virtual(bus), virtual(bus)
        for one in buses:
            stack.callback(one.shutdown)
        everyone = stack.enter_context(functional_client(buses[0]))
        client = stack.enter_context(udsoncan_client(buses[1], ECU))
        client.config["security_algo"] = key
        client.config["data_identifiers"][0xF15A] = ">3s"
        with everyone.suppress_positive_response():
            everyone.change_session(3)
            everyone.control_dtc_setting(2)
            everyone.communication_control(3, 1)
            everyone.tester_present()
        # there is no answer to wait for: a session that is asked for late would end the one that follows
        asyncio.run(soon(lambda: not (ecu.talks or neighbour.talks)))
        client.change_session(2)
        client.unlock_security_access(1)
        client.unlock_security_access(3)
        extent = b"\x44" + APP[0][0].to_bytes(4, "big") + len(APP[0][1]).to_bytes(4, "big")
        with pytest.raises(NegativeResponseException) as caught:
            client.start_routine(0xFF00, extent)
        assert caught.value.response.code == 0x22
        client.write_data_by_identifier(0xF15A, (b"\x26\x03\x09",))
        with pytest.raises(NegativeResponseException) as caught:
            client.get_routine_result(0xFF00)
        assert caught.value.response.code == 0x24
        for at, data in APP:
            client.start_routine(0xFF00, b"\x44" + at.to_bytes(4, "big") + len(data).to_bytes(4, "big"))
            assert wait_for_results(client, 0xFF00) == b"\x00"
            download = client.request_download(udsoncan.MemoryLocation(at, len(data), 32, 32))
            size = download.service_data.max_length - 2
            for number, offset in enumerate(range(0, len(data), size), 1):
                client.transfer_data(number & 0xFF, data[offset : offset + size])
            client.request_transfer_exit()
        client.start_routine(0xFF01)
        assert wait_for_results(client, 0xFF01) == b"\x00"
        assert (neighbour.session, neighbour.dtc_on, neighbour.talks) == (3, False, False)
        client.ecu_reset(1)
        with everyone.suppress_positive_response():
            everyone.change_session(1)
        asyncio.run(soon(lambda: neighbour.session == 1 and ecu.runs == b"1.2.0"))
    assert holds(ecu) and ecu.runs == b"1.2.0" and ecu.counts.wrong_keys == 0
    assert said == []


def test_a_long_message_to_everyone_is_not_heard() -> None:
    """Functional requests have one frame (ISO 15765-2, 9.3.1): flow controls of all would collide."""
    bus, ecu = bus_name(), Controller()
    other = virtual(bus)
    with on_bus(bus, ecu, ECU) as server:
        other.send(
            can.Message(arbitration_id=ALL, data=b"\x10\x0a\x22\xf1\x91\xf1\x8c\xf1", is_extended_id=False)
        )
        other.send(can.Message(arbitration_id=ALL, data=b"\x02\x3e\x80", is_extended_id=False))
        asyncio.run(soon(lambda: ecu.counts.testers == 1))
        assert other.recv(0.1) is None
    other.shutdown()
    assert ecu.heard_by_all == [b"\x3e\x80"] and server.aborted == 0


@pytest.mark.parametrize(
    ("per", "sector_bytes", "runs"),
    [
        ("segment", 0, [(0, 4)]),
        ("segment", 0x100, [(0, 2), (2, 3), (3, 4)]),
        ("segment", 0x200, [(0, 3), (3, 4)]),
        ("segment", 0x1000, [(0, 4)]),
        ("image", 0x100, [(0, 4)]),
        ("never", 0, [(0, 1), (1, 2), (2, 3), (3, 4)]),
    ],
)
def test_which_segments_an_erase_may_take_together(
    per: str, sector_bytes: int, runs: list[tuple[int, int]]
) -> None:
    """The first two share a sector of 256 bytes, the third one of 512 with them; the last begins right behind."""
    segments = [Segment(0x1000, 0x10), Segment(0x10F0, 0x10), Segment(0x1100, 0x100), Segment(0x1200, 1)]
    config = UdsConfig(erase=Routine(0xFF00, (), per), sector_bytes=sector_bytes)
    found = erased_together(segments, config)
    assert [(run.start, run.stop) for run in found] == runs
