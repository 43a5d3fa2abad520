"""Faults on the wire while a controller is flashed: frames lost, doubled, flipped, late; resets, bus-off, strangers, silence.

Each ends with the right image, or with the old one (or none) and a reason; what is not the published image is never reported
as good. That the fault came about is asserted too.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import can
import can.interfaces.virtual
import pytest
from can_kit import (
    LINKS,
    SPEC,
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
from can_node import IMAGE_BYTES, IMAGES, Site, alive, published, reasons, settle, update
from engine_kit import Publisher
from uds_server import BASE, Controller, OnBus, Wire, Wiring, make_app

from edged.api import Phase
from edged.domain.job import Job, State
from edged.errors import EdgedError, Permanent, Reason, Transient
from edged.links import LinkPool, device_env
from edged.testing.node import life
from edged_can.session import NO_APPLICATION, UdsSession

APP = make_app("1.2.0", (1200, 600))


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return published(tmp_path_factory.mktemp("ecu-releases"))


HITS = 4
"""Each costs a try of the job or two, and after eight that come to nothing it ends."""

LATEST_S = 0.5
"""Half of what ISO-TP waits for a consecutive frame (N_Cr)."""


class Noise:
    """Does ``what`` to :data:`HITS` of the frames, by chance but always the same ones; ``count`` is how often it did."""

    def __init__(self, what: str, seed: int, odds: float = 0.06, skip: int = 40) -> None:
        self._what = what
        self._dice = random.Random(seed)
        self._odds = odds
        self._skip = skip
        self._held: dict[str, tuple[bytes, float]] = {}
        self.count = 0

    def __call__(self, way: str, frame: bytes) -> list[bytes]:
        self._skip -= 1
        held, since = self._held.pop(way, (None, 0.0))
        if held is not None:
            # one that comes after its receiver gave it up would be taken for a part of the next message: no bus is so late
            return [frame, held] if time.monotonic() - since < LATEST_S else [frame]
        if self._skip > 0 or self.count >= HITS or self._dice.random() > self._odds:
            return [frame]
        self.count += 1
        if self._what == "reordered":
            self._held[way] = frame, time.monotonic()
        return [frame, frame] if self._what == "doubled" else []


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("what", ["lost", "doubled", "reordered"])
def test_an_image_gets_through_frames_that_are_lost_doubled_or_swapped(
    tmp_path: Path, releases: Publisher, what: str, seed: int
) -> None:
    """ISO-TP notices each of them, or UDS its answer that does not come; the message, the segment or the try is repeated."""
    site = Site(tmp_path / "state", releases, table={"answer_s": 1})
    controller = site.controller()
    noise = Noise(what, seed)

    async def body() -> Job:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            return await update(node, "2.0.0", timeout_s=120)

    with alive(site, controller, noise):
        job = asyncio.run(body())
    assert noise.count == HITS
    assert job.state is State.SUCCEEDED, job.detail
    assert all(controller.held(at, len(data)) == data for at, data in IMAGES["2.0.0"])
    assert controller.runs == b"2.0.0" and controller.counts.wrong_keys == 0


Flip = tuple[Callable[[str, bytes], bool], int]
FLIPS: dict[str, Flip] = {
    "data": (lambda way, frame: way == "in" and frame[0] >> 4 == 2, 7),
    "sequence number": (lambda way, frame: way == "in" and frame[0] >> 4 == 2, 0),
    "block counter": (lambda way, frame: way == "in" and frame[0] >> 4 == 1 and frame[2] == 0x36, 3),
    "answer": (lambda way, frame: way == "out" and frame[1] == 0x76, 1),
    "flow control": (lambda way, frame: way == "out" and frame[0] == 0x30, 0),
    "key": (lambda way, frame: way == "in" and frame[1:3] == b"\x27\x02", 5),
}
"""Which frame, once blocks flow or before it; which of its bytes has its fifth bit flipped. Sixteen is no frame's business
in a sequence number's byte: it is then of another kind."""


