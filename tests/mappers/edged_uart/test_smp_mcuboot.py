"""A real MCUboot that checks signatures: what it lets run, what it throws away, and cuts of the power while it swaps."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from nrf52_kit import (
    SLOTS,
    McubootServer,
    boot,
    factory_flash,
    first_image,
    resigned,
    runs,
    second_image,
    signed_with_another_key,
    with_pending,
)
from smp_kit import IN_VAIN_S, Node, identifies_as

from edged.config import HealthSettings
from edged.domain.job import Job, State
from edged.errors import Reason
from edged_firmware.formats import mcuboot

PATIENT: Final[dict[str, object]] = {"boot_s": 50, "answer_s": 1}
"""A boot with a swap takes seconds of the simulated processor."""
SWAP_CHANGES: Final = 144_675
REFUSED: Final = "Image in the secondary slot is not valid!"


def hash_is(image: bytes, timeout_s: float = 20) -> HealthSettings:
    return HealthSettings(
        kind="property", query="image.hash", pattern=f"^{identifies_as(image)}$", timeout_s=timeout_s
    )


def not_well() -> HealthSettings:
    return hash_is(first_image(), IN_VAIN_S)


def deployed(folder: Path, server: McubootServer, image: bytes, health: HealthSettings) -> Job:
    """Through the engine: trust, fetch, upload, trial boot, health check, confirmation or the way back."""
    node = Node(folder / "node", server.port, {"2.0.0": image}, health, PATIENT)
    return asyncio.run(node.deploy("2.0.0", 120))


def test_an_image_with_the_known_key_is_tried_and_stays_once_it_is_confirmed(tmp_path: Path) -> None:
    with McubootServer(tmp_path) as server:
        job = deployed(tmp_path, server, second_image(), hash_is(second_image()))
        assert (job.state, job.reason, job.trial_boots) == (State.SUCCEEDED, None, 1), job.detail
        assert "Swap type: test" in server.boots[-1].said
        for _ in range(2):
            server.power()
            assert runs(server.flash) == second_image() and server.confirmed
            assert "Swap type: none" in server.boots[-1].said


def test_an_image_that_is_not_well_is_taken_back_by_the_boot_loader(tmp_path: Path) -> None:
    with McubootServer(tmp_path) as server:
        job = deployed(tmp_path, server, second_image(), not_well())
        assert (job.state, job.reason, job.trial_boots) == (State.REVERTED, Reason.HEALTH_FAILED, 1), (
            job.detail
        )
        assert "Swap type: revert" in server.boots[-1].said
        assert runs(server.flash) == first_image() and server.confirmed


@pytest.mark.slow
def test_a_device_that_loses_its_power_in_its_trial_goes_back_by_itself(tmp_path: Path) -> None:
    """At the moment at which edged tells it to keep the image."""
    with McubootServer(tmp_path) as server:

        def off_at_confirm(group: int, number: int, body: dict[str, Any]) -> bool:
            if (group, number, body.get("confirm")) == (1, 0, True):
                server.on_request = None
                server.power()
                return False
            return True

        server.on_request = off_at_confirm
        job = deployed(tmp_path, server, second_image(), hash_is(second_image()))
        assert server.on_request is None, "the cut did not fire"
        assert (job.state, job.reason, job.trial_boots) == (State.REVERTED, Reason.DEVICE_REVERTED, 1), (
            job.detail
        )
        assert "Swap type: revert" in server.boots[-1].said and runs(server.flash) == first_image()


def test_one_flipped_bit_in_the_slot_never_boots(tmp_path: Path) -> None:
    with McubootServer(tmp_path) as server:

        def flips_at_reset(group: int, number: int, body: dict[str, Any]) -> bool:
            if (group, number) == (0, 5):
                server.on_request = None
                server.slots[1][0x5000] ^= 1
            return True

        server.on_request = flips_at_reset
        job = deployed(tmp_path, server, second_image(), hash_is(second_image()))
        assert server.on_request is None, "the bit was not flipped"
        check_thrown_away(server, job, second_image())


def with_the_known_keys_hash(image: bytes) -> bytes:
    """It names the key that the device knows, which did not sign it."""
    named, known = mcuboot.parse(image).key_hash, mcuboot.parse(second_image()).key_hash
    assert named is not None and known is not None and image.count(named) == 1
    return image.replace(named, known)


@pytest.mark.parametrize(
    "make",
    [
        signed_with_another_key,
        lambda folder: with_the_known_keys_hash(signed_with_another_key(folder)),
        lambda folder: resigned(),
    ],
    ids=["unknown key", "forged name of the key", "no signature"],
)
def test_a_key_that_the_device_does_not_know_never_boots(
    tmp_path: Path, make: Callable[[Path], bytes]
) -> None:
    """What is in it is, byte for byte, what boots with the right key."""
    image = make(tmp_path)
    assert identifies_as(image) == identifies_as(second_image()) and image != second_image()
    with McubootServer(tmp_path) as server:
        job = deployed(tmp_path, server, image, hash_is(image))
        assert "signed with a key that the device does not know" in job.detail
        check_thrown_away(server, job, image)


def check_thrown_away(server: McubootServer, job: Job, image: bytes) -> None:
    assert (job.state, job.reason) == (State.FAILED, Reason.VERIFY_FAILED), job.detail
    assert server.counts.stored >= len(image) and server.counts.trial_boots == 0
    assert REFUSED in server.boots[-1].said
    assert server.flash == factory_flash(), "it has left something in the flash"
    server.power()
    assert server.boots[-1].changes == 0 and runs(server.flash) == first_image() and server.confirmed


@pytest.mark.parametrize("damaged_at", [0, 0x200, 0x20000], ids=["no image", "first byte", "in the middle"])
def test_nothing_starts_where_the_only_image_is_damaged(damaged_at: int) -> None:
    """So what was seen to start above did so because the boot loader has found it good."""
    at = SLOTS[0] + damaged_at
    flash = factory_flash()
    _, ended = boot(flash[:at] + bytes([flash[at] ^ 1]) + flash[at + 1 :])
    assert ended.end == "no image" and ended.changes == 0, ended


@pytest.mark.slow
@pytest.mark.parametrize("healthy", [True, False], ids=["good", "bad"])
def test_cuts_while_it_swaps_do_not_change_how_a_job_ends(tmp_path: Path, healthy: bool) -> None:
    cuts = {2: (1, SWAP_CHANGES // 3, SWAP_CHANGES // 2), 3: (SWAP_CHANGES // 5,)}
    with McubootServer(tmp_path, cuts=cuts) as server:
        job = deployed(tmp_path, server, second_image(), hash_is(second_image()) if healthy else not_well())
        ends = [ended.end for ended in server.boots]
        if healthy:
            assert (job.state, job.trial_boots) == (State.SUCCEEDED, 1), job.detail
            assert ends == ["application", "cut", "cut", "cut", "application"]
            assert runs(server.flash) == second_image()
        else:
            assert (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED), job.detail
            assert ends == ["application", "cut", "cut", "cut", "application", "cut", "application"]
            assert runs(server.flash) == first_image()
        assert server.confirmed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_a_cut_at_any_change_of_the_flash_leaves_the_old_image_or_the_new_one(seed: int) -> None:
    """Cut in the swap, cut again while it goes on, cut in the way back: what starts is whole, and in the end the old one."""
    dice = random.Random(seed)
    flash = with_pending(factory_flash(), second_image())
    for torn in (False, True):
        flash, ended = boot(flash, cut_at=dice.randint(1, SWAP_CHANGES * 2 // 5), torn=torn)
        assert ended.end == "cut"
    flash, ended = boot(flash)
    assert ended.end == "application" and runs(flash) == second_image(), ended
    flash, ended = boot(flash, cut_at=dice.randint(1, SWAP_CHANGES), torn=bool(seed % 2))
    assert ended.end == "cut"
    flash, ended = boot(flash)
    assert ended.end == "application" and runs(flash) == first_image(), ended
    assert flash[: SLOTS[0]] == factory_flash()[: SLOTS[0]], "it has changed itself"
