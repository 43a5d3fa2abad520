"""The bus as a link: addresses, serial adapters, sharing, loss; how much of it is used, and keeping to a share."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import can
import can.interfaces.virtual
import pytest
from can_kit import (
    LINKS,
    SPEC,
    SlcanAdapter,
    bus_name,
    connected,
    device,
    on_bus,
    on_write,
    quiet,
    soon,
    verified,
    virtual,
)
from cli_kit import Place
from hypothesis import given, settings
from hypothesis import strategies as st
from uds_server import BASE, DEFAULT, Controller, Counts, Wiring, make_app

from edged.errors import EdgedError, Permanent, Reason, Transient
from edged.links import LinkPool, device_env
from edged_can import threaded
from edged_can.address import CanAddress, parse_address
from edged_can.bus_errors import BusErrors, lost, not_opened
from edged_can.client import Timing, UdsClient
from edged_can.frames import Frame, ceiling_bytes_per_s, wire_s
from edged_can.kernel import KernelLink, _KernelPeer
from edged_can.load import LONGEST_WAIT_S, BusLoad, gap_s
from edged_can.threaded import ThreadedLink, _ThreadedPeer
from edged_can.transport import Peer, Shape

APP = make_app("1.2.0", (1200, 600))
BUS = CanAddress("virtual", "x")
TALKER = 0x100


@pytest.mark.parametrize(
    ("rest", "found"),
    [
        ("can0", CanAddress("socketcan", "can0")),
        ("socketcan@can0@250000", CanAddress("socketcan", "can0", 250_000)),
        ("slcan@/dev/ttyUSB0@500000", CanAddress("slcan", "/dev/ttyUSB0")),
        ("kvaser@0@1000000/2000000", CanAddress("kvaser", "0", 1_000_000, 2_000_000)),
        ("virtual@bench", CanAddress("virtual", "bench")),
        (
            "vector@0@500000?app_name=edged&serial=7&rx=true",
            CanAddress("vector", "0", options=(("app_name", "edged"), ("serial", 7), ("rx", True))),
        ),
    ],
)
def test_addresses(rest: str, found: CanAddress) -> None:
    assert parse_address(rest) == found


@pytest.mark.parametrize(
    ("rest", "says"),
    [
        ("", "can:NAME"),
        ("a name that is far too long", "can:NAME"),
        ("can0@500000", "can:NAME"),
        ("SLCAN@x@1", "can:NAME"),
        ("slcan@/dev/x@fast", "can:NAME"),
        ("slcan@/dev/x@1", "a bit rate from 5000 to 1000000"),
        ("kvaser@0@500000/1", "a data bit rate from"),
        ("slcan@/dev/x?=1", "KEY=VALUE"),
        ("slcan@/dev/x@500000/2000000", "not supported on slcan"),
        ("slcan@/dev/x\n", "can:NAME"),
    ],
)
def test_what_is_no_address_is_told_what_is(rest: str, says: str) -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        parse_address(rest)
    assert says in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        found = parse_address(text)
    except ValueError as error:
        assert "allowed" in str(error)
    else:
        assert found.channel and found.bitrate >= 5000


def open_it(address: str) -> None:
    async def body() -> None:
        async with device_env("x", LinkPool(LINKS)).link(address):
            pass

    asyncio.run(body())


@pytest.mark.parametrize(
    ("address", "kind", "reason", "says"),
    [
        ("can:nothere@x", Permanent, Reason.CONFIG_INVALID, "interfaces of python-can: .*slcan"),
        ("can:slcan@/dev/nothere@500000", Transient, Reason.DEVICE_ABSENT, "there is no such interface"),
        ("can:slcan@/dev/null@123456", EdgedError, None, ""),
        ("can:can0", Transient, Reason.DEVICE_ABSENT, ""),
        ("can:a b", Permanent, Reason.CONFIG_INVALID, "allowed"),
    ],
)
def test_what_cannot_be_opened_has_a_reason(
    address: str, kind: type[EdgedError], reason: Reason | None, says: str
) -> None:
    with pytest.raises(kind, match=says or None) as caught:
        open_it(address)
    assert reason is None or caught.value.reason is reason


def test_a_wrong_bit_rate_of_an_adapter_is_told(tmp_path: Path) -> None:
    with SlcanAdapter(bus_name()) as adapter, pytest.raises(Permanent, match="Invalid bitrate"):
        open_it(f"can:slcan@{adapter.port}@123456")


@pytest.mark.parametrize("wiring", [Wiring(), Wiring(receives=0x18DA10F1, sends=0x18DAF110, extended=True)])
def test_a_controller_behind_a_serial_adapter(wiring: Wiring) -> None:
    name, controller = bus_name(), Controller()

    async def body(port: str) -> None:
        async with connected(device(f"can:slcan@{port}@500000", wiring=wiring)) as session:
            assert (await session.identify()).serial_number == "SN0001"
            await session.stage(await verified(APP), quiet)
            await session.activate()

    with SlcanAdapter(name) as adapter, on_bus(name, controller, wiring):
        asyncio.run(body(adapter.port))
        # python-can says it twice: with the bit rate, and then
        assert adapter.opened == 2
    assert controller.runs == b"1.2.0"


def test_an_adapter_that_is_pulled_out_is_a_lost_link() -> None:
    name = bus_name()

    async def body(adapter: SlcanAdapter) -> None:
        def halfway(done: int, total: int) -> None:
            if done * 2 > total:
                adapter.unplug()

        async with connected(device(f"can:slcan@{adapter.port}@500000")) as session:
            await session.stage(await verified(APP), on_write(halfway))

    with SlcanAdapter(name) as adapter, on_bus(name, Controller()), pytest.raises(Transient) as caught:
        asyncio.run(body(adapter))
    assert caught.value.reason is Reason.LINK_LOST


def test_a_driver_that_does_not_return_is_a_lost_link_and_is_left_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A write that ends when its port is closed, and not before."""
    monkeypatch.setattr("edged_can.threaded._STUCK_S", 0.3)
    monkeypatch.setattr("edged_can.threaded._LET_GO_S", 0.3)
    name, closed, sent = bus_name(), threading.Event(), 0
    real_send, real_shutdown = (
        can.interfaces.virtual.VirtualBus.send,
        can.interfaces.virtual.VirtualBus.shutdown,
    )

    def send(self: Any, message: can.Message, timeout: float | None = None) -> None:
        nonlocal sent
        sent += message.arbitration_id == 0x7E0
        if sent > 60 and not closed.wait(20):
            raise AssertionError("nobody closed the port")
        real_send(self, message, timeout)

    def shutdown(self: Any) -> None:
        closed.set()
        real_shutdown(self)

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", answer_s=20)) as session:
            await session.stage(await verified(APP), quiet)

    with on_bus(name, Controller()) as server:
        monkeypatch.setattr("can.interfaces.virtual.VirtualBus.send", send)
        monkeypatch.setattr("can.interfaces.virtual.VirtualBus.shutdown", shutdown)
        with pytest.raises(Transient, match="the queue for sending stays full") as caught:
            asyncio.run(body())
    assert caught.value.reason is Reason.LINK_LOST and server.controller.counts.blocks < 7