def updated(site: Site, controller: Controller, wire: Wire | None = None) -> Job:
    """How a job for 2.0.0 ends on a node that knows the release that runs."""

    async def body() -> Job:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            return await update(node, "2.0.0")

    with alive(site, controller, wire):
        return asyncio.run(body())


@pytest.mark.parametrize("where", FLIPS)
def test_a_flipped_bit_has_its_end(tmp_path: Path, releases: Publisher, where: str) -> None:
    """In the image's bytes the check finds it, and the old image goes back; a wrong key is not sent again, and nothing was
    erased by then; anything else is noticed and repeated."""
    site = Site(tmp_path / "state", releases, table={"answer_s": 1})
    controller = site.controller()
    meant, at = FLIPS[where]
    flips = 0

    def flip(way: str, frame: bytes) -> list[bytes]:
        nonlocal flips
        begun = controller.counts.blocks >= 2 or where == "key"
        if flips or not begun or not meant(way, frame):
            return [frame]
        flips += 1
        return [frame[:at] + bytes((frame[at] ^ 0x10,)) + frame[at + 1 :]]

    job = updated(site, controller, flip)
    state, reason, runs = {
        "data": (State.REVERTED, Reason.VERIFY_FAILED, "1.0.0"),
        "key": (State.FAILED, Reason.DEVICE_ERROR, "1.0.0"),
    }.get(where, (State.SUCCEEDED, None, "2.0.0"))
    assert flips == 1
    assert (job.state, job.reason) == (state, reason), job.detail
    assert controller.runs == runs.encode()
    assert all(controller.held(at, len(data)) == data for at, data in IMAGES[runs])
    assert controller.counts.wrong_keys == (where == "key")
    assert (controller.counts.erased == 0) == (where == "key")


def test_a_flipped_bit_of_the_image_is_found_by_the_check(tmp_path: Path) -> None:
    """Below CAN's own checksum nothing would see it: ISO-TP and UDS have none."""
    bus = bus_name()
    flips = 0

    def flip(way: str, frame: bytes) -> list[bytes]:
        nonlocal flips
        if way == "in" and frame[0] >> 4 == 2 and server.controller.counts.blocks == 2 and not flips:
            flips += 1
            return [frame[:-1] + bytes((frame[-1] ^ 0x10,))]
        return [frame]

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}")) as session:
            await session.stage(await verified(APP), quiet)

    with (
        on_bus(bus, Controller(), wire=flip) as server,
        pytest.raises(Permanent, match="check routine 0xff01 answered 01, not 00") as caught,
    ):
        asyncio.run(body())
    assert flips == 1 and caught.value.reason is Reason.VERIFY_FAILED


def _lose_answer(number: int) -> tuple[Callable[[str, bytes], list[bytes]], list[int]]:
    """A wire that loses the answer to TransferData ``number``."""
    lost: list[int] = []

    def wire(way: str, frame: bytes) -> list[bytes]:
        if way == "out" and frame[1:3] == bytes((0x76, number)) and not lost:
            lost.append(number)
            return []
        return [frame]

    return wire, lost


@pytest.mark.parametrize(("refuses", "downloads", "written"), [(False, 2, 1800), (True, 3, 1800 + 1024)])
def test_a_lost_answer_costs_a_repeated_block_or_that_segment(
    refuses: bool, downloads: int, written: int
) -> None:
    bus = bus_name()
    wire, lost = _lose_answer(4)
    seen: list[int] = []

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}", answer_s=1)) as session:
            await session.stage(await verified(APP), lambda phase, done, total: seen.append(done))

    with on_bus(bus, Controller(refuses_repeats=refuses), wire=wire) as server:
        asyncio.run(body())
    controller = server.controller
    assert lost == [4]
    assert all(controller.held(at, len(data)) == data for at, data in APP)
    # block 4 of the first segment: 4 x 256 bytes are sent again where the server lost its place
    assert (controller.counts.downloads, controller.counts.written) == (downloads, written)
    assert seen[-1] == 1800


