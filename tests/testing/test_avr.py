"""The simulated ATmega against programs that others wrote: avrdude, and the kernel's terminal layer."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import intelhex
import pytest
from cli_kit import eventually

from edged.testing.avr import (
    ATMEGABOOT_328P,
    OPTIBOOT_328P,
    STK500BOOT_2560,
    Board,
    SimulatedAvr,
    SimulatorError,
    build_app,
    missing_packages,
)

# the simulator uses no library, so that other versions of them change nothing
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_packages()), reason=f"not installed: {missing_packages()}"),
]
needs_avrdude = pytest.mark.skipif(shutil.which("avrdude") is None, reason="not installed: avrdude")

GET_SYNC = b"\x30\x20"
IN_SYNC_OK = b"\x14\x10"


def avrdude(avr: SimulatedAvr, memory: str) -> None:
    board = avr.board
    command = [
        *("avrdude", "-p", board.part, "-c", board.programmer, "-P", str(avr.port)),
        *("-b", str(board.baud), "-D", "-U", memory),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def raw(hex_file: Path) -> bytes:
    return bytes(intelhex.IntelHex(str(hex_file)).tobinarray(start=0))


@contextmanager
def opened(avr: SimulatedAvr) -> Iterator[int]:
    """A client's descriptor of the port; opening it resets the board."""
    line = os.open(avr.port, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        yield line
    finally:
        os.close(line)


def resets(avr: SimulatedAvr, expected: int, kind: str = "external_resets") -> int:
    """Those of the ``kind`` that the simulator has seen, as soon as there are as many as ``expected``. The answer that brings a
    client in step may be one to the client before it, and come sooner than its own reset."""
    return int(eventually(lambda: seen if (seen := getattr(avr.stats(), kind)) >= expected else 0))


def read_until(line: int, wanted: bytes, timeout_s: float = 20.0) -> bytes:
    got, end = b"", time.monotonic() + timeout_s
    while wanted not in got:
        ready, _, _ = select.select([line], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"{wanted!r} did not come, only {got!r}"
        got += os.read(line, 4096)
    return got


def sync(line: int, timeout_s: float = 20.0) -> None:
    """As a programmer does: what is sent while a part is being reset is lost, and sent again."""
    got, end = b"", time.monotonic() + timeout_s
    while IN_SYNC_OK not in got:
        assert time.monotonic() < end, f"the boot loader is not in step: {got!r}"
        os.write(line, GET_SYNC)
        if select.select([line], [], [], 0.12)[0]:
            got += os.read(line, 4096)


@needs_avrdude
@pytest.mark.parametrize("board", [OPTIBOOT_328P, ATMEGABOOT_328P, STK500BOOT_2560], ids=lambda b: b.name)
def test_avrdude_writes_what_it_reads_back_and_the_application_boots(tmp_path: Path, board: Board) -> None:
    app = build_app(version="1.2.0", filler_bytes=10_000, mcu=board.mcu, baud=board.baud)
    image = raw(app)
    with SimulatedAvr(tmp_path, board) as avr:
        avrdude(avr, f"flash:w:{app}:i")
        assert avr.flash()[: len(image)] == image
        pages = -(-len(image) // board.page_bytes)
        assert (avr.stats().pages_written, avr.stats().pages_erased) == (pages, pages)
        if board.part == "m328p":
            read_back = tmp_path / "read.bin"
            avrdude(avr, f"flash:r:{read_back}:r")
            assert read_back.read_bytes()[: len(image)] == image
        with opened(avr) as line:
            assert b"edged-app demo 1.2.0 ready\r\n" in read_until(line, b"ready\r\n")
            read_until(line, b"uptime=1\r\n")
            os.write(line, b"version?\n")
            read_until(line, b"version=1.2.0\r\n")


@needs_avrdude
def test_the_line_is_as_fast_as_a_real_one_and_no_faster(tmp_path: Path) -> None:
    app = build_app(version="2.0.0", filler_bytes=20_000)
    with SimulatedAvr(tmp_path) as avr:
        start = time.monotonic()
        avrdude(avr, f"flash:w:{app}:i")
        taken_s = time.monotonic() - start
        assert taken_s > avr.stats().bytes_in * 10 / 115200


def test_opening_resets_into_the_boot_loader_and_a_power_blip_into_the_application(tmp_path: Path) -> None:
    with SimulatedAvr(tmp_path, application=build_app(version="1.2.0")) as avr, opened(avr) as line:
        os.write(line, GET_SYNC)
        assert read_until(line, IN_SYNC_OK) == IN_SYNC_OK
        assert avr.stats().external_resets == 1
        # it stands still meanwhile: in its boot loader it stays for a second only
        avr.stand_still()
        before = avr.stats().watchdog_resets
        avr.power_blip()
        avr.go_on()
        assert resets(avr, 2, "power_resets") == 2
        read_until(line, b"ready\r\n")
        assert avr.stats().watchdog_resets == before, "it came out of the boot loader"


def test_its_reset_opens_the_boot_loader_while_the_line_stays(tmp_path: Path) -> None:
    with SimulatedAvr(tmp_path, application=build_app(version="1.2.0")) as avr, opened(avr) as line:
        avr.power_blip()
        read_until(line, b"ready\r\n")
        avr.pull_reset()
        assert resets(avr, 2) == 2
        sync(line)
        assert avr.stats().external_resets == 2 and avr.stats().opens == 1


def test_each_open_is_one_reset_also_when_the_next_client_is_quick(tmp_path: Path) -> None:
    with SimulatedAvr(tmp_path) as avr:
        for count in range(1, 6):
            with opened(avr) as line:
                sync(line)
                assert resets(avr, count) == count
        with opened(avr), opened(avr) as line:
            sync(line)
            assert resets(avr, 6) == 6


def test_what_a_client_sent_last_is_not_for_the_part_after_the_next_one_s_reset(tmp_path: Path) -> None:
    """Also where the next client is quicker than the simulator, which did not see the line closed in between. The begin of a
    page would be the boot loader's first command, and it would wait for the rest of it in vain."""
    assert any(_overtaken(tmp_path / str(number)) for number in range(5)), "it was never on the line in time"


def _overtaken(folder: Path) -> bool:
    """Whether the simulator got what the first client had sent after the next one had opened the line."""
    folder.mkdir()
    half = b"\x64\x00\x80F" + b"\x55" * 8
    with SimulatedAvr(folder, application=build_app(version="1.2.0"), tap=True) as avr:
        with opened(avr) as line:
            sync(line)
            avr.stand_still()
            os.write(line, half)
        with opened(avr) as line:
            avr.go_on()
            sync(line)
            assert resets(avr, 2) == 2
        return half in avr.tapped()


def test_flash_and_counters_outlive_a_power_cut(tmp_path: Path) -> None:
    with SimulatedAvr(tmp_path, tap=True) as avr:
        with opened(avr) as line:
            page = b"\x55" * 128
            os.write(line, GET_SYNC)
            read_until(line, IN_SYNC_OK)
            os.write(line, b"\x55\x00\x00\x20" + b"\x64\x00\x80F" + page + b"\x20")
            read_until(line, IN_SYNC_OK * 2)
            avr.power_cut()
            with pytest.raises(OSError, match="Input/output error"):
                os.write(line, b"x")
        assert not avr.port.is_symlink()
        assert avr.flash()[:129] == page + b"\xff"
        before = avr.stats()
        assert (before.pages_erased, before.pages_written) == (1, 1)
        avr.restart()
        assert avr.flash()[:129] == page + b"\xff"
        assert avr.stats().pages_written == 1
        assert avr.stats().power_resets == before.power_resets + 1
        assert avr.tapped().startswith(GET_SYNC) and page in avr.tapped()


def test_a_page_write_without_an_erase_only_clears_bits(tmp_path: Path) -> None:
    """stk500boot erases pages counted from 0, wherever it writes: page 1 is written over what it held."""
    board = STK500BOOT_2560
    with SimulatedAvr(tmp_path, board) as avr:
        avr.power_cut()
        avr.flash_file.write_bytes(b"\x0f" * 1024 + avr.flash()[1024:])
        avr.restart()
        with opened(avr) as line:
            load = bytes([0x06, 0, 0, 0, 128])
            write = bytes([0x13, 1, 0, 0xC1, 10, 0x40, 0x4C, 0x20, 0, 0]) + b"\x33" * 256
            for number, body in enumerate([b"\x01", load, write], 1):
                message = bytes([0x1B, number, *len(body).to_bytes(2, "big"), 0x0E]) + body
                check = 0
                for byte in message:
                    check ^= byte
                os.write(line, message + bytes([check]))
                read_until(line, bytes([0x1B, number]))
        assert avr.flash()[:256] == b"\xff" * 256
        assert avr.flash()[256:512] == b"\x03" * 256


def test_unplugging_ends_the_client_and_not_the_part(tmp_path: Path) -> None:
    with SimulatedAvr(tmp_path, application=build_app(version="1.2.0")) as avr:
        with opened(avr) as line:
            avr.unplug()
            with pytest.raises(OSError) as caught:
                os.write(line, b"x")
            assert caught.value.errno == errno.EIO
            assert not avr.port.exists()
        avr.plug()
        with opened(avr) as line:
            read_until(line, b"ready\r\n")
        assert avr.stats().power_resets == 1


def test_a_client_that_sends_nothing_leaves_no_byte_on_the_wire(tmp_path: Path) -> None:
    with SimulatedAvr(tmp_path, application=build_app(version="1.2.0"), tap=True) as avr:
        with opened(avr) as line:
            read_until(line, b"ready\r\n")
        assert avr.tapped() == b""
        assert avr.stats().bytes_in == 0


def test_an_unhealthy_application_never_says_a_line(tmp_path: Path) -> None:
    application = build_app(version="6.6.6", healthy=False)
    with SimulatedAvr(tmp_path, application=application) as avr, opened(avr) as line:
        assert read_until(line, b"\x1f\x7f\x1f", 20) == b"\x1f\x7f\x1f"
        os.write(line, b"version?\n")
        ready, _, _ = select.select([line], [], [], 1.2)
        assert not ready


def test_idle_boards_are_cheap(tmp_path: Path) -> None:
    with SimulatedAvr(tmp_path, application=build_app(version="1.2.0")) as avr, opened(avr) as line:
        read_until(line, b"uptime=1\r\n")
        before, begun = cpu_s(avr.pid), time.monotonic()
        time.sleep(1.0)
        spent = cpu_s(avr.pid) - before
        assert spent < 0.10 * (time.monotonic() - begun)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_board_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from edged.testing.avr import SimulatedAvr\n"
        "avr = SimulatedAvr(pathlib.Path(sys.argv[1])); avr.start()\n"
        "print(avr.pid, flush=True); time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        try:
            assert parent.stdout is not None
            board = int(parent.stdout.readline())
            assert alive(board)
        finally:
            parent.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while alive(board):
        assert time.monotonic() < end, "the board outlives its parent"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_it_serves_async_callers(tmp_path: Path) -> None:
    async def use() -> int:
        async with SimulatedAvr(tmp_path) as avr:
            return avr.stats().power_resets

    assert asyncio.run(use()) == 1


def test_builders_may_work_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: build_app(version="1.0.0", filler_bytes=100), range(4)))
    assert len(paths) == 1
    assert [path.name for path in (tmp_path / "edged" / "avr").iterdir()] == [paths.pop().name]


def test_versions_differ_in_every_page_of_the_filler() -> None:
    one, two = (raw(build_app(version=version, filler_bytes=4096)) for version in ("1.0.0", "1.0.1"))
    start = len(one) - 4096 - 512
    assert all(one[at : at + 128] != two[at : at + 128] for at in range(512, start, 128))


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(SimulatorError, match=r"overflow|will not fit|exceeds"):
        build_app(version="1.0.0", filler_bytes=40_000)


def test_a_board_that_does_not_run_says_so(tmp_path: Path) -> None:
    avr = SimulatedAvr(tmp_path)
    with pytest.raises(SimulatorError, match="does not run"):
        avr.power_cut()
    with pytest.raises(SimulatorError, match="without a tap"):
        avr.tapped()
    assert avr.stats().power_resets == 0
