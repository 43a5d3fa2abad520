"""The units, as systemd reads them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from helper_kit import ROOT, run

from edged.helper.apt import PACKAGE
from edged.helper.protocol import SOCKET

UNITS = ROOT / "systemd"
SERVICES = sorted(path.name for path in UNITS.glob("*.service"))
MOST_TENTHS = {"edged.service": 17, "edged-helper.service": 34, "edged-recover.service": 34}
"""Ten times the exposure, at most. Off line, systemd 252 counts 0.2 more for the helper than for the unit that runs."""


class Unit:
    """A unit's file; a key may stand in it several times."""

    def __init__(self, name: str) -> None:
        self._found: dict[tuple[str, str], list[str]] = {}
        section = ""
        for line in (UNITS / name).read_text().splitlines():
            if line.startswith("["):
                section = line.strip("[]")
            elif "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                self._found.setdefault((section, key), []).append(value)

    def all(self, section: str, key: str) -> list[str]:
        return self._found.get((section, key), [])

    def one(self, section: str, key: str) -> str:
        (value,) = self.all(section, key)
        return value


@pytest.mark.parametrize("name", SERVICES)
def test_exposure(name: str) -> None:
    """Exit code 1 where it is above the threshold."""
    run(
        "systemd-analyze",
        "security",
        "--offline=yes",
        "--no-pager",
        f"--threshold={MOST_TENTHS[name]}",
        UNITS / name,
    )


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    """Nothing is said about any unit; the programs that they start are given, and modprobe's units, which Debian has."""
    system = tmp_path / "usr/lib/systemd/system"
    shutil.copytree("/usr/lib/systemd/system", system, symlinks=True)
    for unit in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]:
        shutil.copy(unit, system)
    for program in (
        "usr/bin/edged",
        "usr/libexec/edged-helper",
        "usr/libexec/edged-recover",
        "usr/bin/systemctl",
    ):
        path = tmp_path / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    names = [path.name for path in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]]
    said = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"--root={tmp_path}", *names)
    ours = [line for line in said.splitlines() if "edged" in line]
    assert not ours


def test_a_slip_in_a_unit_is_seen(tmp_path: Path) -> None:
    """The test above can fail."""
    wrong = tmp_path / "edged.service"
    wrong.write_text((UNITS / "edged.service").read_text() + "\n[Service]\nProtectEverything=yes\n")
    done = run("sh", "-c", f"systemd-analyze verify --man=no {wrong} 2>&1; true")
    assert "ProtectEverything" in done


def test_every_group_of_the_daemon_is_made(tmp_path: Path) -> None:
    """A group that is missing would stop the unit."""
    lines = [
        line.split()
        for line in (UNITS / "edged.sysusers").read_text().splitlines()
        if not line.startswith("#")
    ]
    made = {words[1] for words in lines if words[0] in ("g", "u")}
    daemon = Unit("edged.service")
    wanted = {daemon.one("Service", "User"), *daemon.one("Service", "SupplementaryGroups").split()}
    wanted |= {Unit(name).one("Socket", "SocketGroup") for name in ("edged.socket", "edged-helper.socket")}
    assert wanted <= made


def test_the_helper_s_socket_is_the_daemon_s_and_not_the_operators() -> None:
    api, helper = Unit("edged.socket"), Unit("edged-helper.socket")
    assert api.one("Socket", "SocketGroup") == "edged" and helper.one("Socket", "SocketGroup") == "_edged"
    assert api.one("Socket", "SocketMode") == helper.one("Socket", "SocketMode") == "0660"
    assert helper.one("Socket", "ListenStream") == SOCKET
    assert api.one("Socket", "FileDescriptorName") == "api"


def test_the_daemon_is_always_there_again() -> None:
    daemon = Unit("edged.service")
    assert daemon.one("Service", "Restart") == "always" and daemon.one("Unit", "StartLimitIntervalSec") == "0"
    assert int(daemon.one("Service", "WatchdogSec")) > 0 and daemon.one("Service", "Type") == "notify"
    socket = Unit("edged.socket")
    assert (
        socket.one("Unit", "PartOf") == "edged.service" and socket.one("Unit", "StartLimitIntervalSec") == "0"
    )
    assert daemon.one("Install", "Also") == "edged.socket", (
        "what is disabled is started by the first question"
    )


def test_the_drivers_are_there_before_the_devices_are_allowed() -> None:
    """systemd resolves DeviceAllow when the unit starts."""
    daemon = Unit("edged.service")
    assert "char-ttyUSB rw" in daemon.all("Service", "DeviceAllow")
    wanted = set(daemon.one("Unit", "Wants").split())
    assert wanted <= set(daemon.one("Unit", "After").split())
    assert wanted == {"modprobe@usbserial.service", "modprobe@cdc_acm.service"}


def test_the_recovery_and_the_daemon_do_not_wait_for_each_other() -> None:
    recover, daemon = Unit("edged-recover.service"), Unit("edged.service")
    assert not any(
        "edged.service" in line for line in recover.all("Unit", "Before") + recover.all("Unit", "After")
    )
    assert not any("recover" in line for line in daemon.all("Unit", "After"))


def test_nothing_kills_dpkg_in_its_work() -> None:
    for name in ("edged-helper.service", "edged-recover.service"):
        unit = Unit(name)
        assert (
            unit.one("Service", "KillMode") == "mixed" and int(unit.one("Service", "TimeoutStopSec")) >= 600
        )


@pytest.mark.parametrize("name", ["edged-helper.service", "edged-recover.service"])
def test_what_runs_dpkg_sees_the_kernel_s_modules(name: str) -> None:
    """``update-initramfs``, which ``dpkg --configure -a`` may run, makes without them an image that boots nothing."""
    unit = Unit(name)
    assert not unit.all("Service", "ProtectKernelModules") and not unit.all("Service", "InaccessiblePaths")
    assert "CAP_SYS_MODULE" not in unit.one("Service", "CapabilityBoundingSet")


def test_the_helper_and_the_recovery_have_one_sandbox() -> None:
    """Both run dpkg: what one of them needs, the other needs too."""
    begin = re.compile(r"(Protect|Private|Restrict|System|Cap|No|Lock|Mem|Key|Rem)")
    boxes = [
        [line for line in (UNITS / name).read_text().splitlines() if begin.match(line)]
        for name in ("edged-helper.service", "edged-recover.service")
    ]
    assert boxes[0] == boxes[1] and len(boxes[0]) > 15


def test_examples_say_where_they_go_and_are_understood() -> None:
    for example in (UNITS / "examples").iterdir():
        first = example.read_text().splitlines()[0]
        assert re.fullmatch(
            rf"# /etc/systemd/(system\.conf\.d|system/edged\.service\.d)/{example.name}", first
        )


def test_the_page_says_what_the_units_say() -> None:
    page = (ROOT / "docs/hardening.md").read_text()
    drivers = [value.split()[0] for value in Unit("edged.service").all("Service", "DeviceAllow")]
    assert all(driver.removeprefix("char-") in page for driver in drivers)
    assert all(f"`{path.name}`" in page for path in (UNITS / "examples").iterdir())
    assert len(Unit("edged-helper.service").one("Service", "CapabilityBoundingSet").split()) == 9


def test_the_name_of_the_package() -> None:
    assert PACKAGE == "edged"
    assert all(
        "edged" in (UNITS / "libexec" / name).read_text() for name in ("edged-keep-deb", "edged-recover")
    )
