"""Real firmware by others: MCUboot and Zephyr's SMP server, in QEMU, with flash that outlives a reset."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import zephyr_kit
from smp_kit import BadWire, Node, connected, device, identifies_as, opaque
from uart_kit import LINKS, MAPPERS, Watched
from zephyr_kit import (
    BOARD,
    MPS2_CONSOLE,
    MPS2_RAW,
    MPS2_RAW_AND_COBS,
    SLOTS,
    Machine,
    Zephyr,
    signed,
)

from edged.api import Desired, HealthCheck, Phase
from edged.config import HealthSettings
from edged.domain.job import State
from edged.errors import Permanent, Reason, Refused, Transient
from edged.links import LinkPool, device_env
from edged_uart import smp
from edged_uart.smp_session import SmpSession

pytestmark = pytest.mark.skipif(zephyr_kit.QEMU is None, reason="not installed: qemu-system-arm")

REAL = {"answer_s": 2, "erase_s": 25, "quiet_s": 1, "boot_s": 30, "boot_loader": "reverts"}
"""These do not tell their boot loader's mode."""
FACTORY_VERSION = "0.0.0"


@pytest.fixture
def zephyr(tmp_path: Path) -> Iterator[Zephyr]:
    with Zephyr(tmp_path) as device:
        yield device


def on(zephyr: Zephyr, work: Callable[[SmpSession], object], **config: object) -> None:
    async def run() -> None:
        async with asyncio.timeout(200), connected(device(zephyr.port, **{**REAL, **config})) as session:
            await session.identify()
            await work(session)  # type: ignore[misc]

    asyncio.run(run())


async def active(session: SmpSession) -> str:
    found = (await session.slots()).active
    assert found is not None and found.runs is not None
    return found.runs


def test_who_is_there_and_how_it_is(zephyr: Zephyr) -> None:
    async def work(session: SmpSession) -> None:
        identity = await session.identify()
        assert identity.hardware_id == BOARD
        assert identity.detail["header_version"] == "2" and identity.detail["kernel"] == "Zephyr 4.4.0"
        assert identity.detail["buffers"] == "4 of 384 bytes"
        assert identity.detail["slot 0"].startswith("0.0.0 1baa222074cc805f active confirmed")
        names = {reported.name: reported.value for reported in await session._poll()}
        assert names["image.version"] == "0.0.0" and names["image.confirmed"] is True
        assert isinstance(names["stat.smp_svr_stats.ticks"], int)
        health = await session.check_health(HealthCheck("property", "^os.echo$", "os.echo", 5))
        assert health.healthy, health
        assert not (await session.check_health(HealthCheck("property", "x", "no.such", 0.5))).healthy

    on(zephyr, work)
    probe = MAPPERS["uart-smp"].probe
    assert probe is not None and not MAPPERS["uart-smp"].probe_disturbs
    found = asyncio.run(probe(f"serial:{zephyr.port}", device_env("probe", LinkPool(LINKS))))
    assert found is not None and found.hardware_id == BOARD
    assert found.detail["slot 0"].endswith("active confirmed")
    assert zephyr.boots == 1, "asking who is there has reset the device"


def test_a_trial_without_confirmation_is_reverted_and_a_confirmed_one_stays(zephyr: Zephyr) -> None:
    image = signed("1.0.0")

    async def work(session: SmpSession) -> None:
        old, new = await active(session), identifies_as(image)
        await session.stage(await opaque(image), Watched())
        assert zephyr.slot(1, len(image)) == image and await active(session) == old
        await session.activate()
        assert await active(session) == new and not (await session.slots()).slots[0].confirmed
        assert zephyr.slot(0, len(image)) == image, "the boot loader has not swapped"
        # the boot loader reverts by itself: nobody asked it to
        zephyr.cut_power()
        await until_it_answers(session)
        assert await active(session) == old
        assert zephyr.slot(1, len(image)) == image, "the new image is not where it was before the trial"

        await session.activate()
        assert await active(session) == new
        await session.confirm()
        await session.confirm()
        zephyr.cut_power()
        await until_it_answers(session)
        assert await active(session) == new and (await session.slots()).slots[0].confirmed

    on(zephyr, work)


