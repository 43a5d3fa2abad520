"""What the tests of an installed node share: packages, releases, a board, and the hands of an operator."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from guest.command import Guest
from intelhex import IntelHex

from edged.testing.avr import OPTIBOOT_328P, SimulatedAvr, build_app
from edged.testing.demo import DEVICE, MODEL, Bench, publish

ROOT: Final = Path(__file__).resolve().parents[2]
RELEASES: Final = "/srv/releases"
SOCKET: Final = "/run/edged/edged.sock"
HARDWARE: Final = f"avr:{OPTIBOOT_328P.signature.hex()}"
ENDED: Final = ("succeeded", "failed", "cancelled", "reverted")

MODEL_FILE: Final = f"""\
[[model]]
id = "{MODEL}"
hardware_ids = ["{HARDWARE}"]
flash_size = {OPTIBOOT_328P.boot_at}

[model.health]
kind = "line"
pattern = "edged-app .* {{identifies_as}} ready"
timeout_s = 20
"""


@dataclass(frozen=True, slots=True)
class Releases:
    """A signed repository in ``folder``, and the image of each version ``blink@VERSION`` in it."""

    folder: Path
    images: Mapping[str, Path]

    def differing(self, version: str, flash: bytes) -> int:
        """How many bytes of the release ``flash`` does not hold."""
        image = IntelHex(str(self.images[version]))
        return sum(flash[address] != image[address] for address in image.addresses())


def make_releases(folder: Path, versions: tuple[str, ...], filler_bytes: int) -> Releases:
    """Applications for the simulated board as signed releases ``blink@VERSION``."""
    images = {version: build_app(version=version, filler_bytes=filler_bytes) for version in versions}
    bench = Bench(
        title="",
        mapper="uart-stk500",
        protocol="stk500v1",
        address="",
        hardware_id=HARDWARE,
        flash_bytes=OPTIBOOT_328P.boot_at,
        health="",
        daemon=(),
        images=images,
    )
    return Releases(publish(bench, folder), images)


@contextmanager
def board(folder: Path) -> Iterator[SimulatedAvr]:
    """Optiboot without an application on a simulated ATmega328P."""
    folder.mkdir()
    with SimulatedAvr(folder) as avr:
        yield avr


def build_package(version: str = "") -> Path:
    """``dist/edged_VERSION_all.deb`` of this checkout, built now; without a version the one of the changelog."""
    command = ["env", f"VERSION={version}", "packaging/build-deb.sh"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ROOT / done.stdout.split(":")[0].splitlines()[-1]


def install(guest: Guest, deb: Path, *options: str, timeout_s: float = 300) -> str:
    """``apt-get install`` of a file, as an operator does it; what it said."""
    inside = f"/var/tmp/{deb.name}"
    guest.put(deb, inside)
    return guest.run("apt-get", "install", "-y", *options, inside, timeout_s=timeout_s).out


def configure(guest: Guest, addresses: Mapping[str, str], *, device_config: str = "") -> None:
    """Say which devices there are (address by id) and where releases come from; start anew; trust the publisher."""
    guest.sh(rf"""sed -i 's|^#\?repository = .*|repository = "{RELEASES}"|' /etc/edged/edged.toml""")
    guest.write("/etc/edged/models.d/pump.toml", MODEL_FILE)
    for device, address in addresses.items():
        guest.write(
            f"/etc/edged/devices.d/{device}.toml",
            f'[[device]]\nid = "{device}"\nmodel = "{MODEL}"\nmapper = "uart-stk500"\naddress = "{address}"\n'
            f"\n[device.config]\n{device_config}\n",
        )
    guest.run("edged", "check-config")
    guest.run("systemctl", "restart", "edged.service", timeout_s=120)
    guest.run("edged", "trust", "init", f"{RELEASES}/metadata/1.root.json", timeout_s=120)


def deploy(guest: Guest, version: str, device: str = DEVICE) -> str:
    """Wish for a release; the id of the job that was answered."""
    answer = guest.json(
        "edged", "deploy", f"blink@{version}", "--to", device, "--yes", "--json", timeout_s=120
    )
    job = answer["devices"][0]["job"]
    assert isinstance(job, str), answer
    return job


def job(guest: Guest, job_id: str) -> Any:
    """A job as the API shows it."""
    return guest.json("edged", "job", "show", job_id, "--json")


def ended(guest: Guest, job_id: str, timeout_s: float) -> Any:
    """The job when it has ended. Raises AssertionError where it does not in time."""
    deadline = time.monotonic() + timeout_s
    while (found := job(guest, job_id))["state"] not in ENDED:
        assert time.monotonic() < deadline, f"{found}\n{guest.journal('edged.service')[-3000:]}"
        time.sleep(0.2)
    return found


def written(avr: SimulatedAvr, pages: int, timeout_s: float) -> None:
    """Return when ``pages`` more pages have been written than now."""
    wanted, deadline = avr.stats().pages_written + pages, time.monotonic() + timeout_s
    while avr.stats().pages_written < wanted:
        assert time.monotonic() < deadline, f"only {avr.stats()}"
        time.sleep(0.01)
