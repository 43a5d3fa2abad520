"""A device that answers anything: whatever it says, a session ends with a reason, and nothing wrong is called good."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from smp_kit import FACTORY, SECOND, BadWire, connected, device, identifies_as, opaque
from smp_server import SmpServer
from uart_kit import Watched

from edged.api import Desired, Health, HealthCheck, Identity, Reported, Slots
from edged.errors import EdgedError
from edged_uart.smp_session import SmpSession

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 384, 2**40, 2**64 - 1, -(2**63), 1.5, float("nan"), b"", b"x", bytes(32), "", "x",
    [], [5], [None], [[]], {}, {1: 2}, {"slot": 0}, [{"slot": "x", "hash": 5}], bytes.fromhex(identifies_as(SECOND)),
]  # fmt: skip
"""What stands where something else should."""


def mutated(answer: Any, thrown: random.Random) -> Any:
    """``answer``, in which one thing is another, is missing, or is there twice."""
    if isinstance(answer, dict) and answer and thrown.random() < 0.85:
        key = thrown.choice(list(answer))
        if thrown.random() < 0.1:
            return {name: value for name, value in answer.items() if name != key}
        return answer | {key: mutated(answer[key], thrown)}
    if isinstance(answer, list) and answer and thrown.random() < 0.85:
        at = thrown.randrange(len(answer))
        return [*answer[:at], mutated(answer[at], thrown), *answer[at + thrown.choice([0, 1, 1, 1]) :]]
    return thrown.choice(VALUES)


Call = Callable[[SmpSession], Coroutine[Any, Any, object]]


async def _first_reports(session: SmpSession) -> list[Reported]:
    return await session._poll()


async def _stage(session: SmpSession) -> None:
    await session.stage(await opaque(SECOND), Watched())


async def _activate(session: SmpSession) -> None:
    session._staged = identifies_as(SECOND)
    await session.activate()


ROUNDS = 40

CALLS: dict[str, tuple[Call, type]] = {
    "identify": (lambda session: session.identify(), Identity),
    "slots": (lambda session: session.slots(), Slots),
    "stage": (_stage, type(None)),
    "activate": (_activate, type(None)),
    "confirm": (lambda session: session.confirm(), type(None)),
    "revert": (lambda session: session.revert(), type(None)),
    "reports": (_first_reports, list),
    "apply": (lambda session: session.apply(Desired("setting.a", 1, 1)), Reported),
    "health": (
        lambda session: session.check_health(HealthCheck("property", "x", "image.hash", 0.02)),
        Health,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_whatever_the_answers_are_a_call_ends_with_a_result_or_a_reason(tmp_path: Path, name: str) -> None:
    """Answers that are well framed, of the right command and number, and wrong in one place."""
    call, kind = CALLS[name]
    thrown, rate = random.Random(name), 0.04 if name == "stage" else 0.3
    ends: dict[str, int] = {"result": 0, "reason": 0}

    async def once(session: SmpSession) -> None:
        try:
            async with asyncio.timeout(20):
                found = await call(session)
        except EdgedError as error:
            assert error.detail
            ends["reason"] += 1
            return
        assert isinstance(found, kind)
        ends["result"] += 1

    async def run(server: SmpServer) -> None:
        config = {
            "answer_s": 0.1,
            "quiet_s": 0,
            "boot_s": 1,
            "erase_s": 1,
            "settings": {"a": {"type": "int8"}},
        }
        async with connected(device(server.port, **config)) as session:
            for _ in range(ROUNDS):
                server.pending, server.confirmed = False, True
                if name == "stage":
                    server._erase()
                if name == "activate":
                    server.slots[0][: len(FACTORY)], server.slots[1][: len(SECOND)] = FACTORY, SECOND
                session._client.forget()
                await once(session)

    with SmpServer(
        tmp_path, FACTORY, boot_s=0, settings={"a": b"\1"}, statistics={"net": {"rx": 1}}
    ) as server:
        normal = server._do

        def wrong(op: int, group: int, number: int, body: dict[str, Any]) -> Any:
            answer = normal(op, group, number, body)
            return mutated(answer, thrown) if isinstance(answer, dict) and thrown.random() < rate else answer

        server._do = wrong  # type: ignore[method-assign]
        asyncio.run(run(server))
    assert ends["result"] > 0 and ends["result"] + ends["reason"] == ROUNDS


@pytest.mark.parametrize("framing", ["console", "raw", "cobs"])
@pytest.mark.parametrize("seed", range(3))
def test_a_device_that_babbles_is_no_device_and_holds_up_nothing(
    tmp_path: Path, framing: str, seed: int
) -> None:
    """Noise as fast as it can, and answers to nothing."""
    thrown = random.Random(seed)

    async def run(server: SmpServer) -> None:
        loop = asyncio.get_running_loop()
        late = 0.0

        async def beat() -> None:
            nonlocal late
            while True:
                before = loop.time()
                await asyncio.sleep(0.01)
                late = max(late, loop.time() - before)

        beating = asyncio.create_task(beat())
        async with connected(device(server.port, framing=framing, answer_s=0.1)) as session:
            with pytest.raises(EdgedError):
                await session.identify()
        beating.cancel()
        assert late < 2

    def noise(data: bytes) -> bytes:
        return b"\x06\x09AAAA\n\x01\0\0\xff\0\0" + thrown.randbytes(3000)

    with SmpServer(tmp_path, FACTORY, framing=framing) as server:
        server.from_device = noise
        asyncio.run(run(server))


@pytest.mark.parametrize("seed", range(6))
def test_everything_goes_wrong_a_little(tmp_path: Path, seed: int) -> None:
    """Bytes lost, doubled, flipped and added both ways, resets at any moment; whatever comes out, what runs is whole."""
    thrown = random.Random(seed)

    async def run(server: SmpServer) -> str:
        for _ in range(40):
            server.to_device, server.from_device = BadWire(seed, 1000), BadWire(~seed, 1000)
            try:
                async with (
                    asyncio.timeout(20),
                    connected(device(server.port, answer_s=0.08, quiet_s=0.02, boot_s=1)) as session,
                ):
                    await session.identify()
                    await session.stage(await opaque(SECOND), Watched())
                    await session.activate()
                    runs = (await session.slots()).slots[0].runs
                    if runs == identifies_as(SECOND):
                        await session.confirm()
                        return "confirmed"
            except EdgedError:
                if thrown.random() < 0.3:
                    server.power()
        return "given up"

    with SmpServer(tmp_path, FACTORY, boot_s=0.02) as server:
        end = asyncio.run(run(server))
        assert server.runs in ("1.0.0", "2.0.0")
        if end == "confirmed":
            assert bytes(server.slots[0][: len(SECOND)]) == SECOND and server.confirmed
        assert end == "confirmed", "one byte in a thousand is not worth giving up"