@pytest.mark.parametrize(
    ("distance", "told_bytes", "again"),
    [(0x800, 0, 2), (0x800, 0x1000, 2), (0x1000, 0, 2), (0x1000, 0x1000, 1)],
    ids=["one sector, not told", "one sector", "two sectors, not told", "two sectors"],
)
def test_a_segment_that_is_begun_anew_takes_with_it_what_shares_its_sector(
    distance: int, told_bytes: int, again: int
) -> None:
    """Its boot loader erases whole sectors: all are erased before any is written, and again before it is written anew."""
    parts = [(BASE, bytes(range(256)) * 3), (BASE + distance, b"\xa5" * 700)]
    bus = bus_name()
    lost: list[bytes] = []
    seen: list[tuple[Phase, int]] = []

    def wire(way: str, frame: bytes) -> list[bytes]:
        """Loses the answer to the second block of the second segment."""
        if way == "out" and frame[1:3] == b"\x76\x02" and controller.counts.downloads == 2 and not lost:
            lost.append(frame)
            return []
        return [frame]

    async def body() -> None:
        async with connected(to) as session:
            await session.stage(await verified(parts), lambda phase, done, total: seen.append((phase, done)))

    to = device(f"can:virtual@{bus}", sector_bytes=told_bytes, answer_s=1)
    controller = Controller(sector_bytes=0x1000, refuses_repeats=True)
    with on_bus(bus, controller, wire=wire):
        asyncio.run(body())
    assert len(lost) == 1 and controller.counts.downloads == 2 + again
    assert controller.counts.erased == 1468 + (1468 if again == 2 else 700)
    assert controller.counts.written == 768 + 512 + (1468 if again == 2 else 700)
    assert all(controller.held(at, len(data)) == data for at, data in parts)
    assert seen[-1] == (Phase.WRITE, 1468)


@pytest.mark.parametrize("service", [0x85, 0x28])
def test_a_boot_loader_has_not_all_services_of_its_application(
    tmp_path: Path, releases: Publisher, service: int
) -> None:
    """After a power dip in the middle only the boot loader is there to be flashed."""
    site = Site(tmp_path / "state", releases, table={"answer_s": 1})
    controller = site.controller(application_only=frozenset({service}))
    dips = 0

    def dip(way: str, frame: bytes) -> list[bytes]:
        nonlocal dips
        if way == "in" and not dips and controller.counts.written > 800:
            dips += 1
            controller.boot()
        return [frame]

    job = updated(site, controller, dip)
    assert dips == 1 and job.state is State.SUCCEEDED, job.detail
    assert controller.runs == b"2.0.0"


def test_a_block_that_the_flash_did_not_take_is_tried_again(tmp_path: Path, releases: Publisher) -> None:
    """generalProgrammingFailure: the next erase cures a marginal one, and the attempts bound the others."""
    site = Site(tmp_path / "state", releases)
    controller = site.controller(bad_blocks=2)

    async def body() -> tuple[Job, set[str]]:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            job = await update(node, "2.0.0")
            return job, await reasons(node, job)

    with alive(site, controller):
        job, why = asyncio.run(body())
    assert job.state is State.SUCCEEDED, job.detail
    assert why == {Reason.DEVICE_ERROR} and controller.bad_blocks == 0
    assert controller.runs == b"2.0.0" and controller.counts.erased == 3 * IMAGE_BYTES


def test_a_flash_that_takes_nothing_ends_the_job(tmp_path: Path, releases: Publisher) -> None:
    site = Site(tmp_path / "state", releases)
    controller = site.controller(bad_blocks=1000)

    job = updated(site, controller)
    assert (job.state, job.reason) == (State.FAILED, Reason.REVERT_FAILED)
    assert "generalProgrammingFailure (0x72)" in str(job.detail)


