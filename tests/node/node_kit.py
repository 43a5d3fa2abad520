"""What the tests of an installed node share: packages, releases, a board, and the hands of an operator."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from guest import Container, Image
from guest.command import Guest
from guest.images import make_disk
from intelhex import IntelHex

from edged.testing.avr import OPTIBOOT_328P, SimulatedAvr, build_app
from edged.testing.demo import DEVICE, MODEL, Bench, publish

ROOT: Final = Path(__file__).resolve().parents[2]
RELEASES: Final = "/srv/releases"
SOCKET: Final = "/run/edged/edged.sock"
HARDWARE: Final = f"avr:{OPTIBOOT_328P.signature.hex()}"
FLASH_BYTES: Final = 8192
"""What the model says: less than there is, so that little has to be read out before an update."""
ENDED: Final = ("succeeded", "failed", "cancelled", "reverted")

MODEL_FILE: Final = f"""\
[[model]]
id = "{MODEL}"
hardware_ids = ["{HARDWARE}"]
flash_size = {{flash_bytes}}

[model.health]
kind = "line"
pattern = "edged-app .* {{{{identifies_as}}}} ready"
timeout_s = 120
"""
"""A machine that others hold up may show nothing of an application for half a minute; that is not the question here."""


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
        flash_bytes=FLASH_BYTES,
        health="",
        daemon=(),
        images=images,
    )
    return Releases(publish(bench, folder), images)


@contextmanager
def board(folder: Path) -> Iterator[SimulatedAvr]:
    """Optiboot on a simulated ATmega328P, with an application that nobody released: one without costs far more time."""
    folder.mkdir()
    with SimulatedAvr(folder, application=build_app(version="0.0.1")) as avr:
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


def installed_disk(image: Image, deb: Path, folder: Path, prepare: Callable[[Container], None]) -> Path:
    """A raw disk with the package on it, and with what ``prepare`` does: in an emulated machine that takes minutes."""
    with Container(image, folder / "container") as guest:
        install(guest, deb)
        prepare(guest)
        guest.stop()
        make_disk(guest.root, folder / "installed.raw")
    return folder / "installed.raw"


def configure(
    guest: Guest, addresses: Mapping[str, str], *, device_config: str = "", flash_bytes: int = FLASH_BYTES
) -> None:
    """Say which devices there are (address by id) and where releases come from; start anew; trust the publisher."""
    guest.sh(rf"""sed -i 's|^#\?repository = .*|repository = "{RELEASES}"|' /etc/edged/edged.toml""")
    guest.write("/etc/edged/models.d/pump.toml", MODEL_FILE.format(flash_bytes=flash_bytes))
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


@contextmanager
def standing_still(avr: SimulatedAvr) -> Iterator[None]:
    """The board answers nothing, and is as far at the end of the block as it was at its beginning."""
    avr.stand_still()
    try:
        yield
    finally:
        avr.go_on()


API: Final = """
import http.client, json, socket, sys, time

def ask(method, path, body=None):
    connection = http.client.HTTPConnection("edged")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect("/run/edged/edged.sock")
    connection.request(method, "/v1/" + path, json.dumps(body) if body else None)
    answer = connection.getresponse()
    data = json.load(answer)
    assert answer.status < 300, data
    return data
"""
"""Begins a program that runs in a guest: the command line would take seconds to start on a slow machine."""


def start_job(guest: Guest, version: str, device: str) -> str:
    """Wish for a release through the API; the id of the job."""
    program = f"""{API}
answer = ask("POST", "deployments", {{"release": "blink@{version}", "devices": ["{device}"]}})
print(json.dumps(answer["devices"][0]["job"]))
"""
    return str(json.loads(guest.python(program, timeout_s=120)))


def await_job(guest: Guest, job_id: str, timeout_s: float) -> str:
    """The state that the job ends in. Raises AssertionError where it does not end in time."""
    program = f"""{API}
end = time.monotonic() + {timeout_s}
while (job := ask("GET", "jobs/{job_id}"))["state"] not in {ENDED} and time.monotonic() < end:
    time.sleep(0.2)
print(json.dumps(job))
"""
    found = json.loads(guest.python(program, timeout_s=timeout_s + 60))
    assert found["state"] in ENDED, f"{found}\n{guest.journal('edged.service')[-3000:]}"
    return str(found["state"])


def send_releases(guest: Guest, releases: Releases) -> None:
    """Bring the repository of releases into the guest."""
    send(guest, releases.folder, RELEASES)


def send(guest: Guest, folder: Path, inside: str) -> None:
    """Bring what is in ``folder`` into the guest, as on a stick."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(folder, arcname=".")
    guest.run("mkdir", "-p", inside)
    guest.run("tar", "-xC", inside, stdin=packed.getvalue())


def make_certificate(name: str) -> dict[str, bytes]:
    """A throw-away authority and a server's certificate for ``name``: ca.pem, server.pem, server.key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.now(UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("test authority", name)]

    def certify(which: int, *extensions: x509.ExtensionType) -> bytes:
        certificate = (
            x509.CertificateBuilder()
            .subject_name(names[which])
            .issuer_name(names[0])
            .public_key(keys[which].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=2))
        )
        # RFC 5280, 4.2.1: Python 3.13 insists on both key identifiers
        identifiers = (
            x509.SubjectKeyIdentifier.from_public_key(keys[which].public_key()),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()),
        )
        for extension in (*identifiers, *extensions):
            critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
            certificate = certificate.add_extension(extension, critical=critical)
        return certificate.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    may_sign = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    return {
        "ca.pem": certify(0, x509.BasicConstraints(ca=True, path_length=None), may_sign),
        "server.pem": certify(1, x509.SubjectAlternativeName([x509.DNSName(name)])),
        "server.key": keys[1].private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
    }
