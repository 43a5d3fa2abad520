"""What is inside the Debian package, and what must not be: each trap of packaging that was met once, and the licences."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import Distribution, distributions
from pathlib import Path

import click
import pytest
from package_kit import ROOT, TREE, Deb, deb, run

from edged import config
from edged.cli import main

pytestmark = pytest.mark.timeout(900)  # the first test builds the package

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CUT = {"aiohttp", "cryptography", "pip", "tzdata", "pygments", "markdown-it-py"}
"""Not vendored, with all that only they need: Debian's own, and what nothing of edged calls."""


@pytest.fixture(scope="module")
def package() -> Deb:
    return deb()


@pytest.fixture(scope="module")
def unpacked(package: Deb, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.unpack(tmp_path_factory.mktemp("deb"))


def vendored(unpacked: Path) -> dict[str, Distribution]:
    """The libraries inside, by their normal name; without edged itself."""
    found = {_normal(d.metadata["Name"]): d for d in distributions(path=[str(unpacked / TREE)])}
    assert found.pop("edged").version == _version()
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _version() -> str:
    return str(PROJECT["version"])


# -- the package


def test_one_package_for_all_machines(package: Deb) -> None:
    assert package.path.name == f"edged_{package.field('Version')}_all.deb"
    assert package.field("Architecture") == "all"
    assert package.field("Version") == _version()


def test_it_is_as_small_as_the_docs_say(package: Deb) -> None:
    told = re.search(r": ([\d.]+) MB, (\d+) MB installed", (ROOT / "docs/packaging.md").read_text())
    assert told is not None
    assert round(package.path.stat().st_size / 1e6, 1) <= float(told[1]) + 0.2
    assert round(int(package.field("Installed-Size")) * 1024 / 1e6) <= int(told[2]) + 1


def test_depends_on_what_debian_compiles_and_on_nothing_guessed(package: Deb) -> None:
    """Metadata of the vendored libraries would make dh_python3 depend on Debian's packages of them."""
    assert sorted(package.field("Depends").split(", ")) == [
        "python3 (>= 3.11)",
        "python3-aiohttp (>= 3.8.4)",
        "python3-cryptography (>= 38.0.4)",
        "python3:any",
        "systemd | systemd-standalone-sysusers | systemd-sysusers",
        "tzdata",
    ]


def test_floors_are_those_that_the_suite_runs_on(package: Deb) -> None:
    floors = dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "packaging/floors.txt").read_text(), re.MULTILINE)
    )
    told = dict(re.findall(r"python3-(\w+) \(>= ([\d.]+)\)", package.field("Depends")))
    assert told == {name: floors[name] for name in ("aiohttp", "cryptography")}


def test_nothing_is_compiled(package: Deb) -> None:
    assert not [name for name, data in package.files.items() if data.startswith(b"\x7fELF")]
    assert not [name for name in package.files if re.search(r"\.(so|pyd|a|pyc)(\.|$)", name)]


