"""The flash protocols against a peer that answers wrongly, late or not at all."""

from __future__ import annotations

import asyncio
import os
import pty
import tty
from collections.abc import Awaitable, Callable

import pytest

from edged.errors import EdgedError, Permanent, Reason, Transient
from edged_uart.link import SerialLink
from edged_uart.stk500v1 import Stk500v1
from edged_uart.stk500v2 import Stk500v2, frame

Answer = Callable[[bytes], bytes]


class Scripted:
    """The far end of a pty; answers each thing that it is sent by what ``answer`` says."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.master, self._slave = pty.openpty()
        tty.setraw(self._slave)
        self.path = os.ttyname(self._slave)
        self.got: list[bytes] = []

    async def __aenter__(self) -> SerialLink:
        asyncio.get_running_loop().add_reader(self.master, self._serve)
        self.link = SerialLink(self.path)
        await self.link.open()
        return self.link

    async def __aexit__(self, *_: object) -> None:
        await self.link.close()
        asyncio.get_running_loop().remove_reader(self.master)
        os.close(self.master)
        os.close(self._slave)

    def _serve(self) -> None:
        data = os.read(self.master, 4096)
        self.got.append(data)
        if said := self._answer(data):
            os.write(self.master, said)


def failure(answer: Answer, ask: Callable[[SerialLink], Awaitable[object]]) -> EdgedError:
    async def run() -> None:
        async with Scripted(answer) as link:
            await ask(link)

    with pytest.raises(EdgedError) as caught:
        asyncio.run(run())
    return caught.value


def v1(link: SerialLink) -> Stk500v1:
    return Stk500v1(link, 0.1)


def v2(link: SerialLink) -> Stk500v2:
    return Stk500v2(link, 0.1, page_by_page=True)


@pytest.mark.parametrize("make", [v1, v2], ids=["v1", "v2"])
def test_silence_says_what_to_look_at(make: Callable[[SerialLink], Stk500v1 | Stk500v2]) -> None:
    error = failure(lambda _: b"", lambda link: make(link).sync())
    assert isinstance(error, Transient) and error.reason is Reason.NO_RESPONSE
    assert "baud" in error.detail and "reset" in error.detail


@pytest.mark.parametrize("said", [b"", b"\x14", b"\x15", b"\x14\x1e\x95\x0f"])
def test_v1_an_answer_that_is_cut_short(said: bytes) -> None:
    error = failure(lambda _: said, lambda link: v1(link).signature())
    assert isinstance(error, Transient) and error.reason is Reason.NO_RESPONSE
    assert "0x75" in error.detail


@pytest.mark.parametrize("said", [b"\x14\x1e\x95\x0f\x11", b"edged", b"\x15\x14\x1e\x95\x0f"])
def test_v1_an_answer_that_is_none(said: bytes) -> None:
    error = failure(lambda _: said, lambda link: v1(link).signature())
    assert isinstance(error, Transient) and error.reason is Reason.PROTOCOL_ERROR


def test_v1_finds_its_step_behind_noise_and_late_answers() -> None:
    async def run() -> None:
        answers = iter([b"", b"\x00\xfe garbage \x14", b"\x10\x14\x10", b"\x14\x10", b"\x14\x1e\x95\x0f\x10"])
        async with Scripted(lambda _: next(answers)) as link:
            loader = v1(link)
            await loader.sync()
            assert await loader.signature() == b"\x1e\x95\x0f"

    asyncio.run(run())


def test_v1_sends_the_words_of_the_application_note() -> None:
    async def run() -> list[bytes]:
        peer = Scripted(lambda data: b"\x14" + (b"\x01" * 4 if data[:1] == b"\x74" else b"") + b"\x10")
        async with peer as link:
            loader = v1(link)
            await loader.write(0x1200, b"\xaa\xbb")
            await loader.read(0x1200, 4)
            await loader.leave()
        return peer.got

    assert asyncio.run(run()) == [
        b"\x55\x00\x09\x20",
        b"\x64\x00\x02F\xaa\xbb\x20",
        b"\x55\x00\x09\x20",
        b"\x74\x00\x04F\x20",
        b"\x51\x20",
    ]


def of_an_atmega(said: bytes) -> Answer:
    """A part with a USART: says its signature, and ``said`` to everything else."""
    return lambda data: b"\x14\x1e\x95\x0f\x10" if data[:1] == b"\x75" else said


def test_v1_does_not_wait_between_address_and_page_where_the_part_hears_while_it_sends() -> None:
    async def run() -> list[bytes]:
        peer = Scripted(of_an_atmega(b"\x14\x10\x14\x10"))
        async with peer as link:
            loader = v1(link)
            await loader.signature()
            await loader.write(0x1200, b"\xaa\xbb")
        return peer.got

    assert asyncio.run(run()) == [b"\x75\x20", b"\x55\x00\x09\x20\x64\x00\x02F\xaa\xbb\x20"]


@pytest.mark.parametrize(
    ("signature", "at_once"),
    [(b"\x1e\x91\x0a", True), (b"\x1e\x95\x0f", False)],
    ids=["unknown part", "told to wait"],
)
def test_v1_waits_where_the_part_is_not_known_or_it_is_told_to(signature: bytes, at_once: bool) -> None:
    async def run() -> int:
        peer = Scripted(lambda data: b"\x14" + signature + b"\x10" if data[:1] == b"\x75" else b"\x14\x10")
        async with peer as link:
            loader = Stk500v1(link, 0.1, page_at_once=at_once)
            await loader.signature()
            await loader.write(0x1200, b"\xaa\xbb")
        return len(peer.got)

    assert asyncio.run(run()) == 3


@pytest.mark.parametrize(
    ("said", "reason", "command"),
    [
        (b"", Reason.NO_RESPONSE, "0x55"),
        (b"\x14\x10\x14", Reason.NO_RESPONSE, "0x55"),
        (b"\x15\x10\x14\x10", Reason.PROTOCOL_ERROR, "0x55"),
        (b"\x14\x10\x15\x10", Reason.PROTOCOL_ERROR, "0x64"),
    ],
)
def test_v1_checks_both_answers(said: bytes, reason: Reason, command: str) -> None:
    async def ask(link: SerialLink) -> None:
        loader = v1(link)
        await loader.signature()
        await loader.write(0x1200, b"\xaa\xbb")

    error = failure(of_an_atmega(said), ask)
    assert isinstance(error, Transient) and error.reason is reason
    assert command in error.detail


def test_v2_sends_the_words_of_the_application_note() -> None:
    async def run() -> list[bytes]:
        peer = Scripted(lambda data: frame(data[1], bytes([data[5], 0])))
        async with peer as link:
            loader = v2(link)
            await loader.write(0x1200, b"\xaa\xbb")
            await loader.write(0x20000, b"\xcc\xdd")
            await loader.leave()
        return peer.got

    program = bytes.fromhex("13 0002 c1 0a 40 4c 20 00 00")
    assert asyncio.run(run()) == [
        frame(1, bytes.fromhex("06 00000900")),
        frame(2, program + b"\xaa\xbb"),
        frame(3, bytes.fromhex("06 80010000")),
        frame(4, program + b"\xcc\xdd"),
        frame(5, bytes.fromhex("11 01 01")),
    ]


def test_v2_a_status_that_is_not_ok_is_the_devices_no() -> None:
    def answer(data: bytes) -> bytes:
        return frame(data[1], bytes([data[5], 0xC0]))

    error = failure(answer, lambda link: v2(link).leave())
    assert isinstance(error, Permanent) and error.reason is Reason.DEVICE_ERROR
    assert "0xc0" in error.detail


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
        lambda whole: frame(whole[1], bytes([0x42, 0])),
        lambda whole: frame(whole[1], bytes([0x11])),
        lambda whole: frame(whole[1], bytes([0x11, 0, 7])),
    ],
    ids=["checksum", "another command", "no status", "too long"],
)
def test_v2_an_answer_that_is_none(damage: Callable[[bytes], bytes]) -> None:
    error = failure(lambda data: damage(frame(data[1], bytes([data[5], 0]))), lambda link: v2(link).leave())
    assert isinstance(error, Transient) and error.reason is Reason.PROTOCOL_ERROR


def test_v2_a_late_answer_is_nobodys() -> None:
    def answer(data: bytes) -> bytes:
        late = frame((data[1] - 1) & 0xFF, bytes([data[5], 0xC0]))
        return b"noise" + late + frame(data[1], bytes([data[5], 0]))

    async def run() -> None:
        async with Scripted(answer) as link:
            await v2(link).leave()

    asyncio.run(run())


def test_no_module_knows_a_command_that_sets_fuses_or_locks() -> None:
    """AVR061 0x40..0x4D and 0x62..0x65 but Program Page; AVR068 CMD_PROGRAM_FUSE_ISP, _LOCK_ISP, CMD_CHIP_ERASE_ISP."""
    import edged_uart.stk500v1 as first
    import edged_uart.stk500v2 as second

    commands = {value for name, value in vars(first).items() if isinstance(value, bytes) and len(value) == 1}
    assert commands.isdisjoint(bytes([code]) for code in (0x42, 0x4D, 0x52, 0x61, 0x62, 0x63, 0x65))
    numbers = {value for name, value in vars(second).items() if name.startswith("CMD_")}
    assert numbers.isdisjoint({0x12, 0x15, 0x17, 0x19})
