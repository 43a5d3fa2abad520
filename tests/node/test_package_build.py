"""How the Debian package is built: the same bytes each time, from a checkout that stays as it was, and to Debian's rules."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from package_kit import ROOT, deb, read, run
from roots import Recipe, root

pytestmark = pytest.mark.timeout(900)

VERSION = "0.1.0+again"


def checkout(folder: Path) -> Path:
    """A copy of this checkout elsewhere, with what the build fetches and its tools: no second download."""
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
        (folder / name).chmod((ROOT / name).stat().st_mode)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    # others may build at this moment, in a stage of their own
    shutil.copytree(ROOT / ".cache/deb", folder / ".cache/deb", ignore=shutil.ignore_patterns("stage.*"))
    return folder


def files(folder: Path) -> set[str]:
    """All that is there, without the tools of the checkout that it was copied from."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in found if path.parts[0] != ".venv"}


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    """Another folder, user's mask, time zone, language, home and number of cores, and a clock that is 400 days ahead."""
    first = deb(VERSION).path.read_bytes()
    other = checkout(tmp_path / "elsewhere" / "with a long name")
    env = {
        "TZ": "Pacific/Chatham",
        "LANG": "C",
        "HOME": str(tmp_path),
        "FAKETIME": "+400d",
        "VERSION": VERSION,
    }
    script = "umask 077 && exec taskset -c 0 faketime -f +400d packaging/build-deb.sh"
    before = files(other)
    said = run("sh", "-c", script, cwd=other, env=env, timeout_s=600)
    made = f"dist/edged_{VERSION}_all.deb"
    assert (other / made).read_bytes() == first, said
    assert files(other) == before | {made}, "the checkout did not stay as it was"


def test_another_version_is_that_version_throughout(tmp_path: Path) -> None:
    """As tests of upgrades build them; dpkg orders them around the one of the changelog."""
    package = deb(VERSION)
    assert package.field("Version") == VERSION
    assert f'__version__ = "{VERSION}"' in package.files["usr/lib/edged/edged/__init__.py"].decode()
    assert f"usr/lib/edged/edged-{VERSION}.dist-info/METADATA" in package.files
    run("dpkg", "--compare-versions", VERSION, "gt", deb().field("Version"))


@pytest.mark.parametrize("version", ["0.1-1", "v1", "1.0;reboot"])
def test_what_is_no_version_is_refused(version: str) -> None:
    done = subprocess.run(
        ["packaging/build-deb.sh"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "VERSION": version},
        capture_output=True,
    )
    assert done.returncode == 2 and version in done.stderr.decode()


def test_the_changelog_and_the_project_say_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("dpkg-parsechangelog", "-l", "packaging/debian/changelog", "-S", "Version").strip() == project


def test_a_broken_build_says_why(tmp_path: Path) -> None:
    """The log is kept back while all is well; and no package is left behind that looks like one."""
    other = checkout(tmp_path / "broken")
    notice = other / "packaging/debian/copyright"
    notice.write_text(notice.read_text().replace("urllib3", "urllib4"))
    done = subprocess.run(["packaging/build-deb.sh"], cwd=other, capture_output=True, text=True)
    assert done.returncode == 1
    assert "debian/copyright is not what the wheels say" in done.stderr
    assert not list((other / "dist").glob("*.deb"))


def complaints(out: str) -> list[str]:
    """Lintian's errors and warnings, and overrides that hide nothing."""
    return re.findall(
        r"^[EW]: .*$|^.*(?:mismatched-override|unused-override|alien-tag).*$", out, re.MULTILINE
    )


def test_lintian_of_the_oldest_debian(tmp_path: Path) -> None:
    lintian = ["lintian", "--allow-root", "--info", "--display-info", "--tag-display-limit", "0"]
    done = subprocess.run([*lintian, str(deb().path)], capture_output=True, text=True)
    assert complaints(done.stdout) == [], done.stdout
    assert done.returncode == 0


def test_lintian_of_the_newest_debian() -> None:
    """It knows of tags that the older one does not, and calls overrides of those that it lost errors."""
    with root(Recipe("trixie", "amd64", ("lintian",))) as debian:
        debian.put(deb().path, "/root/edged_0.1.0_all.deb")
        done = debian.run("lintian", "--allow-root", "--display-info", "/root/edged_0.1.0_all.deb")
    assert complaints(done.out) == [], done.out
    assert done.code == 0, done.out


def test_lintian_sees_what_is_wrong(tmp_path: Path) -> None:
    """So that a silent lintian means something."""
    tree = deb().unpack(tmp_path / "tree")
    run("dpkg-deb", "--control", str(deb().path), str(tree / "DEBIAN"))
    (tree / "lib").mkdir()
    (tree / "usr/bin/edged").write_text("#!/usr/local/bin/python\n")
    run("dpkg-deb", "-Zxz", "--root-owner-group", "--build", str(tree), str(tmp_path / "edged_0.1.0_all.deb"))
    assert read(tmp_path / "edged_0.1.0_all.deb").field("Package") == "edged"
    lintian = ["lintian", "--allow-root", str(tmp_path / "edged_0.1.0_all.deb")]
    done = subprocess.run(lintian, capture_output=True, text=True)
    assert any("interpreter-in-usr-local" in line for line in complaints(done.stdout))
    assert done.returncode == 2
