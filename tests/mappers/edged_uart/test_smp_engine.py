"""Releases through the engine onto devices that speak SMP: how jobs end, and cuts of the power on both sides."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import attrs
import pytest
from engine_kit import Publisher, at_once, check_store, through_cuts, until_cut
from smp_kit import BODY_BYTES, BRISK, FACTORY, IN_VAIN_S, SECOND, THIRD, VERSION_IS, Node, identifies_as
from smp_server import HANGS, DirectXip, SmpServer, body_of, make_image, read_image

from edged.config import HealthSettings, examine
from edged.domain.job import Job, State
from edged.domain.reasons import exit_code
from edged.domain.reconcile import FIRMWARE
from edged.errors import Reason
from edged.plugins import discover
from edged.store import twins
from edged.testing.faults import Faults, When
from edged.testing.node import life

ROOT = Path(__file__).parents[3]
KEY = b"the key of the factory"
NOT_WELL = attrs.evolve(VERSION_IS, timeout_s=IN_VAIN_S)
SMALL_BYTES = 1500
NEXT = make_image((2, 1, 0), body_of(BODY_BYTES, 4))
TRIED_AGAIN = 4 * 384
"""What may be on its way when the power goes: a window of the device's buffers."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SmpServer]:
    with SmpServer(tmp_path, FACTORY) as server:
        yield server


def test_a_release_is_uploaded_tried_and_confirmed(tmp_path: Path, server: SmpServer) -> None:
    node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS)
    job = asyncio.run(node.deploy("2.0.0"))
    assert (job.state, job.reason, job.trial_boots) == (State.SUCCEEDED, None, 1), job.detail
    assert server.runs == "2.0.0" and server.confirmed and not server.pending
    assert server.counts.stored == len(SECOND) and server.counts.boots == 2
    # deployed again it is not sent again
    again = asyncio.run(node.deploy("2.0.0"))
    assert again.state is State.SUCCEEDED and server.counts.stored == len(SECOND)


@pytest.mark.parametrize(
    ("image", "keys", "end", "reason"),
    [
        (make_image((3, 0, 0), body_of(4000, 3), key=b"unknown"), (KEY,), State.FAILED, Reason.VERIFY_FAILED),
        (make_image((3, 0, 0), body_of(4000, 3)), (), State.REVERTED, Reason.HEALTH_FAILED),
    ],
    ids=["unknown key", "not healthy"],
)
def test_how_a_job_ends_that_does_not_succeed(
    tmp_path: Path, image: bytes, keys: tuple[bytes, ...], end: State, reason: Reason
) -> None:
    factory = make_image((1, 0, 0), body_of(BODY_BYTES, 1), key=KEY)
    with SmpServer(tmp_path, factory, keys=keys) as server:
        node = Node(tmp_path / "node", server.port, {"3.0.0": image}, NOT_WELL)
        job = asyncio.run(node.deploy("3.0.0"))
        assert (job.state, job.reason) == (end, reason), job.detail
        assert server.runs == "1.0.0" and server.confirmed and not server.pending
        assert server.counts.trial_boots == (1 if end is State.REVERTED else 0)
        assert reason is not Reason.VERIFY_FAILED or "key that the device does not know" in job.detail


def test_an_image_that_is_none_is_refused_before_a_byte_is_sent(tmp_path: Path, server: SmpServer) -> None:
    """Signed as it is by a publisher who did not say what it is."""
    node = Node(tmp_path / "node", server.port, {})
    node.publisher.add(
        "4.0.0", b"\x7fELF" + body_of(4000, 4), name="fw", models=("node",), protocol="smp", format="opaque"
    )
    node.publisher.publish()
    job = asyncio.run(node.deploy("4.0.0"))
    assert (job.state, job.reason) == (State.FAILED, Reason.IMAGE_INVALID), job.detail
    assert exit_code(job.reason) == 3 and server.counts.stored == server.counts.erases == 0