async def until_it_answers(session: SmpSession) -> None:
    session._client.forget()
    for _ in range(10):
        with suppress(Transient):
            await session.slots()
            return
    raise AssertionError("it does not answer")


@pytest.mark.slow
def test_one_flipped_bit_in_the_slot_never_boots(zephyr: Zephyr) -> None:
    image = signed("1.0.0")

    def flip(flash: bytes) -> bytes:
        at = SLOTS[1] + 0x4000
        return flash[:at] + bytes([flash[at] ^ 1]) + flash[at + 1 :]

    async def work(session: SmpSession) -> None:
        old = await active(session)
        await session.stage(await opaque(image), Watched())
        zephyr.cut_power(flip)
        assert zephyr.slot(1, len(image)) != image
        await until_it_answers(session)
        with pytest.raises(Permanent) as caught:
            await session.activate()
        assert caught.value.reason is Reason.VERIFY_FAILED and "removed it" in caught.value.detail
        assert await active(session) == old
        assert (await session.slots()).slots[1].runs == "", "the boot loader keeps what it refused"

    on(zephyr, work)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda image: image[:40000] + bytes([image[40000] ^ 1]) + image[40001:], Reason.HASH_MISMATCH),
        (lambda image: b"\x7fELF" + image[4:], Reason.IMAGE_INVALID),
        (
            lambda image: signed("1.0.0", "--slot-size", "0x40000", body=bytes(110_000)),
            Reason.IMAGE_TOO_LARGE,
        ),
    ],
    ids=["flipped", "no image", "too large"],
)
def test_what_the_device_would_refuse_is_not_sent(
    zephyr: Zephyr, damage: Callable[[bytes], bytes], reason: Reason
) -> None:
    async def work(session: SmpSession) -> None:
        before = zephyr.flash()
        sent = len(zephyr.tap)
        with pytest.raises(Refused) as caught:
            await session.stage(await opaque(damage(signed("1.0.0"))), Watched())
        assert caught.value.reason is reason
        assert len(zephyr.tap) - sent < 200 and zephyr.flash() == before

    on(zephyr, work)


def test_a_cut_on_our_side_at_every_tenth_costs_what_was_on_its_way(zephyr: Zephyr) -> None:
    """The device keeps its offset: each new session goes on there. It tells, too, that somebody is uploading."""
    image = signed("1.0.0")

    async def interrupted(tenth: int) -> None:
        async with connected(device(zephyr.port, **REAL)) as session:
            await session.identify()
            watched = Watched()
            staging = asyncio.ensure_future(session.stage(await opaque(image), watched))
            while watched.bytes_of(Phase.WRITE) * 10 < tenth * len(image):
                await asyncio.sleep(0.002)
                assert not staging.done()
            staging.cancel()
            with pytest.raises(asyncio.CancelledError):
                await staging

    async def run() -> None:
        for tenth in range(1, 10):
            await interrupted(tenth)
        async with connected(device(zephyr.port, **REAL)) as session:
            await session.identify()
            assert await session._is_uploading(0)
            watched = Watched()
            await session.stage(await opaque(image), watched)
            assert not await session._is_uploading(0)
            first = next(done for phase, done, _ in watched.seen if phase is Phase.WRITE)
            assert first * 10 >= 9 * len(image), "the last session did not go on where the device was"

    asyncio.run(run())
    assert zephyr.slot(1, len(image)) == image and zephyr.boots == 1
    # base64 and frames: 127 bytes of line for 93 of a message, of which a tenth is header and CBOR
    wire = len(image) * 127 / 93 * 1.1
    assert len(zephyr.tap) < wire + 9 * 4 * 800 + 10 * 1500, "more was sent again than was on its way"