def test_a_reset_in_the_middle_is_begun_anew(tmp_path: Path, releases: Publisher) -> None:
    site = Site(tmp_path / "state", releases, table={"answer_s": 1})
    controller = site.controller(boot_s=0.3)
    booted = threading.Event()

    def wire(way: str, frame: bytes) -> list[bytes]:
        if controller.counts.blocks == 3 and not booted.is_set():
            booted.set()
            controller.boot()
        return [frame]

    job = updated(site, controller, wire)
    assert booted.is_set()
    assert job.state is State.SUCCEEDED, job.detail
    assert controller.counts.written <= 2 * IMAGE_BYTES and controller.runs == b"2.0.0"


@pytest.mark.parametrize("message", range(0, 26, 3))
def test_a_reset_at_any_request_ends_well(tmp_path: Path, releases: Publisher, message: int) -> None:
    site = Site(tmp_path / "state", releases, table={"answer_s": 0.5})
    controller = site.controller(boot_s=0.1)
    at: list[int] = []

    def wire(way: str, frame: bytes) -> list[bytes]:
        if at and len(controller.heard) >= at[0]:
            at[0] = 10**9
            controller.boot()
        return [frame]

    async def body() -> Job:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            at.append(len(controller.heard) + message)
            return await update(node, "2.0.0")

    with alive(site, controller, wire):
        job = asyncio.run(body())
    assert at == [10**9]
    assert job.state is State.SUCCEEDED, job.detail
    assert controller.runs == b"2.0.0" and controller.counts.resets <= 3
    assert controller.counts.written <= 2 * IMAGE_BYTES


def test_bus_off_is_transient_and_says_so() -> None:
    bus = bus_name()
    other = virtual(bus)

    def off(done: int, total: int) -> None:
        if done * 2 > total:
            other.send(
                can.Message(arbitration_id=0x40, data=bytes(8), is_error_frame=True, is_extended_id=False)
            )

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}")) as session:
            await session.stage(await verified(APP), on_write(off))

    with (
        on_bus(bus, Controller()) as server,
        pytest.raises(Transient, match="bus off: the controller has left the bus") as caught,
    ):
        asyncio.run(body())
    other.shutdown()
    assert caught.value.reason is Reason.LINK_LOST
    assert 0 < server.controller.counts.written < 1800


def test_a_bus_that_was_off_is_opened_anew_although_an_idle_device_held_it(
    tmp_path: Path, releases: Publisher
) -> None:
    """The link is lost for all its users: also one that only waits has to let go of it."""
    wirings = {"ecu": Wiring(), "idle": Wiring(receives=0x7E1, sends=0x7E9)}
    site = Site(tmp_path / "state", releases, devices=wirings, watch=True, table={"answer_s": 1})
    controller, idle = site.controller(), site.controller()
    other, offs = virtual(site.bus), []

    def wire(way: str, frame: bytes) -> list[bytes]:
        if controller.counts.blocks == 3 and not offs:
            offs.append(True)
            other.send(can.Message(arbitration_id=0x40, data=bytes(8), is_error_frame=True))
        return [frame]

    async def body() -> Job:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            return await update(node, "2.0.0")

    with alive(site, controller, wire), site.on(idle, device="idle"):
        job = asyncio.run(body())
    other.shutdown()
    assert offs and job.state is State.SUCCEEDED, job.detail
    assert controller.runs == b"2.0.0"


def test_an_error_frame_explains_a_silence() -> None:
    bus = bus_name()
    other = virtual(bus)

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}", answer_s=1)) as session:
            other.send(
                can.Message(arbitration_id=0x20, data=bytes(8), is_error_frame=True, is_extended_id=False)
            )
            await asyncio.sleep(0.2)
            await session.stage(await verified(APP), quiet)

    def deaf(way: str, frame: bytes) -> list[bytes]:
        return []

    with (
        on_bus(bus, Controller(), wire=deaf),
        pytest.raises(Transient, match="the bus says: no node acknowledges") as caught,
    ):
        asyncio.run(body())
    other.shutdown()
    assert caught.value.reason is Reason.NO_RESPONSE


