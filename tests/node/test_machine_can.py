"""CAN on a machine of its own: Debian's kernel with its vcan and its ISO-TP, and the daemon in its sandbox as it is.

The controllers are programs in the guest, on raw sockets, with an ISO-TP of their own (``uds_server``): what the kernel sends
for the daemon is understood by somebody else. One machine of each Debian is booted for all of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import uds_server
from can_node import IMAGES, published
from guest import SUITES, Image, Machine
from guest.command import Guest, eventually
from guest.images import make_overlay
from node_kit import RELEASES, Releases, await_job, installed_disk, send, send_releases, start_job
from uds_server import BASE, Controller

pytestmark = pytest.mark.timeout(1200)

PLAIN, FAR = "drive-1", "drive-2"
WIRING: dict[str, dict[str, Any]] = {
    # 130 frames of a message, 20 ms apart: longer than an answer may take
    PLAIN: {"st_min": 20},
    FAR: {
        "receives": 0x18DA10F1,
        "sends": 0x18DAF110,
        "extended": True,
        "own": 0x12,
        "tester": 0xF1,
        "fd": True,
        "frame_bytes": 64,
    },
}
MODEL = f"""\
[[model]]
id = "ecu"
hardware_ids = ["uds:ECU-7"]
flash_base = {BASE:#x}
flash_size = 0x10000

[model.health]
kind = "property"
query = "F189"
pattern = "^{{identifies_as}}$"

[model.config]
answer_s = 2
boot_s = 30

[model.config.security]
credential = "drive"

[model.config.check]
parameters = ["crc32"]

[[model.config.properties]]
name = "pressure"
did = 0x0101
type = "u16"
poll_s = 1
"""
DEVICES = f"""\
[[device]]
id = "{PLAIN}"
model = "ecu"
mapper = "can-uds"
address = "can:vcan0"

[device.config]
bus_share = 0.7
dbc = "/etc/edged/drive.dbc"
signals = ["Engine.Speed"]
commands = ["Setpoint.Speed"]

[[device]]
id = "{FAR}"
model = "ecu"
mapper = "can-uds"
address = "can:socketcan@vcan1@500000/2000000"

[device.config]
request_id = 0x18DA10F1
response_id = 0x18DAF110
extended_ids = true
target_address = 0x12
source_address = 0xF1
fd = true

[device.config.security]
algorithm = "acme-v2"
credential = "drive"
"""
DBC = """\
VERSION ""
NS_ :
BS_:
BU_: ECU
BO_ 291 Engine: 2 ECU
 SG_ Speed : 0|16@1+ (0.25,0) [0|16383.75] "rpm" Vector__XXX
BO_ 2566844161 Setpoint: 2 ECU
 SG_ Speed : 0|16@1+ (0.25,0) [0|4000] "rpm" ECU
"""
CREDENTIAL = f"hex:{uds_server.SECRET.hex()}\n"
PLUGINS = "/opt/edged/plugins"
SEED_KEY = """\
def seed_key(seed, secret, level):
    return bytes(one ^ secret[at % len(secret)] for at, one in enumerate(seed))
"""
CANTOOLS = ("cantools", "bitstruct", "textparser", "argparse_addons", "crccheck")
"""With what it needs and the package does not have."""


@dataclass(frozen=True, slots=True)
class Site:
    """The guest, with the daemon at work and a controller on each of its two buses."""

    guest: Machine

    def flash(self, device: str) -> bytes:
        return bytes.fromhex(self.guest.sh(f"od -An -v -tx1 /srv/{device} | tr -d ' \\n'"))

    def counts(self, device: str) -> dict[str, int]:
        found: dict[str, int] = json.loads(self.guest.sh(f"cat /srv/{device}.json"))
        return found

    def holds(self, device: str, version: str) -> bool:
        flash = self.flash(device)
        return all(flash[at - BASE : at - BASE + len(data)] == data for at, data in IMAGES[version])

    def isotp_users(self) -> int:
        """Sockets and modules that use the kernel's ISO-TP."""
        return int(self.guest.sh("cat /sys/module/can_isotp/refcnt 2>/dev/null || echo 0"))


ON_BOTH = pytest.mark.parametrize("site", SUITES, indirect=True, scope="module")
ON_ONE = pytest.mark.parametrize("site", ["bookworm"], indirect=True, scope="module")
"""The daemon is the same on both: what it does where the bus fails is asked of one."""


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest,
    images: dict[str, Image],
    deb: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    folder, image = tmp_path_factory.mktemp("can-machine"), images[request.param]
    publisher = published(folder / "publisher", "blink")

    def prepare(guest: Guest) -> None:
        send_releases(guest, Releases(publisher.repo, {}))
        send(guest, plugins(folder / "plugins"), PLUGINS)
        guest.write("/etc/edged/drive.dbc", DBC)
        configure(guest)
        # its buses and controllers come first
        guest.run("systemctl", "disable", "--now", "edged.service")

    disk = make_overlay(installed_disk(image, deb, folder, prepare), folder / "disk.qcow2")
    with Machine(image, disk, folder / "machine", cpus=2) as guest:
        guest.sh(
            "modprobe vcan; for c in vcan0 vcan1; do ip link add $c type vcan; ip link set $c mtu 72; ip link set $c up; done"
        )
        for name, wiring in WIRING.items():
            start_controller(guest, name, f"vcan{list(WIRING).index(name)}", wiring)
        guest.run("systemctl", "enable", "--now", "edged.service", timeout_s=180)
        yield Site(guest)


def start_controller(guest: Machine, name: str, bus: str, wiring: dict[str, Any]) -> None:
    """A controller that runs the release 1.0.0, on ``bus``."""
    controller = Controller()
    controller.install(IMAGES["1.0.0"])
    guest.put(Path(uds_server.__file__), "/srv/uds_server.py")
    guest.write(f"/srv/{name}", bytes(controller.flash))
    command = ("python3", "-I", "/srv/uds_server.py", bus, f"/srv/{name}", json.dumps(wiring))
    guest.run("systemd-run", f"--unit={name}", *command)


def plugins(folder: Path) -> Path:
    """What an operator adds, laid out as ``pip install --no-deps --target`` does: a way from seed to key, and cantools."""
    about = folder / "acme_edged-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-edged\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[edged.seed_key]\nacme-v2 = acme_edged:seed_key\n")
    (folder / "acme_edged.py").write_text(SEED_KEY)
    for name in CANTOOLS:
        for file in distribution(name).files or ():
            # commands lie outside, and what is compiled is for this machine's Python
            if ".." not in file.parts and file.suffix not in (".pyc", ".so"):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), folder / file)
    return folder