@pytest.mark.parametrize("cut", [False, True], ids=["at once", "after a restart of the node"])
def test_a_key_that_is_not_known_ends_failed_also_where_nobody_remembers_the_upload(
    tmp_path: Path, cut: bool
) -> None:
    bad = make_image((3, 0, 0), body_of(4000, 3), key=b"unknown")
    factory = make_image((1, 0, 0), body_of(BODY_BYTES, 1), key=KEY)
    with SmpServer(tmp_path, factory, keys=(KEY,)) as server:
        node = Node(tmp_path / "node", server.port, {"3.0.0": bad}, VERSION_IS)

        async def cut_short() -> None:
            async with node.life() as life:
                await life.want("dev-1", "fw@3.0.0")
                while server.counts.boots < 2:
                    await asyncio.sleep(0.001)

        async def ended() -> Job:
            async with node.life() as life:
                return await life.ended("dev-1")

        if cut:
            asyncio.run(cut_short())
            job = asyncio.run(ended())
        else:
            job = asyncio.run(node.deploy("3.0.0"))
        assert (job.state, job.reason) == (State.FAILED, Reason.VERIFY_FAILED), job.detail
        assert server.runs == "1.0.0" and server.counts.trial_boots == 0


def test_a_device_that_would_keep_the_image_without_a_trial_is_left_alone_to_the_end(tmp_path: Path) -> None:
    """It is told to try, and marks for good: the way back must not be what boots it."""
    with SmpServer(tmp_path, FACTORY) as server:
        normal = server._set_pending
        server._set_pending = lambda permanent: normal(True)  # type: ignore[method-assign]
        node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS)
        job = asyncio.run(node.deploy("2.0.0"))
        assert (job.state, job.reason) == (State.FAILED, Reason.REVERT_FAILED), job.detail
        assert "for good" in job.detail and server.runs == "1.0.0" and server.counts.boots == 1


def test_a_server_that_tells_only_what_is_true(tmp_path: Path, server: SmpServer) -> None:
    """As one built with CONFIG_MCUMGR_GRP_IMG_FRUGAL_LIST: neither flags that are false, nor a status of 0."""

    def frugal(body: dict[str, Any]) -> dict[str, Any]:
        return {
            "images": [{k: v for k, v in one.items() if v is not False} for one in normal(body)["images"]]
        }

    normal = server._do_1_0_r
    server._do_1_0_r = frugal  # type: ignore[method-assign]
    images = {"2.0.0": SECOND, "3.0.0": THIRD}
    node = Node(tmp_path / "node", server.port, images, VERSION_IS)
    job = asyncio.run(node.deploy("2.0.0"))
    assert job.state is State.SUCCEEDED and server.confirmed, job.detail
    node.health = NOT_WELL
    job = asyncio.run(node.deploy("3.0.0"))
    assert (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED), job.detail
    assert server.runs == "2.0.0" and server.confirmed


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
@pytest.mark.parametrize("pending", [False, True])
def test_a_device_with_one_image_in_both_slots(
    tmp_path: Path, server: SmpServer, version: str, pending: bool
) -> None:
    server.slots[1][: len(FACTORY)] = FACTORY
    server.pending = pending
    health = attrs.evolve(IS_THE_OLD, pattern=f"^{version}")
    node = Node(tmp_path / "node", server.port, {"1.0.0": FACTORY, "2.0.0": SECOND}, health)
    job = asyncio.run(node.deploy(version))
    assert job.state is State.SUCCEEDED and server.runs == version, job.detail
    assert server.confirmed and not server.pending


IS_THE_OLD = attrs.evolve(VERSION_IS, pattern="^1")


def test_a_wish_for_what_runs_is_not_fulfilled_while_the_next_reset_boots_another_image(
    tmp_path: Path, server: SmpServer
) -> None:
    server.slots[1][: len(THIRD)] = THIRD
    server.pending = True
    node = Node(tmp_path / "node", server.port, {"1.0.0": FACTORY}, IS_THE_OLD)
    job = asyncio.run(node.deploy("1.0.0"))
    assert job.state is State.SUCCEEDED and not server.pending
    server.power()
    assert server.runs == "1.0.0" and server.confirmed


