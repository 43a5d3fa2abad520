"""Sessions with a second implementation of the server: what is on the wire, what goes wrong on it, and properties."""

from __future__ import annotations

import asyncio
import subprocess
import termios
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest
from cli_kit import Place
from engine_kit import until
from peer_kit import peer_python
from smp_kit import FACTORY, SECOND, SPEC, BadWire, connected, device, identifies_as, opaque
from smp_server import HANGS, Counts, SmpServer, body_of, make_image
from uart_kit import LINKS, Watched

from edged.api import Desired, Health, HealthCheck, Identity, Phase, Reported
from edged.control import PROBE_TIMEOUT_S
from edged.errors import Permanent, Reason, Refused, Transient
from edged.links import LinkPool, device_env
from edged_firmware.chunks import ChunkIndex
from edged_firmware.image import Image, MemorySource, pack
from edged_uart import smp, smp_probe
from edged_uart.smp_session import SmpSession

Work = Callable[[SmpSession], Coroutine[Any, Any, None]]
FRAMINGS = pytest.mark.parametrize("framing", ["console", "raw", "cobs"])


def on(server: SmpServer, work: Work, **config: object) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), connected(device(server.port, **config)) as session:
            await session.identify()
            await work(session)

    asyncio.run(run())


async def staged(session: SmpSession, image: bytes) -> Watched:
    watched = Watched()
    await session.stage(await opaque(image), watched)
    return watched


def uploads(server: SmpServer) -> list[dict[str, Any]]:
    return [body for _, group, number, body in server.log if (group, number) == (1, 1)]


# -- what is sent


def test_the_first_piece_has_the_header_and_the_sha_and_each_fills_the_buffer(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)

    with SmpServer(tmp_path, FACTORY, buffer_bytes=384) as server:
        on(server, work)
        first, *following = uploads(server)
        assert first.keys() == {"off", "data", "len", "sha"} and len(first["data"]) >= 32
        assert (first["off"], first["len"], len(first["sha"])) == (0, len(SECOND), 32)
        assert all(piece.keys() == {"off", "data"} for piece in following)
        assert b"".join(piece["data"] for piece in [first, *following]) == SECOND
        # 384 without length and CRC, header, CBOR's names and numbers, down to a word
        assert {len(piece["data"]) for piece in following[:-1]} <= {352, 356}
        assert server.counts.dropped == 0


@pytest.mark.parametrize("buffer_bytes", [100, 128, 2048])
def test_small_and_large_buffers(tmp_path: Path, buffer_bytes: int) -> None:
    """Where header and hash do not both fit into the first piece, the hash is left out."""

    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)

    with SmpServer(tmp_path, FACTORY, buffer_bytes=buffer_bytes) as server:
        on(server, work)
        first = uploads(server)[0]
        assert len(first["data"]) >= 32 and ("sha" in first) == (buffer_bytes > 100)
        assert bytes(server.slots[1][: len(SECOND)]) == SECOND and server.counts.dropped == 0


