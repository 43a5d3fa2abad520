"""The configuration of docs/mqtt.md as it stands there, and the access list that edged makes of it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from broker_kit import Mosquitto
from click.testing import CliRunner

from edged.cli import main
from edged_mqtt.acl import access_list
from edged_mqtt.config import BrokerConfig

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "mqtt.md").read_text(encoding="utf-8")


def fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_configuration_is_one(tmp_path: Path) -> None:
    (tmp_path / "edged.toml").write_text("\n".join(fences("toml")))
    answer = CliRunner().invoke(main, ["--config", str(tmp_path / "edged.toml"), "check-config"])
    assert answer.output.endswith("1 model, 4 devices, no fault.\n"), answer.output


def test_a_device_that_may_take_longer_to_say_what_it_runs_than_a_call_is_found(tmp_path: Path) -> None:
    config = tmp_path / "edged.toml"
    config.write_text("[engine]\ncall_s = 60\n" + _TABLES + "config = {report_s = 61}\n")
    answer = CliRunner().invoke(main, ["--config", str(config), "check-config"])
    assert answer.exit_code == 2 and "one call of mqtt-thingsboard may take 61 s" in answer.stderr


def test_every_count_has_its_word() -> None:
    said = set(re.findall(r"`(\w+)`", PAGE.partition("## Counts")[2].partition("##")[0]))
    counted: set[str] = set()
    for file in (ROOT / "mappers" / "edged_mqtt").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = (
                    node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                )
                if name in ("count", "_refuse_later", "Misbehaved"):
                    counted |= {
                        part.value
                        for part in ast.walk(node.args[0])
                        if isinstance(part, ast.Constant) and isinstance(part.value, str)
                    }
    assert said - {"edged_mapper_events_total"} == counted


# -- the access list

_TABLES = """
[[model]]
id = "pump"
[[link]]
address = "mqtt:127.0.0.1:8883"
config = {user = "edged"}
""" + "".join(
    f"""
[[device]]
id = "pump-{number}"
model = "pump"
mapper = "mqtt-thingsboard"
address = "mqtt:127.0.0.1:{port}/devices/pump-{number}"
"""
    for number, port in ((1, 8883), (2, 8883), (3, 1883))
)


def test_the_list_is_of_the_devices_on_that_broker_and_says_how_it_is_installed(tmp_path: Path) -> None:
    config = tmp_path / "edged.toml"
    config.write_text(_TABLES)

    def listed(*words: str) -> Any:
        return CliRunner().invoke(main, ["--config", str(config), "mapper", "acl", *words])

    text = listed("mqtt:127.0.0.1:8883").stdout
    assert re.findall(r"^user (.*)", text, re.MULTILINE) == ["edged", "pump-1", "pump-2"]
    assert "acl_file /etc/mosquitto/edged.acl" in text and "pump-3" not in text
    assert json.loads(listed("mqtt:127.0.0.1:8883", "--json").stdout) == {
        "address": "mqtt:127.0.0.1:8883",
        "access_list": text.rstrip("\n") + "\n",
    }
    for words, said in (
        ("mqtt:127.0.0.1:1883", "user: the [[link]] table has none"),
        ("mqtt:listen@127.0.0.1:8883", "it is this node's own endpoint"),
        ("serial:/dev/ttyUSB0", "there is no access list for a wire serial:"),
        ("rope:1", "no link for 'rope'"),
    ):
        answer = listed(words)
        assert answer.exit_code != 0 and said in answer.stderr, answer.output
    with pytest.raises(ValueError, match="a/pump and b/pump have the same user name 'pump'"):
        access_list("h:1", BrokerConfig(user="edged"), ["h:1/b/pump", "h:1/a/pump"])
    with pytest.raises(ValueError, match="this node and a/edged have the same user name 'edged'"):
        access_list("h:1", BrokerConfig(user="edged"), ["h:1/a/edged"])
    with pytest.raises(ValueError, match="no device of the configuration is on it"):
        access_list("h:1", BrokerConfig(user="edged"), ["h:2/a"])


@pytest.fixture
def broker(tmp_path: Path) -> Any:
    acl, passwords = tmp_path / "edged.acl", tmp_path / "passwords"
    config = tmp_path / "edged.toml"
    config.write_text(_TABLES)
    answer = CliRunner().invoke(main, ["--config", str(config), "mapper", "acl", "mqtt:127.0.0.1:8883"])
    assert answer.exit_code == 0, answer.output
    acl.write_text(answer.stdout)
    passwords.touch()
    for user in ("edged", "pump-1", "pump-2"):
        subprocess.run(["mosquitto_passwd", "-b", str(passwords), user, f"{user}-secret"], check=True)
    acl.chmod(0o600)
    broker = Mosquitto(tmp_path, f"password_file {passwords}\nacl_file {acl}")
    with broker.running():
        yield broker


class Ear:
    """``user`` subscribes ``topic`` for ``seconds``; ``heard`` is what came."""

    def __init__(self, port: int, user: str, topic: str, seconds: int = 3) -> None:
        command = ["mosquitto_sub", "-p", str(port), "-u", user, "-P", f"{user}-secret", "-t", topic, "-v"]
        self._process = subprocess.Popen(
            [*command, "-W", str(seconds)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def heard(self) -> list[str]:
        return self._process.communicate()[0].splitlines()


def say(port: int, user: str, topic: str) -> None:
    subprocess.run(
        [
            "mosquitto_pub",
            "-p",
            str(port),
            "-u",
            user,
            "-P",
            f"{user}-secret",
            "-t",
            topic,
            "-m",
            "x",
            "-q",
            "1",
        ],
        check=True,
        capture_output=True,
    )


def test_one_device_cannot_cross_into_another_s_topics(broker: Mosquitto) -> None:
    port = broker.port
    node = Ear(port, "edged", "devices/#")
    ears = {name: Ear(port, name, "#") for name in ("pump-1", "pump-2")}
    time.sleep(1)
    own = ["v1/devices/me/telemetry", "v1/devices/me/attributes", "v2/fw/request/1/chunk/0"]
    for topic in own:
        say(port, "pump-1", f"devices/pump-1/{topic}")
    for topic in (*own, "v2/fw/response/1/chunk/0", "v1/devices/me/attributes/response/1"):
        say(port, "pump-1", f"devices/pump-2/{topic}")
    # nor may it play the node to itself, or write elsewhere
    say(port, "pump-1", "devices/pump-1/v2/fw/response/1/chunk/0")
    say(port, "pump-1", "elsewhere")
    say(port, "edged", "devices/pump-2/v2/fw/response/1/chunk/0")
    assert sorted(node.heard()) == sorted(
        [*(f"devices/pump-1/{topic} x" for topic in own), "devices/pump-2/v2/fw/response/1/chunk/0 x"]
    )
    assert ears["pump-2"].heard() == ["devices/pump-2/v2/fw/response/1/chunk/0 x"]
    assert ears["pump-1"].heard() == ["devices/pump-1/v1/devices/me/attributes x"]
