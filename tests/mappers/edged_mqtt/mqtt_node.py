"""A node with devices that pull: releases, secrets, certificates and the engine, all real."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from engine_kit import Publisher
from mqtt_kit import PullingDevice
from peer_kit import peer_python

import edged_mqtt
from edged.config import (
    Config,
    DeviceSettings,
    EngineSettings,
    HealthSettings,
    LinkSettings,
    Model,
    Node,
    Policy,
    Storage,
    TrustSettings,
)
from edged.domain.job import Job, State
from edged.plugins import Plugins, discover
from edged.supervisor import UnitState
from edged.testing.node import TestNode, life
from edged.testing.ports import free_port

ENGINE = EngineSettings(
    first_backoff_s=0.05, longest_backoff_s=0.2, stall_s=20, lease_s=5, checkpoint_bytes=4096, checkpoint_s=0
)
IMAGE_BYTES = 200_000


def image_bytes(seed: str, size: int = IMAGE_BYTES) -> bytes:
    return random.Random(seed).randbytes(size)


class Authority:
    """Certificates of a plant: an authority and what it signed, as files in ``folder``.

    ``bare``: without key usage and key identifiers, as plants' own authorities often are.
    """

    def __init__(self, folder: Path, *, bare: bool = False) -> None:
        self.folder = folder
        self._bare = bare
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "plant")])
        self.ca = self._write("ca.crt", self._sign(self._name, self._key, ca=True))

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key of ``name``, for 127.0.0.1 and localhost."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._write(f"{name}.crt", self._sign(subject, key))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (self.folder / f"{name}.key").write_bytes(private)
        return certificate, self.folder / f"{name}.key"

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        if not self._bare:
            for extension in self._further(key, ca=ca):
                builder = builder.add_extension(extension, critical=isinstance(extension, x509.KeyUsage))
        return builder.sign(self._key, hashes.SHA256())

    def _further(self, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> list[x509.ExtensionType]:
        """What RFC 5280 wants of a certificate beside that."""
        names = (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        )
        usage = {"digital_signature": not ca, "key_cert_sign": ca, "crl_sign": ca}
        return [
            x509.KeyUsage(**usage, **dict.fromkeys(names, False)),
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
        ]

    def _write(self, name: str, certificate: x509.Certificate) -> Path:
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return path


@dataclass
class Plant:
    """A node's folder, its releases and its devices. ``secrets``: the folder of credentials."""

    folder: Path
    engine: EngineSettings = ENGINE
    health: HealthSettings | None = None
    without_fallback: bool = False
    hardware_ids: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)
    devices: list[DeviceSettings] = field(default_factory=list)
    links: list[LinkSettings] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.secrets = self.folder / "secrets"
        self.secrets.mkdir(exist_ok=True)
        os.environ["CREDENTIALS_DIRECTORY"] = str(self.secrets)
        self.publisher = Publisher(self.folder / "publisher")

    def publish(self, *versions: str, size: int = IMAGE_BYTES, name: str = "pump") -> None:
        self.publisher.base.mkdir(exist_ok=True)
        self.publisher.init()
        for version in versions:
            image = image_bytes(version, size)
            self.publisher.add(
                version, image, name=name, models=("pump",), protocol="thingsboard", chunk_size_bytes=4096
            )
        self.publisher.publish()

    def secret(self, name: str, text: str) -> None:
        (self.secrets / f"edged_{name}").write_text(text)

    @property
    def listener(self) -> str:
        return f"mqtt:listen@127.0.0.1:{self.port}"

    def device(self, name: str = "pump-1", address: str = "", **config: Any) -> None:
        if config.get("proof") != "certificate":
            self.secret(name, f"token-of-{name}\n")
        quick = {"report_s": 10.0, "silence_s": 8.0, "install_s": 10.0, "confirm_s": 0.5}
        self.devices.append(
            DeviceSettings(
                id=name,
                model="pump",
                mapper=edged_mqtt.NAME,
                address=address or f"{self.listener}/{name}",
                config=quick | config,
            )
        )

    def tls(self, authority: Authority, **table: Any) -> None:
        certificate, key = authority.issue("node")
        self.secret("mqtt-key", key.read_text())
        self.links.append(
            LinkSettings(address=self.listener, config={"certificate": str(certificate), **table})
        )

    @property
    def plugins(self) -> Plugins:
        return discover()

    @property
    def config(self) -> Config:
        model = Model(
            id="pump",
            hardware_ids=self.hardware_ids,
            health=self.health,
            policy=Policy(without_fallback=self.without_fallback),
        )
        return Config(
            node=Node(id="node-1", state_dir=self.folder / "state"),
            trust=TrustSettings(repository=str(self.publisher.repo), root=self.publisher.root),
            storage=Storage(report_interval_s=0.2),
            engine=self.engine,
            model=(model,),
            device=tuple(self.devices),
            link=tuple(self.links),
        )


async def deployed(node: TestNode, release: str, device: str = "pump-1", timeout_s: float = 60.0) -> Job:
    """The job for ``release``, when it has ended. Says where it stands where it does not."""
    await node.want(device, release)
    try:
        return await node.ended(device, timeout_s)
    except TimeoutError:
        unit = node.sessions[device].unit
        (job, *_) = await node.jobs(device)
        raise AssertionError(f"{job.state}, {job.waiting}; unit {unit.state}: {unit.detail}") from None


class VendorDevice:
    """The vendor's client in a process of its own; ``lines`` is what it said."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[str] = []

    async def until(self, found: Callable[[str], bool], timeout_s: float = 60.0) -> str:
        """The first line that fits, of those that were said and of those to come."""
        async with asyncio.timeout(timeout_s):
            for line in self.lines:
                if found(line):
                    return line
            while True:
                assert self._process.stdout is not None
                raw = await self._process.stdout.readline()
                assert raw, f"the client ended; it had said: {self.lines}"
                self.lines.append(raw.decode().strip())
                if found(self.lines[-1]):
                    return self.lines[-1]

    def tell(self, word: str, value: object = None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{word} {json.dumps(value)}\n".encode())


@asynccontextmanager
async def vendor_device(port: int, **settings: Any) -> AsyncIterator[VendorDevice]:
    """Connects and asks for its firmware; see ``vendor_device.py`` for the settings."""
    python = await asyncio.to_thread(peer_python, "tb-mqtt-client")
    script = Path(__file__).with_name("vendor_device.py")
    process = await asyncio.create_subprocess_exec(
        python, script, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=script.parent
    )
    whole = {"host": "127.0.0.1", "port": port, "version": "1.0.0", "tls": False, "chunk": 4096} | settings
    assert process.stdin is not None
    process.stdin.write(json.dumps(whole).encode() + b"\n")
    try:
        yield VendorDevice(process)
    finally:
        process.kill()
        await process.wait()


async def awaited(node: TestNode) -> None:
    """Until the node waits for all of its devices: on a broker it does not hear who speaks before that."""
    async with asyncio.timeout(20):
        while any(unit.unit.state is not UnitState.ABSENT for unit in node.sessions.all()):
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(plant: Plant, *devices: PullingDevice, **options: Any) -> AsyncIterator[TestNode]:
    """A life with ``devices`` that run what the node gave them. ``options``: of :func:`life`."""
    async with life(plant.config, plant.plugins, **options) as node:
        await awaited(node)
        for device in devices:
            device.start()
        try:
            first = await deployed(node, "pump@1.0.0")
            assert first.state is State.SUCCEEDED, first.detail
            yield node
        finally:
            for device in devices:
                await device.stop()