def test_endless_response_pending_ends() -> None:
    bus = bus_name()
    controller = Controller(endless=True, pending_every_s=0.1)

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}", pending_s=1, answer_s=1)) as session:
            await session.stage(await verified(APP), quiet)

    with (
        on_bus(bus, controller),
        pytest.raises(
            Transient, match=r"asked for more time for 1 s \(requestCorrectlyReceived-ResponsePending\)"
        ),
    ):
        asyncio.run(body())
    assert controller.counts.pending >= 8


@pytest.mark.parametrize(
    ("pending_s", "p2_star_s", "says"),
    [(1, 20.0, "asked for more time for 1 s"), (30, 5.0, "no answer within 5 s after the device asked for")],
)
def test_a_device_that_falls_silent_after_it_asked_for_time_is_not_waited_for_longer(
    pending_s: int, p2_star_s: float, says: str
) -> None:
    """Its own P2* bounds the wait, and ``pending_s`` all of it: the other one would be 20 s and more."""
    bus = bus_name()
    controller = Controller(p2_star_s=p2_star_s, slow_erase_s=0.2)

    def wire(way: str, frame: bytes) -> list[bytes]:
        return [] if way == "out" and frame[1:3] == b"\x71\x01" else [frame]

    async def body() -> float:
        async with connected(device(f"can:virtual@{bus}", pending_s=pending_s)) as session:
            await session.prepare(await verified(APP))
            began = time.monotonic()
            with pytest.raises(Transient, match=says) as caught:
                await session.stage(await verified(APP), quiet)
            assert caught.value.reason is Reason.NO_RESPONSE
            return time.monotonic() - began

    with on_bus(bus, controller, wire=wire):
        assert asyncio.run(body()) < min(pending_s, p2_star_s) + 4


def test_a_slow_erase_is_waited_for_beyond_the_first_time_limit() -> None:
    bus = bus_name()
    controller = Controller(slow_erase_s=1.0)

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}")) as session:
            await session.stage(await verified(APP), quiet)

    with on_bus(bus, controller):
        asyncio.run(body())
    assert controller.counts.pending >= 4
    assert all(controller.held(at, len(data)) == data for at, data in APP)


def test_a_sleeping_server_is_not_there() -> None:
    async def body() -> None:
        async with connected(device(f"can:virtual@{bus_name()}", answer_s=0.4)) as session:
            await session.identify()

    with pytest.raises(Transient, match=r"ecu: ReadDataByIdentifier: no answer within 0\.4 s") as caught:
        asyncio.run(body())
    assert caught.value.reason is Reason.NO_RESPONSE


def test_the_session_is_kept_while_the_image_is_slow_to_come() -> None:
    """S3 is short here: without TesterPresent the server would leave the programming session."""
    bus = bus_name()
    controller = Controller(s3_s=4.5)

    async def body() -> None:
        image = await verified(APP)
        read, slow = image.read, [True]

        async def late(*arguments: object) -> bytes:
            if slow:
                slow.clear()
                await asyncio.sleep(5.2)
            return await read(*arguments)  # type: ignore[arg-type]

        image.read = late  # type: ignore[method-assign]
        async with connected(device(f"can:virtual@{bus}")) as session:
            await session.stage(image, quiet)

    with on_bus(bus, controller):
        asyncio.run(body())
    assert controller.counts.testers >= 1
    assert all(controller.held(at, len(data)) == data for at, data in APP)


