"""Jobs of the real engine on a controller: what it is sent, what it says afterwards, and how a job ends that cannot succeed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from can_kit import bus_name, connected, device, on_bus, quiet, secret, verified
from can_node import IMAGES, PATIENT, SIZES, Site, alive, published, reasons, settle, update
from engine_kit import Publisher
from uds_server import Controller, Negative, make_app

from edged.domain.job import Job, State
from edged.errors import Permanent, Reason, Refused
from edged.store import twins
from edged.testing.node import life


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    return published(tmp_path_factory.mktemp("ecu-releases"))


@pytest.fixture
def site(tmp_path: Path, releases: Publisher, monkeypatch: pytest.MonkeyPatch) -> Site:
    secret(monkeypatch, tmp_path)
    return Site(tmp_path / "state", releases)


def run(site: Site, controller: Controller, version: str) -> Job:
    async def body() -> Job:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            return await update(node, version)

    with alive(site, controller):
        return asyncio.run(body())


def holds(controller: Controller, version: str) -> bool:
    return all(controller.held(address, len(data)) == data for address, data in IMAGES[version])


@pytest.mark.parametrize("health", [False, True])
def test_a_good_release_is_written_and_runs(site: Site, health: bool) -> None:
    site.health = health
    controller = site.controller()
    job = run(site, controller, "2.0.0")
    assert job.state is State.SUCCEEDED, job.detail
    assert holds(controller, "2.0.0") and controller.runs == b"2.0.0"
    counts = controller.counts
    assert (counts.written, counts.downloads, counts.resets) == (1600, 2, 1)


def test_one_that_runs_already_is_not_written_again(site: Site) -> None:
    controller = site.controller()
    job = run(site, controller, "1.0.0")
    assert job.state is State.SUCCEEDED and controller.counts.written == controller.counts.erased == 0


def test_what_says_that_it_is_another_one_goes_back(site: Site) -> None:
    controller = site.controller()
    job = run(site, controller, "3.0.0")
    assert (job.state, job.reason) == (State.REVERTED, Reason.DEVICE_REVERTED)
    assert controller.runs == b"1.0.0" and holds(controller, "1.0.0")
    assert controller.counts.written == 2 * 1600


def test_one_that_stays_in_its_boot_loader_is_not_called_well(site: Site) -> None:
    site.table = {"answer_s": 1}
    controller = site.controller()

    async def body() -> Job:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            controller.never_boots = True
            return await update(node, "2.0.0")

    with alive(site, controller):
        job = asyncio.run(body())
    assert job.state in (State.REVERTED, State.FAILED) and job.reason is Reason.DEVICE_REVERTED


def test_a_boot_loader_that_lingers_is_waited_for(site: Site) -> None:
    site.table = {"boot_s": 10}
    controller = site.controller(lingers_s=1.2)
    job = run(site, controller, "2.0.0")
    assert job.state is State.SUCCEEDED, job.detail
    assert controller.counts.resets == 1


def test_a_controller_that_starts_anew_for_its_programming_session(site: Site) -> None:
    site.table = {"answer_s": 1}
    controller = site.controller(starts_anew_s=0.6)
    job = run(site, controller, "2.0.0")
    assert job.state is State.SUCCEEDED, job.detail
    assert controller.counts.seeds == 1, "the first try was not the one that succeeded"


@pytest.mark.parametrize("after_s", [0.005, 0.1, 0.3])
def test_a_controller_that_resets_some_time_after_its_answer(site: Site, after_s: float) -> None:
    """Until then it answers as it did: with the old version, or none."""
    site.table = {"settle_s": 0.5}
    controller = site.controller(resets_after_s=after_s)
    job = run(site, controller, "2.0.0")
    assert job.state is State.SUCCEEDED, job.detail
    assert controller.counts.resets == 1


def test_a_wrong_key_that_locks_the_device_is_not_tried_again(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret(monkeypatch, tmp_path, "hex:00000001")
    controller = site.controller()
    controller.tries = 2
    job = run(site, controller, "2.0.0")
    assert (job.state, job.reason, job.touched) == (State.FAILED, Reason.DEVICE_ERROR, False)
    assert "exceedNumberOfAttempts (0x36)" in job.detail
    assert controller.counts.wrong_keys == 1 and controller.counts.erased == 0


class Loader:
    """A wire to a controller that has a boot loader without a version, from its programming session on: until a second after it
    was told that the tester goes, or until nobody has asked it anything for two. ``deaf``: it is not told."""

    def __init__(self, controller: Controller, *, deaf: bool) -> None:
        self._controller = controller
        self._deaf = deaf
        self._is_in = False
        self.times = 0

    def __call__(self, way: str, frame: bytes) -> list[bytes]:
        now, asked = time.monotonic(), frame[1:3]
        if way == "out":
            return [frame]
        if asked == b"\x10\x02":
            self._is_in, self.times = True, self.times + 1
            self._controller.application_at = now + 2
        elif asked == b"\x11\x01" or now > self._controller.application_at:
            self._is_in = False
        elif self._is_in and asked == b"\x10\x01" and self._deaf:
            return []
        elif self._is_in:
            self._is_in = asked != b"\x10\x01"
            self._controller.application_at = now + (2 if self._is_in else 1)
        return [frame]


@pytest.mark.parametrize("deaf", [False, True])
def test_a_refused_preparation_leaves_the_record_of_what_runs(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaf: bool
) -> None:
    secret(monkeypatch, tmp_path, "hex:00000001")
    site.table, site.watch = {"answer_s": 0.5}, True
    controller = site.controller()
    loader = Loader(controller, deaf=deaf)

    async def body() -> None:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            job = await update(node, "2.0.0")
            assert (job.state, job.touched, loader.times) == (State.FAILED, False, 1)
            await asyncio.sleep(8 if deaf else 2)
            assert await node.reported("ecu") is not None, "taken for one that runs another image"
            secret(monkeypatch, tmp_path)
            job = await update(node, "4.0.0")
            assert job.state is State.SUCCEEDED, job.detail

    with alive(site, controller, loader):
        asyncio.run(body())


def test_a_device_in_its_boot_loader_for_a_moment_has_not_drifted(site: Site) -> None:
    controller = site.controller(lingers_s=0.3, boot_s=0)
    site.watch = True

    async def body() -> None:
        async with life(site.config, site.plugins) as node:
            await settle(node)
        controller.boot()
        async with life(site.config, site.plugins) as node:
            await asyncio.sleep(1.5)
            assert len(await node.jobs("ecu")) == 1

    with alive(site, controller):
        asyncio.run(body())
    assert controller.counts.erased == 0


def test_what_the_controller_says_that_it_runs_is_the_way_back(site: Site) -> None:
    controller = site.controller()

    async def body() -> Job:
        async with life(site.config, site.plugins) as node:
            return await update(node, "2.0.0")

    with alive(site, controller):
        job = asyncio.run(body())
    assert job.state is State.SUCCEEDED, job.detail
    assert job.fallback is not None and job.fallback.release == "ecu@1.0.0"


def test_nothing_is_written_where_nobody_knows_the_way_back(site: Site) -> None:
    controller = Controller()
    controller.install(make_app("0.9.0", SIZES))

    async def body() -> Job:
        async with life(site.config, site.plugins) as node:
            return await update(node, "2.0.0")

    with alive(site, controller):
        job = asyncio.run(body())
    assert (job.state, job.reason) == (State.FAILED, Reason.NO_FALLBACK)
    assert controller.counts.erased == 0


def test_another_controller_at_the_address_is_not_touched(site: Site) -> None:
    controller = site.controller(hardware=b"ECU-8")

    async def body() -> Job:
        async with life(site.config, site.plugins) as node:
            return await update(node, "2.0.0")

    with alive(site, controller):
        job = asyncio.run(body())
    assert (job.state, job.reason) == (State.FAILED, Reason.HARDWARE_MISMATCH)
    assert "uds:ECU-8 answered" in job.detail
    assert controller.counts.erased == controller.counts.seeds == 0


def test_a_wrong_secret_is_sent_once_and_again_only_when_it_is_another(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on the way back nor for another wish, while the daemon runs: a controller locks itself after a few."""
    secret(monkeypatch, tmp_path, "hex:00000001")
    controller = site.controller()

    async def body() -> list[Job]:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            ended = [await update(node, version) for version in ("2.0.0", "4.0.0")]
            assert controller.counts.wrong_keys == controller.counts.seeds == 1
            secret(monkeypatch, tmp_path)
            return [*ended, await update(node, "2.0.0")]

    with alive(site, controller):
        *failed, good = asyncio.run(body())
    for job in failed:
        assert (job.state, job.reason, job.touched) == (State.FAILED, Reason.DEVICE_ERROR, False)
        assert "SecurityAccess: the device answered invalidKey (0x35)" in job.detail
        assert "that key is not sent again: correct the credential" in job.detail
    assert good.state is State.SUCCEEDED, good.detail
    assert controller.counts.wrong_keys == 1 and controller.runs == b"2.0.0"


