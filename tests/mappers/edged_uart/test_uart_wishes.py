"""What an operator wishes a device on a serial line to have, by the real daemon and command line: taken, or told why not."""

from __future__ import annotations

from pathlib import Path

from cli_kit import eventually
from daemon_kit import Node
from smp_kit import FACTORY
from smp_server import SmpServer
from uart_kit import needs_avr

from edged.testing.avr import SimulatedAvr, build_app


def node(folder: Path, mapper: str, port: Path, model: str = "") -> Node:
    config = folder / "edged.toml"
    config.write_text(f"""
[node]
state_dir = "{folder}/state"
[api]
socket = "{folder}/edged.sock"
[metrics]
listen = ""
[storage]
report_interval_s = 0.2
[[model]]
id = "board"
{model}
[[device]]
id = "board-1"
model = "board"
mapper = "{mapper}"
address = "serial:{port}"
""")
    return Node(folder, config)


def shown(node: Node) -> str:
    return node.edged("device", "show", "board-1").stdout


def test_a_setting_is_taken_and_one_that_is_not_described_is_told(tmp_path: Path) -> None:
    settings = {"app/interval": (5).to_bytes(4, "little")}
    table = '[model.config.settings]\n"app/interval" = { type = "uint32", unit = "s" }'
    with SmpServer(tmp_path, FACTORY, settings=settings) as device:
        place = node(tmp_path, "uart-smp", device.port, table)
        with place.life():
            wished = place.edged("twin", "set", "board-1", "setting.app/interval=9", "setting.app/nix=1")
            assert wished.returncode == 0, wished.stderr
            eventually(lambda: "setting.app/interval  9        9 s" in shown(place))
            assert "not taken setting.app/nix: unsupported: setting.app/nix cannot be set" in shown(place)
            assert place.edged("twin", "set", "board-1", "setting.app/nix=null").returncode == 0
            eventually(lambda: "not taken" not in shown(place))
        assert device.saved["app/interval"] == (9).to_bytes(4, "little")


@needs_avr
def test_a_mapper_that_sets_nothing_says_so(tmp_path: Path) -> None:
    with SimulatedAvr(tmp_path, application=build_app(version="1.0.0")) as board:
        place = node(tmp_path, "uart-stk500", board.port)
        with place.life():
            assert place.edged("twin", "set", "board-1", "level=5").returncode == 0
            said = "not taken level: unsupported: mapper uart-stk500 sets no properties"
            eventually(lambda: said in shown(place))
