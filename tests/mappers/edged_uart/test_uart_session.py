"""Sessions with real boot loaders: what is written, what is not, and what a cut costs."""

from __future__ import annotations

import asyncio
import os
import pty
import shutil
import subprocess
import tty
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from engine_kit import until
from uart_kit import LINKS, MAPPERS, Segments, Watched, app, connected, device, needs_avr, segments, verified

from edged.api import Device, Health, HealthCheck, Phase, Reported
from edged.errors import EdgedError, Permanent, Reason, Transient
from edged.links import LinkPool, device_env
from edged.testing.avr import ATMEGABOOT_328P, OPTIBOOT_328P, STK500BOOT_2560, Board, SimulatedAvr
from edged_uart import stk500v1
from edged_uart.session import BootLoader

pytestmark = needs_avr
BOARDS = pytest.mark.parametrize(
    "board", [OPTIBOOT_328P, ATMEGABOOT_328P, STK500BOOT_2560], ids=lambda b: b.name
)
READY = r"edged-app demo {} ready"


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def pages(board: Board, parts: Segments) -> int:
    return sum(-(-len(data) // board.page_bytes) for _, data in parts)


async def stage(to: Device, parts: Segments) -> Watched:
    watched = Watched()
    async with connected(to) as session:
        await session.stage(await verified(parts), watched)
    return watched


async def refusal(to: Device, parts: Segments) -> EdgedError:
    with pytest.raises(EdgedError) as caught:
        await stage(to, parts)
    return caught.value


@BOARDS
@pytest.mark.skipif(shutil.which("avrdude") is None, reason="not installed: avrdude")
def test_a_whole_update_and_avrdude_agrees(board: Board, tmp_path: Path) -> None:
    image = app(board, "1.2.0", 4000)

    async def update(avr: SimulatedAvr) -> None:
        async with connected(device(avr)) as session:
            assert (await session.identify()).hardware_id == f"avr:{board.signature.hex()}"
            await session.stage(await verified(segments(image)), Watched())
            await session.activate()
            line = await session.check_health(HealthCheck("line", READY.format(r"1\.2\.0")))
            assert line == Health(True, "edged-app demo 1.2.0 ready")
            answer = await session.check_health(HealthCheck("property", r"version=1\.2\.0$", "version?"))
            assert answer == Health(True, "version=1.2.0")

    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0")) as avr:
        run(update(avr))
        assert avr.stats().pages_written == avr.stats().pages_erased == pages(board, segments(image))
        command = [
            *("avrdude", "-p", board.part, "-c", board.programmer, "-P", str(avr.port)),
            *("-b", str(board.baud), "-D", "-U", f"flash:v:{image}:i"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_only_pages_that_differ_are_written(tmp_path: Path) -> None:
    board = OPTIBOOT_328P
    old = app(board, "1.0.0")
    address, data = segments(old)[0]
    new = bytearray(data)
    new[1000] ^= 0xFF
    with SimulatedAvr(tmp_path, board, application=old) as avr:
        run(stage_and_check(avr, [(address, bytes(new))]))
        assert avr.stats().pages_written == 1


async def stage_and_check(avr: SimulatedAvr, parts: Segments) -> None:
    watched = await stage(device(avr), parts)
    assert watched.bytes_of(Phase.WRITE) == watched.bytes_of(Phase.VERIFY) == avr.board.page_bytes
    for address, data in parts:
        assert avr.flash()[address : address + len(data)] == data


def test_segments_with_gaps_and_odd_ends_leave_the_rest_alone(tmp_path: Path) -> None:
    board = OPTIBOOT_328P
    parts = [(0x10, b"a" * 77), (0x100 + 5, b"b" * 11), (0x100 + 60, b"c" * 300)]
    with SimulatedAvr(tmp_path, board) as avr:
        run(stage_rest(avr, parts))
        flash = avr.flash()
        for address, data in parts:
            assert flash[address : address + len(data)] == data
        assert avr.stats().pages_written == 4
        assert flash[0x80:0x100] == b"\xff" * 0x80


async def stage_rest(avr: SimulatedAvr, parts: Segments) -> None:
    await stage(device(avr), parts)


@BOARDS
def test_another_part_is_refused_before_the_first_write(board: Board, tmp_path: Path) -> None:
    async def work(avr: SimulatedAvr) -> None:
        to = device(avr)
        wrong = Device(to.id, to.model, to.mapper, to.address, ("avr:1e9406",), config=to.config)
        error = await refusal(wrong, segments(app(board, "1.2.0")))
        assert isinstance(error, Permanent) and error.reason is Reason.HARDWARE_MISMATCH
        assert "1e9406" in error.detail and board.signature.hex() in error.detail

    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0"), tap=True) as avr:
        run(work(avr))
        assert (avr.stats().pages_erased, avr.stats().pages_written) == (0, 0)
        assert len(avr.tapped()) < board.page_bytes


@pytest.mark.parametrize("board", [OPTIBOOT_328P, STK500BOOT_2560], ids=lambda b: b.name)
@pytest.mark.parametrize("bounded", [True, False])
def test_the_boot_loader_is_never_written_over(board: Board, bounded: bool, tmp_path: Path) -> None:
    async def work(avr: SimulatedAvr) -> None:
        to = device(avr)
        limit = board.boot_at if bounded else None
        to = Device(to.id, to.model, to.mapper, to.address, flash_size_bytes=limit, config=to.config)
        error = await refusal(to, [(board.boot_at - 10, b"x" * 11)])
        assert isinstance(error, Permanent) and error.reason is Reason.IMAGE_TOO_LARGE

    with SimulatedAvr(tmp_path, board) as avr:
        run(work(avr))
        assert avr.stats().pages_erased == 0


@BOARDS
def test_what_was_read_out_with_the_boot_loader_goes_back_without_it(board: Board, tmp_path: Path) -> None:
    """``flash_size`` reaches into the boot loader: it would erase itself while it runs, and the board were lost."""

    async def work(avr: SimulatedAvr) -> None:
        flash = avr.flash()
        assert flash[board.boot_at :].strip(b"\xff"), "the boot loader is in it"
        whole = bytes(range(1, 251)) * 12 + flash[3000:]
        to = replace(device(avr), flash_size_bytes=board.flash_bytes)
        compared = [done for phase, done, _ in (await stage(to, [(0, whole)])).seen if phase is Phase.COMPARE]
        assert avr.flash() == whole
        assert avr.stats().pages_written <= -(-3000 // board.page_bytes)
        # as long as pages are read, it is told: silence is taken for a stall
        assert compared == sorted(compared)
        assert len(compared) >= (board.flash_bytes - 3000) // board.page_bytes
        async with connected(to) as session:
            assert (await session.identify()).hardware_id == f"avr:{board.signature.hex()}"

    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0")) as avr:
        run(work(avr))


def test_a_bit_that_the_line_flips_costs_no_page_of_the_boot_loader(tmp_path: Path) -> None:
    board = OPTIBOOT_328P

    async def work(avr: SimulatedAvr) -> None:
        flash = avr.flash()
        to = replace(device(avr), flash_size_bytes=board.flash_bytes)
        async with connected(to) as session:
            session._loader = misread = MisreadsOnce(session._loader, board.boot_at)
            await session.stage(await verified([(0, bytes(range(1, 251)) * 12 + flash[3000:])]), Watched())
        assert misread.times == 1
        assert avr.stats().pages_written <= -(-3000 // board.page_bytes)
        assert avr.flash()[board.boot_at :] == flash[board.boot_at :]

    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0")) as avr:
        run(work(avr))


class MisreadsOnce:
    """A real boot loader on a line that flips a bit of the first page that is read from ``address`` on."""

    def __init__(self, loader: BootLoader, address: int) -> None:
        self._loader, self._address, self.times = loader, address, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    async def read(self, address: int, length: int) -> bytes:
        held = await self._loader.read(address, length)
        if address < self._address or self.times:
            return held
        self.times += 1
        return bytes((held[0] ^ 1,)) + held[1:]


@BOARDS
def test_power_cuts_anywhere_cost_at_most_what_they_must(board: Board, tmp_path: Path) -> None:
    """A boot loader that erases where it writes loses a page per cut; one that counts from 0 begins again."""
    parts = segments(app(board, "1.2.0"))
    size = pages(board, parts)
    cuts = [1, size // 3, size // 2, size - 1]

    async def cut_at(avr: SimulatedAvr, count: int) -> None:
        def progress(phase: Phase, done_bytes: int, total_bytes: int) -> None:
            if phase is Phase.WRITE and avr.stats().pages_written >= goal:
                avr.power_cut()

        goal = avr.stats().pages_written + count
        with pytest.raises(Transient):
            async with connected(device(avr)) as session:
                await session.stage(await verified(parts), progress)
        avr.restart()

    async def work(avr: SimulatedAvr) -> None:
        done = 0
        for cut in cuts:
            await cut_at(avr, cut if board is STK500BOOT_2560 else max(1, cut - done))
            done = cut
        await stage(device(avr), parts)

    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0")) as avr:
        run(work(avr))
        for address, data in parts:
            assert avr.flash()[address : address + len(data)] == data
        written = avr.stats().pages_written
        assert written <= (sum(cuts) + size if board is STK500BOOT_2560 else size + len(cuts))


def test_a_counting_boot_loader_is_started_anew_before_each_write(tmp_path: Path) -> None:
    """Two images in one session, without a pause: the second would be written into pages that were not erased."""
    board = STK500BOOT_2560
    first, second = segments(app(board, "1.2.0")), segments(app(board, "1.3.0"))

    async def work(avr: SimulatedAvr) -> None:
        async with connected(device(avr)) as session:
            for parts in (first, second):
                await session.stage(await verified(parts), Watched())
                for address, data in parts:
                    assert avr.flash()[address : address + len(data)] == data

    with SimulatedAvr(tmp_path, board) as avr:
        run(work(avr))
        assert avr.stats().pages_written == pages(board, first) + pages(board, second)


def test_unplugging_in_the_middle_says_so(tmp_path: Path) -> None:
    parts = segments(app(OPTIBOOT_328P, "1.2.0"))

    async def work(avr: SimulatedAvr) -> None:
        watched = Watched()
        with pytest.raises(Transient) as caught:
            async with connected(device(avr)) as session:
                staging = asyncio.ensure_future(session.stage(await verified(parts), watched))
                await watched.half_written()
                avr.unplug()
                await staging
        assert caught.value.reason is Reason.LINK_LOST
        with pytest.raises(Transient) as caught:
            await stage(device(avr), parts)
        assert caught.value.reason is Reason.DEVICE_ABSENT
        avr.plug()
        watched = await stage(device(avr), parts)
        assert watched.bytes_of(Phase.WRITE) < len(parts[0][1]) * 3 // 4

    with SimulatedAvr(tmp_path, application=app(OPTIBOOT_328P, "1.0.0")) as avr:
        run(work(avr))


def test_after_a_cancelled_exchange_the_same_session_finds_its_step_again(tmp_path: Path) -> None:
    parts = segments(app(OPTIBOOT_328P, "1.2.0", 12_000))

    async def work(avr: SimulatedAvr) -> None:
        async with connected(device(avr)) as session:
            for _ in range(3):
                watched = Watched()
                staging = asyncio.ensure_future(session.stage(await verified(parts), watched))
                await asyncio.sleep(0.9)
                staging.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await staging
                assert (await session.identify()).hardware_id == "avr:1e950f"

    with SimulatedAvr(tmp_path) as avr:
        run(work(avr))


class Disturbed(Watched):
    """Changes a byte of the flash, behind the boot loader's back, when the writing has ended: ``times`` times."""

    def __init__(self, avr: SimulatedAvr, at: int, times: int) -> None:
        super().__init__()
        self._avr, self._at, self._times = avr, at, times

    def __call__(self, phase: Phase, done_bytes: int, total_bytes: int) -> None:
        super().__call__(phase, done_bytes, total_bytes)
        if phase is Phase.WRITE and done_bytes == total_bytes and self._times:
            self._times -= 1
            with self._avr.flash_file.open("r+b") as flash:
                flash.seek(self._at)
                flash.write(b"\x00")


def test_a_page_that_does_not_hold_is_written_again_once_and_then_given_up(tmp_path: Path) -> None:
    parts = segments(app(OPTIBOOT_328P, "1.2.0", 500))
    at = next(index for index, byte in enumerate(parts[0][1]) if byte != 0)

    async def work(avr: SimulatedAvr) -> None:
        async with connected(device(avr)) as session:
            await session.stage(await verified(parts), Disturbed(avr, at, 1))
            assert avr.stats().pages_written == pages(avr.board, parts) + 1
            with avr.flash_file.open("r+b") as flash:
                flash.write(b"\x00" * 128)
            with pytest.raises(Permanent) as caught:
                await session.stage(await verified(parts), Disturbed(avr, at, 9))
            assert caught.value.reason is Reason.VERIFY_FAILED
            assert "0x0" in caught.value.detail

    with SimulatedAvr(tmp_path) as avr:
        run(work(avr))


@pytest.mark.parametrize("board", [OPTIBOOT_328P, STK500BOOT_2560], ids=lambda b: b.name)
def test_flash_is_read_out_as_it_is(board: Board, tmp_path: Path) -> None:
    async def work(avr: SimulatedAvr) -> None:
        watched = Watched()
        async with connected(device(avr)) as session:
            assert await session.read_flash(0, 3001, watched) == avr.flash()[:3001]
            assert watched.bytes_of(Phase.READ_OUT) == 3001
            end = board.boot_at
            assert await session.read_flash(end - 300, 300, watched) == avr.flash()[end - 300 : end]

    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0")) as avr:
        run(work(avr))


def test_an_application_that_says_nothing_is_not_healthy(tmp_path: Path) -> None:
    async def work(avr: SimulatedAvr) -> None:
        async with connected(device(avr)) as session:
            await session.identify()
            await session.activate()
            for kind in ("line", "property"):
                check = HealthCheck(kind, "ready", "version?", timeout_s=1.0)
                assert not (await session.check_health(check)).healthy
            with pytest.raises(Permanent) as caught:
                await session.check_health(HealthCheck("smell", "x"))
            assert caught.value.reason is Reason.UNSUPPORTED

    with SimulatedAvr(tmp_path, application=app(OPTIBOOT_328P, "6.6.6", healthy=False)) as avr:
        run(work(avr))


@BOARDS
def test_health_is_found_in_a_new_session_too(board: Board, tmp_path: Path) -> None:
    """The daemon was restarted between activating and verifying: opening the port has started the board anew."""

    async def work(avr: SimulatedAvr) -> None:
        line = HealthCheck("line", READY.format(r"1\.0\.0"))
        answer = HealthCheck("property", r"version=1\.0\.0", "version?")
        async with connected(device(avr)) as session:
            assert (await session.check_health(line)).healthy
        async with connected(device(avr)) as session:
            assert (await session.check_health(answer)).healthy
            assert (await session.check_health(line)).healthy

    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0")) as avr:
        run(work(avr))


def test_watching_a_board_sends_it_nothing(tmp_path: Path) -> None:
    async def work(avr: SimulatedAvr) -> None:
        async with connected(device(avr)) as session:
            seen = []
            async for reported in session.reports():
                seen.append(reported)
                if len(seen) == 2:
                    break
            assert seen == [Reported("uptime", 1), Reported("uptime", 2)]

    with SimulatedAvr(tmp_path, application=app(OPTIBOOT_328P, "1.0.0"), tap=True) as avr:
        run(work(avr))
        assert avr.tapped() == b""


def test_reports_end_when_the_board_is_gone(tmp_path: Path) -> None:
    async def work(avr: SimulatedAvr) -> None:
        async with connected(device(avr)) as session:
            with pytest.raises(Transient) as caught:
                async for _ in session.reports():
                    avr.unplug()
            assert caught.value.reason is Reason.LINK_LOST

    with SimulatedAvr(tmp_path, application=app(OPTIBOOT_328P, "1.0.0")) as avr:
        run(work(avr))


def test_a_session_that_ends_leaves_the_application_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: by itself the boot loader would start it a second later."""
    monkeypatch.setattr(stk500v1.Stk500v1, "window_s", 20.0)

    async def work(avr: SimulatedAvr) -> None:
        async with connected(device(avr)) as session:
            await session.identify()
        await until(lambda: avr.stats().watchdog_resets)
        assert avr.stats().watchdog_resets == 1
        assert avr.tapped().endswith(stk500v1.LEAVE_PROGMODE + stk500v1.EOP)

    with SimulatedAvr(tmp_path, application=app(OPTIBOOT_328P, "1.0.0"), tap=True) as avr:
        run(work(avr))


@BOARDS
def test_probing_says_who_is_there(board: Board, tmp_path: Path) -> None:
    async def work(avr: SimulatedAvr) -> None:
        probe = MAPPERS[device(avr).mapper].probe
        assert probe is not None
        identity = await probe(f"serial:{avr.port}", device_env("probe", LinkPool(LINKS)))
        assert identity is not None and identity.hardware_id == f"avr:{board.signature.hex()}"

    with SimulatedAvr(tmp_path, board) as avr:
        run(work(avr))


@pytest.mark.parametrize(
    ("board", "mapper"), [(OPTIBOOT_328P, "uart-stk500v2"), (STK500BOOT_2560, "uart-stk500")]
)
def test_the_other_protocol_gets_no_answer_and_harms_nothing(
    board: Board, mapper: str, tmp_path: Path
) -> None:
    async def work(avr: SimulatedAvr) -> None:
        probe = MAPPERS[mapper].probe
        assert probe is not None
        assert await probe(f"serial:{avr.port}", device_env("probe", LinkPool(LINKS))) is None

    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0")) as avr:
        before = avr.flash()
        run(work(avr))
        assert avr.flash() == before
        assert avr.stats().pages_erased == 0


class Bridge:
    """A line between a client and a board, on which the signature comes in garbled ``times`` times."""

    def __init__(self, avr: SimulatedAvr, times: int) -> None:
        self._near, self._client = pty.openpty()
        tty.setraw(self._client)
        self._far = os.open(avr.port, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self._far)
        self._signature = bytes(avr.board.signature)
        self._left = times
        self._said = b""
        self.path = os.ttyname(self._client)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._near, lambda: os.write(self._far, os.read(self._near, 4096)))
        loop.add_reader(self._far, lambda: os.write(self._near, self._garbled(os.read(self._far, 4096))))
        return self

    async def __aexit__(self, *_: object) -> None:
        for fd in (self._near, self._far):
            asyncio.get_running_loop().remove_reader(fd)
        for fd in (self._near, self._far, self._client):
            os.close(fd)

    def _garbled(self, data: bytes) -> bytes:
        out = bytearray()
        for byte in data:
            self._said = (self._said + bytes([byte]))[-len(self._signature) :]
            hit = self._left > 0 and self._said == self._signature
            self._left -= hit
            out.append(0 if hit else byte)
        return bytes(out)


@pytest.mark.parametrize("times", [1, 9])
def test_a_signature_that_came_in_garbled_is_asked_for_once_more(tmp_path: Path, times: int) -> None:
    board = OPTIBOOT_328P
    image = segments(app(board, "1.2.0"))

    async def work(avr: SimulatedAvr) -> None:
        async with Bridge(avr, times) as bridge:
            to = replace(device(avr), address=f"serial:{bridge.path}")
            if times == 1:
                await stage(to, image)
            else:
                error = await refusal(to, image)
                assert isinstance(error, Permanent) and error.reason is Reason.HARDWARE_MISMATCH

    with SimulatedAvr(tmp_path, board, application=app(board, "1.0.0")) as avr:
        run(work(avr))
        assert (avr.stats().pages_written > 0) == (times == 1)
