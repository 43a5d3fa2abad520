"""The devices, releases and configuration of ``edged demo``: a real boot loader on a simulated board, or the fake device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from edged_firmware import release

DEVICE = "pump-1"
MODEL = "pump"
GOOD = ("1.0.0", "2.0.0")
TAMPERED = "2.1.0"
_FILLER_BYTES = 10_000
_FAKE_FLASH_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Bench:
    """What the demo runs on. ``daemon`` is the command that starts it; ``{config}`` stands for its configuration."""

    title: str
    mapper: str
    protocol: str
    address: str
    hardware_id: str
    flash_bytes: int
    health: str
    daemon: tuple[str, ...]
    images: dict[str, Path]
    device_config: str = ""
    board_port: Path | None = None
    received_bytes: Callable[[], int] | None = None
    """What the board has been sent so far, by its own count; None where nobody but the daemon counts."""


@contextmanager
def simulated_board(folder: Path) -> Iterator[Bench]:
    """Debian's optiboot on a simulated ATmega328P, with applications that are built now. Raises ``SimulatorError``."""
    from edged.testing.avr import OPTIBOOT_328P, SimulatedAvr, build_app

    images = {
        version: build_app(version=version, filler_bytes=_FILLER_BYTES) for version in (*GOOD, TAMPERED)
    }
    board = folder / "board"
    board.mkdir()
    with SimulatedAvr(board) as device:
        yield Bench(
            title="optiboot (from Debian's arduino-core-avr) on a simulated ATmega328P, 115,200 baud",
            mapper="uart-stk500",
            protocol="stk500v1",
            address=f"serial:{device.port}",
            hardware_id=f"avr:{OPTIBOOT_328P.signature.hex()}",
            flash_bytes=OPTIBOOT_328P.boot_at,
            health='kind = "line"\npattern = "edged-app .* {identifies_as} ready"\ntimeout_s = 5',
            daemon=(sys.executable, "-P", "-m", "edged", "--config", "{config}", "run"),
            images=images,
            board_port=device.port,
            received_bytes=lambda: device.stats().bytes_in,
        )


@contextmanager
def fake_device(folder: Path) -> Iterator[Bench]:
    """The fake device of ``edged.testing``, which boots only what is whole."""
    from edged.testing.fake import fake_app

    images = {}
    for version in (*GOOD, TAMPERED):
        images[version] = folder / f"app-{version}.bin"
        images[version].write_bytes(fake_app(version, _FILLER_BYTES))
    yield Bench(
        title="the fake device of edged.testing",
        mapper="fake",
        protocol="fake",
        address=f"fake:bench/{DEVICE}",
        hardware_id="fake:1",
        flash_bytes=_FAKE_FLASH_BYTES,
        device_config=f"size_bytes = {_FAKE_FLASH_BYTES}",
        health='kind = "property"\npattern = "version={identifies_as}"\nquery = "version"\ntimeout_s = 5',
        daemon=(sys.executable, "-P", "-m", "edged.testing.daemon", "{config}"),
        images=images,
    )


def publish(bench: Bench, folder: Path) -> Path:
    """Keys, and a repository with all images as releases ``blink@VERSION``, signed; returns its folder."""
    repository, keys = folder / "releases", folder / "keys"
    now = datetime.now(UTC)
    release.init(repository, keys, now)
    for version, image in bench.images.items():
        draft = release.Draft(
            "blink", version, (MODEL,), (bench.hardware_id,), protocol=bench.protocol, base_address=0
        )
        release.add(repository, image, draft)
    release.publish(repository, [keys], now)
    return repository


def tamper(repository: Path, version: str) -> None:
    """Flip one bit in the middle of a release's image, as a broken mirror or an attacker would."""
    (image,) = (repository / "targets" / "blink" / version).glob("*.image")
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 0x10
    image.write_bytes(bytes(data))


def configure(bench: Bench, repository: Path, folder: Path) -> Path:
    """The node's configuration, as an operator would write it; returns ``edged.toml``."""
    path = folder / "edged.toml"
    path.write_text(
        f"""\
[node]
id = "demo-node"
state_dir = "state"

[api]
socket = "edged.sock"

[trust]
repository = "{repository}"
root = "{repository}/metadata/1.root.json"

[metrics]
listen = ""

[[model]]
id = "{MODEL}"
hardware_ids = ["{bench.hardware_id}"]
flash_size = {bench.flash_bytes}

[model.health]
{bench.health}

[[device]]
id = "{DEVICE}"
model = "{MODEL}"
mapper = "{bench.mapper}"
address = "{bench.address}"

[device.config]
{bench.device_config}
"""
    )
    return path