@pytest.mark.parametrize("answer", range(1, 13))
@pytest.mark.parametrize("what", ["key", "hash", "mode"])
def test_one_bit_that_is_turned_in_an_answer_ends_no_job(tmp_path: Path, what: str, answer: int) -> None:
    """Raw framing has no checksum."""
    told = 0

    def turned(op: int, group: int, number: int, body: dict[str, Any]) -> Any:
        nonlocal told
        found = normal(op, group, number, body)
        if not isinstance(found, dict) or (op, group, number) != ((0, 0, 8) if what == "mode" else (0, 1, 0)):
            return found
        told += 1
        return _turned(found, what) if told == answer else found

    with SmpServer(tmp_path, FACTORY, framing="raw") as server:
        normal = server._do
        server._do = turned  # type: ignore[method-assign]
        node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS, config={"framing": "raw"})
        job = asyncio.run(node.deploy("2.0.0"))
        assert job.state is State.SUCCEEDED and server.confirmed and server.runs == "2.0.0", job.detail
        assert told >= answer or what == "mode"


def _turned(answer: dict[str, Any], what: str) -> dict[str, Any]:
    if what == "mode":
        return answer | {"mode": 0}
    images = answer["images"]
    if what == "key":
        return answer | {
            "images": [{k.replace("active", "actiwe"): v for k, v in one.items()} for one in images]
        }
    return answer | {
        "images": [one | {"hash": bytes([one["hash"][0] ^ 1]) + one["hash"][1:]} for one in images]
    }


@pytest.mark.parametrize("asked", range(2, 6))
def test_an_image_that_others_mark_before_the_confirmation_does_not_stay_pending(
    tmp_path: Path, server: SmpServer, asked: int
) -> None:
    """Between any two looks at the state of what runs already."""
    looks = 0

    def mark(group: int, number: int, body: dict[str, Any]) -> bool:
        nonlocal looks
        looks += (group, number) == (1, 0)
        server.pending |= looks == asked
        return True

    server.slots[1][: len(THIRD)] = THIRD
    node = Node(tmp_path / "node", server.port, {"1.0.0": FACTORY}, IS_THE_OLD)
    server.on_request = mark
    job = asyncio.run(node.deploy("1.0.0"))
    assert job.state is State.SUCCEEDED and looks >= asked and not server.pending
    server.power()
    assert server.runs == "1.0.0" and server.confirmed


def test_what_somebody_else_put_into_the_slot_while_the_node_was_off_is_not_booted(
    tmp_path: Path, server: SmpServer
) -> None:
    node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS)
    booted: list[str] = []
    swap = server._swap

    def watched() -> None:
        swap()
        booted.append(server.runs)

    async def cut_short() -> None:
        async with node.life() as life:
            await life.want("dev-1", "fw@2.0.0")
            while not (jobs := await life.jobs("dev-1")) or jobs[0].state is not State.ACTIVATING:
                await asyncio.sleep(0)

    async def ended() -> Job:
        async with node.life() as life:
            return await life.ended("dev-1")

    server.on_request = lambda group, number, body: "hash" not in body
    asyncio.run(cut_short())
    server.on_request, server._swap = None, watched  # type: ignore[method-assign]
    server._erase()
    server.slots[1][: len(THIRD)] = THIRD
    job = asyncio.run(ended())
    assert job.state is State.SUCCEEDED and booted == ["2.0.0"], job.detail


@pytest.mark.parametrize(
    ("crashes", "pattern", "end"),
    [
        (False, "^2", (State.SUCCEEDED, None)),
        (False, "^9", (State.REVERTED, Reason.HEALTH_FAILED)),
        (True, "^2", (State.REVERTED, Reason.DEVICE_REVERTED)),
    ],
    ids=["good", "not healthy", "crashes"],
)
def test_direct_xip_with_revert(
    tmp_path: Path, crashes: bool, pattern: str, end: tuple[State, Reason | None]
) -> None:
    """The second update goes to the first slot. What does not get through its trial is in no slot afterwards."""
    health = attrs.evolve(VERSION_IS if end[0] is State.SUCCEEDED else NOT_WELL, pattern=pattern)
    with DirectXip(tmp_path, FACTORY, crashes=crashes) as server:
        node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND, "2.1.0": NEXT}, health)
        job = asyncio.run(node.deploy("2.0.0"))
        assert (job.state, job.reason, server.counts.trial_boots) == (*end, 1), job.detail
        if end[0] is State.SUCCEEDED:
            job = asyncio.run(node.deploy("2.1.0"))
            assert job.state is State.SUCCEEDED and server.counts.trial_boots == 2, job.detail
            assert server.runs == "2.1.0" and read_image(bytes(server.slots[0])) is not None
        else:
            assert server.runs == "1.0.0" and read_image(bytes(server.slots[1])) is None
        assert server.confirmed and not server.pending


