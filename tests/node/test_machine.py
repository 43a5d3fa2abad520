"""The package on a machine of its own: Debian's kernel, the daemon's sandbox as it is, CAN, hot-plug, watchdogs.

One machine is booted, gets the package by apt from a signed repository and is saved; each test goes on from there with a
copy of its disk.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from guest import SUITES, Image, Machine, Serial
from guest.command import Guest, GuestError, eventually
from guest.images import make_overlay
from guest.qemu import CAN, WATCHDOG
from node_kit import (
    Releases,
    await_job,
    board,
    configure,
    installed_disk,
    make_certificate,
    make_releases,
    send,
    send_releases,
    standing_still,
    start_job,
    written,
)
from repository_kit import REPOSITORY, install_from, publish

from edged.testing.avr import SimulatedAvr

pytestmark = pytest.mark.timeout(900)

FIXED, PLUGGED = "fixed-1", "plugged-1"
ADAPTER = "edge0001"
PLUGGED_PORT = f"/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_{ADAPTER}-if00-port0"
BROKER_PORT: Final = 8883
OPTIONS: Final = (*CAN, *WATCHDOG)
FILLER_BYTES = 4000
on_each = pytest.mark.parametrize("ready", SUITES, indirect=True)
on_the_oldest = pytest.mark.parametrize("ready", SUITES[:1], indirect=True)
MOST_EXPOSED: Final = 1.7


@dataclass(frozen=True, slots=True)
class Ready:
    """An installed and configured machine, its daemon stopped, saved as ``ready`` on ``disk``."""

    image: Image
    disk: Path
    boot_s: float
    install_s: float


@dataclass(frozen=True, slots=True)
class Site:
    """A machine that goes on from there, and its boards: one at ttyS1, one behind an adapter that can be plugged in."""

    guest: Machine
    fixed: SimulatedAvr
    plugged: SimulatedAvr


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Releases:
    return make_releases(tmp_path_factory.mktemp("releases"), ("1.0.0", "2.0.0"), FILLER_BYTES)


@pytest.fixture(scope="module")
def ready(
    request: pytest.FixtureRequest,
    images: dict[str, Image],
    deb: Path,
    releases: Releases,
    tmp_path_factory: pytest.TempPathFactory,
) -> Ready:
    folder, image = tmp_path_factory.mktemp("ready"), images[request.param]
    oldest = image.suite == SUITES[0]

    def prepare(guest: Guest) -> None:
        send_releases(guest, releases)
        configure(guest, {FIXED: "serial:/dev/ttyS1", PLUGGED: f"serial:{PLUGGED_PORT}"})

    base = image.disk if oldest else installed_disk(image, deb, folder, prepare)
    disk, install_s = make_overlay(base, folder / "disk.qcow2"), 0.0
    with boards(folder) as (fixed, plugged), machine(image, disk, folder, fixed, plugged) as guest:
        guest.start()
        boot_s, began = guest.boot_s, time.monotonic()
        if oldest:
            install_over_http(guest, publish(folder / "repository", deb))
            install_s = time.monotonic() - began
            prepare(guest)
        guest.run("systemctl", "stop", "edged.service", timeout_s=120)
        guest.save("ready")
    return Ready(image, disk, boot_s, install_s)


def install_over_http(guest: Machine, repository: Path) -> None:
    """``apt-get install edged`` from a signed repository behind a web server, as the page says it."""
    send(guest, repository, REPOSITORY)
    server = ("python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", REPOSITORY, "8080")
    guest.run("systemd-run", "--quiet", "--unit=web", *server)
    eventually(lambda: guest.sh("ss -Hltn sport = :8080"), 120, "the web server")
    key = (repository / "edged.asc").read_bytes()
    install_from(guest, key, "http://127.0.0.1:8080", "edged", timeout_s=600)
    guest.run("systemctl", "stop", "web.service")
    assert "http://127.0.0.1:8080" in guest.run("apt-cache", "policy", "edged").out


@contextmanager
def boards(folder: Path) -> Iterator[tuple[SimulatedAvr, SimulatedAvr]]:
    with board(folder / FIXED) as fixed, board(folder / PLUGGED) as plugged:
        yield fixed, plugged


def machine(image: Image, disk: Path, folder: Path, fixed: SimulatedAvr, plugged: SimulatedAvr) -> Machine:
    return Machine(
        image,
        disk,
        folder / "machine",
        serials=[Serial(fixed.port, fixed.pid)],
        hotplug={ADAPTER: Serial(plugged.port, plugged.pid)},
        options=OPTIONS,
        cpus=2,
        power_on=False,
    )


@pytest.fixture
def site(ready: Ready, tmp_path: Path) -> Iterator[Site]:
    disk = tmp_path / "disk.qcow2"
    shutil.copy(ready.disk, disk)
    with boards(tmp_path) as (fixed, plugged), machine(ready.image, disk, tmp_path, fixed, plugged) as guest:
        guest.start(snapshot="ready")
        # the clock of a machine that was saved has stood still since
        guest.run("date", "-s", f"@{time.time():.3f}")
        yield Site(guest, fixed, plugged)


def start(guest: Machine) -> None:
    guest.run("systemctl", "start", "edged.service", timeout_s=180)


@on_each
def test_its_exposure_is_what_the_pages_say(site: Site, ready: Ready) -> None:
    guest = site.guest
    start(guest)
    said = guest.run("systemd-analyze", "security", "--no-pager", "edged.service").out
    print(said)
    print(f"booted in {ready.boot_s:.1f} s; installed by apt in {ready.install_s:.1f} s (0: in a container)")
    found = re.search(r"Overall exposure level for edged.service: ([\d.]+)", said)
    assert found and float(found[1]) <= MOST_EXPOSED, said
    pid = guest.unit("edged.service", "MainPID")
    status = dict(
        line.split(":\t", 1) for line in guest.sh(f"cat /proc/{pid}/status").splitlines() if ":\t" in line
    )
    assert all(int(status[which], 16) == 0 for which in ("CapPrm", "CapEff", "CapBnd", "CapAmb"))
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    rollup = guest.sh(f"grep ^Pss: /proc/{pid}/smaps_rollup")
    print(f"memory of the daemon in the guest: VmRSS {status['VmRSS'].strip()}, {rollup}")


def probe(guest: Machine, setting: dict[str, Any]) -> dict[str, str]:
    """What came of each attempt in a unit that is edged.service but for the program that it starts."""
    unit = guest.sh("cat /usr/lib/systemd/system/edged.service")
    words = json.dumps(setting, separators=(",", ":")).replace('"', r"\"")
    program = f'ExecStart=/usr/bin/python3 -I /srv/probe.py "{words}"'
    assert unit.count("ExecStart=/usr/bin/edged run") == unit.count("Type=notify") == 1
    unit = unit.replace("ExecStart=/usr/bin/edged run", program).replace("Type=notify", "Type=oneshot")
    unit = re.sub(r"(?m)^(Restart|RestartSec|WatchdogSec|NotifyAccess|Sockets)=.*\n", "", unit)
    guest.write("/run/systemd/system/probe.service", unit)
    guest.put(Path(__file__).with_name("probe.py"), "/srv/probe.py")
    guest.run("systemctl", "daemon-reload")
    done = guest.run("systemctl", "start", "probe.service", check=False, timeout_s=180)
    guest.run("journalctl", "--sync")
    assert done.code == 0, guest.journal("probe.service")
    found: dict[str, str] = json.loads(
        next(line for line in guest.journal("probe.service").splitlines() if line[:1] == "{")
    )
    return found


@on_each
def test_the_sandbox_lets_through_what_is_needed_and_nothing_else(site: Site, tmp_path: Path) -> None:
    guest = site.guest
    guest.sh(
        "modprobe vcan; ip link add vcan0 type vcan; ip link set vcan0 up;"
        "for c in can0 can1; do ip link set $c type can bitrate 500000; ip link set $c up; done"
    )
    authority = start_broker(guest, tmp_path)
    pairs = [("vcan0", "vcan0"), ("can0", "can1")]
    found = probe(
        guest, {"ports": ["/dev/ttyS1"], "can": pairs, "broker": BROKER_PORT, "authority": authority}
    )
    print(json.dumps(found, indent=1))
    needed = {name: what for name, what in found.items() if not name.startswith("no: ")}
    assert len(needed) == 8 and set(needed.values()) == {"ok"}, needed
    refused = {name: what for name, what in found.items() if name.startswith("no: ")}
    assert len(refused) >= 18
    assert not {name for name, what in refused.items() if what == "ok"}
    assert set(refused.values()) <= {"EPERM", "EACCES", "EROFS", "ENOENT", "EAFNOSUPPORT"}, refused


def start_broker(guest: Machine, folder: Path) -> str:
    """mosquitto with TLS on the guest's loopback; where its authority's certificate lies in the guest."""
    for name, pem in make_certificate("localhost").items():
        guest.write(f"/srv/tls/{name}", pem, mode="644")
    guest.write(
        "/srv/tls/mosquitto.conf",
        f"listener {BROKER_PORT} 127.0.0.1\nallow_anonymous true\n"
        "cafile /srv/tls/ca.pem\ncertfile /srv/tls/server.pem\nkeyfile /srv/tls/server.key\n",
    )
    guest.run("systemd-run", "--unit=broker", "mosquitto", "-c", "/srv/tls/mosquitto.conf")
    listens = f"ss -Hltn sport = :{BROKER_PORT}"
    eventually(lambda: guest.sh(listens), 120, f"the broker: {folder}")
    return "/srv/tls/ca.pem"


@on_each
def test_it_flashes_over_the_serial_port_of_the_machine(site: Site, releases: Releases) -> None:
    guest, avr = site.guest, site.fixed
    start(guest)
    resets = avr.stats().external_resets
    assert await_job(guest, start_job(guest, "1.0.0", FIXED), 240) == "succeeded"
    assert releases.differing("1.0.0", avr.flash()) == 0
    assert avr.stats().external_resets > resets, "the board was not reset by DTR"
    assert guest.unit("edged.service", "NRestarts") == "0"


@on_the_oldest
def test_an_adapter_may_come_late_and_go_in_the_middle_of_a_flash(site: Site, releases: Releases) -> None:
    guest, avr = site.guest, site.plugged
    assert "usb-serial" not in guest.sh("ls /dev/serial/by-id 2>/dev/null || true")
    start(guest)
    wished = start_job(guest, "1.0.0", PLUGGED)
    guest.plug(ADAPTER)
    written(avr, 6, 120)
    with standing_still(avr):
        guest.unplug(ADAPTER)
        eventually(lambda: guest.run("test", "-e", PLUGGED_PORT, check=False).code, 120, "the port is gone")
        pages = avr.stats().pages_written
    assert 0 < pages < FILLER_BYTES / 128, "the adapter was not pulled out in the middle"
    guest.plug(ADAPTER)
    assert await_job(guest, wished, 300) == "succeeded"
    assert releases.differing("1.0.0", avr.flash()) == 0
    assert guest.unit("edged.service", "NRestarts") == "0"


@on_the_oldest
def test_a_daemon_that_hangs_is_started_again(site: Site) -> None:
    guest = site.guest
    guest.write("/etc/systemd/system/edged.service.d/soon.conf", "[Service]\nWatchdogSec=20\n")
    guest.run("systemctl", "daemon-reload")
    start(guest)
    pid = guest.unit("edged.service", "MainPID")
    guest.run("kill", "-STOP", pid)

    def started_again() -> bool:
        return guest.unit("edged.service", "NRestarts") == "1" and (
            guest.unit("edged.service", "ActiveState") == "active"
        )

    eventually(started_again, 240, "the daemon's second start", every_s=1)
    assert guest.unit("edged.service", "MainPID") != pid
    assert "watchdog" in guest.sh("journalctl -b --no-pager -o cat -u edged.service").lower()


@on_the_oldest
def test_a_machine_that_hangs_is_reset(site: Site) -> None:
    guest = site.guest
    example = "/usr/share/doc/edged/examples/systemd/hardware-watchdog.conf"
    guest.sh(
        f"mkdir -p /etc/systemd/system.conf.d; sed s/30s/10s/ {example} >/etc/systemd/system.conf.d/watchdog.conf;"
        "systemctl daemon-reexec; sysctl -q kernel.panic=0"
    )
    eventually(lambda: "10" in guest.sh("cat /sys/class/watchdog/watchdog0/timeout"), 120, "the watchdog")
    with pytest.raises(GuestError):
        guest.run("sh", "-c", "echo c >/proc/sysrq-trigger", timeout_s=20)
    eventually(guest.ended, 120, "the reset by the watchdog")