def configure(guest: Guest) -> None:
    guest.sh(rf"""sed -i 's|^#\?repository = .*|repository = "{RELEASES}"|' /etc/edged/edged.toml""")
    guest.write("/etc/edged/models.d/ecu.toml", MODEL)
    guest.write("/etc/edged/devices.d/drives.toml", DEVICES)
    guest.write("/etc/edged/credentials/drive", CREDENTIAL, mode="600")
    guest.run("edged", "check-config")
    guest.run("systemctl", "restart", "edged.service", timeout_s=120)
    guest.run("edged", "trust", "init", f"{RELEASES}/metadata/1.root.json", timeout_s=120)


@ON_BOTH
def test_it_flashes_through_the_kernels_isotp_inside_the_sandbox(site: Site) -> None:
    guest = site.guest
    for device in WIRING:
        # it runs that already: the node learns what there is to go back to
        assert await_job(guest, start_job(guest, "1.0.0", device), 240) == "succeeded"
        assert site.counts(device)["written"] == 0
        assert await_job(guest, start_job(guest, "2.0.0", device), 240) == "succeeded"
        assert site.holds(device, "2.0.0")
        assert site.counts(device)["written"] == sum(len(data) for _, data in IMAGES["2.0.0"])
    assert site.isotp_users() >= 2, "no ISO-TP socket of the kernel is open"
    assert guest.unit("edged.service", "NRestarts") == "0"
    print(guest.sh("cat /proc/net/can/stats | head -20; lsmod | grep can"))