@pytest.mark.parametrize("watched", [True, False])
def test_a_device_that_hangs_in_its_trial_is_left_by_its_watchdog(
    tmp_path: Path, server: SmpServer, watched: bool
) -> None:
    hanging = make_image((6, 6, 6), HANGS + body_of(4000, 6))
    node = Node(
        tmp_path / "node",
        server.port,
        {"6.6.6": hanging},
        # it is waited for until the watchdog has left it: given up before, it would be tried once more
        config={"boot_s": 20, "answer_s": 0.3},
        watch=watched,
    )

    async def run() -> Job:
        async with node.life() as life:
            await life.want("dev-1", "fw@6.6.6")
            while server.counts.trial_boots < 1:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            server.power()
            return await life.ended("dev-1")

    job = asyncio.run(run())
    assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_REVERTED), job.detail
    assert server.runs == "1.0.0" and server.counts.trial_boots == 1


def test_a_device_that_hangs_in_its_trial_is_reset_where_its_reset_is_wired(tmp_path: Path) -> None:
    """Nobody switches it off and on: edged pulses DTR, and its boot loader goes back."""
    hanging = make_image((6, 6, 6), HANGS + body_of(4000, 6))
    with SmpServer(tmp_path, FACTORY, resets_on_open=True) as server:
        config = {"boot_s": 2.5, "answer_s": 0.3, "reset": "dtr"}
        node = Node(tmp_path / "node", server.port, {"6.6.6": hanging}, config=config)
        job = asyncio.run(node.deploy("6.6.6"))
        assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_REVERTED), job.detail
        assert server.runs == "1.0.0" and server.counts.trial_boots == 1 and server.confirmed


def test_properties_reach_the_twin_and_wishes_the_device(tmp_path: Path) -> None:
    config = {"settings": {"app/interval": {"type": "uint32", "unit": "s"}}, "poll_s": 0.2}
    with SmpServer(
        tmp_path, FACTORY, settings={"app/interval": (5).to_bytes(4, "little")}, statistics={"net": {"rx": 3}}
    ) as server:
        node = Node(tmp_path / "node", server.port, {}, config=config, watch=True)

        async def run() -> None:
            async with node.life() as life, asyncio.timeout(20):
                for name, value in [
                    ("image.version", "1.0.0"),
                    ("stat.net.rx", 3),
                    ("setting.app/interval", 5),
                ]:
                    while await life.reported("dev-1", name) != value:
                        await asyncio.sleep(0.02)
                await life.store.write(
                    lambda tx: twins.set_desired(tx, "dev-1", "setting.app/interval", 60, "operator")
                )
                life.sessions["dev-1"].refresh()
                while await life.reported("dev-1", "setting.app/interval") != 60:
                    await asyncio.sleep(0.02)

        asyncio.run(run())
        assert server.saved["app/interval"] == (60).to_bytes(4, "little")


def test_the_configuration_of_the_page_works(tmp_path: Path) -> None:
    """As it stands there, but for the port."""
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "smp.md").read_text(), re.DOTALL)
    publisher = Publisher(tmp_path / "publisher")
    publisher.base.mkdir()
    publisher.init().add("2.0.0", SECOND, name="fw", models=("sensor",), protocol="smp")
    publisher.publish()
    (tmp_path / "edged.toml").write_text(
        f'[node]\nid = "n"\nstate_dir = "{tmp_path}/state"\n'
        f'[trust]\nrepository = "{publisher.repo}"\nroot = "{publisher.root}"\n'
    )
    with SmpServer(tmp_path, FACTORY, settings={"app/state": b"ready", "app/interval": bytes(4)}) as server:
        for block in blocks:
            (file,) = re.findall(r"/etc/edged/(\S+)", block)
            (tmp_path / file).parent.mkdir()
            (tmp_path / file).write_text(re.sub(r'"serial:by-id/[^"]*"', f'"serial:{server.port}"', block))
        found = examine(tmp_path / "edged.toml")
        assert not found.problems
        brisk = attrs.evolve(found.config, device=tuple(
            attrs.evolve(one, config={**one.config, **BRISK}) for one in found.config.device
        ))  # fmt: skip

        async def run() -> Job:
            async with life(brisk, discover()) as node:
                await node.want("sensor-1", "fw@2.0.0")
                return await node.ended("sensor-1")

        job = asyncio.run(run())
        assert job.state is State.SUCCEEDED, job.detail
        assert job.detail == "ready" and server.runs == "2.0.0" and server.confirmed