def test_two_testers_at_once_never_end_in_a_wrong_image() -> None:
    """Another tester programs the same controller, by the same identifiers, and both are in the middle of it."""
    bus, controller = bus_name(), Controller()
    images = {"first": APP, "second": make_app("9.9.9", (1200, 600))}
    versions = {"first": "1.2.0", "second": "9.9.9"}
    begun = {name: asyncio.Event() for name in images}
    went_on: set[str] = set()
    good: list[str] = []
    passed: list[str] = []

    def held() -> list[str]:
        return [
            name
            for name, image in images.items()
            if all(controller.held(at, len(data)) == data for at, data in image)
        ]

    def listen(way: str, frame: bytes) -> list[bytes]:
        if way == "out" and frame[1:6] == b"\x71\x01\xff\x01\x00":
            passed.extend(held() or ["a mixture"])
        return [frame]

    async def write(name: str, session: UdsSession) -> None:
        image = await verified(images[name])
        read, reads = image.read, itertools.count()

        async def together(*arguments: Any) -> bytes:
            """The second block waits until the other's first one was taken too."""
            if next(reads):
                async with asyncio.timeout(10):
                    await asyncio.gather(*(each.wait() for each in begun.values()))
                went_on.add(name)
            return await read(*arguments)

        image.read = together  # type: ignore[method-assign]
        # thrown out of his transfer, or told what the check found; it may be both of them
        with suppress(EdgedError):
            await session.programming.write(image, on_write(lambda done, total: begun[name].set()))
            good.append(name)

    async def body() -> str | None:
        async with (
            connected(device(f"can:virtual@{bus}", answer_s=1)) as first,
            connected(device(f"can:virtual@{bus}", answer_s=1)) as second,
        ):
            await first.programming.enter()
            await second.programming.enter()
            task = asyncio.create_task(write("first", first))
            await begun["first"].wait()
            await asyncio.gather(task, write("second", second))
            await first.activate()
            return (await first.slots()).slots[0].runs

    with on_bus(bus, controller, wire=listen):
        runs = asyncio.run(body())
    assert went_on == set(images), "one ended before the other's bytes flowed"
    blocks = [request[2:] for request in controller.heard if request[0] == 0x36]
    owners = [
        name for block in blocks for name, image in images.items() if any(block in data for _, data in image)
    ]
    assert owners[:2] == ["first", "second"]
    assert "a mixture" not in passed
    assert passed or not good, "told that it is there, and the controller never said so"
    # by the same identifiers each hears the other's answers, too, and may take one for his: so it is asked what runs
    assert runs in [NO_APPLICATION, *(versions[name] for name in held())]


def test_a_cancelled_transfer_leaves_the_controller_in_its_default_session() -> None:
    bus = bus_name()
    controller = Controller()
    half = asyncio.Event()

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}")) as session:
            task = asyncio.create_task(
                session.stage(
                    await verified(APP), on_write(lambda done, total: done * 2 > total and half.set())
                )
            )
            await half.wait()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled() and controller.session == 2
        await soon(lambda: controller.session == 1)
        assert controller.dtc_on and controller.talks

    with on_bus(bus, controller):
        asyncio.run(body())


def test_a_daemon_that_is_stopped_in_the_middle_leaves_the_controller_in_its_default_session() -> None:
    bus = bus_name()
    controller = Controller()
    half = asyncio.Event()

    async def work() -> None:
        async with connected(device(f"can:virtual@{bus}")) as session:
            await session.stage(
                await verified(APP), on_write(lambda done, total: done * 2 > total and half.set())
            )

    async def body() -> None:
        task = asyncio.create_task(work())
        await half.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    with on_bus(bus, controller):
        asyncio.run(body())
    assert controller.session == 1 and controller.dtc_on and controller.talks


@pytest.mark.parametrize("code", [0x70, 0x22, 0x31])
def test_a_download_that_is_refused_costs_one_erase(code: int) -> None:
    bus = bus_name()
    controller = Controller(refuses_download=code)

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}")) as session:
            await session.stage(await verified(APP), quiet)

    with on_bus(bus, controller), pytest.raises(EdgedError, match=f"RequestDownload.*{code:#x}"):
        asyncio.run(body())
    assert controller.counts.erased == 1800


def test_a_probe_leaves_a_transfer_on_the_same_bus_alone() -> None:
    bus, pool = bus_name(), LinkPool(LINKS)
    controller = Controller()
    found: list[object] = []

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}", bus_share=0.2), pool) as session:
            task = asyncio.create_task(session.stage(await verified(APP), quiet))
            await soon(lambda: controller.counts.blocks >= 1)
            assert SPEC.probe is not None
            found.append(await SPEC.probe(f"can:virtual@{bus}", device_env("probe", pool)))
            await task

    with (
        on_bus(bus, controller),
        on_bus(bus, Controller(hardware=b"ECU-9"), Wiring(receives=0x7E1, sends=0x7E9)),
    ):
        asyncio.run(body())
    assert "uds:ECU-9" in found[0].detail["0x7e1"]  # type: ignore[attr-defined]
    assert "a session of this node" in found[0].detail["0x7e0"]  # type: ignore[attr-defined]
    assert controller.counts.downloads == 2 and controller.counts.written == 1800


