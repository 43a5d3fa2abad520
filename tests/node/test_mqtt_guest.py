"""A flash over MQTT with TLS on each Debian: the vendor's client pulls it from the daemon, in its sandbox as it is shipped.

The client is ThingsBoard's own, on the host's libraries and in the guest's network. Key and token are the unit's credentials.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Final

import pytest
from engine_kit import Publisher
from guest import Container, Image
from guest.command import eventually
from node_kit import RELEASES, ROOT, await_job, install, make_certificate, send, start_job
from peer_kit import peer_python

DEVICE: Final = "blink-1"
PORT: Final = 8883
TOKEN: Final = "s3cret-token"
IMAGE_BYTES: Final = 100_000
CLIENT: Final = ROOT / "tests/mappers/edged_mqtt/vendor_device.py"
LISTENER: Final = f"mqtt:listen@127.0.0.1:{PORT}"
MODEL_FILE: Final = '[[model]]\nid = "blink"\n'
DEVICE_FILE: Final = f"""\
[[device]]
id = "{DEVICE}"
model = "blink"
mapper = "mqtt-thingsboard"
address = "{LISTENER}/{DEVICE}"
"""
LINK: Final = f"""

[[link]]
address = "{LISTENER}"

[link.config]
certificate = "/etc/edged/server.pem"
"""


def image_bytes(version: str) -> bytes:
    return random.Random(version).randbytes(IMAGE_BYTES)


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Publisher:
    made = Publisher(tmp_path_factory.mktemp("publisher")).init()
    for version in ("1.0.0", "2.0.0"):
        made.add(version, image_bytes(version), name="blink", models=("blink",), protocol="thingsboard")
    made.publish()
    return made


@dataclass
class Client:
    """The vendor's client in a process of its own; ``lines`` is what it has said by now."""

    lines: list[str] = field(default_factory=list)

    def said(self, begin: str) -> str:
        """The first line that begins so, or nothing."""
        return next((line for line in self.lines if line.startswith(begin)), "")


@contextmanager
def client(guest: Container, authority: Path, **settings: Any) -> Iterator[Client]:
    """Connects to the daemon of ``guest``, and asks for its firmware; see ``vendor_device.py`` for the settings."""
    whole = {
        **{"host": "localhost", "port": PORT, "username": TOKEN, "title": "blink", "version": "1.0.0"},
        **{"chunk": 4096, "tls": True, "ca": str(authority)},
        **settings,
    }
    command = guest.beside(str(peer_python("tb-mqtt-client")), str(CLIENT))
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    found, lines = Client(), process.stdout
    reader = Thread(target=lambda: found.lines.extend(line.strip() for line in lines))
    reader.start()
    process.stdin.write(json.dumps(whole) + "\n")
    process.stdin.flush()
    try:
        yield found
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdin.close()
        process.stdout.close()


def configure(guest: Container, publisher: Publisher, pem: dict[str, bytes]) -> None:
    """As docs/mqtt.md says; the key and the token are files that only root can read."""
    send(guest, publisher.repo, RELEASES)
    guest.sh(rf"""sed -i 's|^#\?repository = .*|repository = "{RELEASES}"|' /etc/edged/edged.toml""")
    guest.run("tee", "-a", "/etc/edged/edged.toml", stdin=LINK)
    guest.write("/etc/edged/server.pem", pem["server.pem"])
    guest.write("/etc/edged/credentials/mqtt-key", pem["server.key"], mode="600")
    guest.write(f"/etc/edged/credentials/{DEVICE}", f"{TOKEN}\n", mode="600")
    guest.write("/etc/edged/models.d/blink.toml", MODEL_FILE)
    guest.write(f"/etc/edged/devices.d/{DEVICE}.toml", DEVICE_FILE)
    guest.run("edged", "check-config")
    guest.run("systemctl", "restart", "edged.service")
    guest.run("edged", "trust", "init", f"{RELEASES}/metadata/1.root.json")


SPEAKS: Final = """
import socket, ssl, sys
plain = socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20)
if sys.argv[2]:
    plain = ssl.create_default_context(cafile=sys.argv[2]).wrap_socket(plain, server_hostname="localhost")
user = sys.argv[3].encode()
body = b"\\0\\4MQTT\\4\\x82\\0\\x3c\\0\\0" + len(user).to_bytes(2, "big") + user
plain.sendall(b"\\x10" + bytes([len(body)]) + body)
try:
    print(getattr(plain, "version", str)(), plain.recv(4).hex())
except ConnectionResetError:
    print("", "")
"""
"""MQTT 3.1.1 (3.1, 3.2): CONNECT with a token as user name; prints the version of TLS and what came back."""


def test_the_vendors_client_pulls_an_image_over_tls_from_the_daemon_in_its_sandbox(
    suite_image: Image, tmp_path: Path, publisher: Publisher, deb: Path
) -> None:
    pem = make_certificate("localhost")
    authority = tmp_path / "ca.pem"
    authority.write_bytes(pem["ca.pem"])
    with Container(suite_image, tmp_path / "guest") as guest:
        install(guest, deb)
        configure(guest, publisher, pem)
        guest.write("/srv/ca.pem", pem["ca.pem"])
        eventually(lambda: guest.sh(f"ss -Hltn sport = :{PORT}"), 60, "the listener")
        # return code 4 is "bad user name or password" (3.2.2.3), 0 is "accepted"
        assert guest.python(SPEAKS, str(PORT), "/srv/ca.pem", "wrong") == "TLSv1.3 20020004"
        assert guest.python(SPEAKS, str(PORT), "/srv/ca.pem", TOKEN) == "TLSv1.3 20020000"
        assert "2002" not in guest.python(SPEAKS, str(PORT), "", TOKEN), "it speaks without TLS"
        with client(guest, authority) as device:
            # it runs that already: the node learns what there is to go back to
            assert await_job(guest, start_job(guest, "1.0.0", DEVICE), 300) == "succeeded"
            assert not device.said("received")
            assert await_job(guest, start_job(guest, "2.0.0", DEVICE), 300) == "succeeded"
            digest = hashlib.sha256(image_bytes("2.0.0")).hexdigest()
            assert device.said("received") == f"received {IMAGE_BYTES} {digest} 2.0.0"
            # it says so when it has told the node, whose job may have ended by then
            updated = eventually(lambda: device.said("updated"), 60, "the client's word")
            assert updated == "updated blink 2.0.0"
        assert guest.unit("edged.service", "DropInPaths") == "", "not the unit as it is shipped"
        refused = guest.run("cat", "/etc/edged/credentials/mqtt-key", user="_edged", check=False)
        assert refused.code == 1, "the daemon's user reads the key's file, and needs no credential"
        assert guest.unit("edged.service", "NRestarts") == "0"
        assert "Traceback" not in guest.journal("edged.service")