LIMIT = {
    "name": "limit",
    "did": 0x0102,
    "type": "u8",
    "writable": True,
    "session": "extended",
    "security": True,
}


async def not_taken(caplog: pytest.LogCaptureFixture) -> str:
    """Why the device did not take its wish, once it did not."""
    async with asyncio.timeout(20):
        while True:
            for record in caplog.records:
                if record.message == "property not taken":
                    return str(record.__dict__["detail"])
            await asyncio.sleep(0.005)


def test_a_wrong_key_for_a_wish_is_sent_once_however_often_the_daemon_starts(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A wish is due again at every start, and nobody watches a node whose power comes and goes."""
    site.table, site.watch = {"properties": [LIMIT]}, True
    secret(monkeypatch, tmp_path, "hex:00000001")
    controller = site.controller()

    async def first_life() -> str:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            await node.store.write(lambda tx: twins.set_desired(tx, "ecu", "limit", 5, "operator"))
            node.sessions["ecu"].refresh()
            return await not_taken(caplog)

    async def another_life() -> tuple[str, Job]:
        async with life(site.config, site.plugins) as node:
            return await not_taken(caplog), await update(node, "2.0.0")

    async def with_the_secret() -> None:
        async with life(site.config, site.plugins) as node, asyncio.timeout(20):
            while await node.reported("ecu", "limit") != 5:
                await asyncio.sleep(0.005)

    with alive(site, controller):
        assert "invalidKey (0x35)" in asyncio.run(first_life())
        for _ in range(2):
            caplog.clear()
            why, job = asyncio.run(another_life())
            assert "that key is not sent again" in why
            assert job.state is State.FAILED and f"{job.reason}: {job.detail}" == why
            assert controller.counts.wrong_keys == controller.counts.seeds == 1
        secret(monkeypatch, tmp_path)
        asyncio.run(with_the_secret())
    assert controller.counts.wrong_keys == 1 and controller.properties[0x0102] == b"\x05"


@pytest.mark.parametrize(
    ("secret_", "algorithm"),
    [(None, "xor"), ("hex:0", "xor"), ("hex:", "add"), ("hex:0011", "aes-cmac")],
    ids=["none", "no digits", "no bytes", "too short"],
)
def test_a_secret_that_cannot_be_used_is_named_before_anything_is_changed(
    site: Site, tmp_path: Path, secret_: str | None, algorithm: str
) -> None:
    site.table = {"security": {"algorithm": algorithm, "credential": "ecu"}}
    file, controller = tmp_path / "edged_ecu", site.controller()
    file.unlink() if secret_ is None else file.write_text(secret_)

    async def body() -> Job:
        async with life(site.config, site.plugins) as node:
            return await update(node, "2.0.0")

    with alive(site, controller):
        job = asyncio.run(body())
    assert (job.state, job.reason) == (State.FAILED, Reason.CONFIG_INVALID), job.detail
    assert "credential 'ecu'" in job.detail and not job.touched
    assert controller.counts.seeds == controller.counts.erased == 0


def test_a_device_that_puts_off_and_is_polled_is_not_stalled(
    tmp_path: Path, releases: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``pending_s`` bounds each wait, and an erase has two of them."""
    secret(monkeypatch, tmp_path)
    polled = {"poll_s": 0.05, "running": "01"}
    table = {"pending_s": 4, "erase": polled, "check": polled | {"parameters": ["crc32"]}}
    engine = attrs.evolve(PATIENT, stall_s=1.5)
    site = Site(tmp_path / "state", releases, engine=engine, table=table)
    controller = site.controller(slow_erase_s=2.2, background_s=2.2)
    job = run(site, controller, "2.0.0")
    assert job.state is State.SUCCEEDED, job.detail
    assert controller.counts.erased == controller.counts.written == 1600


def test_a_session_that_is_put_off_is_not_stalled(
    tmp_path: Path, releases: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written before the first erase; each step may take its time."""

    class Slow(Controller):
        def _answer(self, service: int, data: bytes) -> Iterator[bytes | float]:
            if service in (0x85, 0x28):
                yield from self._takes(2.2, service)
            yield from super()._answer(service, data)

    secret(monkeypatch, tmp_path)
    engine = attrs.evolve(PATIENT, stall_s=1.5)
    site = Site(tmp_path / "state", releases, engine=engine, table={"pending_s": 4})
    controller = Slow()
    controller.install(IMAGES["1.0.0"])
    job = run(site, controller, "2.0.0")
    assert job.state is State.SUCCEEDED, job.detail
    assert controller.counts.downloads == 2


@pytest.mark.parametrize("kind", [300, -1, "0x11", 1.5, True, None])
def test_a_signed_data_format_that_is_none_erases_nothing(
    kind: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret(monkeypatch, tmp_path)
    bus, controller = bus_name(), Controller()

    async def body() -> None:
        async with connected(device(f"can:virtual@{bus}")) as session:
            image = await verified(IMAGES["2.0.0"])
            image.params = {"data_format": kind}
            with pytest.raises(Refused, match="data_format: found .*; allowed: a whole number") as caught:
                await session.prepare(image)
            assert caught.value.reason is Reason.FACTS_INVALID
            image.params = {"data_format": 0x10}
            with pytest.raises(Permanent, match=r"RequestDownload.*requestOutOfRange"):
                await session.stage(image, quiet)

    with on_bus(bus, controller):
        asyncio.run(body())
    (download,) = [request for request in controller.heard if request[0] == 0x34]
    assert download[1] == 0x10, "one that can be sent is"


class Moving(Controller):
    """A machine that moves: so many times it says so, in one way or the other."""

    refusals = 0
    code = 0x88

    def _answer(self, service: int, data: bytes) -> Iterator[bytes | float]:
        if self.refusals and self.code and service == 0x10 and data == b"\x02":
            self.refusals -= 1
            raise Negative(self.code)
        if self.refusals and not self.code and service == 0x31 and data == b"\x01\x02\x03":
            self.refusals -= 1
            yield b"\x71" + data + b"\x01"
            return
        yield from super()._answer(service, data)


@pytest.mark.parametrize("code", [0x22, 0x37, 0x88, 0])
@pytest.mark.parametrize("version", ["2.0.0", "3.0.0"])
def test_a_device_that_cannot_be_programmed_now_is_waited_for(site: Site, version: str, code: int) -> None:
    """Longer than attempts last, forward and on the way back."""
    controller = Moving()
    controller.install(IMAGES["1.0.0"])
    controller.code = code
    if not code:
        site.table = {
            "sequence": ["extended_session", "check_preconditions", "programming_session", "security_access"]
        }
    patience = 2 * site.engine.max_attempts

    async def body() -> tuple[Job, set[str]]:
        async with life(site.config, site.plugins) as node:
            await settle(node)
            controller.refusals = patience
            job = await update(node, version)
            return job, await reasons(node, job)

    real = controller.boot

    def boot() -> None:
        # moving again, when the new image has been started
        controller.refusals = patience if controller.counts.resets == 0 and version == "3.0.0" else 0
        real()

    controller.boot = boot  # type: ignore[method-assign]
    with alive(site, controller):
        job, why = asyncio.run(body())
    assert controller.refusals == 0
    if version == "2.0.0":
        assert job.state is State.SUCCEEDED, job.detail
        assert why == {Reason.DEVICE_BUSY} and controller.runs == b"2.0.0"
    else:
        assert job.state is State.REVERTED, job.detail
        assert Reason.DEVICE_BUSY in why and controller.runs == b"1.0.0"
