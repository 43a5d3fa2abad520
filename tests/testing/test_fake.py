"""The fake device passes the conformance kit, and the kit notices a mapper that is wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from edged.api import Device
from edged.errors import Transient
from edged.plugins import discover
from edged.testing import conformance
from edged.testing.conformance import Check, Subject
from edged.testing.fake import (
    Bus,
    FakeDevice,
    FakeLink,
    FakePlugin,
    FakeReadBackSession,
    FakeSession,
    FakeTrialSession,
    fake_app,
)

SIZE = 4096


def subject(**options: Any) -> Subject:
    """A device in the state in which it left the factory, with a neighbour on its bus."""
    plugin = FakePlugin()
    hardware = plugin.add("bus", FakeDevice("dev-1", **options))
    plugin.add("bus", FakeDevice("dev-2"))
    hardware.install(fake_app("0.2.0"))
    bus = plugin.bus("bus")
    bus.bytes_per_s = 200_000

    async def unplug() -> None:
        bus.lost = True

    async def plug() -> None:
        bus.lost = False

    async def mute() -> None:
        hardware.absent = True

    async def unmute() -> None:
        hardware.absent = False

    async def mark_other() -> None:
        hardware.mark_pending()

    def holds(address: int, length: int) -> bytes:
        return bytes(hardware.slots[hardware.spare][address : address + length])

    plugins = discover([("fake", plugin)])
    device = Device("dev-1", "widget", "fake", "fake:bus/dev-1", flash_size_bytes=hardware.size_bytes)
    return Subject(
        spec=plugins.mapper("fake"),
        links=plugins.links,
        device=device,
        first=[(0, fake_app("1.0.0", SIZE))],
        second=[(0, fake_app("2.0.0", SIZE))],
        sent=lambda: bytes(hardware.tap),
        holds=holds,
        written=lambda: hardware.counts.received,
        unit_bytes=hardware.page_bytes,
        unplug=unplug,
        plug=plug,
        mute=mute,
        unmute=unmute,
        mark_other=mark_other if hardware.slot_count > 1 else None,
        neighbour=replace(device, id="dev-2", address="fake:bus/dev-2"),
    )


KINDS: dict[str, dict[str, Any]] = {
    "one slot": {},
    "one slot, not readable": {"reads_back": False},
    "two slots": {"slot_count": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_conformance(edged_conformance: Check, kind: str) -> None:
    asyncio.run(edged_conformance(subject(**KINDS[kind])))


async def _swallows(self: Any, image: Any, progress: Any) -> None:
    try:
        await original(self, image, progress)
    except asyncio.CancelledError:
        return


async def _writes_always(self: Any, image: Any, pages: Any, total: Any, progress: Any) -> int:
    return 0


async def _writes_nothing(self: Any, image: Any, progress: Any) -> None:
    return None


async def _looks_at_what_runs_only(self: Any, image: Any, progress: Any) -> None:
    if not (await self._hardware()).pending:
        await original(self, image, progress)


async def _hangs(self: Any, *_: Any) -> Any:
    await asyncio.Event().wait()


async def _hangs_when_nobody_answers(self: Any) -> Any:
    try:
        return await identify(self)
    except Transient:
        await asyncio.Event().wait()


async def _raises_what_it_likes(self: Any) -> Any:
    try:
        return await identify(self)
    except Transient as exc:
        raise RuntimeError("no answer") from exc


async def _blocks(self: Any) -> Any:
    # for a second, as the watch's own turns count it: those of a machine that is busy take longer
    time.sleep(4)  # noqa: ASYNC251 - as a mapper must not
    return await identify(self)


original = FakeReadBackSession.stage
identify = FakeReadBackSession.identify


@pytest.mark.parametrize(
    ("check", "method", "wrong"),
    [
        (conformance.cancellation_comes_out, "stage", _swallows),
        (conformance.stage_is_idempotent, "_prefix", _writes_always),
        (conformance.goes_on_from_the_device, "_prefix", _writes_always),
        (conformance.stages_what_it_was_given, "stage", _writes_nothing),
    ],
)
def test_the_kit_notices(
    check: Check, method: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeReadBackSession, method, wrong)
    with pytest.raises(AssertionError):
        asyncio.run(check(subject()))


@pytest.mark.parametrize(
    ("check", "method", "wrong", "says"),
    [
        (
            conformance.cancellation_comes_out,
            "stage",
            _writes_nothing,
            r"stage ended \(None\) and did not tell",
        ),
        (conformance.cancellation_comes_out, "stage", _hangs, "stage went on for 0.2 s and did not tell"),
        (conformance.port_loss_is_transient, "stage", _writes_nothing, "did not tell progress"),
        (conformance.silence_is_transient, "identify", _hangs_when_nobody_answers, "put a time-out on each"),
        (conformance.silence_is_transient, "identify", _raises_what_it_likes, r"silence raised RuntimeError"),
        (conformance.leaves_the_loop_to_others, "identify", _blocks, r"held for 1 s .*\n(.*\n)*.*time.sleep"),
    ],
)
def test_the_kit_says_what_it_missed(
    check: Check, method: str, wrong: Callable[..., Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conformance, "HALF_S", 0.2)
    monkeypatch.setattr(conformance, "SILENCE_S", 0.2)
    monkeypatch.setattr(FakeReadBackSession, method, wrong)
    with pytest.raises(AssertionError, match=says):
        asyncio.run(check(subject()))


def test_no_check_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "CHECK_S", 0.3)
    monkeypatch.setattr(FakeReadBackSession, "identify", _hangs)
    check = next(one for one in conformance.CHECKS if one.__name__ == "identity_is_stable")
    with pytest.raises(AssertionError, match=r"not ended after 0.3 s"):
        asyncio.run(check(subject()))


def test_the_kit_notices_that_another_image_is_left_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTrialSession, "stage", _looks_at_what_runs_only)
    with pytest.raises(AssertionError, match="another image"):
        asyncio.run(conformance.leaves_no_other_image_pending(subject(slot_count=2)))


def test_the_kit_notices_that_it_cannot_see_what_is_sent() -> None:
    """Bytes of the image with something between them, as in frames: damaged ones would be looked for in vain."""
    whole = subject()
    apart = replace(whole, sent=lambda: b"\0".join(bytes([byte]) for byte in whole.sent()))
    with pytest.raises(AssertionError, match="in a row"):
        asyncio.run(conformance.no_unverified_byte_is_sent(apart))


def test_only_a_whole_application_runs() -> None:
    hardware = FakeDevice("dev-1")
    image = fake_app("1.0.0", 1024)
    hardware.write_page(0, image[:512])
    assert hardware.app is None
    hardware.write_page(512, image[512:])
    assert hardware.app is not None and hardware.app.version == "1.0.0"
    hardware.slots[0][700] ^= 1
    assert hardware.app is None


def test_a_trial_that_nobody_confirmed_is_left_at_the_next_boot() -> None:
    hardware = FakeDevice("dev-1", slot_count=2)
    hardware.install(fake_app("1.0.0"))
    hardware.write_page(0, fake_app("2.0.0"))
    hardware.mark_pending()
    hardware.boot()
    assert hardware.app is not None and hardware.app.version == "2.0.0"
    hardware.boot()
    assert hardware.app is not None and hardware.app.version == "1.0.0"


def test_a_property_that_appears_while_others_are_reported_is_reported_in_its_turn() -> None:
    hardware = FakeDevice("dev-1", properties={"level": 1})
    device = Device("dev-1", "widget", "fake", "fake:bus/dev-1", flash_size_bytes=hardware.size_bytes)
    session = FakeSession(FakeLink("fake:bus", Bus({"dev-1": hardware})), "dev-1", device)

    async def names() -> list[str]:
        seen: list[str] = []
        async for reported in session.reports():
            seen.append(reported.name)
            if reported.name == "other":
                return seen
            if reported.name == "level":
                hardware.properties["other"] = 2
        return seen

    assert asyncio.run(names()) == ["uptime", "level", "uptime", "level", "other"]
