"""A whole engine in one object, for tests: real store, real trust, real sessions; no server and no second process.

Made of the same parts as the daemon. A life ends by leaving the block; the folder stays, and the next life goes on from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta

from edged.clock import SystemClock
from edged.config import Config
from edged.core import Ground, build
from edged.domain.job import Job
from edged.domain.reconcile import FIRMWARE, firmware_value
from edged.engine.images import Images
from edged.engine.loop import Engine
from edged.engine.observer import Observer, Silent
from edged.engine.trust import Trust
from edged.plugins import Plugins
from edged.sessions import Sessions
from edged.store import jobs, twins
from edged.store.database import Store
from edged.store.node_key import NodeKey
from edged.testing.faults import Faults, FaultyArtifacts, FaultyStore
from edged_firmware.fetch import Fetcher
from edged_firmware.trust import TrustReport, TrustRequest, verify


@dataclass(frozen=True, slots=True)
class TestNode:
    """One life of a node."""

    __test__ = False

    store: Store
    engine: Engine
    sessions: Sessions
    trust: Trust
    images: Images
    key: NodeKey

    async def want(self, device: str, release: str, source: str = "operator") -> None:
        """Set the device's desired firmware.

        When the engine has looked at its devices: or the wish would come before its first look in one life and after it in the
        next, and a sweep of power cuts find other commits.
        """
        await self.engine.ping()
        value = firmware_value(release)
        await self.store.write(lambda tx: twins.set_desired(tx, device, FIRMWARE, value, source))
        self.engine.device_changed(device)

    async def jobs(self, device: str) -> list[Job]:
        """All jobs of the device, newest first."""
        return await self.store.read(lambda tx: jobs.find(tx, device=device))

    async def ended(self, device: str, timeout_s: float = 30.0) -> Job:
        """The newest job for what the device should run now, when it has ended."""
        async with asyncio.timeout(timeout_s):
            while True:
                twin = await self.store.read(lambda tx: twins.get(tx, device))
                found = await self.jobs(device)
                wanted = twin.desired[FIRMWARE].version
                if found and found[0].state.ended and found[0].desired_version == wanted:
                    return found[0]
                await asyncio.sleep(0.005)

    async def reported(self, device: str, name: str = FIRMWARE) -> object:
        """The reported value of one property, None where there is none."""
        twin = await self.store.read(lambda tx: twins.get(tx, device))
        return twin.reported[name].value if name in twin.reported else None


class _LaterClock(SystemClock):
    def __init__(self, passed: Callable[[], float]) -> None:
        self._passed = passed

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self._passed())

    def monotonic(self) -> float:
        return super().monotonic() + self._passed()


async def _verify_here(request: TrustRequest) -> TrustReport:
    """In this process: a test starts hundreds of lives, and a child each would be most of its time."""
    return await asyncio.to_thread(verify, request)


@asynccontextmanager
async def life(
    config: Config,
    plugins: Plugins,
    *,
    faults: Faults | None = None,
    observer: Observer | None = None,
    now: Callable[[], datetime] | None = None,
    passed: Callable[[], float] | None = None,
) -> AsyncIterator[TestNode]:
    """One life: everything from fresh objects, on the folder ``config.node.state_dir``. Where ``faults`` cuts the power,
    ``PowerCut`` comes out of the block (in an exception group). ``now``: what the machine's clock says. ``passed``: so many
    seconds more have passed, by all clocks."""
    clock = SystemClock() if passed is None else _LaterClock(passed)
    if now is not None:
        clock.now = now  # type: ignore[method-assign]
    folder = config.node.state_dir
    folder.mkdir(parents=True, exist_ok=True)
    faults = faults or Faults()
    observer = observer or Silent()
    key = NodeKey.load_or_create(folder)
    async with Store.open(folder / "edged.db", clock) as inner, _fetcher(observer) as fetcher:
        store = FaultyStore(inner, faults)
        artifacts = FaultyArtifacts(store, folder / "artifacts", config.storage.artifact_quota_bytes, faults)
        await artifacts.recover()
        ground = Ground(
            config=config,
            clock=clock,
            store=store,
            key=key,
            plugins=plugins,
            artifacts=artifacts,
            fetcher=fetcher,
            observer=observer,
        )
        core = build(ground, _verify_here)
        units = core.devices.sessions
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(core.reports.run())]
            tasks += [group.create_task(unit.run()) for unit in units.all()]
            tasks.append(group.create_task(core.engine.run()))
            yield TestNode(store, core.engine, units, core.trust, core.images, key)
            for task in reversed(tasks):
                task.cancel()


@asynccontextmanager
async def _fetcher(observer: Observer) -> AsyncIterator[Fetcher]:
    import aiohttp

    async with aiohttp.ClientSession() as session:
        yield Fetcher(session, cap=None, count=observer.fetched)
