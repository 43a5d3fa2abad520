"""The gate skips nothing: a run that is told to insist fails where a test was skipped, and make tells each of its runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPS = (
    "import pytest\n@pytest.mark.skip(reason='lacks a package')\ndef test_it(): ...\ndef test_other(): ...\n"
)


def outcome(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Of a run, by the rules of all tests here, over one test that is skipped and one that passes."""
    (folder / "test_both.py").write_text(SKIPS)
    known = {name: value for name, value in os.environ.items() if name != "CI" and "PYTEST" not in name}
    known |= {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "gate", "-p", "no:cacheprovider", *words, "test_both.py"]
    return subprocess.run(
        command, cwd=folder, env=known | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("words", "environment", "code"),
    [((), {}, 0), (("-p", "xdist", "-n", "1", "--no-skips"), {}, 1), ((), {"CI": "true"}, 1)],
    ids=["contributor", "make", "CI"],
)
def test_a_skipped_test_fails_the_run_that_insists(
    words: tuple[str, ...], environment: dict[str, str], code: int, tmp_path: Path
) -> None:
    found = outcome(tmp_path, *words, **environment)
    assert found.returncode == code, found.stdout + found.stderr
    assert "1 passed, 1 skipped" in found.stdout
    assert ("failed: it skipped tests" in found.stdout) == bool(code)


def test_the_runs_here_can_be_told(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getoption("no_skips") in (True, False)


def planned(*words: str) -> list[str]:
    """The runs of pytest that make would start; not as a make that these tests are in was told."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    told = subprocess.run(
        ["make", "-n", *words], cwd=ROOT, env=known, capture_output=True, text=True, check=True
    )
    return [line for line in told.stdout.splitlines() if "-m pytest" in line]


def test_make_insists_in_each_of_its_runs() -> None:
    runs = planned("INSIST=--no-skips", "test", "test-node")
    assert len(runs) == 3 and all(" --no-skips " in run for run in runs)


def test_make_insists_where_it_may_mount_a_disk() -> None:
    assert all((" --no-skips " in run) == (os.geteuid() == 0) for run in planned("test"))
