"""The benchmarks produce all their figures. How good those are is never asserted: it is the machine's affair."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import intelhex
import pytest

from edged.testing.avr import build_app, missing_packages

ROOT = Path(__file__).parents[1]
FIGURES = {
    "flash": ["whole", "transfer", "avrdude_utilisation", "edged_utilisation", "job"],
    "engine": ["read", "stage"],
    "fleet": [
        *("stk500.utilisation", "stk500.cpu", "stk500.simulator_cpu", "stk500.stop_and_wait"),
        *("window.utilisation", "window.cpu", "window.simulator_cpu"),
    ],
    "daemon": [
        *("start", "memory_idle", "memory_flashing", "memory_after"),
        *("written_idle", "written_update"),
    ],
    "can": ["paced", "udsoncan_share", "edged_share", "free", "cpu"],
    "mqtt": ["pulls", "pulls_acked", "cpu", "cpu_ratio", "fleet", "fleet_p99", "fleet_memory"],
    "store": ["twin_updates_1", "twin_updates_64"],
}
needs_tools = pytest.mark.skipif(
    bool(missing_packages()) or shutil.which("avrdude") is None,
    reason=f"not installed: {missing_packages()}, or avrdude",
)


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_quick_run_has_every_figure(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", name, "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["quick"] is True
    assert found["machine"].keys() == {"cores", "memory_mib", "architecture", "os", "kernel", "python"}
    assert [figure["name"] for figure in found["figures"]] == [f"{name}.{part}" for part in FIGURES[name]]
    for figure in found["figures"]:
        assert figure["value"] >= 0 and figure["against"] and figure["load"] >= 0
        assert figure["what"] in done.stdout


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "nonsense"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert all(name in done.stderr for name in FIGURES)


@needs_tools
@pytest.mark.slow
def test_avrdude_takes_the_simulated_fleet_for_a_board(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second implementation of STK500, held against a client that others wrote."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.fleet import fleet

    app = build_app(version="1.0.0", filler_bytes=1000)
    image = bytes(intelhex.IntelHex(str(app)).tobinarray(start=0))
    with fleet("stk500", 2) as boards:
        command = [
            *("avrdude", "-p", "m328p", "-c", "arduino", "-P", str(boards.port(1)), "-b", "115200", "-D")
        ]
        done = subprocess.run(
            [*command, "-U", f"flash:w:{app}:i"], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert boards.holds(1, len(image)) == image
        assert boards.holds(0, len(image)) == b"\xff" * len(image)
