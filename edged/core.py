"""The core of a node: everything between its store and its operations, put together in one way for the daemon and for tests."""

from __future__ import annotations

from dataclasses import dataclass

from edged import BUILD_TIME
from edged.clock import Clock, SteadyClock, from_text
from edged.config import Config
from edged.devices import Devices
from edged.engine.events import Broadcast
from edged.engine.images import Images
from edged.engine.loop import Engine
from edged.engine.observer import Observer
from edged.engine.runner import Workshop
from edged.engine.trust import Trust, Verify
from edged.plugins import Plugins
from edged.reports import Reports
from edged.store.artifacts import Artifacts
from edged.store.database import Store
from edged.store.node_key import NodeKey
from edged_firmware.fetch import Fetcher
from edged_firmware.trust import verify_in_child


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a core stands on: opened before it, closed after it."""

    config: Config
    clock: Clock
    store: Store
    key: NodeKey
    plugins: Plugins
    artifacts: Artifacts
    fetcher: Fetcher
    observer: Observer
    authorization: str = ""
    """For the repository's server; empty: none."""


@dataclass(frozen=True, slots=True)
class Core:
    """The parts, built and not yet running."""

    broadcast: Broadcast
    reports: Reports
    devices: Devices
    trust: Trust
    images: Images
    engine: Engine


def build(ground: Ground, verify: Verify = verify_in_child) -> Core:
    """Put the parts together; ``verify`` is how metadata is verified."""
    config, store, clock = ground.config, ground.store, ground.clock
    broadcast = Broadcast()
    reports = Reports(store, clock, broadcast, config.storage.report_interval_s)
    devices = Devices(config, ground.plugins, store, reports, clock, ground.observer.mapper_event)
    folder = config.node.state_dir / "trust"
    trust = Trust(
        store,
        clock,
        config.trust,
        folder,
        from_text(BUILD_TIME),
        ground.observer,
        verify,
        ground.authorization,
    )
    images = Images(ground.artifacts, ground.fetcher, config.trust.repository, ground.observer)
    shop = Workshop(
        store=store,
        clock=SteadyClock(clock),
        trust=trust,
        images=images,
        models=config.models,
        settings=config.engine,
        observer=ground.observer,
        broadcast=broadcast,
        sign=ground.key.sign,
    )
    engine = Engine(shop, devices.sessions)
    devices.drifted = engine.device_changed
    devices.returned = engine.device_returned
    return Core(broadcast, reports, devices, trust, images, engine)