@pytest.mark.slow
def test_a_power_cut_at_every_tenth_leaves_the_old_image_running(zephyr: Zephyr) -> None:
    """The device forgets its offset; it runs what it ran, and the upload begins anew, and ends."""
    image = signed("1.0.0", body=bytes(range(256)) * 48)
    forgotten: list[int] = []

    async def work(session: SmpSession) -> None:
        old = await active(session)
        for tenth in range(1, 10):
            zephyr.cut_power()
            await until_it_answers(session)
            assert await active(session) == old
            staging = asyncio.ensure_future(session.stage(await opaque(image), watched := Watched()))
            while watched.bytes_of(Phase.WRITE) * 10 < tenth * len(image):
                await asyncio.sleep(0.002)
                assert not staging.done()
            before = zephyr.boots
            zephyr.cut_power()
            assert zephyr.boots == before + 1, "the cut did not fire"
            # nobody tells the session: it notices, and goes on where the device is
            await staging
            forgotten.append(sum(1 for phase, done, _ in watched.seen if phase is Phase.WRITE and done == 0))
            assert identifies_as(image) in [slot.runs for slot in (await session.slots()).slots]
            assert zephyr.slot(1, len(image)) == image
            if tenth < 9:
                await erase(session)

    async def erase(session: SmpSession) -> None:
        await session._client.ask(smp.ERASE, {})
        assert (await session.slots()).slots[1].runs == ""

    on(zephyr, work, answer_s=0.4, quiet_s=0.1)
    assert len(forgotten) == 9 and min(forgotten) >= 1, "the device did not forget"


@pytest.mark.parametrize(
    ("pattern", "end", "runs"),
    [("^2[.]", State.SUCCEEDED, "2.0.0"), ("^9[.]", State.REVERTED, FACTORY_VERSION)],
    ids=["healthy", "not healthy"],
)
def test_a_release_goes_all_the_way(
    zephyr: Zephyr, tmp_path: Path, pattern: str, end: State, runs: str
) -> None:
    """Through the engine: trust, fetch, upload, trial boot, health check, confirmation or the way back."""
    health = HealthSettings(kind="property", query="image.version", pattern=pattern, timeout_s=3)
    node = Node(tmp_path / "node", zephyr.port, {"2.0.0": signed("2.0.0")}, health, REAL)
    job = asyncio.run(node.deploy("2.0.0"))
    assert (job.state, job.reason) == (end, None if end is State.SUCCEEDED else Reason.HEALTH_FAILED), (
        job.detail
    )
    assert job.trial_boots == 1

    async def work(session: SmpSession) -> None:
        assert (await session.identify()).detail["slot 0"].startswith(f"{runs} ")
        assert (await session.slots()).slots[0].confirmed

    zephyr.cut_power()
    on(zephyr, work)


@pytest.mark.slow
def test_a_bad_line_costs_time_and_nothing_else(zephyr: Zephyr, tmp_path: Path) -> None:
    """One byte in 4,000 is lost, doubled, flipped or added, both ways, from the first to the last."""
    zephyr.to_device, zephyr.from_device = BadWire(1, 4000), BadWire(2, 4000)
    node = Node(tmp_path / "node", zephyr.port, {"2.0.0": signed("2.0.0")}, None, {**REAL, "answer_s": 0.3})
    job = asyncio.run(node.deploy("2.0.0", 120))
    assert job.state is State.SUCCEEDED, job.detail
    assert zephyr.to_device.hits > 3 and job.trial_boots == 1
    assert zephyr.slot(0, len(signed("2.0.0"))) == signed("2.0.0")


@pytest.mark.slow
def test_a_device_that_hangs_in_its_trial_comes_back_with_the_old_image(
    zephyr: Zephyr, tmp_path: Path
) -> None:
    """Nobody answers after the trial boot; somebody switches it off and on, and the job ends with its reason."""
    node = Node(tmp_path / "node", zephyr.port, {"2.0.0": signed("2.0.0")}, None, REAL)

    async def run() -> None:
        async with node.life() as life:
            await life.want("dev-1", "fw@2.0.0")
            while zephyr.boots < 2 or not zephyr.is_up:
                await asyncio.sleep(0.005)
            # before the session says its first word to it
            zephyr.hang()
            await asyncio.sleep(3)
            zephyr.cut_power()
            job = await life.ended("dev-1", 60)
        assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_REVERTED), job.detail
        assert job.trial_boots == 1

    asyncio.run(run())
    assert zephyr.slot(0, 512) == zephyr_kit.factory_flash()[SLOTS[0] :][:512]


