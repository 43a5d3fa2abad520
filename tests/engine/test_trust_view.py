"""The node's view of its repository: refreshes that are shared, answers that stay fresh, a root that stays."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from engine_kit import Place, Publisher, published

from edged.clock import SystemClock
from edged.config import TrustSettings
from edged.engine.observer import Silent
from edged.engine.trust import Trust
from edged.errors import Permanent, Reason, Refused, Transient
from edged.store import audit
from edged.store.database import Store
from edged.testing.node import life
from edged_firmware.trust import TrustReport, TrustRequest, verify


class Counted:
    """The verification, with a count of how often it ran."""

    def __init__(self) -> None:
        self.runs = 0

    async def __call__(self, request: TrustRequest) -> TrustReport:
        self.runs += 1
        await asyncio.sleep(0.02)
        return await asyncio.to_thread(verify, request)


def test_many_who_ask_at_once_share_a_refresh(tmp_path: Path, publisher: Publisher) -> None:
    """A thousand jobs for a release that is not there must not start a thousand processes."""
    place, counted = Place(tmp_path / "state", publisher), Counted()

    async def run() -> None:
        clock = SystemClock()
        async with Store.open(tmp_path / "edged.db", clock) as store:
            trust = Trust(
                store, clock, place.config.trust, tmp_path / "trust", clock.now(), Silent(), counted
            )
            asked = [trust.resolve("app@9.9.9") for _ in range(50)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(a, Refused) and a.reason is Reason.RELEASE_UNKNOWN for a in answers)
            assert counted.runs <= 2
            await trust.resolve("app@2.0.0")
            assert counted.runs <= 2, "what is fresh was verified again"

    asyncio.run(run())


def test_that_metadata_went_stale_within_its_grace_is_in_the_audit_trail(
    tmp_path: Path, publisher: Publisher
) -> None:
    """Who cuts the line, or serves what is old, must leave a trace also where it is borne for a while."""
    place, later = Place(tmp_path / "state", publisher), timedelta(0)

    async def run() -> None:
        nonlocal later
        async with life(place.config, place.plugins, now=lambda: datetime.now(UTC) + later) as node:
            assert (await node.trust.refresh()).stale_seconds == 0
            later = timedelta(days=20)
            for _ in range(2):
                assert (await node.trust.refresh()).stale_seconds > 0
            rows = await node.store.read(audit.list)
            stale = [row.data["stale_s"] for row in rows if row.event == "trust.refresh"]
            assert len(stale) == 2, "once for each change"
            assert stale[0] == 0 and isinstance(stale[1], float) and stale[1] > 86400

    asyncio.run(run())


def test_many_who_ask_in_vain_share_the_failure(tmp_path: Path, publisher: Publisher) -> None:
    counted = Counted()

    async def run() -> None:
        clock = SystemClock()
        settings = TrustSettings(repository=str(tmp_path / "gone"), root=publisher.root)
        async with Store.open(tmp_path / "edged.db", clock) as store:
            trust = Trust(store, clock, settings, tmp_path / "trust", clock.now(), Silent(), counted)
            asked = [trust.resolve("app@2.0.0") for _ in range(50)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(a, Transient) and a.reason is Reason.FETCH_FAILED for a in answers)
            assert counted.runs <= 2

    asyncio.run(run())


def test_a_release_that_was_published_a_moment_ago_is_found(tmp_path: Path) -> None:
    (tmp_path / "publisher").mkdir()
    publisher = published(tmp_path / "publisher")
    place = Place(tmp_path / "state", publisher)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            await node.trust.resolve("app@2.0.0")
            publisher.add("5.0.0", bytes(2000))
            publisher.publish()
            assert (await node.trust.resolve("app@5.0.0")).facts.release_counter == 4

    asyncio.run(run())


def test_a_root_is_replaced_only_on_request_and_by_one_that_verifies(tmp_path: Path) -> None:
    """A stranger's root does not verify the repository; the publisher's new root replaces the old one when asked to."""
    for name in ("publisher", "stranger"):
        (tmp_path / name).mkdir()
    publisher, stranger = published(tmp_path / "publisher"), published(tmp_path / "stranger")
    place = Place(tmp_path / "state", publisher)

    async def run() -> None:
        async with life(place.config, place.plugins) as node:
            root = publisher.root.read_bytes()
            await node.trust.init(root, "tester")
            await node.trust.init(root, "tester")
            with pytest.raises(Permanent) as kept:
                await node.trust.init(stranger.root.read_bytes(), "tester")
            assert kept.value.reason is Reason.CONFIG_INVALID
            with pytest.raises(Refused) as refused:
                await node.trust.init(stranger.root.read_bytes(), "tester", replace_root=True)
            assert refused.value.reason is Reason.SIGNATURE_INVALID
            assert node.trust.root_path.read_bytes() == root

    asyncio.run(run())


def test_another_publisher_may_be_trusted_though_his_versions_are_lower(tmp_path: Path) -> None:
    for name in ("publisher", "other"):
        (tmp_path / name).mkdir()
    publisher, other = published(tmp_path / "publisher"), published(tmp_path / "other")
    for _ in range(3):
        publisher.publish()
    place = Place(tmp_path / "state", publisher)

    async def before() -> None:
        async with life(place.config, place.plugins) as node:
            await node.trust.init(publisher.root.read_bytes(), "tester")

    async def after() -> None:
        async with life(place.config, place.plugins) as node:
            await node.trust.init(other.root.read_bytes(), "tester", replace_root=True)
            assert (await node.trust.resolve("app@2.0.0")).ref.version == "2.0.0"

    asyncio.run(before())
    place.publisher = other
    asyncio.run(after())