# -- the sweep: cuts of the power of node and device, at every lasting effect


class World:
    """One device and one node's folder, over as many lives as it takes.

    A cut at an effect of the node is a cut of the node's power, one at an effect of the device of the device's power too.
    """

    def __init__(self, node: Node, server: SmpServer, healthy: bool) -> None:
        self.server = server
        self.node = node
        self.healthy = healthy
        self.cuts: list[str] = []
        self.left = False

    def live(self, faults: Faults) -> Job | None:
        """One life of node and device; the ended job, or None where the power was cut."""
        if not self.cuts or self.cuts[-1].startswith("device."):
            self.server.power(faults)
        else:
            self.server.effects = faults
        job = until_cut(self._live(faults), faults)
        if faults.fired:
            self.cuts.append(faults.fired)
            # a device that loses its power in its trial goes back by itself
            self.left |= faults.fired.startswith("device.") and not self.server.confirmed
        return job

    async def _live(self, faults: Faults) -> Job:
        async with self.node.life(faults) as node:
            twin = await node.store.read(lambda tx: twins.get(tx, "dev-1"))
            if FIRMWARE not in twin.desired:
                await node.want("dev-1", "fw@2.0.0" if self.healthy else "fw@3.0.0")
            return await node.ended("dev-1")

    def check(self, job: Job) -> None:
        server, outcome = self.server, (job.state, job.reason)
        bad = (State.REVERTED, Reason.HEALTH_FAILED)
        left = (State.REVERTED, Reason.DEVICE_REVERTED)
        good = (State.SUCCEEDED, None)
        allowed = [good if self.healthy else bad, *([left] if self.left else [])]
        assert outcome in allowed, f"{outcome}: {job.detail}; cut at {self.cuts}"
        assert server.runs == ("2.0.0" if outcome == good else "1.0.0")
        assert server.confirmed and not server.pending
        # a device that was off has forgotten how far it was
        off = sum(cut.startswith("device.") for cut in self.cuts)
        assert server.counts.stored <= (1 + off) * len(SECOND) + len(self.cuts) * TRIED_AGAIN
        assert server.counts.trial_boots <= 1 + len(self.cuts)
        asyncio.run(self._check_store(int(outcome == good)))

    async def _check_store(self, floor: int) -> None:
        async with self.node.life() as node:
            await check_store(node, "dev-1", floor)


@pytest.fixture(scope="module")
def two_releases(tmp_path_factory: pytest.TempPathFactory) -> Node:
    """2.0.0, which is healthy, and 3.0.0, which is not; to be put on a port of its own."""
    images = {
        version: make_image((int(version[0]), 0, 0), body_of(SMALL_BYTES, 5))
        for version in ("2.0.0", "3.0.0")
    }
    config: dict[str, object] = {"answer_s": 0.05, "quiet_s": 0.02, "boot_s": 2}
    return Node(tmp_path_factory.mktemp("releases"), "/dev/null", images, config=config)


def scene(folder: Path, releases: Node, healthy: bool) -> World:
    folder.mkdir(exist_ok=True)
    server = SmpServer(folder, FACTORY, boot_s=0.01, reset_s=0.0)
    node = copy(releases)
    node.folder, node.port = folder, server.port
    node.health = VERSION_IS if healthy else attrs.evolve(NOT_WELL, timeout_s=0.2)
    return World(node, server, healthy)


@pytest.mark.parametrize("seed", range(8))
def test_several_cuts_in_a_row(tmp_path: Path, two_releases: Node, seed: int) -> None:
    """Up to four cuts, early ones and late ones, also while it goes back."""
    dice = random.Random(seed)
    world = scene(tmp_path, two_releases, dice.random() < 0.6)
    with world.server:
        through_cuts(
            world, (Faults(dice.randint(2, 30), dice.choice(list(When))) for _ in range(dice.randint(2, 4)))
        )
        assert world.cuts