def _hangs(given_up: threading.Event) -> None:
    given_up.wait(60)


def _fails(given_up: threading.Event) -> None:
    raise RuntimeError("a vendor's driver")


@pytest.mark.parametrize(
    ("driver", "says"), [(_hangs, "the queue for sending stays full"), (_fails, "its driver failed")]
)
def test_a_frame_that_its_driver_does_not_send_is_a_lost_link(
    driver: Callable[[threading.Event], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raw frames too, as those for everyone on the bus, and the next one at once."""
    monkeypatch.setattr("edged_can.threaded._STUCK_S", 0.3)
    given_up, name = threading.Event(), bus_name()
    monkeypatch.setattr("can.interfaces.virtual.VirtualBus.send", lambda *_, **__: driver(given_up))

    async def body() -> None:
        async with device_env("x", LinkPool(LINKS)).link(f"can:virtual@{name}") as link:
            assert isinstance(link, ThreadedLink)
            async with link.listen([(TALKER, False)]) as listener:
                try:
                    for _ in range(2):
                        async with asyncio.timeout(20):
                            with pytest.raises(Transient, match=says) as caught:
                                await link.send(Frame(0x7DF, b"\2\x10\x81"))
                        assert caught.value.reason is Reason.LINK_LOST
                    with pytest.raises(Transient, match=says):
                        await listener.next(20)
                finally:
                    given_up.set()

    asyncio.run(body())


def test_an_adapter_has_one_owner() -> None:
    async def body(port: str) -> None:
        async with device_env("x", LinkPool(LINKS)).link(f"can:slcan@{port}@500000"):
            await asyncio.to_thread(open_it, f"can:slcan@{port}@500000")

    with SlcanAdapter(bus_name()) as adapter, pytest.raises(Transient, match="used by another") as caught:
        asyncio.run(body(adapter.port))
    assert caught.value.reason is Reason.LINK_BUSY


def test_damaged_lines_of_an_adapter_cost_a_frame_each() -> None:
    name, controller = bus_name(), Controller()
    due = {2, 5}

    def damage(line: bytes) -> bytes:
        if (blocks := controller.counts.blocks) in due:
            due.remove(blocks)
            return b"tXYZ!" + line[5:]
        return line

    async def body(port: str) -> None:
        async with connected(device(f"can:slcan@{port}@500000", answer_s=1)) as session:
            await session.stage(await verified(APP), quiet)

    with SlcanAdapter(name) as adapter, on_bus(name, controller):
        adapter.damage = damage
        asyncio.run(body(adapter.port))
    assert not due
    assert all(controller.held(at, len(data)) == data for at, data in APP)


def test_a_bus_is_opened_once_for_two_and_both_work() -> None:
    name, pool = bus_name(), LinkPool(LINKS)
    other = Wiring(receives=0x7E1, sends=0x7E9)

    async def body() -> None:
        address = f"can:virtual@{name}"
        async with (
            connected(device(address), pool) as first,
            connected(device(address, "other", other), pool) as second,
        ):
            assert pool.users() == {address: ("ecu", "other")}
            await asyncio.gather(
                first.stage(await verified(APP), quiet),
                second.stage(await verified(make_app("1.3.0", (900, 900))), quiet),
            )
            await asyncio.gather(first.activate(), second.activate())

    one, two = Controller(), Controller()
    with on_bus(name, one), on_bus(name, two, other):
        asyncio.run(body())
    assert (one.runs, two.runs) == (b"1.2.0", b"1.3.0")


def test_fd_wants_a_bus_that_has_it() -> None:
    async def body() -> None:
        async with connected(device(f"can:virtual@{bus_name()}", fd=True)):
            pass

    with pytest.raises(Permanent, match="data bit rate") as caught:
        asyncio.run(body())
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_a_queue_that_stays_full_is_a_lost_link_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver takes no more, as an adapter without a bus does after some frames."""

    def full(self: object, message: object, timeout: float | None = None) -> None:
        raise can.CanOperationError("Failed to transmit: No buffer space available", errno.ENOBUFS)

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus_name()}")) as session:
            monkeypatch.setattr("can.interfaces.virtual.VirtualBus.send", full)
            await session.identify()

    began = time.monotonic()
    with pytest.raises(Transient, match="queue for sending stays full") as caught:
        asyncio.run(body())
    assert caught.value.reason is Reason.LINK_LOST and time.monotonic() - began > 0.9


def test_a_queue_that_is_full_for_a_moment_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    real, refusals = can.interfaces.virtual.VirtualBus.send, 0

    def sometimes(self: Any, message: can.Message, timeout: float | None = None) -> None:
        nonlocal refusals
        if message.arbitration_id == 0x7E0 and refusals < 20:
            refusals += 1
            raise can.CanOperationError("Failed to transmit: No buffer space available", errno.ENOBUFS)
        real(self, message, timeout)

    name = bus_name()

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}")) as session:
            assert (await session.identify()).hardware_id == "uds:ECU-7"

    monkeypatch.setattr("can.interfaces.virtual.VirtualBus.send", sometimes)
    with on_bus(name, Controller()):
        asyncio.run(body())
    assert refusals == 20


