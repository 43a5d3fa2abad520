"""The one package on other machines: installed by apt, run, removed and purged on arm64 and armhf, under qemu-user.

The programs and libraries are those of the machine; kernel and systemd are not. The units are proved in guests.
"""

from __future__ import annotations

import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from foreign import INTERPRETERS
from guest import SUITES
from package_kit import ROOT, Deb, deb, run
from roots import Done, Recipe, root

pytestmark = pytest.mark.timeout(3600)

PACKAGES = ("systemd", "python3", "python3-cryptography", "python3-aiohttp", "tzdata")
"""What edged needs of the distribution, fetched before; nothing is fetched in the tests."""

MACHINES = tuple(f"{suite} {architecture}" for suite in SUITES for architecture in INTERPRETERS)
AT_A_TIME = 2

STEPS = {
    "machine": ("sh", "-c", ". /etc/os-release && echo $VERSION_CODENAME && dpkg --print-architecture"),
    "before": ("sh", "-c", "find / -xdev -path /proc -prune -o -path /dev -prune -o -print | sort"),
    "install": ("apt-get", "install", "--yes", "/root/edged.deb"),
    "plugin": ("sh", "-c", "mkdir -p /opt/edged/plugins && tar -xf /root/plugin.tar -C /opt/edged/plugins"),
    "check-config": ("edged", "check-config"),
    "doctor": ("edged", "doctor"),
    "demo": ("edged", "demo", "--fake"),
    "helper": ("/usr/libexec/edged-helper", "--help"),
    "user": ("id", "_edged"),
    "write": (
        *("sh", "-c"),
        "install -d -o _edged /var/lib/edged && echo key >/var/lib/edged/node-key.pem && touch /etc/edged/devices.d/a.toml"
        " && echo '# mine' >>/etc/edged/edged.toml",
    ),
    "remove": ("apt-get", "remove", "--yes", "edged"),
    "kept": ("sh", "-c", "tail -n 1 /etc/edged/edged.toml && ls /var/lib/edged /etc/edged/devices.d"),
    "purge": ("apt-get", "purge", "--yes", "edged"),
    "after": ("sh", "-c", "find / -xdev -path /proc -prune -o -path /dev -prune -o -print | sort"),
}
"""What an operator does, in this order."""

Report = dict[str, Done]


@pytest.fixture(scope="module")
def package() -> Deb:
    return deb()


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example mapper, laid out as ``pip install --no-deps --target`` does; as a tar."""
    folder = tmp_path_factory.mktemp("plugin")
    build = (
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--target",
        "wheel",
        "--directory",
        str(folder / "wheel"),
    )
    run(*build, cwd=ROOT / "examples/mapper-template")
    (wheel,) = (folder / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "tree")
    run("tar", "-cf", str(folder / "plugin.tar"), "-C", str(folder / "tree"), ".")
    return folder / "plugin.tar"


@pytest.fixture(scope="module")
def reports(package: Deb, plugin: Path) -> dict[str, Report]:
    """Each machine's steps, two machines at a time."""

    def walk(name: str) -> Report:
        suite, architecture = name.split()
        with root(Recipe(suite, architecture, PACKAGES)) as machine:
            machine.put(package.path, "/root/edged.deb")
            machine.put(plugin, "/root/plugin.tar")
            return {step: machine.run(*command) for step, command in STEPS.items()}

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return dict(zip(MACHINES, pool.map(walk, MACHINES), strict=True))


@pytest.fixture(params=MACHINES)
def report(request: pytest.FixtureRequest, reports: dict[str, Report]) -> Report:
    found = reports[request.param]
    assert found["machine"].out.split() == request.param.split()
    return found


def test_apt_installs_it(report: Report) -> None:
    assert report["install"].code == 0, report["install"].out
    assert "1 newly installed" in report["install"].out
    assert report["user"].code == 0 and "dialout" in report["user"].out


def test_the_helper_finds_its_modules(report: Report) -> None:
    assert report["helper"].code == 0 and "usage: " in report["helper"].out, report["helper"].out


def test_it_is_well_and_harmless(report: Report) -> None:
    """Only the trust is missing, and the daemon, since nothing starts units here."""
    assert report["check-config"].out == "/etc/edged/edged.toml: 0 models, 0 devices, no fault.\n"
    lines = report["doctor"].out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("fail")] == ["trust"], report["doctor"].out
    assert any(line.startswith("ok    plugin    uart") for line in lines)


def test_a_plugin_of_others_is_found(report: Report) -> None:
    assert re.search(r"^ok +plugin +lamp \(edged-lamp [\d.]+\)", report["doctor"].out, re.MULTILINE), report[
        "doctor"
    ].out


def test_a_flash_through_the_daemon(report: Report) -> None:
    """Signed, fetched, verified, written, read back, healthy; and what must be refused is refused."""
    assert report["demo"].code == 0, report["demo"].out
    assert "pump-1: succeeded: runs blink@2.0.0" in report["demo"].out
    assert "demo: ok" in report["demo"].out


def test_conffile_and_state_survive_a_removal(report: Report) -> None:
    for step in ("write", "remove", "kept"):
        assert report[step].code == 0, report[step].out
    assert report["kept"].out.splitlines()[0] == "# mine"
    assert {"node-key.pem", "a.toml"} <= set(report["kept"].out.split())


def test_a_purge_leaves_nothing(report: Report) -> None:
    """But what dpkg, apt and systemd write down of every package, and the operator's plugins. apt's hook was still there."""
    assert report["purge"].code == 0, report["purge"].out
    left = set(report["after"].out.split("\n")) - set(report["before"].out.split("\n"))
    books = (
        "/opt/edged",
        "/var/lib/apt/",
        "/var/lib/dpkg/",
        "/var/cache/",
        "/var/log/",
        "/etc/passwd-",
        "/etc/group-",
        "/etc/shadow-",
        "/etc/gshadow-",
    )
    assert {path for path in left if not path.startswith(books)} == set()
