"""A publisher of releases for the controller of ``uds_server``, and a node that flashes it: real engine, store and trust."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
from can_kit import CRC, Segments, bus_name, on_bus
from engine_kit import QUICK, Publisher
from intelhex import IntelHex
from uds_server import BASE, Controller, OnBus, Wire, Wiring, make_app

from edged.config import Config, DeviceSettings, EngineSettings, HealthSettings, Model, Node, TrustSettings
from edged.domain.job import Job
from edged.plugins import Plugins, discover
from edged.store import jobs, twins
from edged.testing.node import TestNode

SIZES = (900, 700)
IMAGE_BYTES = sum(SIZES)
PATIENT = attrs.evolve(QUICK, stall_s=20)
IMAGES: dict[str, Segments] = {
    "1.0.0": make_app("1.0.0", SIZES),
    "2.0.0": make_app("2.0.0", SIZES),
    # what was published is not what it says of itself
    "3.0.0": make_app("2.9.9", SIZES),
    "4.0.0": make_app("4.0.0", SIZES),
}


def published(base: Path, name: str = "ecu") -> Publisher:
    """``1.0.0``, ``2.0.0`` and ``4.0.0``, which are good, and ``3.0.0``, which says that it is another one."""
    from edged_firmware import release

    base.mkdir(exist_ok=True)
    publisher = Publisher(base).init()
    for version, segments in IMAGES.items():
        file = base / f"{version}.hex"
        write_hex(file, segments)
        draft = release.Draft(name, version, ("ecu",), protocol="uds", chunk_size_bytes=512)
        release.add(publisher.repo, file, draft)
    publisher.publish()
    return publisher


def write_hex(file: Path, segments: Segments) -> None:
    image = IntelHex()
    for address, data in segments:
        image.puts(address, data)
    image.write_hex_file(str(file))


@dataclass
class Site:
    """One node's folder, and the controllers on its bus."""

    folder: Path
    publisher: Publisher
    bus: str = field(default_factory=bus_name)
    engine: EngineSettings = PATIENT
    table: dict[str, Any] = field(default_factory=dict)
    devices: dict[str, Wiring] = field(default_factory=lambda: {"ecu": Wiring()})
    health: bool = False
    watch: bool = False
    address: str = ""

    def controller(self, **options: Any) -> Controller:
        """A controller as it leaves the factory, with the release 1.0.0."""
        controller = Controller(**options)
        controller.install(IMAGES["1.0.0"])
        return controller

    def on(self, controller: Controller, wire: Wire | None = None, device: str = "ecu") -> Any:
        """The controller, alive on the bus."""
        return on_bus(self.bus, controller, self.devices[device], wire)

    @property
    def plugins(self) -> Plugins:
        return discover()

    @property
    def config(self) -> Config:
        health = HealthSettings(kind="property", query="F189", pattern="^{identifies_as}$", timeout_s=1)
        model = Model(
            id="ecu",
            hardware_ids=("uds:ECU-7",),
            flash_base=BASE,
            flash_size=0x10000,
            health=health if self.health else None,
        )
        return Config(
            node=Node(id="node-1", state_dir=self.folder),
            trust=TrustSettings(repository=str(self.publisher.repo), root=self.publisher.root),
            engine=self.engine,
            model=(model,),
            device=tuple(self._settings(name, wiring) for name, wiring in self.devices.items()),
        )

    def _settings(self, name: str, wiring: Wiring) -> DeviceSettings:
        table = {
            "request_id": wiring.receives,
            "response_id": wiring.sends,
            "answer_s": 5,
            "boot_s": 2.0,
            "settle_s": 0,
            "security": {"algorithm": "xor", "credential": "ecu"},
            **CRC,
            **self.table,
        }
        address = self.address or f"can:virtual@{self.bus}"
        return DeviceSettings(
            id=name, model="ecu", mapper="can-uds", address=address, watch=self.watch, config=table
        )


async def update(node: TestNode, version: str, device: str = "ecu", timeout_s: float = 60.0) -> Job:
    """Wish for a release, once; how the job ended."""
    await node.want(device, f"ecu@{version}")
    return await node.ended(device, timeout_s)


async def settle(node: TestNode, device: str = "ecu") -> None:
    """Have the node know what the controller runs, so that it has something to go back to: nothing is written for that."""
    assert (await update(node, "1.0.0", device)).state.value == "succeeded"


async def reasons(node: TestNode, job: Job) -> set[str]:
    """All reasons in the job's history."""
    found = await node.store.read(lambda tx: jobs.history(tx, job.id))
    return {str(event.reason) for event in found if event.reason}


async def reported(node: TestNode, device: str = "ecu") -> dict[str, object]:
    twin = await node.store.read(lambda tx: twins.get(tx, device))
    return {name: value.value for name, value in twin.reported.items()}


def now() -> datetime:
    return datetime.now(UTC)


@contextmanager
def alive(site: Site, controller: Controller, wire: Wire | None = None) -> Iterator[OnBus]:
    with site.on(controller, wire) as server:
        yield server