@pytest.mark.parametrize(
    ("machine", "framing", "buffer_bytes"),
    [(MPS2_CONSOLE, "console", 2048), (MPS2_RAW, "raw", 384)],
    ids=["console", "raw"],
)
def test_another_board_with_larger_buffers_and_without_a_console(
    tmp_path: Path, machine: Machine, framing: str, buffer_bytes: int
) -> None:
    image = signed("1.0.0", body=bytes(range(256)) * 64)

    async def work(session: SmpSession) -> None:
        identity = await session.identify()
        assert identity.hardware_id == "smp:mps2/an385"
        assert identity.detail["buffers"] == f"4 of {buffer_bytes} bytes"
        old = await active(session)
        await session.stage(await opaque(image), Watched())
        assert [slot.runs for slot in (await session.slots()).slots] == [old, identifies_as(image)]

    with Zephyr(tmp_path, machine=machine) as board:
        on(board, work, framing=framing, settings={"app/none": {}})


def test_a_real_settings_group_takes_what_it_can_and_says_what_it_cannot(tmp_path: Path) -> None:
    """This application has the group and not one setting, and nothing to save them in."""

    async def work(session: SmpSession) -> None:
        for name, says in [("app/none", "ROOT_KEY_NOT_FOUND"), ("a" * 80, "KEY_TOO_LONG")]:
            with pytest.raises(Permanent) as caught:
                await session.apply(Desired(f"setting.{name}", "x", 1))
            assert caught.value.reason is Reason.DEVICE_ERROR and says in caught.value.detail
            assert "write settings/0" in caught.value.detail
        for after in (smp.COMMIT_SETTINGS, smp.SAVE_SETTINGS):
            await session._if_offered(after)
        with pytest.raises(smp.ErrorAnswer) as refused:
            await session._client.ask(smp.SAVE_SETTINGS)
        assert refused.value.name == "SAVE_NOT_SUPPORTED"
        assert [one.name for one in await session._poll() if one.name.startswith("setting.")] == []

    with Zephyr(tmp_path, machine=MPS2_CONSOLE) as board:
        on(board, work, settings={"app/none": {}, "a" * 80: {}})


@pytest.mark.parametrize(
    ("machine", "framing", "recovery"),
    [(MPS2_RAW_AND_COBS, "raw", "cobs"), (MPS2_RAW, "raw", "raw"), (MPS2_CONSOLE, "console", "console")],
    ids=["cobs", "raw", "console"],
)
def test_a_boot_loader_in_serial_recovery_is_recognised_and_left_alone(
    tmp_path: Path, machine: Machine, framing: str, recovery: str
) -> None:
    """The real one knows no slot that runs, and would take any image in place of its only one."""

    async def into_recovery(session: SmpSession) -> None:
        await session._client.is_told(smp.RESET, {"boot_mode": 1})
        await asyncio.sleep(2)

    async def work(session: SmpSession) -> None:
        identity = await session.identify()
        assert identity.detail["framing"] == recovery and "active" not in identity.detail["slot 0"]
        sent = len(board.tap)
        with pytest.raises(Permanent) as caught:
            await session.stage(await opaque(signed("1.0.0")), Watched())
        assert caught.value.reason is Reason.UNSUPPORTED and "serial recovery" in caught.value.detail
        assert not await session._tells_of_itself()
        assert len(board.tap) - sent < 400

    with Zephyr(tmp_path, machine=machine) as board:
        on(board, into_recovery, framing=framing)
        on(board, work, framing=recovery)


@pytest.mark.parametrize(
    ("machine", "framing"),
    [(MPS2_CONSOLE, "console"), (MPS2_RAW, "raw")],
    ids=["console", "raw"],
)
def test_a_probe_finds_each_framing_and_wedges_nothing(
    tmp_path: Path, machine: Machine, framing: str
) -> None:
    probe = MAPPERS["uart-smp"].probe
    assert probe is not None

    async def ask(board: Zephyr) -> None:
        for _ in range(2):
            found = await probe(f"serial:{board.port}", device_env("probe", LinkPool(LINKS)))
            assert found is not None and found.detail["framing"] == framing

    with Zephyr(tmp_path, machine=machine) as board:
        asyncio.run(asyncio.sleep(2))
        asyncio.run(ask(board))
