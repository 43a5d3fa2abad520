"""A publisher, a fake device and the configuration of a node that flashes it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from edged.config import (
    Config,
    DeviceSettings,
    EngineSettings,
    HealthSettings,
    Model,
    Node,
    Policy,
    TrustSettings,
)
from edged.domain.job import Job
from edged.domain.reconcile import FIRMWARE
from edged.engine import reconciler
from edged.plugins import Plugins, discover
from edged.store import audit, floors
from edged.testing.fake import Bus, FakeDevice, FakePlugin, fake_app
from edged.testing.faults import Faults, PowerCut, When
from edged.testing.node import TestNode
from edged_firmware import release
from edged_firmware.facts import ReleaseRef

IMAGE_BYTES = 2048
AT_ONCE = 4
T = TypeVar("T")
R = TypeVar("R")


def write_quickly(path: Path, data: bytes) -> None:
    path.write_bytes(data)


@dataclass
class Publisher:
    """A release repository below ``base``, and its keys."""

    base: Path

    @property
    def repo(self) -> Path:
        return self.base / "repo"

    @property
    def root(self) -> Path:
        return self.repo / "metadata" / "1.root.json"

    def init(self) -> Publisher:
        release.init(self.repo, self.base / "keys", datetime.now(UTC), write=write_quickly)
        return self

    def add(self, version: str, image: bytes, *, name: str = "app", **draft: Any) -> None:
        file = self.base / f"{name}-{version}.bin"
        file.write_bytes(image)
        options: dict[str, Any] = {"models": ("widget",), "protocol": "fake", "chunk_size_bytes": 512} | draft
        release.add(self.repo, file, release.Draft(name, version, **options), write=write_quickly)

    def publish(self) -> None:
        release.publish(self.repo, [self.base / "keys"], datetime.now(UTC), write=write_quickly)

    def withdraw(self, version: str) -> None:
        release.remove(self.repo, ReleaseRef("app", version), write=write_quickly)
        self.publish()

    def image_file(self, version: str, kind: str = "image") -> Path:
        """The image (or ``chunks``) file of a release, as it is served."""
        (file,) = (self.repo / "targets" / "app" / version).glob(f"*.{kind}")
        return file

    def copy(self, base: Path) -> Publisher:
        shutil.copytree(self.base, base)
        return Publisher(base)


def published(base: Path) -> Publisher:
    """Releases app@1.0.0 and app@2.0.0, which are good, and app@3.0.0, whose health check fails."""
    publisher = Publisher(base).init()
    publisher.add("1.0.0", fake_app("1.0.0", IMAGE_BYTES))
    publisher.add("2.0.0", fake_app("2.0.0", IMAGE_BYTES))
    publisher.add("3.0.0", fake_app("3.0.0", IMAGE_BYTES, healthy=False))
    publisher.publish()
    return publisher


QUICK = EngineSettings(
    first_backoff_s=0.01, longest_backoff_s=0.05, stall_s=5, lease_s=5, checkpoint_bytes=512, checkpoint_s=0
)


@dataclass
class Place:
    """A node's folder, its configuration, and the devices on its desk."""

    folder: Path
    publisher: Publisher
    plugin: FakePlugin = field(default_factory=FakePlugin)
    engine: EngineSettings = QUICK
    without_fallback: bool = False
    health: bool = True
    devices: list[DeviceSettings] = field(default_factory=list)

    def device(
        self,
        name: str = "dev-1",
        *,
        app: str | None = "1.0.0",
        bus: str = "bus",
        watch: bool = True,
        **options: Any,
    ) -> FakeDevice:
        """Put a device on a bus, as it left the factory with version ``app``, and configure it."""
        device = self.plugin.add(bus, FakeDevice(name, **options))
        if app is not None:
            device.install(fake_app(app, IMAGE_BYTES))
        self.devices.append(
            DeviceSettings(id=name, model="widget", mapper="fake", address=f"fake:{bus}/{name}", watch=watch)
        )
        return device

    @property
    def plugins(self) -> Plugins:
        return discover([("fake", self.plugin)])

    @property
    def config(self) -> Config:
        health = HealthSettings(kind="property", pattern="version={identifies_as}", timeout_s=2)
        model = Model(
            id="widget",
            hardware_ids=("fake:1",),
            flash_size=16 * 1024,
            health=health if self.health else None,
            policy=Policy(without_fallback=self.without_fallback),
        )
        return Config(
            node=Node(id="node-1", state_dir=self.folder),
            trust=TrustSettings(repository=str(self.publisher.repo), root=self.publisher.root),
            engine=self.engine,
            model=(model,),
            device=tuple(self.devices),
        )