def test_a_buffer_without_room_for_a_header_is_refused(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        with pytest.raises(Permanent) as caught:
            await staged(session, SECOND)
        assert (
            caught.value.reason is Reason.UNSUPPORTED and "no room for an image header" in caught.value.detail
        )
        assert not uploads(server)

    with SmpServer(tmp_path, FACTORY, buffer_bytes=56) as server:
        on(server, work)


@pytest.mark.parametrize(
    ("count", "window", "most"), [(4, 0, 3), (1, 0, 1), (4, 1, 1), (2, 8, 8), (1000, 0, 32)]
)
def test_so_many_are_on_their_way(tmp_path: Path, count: int, window: int, most: int) -> None:
    """What the device has room for, less one for the answer; or what the table says."""
    waiting: list[int] = []

    async def work(session: SmpSession) -> None:
        server.to_device, server.from_device = to_device, from_device
        await staged(session, SECOND)

    # a line that takes its time: a server that answers at once would have had each before the next one comes
    with SmpServer(tmp_path, FACTORY, buffer_count=count, line_bytes_per_s=100_000) as server:
        sent, answered = 0, 0

        def to_device(data: bytes) -> bytes:
            nonlocal sent
            sent += data.count(b"\x06\x09")
            waiting.append(sent - answered)
            return data

        def from_device(data: bytes) -> bytes:
            nonlocal answered
            answered += data.count(b"\x06\x09")
            return data

        on(server, work, window=window, answer_s=10)
    assert max(waiting) <= most
    assert most == 1 or max(waiting) > 1


def test_a_window_that_shrank_grows_again(tmp_path: Path) -> None:
    """After a loss one request at a time, later as many as before."""
    image = make_image((2, 0, 0), body_of(24_000, 2))
    waiting: list[tuple[int, int]] = []
    lost: list[int] = []

    async def work(session: SmpSession) -> None:
        async def answer(expected: Mapping[int, smp.Command], timeout_s: float) -> smp.Message | None:
            waiting.append((server.counts.stored, len(expected)))
            return await normal(expected, timeout_s)

        normal = session._client.answer
        session._client.answer = answer  # type: ignore[method-assign]
        server.on_request = loses_one
        await staged(session, image)

    with SmpServer(tmp_path, FACTORY) as server:

        def loses_one(group: int, number: int, body: dict[str, Any]) -> bool:
            if (group, number) == (1, 1) and body["off"] > 3000 and not lost:
                lost.append(body["off"])
                return False
            return True

        on(server, work, answer_s=10)
        assert bytes(server.slots[1][: len(image)]) == image
    assert max(count for stored, count in waiting if stored < lost[0]) == 3
    assert max(count for stored, count in waiting if lost[0] + 1000 < stored < lost[0] + 4000) == 1
    assert max(count for stored, count in waiting if stored > 16_000) == 3


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_piece_lost_in_the_middle_is_repeated_from_its_offset_where_the_device_stays_silent(
    tmp_path: Path, window: int, repeats: int
) -> None:
    """It answers nothing that lies beyond what it has, and that piece is lost several times."""
    asked: list[int] = []
    lost: list[int] = []

    async def work(session: SmpSession) -> None:
        def silent_beyond(group: int, number: int, body: dict[str, Any]) -> bool:
            if (group, number) != (1, 1):
                return True
            asked.append(body["off"])
            has = server._ram.offset
            if has > 3000 and body["off"] == has and len(lost) < repeats:
                lost.append(has)
                return False
            return bool(body["off"] <= has)

        server.on_request = silent_beyond
        await staged(session, SECOND)
        assert bytes(server.slots[1][: len(SECOND)]) == SECOND and server.counts.stored == len(SECOND)

    with SmpServer(tmp_path, FACTORY, buffer_count=window + 1) as server:
        on(server, work, answer_s=2)
    at = lost[0]
    assert lost == [at] * repeats and asked.count(at) == repeats + 1, (
        "it was not repeated from where it was lost"
    )
    # each time, what the window had beyond it is sent again, and nothing before it
    beyond = [offset for offset in asked[asked.index(at) :] if offset < at]
    assert not beyond and len(asked) - len(set(asked)) <= repeats * window
    assert server.counts.erases == 1


def test_a_device_that_falls_silent_in_the_middle_ends_with_a_reason_and_goes_on_later(
    tmp_path: Path,
) -> None:
    """It hears, and says nothing more: so many repetitions at one offset, not one of another piece."""
    asked: list[int] = []

    async def work(session: SmpSession) -> None:
        def silent(group: int, number: int, body: dict[str, Any]) -> bool:
            if server._ram.offset <= 3000:
                return True
            asked.append(body.get("off", -1))
            return False

        server.on_request = silent
        with pytest.raises(Transient) as caught:
            await staged(session, SECOND)
        assert caught.value.reason is Reason.NO_RESPONSE and "no byte beyond" in caught.value.detail
        # what was sent may wait in the line still
        await until(lambda: len(asked) >= 8)
        server.on_request = None
        await staged(session, SECOND)
        assert bytes(server.slots[1][: len(SECOND)]) == SECOND and server.counts.erases == 1

    with SmpServer(tmp_path, FACTORY, buffer_count=2) as server:
        on(server, work, answer_s=0.3)
    assert asked == [asked[0]] * 8 and asked[0] > 3000


def test_a_server_that_knows_version_1_only_is_met(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        assert (await session.identify()).detail["header_version"] == "1"
        await staged(session, SECOND)
        with pytest.raises(Permanent) as caught:
            await session.apply(Desired("setting.no", 1, 1))
        assert caught.value.reason is Reason.DEVICE_ERROR and "(code 5)" in caught.value.detail

    with SmpServer(tmp_path, FACTORY, versions=(1,), tells_parameters=False, mode=None) as server:
        on(server, work, settings={"no": {"type": "int8"}}, boot_loader="reverts")
        assert bytes(server.slots[1][: len(SECOND)]) == SECOND


def test_version_2_is_preferred(tmp_path: Path) -> None:
    with SmpServer(tmp_path, FACTORY, versions=(1, 2)) as server:

        async def work(session: SmpSession) -> None:
            assert (await session.identify()).detail["header_version"] == "2"

        on(server, work)


@pytest.mark.parametrize(("refuses", "version"), [({2: 13}, "1"), ({1: 12}, "2"), ({1: 8, 2: 13}, "1")])
def test_a_server_that_refuses_a_header_is_met_with_the_other(
    tmp_path: Path, refuses: dict[int, int], version: str
) -> None:
    """UNSUPPORTED_TOO_NEW, UNSUPPORTED_TOO_OLD; another error (ENOTSUP: no parameters) is an answer."""

    async def work(session: SmpSession) -> None:
        assert (await session.identify()).detail["header_version"] == version

    with SmpServer(tmp_path, FACTORY, refuses=refuses) as server:
        on(server, work)


def test_a_server_that_refuses_every_header_does_not_speak_smp(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        return None

    with SmpServer(tmp_path, FACTORY, refuses={1: 12, 2: 13}) as server:
        with pytest.raises(Transient) as caught:
            on(server, work)
        assert caught.value.reason is Reason.NO_RESPONSE


@pytest.mark.parametrize("wired", [True, False], ids=["dtr", "none"])
def test_a_device_that_does_not_answer_is_reset_where_its_reset_is_wired_and_asked_once_more(
    tmp_path: Path, wired: bool
) -> None:
    async def run() -> None:
        config = {"reset": "dtr" if wired else "none", "answer_s": 0.3, "boot_s": 2}
        async with asyncio.timeout(60), connected(device(server.port, **config)) as session:
            while server.counts.boots < 2 or server._up_at:
                await asyncio.sleep(0.005)
            server._hangs = True
            if wired:
                assert (await session.identify()).hardware_id == "smp:simulated/edged"
                assert server.counts.boots == 3
            else:
                with pytest.raises(Transient) as caught:
                    await session.identify()
                assert caught.value.reason is Reason.NO_RESPONSE and server.counts.boots == 2

    with SmpServer(tmp_path, FACTORY, resets_on_open=True) as server:
        asyncio.run(run())


def test_a_device_that_takes_its_time_to_boot_is_not_reset_meanwhile(tmp_path: Path) -> None:
    """It may be in its trial, and a reset would end that."""

    async def run() -> None:
        config = {"reset": "dtr", "answer_s": 0.3, "boot_s": 20}
        async with asyncio.timeout(60), connected(device(server.port, **config)) as session:
            await session.identify()
            assert server.counts.boots == 2, "opening the port resets it, and nothing else should have"

    with SmpServer(tmp_path, FACTORY, resets_on_open=True, boot_s=1.5) as server:
        asyncio.run(run())


def probed(address: str, timeout_s: float = 60) -> Identity | None:
    async def run() -> Identity | None:
        assert SPEC.probe is not None
        async with asyncio.timeout(timeout_s):
            return await SPEC.probe(address, device_env("probe", LinkPool(LINKS)))

    return asyncio.run(run())


def carries_only(server: SmpServer, rate: int, seen: set[int]) -> None:
    """What is sent at another rate is garbage to the device."""

    def at_rate(data: bytes) -> bytes:
        seen.add(now := termios.tcgetattr(server._slave)[4])
        return data if now == rate else b"\xf8" * (len(data) // 2)

    server.to_device = at_rate


@pytest.mark.parametrize(
    ("rate", "framing", "baud"), [(termios.B57600, "console", "57600"), (termios.B1000000, "raw", "1000000")]
)
def test_a_probe_finds_a_device_at_another_rate(
    tmp_path: Path, rate: int, framing: str, baud: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the simulated device shares its processor with others
    monkeypatch.setattr(smp_probe, "_ANSWER_S", 0.1)
    monkeypatch.setattr(smp_probe, "_OTHER_ANSWER_S", 0.5)
    seen: set[int] = set()
    with SmpServer(tmp_path, FACTORY, framing=framing) as server:
        carries_only(server, rate, seen)
        found = probed(f"serial:{server.port}")
        assert found is not None and found.hardware_id == "smp:simulated/edged"
        assert (found.detail["baud"], found.detail["framing"]) == (baud, framing)
        assert termios.B115200 in seen and server.counts.boots == 1


def test_a_probe_asks_at_the_rate_that_the_address_names_and_at_no_other(tmp_path: Path) -> None:
    seen: set[int] = set()
    with SmpServer(tmp_path, FACTORY) as server:
        carries_only(server, termios.B38400, seen)
        found = probed(f"serial:{server.port}@38400")
        assert found is not None and found.detail["baud"] == "38400"
        assert probed(f"serial:{server.port}@19200") is None
        assert seen == {termios.B38400, termios.B19200}


def test_the_command_that_names_a_port_prints_who_is_there_and_touches_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path / "node", extra="").write()
    with SmpServer(tmp_path, FACTORY, framing="raw") as server, place.daemon(fake=False):
        server.slots[1][: len(SECOND)] = SECOND
        held = [bytes(slot) for slot in server.slots]
        answer = place.run("mapper", "probe", f"serial:{server.port}")
        assert (answer.code, answer.err) == (0, "")
        assert answer.out.splitlines() == [
            "mapper    uart-smp",
            "hardware  smp:simulated/edged",
            "protocol  smp",
            "framing   raw",
            "baud      115200",
            "header_version 2",
            "buffers   4 of 384 bytes",
            "kernel    Simulated 1.0",
            "boot_mode 1",
            f"slot 0    1.0.0 {identifies_as(FACTORY)[:16]} active confirmed",
            f"slot 1    2.0.0 {identifies_as(SECOND)[:16]}",
        ]
        assert server.counts == Counts(boots=1, messages=len(server.log))
        # all of them read, of the operating system's group and the images'
        assert {(op, group) for op, group, _, _ in server.log} == {(0, 0), (0, 1)}
        assert [bytes(slot) for slot in server.slots] == held
        assert (server.pending, server.confirmed) == (False, True)


@pytest.mark.slow
def test_a_probe_of_nobody_ends_in_the_time_that_a_probe_has(tmp_path: Path) -> None:
    with SmpServer(tmp_path, FACTORY) as server:
        server.to_device = lambda data: b""
        assert probed(f"serial:{server.port}", PROBE_TIMEOUT_S) is None


def test_nobody_there_says_what_to_look_at(tmp_path: Path) -> None:
    async def run() -> None:
        async with connected(device(server.port, answer_s=0.05)) as session:
            await session.identify()

    with SmpServer(tmp_path, FACTORY, versions=()) as server, pytest.raises(Transient) as caught:
        asyncio.run(run())
    assert caught.value.reason is Reason.NO_RESPONSE and "baud" in caught.value.detail


# -- faults on the wire


FAULTS = ["lost", "doubled", "flipped", "noise"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("framing", ["console", "cobs"])
def test_bytes_that_go_wrong_cost_time_and_nothing_else(tmp_path: Path, fault: str, framing: str) -> None:
    wire, back = BadWire(1, 3000, fault), BadWire(2, 300, fault)

    async def work(session: SmpSession) -> None:
        # the wire turns bad when the device was found
        server.to_device, server.from_device = wire, back
        await staged(session, SECOND)
        assert bytes(server.slots[1][: len(SECOND)]) == SECOND
        assert wire.hits > 0 and back.hits > 0

    with SmpServer(tmp_path, FACTORY, framing=framing) as server:
        on(server, work, answer_s=0.5, framing=framing)
        assert server.counts.stored == len(SECOND)


@pytest.mark.parametrize("fault", ["flipped", "shifted"])
def test_without_a_checksum_damage_arrives_and_is_seen_at_the_trial(tmp_path: Path, fault: str) -> None:
    """Raw: the device takes the bytes for good and lists the image; its boot loader throws it away, and that is seen."""

    def damage(group: int, number: int, body: dict[str, Any]) -> bool:
        # in the body: where the hash at the end is damaged it is not listed at all
        if (group, number) == (1, 1) and 2000 < body["off"] < 4000:
            data = body["data"]
            body["data"] = bytes([data[0] ^ 1, *data[1:]]) if fault == "flipped" else data[:8] + data[:-8]
        return True

    async def work(session: SmpSession) -> None:
        server.on_request = damage
        await staged(session, SECOND)
        assert bytes(server.slots[1][: len(SECOND)]) != SECOND, "nothing was damaged"
        with pytest.raises(Permanent) as caught:
            await session.activate()
        assert caught.value.reason is Reason.VERIFY_FAILED and server.runs == "1.0.0"

    with SmpServer(tmp_path, FACTORY, framing="raw") as server:
        on(server, work, framing="raw")


@FRAMINGS
@pytest.mark.parametrize("which", ["request", "answer"])
@pytest.mark.parametrize("doubled", [False, True], ids=["lost", "doubled"])
def test_whole_messages_lost_and_doubled(tmp_path: Path, framing: str, which: str, doubled: bool) -> None:
    """Every fifth one."""
    seen = 0

    def disturb(data: bytes) -> bytes:
        nonlocal seen
        seen += 1
        return data if seen % 5 else data * 2 if doubled else b""

    async def work(session: SmpSession) -> None:
        if which == "request":
            server.to_device = disturb
        else:
            server.from_device = disturb
        await staged(session, SECOND)
        assert bytes(server.slots[1][: len(SECOND)]) == SECOND and seen > 5

    with SmpServer(tmp_path, FACTORY, framing=framing) as server:
        on(server, work, answer_s=2 if doubled else 0.5, framing=framing)
        assert server.counts.stored == len(SECOND), "a piece was stored twice"


def test_answers_in_another_order_are_each_other_s(tmp_path: Path) -> None:
    held: list[bytes] = []

    def swap(data: bytes) -> bytes:
        held.append(data)
        return b"" if len(held) % 2 else held[-1] + held[-2]

    async def work(session: SmpSession) -> None:
        server.from_device = swap
        await staged(session, SECOND)
        server.from_device = lambda data: data
        assert bytes(server.slots[1][: len(SECOND)]) == SECOND

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work, answer_s=0.5)


def test_a_wire_that_is_dead_ends_with_a_reason(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        staging = asyncio.ensure_future(staged(session, SECOND))
        while server.counts.stored < 1000:
            await asyncio.sleep(0.001)
        server.to_device = lambda data: b""
        with pytest.raises(Transient) as caught:
            await staging
        assert caught.value.reason is Reason.NO_RESPONSE
        server.to_device = lambda data: data
        await staged(session, SECOND)

    with SmpServer(tmp_path, FACTORY, line_bytes_per_s=50_000) as server:
        on(server, work, answer_s=0.3)
        assert server.counts.stored == len(SECOND) and server.counts.erases == 1


def test_sequence_numbers_begin_anew_after_255(tmp_path: Path) -> None:
    """With as many on their way as there may be, and some lost."""
    image = make_image((2, 0, 0), body_of(60_000, 2))
    seen = 0

    def lose(group: int, number: int, body: dict[str, Any]) -> bool:
        nonlocal seen
        seen += (group, number) == (1, 1)
        return (group, number) != (1, 1) or seen % 97 > 0

    async def work(session: SmpSession) -> None:
        session._client._sequence = 250
        server.on_request = lose
        await staged(session, image)
        assert bytes(server.slots[1][: len(image)]) == image and seen > 512

    with SmpServer(tmp_path, FACTORY, buffer_bytes=160, buffer_count=1000) as server:
        on(server, work, answer_s=0.3)
        assert server.counts.stored == len(image)


@pytest.mark.parametrize("at", range(0, 10, 2))
def test_the_device_resets_in_the_upload(tmp_path: Path, at: int) -> None:
    """It has forgotten where it was: the upload begins anew by itself, and ends."""

    async def work(session: SmpSession) -> None:
        server.on_request = resets_once
        await staged(session, SECOND)
        assert server.counts.boots == 2 and bytes(server.slots[1][: len(SECOND)]) == SECOND
        assert server.counts.stored <= len(SECOND) * (1 + at / 10) + 384

    def resets_once(group: int, number: int, body: dict[str, Any]) -> bool:
        if server.counts.erases and server.counts.stored * 10 >= at * len(SECOND):
            server.on_request = None
            server.power()
            return False
        return True

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work, answer_s=1)


def test_a_device_that_resets_again_and_again_is_given_up(tmp_path: Path) -> None:
    def restart(group: int, number: int, body: dict[str, Any]) -> bool:
        if (group, number) == (1, 1) and body["off"] > 3000:
            server.power()
            return False
        return True

    async def work(session: SmpSession) -> None:
        server.on_request = restart
        with pytest.raises(Transient) as caught:
            await staged(session, SECOND)
        assert caught.value.reason in (Reason.PROTOCOL_ERROR, Reason.NO_RESPONSE)

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work, answer_s=0.3)
        assert server.counts.erases <= 3


def test_a_device_that_is_busy_erasing_is_waited_for_and_erases_once(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        assert session.traits.quiet_s >= 5
        await staged(session, SECOND)

    with SmpServer(tmp_path, FACTORY, erase_s=1.0) as server:
        on(server, work, answer_s=0.3)
        assert server.counts.erases == 1 and server.counts.stored == len(SECOND)


@pytest.mark.parametrize("code", [2, 10], ids=["ENOMEM", "EBUSY"])
def test_a_server_that_is_full_is_asked_again(tmp_path: Path, code: int) -> None:
    async def work(session: SmpSession) -> None:
        normal, count = server._do, 0

        def now_and_then(op: int, group: int, number: int, body: dict[str, Any]) -> Any:
            nonlocal count
            count += 1
            return (0, code) if count % 4 == 0 else normal(op, group, number, body)

        server._do = now_and_then  # type: ignore[method-assign]
        await staged(session, SECOND)
        assert count > 8

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)
        assert bytes(server.slots[1][: len(SECOND)]) == SECOND


@pytest.mark.parametrize(
    "busy",
    [(2, 0, 5), (2, 1, 0), (0, 1, 0), (0, 0, 8), (0, 1, 6)],
    ids=["reset", "mark", "state", "mode", "slots"],
)
@pytest.mark.parametrize("code", [2, 10], ids=["ENOMEM", "EBUSY"])
def test_what_a_busy_server_refuses_is_asked_again_or_later(
    tmp_path: Path, busy: tuple[int, int, int], code: int
) -> None:
    """A moment costs nothing; what takes longer is no refusal, and the engine's to ask later."""
    left = 0

    async def work(session: SmpSession) -> None:
        nonlocal left
        left = 5
        with pytest.raises(Transient) as caught:
            await staged(session, SECOND)
            await session.activate()
        assert caught.value.reason is Reason.DEVICE_ERROR and "5 times" in caught.value.detail
        assert left == 0 and server.runs == "1.0.0"
        left = 3
        await staged(session, SECOND)
        await session.activate()
        assert left == 0 and server.runs == "2.0.0" and server.counts.boots == 2

    with SmpServer(tmp_path, FACTORY) as server:
        normal = server._do

        def refusing(op: int, group: int, number: int, body: dict[str, Any]) -> Any:
            nonlocal left
            if (op, group, number) != busy or not left:
                return normal(op, group, number, body)
            left -= 1
            return 0, code

        server._do = refusing  # type: ignore[method-assign]
        # an answer that is late would be taken for a reset that was not heard
        on(server, work, answer_s=5)


def test_a_property_for_which_the_server_has_no_room_is_left_out_and_the_others_are_told(
    tmp_path: Path,
) -> None:
    async def work(session: SmpSession) -> None:
        names = [reported.name for reported in await session._poll()]
        assert "image.version" in names and "setting.a" in names and not any("stat." in one for one in names)
        health = await session.check_health(HealthCheck("property", "3", "stat.net.rx", timeout_s=0.5))
        assert not health.healthy

    with SmpServer(tmp_path, FACTORY, settings={"a": b"\1"}, statistics={"net": {"rx": 3}}) as server:
        server._do_2_0_r = lambda body: (0, 2)  # type: ignore[method-assign]
        on(server, work, settings={"a": {"type": "int8"}})


@pytest.mark.parametrize(
    "answer", [{"off": -1}, {"off": "x"}, {}, {"off": 10**9}, {"rc": 6}, {"err": {"group": 1, "rc": 12}}]
)
def test_an_answer_that_makes_no_sense_ends_with_a_reason(tmp_path: Path, answer: dict[str, Any]) -> None:
    async def work(session: SmpSession) -> None:
        server._do_1_1_w = lambda body: answer  # type: ignore[method-assign]
        with pytest.raises((Transient, Permanent)) as caught:
            await staged(session, SECOND)
        refused = "rc" in answer or "err" in answer
        assert caught.value.reason is (Reason.DEVICE_ERROR if refused else Reason.PROTOCOL_ERROR)

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


# -- two slots


def test_what_was_staged_is_not_sent_again(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        count = len(uploads(server))
        await staged(session, SECOND)
        assert len(uploads(server)) == count

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


def test_what_did_not_match_is_erased_and_comes_again(tmp_path: Path) -> None:
    """Where the device checks what it stored: it must not be taken for whole the next time."""

    async def work(session: SmpSession) -> None:
        server.on_request = damage
        with pytest.raises(Transient) as caught:
            await staged(session, SECOND)
        assert caught.value.reason is Reason.PROTOCOL_ERROR and "other bytes" in caught.value.detail
        server.on_request = None
        await staged(session, SECOND)
        assert bytes(server.slots[1][: len(SECOND)]) == SECOND

    def damage(group: int, number: int, body: dict[str, Any]) -> bool:
        if (group, number) == (1, 1) and 2000 < body["off"] < 2500:
            body["data"] = bytes(len(body["data"]))
        return True

    with SmpServer(tmp_path, FACTORY, checks=True) as server:
        on(server, work, window=1)
        assert server.counts.erases == 3


KEY, OTHER_KEY = b"the key of the factory", b"another"


def test_a_key_that_the_device_does_not_know_is_seen(tmp_path: Path) -> None:
    good = make_image((2, 0, 0), body_of(4000, 2), key=KEY)
    bad = make_image((3, 0, 0), body_of(4000, 3), key=OTHER_KEY)

    async def work(session: SmpSession) -> None:
        await staged(session, bad)
        with pytest.raises(Permanent) as caught:
            await session.activate()
        assert caught.value.reason is Reason.VERIFY_FAILED and "key" in caught.value.detail
        assert server.runs == "1.0.0"
        await staged(session, good)
        await session.activate()
        assert server.runs == "2.0.0"

    with SmpServer(tmp_path, FACTORY, keys=(KEY,)) as server:
        on(server, work)
        assert server.counts.trial_boots == 1


def test_an_image_that_the_device_does_not_list_after_the_upload_is_missing(tmp_path: Path) -> None:
    """A server that validates what it lists, as a boot loader's does."""
    bad = make_image((3, 0, 0), body_of(4000, 3), key=OTHER_KEY)

    async def work(session: SmpSession) -> None:
        normal = server._do_1_0_r
        server._do_1_0_r = lambda body: {  # type: ignore[method-assign]
            "images": [one for one in normal(body)["images"] if one["active"]]
        }
        with pytest.raises(Permanent) as caught:
            await staged(session, bad)
        assert caught.value.reason is Reason.VERIFY_FAILED
        assert "lists it in no slot" in caught.value.detail and "Ed25519" in caught.value.detail

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


@pytest.mark.parametrize("mode", [0, 2, 4, 6, 7, 8, 99])
def test_a_boot_loader_that_cannot_go_back_is_refused(tmp_path: Path, mode: int) -> None:
    async def work(session: SmpSession) -> None:
        with pytest.raises(Permanent) as caught:
            await staged(session, SECOND)
        assert caught.value.reason is Reason.UNSUPPORTED and "cannot go back" in caught.value.detail
        assert not uploads(server)

    with SmpServer(tmp_path, FACTORY, mode=mode) as server:
        on(server, work, boot_loader="reverts")


@pytest.mark.parametrize("mode", [1, 3, 5, 9])
def test_a_boot_loader_that_goes_back_is_not(tmp_path: Path, mode: int) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)

    with SmpServer(tmp_path, FACTORY, mode=mode) as server:
        on(server, work)


def test_a_boot_loader_that_tells_nothing_has_to_be_vouched_for(tmp_path: Path) -> None:
    async def refused(session: SmpSession) -> None:
        with pytest.raises(Permanent) as caught:
            await staged(session, SECOND)
        assert caught.value.reason is Reason.UNSUPPORTED and "boot_loader = 'reverts'" in caught.value.detail
        assert not uploads(server)

    async def vouched(session: SmpSession) -> None:
        await staged(session, SECOND)

    with SmpServer(tmp_path, FACTORY, mode=None) as server:
        on(server, refused)
        on(server, vouched, boot_loader="reverts")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (SECOND[:-1], Reason.IMAGE_INVALID),
        (b"\0" * 400, Reason.IMAGE_INVALID),
        (make_image((2, 0, 0), body_of(4000, 2), damaged=True), Reason.HASH_MISMATCH),
        (make_image((2, 0, 0), body_of(70_000, 2)), Reason.IMAGE_TOO_LARGE),
        (SECOND + b"\xff" * 100, Reason.IMAGE_INVALID),
    ],
)
def test_what_is_wrong_with_an_image_is_found_before_it_is_sent(
    tmp_path: Path, image: bytes, reason: Reason
) -> None:
    async def work(session: SmpSession) -> None:
        with pytest.raises(Refused) as caught:
            await staged(session, image)
        assert caught.value.reason is reason and not uploads(server)

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


def test_a_slot_that_is_too_small_is_told_so_also_by_a_device_that_tells_no_slots(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        with pytest.raises(Refused) as caught:
            await staged(session, make_image((2, 0, 0), body_of(70_000, 2)))
        assert caught.value.reason is Reason.IMAGE_TOO_LARGE and "70072 bytes" in caught.value.detail
        assert server.counts.stored == server.counts.erases == 0

    with SmpServer(tmp_path, FACTORY) as server:
        server._do_1_6_r = lambda body: (0, 8)  # type: ignore[assignment, method-assign, return-value]
        on(server, work)


def test_an_image_of_two_segments_is_none(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        file = pack([(0, SECOND), (0x10000, b"more")])
        image = await Image.open(MemorySource(file), ChunkIndex.build(file, 512))
        with pytest.raises(Refused) as caught:
            await session.stage(image, Watched())
        assert caught.value.reason is Reason.IMAGE_INVALID

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


@pytest.mark.parametrize("tells_states", [False, True])
def test_serial_recovery_is_not_flashed(tmp_path: Path, tells_states: bool) -> None:
    """MCUboot may tell states there, too (BOOT_SERIAL_IMG_GRP_IMAGE_STATE); an application tells more of itself."""

    async def work(session: SmpSession) -> None:
        normal, whole = server._do_1_0_r, server._do

        def states(body: dict[str, Any]) -> dict[str, Any]:
            told = normal(body)["images"]
            return {"images": told if tells_states else [{"slot": 0, "version": "1.0.0"}]}

        def few(op: int, group: int, number: int, body: dict[str, Any]) -> Any:
            return whole(op, group, number, body) if group == 1 or number in (0, 5, 6) else (0, 8)

        server._do_1_0_r, server._do = states, few  # type: ignore[method-assign]
        with pytest.raises(Permanent) as caught:
            await staged(session, SECOND)
        assert caught.value.reason is Reason.UNSUPPORTED
        assert "recovery" in caught.value.detail or "does not tell whether" in caught.value.detail
        with pytest.raises(Permanent) as caught:
            await session.slots()
        assert "recovery" in caught.value.detail
        assert not uploads(server)

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


def test_an_application_that_once_tells_no_active_image_is_not_reset(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        await session.slots()
        normal, told = server._do_1_0_r, 0

        def once(body: dict[str, Any]) -> dict[str, Any]:
            nonlocal told
            told += 1
            return {"images": []} if told == 1 else normal(body)

        server._do_1_0_r = once  # type: ignore[method-assign]
        assert (await session.slots()).slots[0].runs == identifies_as(FACTORY)
        assert told == 2 and server.counts.boots == 1

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


def test_an_application_that_lands_in_recovery_is_brought_back(tmp_path: Path) -> None:
    """A piece of the image that reaches the boot loader while it starts is a call for recovery."""

    async def work(session: SmpSession) -> None:
        await session.slots()
        normal = server._do_1_0_r
        server._do_1_0_r = lambda body: {"images": [{"slot": 0, "version": "1.0.0"}]}  # type: ignore[method-assign]
        with pytest.raises(Transient) as caught:
            await session.slots()
        assert caught.value.reason is Reason.DEVICE_ERROR and "it was reset" in caught.value.detail
        server._do_1_0_r = normal  # type: ignore[method-assign]
        await until(lambda: server.counts.boots >= 2, 10)
        await staged(session, SECOND)
        assert server.counts.boots == 2

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


def test_a_device_that_would_keep_the_image_without_a_trial_is_not_reset(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        server._set_pending = lambda permanent: (
            setattr(server, "permanent", True) or setattr(server, "pending", True)
        )  # type: ignore[method-assign,func-returns-value]
        with pytest.raises(Permanent) as caught:
            await session.activate()
        assert caught.value.reason is Reason.DEVICE_ERROR and "without a trial" in caught.value.detail
        assert server.counts.boots == 1

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


@pytest.mark.parametrize("lost", [(1, 0), (0, 5)], ids=["mark", "reset"])
def test_a_lost_answer_to_mark_or_reset_is_no_loss(tmp_path: Path, lost: tuple[int, int]) -> None:
    """The request was heard; asking again would be refused, or would reset twice."""

    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        normal, dropped = server._write, 0

        def write(data: bytes) -> None:
            nonlocal dropped
            op, group, number, _ = server.log[-1]
            if op == 2 and (group, number) == lost and not dropped:
                dropped += 1
                return
            normal(data)

        server._write = write  # type: ignore[method-assign]
        await session.activate()
        assert dropped == 1 and server.runs == "2.0.0" and server.counts.boots == 2

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


def test_what_others_left_pending_is_booted_and_left_before_the_upload(tmp_path: Path) -> None:
    third = make_image((3, 0, 0), body_of(4000, 3))

    async def work(session: SmpSession) -> None:
        await staged(session, third)
        server.pending = True
        await staged(session, SECOND)
        assert server.runs == "1.0.0" and server.confirmed and not server.pending
        assert bytes(server.slots[1][: len(SECOND)]) == SECOND

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)
        assert server.counts.boots == 3


@pytest.mark.parametrize("erases", [False, True])
def test_what_somebody_confirmed_is_not_booted_by_a_reset_of_ours(tmp_path: Path, erases: bool) -> None:
    """The image in the other slot is to stay from the next reset on: it is erased, or nothing resets the device."""
    third = make_image((3, 0, 0), body_of(4000, 3))

    async def work(session: SmpSession) -> None:
        for call in (session.revert, lambda: staged(session, SECOND), lambda: staged(session, third)):
            server.pending = server.permanent = False
            await staged(session, third)
            server.pending = server.permanent = True
            if erases:
                await call()
                assert not server.pending
            else:
                with pytest.raises(Permanent) as caught:
                    await call()
                assert caught.value.reason is Reason.DEVICE_ERROR and "for good" in caught.value.detail
        assert server.counts.boots == 1 and server.runs == "1.0.0"

    with SmpServer(tmp_path, FACTORY, erases_pending=erases) as server:
        on(server, work)


def test_what_is_pending_is_erased_where_the_device_allows_it(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        server.pending = True
        await session.revert()
        assert not server.pending and server.counts.boots == 1

    with SmpServer(tmp_path, FACTORY, erases_pending=True) as server:
        on(server, work)


def test_a_lost_reset_is_sent_again(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        lost = 0

        def lose(group: int, number: int, body: dict[str, Any]) -> bool:
            nonlocal lost
            lost += (group, number) == (0, 5)
            return (group, number) != (0, 5) or lost > 1

        server.on_request = lose
        await session.activate()
        assert lost == 2 and server.runs == "2.0.0" and server.counts.boots == 2

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


THIRD = make_image((3, 0, 0), body_of(4000, 3))


@pytest.mark.parametrize("held", [THIRD, b""], ids=["another image", "nothing"])
@pytest.mark.parametrize("marked", [False, True])
def test_what_this_session_did_not_stage_is_not_booted(tmp_path: Path, held: bytes, marked: bool) -> None:
    """Somebody else wrote to the slot after it was staged."""

    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        server._erase()
        server.slots[1][: len(held)] = held
        server.pending = marked and bool(held)
        await refused(session)
        server.pending = False
        await staged(session, SECOND)
        await session.activate()
        assert server.runs == "2.0.0"

    async def refused(session: SmpSession) -> None:
        with pytest.raises(Transient) as caught:
            await session.activate()
        assert caught.value.reason is Reason.DEVICE_ERROR and "should be" in caught.value.detail
        assert server.counts.boots == 1 and server.runs == "1.0.0"

    with SmpServer(tmp_path, FACTORY) as server:
        server.slots[1][: len(held)] = held
        on(server, refused)
        on(server, work)


@pytest.mark.parametrize("erases", [False, True])
@pytest.mark.parametrize("when", ["before it is staged", "after that"])
def test_what_runs_already_is_not_left_for_an_image_that_others_left_pending(
    tmp_path: Path, erases: bool, when: str
) -> None:
    async def work(session: SmpSession) -> None:
        server.slots[1][: len(THIRD)] = THIRD
        server.pending = when == "before it is staged"
        await staged(session, FACTORY)
        server.pending |= when == "after that"
        await session.activate()
        assert server.runs == "1.0.0" and server.confirmed and not server.pending
        assert server.counts.trial_boots == (0 if erases else 1)

    with SmpServer(tmp_path, FACTORY, erases_pending=erases) as server:
        on(server, work)


@pytest.mark.parametrize("when", ["before it is staged", "after that"])
def test_no_reset_makes_another_image_of_the_device_permanent(tmp_path: Path, when: str) -> None:
    """A device of two images: somebody has confirmed the one in the second slot of its network processor."""

    def of_two(told: dict[str, Any], permanent: bool) -> dict[str, Any]:
        more = [
            {"image": 1, "slot": number, "version": "1", "hash": bytes([number]) * 32, "active": number == 0,
             "confirmed": number == 0, "pending": permanent and number == 1, "permanent": permanent and number == 1}
            for number in range(2)
        ]  # fmt: skip
        return told | {"images": [*more, *told["images"]]}

    async def work(session: SmpSession) -> None:
        if when == "after that":
            await staged(session, SECOND)
            marked.append(True)
        else:
            marked.append(True)
            with pytest.raises(Permanent) as caught:
                await staged(session, SECOND)
            assert "(image 1 of the device) for good" in caught.value.detail and not uploads(server)
            marked.clear()
            await staged(session, SECOND)
            marked.append(True)
        with pytest.raises(Permanent) as caught:
            await session.activate()
        assert caught.value.reason is Reason.DEVICE_ERROR and "for good" in caught.value.detail
        assert server.counts.boots == 1 and not server.pending
        await session.revert()
        marked.clear()
        await session.activate()
        assert server.runs == "2.0.0"

    marked: list[bool] = []
    with SmpServer(tmp_path, FACTORY) as server:
        normal = server._do_1_0_r
        server._do_1_0_r = lambda body: of_two(normal(body), bool(marked))  # type: ignore[method-assign]
        on(server, work)


def test_revert_leaves_a_trial(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        await session.activate()
        assert server.runs == "2.0.0" and not server.confirmed
        await session.revert()
        assert server.runs == "1.0.0" and server.confirmed
        boots = server.counts.boots
        await session.revert()
        assert server.counts.boots == boots, "reverting is idempotent"

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


@pytest.mark.parametrize("held", ["the one before", "nothing", "another"])
def test_an_image_that_confirmed_itself_is_left_for_the_one_before_where_that_is_still_there(
    tmp_path: Path, held: str
) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        await session.activate()
        assert server.runs == "2.0.0" and server.confirmed
        if held != "the one before":
            server._erase()
        if held == "another":
            server.slots[1][: len(THIRD)] = THIRD
        await session.revert()
        expected = "1.0.0" if held == "the one before" else "2.0.0"
        assert server.runs == expected and server.confirmed and not server.pending
        boots = server.counts.boots
        await session.revert()
        assert server.counts.boots == boots == (3 if held == "the one before" else 2)

    with SmpServer(tmp_path, FACTORY, confirms_itself=True) as server:
        on(server, work)


def test_what_was_confirmed_by_edged_is_not_left(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        await session.activate()
        await session.confirm()
        await session.revert()
        assert server.runs == "2.0.0" and server.counts.boots == 2

    with SmpServer(tmp_path, FACTORY, confirms_itself=True) as server:
        on(server, work)


def test_only_the_image_that_was_looked_at_is_confirmed(tmp_path: Path) -> None:
    """It resets between the health check and the confirmation: the old image runs, and must not pass for the new one."""

    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        await session.activate()
        assert (await session.slots()).slots[0].runs == identifies_as(SECOND)
        server.power()
        with pytest.raises(Transient) as caught:
            await session.confirm()
        assert caught.value.reason is Reason.DEVICE_ERROR and "has reset" in caught.value.detail

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


def test_a_device_that_never_answers_again_is_told_with_what_it_said(tmp_path: Path) -> None:
    hanging = make_image((6, 6, 6), HANGS + body_of(4000, 6))

    async def work(session: SmpSession) -> None:
        await staged(session, hanging)
        with pytest.raises(Transient) as caught:
            await session.activate()
        assert caught.value.reason is Reason.NO_RESPONSE and "after its reset" in caught.value.detail
        server.power()
        session._client.forget()
        assert (await session.slots()).slots[0].runs == identifies_as(FACTORY)

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work, answer_s=0.3, boot_s=1)


# -- health and properties


CHATTY = "ready"


@pytest.mark.parametrize("says", [True, False], ids=["the new image says it too", "the new image is silent"])
def test_what_the_old_image_said_is_no_health_of_the_new_one(tmp_path: Path, says: bool) -> None:
    """It goes on talking between the answer to the reset and the reset itself, as Zephyr's does for a quarter of a second."""

    async def work(session: SmpSession) -> None:
        talking = asyncio.create_task(talk())
        await staged(session, SECOND)
        await session.activate()
        talking.cancel()
        assert server.runs == "2.0.0"
        health = await session.check_health(HealthCheck("line", CHATTY, timeout_s=0.5))
        assert health.healthy == says and (says or CHATTY not in health.evidence)

    async def talk() -> None:
        while server.runs == "1.0.0":
            # it must not have been reset between the look and the word
            with server._lock:
                if server.runs == "1.0.0":
                    server.say(CHATTY)
            await asyncio.sleep(0.01)

    hello = (
        ("*** Booting Zephyr OS build v4 ***", CHATTY) if says else ("*** Booting Zephyr OS build v4 ***",)
    )
    with SmpServer(tmp_path, FACTORY, hello=hello, reset_s=0.25) as server:
        on(server, work)


@pytest.mark.parametrize("left", [False, True], ids=["it runs still", "it was left meanwhile"])
def test_what_is_said_at_the_start_is_not_lost_with_a_session(tmp_path: Path, left: bool) -> None:
    async def first(session: SmpSession) -> None:
        await staged(session, SECOND)
        await session.activate()

    async def second(session: SmpSession) -> None:
        if left:
            server.power()
            session._client.forget()
        await session.slots()
        health = await session.check_health(HealthCheck("line", CHATTY, timeout_s=0.5))
        assert health.healthy == (not left)
        assert not left or "start was not heard" in health.evidence

    hello = ["*** Booting Zephyr OS", CHATTY]
    with SmpServer(tmp_path, FACTORY, hello=hello) as server:  # type: ignore[arg-type]
        on(server, first)
        if left:
            hello.clear()
        on(server, second)


def test_without_a_banner_only_what_is_said_after_the_answer_counts(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        await session.activate()
        assert not (await session.check_health(HealthCheck("line", CHATTY, timeout_s=0.2))).healthy
        server.say(CHATTY)
        assert (await session.check_health(HealthCheck("line", CHATTY, timeout_s=20))).healthy

    with SmpServer(tmp_path, FACTORY, hello=(CHATTY,)) as server:
        on(server, work)


@pytest.mark.parametrize("framing", ["raw", "cobs"])
def test_a_framing_without_lines_has_no_check_of_lines(tmp_path: Path, framing: str) -> None:
    async def work(session: SmpSession) -> None:
        with pytest.raises(Permanent) as caught:
            await session.check_health(HealthCheck("line", "x"))
        assert caught.value.reason is Reason.UNSUPPORTED

    with SmpServer(tmp_path, FACTORY, framing=framing) as server:
        on(server, work, framing=framing)


def test_an_odd_setting_does_not_matter_for_the_health_of_another_and_a_check_ends_in_time(
    tmp_path: Path,
) -> None:
    async def work(session: SmpSession) -> None:
        assert (await session.check_health(HealthCheck("property", "^7$", "setting.good", 20))).healthy
        server.log.clear()
        await session.check_health(HealthCheck("property", "^7$", "setting.good", 20))
        assert {(group, number) for _, group, number, _ in server.log} == {(3, 0)}, (
            "more was asked than the one"
        )
        for odd in ("setting.odd", "setting.nan", "setting.none", "stat.no.no"):
            assert not (await session.check_health(HealthCheck("property", "x", odd, 0.2))).healthy
        assert [one.name for one in await session._settings(["odd", "nan", "good"])] == ["setting.good"]
        server.versions = ()
        begun = asyncio.get_running_loop().time()
        assert not (await session.check_health(HealthCheck("property", "7", "setting.good", 0.3))).healthy
        assert asyncio.get_running_loop().time() - begun < 10

    kept = {"good": b"\x07", "odd": b"abc", "nan": b"\0\0\xc0\x7f"}
    with SmpServer(tmp_path, FACTORY, settings=kept) as server:
        kinds = {"good": "uint8", "odd": "uint32", "nan": "float32"}
        on(server, work, settings={name: {"type": kind} for name, kind in kinds.items()}, answer_s=20)


def test_health_by_a_line_and_by_a_property(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        await staged(session, SECOND)
        await session.activate()
        assert await session.check_health(HealthCheck("line", "^ready [0-9]$", timeout_s=20)) == Health(
            True, "ready 1"
        )
        later = asyncio.get_running_loop().call_later(0.2, server.say, "late")
        assert (await session.check_health(HealthCheck("line", "late", timeout_s=20))).healthy
        later.cancel()
        assert await session.check_health(HealthCheck("line", "x$", timeout_s=0.2)) == Health(
            False, "*** Booting Zephyr OS\nready 1\nlate"
        )
        assert (await session.check_health(HealthCheck("property", "^ok$", "setting.app/state", 20))).healthy
        assert await session.check_health(HealthCheck("property", "^no", "setting.app/state", 2)) == Health(
            False, "ok"
        )
        assert (await session.check_health(HealthCheck("property", "Simulated 1.0", "os.info", 20))).healthy
        with pytest.raises(Permanent) as caught:
            await session.check_health(HealthCheck("smell", "x"))
        assert caught.value.reason is Reason.UNSUPPORTED
        server.versions = ()
        assert not (
            await session.check_health(HealthCheck("property", "ok", "setting.app/state", 0.2))
        ).healthy

    with SmpServer(
        tmp_path, FACTORY, hello=("*** Booting Zephyr OS", "ready 1"), settings={"app/state": b"ok"}
    ) as server:
        on(server, work, settings={"app/state": {}}, answer_s=0.3)


def test_what_the_device_says_is_reported(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        seen: list[Reported] = []
        async with asyncio.timeout(20):
            async for reported in session.reports():
                seen.append(reported)
                if reported.name == "stat.net.rx":
                    server.say("uptime=7")
                if reported.name == "uptime":
                    break
        assert seen[:3] == [
            Reported("image.version", "1.0.0"),
            Reported("image.hash", identifies_as(FACTORY)),
            Reported("image.confirmed", True),
        ]
        assert Reported("stat.net.rx", 41) in seen and Reported("setting.app/interval", 30, "s") in seen
        assert seen[-1] == Reported("uptime", 7)

    with SmpServer(
        tmp_path,
        FACTORY,
        settings={"app/interval": (30).to_bytes(4, "little")},
        statistics={"net": {"rx": 41, "tx": 2}},
    ) as server:
        on(
            server,
            work,
            settings={"app/interval": {"type": "uint32", "unit": "s"}, "not/there": {}},
            poll_s=60,
        )


def test_a_setting_of_another_type_is_left_out_and_the_others_are_told(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        names = [reported.name for reported in await session._poll()]
        assert "setting.b" in names and "setting.a" not in names

    with SmpServer(tmp_path, FACTORY, settings={"a": b"abc", "b": b"abcd"}) as server:
        on(server, work, settings={"a": {"type": "uint32"}, "b": {"type": "uint32"}})


def test_reports_end_when_the_device_is_gone(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        with pytest.raises(Transient) as caught:
            async for _ in session.reports():
                server.unplug()
        assert caught.value.reason is Reason.LINK_LOST

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)


def test_what_a_type_rounds_is_told_as_it_was_desired_and_by_the_device_alone_as_it_is(
    tmp_path: Path,
) -> None:
    """Else the wish would never come true."""
    gain = {"gain": {"type": "float32"}}

    async def told(session: SmpSession) -> list[Reported]:
        return [reported for reported in await session._poll() if reported.name == "setting.gain"]

    async def work(session: SmpSession) -> None:
        assert await session.apply(Desired("setting.gain", 0.1, 1)) == Reported("setting.gain", 0.1)
        assert await told(session) == [Reported("setting.gain", 0.1)]
        seen = await session.check_health(HealthCheck("property", "0.1", "setting.gain", 1))
        assert seen.evidence == "0.10000000149011612"

    async def later(session: SmpSession) -> None:
        assert await told(session) == [Reported("setting.gain", 0.10000000149011612)]
        assert await session.apply(Desired("setting.gain", 0.1, 1)) == Reported("setting.gain", 0.1)
        assert await session.apply(Desired("setting.gain", 0.5, 2)) == Reported("setting.gain", 0.5)
        assert await told(session) == [Reported("setting.gain", 0.5)]

    with SmpServer(tmp_path, FACTORY, settings={"gain": bytes(4)}) as server:
        on(server, work, settings=gain)
        assert server.counts.settings_written == 1
        on(server, later, settings=gain)
        assert server.counts.settings_written == 2


def test_a_desired_setting_is_written_once_kept_and_told(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        wish = Desired("setting.app/interval", 60, 1)
        assert await session.apply(wish) == Reported("setting.app/interval", 60, "s")
        assert await session.apply(wish) == Reported("setting.app/interval", 60, "s")
        assert server.counts.settings_written == 1
        server.power()
        assert server.saved["app/interval"] == (60).to_bytes(4, "little")
        for name, value, reason in [
            ("setting.app/interval", -1, Reason.REQUEST_INVALID),
            ("setting.app/interval", "x", Reason.REQUEST_INVALID),
            ("setting.other", 1, Reason.UNSUPPORTED),
            ("app/interval", 1, Reason.UNSUPPORTED),
            ("setting.not/there", "x", Reason.DEVICE_ERROR),
        ]:
            with pytest.raises(Permanent) as caught:
                await session.apply(Desired(name, value, 2))
            assert caught.value.reason is reason, name

    with SmpServer(tmp_path, FACTORY, settings={"app/interval": bytes(4)}) as server:
        on(server, work, settings={"app/interval": {"type": "uint32", "unit": "s"}, "not/there": {}})


@pytest.mark.parametrize("answer", [(0, 8), (3, 8)], ids=["no such command", "nothing to save in"])
def test_a_device_that_cannot_save_takes_a_setting_all_the_same(
    tmp_path: Path, answer: tuple[int, int]
) -> None:
    async def work(session: SmpSession) -> None:
        server._do_3_3_w = lambda body: answer  # type: ignore[assignment, method-assign, return-value]
        told = await session.apply(Desired("setting.app/interval", 60, 1))
        assert told == Reported("setting.app/interval", 60, None)
        assert server.log[-2][:3] == (2, 3, 3) and server._ram.settings["app/interval"][0] == 60

    with SmpServer(tmp_path, FACTORY, settings={"app/interval": bytes(4)}) as server:
        on(server, work, settings={"app/interval": {"type": "uint32"}})


# -- not our own mirror

PEER = """
import asyncio, sys
from smpclient import SMPClient
from smpclient.generics import success
from smpclient.requests import image_management as image, os_management as os, settings_management as settings
from smpclient.requests.statistics_management import GroupData
from smpclient.transport.serial import SMPSerialTransport, SMPSerialRawTransport, Cobs

async def booted(client):
    for _ in range(3):
        await asyncio.sleep(0.5)
        try:
            # an answer that comes later would be taken for that to the next one
            return await client.request(image.ImageStatesRead(), timeout_s=10)
        except TimeoutError:
            # nobody listens while it boots
            pass

async def main(port, framing, file):
    transport = {
        "console": SMPSerialTransport, "raw": SMPSerialRawTransport, "cobs": lambda: SMPSerialRawTransport(framing=Cobs()),
    }[framing]()
    data = open(file, "rb").read()
    async with SMPClient(transport, port) as client:
        assert success(await client.request(os.EchoWrite(d="hello")))
        state = await client.request(image.ImageStatesRead())
        assert success(state) and [one.version for one in state.images] == ["1.0.0"], state
        async for offset in client.upload(data):
            pass
        assert offset == len(data)
        state = await client.request(image.ImageStatesRead())
        (new,) = [one for one in state.images if one.slot == 1]
        assert success(await client.request(image.ImageStatesWrite(hash=new.hash)))
        value = await client.request(settings.ReadSetting(name="app/state"))
        assert success(value) and value.val == b"ok", value
        assert success(await client.request(os.ResetWrite()))
        state = await booted(client)
        assert [one.version for one in state.images if one.active] == ["2.0.0"], state
        assert success(await client.request(image.ImageStatesWrite(confirm=True)))
    print("done")

asyncio.run(main(*sys.argv[1:]))
"""


@FRAMINGS
def test_a_client_that_others_wrote_drives_the_simulated_server(tmp_path: Path, framing: str) -> None:
    """So it is not edged's mirror: smpclient uploads, tries, confirms."""
    (tmp_path / "image").write_bytes(SECOND)
    with SmpServer(tmp_path, FACTORY, framing=framing, settings={"app/state": b"ok"}) as server:
        done = subprocess.run(
            [peer_python("smpclient"), "-c", PEER, server.port, framing, tmp_path / "image"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout == "done\n", done.stderr[-2000:]
        assert server.runs == "2.0.0" and server.confirmed and server.counts.boots == 2


def test_progress_counts_what_the_device_has(tmp_path: Path) -> None:
    async def work(session: SmpSession) -> None:
        watched = await staged(session, SECOND)
        writes = [done for phase, done, _ in watched.seen if phase is Phase.WRITE]
        assert writes == sorted(writes) and writes[-1] == len(SECOND)
        assert watched.bytes_of(Phase.COMPARE) == len(SECOND)
        assert all(total == len(SECOND) for _, _, total in watched.seen)

    with SmpServer(tmp_path, FACTORY) as server:
        on(server, work)