def test_raw_frames_reach_who_listens_for_them_and_nobody_else() -> None:
    name = bus_name()
    other = virtual(name)

    async def body() -> None:
        async with device_env("x", LinkPool(LINKS)).link(f"can:virtual@{name}") as link:
            bus: Any = link
            async with bus.listen([(0x123, False)]) as listener:
                other.send(can.Message(arbitration_id=0x124, data=b"no", is_extended_id=False))
                other.send(can.Message(arbitration_id=0x123, data=b"no", is_extended_id=True))
                other.send(can.Message(arbitration_id=0x123, data=b"yes", is_extended_id=False))
                assert await listener.next(20) == Frame(0x123, b"yes")
                assert await listener.next(0.05) is None
                await bus.send(Frame(0x321, b"out"))
                sent = await asyncio.to_thread(other.recv, 20)
                assert sent is not None and (sent.arbitration_id, bytes(sent.data)) == (0x321, b"out")
                other.send(can.Message(arbitration_id=0x40, data=bytes(8), is_error_frame=True))
                with pytest.raises(Transient, match="bus off"):
                    await listener.next(20)
                with pytest.raises(Transient, match="bus off"):
                    await bus.send(Frame(0x321, b"out"))

    asyncio.run(body())
    other.shutdown()


# -- how much of it is used


def test_the_time_of_a_frame_is_between_its_bits_with_and_without_stuffing() -> None:
    """111 to 135 bits for 8 bytes and 11-bit identifiers; 131 to 160 for 29 bits."""
    assert 111 <= wire_s(8, BUS, extended=False, fd=False) * BUS.bitrate <= 135
    assert 131 <= wire_s(8, BUS, extended=True, fd=False) * BUS.bitrate <= 160
    fd = CanAddress("virtual", "x", 500_000, 2_000_000)
    assert 300e-6 < wire_s(64, fd, extended=False, fd=True) < 400e-6
    assert 25_900 < ceiling_bytes_per_s(BUS, extended=False, fd=False, frame_bytes=8, overhead=1) < 31_500


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@settings(max_examples=15)
@given(st.floats(0.05, 0.95), st.floats(0.0, 0.9))
def test_frames_that_wait_as_they_are_told_keep_to_the_share(share: float, others: float) -> None:
    """All traffic together, unless the others alone use more than it: then one in 50 ms still goes."""
    clock, frame_s = Clock(), 228e-6
    load = BusLoad(clock)
    own, strangers_s, end = 0, 0.0, 2.0
    load.wait_s(share)
    while clock.now < end:
        while strangers_s < others * clock.now:
            strangers_s += frame_s
            load.saw(frame_s, own=False)
        wait = load.wait_s(share)
        if wait:
            clock.now += min(wait, 0.001)
            continue
        own += 1
        load.saw(frame_s, own=True)
        clock.now += frame_s
    used = (own * frame_s + strangers_s) / end
    assert own >= end / LONGEST_WAIT_S - 2, "nothing goes out any more"
    most = max(share, others) + 0.02 + frame_s / LONGEST_WAIT_S
    assert used <= most
    if others < share - 0.1:
        assert used >= share - 0.05
        assert abs(load.used_by_others() - others) < 0.1


@given(st.floats(0.05, 1), st.floats(0, 1))
def test_the_pause_between_frames_leaves_the_bus_at_the_share(share: float, others: float) -> None:
    frame_s = 228e-6
    gap = gap_s(frame_s, share, others)
    assert 0 <= gap <= LONGEST_WAIT_S
    if others < share - 0.05:
        assert frame_s / (frame_s + gap) == pytest.approx(share - others, rel=0.01)