async def until(holds: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Return as soon as ``holds()`` is true. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not holds():
            await asyncio.sleep(0.005)


async def unplug(bus: Bus) -> None:
    """Pull the wire, and wait until whoever had it open has noticed."""
    bus.lost = True
    await until(lambda: bus.opened == 0)


def until_cut(life: Coroutine[Any, Any, Job], faults: Faults) -> Job | None:
    """Run one life: the ended job, or None where ``faults`` cut the power. Whatever else comes out is an error."""
    job = None
    try:
        job = asyncio.run(life)
    except (PowerCut, BaseExceptionGroup) as error:
        if isinstance(error, BaseExceptionGroup):
            _, other = error.split(PowerCut)
            assert other is None, f"something else than the cut came out: {other!r}"
        assert faults.fired, "a cut came out that did not fire"
    return None if faults.fired else job


class CutWorld(Protocol):
    """A node and its device, over as many lives as it takes."""

    def live(self, faults: Faults) -> Job | None: ...

    def check(self, job: Job) -> None: ...


def cut_and_end(world: CutWorld, cut: Faults) -> str:
    """One cut, and a life without any that ends well; the effect that was cut."""
    world.live(cut)
    job = world.live(Faults())
    assert job is not None
    world.check(job)
    return cut.fired


def through_cuts(world: CutWorld, cuts: Iterable[Faults]) -> None:
    """A life for each of ``cuts``, until one ends before its cut, and where none did a life without any; it ends well."""
    job = next((job for cut in cuts if (job := world.live(cut)) is not None), None) or world.live(Faults())
    assert job is not None
    world.check(job)


def at_once(work: Callable[[T], R], each: Iterable[T]) -> list[R]:
    """``work`` of ``each``, some at a time in threads: a life is mostly waiting. The first that fails ends it."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(work, each))
    finally:
        pool.shutdown(cancel_futures=True)


def cut_at_each(
    names: Sequence[str],
    torn: Collection[str],
    begin: Callable[[str], CutWorld],
    tries: int = 1,
    step: int = 1,
) -> tuple[int, int]:
    """One cut at each of the effects ``names``, in a world of its own, before it and after it, and in its middle where it is
    one of ``torn``; how many cuts there were to be, and how many fell on the effect that they were for.

    ``begin`` makes a world of that name. ``tries``: worlds for each cut, where a run may have an effect of its name less.
    """

    def falls(cut: tuple[int, str, When]) -> bool:
        number, effect, when = cut
        worlds = (begin(f"{number}-{when}-{attempt}") for attempt in range(tries))
        of_its_name = names[:number].count(effect)
        return any(cut_and_end(world, Faults(of_its_name, when, effect)) == effect for world in worlds)

    hit = at_once(falls, list(moments(names, torn, step)))
    return len(hit), sum(hit)


def moments(names: Sequence[str], torn: Collection[str], step: int = 1) -> Iterator[tuple[int, str, When]]:
    """Number and name of each effect, and when to cut it; an effect that cannot be torn is cut before it and after it."""
    for number, effect in list(enumerate(names, 1))[::step]:
        for when in When if effect in torn else (When.BEFORE, When.AFTER):
            yield number, effect, when


async def retried(node: TestNode, place: Place, job: Job) -> Job:
    """An operator's retry of a job that has ended, for the device dev-1; the new job, when that has ended."""
    again = await node.store.write(lambda tx: reconciler.retry(tx, job, "operator", place.engine))
    node.engine.device_changed("dev-1")
    async with asyncio.timeout(20):
        while (ended := await node.ended("dev-1")).id != again.id:
            await asyncio.sleep(0.005)
    return ended


async def check_store(node: TestNode, device: str, floor: int) -> None:
    """One job, an audit trail that is intact, and the floor where it should be."""
    assert len(await node.jobs(device)) == 1, "a job was lost or made twice"
    report = await node.store.read(lambda tx: audit.verify(tx, node.key.public_key))
    assert report.intact, report.reason
    assert await node.store.read(lambda tx: floors.get(tx, device, FIRMWARE)) == floor