@pytest.mark.parametrize("stays_well", [True, False], ids=["both confirm themselves", "the bad one does"])
def test_an_application_that_confirms_itself_and_is_not_well_is_left_at_whatever_cut(
    tmp_path: Path, two_releases: Node, stays_well: bool
) -> None:
    """The boot loader does not go back then: the one before is booted, and confirmed. At every effect since the first boot."""

    def confirms_itself(world: World) -> World:
        def swap() -> None:
            normal()
            server.confirmed |= stays_well or server.runs == "3.0.0"

        server, normal = world.server, world.server._swap
        server._swap = swap  # type: ignore[method-assign]
        return world

    whole, counting = confirms_itself(scene(tmp_path / "whole", two_releases, False)), Faults()
    with whole.server:
        job = whole.live(counting)
        assert job is not None and (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED)
        assert whole.server.runs == "1.0.0" and whole.server.confirmed

    def fires(number: int) -> str:
        world = confirms_itself(scene(tmp_path / f"cut-{number}", two_releases, False))
        with world.server as server:
            cut = Faults(number, list(When)[number % len(When)])
            job = world.live(cut) or world.live(Faults())
            assert job is not None and job.state is State.REVERTED, f"{job}; cut at {world.cuts}"
            assert server.runs == "1.0.0" and server.confirmed and not server.pending, world.cuts
        return cut.fired

    names = counting.names
    first = names.index("device.pending") + 1
    assert names[first:].count("device.pending") == 1, "the way back is marked"
    assert any(at_once(fires, range(first, len(names) + 1)))


@pytest.mark.slow
@pytest.mark.parametrize("healthy", [True, False], ids=["good", "bad"])
def test_one_cut_at_every_effect(tmp_path: Path, two_releases: Node, healthy: bool) -> None:
    whole = scene(tmp_path / "whole", two_releases, healthy)
    counting = Faults()
    with whole.server:
        job = whole.live(counting)
        assert job is not None
        whole.check(job)
    names = counting.names
    assert {"store.commit", "device.erase", "device.page", "device.pending", "device.boot"} <= set(names)

    def fires(number: int) -> str:
        world = scene(tmp_path / f"cut-{number}", two_releases, healthy)
        with world.server:
            effect = names[number - 1]
            cut = Faults(names[:number].count(effect), list(When)[number % len(When)], effect)
            job = world.live(cut) or world.live(Faults())
            assert job is not None
            world.check(job)
        return cut.fired

    fired = at_once(fires, range(1, len(names) + 1))
    # checkpoints are due by the clock: now and then there is one less
    assert fired.count("") <= 3 and set(fired) - {""} == set(names)


@pytest.mark.parametrize("tenth", range(1, 10))
def test_the_node_dies_at_every_tenth_of_the_upload(tmp_path: Path, server: SmpServer, tenth: int) -> None:
    """The device stays on: the next life goes on at its offset, and sends again what was on its way at most."""
    node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, VERSION_IS)

    async def killed() -> None:
        async with node.life() as life:
            await life.want("dev-1", "fw@2.0.0")
            while server.counts.stored * 10 < tenth * len(SECOND):
                await asyncio.sleep(0.0005)

    asyncio.run(killed())
    sent_before = len(server.received)
    assert server.runs == "1.0.0" and not server.pending

    async def next_life() -> Job:
        async with node.life() as life:
            return await life.ended("dev-1")

    job = asyncio.run(next_life())
    assert job.state is State.SUCCEEDED and server.runs == "2.0.0"
    assert server.counts.stored == len(SECOND), "image bytes were stored twice"
    assert server.counts.erases == 1 and server.counts.trial_boots == 1
    assert identifies_as(SECOND) == identifies_as(bytes(server.slots[0][: len(SECOND)]))
    assert sent_before > 0


def test_an_unhealthy_pattern_is_told_with_what_was_seen(tmp_path: Path, server: SmpServer) -> None:
    health = HealthSettings(kind="property", query="image.hash", pattern="^{identifies_as}x$", timeout_s=0.3)
    node = Node(tmp_path / "node", server.port, {"2.0.0": SECOND}, health)
    job = asyncio.run(node.deploy("2.0.0"))
    assert (job.state, job.reason) == (State.REVERTED, Reason.HEALTH_FAILED)
    assert identifies_as(SECOND) in job.detail