@contextmanager
def talking(name: str, frames: int, every_s: float) -> Iterator[None]:
    """Somebody else sends so many frames of 8 bytes each so often, under 0x100."""
    talker, stop = virtual(name), threading.Event()

    def talk() -> None:
        while not stop.wait(every_s):
            for _ in range(frames):
                talker.send(can.Message(arbitration_id=TALKER, data=bytes(8), is_extended_id=False))

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        talker.shutdown()


def drained(watcher: can.BusABC) -> tuple[float, float]:
    """Wire time of the frames that ``watcher`` has seen: of the talker's, and of all others."""
    seen = {True: 0.0, False: 0.0}
    while (message := watcher.recv(0)) is not None:
        seen[message.arbitration_id == TALKER] += wire_s(len(message.data), BUS, extended=False, fd=False)
    return seen[True], seen[False]


def test_a_share_is_kept_to_while_others_talk() -> None:
    """All that is sent is measured on the bus by a third party, in wire time of the frames that it saw."""
    name, controller = bus_name(), Controller(longest_block=1026)
    watcher, share = virtual(name), 0.3

    async def body() -> tuple[float, float]:
        async with connected(device(f"can:virtual@{name}", bus_share=share)) as session:
            drained(watcher)
            began = time.monotonic()
            await session.stage(await verified(make_app("1.2.0", (6000,))), quiet)
            took_s = time.monotonic() - began
            others_s, own_s = drained(watcher)
            return others_s / took_s, own_s / took_s

    with on_bus(name, controller), talking(name, 9, 0.0105):
        others, own = asyncio.run(body())
    watcher.shutdown()
    assert all(controller.held(at, len(data)) == data for at, data in make_app("1.2.0", (6000,)))
    # of a machine with other work none of the two has the time that it wants; what must not be is one frame in 50 ms
    assert others > 0.05, "nobody talked"
    assert own > 5 * wire_s(8, BUS, extended=False, fd=False) / LONGEST_WAIT_S, "the transfer hardly moved"
    assert others + own <= share * 1.1


def test_a_bus_that_is_fuller_than_the_share_slows_and_does_not_stop() -> None:
    """A real talker uses more than all of the share; a message of some frames still arrives, one frame in 50 ms."""
    name, controller = bus_name(), Controller(longest_block=66)

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", bus_share=0.3)) as session:
            await session.stage(await verified([(BASE, bytes(200))]), quiet)

    with on_bus(name, controller), talking(name, 8, 0.004):
        asyncio.run(body())
    assert controller.held(BASE, 200) == bytes(200) and controller.counts.blocks == 4


class Sockets:
    """In place of the kernel's ISO-TP, which not every machine has: a device whose queue is full so many times.

    It passes can_send's ENOBUFS on, where that is for the first frame of a message (net/can/isotp.c, isotp_sendmsg).
    ``bound``: the pause in ns (frame_txtime of linux/can/isotp.h) and the address of each socket, as it was bound.
    """

    AF_CAN = SOCK_DGRAM = CAN_ISOTP = 0

    def __init__(self, full: int) -> None:
        self.full = full
        self.refused = 0
        self.sent: list[bytes] = []
        self.bound: list[tuple[int, object]] = []
        self._pause_ns = 0

    def socket(self, *_: int) -> Sockets:
        self._pause_ns = 50_000
        return self

    def setblocking(self, _: bool) -> None: ...

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        if (level, option) == (106, 1):
            _, self._pause_ns, *_ = struct.unpack("=IIBBBB", value)

    def bind(self, address: object) -> None:
        self.bound.append((self._pause_ns, address))

    def close(self) -> None: ...

    def send(self, message: bytes) -> None:
        if self.refused < self.full:
            self.refused += 1
            raise OSError(errno.ENOBUFS, "No buffer space available")
        self.sent.append(message)