def test_a_driver_that_breaks_down_is_a_lost_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees a thread end: it must not leave its users waiting."""

    def broken(self: object, timeout: float | None = None) -> None:
        raise RuntimeError("a driver's own")

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus_name()}", answer_s=20)) as session:
            monkeypatch.setattr("can.interfaces.virtual.VirtualBus._recv_internal", broken)
            await session.identify()

    with pytest.raises(Transient, match="its driver failed: RuntimeError") as caught:
        asyncio.run(body())
    assert caught.value.reason is Reason.LINK_LOST


def test_no_key_is_in_the_log_at_any_level(caplog: pytest.LogCaptureFixture) -> None:
    bus = bus_name()
    caplog.set_level(logging.DEBUG)

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}")) as session:
            await session.stage(await verified(APP), quiet)

    with on_bus(bus, Controller()) as server:
        asyncio.run(body())
    (key,) = [request[2:] for request in server.controller.heard if request[:2] == b"\x27\x02"]
    said = caplog.text.lower()
    assert key.hex() not in said and key.hex(" ") not in said


def test_an_opening_that_is_cancelled_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real, opened = can.interfaces.virtual.VirtualBus.__init__, []

    def slow(self: object, *arguments: object, **options: object) -> None:
        threading.Event().wait(0.4)
        real(self, *arguments, **options)  # type: ignore[arg-type]
        opened.append(self)

    async def body() -> None:
        env = device_env("x", LinkPool(LINKS))

        async def use() -> None:
            async with env.link(f"can:virtual@{bus_name()}"):
                pass

        task = asyncio.create_task(use())
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.wait([task])

    monkeypatch.setattr("can.interfaces.virtual.VirtualBus.__init__", slow)
    asyncio.run(body())
    (bus,) = opened
    assert not bus._open, "the bus was left open"


def test_a_message_is_not_finished_for_a_dead_reader() -> None:
    """A stage that is cancelled between the frames of a message; the next message is whole."""
    bus = bus_name()

    async def body(server: OnBus) -> None:
        async with connected(device(f"can:virtual@{bus}", bus_share=0.05)) as session:
            task = asyncio.create_task(session.stage(await verified(APP), quiet))
            await soon(lambda: server.controller.counts.blocks >= 1)
            task.cancel()
            await asyncio.wait([task])
            assert (await session.identify()).hardware_id == "uds:ECU-7"

    with on_bus(bus, Controller()) as server:
        asyncio.run(body(server))
    assert server.controller.counts.written < 1800


def test_a_noisy_stranger_is_passed_over(tmp_path: Path, releases: Publisher) -> None:
    """Answers that nobody asked for, on the controller's own identifier."""
    site = Site(tmp_path / "state", releases)
    controller = site.controller()
    stranger = virtual(site.bus)
    noise = 0

    def wire(way: str, frame: bytes) -> list[bytes]:
        nonlocal noise
        if way == "in" and frame[0] >> 4 == 1:
            for data in (b"\x03\x7f\x22\x31", b"\x02\x7e\x00", b"\x03\x6e\x01\x01", b"\x02\x76\xee"):
                stranger.send(can.Message(arbitration_id=0x7E8, data=data, is_extended_id=False))
                noise += 1
        return [frame]

    async def body() -> tuple[Job, set[str]]:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            job = await update(node, "2.0.0")
            return job, await reasons(node, job)

    with alive(site, controller, wire):
        job, why = asyncio.run(body())
    stranger.shutdown()
    assert noise > 20
    assert job.state is State.SUCCEEDED, (job, why)
    assert controller.runs == b"2.0.0"