def test_libraries_are_those_of_the_lock_file(unpacked: Path) -> None:
    lock = {p["name"]: p for p in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    wanted: dict[str, str] = {}
    waiting = ["edged"]
    while waiting:
        for need in lock[waiting.pop()].get("dependencies", []):
            if need["name"] not in CUT and need["name"] not in wanted:
                wanted[need["name"]] = lock[need["name"]]["version"]
                waiting.append(need["name"])
    assert {name: found.version for name, found in vendored(unpacked).items()} == wanted


def test_no_trace_of_the_build_in_the_metadata(package: Deb) -> None:
    inside = {name.rpartition("/")[2] for name in package.files if ".dist-info/" in name}
    assert inside == {"METADATA", "entry_points.txt"}
    assert not [name for name, data in package.files.items() if str(ROOT).encode() in data]


def test_plugins_are_found(unpacked: Path) -> None:
    (own,) = [d for d in distributions(path=[str(unpacked / TREE)]) if d.metadata["Name"] == "edged"]
    assert {(p.group, p.name) for p in own.entry_points} == {
        ("console_scripts", "edged"),
        *(("edged.plugins", name) for name in PROJECT["entry-points"]["edged.plugins"]),
    }


def test_vendored_files_are_no_programs(package: Deb) -> None:
    inside = [info for info in package.members if info.name.startswith(f"./{TREE}/") and info.isfile()]
    assert len(inside) > 400
    assert {info.mode for info in inside} == {0o644}
    assert not [i.name for i in inside if package.files[i.name.removeprefix("./")].startswith(b"#!")]


def test_everything_is_roots_and_no_older_than_the_changelog(package: Deb) -> None:
    assert {(info.uname, info.gname) for info in package.members} == {("root", "root")}
    stamp = run("dpkg-parsechangelog", "-l", "packaging/debian/changelog", "-S", "Timestamp").strip()
    assert {int(info.mtime) for info in package.members} == {int(stamp)}


def test_nothing_lies_below_lib(package: Deb) -> None:
    """/lib is a link on every supported system; newer dpkg and lintian refuse files there."""
    assert {info.name.split("/")[1] for info in package.members if info.name != "."} <= {"", "etc", "usr"}
    assert "usr/lib/systemd/system/edged.service" in package.files
    assert "usr/lib/udev/rules.d/60-edged.rules" in package.files


def test_all_that_the_units_name_is_there(package: Deb) -> None:
    units = {
        name: text.decode() for name, text in package.files.items() if name.startswith("usr/lib/systemd/")
    }
    assert {name.rpartition("/")[2] for name in units} == {
        path.name for kind in ("service", "socket") for path in (ROOT / "systemd").glob(f"*.{kind}")
    }
    modes = {info.name.removeprefix("./"): info.mode for info in package.members}
    for text in units.values():
        for program in re.findall(r"^ExecStart=/(\S+)", text, re.MULTILINE):
            assert modes[program] == 0o755
    for name in re.findall(
        r"/usr/libexec/(edged-[\w-]+)", package.files["etc/apt/apt.conf.d/50edged"].decode()
    ):
        assert modes[f"usr/libexec/{name}"] == 0o755


# -- the scripts


def test_the_user_is_made_before_the_daemon_starts(package: Deb) -> None:
    """With compat 13 the file is ignored without dh-sequence-installsysusers, and the unit ends with 217/USER."""
    postinst = package.script("postinst")
    assert postinst.index("systemd-sysusers") < postinst.index("systemd-tmpfiles")
    assert postinst.index("systemd-tmpfiles") < postinst.index("deb-systemd-invoke")
    assert "_edged" in package.files["usr/lib/sysusers.d/edged.conf"].decode()


def test_an_upgrade_starts_the_daemon_again_and_leaves_the_helper_alone(package: Deb) -> None:
    """The helper may be what runs the upgrade; and a socket cannot be started again below a running service."""
    postinst, prerm = package.script("postinst"), package.script("prerm")
    calls = re.findall(r"deb-systemd-invoke (\S+) (.*?) >/dev/null", postinst)
    assert calls == [("start", "'edged-helper.socket' 'edged.socket'"), ("$_dh_action", "'edged.service'")]
    assert "preinst" not in package.control
    for call in re.finditer(r"deb-systemd-invoke stop.*", prerm):
        before = prerm[: call.start()].rpartition("\nif ")[2]
        assert '"$1" = remove' in before, f"{call[0]} also happens on an upgrade"


def test_recovery_is_enabled_and_not_started(package: Deb) -> None:
    postinst = package.script("postinst")
    assert "deb-systemd-helper enable 'edged-recover.service'" in postinst
    assert not re.search(r"deb-systemd-helper enable 'edged-helper\.service'", postinst)


# -- configuration


def test_conffiles(package: Deb) -> None:
    assert sorted(package.script("conffiles").split()) == [
        "/etc/apt/apt.conf.d/50edged",
        "/etc/edged/edged.toml",
    ]


def test_as_installed_it_is_harmless(unpacked: Path) -> None:
    found = config.load(unpacked / "etc/edged/edged.toml")
    assert (found.models, found.devices, found.trust.repository) == ({}, {}, "")
    assert found.metrics.listen.startswith("127.0.0.1:")
    assert found == config.Config(), "the conffile says what is the default anyway, or hides what is not"


def test_credentials_are_roots_alone(package: Deb) -> None:
    modes = {info.name: info.mode for info in package.members if info.isdir()}
    assert modes["./etc/edged/credentials"] == 0o700
    assert modes["./etc/edged/models.d"] == modes["./etc/edged/devices.d"] == 0o755


# -- it runs from its folder alone

IMPORT_ALL = """
import pkgutil, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"pip", "tzdata", "pygments", "markdown_it", "mdurl", "pytest"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv[1])
import edged, edged_can, edged_firmware, edged_mqtt, edged_uart
packages = (edged, edged_can, edged_firmware, edged_mqtt, edged_uart)
names = [m.name for p in packages for m in pkgutil.walk_packages(p.__path__, p.__name__ + ".")]
for name in names:
    if name not in {"edged.__main__", "edged.testing.daemon", "edged.testing.pytest_plugin"}:
        __import__(name)
import rich.console, rich.progress, rich.table, sqlite_utils
import attr, click, cattrs
assert all(module.__file__.startswith(sys.argv[1]) for module in (edged, attr, click, cattrs, rich.table))
print(len(names))
"""


def test_every_module_is_imported_by_debians_python_without_what_is_left_out(unpacked: Path) -> None:
    """Debian's python3, its aiohttp and cryptography; nothing of pip, Pygments or pytest."""
    tree = str(unpacked / TREE)
    assert int(run("/usr/bin/python3", "-I", "-B", "-c", IMPORT_ALL, tree)) > 80


def test_the_folder_of_the_package_wins(package: Deb) -> None:
    """Debian's attrs and click, older ones, may be installed too; nothing of the user's surroundings is looked into."""
    for launcher in ("usr/bin/edged", "usr/libexec/edged-helper"):
        text = package.files[launcher].decode()
        assert text.startswith("#!/usr/bin/python3 -I\n")
        assert 'sys.path.insert(0, "/usr/lib/edged")' in text


def test_the_pages_are_on_the_node(package: Deb) -> None:
    """Whole, and where they name each other."""
    inside = "usr/share/doc/edged"
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert package.files[f"{inside}/{page.relative_to(ROOT)}"] == page.read_bytes()


# -- licences


def test_every_library_has_its_licence(package: Deb, unpacked: Path) -> None:
    text = package.files["usr/share/doc/edged/copyright"].decode()
    stanzas = {
        _normal(name): licence
        for name, licence in re.findall(
            r"^Files: wheels/(\w+)-\*\.whl\n(?:.*\n)*?License: (.*)$", text, re.MULTILINE
        )
    }
    assert set(stanzas) == set(vendored(unpacked))
    for name, found in vendored(unpacked).items():
        told = found.metadata["License-Expression"]
        if told and " AND " not in told:
            choices = told.split(" OR ")
            assert " or ".join(choices) in stanzas[name] or stanzas[name] in choices


def test_licences_say_who_holds_the_rights(package: Deb) -> None:
    text = package.files["usr/share/doc/edged/copyright"].decode()
    for paragraph in text.split("\n\nFiles: ")[1:]:
        assert re.match(r".*\nCopyright: \S.*\n(?: {11}\S.*\n)*License: \S.*\n \S", paragraph), paragraph[
            :200
        ]


def wheels() -> Path:
    """What the build fetched."""
    found = sorted((ROOT / ".cache/deb").glob("wheels-*"), key=lambda path: path.stat().st_mtime)
    return found[-1]


def _licences(folder: Path) -> str:
    return run(sys.executable, "packaging/licences.py", "copyright", str(folder))


def _copy_of_wheels(target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    target.mkdir()
    for wheel in wheels().glob("*.whl"):
        with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(target / wheel.name, "w") as new:
            for name in old.namelist():
                data = change(f"{wheel.name}/{name}", old.read(name))
                if data is not None:
                    new.writestr(name, data)
    return target


def test_a_licence_that_changes_is_seen(package: Deb, tmp_path: Path) -> None:
    """The build compares; here it is shown that the comparison sees a new holder, and a licence that is gone."""
    kept = (ROOT / "packaging/debian/copyright").read_text()
    assert _licences(wheels()) == kept

    def holder(name: str, data: bytes) -> bytes:
        return data.replace(b"2008-2020", b"2008-2027") if "urllib3" in name and "LICENSE" in name else data

    def lost(name: str, data: bytes) -> bytes | None:
        if "tabulate" in name and "LICENSE" in name:
            return None
        return data

    assert _licences(_copy_of_wheels(tmp_path / "holder", holder)) != kept
    done = subprocess.run(
        [sys.executable, "packaging/licences.py", "copyright", str(_copy_of_wheels(tmp_path / "lost", lost))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "names the licence without its text" in done.stderr


def test_the_bill_of_materials(package: Deb, unpacked: Path) -> None:
    bill = json.loads(package.files["usr/share/doc/edged/sbom.cdx.json"])
    locked = (ROOT / "uv.lock").read_text()
    assert {c["name"]: c["version"] for c in bill["components"]} == {
        name: found.version for name, found in vendored(unpacked).items()
    }
    assert all(f"sha256:{c['hashes'][0]['content']}" in locked for c in bill["components"])


# -- only what is locked, and only pure Python


def _vendor(
    folder: Path, *wheels: tuple[str, dict[str, bytes]], lock: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run the unpacking of ``wheels``, file name and content, as the build does."""
    (folder / "wheels").mkdir()
    hashes = ""
    for name, content in wheels:
        with zipfile.ZipFile(folder / "wheels" / name, "w") as archive:
            for path, data in content.items():
                archive.writestr(path, data)
        digest = run("sha256sum", str(folder / "wheels" / name)).split()[0] if lock else "0" * 64
        if not name.startswith("edged-"):
            hashes += f"{name.partition('-')[0]}==1 \\\n    --hash=sha256:{digest}\n"
    (folder / "requirements.txt").write_text(hashes)
    return subprocess.run(
        [
            sys.executable,
            "packaging/vendor.py",
            folder / "requirements.txt",
            folder / "wheels",
            folder / "tree",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


OWN = ("edged-1-py3-none-any.whl", {"edged/__init__.py": b"", "edged-1.dist-info/METADATA": b"Name: edged"})
PURE = "lamp-1-py3-none-any.whl"


def test_unpacking(tmp_path: Path) -> None:
    lamp = {
        "lamp.py": b"#!/usr/bin/python\nx = 1\n",
        "lamp-1.data/scripts/lamp": b"#!python\n",
        "lamp-1.dist-info/METADATA": b"Name: lamp",
        "lamp-1.dist-info/RECORD": b"",
        "lamp-1.dist-info/direct_url.json": b"{}",
    }
    done = _vendor(tmp_path, OWN, (PURE, lamp))
    assert done.returncode == 0, done.stderr
    tree = tmp_path / "tree"
    assert {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()} == {
        *("lamp.py", "lamp-1.dist-info/METADATA", "edged/__init__.py", "edged-1.dist-info/METADATA")
    }
    assert (tree / "lamp.py").read_text() == "#\nx = 1\n"


@pytest.mark.parametrize(
    ("wheel", "lock", "why"),
    [
        (
            ("lamp-1-cp311-abi3-manylinux_2_28_x86_64.whl", {"lamp.py": b""}),
            True,
            "made for one kind of machine",
        ),
        ((PURE, {"lamp.so": b"\x7fELF..."}), True, "lamp.so is compiled"),
        ((PURE, {"edged/__init__.py": b""}), True, "comes from two wheels"),
        ((PURE, {"lamp.py": b""}), False, "is not in uv.lock"),
    ],
)
def test_what_is_not_locked_pure_python_is_refused(
    tmp_path: Path, wheel: tuple[str, dict[str, bytes]], lock: bool, why: str
) -> None:
    done = _vendor(tmp_path, OWN, wheel, lock=lock)
    assert done.returncode == 1 and why in done.stderr


def test_a_wheel_that_is_missing_is_missed(tmp_path: Path) -> None:
    done = _vendor(tmp_path, (PURE, {"lamp.py": b""}))
    assert done.returncode == 1 and "1 wheels, expected 2" in done.stderr


# -- manual pages and completion


def _page(unpacked: Path, name: str) -> str:
    """The page as a terminal of 120 columns shows it; man must have nothing to complain about."""
    section = name.rpartition(".")[2]
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", str(unpacked / f"usr/share/man/man{section}/{name}.gz")],
        env={"LC_ALL": "C.UTF-8", "MANWIDTH": "120", "MANROFFSEQ": "", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return re.sub(r".\x08", "", done.stdout)


def test_the_page_of_the_command_has_every_command(unpacked: Path) -> None:
    page = _page(unpacked, "edged.1")
    for name in main.list_commands(click.Context(main)):
        assert re.search(rf"^   edged {name}\b", page, re.MULTILINE), name
    for words in ("edged release add", "edged job retry", "--allow-lower-counter", "--backup FILE"):
        assert words in page


def test_the_page_of_the_settings_has_every_table(unpacked: Path) -> None:
    page = _page(unpacked, "edged.toml.5")
    for heading in re.findall(
        r"^##+ `(\[.*\])`$", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE
    ):
        assert re.search(rf"^ *{re.escape(heading)}$", page, re.MULTILINE), heading
    for key in re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE):
        assert re.search(rf"\b{key}\b", page), key


def test_the_page_of_the_helper_tells_of_all_three_programs(package: Deb, unpacked: Path) -> None:
    page = _page(unpacked, "edged-helper.8")
    programs = {name.rpartition("/")[2] for name in package.files if name.startswith("usr/libexec/")}
    links = {i.name.rpartition("/")[2]: i.linkname for i in package.members if i.type == tarfile.SYMTYPE}
    for program in programs:
        assert f"{program}\n" in re.sub(r" +", "", page)
        assert program == "edged-helper" or links[f"{program}.8.gz"] == "edged-helper.8.gz"


def test_the_page_says_what_a_purge_deletes(package: Deb, unpacked: Path) -> None:
    (deleted,) = re.findall(r"^    rm -rf (.*?) \|\|$", package.script("postrm"), re.MULTILINE)
    section = _page(unpacked, "edged.1").partition("REMOVAL AND PURGE\n")[2].partition("\nFILES\n")[0]
    told = section.partition("apt purge edged deletes")[2].partition("It does not ask")[0]
    assert set(deleted.split()) == set(re.findall(r"(/[\w/-]*\w)", told))
    assert "edged doctor --backup" in section and "edged audit export" in section


def test_completion_in_bash(unpacked: Path) -> None:
    """bash asks the command; here the command is the one that is tested."""
    script = unpacked / "usr/share/bash-completion/completions/edged"
    ask = f"""
        PATH={Path(sys.executable).parent}:$PATH
        source {script}
        COMP_WORDS=(edged job re) COMP_CWORD=2
        _edged_completion edged
        echo "${{COMPREPLY[@]}}"
    """
    assert run("bash", "-c", ask).split() == ["retry"]


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("usr/share/zsh/vendor-completions/_edged", ("#compdef edged", "_EDGED_COMPLETE=zsh_complete")),
        (
            "usr/share/fish/vendor_completions.d/edged.fish",
            ("--command edged", "_EDGED_COMPLETE=fish_complete"),
        ),
    ],
)
def test_completion_in_other_shells(package: Deb, place: str, words: tuple[str, ...]) -> None:
    text = package.files[place].decode()
    assert all(word in text for word in words)