@pytest.mark.parametrize("stays", [False, True])
def test_a_full_queue_is_waited_for_and_ends_one_session_where_it_stays(
    stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernel's ISO-TP. The others on the bus are not thrown out for it."""
    sockets = Sockets(full=1_000_000 if stays else 2)
    monkeypatch.setattr("edged_can.kernel.N_AS_S", 1 if stays else 5)

    async def body() -> None:
        link = KernelLink(parse_address("can0"))
        with monkeypatch.context() as patch:
            patch.setattr("edged_can.kernel.socket", sockets)
            async with link.transport(Peer(0x7E0, 0x7E8), Shape()) as transport:
                if stays:
                    with pytest.raises(Transient, match="the queue for sending stays full") as caught:
                        await transport.send(b"\x3e\x00")
                    assert caught.value.reason is Reason.LINK_LOST
                else:
                    await transport.send(b"\x3e\x00")
        assert link.lost is None

    asyncio.run(body())
    assert sockets.refused >= 2 and sockets.sent == ([] if stays else [b"\x3e\x00"])


def paused(peer: Peer, share: float, *others: float) -> list[tuple[int, object]]:
    """The sockets of one session that were bound, where ``others`` use so much of the bus before each message."""
    sockets, clock = Sockets(full=0), Clock()

    async def body() -> None:
        link = KernelLink(parse_address("can0"))
        async with link.transport(peer, Shape(share=share)) as transport:
            for part in others:
                clock.now += 10
                link.load = BusLoad(clock)
                link.load.saw(part / 2, own=False)
                assert link.load.used_by_others() == pytest.approx(part)
                await transport.send(b"\x3e\x00")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edged_can.kernel.socket", sockets)
        asyncio.run(body())
    assert len(sockets.sent) == len(others)
    return sockets.bound


NORMAL, EXTENDED = Peer(0x7E0, 0x7E8), Peer(0x18DA10F1, 0x18DAF110, extended_ids=True)
NO_PAUSE = 0xFFFFFFFF
"""CAN_ISOTP_FRAME_TXTIME_ZERO; 0 stands for the kernel's own pause."""


@pytest.mark.parametrize(
    ("peer", "address"),
    [(NORMAL, ("can0", 0x7E8, 0x7E0)), (EXTENDED, ("can0", 0x98DAF110, 0x98DA10F1))],
    ids=["11 bits", "29 bits"],
)
def test_the_kernel_is_told_the_pause_that_keeps_to_the_share(peer: Peer, address: object) -> None:
    """A frame and its pause take 1 / (share - others) of the frame's time, or 50 ms where the others leave less."""
    frame_ns = wire_s(8, BUS, extended=peer.extended_ids, fd=False) * 1e9
    assert paused(peer, 1, 0.0, 0.7) == [(NO_PAUSE, address)]
    bound = paused(peer, 0.5, 0.0, 0.25, 0.25, 0.5, 0.9, 0.1)
    assert [name for _, name in bound] == [address] * 5
    assert bound[0][0] == NO_PAUSE, "nothing was sent through that one"
    expected = [frame_ns, 3 * frame_ns, LONGEST_WAIT_S * 1e9, 1.5 * frame_ns]
    assert [pause for pause, _ in bound[1:]] == pytest.approx(expected, abs=2)


class SlowlyClosed:
    """The kernel's ISO-TP again: what is closed waits, as where it is still sending."""

    AF_CAN = SOCK_DGRAM = CAN_ISOTP = 0

    def __init__(self) -> None:
        self.open = 0
        self.closing, self.go_on = threading.Event(), threading.Event()
        self.sent: list[bytes] = []

    def socket(self, *_: int) -> Bound:
        self.open += 1
        return Bound(self)


class Bound:
    def __init__(self, sockets: SlowlyClosed) -> None:
        self._sockets = sockets

    def setblocking(self, _: bool) -> None: ...
    def setsockopt(self, *_: object) -> None: ...
    def bind(self, _: object) -> None: ...

    def recv(self, _: int) -> bytes:
        raise BlockingIOError

    def send(self, message: bytes) -> None:
        self._sockets.sent.append(message)

    def close(self) -> None:
        self._sockets.closing.set()
        assert self._sockets.go_on.wait(40)
        self._sockets.open -= 1


def test_a_sender_that_is_cancelled_while_its_socket_is_bound_anew_may_still_say_goodbye(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sockets = SlowlyClosed()

    async def body() -> None:
        link = KernelLink(parse_address("can0"))
        with monkeypatch.context() as patch:
            patch.setattr("edged_can.kernel.socket", sockets)
            async with link.transport(Peer(0x7E0, 0x7E8), Shape(share=0.6)) as transport:
                sending = asyncio.create_task(transport.send(b"\x10\x02"))
                assert await asyncio.to_thread(sockets.closing.wait, 20)
                sending.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await sending
                transport.drop_input()
                sockets.go_on.set()
                await transport.send(b"\x10\x01")

    asyncio.run(body())
    assert sockets.sent == [b"\x10\x01"] and sockets.open == 0


@pytest.mark.parametrize("kernel", [False, True])
def test_an_answer_of_many_frames_has_begun_when_its_first_came(
    kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its frames come as far apart as they were asked to; the time of an answer ends with the first."""
    name, controller = bus_name(), Controller()
    controller.properties[0x0103] = bytes(range(160))
    # nor is it about how far apart they may be
    for where in ("client", "kernel"):
        monkeypatch.setattr(f"edged_can.{where}.N_CR_S", 20)
    whole = threaded._parameters
    patient = {"rx_consecutive_frame_timeout": 20_000}
    monkeypatch.setattr(threaded, "_parameters", lambda shape: whole(shape) | patient)

    async def slowly() -> None:
        async with connected(device(f"can:virtual@{name}", answer_s=1.5, st_min=80)) as session:
            assert await session._client.read(0x0103) == bytes(range(160))

    async def kernels() -> None:
        async with kernel_peer(monkeypatch) as (transport, far):
            client = UdsClient(transport, Timing(answer_s=2), "ecu")
            asking = asyncio.create_task(client.read(0xF191))
            await asyncio.to_thread(far.recv, 100)
            assert not transport.is_receiving()
            transport.heard(b"\x10\x0a\x62\xf1\x91ECU")
            await asyncio.sleep(2.5)
            far.send(b"\x62\xf1\x91ECU-789")
            assert await asking == b"ECU-789"
            assert not transport.is_receiving()

    if kernel:
        asyncio.run(kernels())
    else:
        with on_bus(name, controller):
            asyncio.run(slowly())


@pytest.mark.parametrize("again", [False, True], ids=["once", "for ever"])
def test_a_first_frame_that_the_kernel_drops_is_no_answer(
    again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too short, or of a message that is too long: it says nothing of them, and no message comes."""
    took = 0.0

    async def body() -> None:
        nonlocal took
        async with kernel_peer(monkeypatch) as (transport, far):
            client = UdsClient(transport, Timing(answer_s=0.8, pending_s=1.5), "ecu")
            asking = asyncio.create_task(client.read(0xF191))
            await asyncio.to_thread(far.recv, 100)
            began = time.monotonic()
            transport.heard(b"\x10\x14")
            while again and not asking.done():
                await asyncio.sleep(0.1)
                transport.heard(b"\x10\x14")
            with pytest.raises(Transient, match="no answer within 0.8 s") as caught:
                await asking
            took = time.monotonic() - began
            assert caught.value.reason is Reason.NO_RESPONSE

    asyncio.run(body())
    assert 1.0 <= took < (5.0 if again else 3.0)


@asynccontextmanager
async def kernel_peer(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[_KernelPeer, socket.socket]]:
    """A session's transport, and the other end of its ISO-TP socket, which has and gives whole messages."""
    link, near, far = KernelLink(parse_address("can0")), *socket.socketpair(type=socket.SOCK_SEQPACKET)
    sockets = Sockets(full=0)
    near.setblocking(False)
    monkeypatch.setattr(sockets, "socket", lambda *_: Pair(near))
    with monkeypatch.context() as patch, far:
        patch.setattr("edged_can.kernel.socket", sockets)
        async with link.transport(Peer(0x7E0, 0x7E8), Shape()) as transport:
            assert isinstance(transport, _KernelPeer)
            yield transport, far


class Pair:
    """A socket of the kernel's ISO-TP whose device is the other end of a pair."""

    def __init__(self, near: socket.socket) -> None:
        self._near = near
        self.fileno, self.recv, self.send, self.close = near.fileno, near.recv, near.send, near.close
        self.gettimeout = near.gettimeout

    def setblocking(self, _: bool) -> None: ...
    def setsockopt(self, *_: object) -> None: ...
    def bind(self, _: object) -> None: ...


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("raw", [0x80, 0xF0, 0xFA, 0xFF])
def test_a_reserved_pause_is_the_longest(raw: int, extended: bool) -> None:
    """ISO 15765-2, 9.6.5: as the kernel does it too."""
    name, controller, came = bus_name(), Controller(), list[float]()
    controller.properties[0x0103] = bytes(12)
    wiring = Wiring(st_min=raw, own=0x10 if extended else None, tester=0xF1 if extended else None)

    def wire(way: str, frame: bytes) -> list[bytes]:
        # from the flow control on: the frame behind it may be seen late
        if frame[extended] >> 4 == (2 if way == "in" else 3):
            came.append(time.monotonic())
        return [frame]

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", wiring=wiring)) as session:
            for _ in range(3):
                await session._client.write(0x0103, bytes(range(12)))

    with on_bus(name, controller, wiring, wire):
        asyncio.run(body())
    assert controller.properties[0x0103] == bytes(range(12)) and len(came) == 9
    # a machine that stands still for a moment makes one of them longer, and none shorter
    took = [end - begin for begin, end in zip(came[::3], came[2::3], strict=True)]
    assert 0.12 < min(took) < 0.6


def test_a_device_that_has_no_room_ends_the_message() -> None:
    """FC.OVFLW, at once; another message is taken after it."""
    name, told = bus_name(), list[bytes]()

    def wire(way: str, frame: bytes) -> list[bytes]:
        if way == "out" and frame[0] >> 4 == 3 and not told:
            told.append(frame)
            return [b"\x32\x00\x00"]
        return [frame]

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", answer_s=5)) as session:
            began = time.monotonic()
            with pytest.raises(Transient, match="it cannot take a message of that length") as caught:
                await session._client.write(0x0101, bytes(100))
            assert caught.value.reason is Reason.PROTOCOL_ERROR and time.monotonic() - began < 1
            await session._client.write(0x0101, b"\x00\x01")

    with on_bus(name, Controller(), wire=wire):
        asyncio.run(body())
    assert told


@pytest.mark.parametrize("waits", [20, 40])
def test_a_device_may_say_wait_and_not_for_ever(waits: int) -> None:
    name, told = bus_name(), list[bytes]()

    def wire(way: str, frame: bytes) -> list[bytes]:
        if way == "out" and frame[0] >> 4 == 3 and not told:
            told.extend([b"\x31\x00\x00"] * waits)
            return [*told, frame]
        return [frame]

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}")) as session:
            await session._client.write(0x0103, bytes(12))

    controller = Controller()
    controller.properties[0x0103] = bytes(12)
    with on_bus(name, controller, wire=wire):
        if waits > 25:
            with pytest.raises(Transient, match="no flow control") as caught:
                asyncio.run(body())
            assert caught.value.reason is Reason.NO_RESPONSE
        else:
            asyncio.run(body())
    assert len(told) == waits


def test_what_became_of_a_message_that_nobody_waits_for_is_not_the_next_ones() -> None:
    name, watcher = bus_name(), list[bytes]()

    def wire(way: str, frame: bytes) -> list[bytes]:
        watcher.append(frame)
        return [] if way == "out" and frame[0] >> 4 == 3 else [frame]

    async def body() -> None:
        async with connected(device(f"can:virtual@{name}", answer_s=2)) as session:
            transport = session._client._transport
            assert isinstance(transport, _ThreadedPeer)
            sending = asyncio.create_task(transport.send(bytes(100)))
            await soon(lambda: bool(watcher))
            stale = transport._under_way
            sending.cancel()
            await asyncio.wait([sending])
            asking = asyncio.create_task(session._client.read(0xF18C))
            await asyncio.sleep(0)
            transport._fail_of(stale, Transient(Reason.PROTOCOL_ERROR, "of the message before"))
            assert await asking == b"SN0001"

    with on_bus(name, Controller(), wire=wire):
        asyncio.run(body())


def test_blocks_that_are_cut_begin_at_words_of_the_flash() -> None:
    """A device that takes more than one message may have is given whole words, and one that says its length gets that."""
    app, sizes = make_app("1.2.0", (9000,)), {}
    for longest in (4098, 1002):
        name, controller = bus_name(), Controller(longest_block=longest)

        async def body(name: str = name) -> None:
            async with connected(device(f"can:virtual@{name}")) as session:
                await session.stage(await verified(app), quiet)

        with on_bus(name, controller):
            asyncio.run(body())
        assert all(controller.held(at, len(data)) == data for at, data in app)
        sizes[longest] = {len(request) - 2 for request in controller.heard[:-1] if request[0] == 0x36}
    assert sizes == {4098: {3840, 9000 - 2 * 3840}, 1002: {1000}}


class Waiting(SlowlyClosed):
    """The kernel's ISO-TP while its receiver says FC.WAIT: it waits on, and counts nothing."""

    def socket(self, *_: int) -> Bound:
        self.open += 1
        return Held(self)


class Held(Bound):
    def send(self, message: bytes) -> None:
        super().send(message)
        assert self._sockets.go_on.wait(40)


@pytest.mark.parametrize("source", [None, 0xF1])
def test_a_receiver_that_says_wait_without_end_ends_its_session_and_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, source: int | None
) -> None:
    sockets = Waiting()
    peer = Peer(0x7E0, 0x7E8, target=None if source is None else 0x10, source=source)
    head = b"" if source is None else bytes((source,))

    async def body() -> None:
        link = KernelLink(parse_address("can0"))
        with monkeypatch.context() as patch:
            patch.setattr("edged_can.kernel.socket", sockets)
            async with link.transport(peer, Shape()) as transport:
                assert isinstance(transport, _KernelPeer)
                sending = asyncio.create_task(transport.send(bytes(300)))
                await soon(lambda: bool(sockets.sent))
                for frame in (
                    *[b"\x31\x00\x00"] * 25,
                    b"\x30\x00\x00",
                    *[b"\x31\x00\x00"] * 25,
                    b"\x02\x7e\x00",
                ):
                    transport.heard(head + frame)
                await asyncio.sleep(0)
                assert not sending.done(), "so many are allowed, each time"
                transport.heard(head + b"\x31\x00\x00")
                with pytest.raises(Transient, match="it says wait without end") as caught:
                    await sending
                assert caught.value.reason is Reason.NO_RESPONSE and link.lost is None
                with pytest.raises(Transient, match="it says wait without end"):
                    await transport.send(b"\x10\x01")
        assert sockets.open == 1, "the call that is under way still has it"
        sockets.go_on.set()
        await soon(lambda: sockets.open == 0)

    asyncio.run(body())
    assert sockets.sent == [bytes(300)]


@pytest.mark.parametrize("says_wait", [True, False])
def test_a_session_ends_also_while_a_message_is_on_its_way_that_nobody_wants(
    monkeypatch: pytest.MonkeyPatch, says_wait: bool
) -> None:
    """Cancelled in its middle: the receiver says wait on and on, or wants its frames far apart."""
    sockets = Waiting()
    monkeypatch.setattr("edged_can.kernel._CLOSE_S", 60.0 if says_wait else 1.0)

    async def one(link: KernelLink) -> None:
        async with link.transport(Peer(0x7E0, 0x7E8), Shape()) as transport:
            await transport.send(bytes(300))

    async def body() -> None:
        link = KernelLink(parse_address("can0"))
        with monkeypatch.context() as patch:
            patch.setattr("edged_can.kernel.socket", sockets)
            session = asyncio.create_task(one(link))
            await soon(lambda: bool(sockets.sent))
            (peer,) = link._peers
            session.cancel()
            await asyncio.sleep(0.05)
            assert not session.done(), "it waits for the message that is on its way"
            for _ in range(26 if says_wait else 0):
                peer.heard(b"\x31\x00\x00")
            await soon(session.done)
        assert session.cancelled() and not link._peers
        assert sockets.open == 1, "the call that is under way still has it"
        sockets.go_on.set()
        await soon(lambda: sockets.open == 0)

    asyncio.run(body())


def test_slow_messages_hold_up_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    sockets = Waiting()

    async def one(link: KernelLink, number: int) -> None:
        async with link.transport(Peer(0x7E0 + number, 0x7E8 + number), Shape()) as transport:
            await transport.send(bytes(300))

    async def body() -> None:
        link = KernelLink(parse_address("can0"))
        with monkeypatch.context() as patch:
            patch.setattr("edged_can.kernel.socket", sockets)
            async with asyncio.TaskGroup() as group:
                for number in range(40):
                    group.create_task(one(link, number))
                await soon(lambda: len(sockets.sent) == 40)
                await asyncio.wait_for(asyncio.to_thread(lambda: None), 20)
                sockets.go_on.set()

    asyncio.run(body())
    assert sockets.open == 0


# -- what the controller says


@pytest.mark.parametrize(
    ("error_class", "data", "says"),
    [
        (0x20, b"", "no node acknowledges"),
        (0x04, b"\0\x30", "error-passive"),
        (0x04, b"\0\x01", "buffer was full"),
        (0x04, b"\0\x08", "warns"),
        (0x08, b"", "damaged frames"),
        (0x10, b"", "transceiver"),
        (0x01, b"", "in time"),
        (0x100, b"", "started again"),
    ],
)
def test_error_frames_in_words(error_class: int, data: bytes, says: str) -> None:
    errors = BusErrors(BUS)
    assert errors.saw(error_class, data) is None
    assert says in errors.explained("x")


def test_what_the_bus_said_long_ago_explains_nothing() -> None:
    clock = Clock()
    errors = BusErrors(BUS, clock)
    errors.saw(0x20, b"")
    clock.now = 9.0
    assert errors.explained("x") == "x; the bus says: no node acknowledges"
    clock.now = 11.0
    assert errors.explained("x") == "x"
    errors.damaged()
    assert errors.explained("x") == "x; the bus says: damaged frames"


@pytest.mark.parametrize("over", [(0x04, b"\0\x40"), (0x100, b"")], ids=["active", "started again"])
def test_a_state_of_the_controller_explains_until_it_is_over(over: tuple[int, bytes]) -> None:
    """It is told once, when it begins: a bus without termination is error-passive for days."""
    clock = Clock()
    errors = BusErrors(BUS, clock)
    errors.saw(0x04, b"\0\x10")
    clock.now = 1000.0
    assert errors.explained("x") == "x; the bus says: the controller is error-passive"
    errors.saw(*over)
    clock.now = 2000.0
    assert errors.explained("x") == "x"


def test_bus_off_is_the_end_of_the_link() -> None:
    failure = BusErrors(BUS).saw(0x40, b"")
    assert failure is not None and failure.reason is Reason.LINK_LOST


@pytest.mark.parametrize(
    ("error", "reason", "says"),
    [
        (lost(BUS, errno.ENETDOWN, ""), Reason.LINK_LOST, "interface is down"),
        (lost(BUS, None, "gone"), Reason.LINK_LOST, "gone: unplugged"),
        (not_opened(BUS, errno.EBUSY, ""), Reason.LINK_BUSY, "another program"),
        (not_opened(BUS, errno.ENODEV, ""), Reason.DEVICE_ABSENT, "no such interface"),
        (not_opened(BUS, None, "driver missing"), Reason.DEVICE_ABSENT, "driver missing"),
    ],
)
def test_failures_of_the_interface_have_their_reasons(error: Transient, reason: Reason, says: str) -> None:
    assert error.reason is reason and says in error.detail and "can:virtual@x" in error.detail


def test_the_probe_names_everybody_on_the_bus() -> None:
    name = bus_name()
    first, second = Controller(), Controller(hardware=b"ECU-9", serial=b"SN7")
    first.install(APP)

    async def body() -> None:
        assert SPEC.probe is not None and not SPEC.probe_disturbs
        found = await SPEC.probe(f"can:virtual@{name}", device_env("probe", LinkPool(LINKS)))
        assert found is not None and (found.hardware_id, found.serial_number) == ("uds:ECU-7", "SN0001")
        assert found.detail == {
            "protocol": "uds",
            "0x7e0": "uds:ECU-7, runs 1.2.0",
            "0x7e3": "uds:ECU-9, tells no version",
        }

    with on_bus(name, first), on_bus(name, second, Wiring(receives=0x7E3, sends=0x7EB)):
        asyncio.run(body())
    services = {request[0] for controller in (first, second) for request in controller.heard}
    assert services == {0x3E, 0x22}, "the probe did more than ask"


def test_the_command_that_names_a_bus_prints_who_is_there_and_touches_nothing(tmp_path: Path) -> None:
    """By a daemon of its own, so that the bus is behind a serial adapter; ``virtual`` stays in one process."""
    name, place = bus_name(), Place(tmp_path / "node", extra="").write()
    first, second = Controller(), Controller(hardware=b"ECU-9", serial=b"SN7")
    first.install(APP)
    held = [(bytes(one.flash), dict(one.properties)) for one in (first, second)]
    with (
        SlcanAdapter(name) as adapter,
        on_bus(name, first),
        on_bus(name, second, Wiring(receives=0x7E3, sends=0x7EB)),
        place.daemon(fake=False),
    ):
        answer = place.run("mapper", "probe", f"can:slcan@{adapter.port}@500000")
        assert (answer.code, answer.err) == (0, "")
        assert answer.out.splitlines() == [
            "mapper    can-uds",
            "hardware  uds:ECU-7",
            "serial    SN0001",
            "protocol  uds",
            "0x7e0     uds:ECU-7, runs 1.2.0",
            "0x7e3     uds:ECU-9, tells no version",
        ]
    for one in (first, second):
        assert {request[0] for request in one.heard} == {0x3E, 0x22} and not one.heard_by_all
        assert one.counts == Counts(testers=1) and one.session == DEFAULT
    assert [(bytes(one.flash), one.properties) for one in (first, second)] == held


def test_the_probe_of_an_empty_bus_finds_nobody() -> None:
    async def body() -> None:
        assert SPEC.probe is not None
        env = device_env("probe", LinkPool(LINKS))
        assert await SPEC.probe(f"can:virtual@{bus_name()}", env) is None

    asyncio.run(body())