@ON_ONE
def test_it_reports_and_says_who_is_there(site: Site) -> None:
    guest = site.guest
    found = guest.json("edged", "mapper", "probe", "can:vcan0", "--json", timeout_s=120)
    assert "a session of this node is open" in json.dumps(found), found
    asked = guest.json("edged", "mapper", "probe", "--device", PLAIN, "--json", timeout_s=120)
    assert asked["identity"]["hardware_id"] == "uds:ECU-7" and "2.0.0" in json.dumps(asked), asked
    eventually(
        lambda: "pressure" in json.dumps(guest.json("edged", "twin", "get", PLAIN, "--json")), 60, "a report"
    )


RAW = """
import socket, sys
bus = socket.socket(socket.PF_CAN, socket.SOCK_RAW, socket.CAN_RAW)
bus.bind(("vcan0",))
if sys.argv[1] == "send":
    bus.send(bytes.fromhex("23010000" "02000000" "401f000000000000"))
else:
    print("listening", flush=True)
    while True:
        frame = bus.recv(72)
        if frame[:4] == bytes.fromhex("01effe98"):
            print(frame[8:8 + frame[4]].hex(), flush=True)
            break
"""
"""Frames of <linux/can.h>: identifier, length, data. ``Engine`` at 8000 steps; what is sent as ``Setpoint``."""


@ON_BOTH
def test_what_an_operator_adds_is_used_inside_the_sandbox(site: Site) -> None:
    """Its own seed and key unlocked the far controller before; signals by cantools go both ways."""
    guest = site.guest
    guest.write("/srv/raw.py", RAW)
    known = guest.run("edged", "check-config").out
    assert "no fault" in known, known
    guest.run("systemd-run", "--quiet", "--unit=heard", "python3", "-I", "/srv/raw.py", "listen")
    eventually(lambda: "listening" in guest.journal("heard"), 60, "who listens")
    guest.run("edged", "twin", "set", PLAIN, "Setpoint.Speed=500")
    eventually(lambda: "d007" in guest.journal("heard"), 60, "the command's frame")
    guest.sh("python3 -I /srv/raw.py send")
    eventually(
        lambda: "Engine.Speed" in json.dumps(guest.json("edged", "twin", "get", PLAIN, "--json")),
        60,
        "a signal",
    )
    print(guest.run("edged", "twin", "get", PLAIN).out)


@ON_ONE
def test_an_interface_that_goes_down_in_the_middle_is_waited_for(site: Site) -> None:
    guest = site.guest
    before = site.counts(PLAIN)["blocks"]
    wished = start_job(guest, "3.0.0", PLAIN)
    eventually(lambda: site.counts(PLAIN)["blocks"] > before, 120, "the first block", every_s=0.02)
    guest.sh("ip link set vcan0 down; sleep 3; ip link set vcan0 up")
    # what says that it is another one goes back, over the same bus
    assert await_job(guest, wished, 300) == "reverted"
    assert site.holds(PLAIN, "2.0.0")
    told = guest.run("edged", "job", "show", wished, timeout_s=60).out
    print(told)
    assert "device_reverted" in told


@ON_ONE
def test_without_isotp_in_the_kernel_can_isotp_does_it(site: Site) -> None:
    guest = site.guest
    guest.run("systemctl", "stop", "edged.service", timeout_s=120)
    guest.write("/etc/modprobe.d/no-isotp.conf", "install can-isotp /bin/false\nblacklist can-isotp\n")
    guest.sh("modprobe -r can-isotp")
    guest.run("systemctl", "start", "edged.service", timeout_s=180)
    assert await_job(guest, start_job(guest, "4.0.0", FAR), 240) == "succeeded"
    assert site.holds(FAR, "4.0.0")
    assert guest.sh("ls -d /sys/module/can_isotp 2>/dev/null | wc -l") == "0", "the kernel's was there"
