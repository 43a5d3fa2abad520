"""The configuration of docs/mqtt.md as it stands there, and the access list that edged makes of it."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import json
import re
import ssl
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from broker_kit import Mosquitto
from cli_kit import eventually
from click.testing import CliRunner
from mqtt_kit import PullingDevice
from mqtt_node import Authority, Plant, awaited, deployed, image_bytes, vendor_device

from edged.cli import main
from edged.config import LinkSettings, examine
from edged.domain.job import State
from edged.plugins import discover
from edged.testing.node import life
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


def mosquitto_of_the_page(folder: Path, authority: Authority) -> Mosquitto:
    """A broker with the page's own block, as Debian's mosquitto reads it from its conf.d; with no list and no users yet."""
    block = re.search(
        r"^```\n# /etc/mosquitto/conf\.d/edged\.conf\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL
    )
    assert block
    certificate, key = authority.issue("broker")
    places = {
        "/etc/mosquitto/certs/node.crt": certificate,
        "/etc/mosquitto/certs/node.key": key,
        "/etc/mosquitto/passwords": folder / "passwords",
        "/etc/mosquitto/edged.acl": folder / "edged.acl",
        "listener 8883": "listener PORT 127.0.0.1",
    }
    assert all(block[1].count(place) == 1 for place in places)
    whole = replaced(block[1], {place: str(found) for place, found in places.items()})
    (folder / "passwords").touch()
    return Mosquitto(folder, whole=whole)


def replaced(text: str, places: dict[str, str]) -> str:
    for place, found in places.items():
        text = text.replace(place, found)
    return text


def write_page(folder: Path, places: dict[str, str]) -> Path:
    """The files of the page's configuration below ``folder``, with ``places`` in place of theirs; the main one."""
    for number, block in enumerate(fences("toml")):
        named = re.match(r"# /etc/edged/(\S+)", block)
        file = folder / (named[1] if named else f"devices.d/{number}.toml")
        file.parent.mkdir(exist_ok=True)
        with file.open("a") as text:
            text.write(replaced(block, places))
    return folder / "edged.toml"


def secrets(plant: Plant, key: Path) -> None:
    for name in ("pump-1", "pump-3", "broker"):
        plant.secret(name, f"secret-of-{name}\n")
    plant.secret("mqtt-key", key.read_text())


def users(broker: Mosquitto, config: Path) -> None:
    """What the page says of mosquitto's side."""
    folder, link = broker.folder, f"mqtt:localhost:{broker.port}"
    answer = CliRunner().invoke(main, ["--config", str(config), "mapper", "acl", link])
    assert answer.exit_code == 0, answer.output
    (folder / "edged.acl").write_text(answer.stdout)
    (folder / "edged.acl").chmod(0o600)
    for user, password in (("edged", "secret-of-broker"), ("pump-4", "secret-of-pump-4")):
        command = ["mosquitto_passwd", "-b", str(folder / "passwords"), user, password]
        subprocess.run(command, check=True)


def pumps(port: int, broker_port: int, authority: Authority) -> dict[str, PullingDevice]:
    """The four devices of the page."""

    def tls(name: str = "") -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(authority.ca))
        if name:
            context.load_cert_chain(*authority.issue(name))
        return context

    said: dict[str, Any] = {"values": {"self_test": "passed"}, "every_s": 0.2, "repeats": True}
    return {
        "pump-1": PullingDevice(port, "secret-of-pump-1", tls=tls(), **said),
        "pump-2": PullingDevice(port, "whoever", tls=tls("pump-2"), **said),
        "pump-3": PullingDevice(port, "pump-3", "secret-of-pump-3", tls=tls(), **said),
        "pump-4": PullingDevice(
            broker_port, "pump-4", "secret-of-pump-4", prefix="devices/pump-4/", tls=tls(), **said
        ),
    }


def test_the_example_flashes_its_four_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands there, but for addresses, ports and the places of certificates; three devices at the endpoint, one on a
    real mosquitto that is set up as the page says."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    authority, plant = Authority(tmp_path), Plant(tmp_path / "plant")
    broker = mosquitto_of_the_page(tmp_path, authority)
    plant.publish("1.0.0", "2.0.0", size=20_000)
    secrets(plant, authority.issue("node")[1])
    authority.ca.with_name("devices-ca.crt").write_bytes(authority.ca.read_bytes())
    (tmp_path / "edged.toml").write_text(
        f'[node]\nid = "node-17"\nstate_dir = "{tmp_path}/state"\n'
        f'[trust]\nrepository = "{plant.publisher.repo}"\nroot = "{plant.publisher.root}"\n'
    )
    places = {"0.0.0.0:8883": f"127.0.0.1:{plant.port}", "localhost:8883": f"localhost:{broker.port}"}
    config = write_page(tmp_path, {**places, "/etc/edged/mqtt/": f"{tmp_path}/"})
    found = examine(config)
    assert not found.problems
    users(broker, config)
    devices = pumps(plant.port, broker.port, authority)
    assert {device.id for device in found.config.device} == devices.keys()

    async def run() -> None:
        async with life(found.config, discover()) as node, AsyncExitStack() as stack:
            for device in devices.values():
                device.start()
                stack.push_async_callback(device.stop)
            for release in ("pump@1.0.0", "pump@2.0.0"):
                jobs = await asyncio.gather(*(deployed(node, release, name) for name in devices))
                assert [job.state for job in jobs] == [State.SUCCEEDED] * 4, [job.detail for job in jobs]

    with broker.running():
        asyncio.run(run())
    for device in devices.values():
        assert device.version == "2.0.0" and device.flash == image_bytes("2.0.0", 20_000)


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
                if name in ("count", "refuse", "_refuse", "_refuse_later", "Misbehaved"):
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
    """``user`` subscribes ``topic``, from now on; ``heard`` is what came before :data:`LAST` of ``of``."""

    def __init__(self, broker: Mosquitto, user: str, topic: str) -> None:
        command = ["mosquitto_sub", "-p", str(broker.port), "-u", user, "-P", f"{user}-secret", "-t", topic]
        self._process = subprocess.Popen(
            [*command, "-v", "-i", f"ear-{user}", "-W", "60"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        eventually(lambda: f"Sending SUBACK to ear-{user}" in broker.log)

    def heard(self, of: str) -> list[str]:
        with self._process as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if lines[-1] == f"devices/{of}/{LAST} x":
                    break
            process.kill()
        assert lines and lines.pop() == f"devices/{of}/{LAST} x", "it did not hear all"
        return [line for line in lines if LAST not in line]


LAST = "v1/devices/me/attributes/response/last"


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
    node = Ear(broker, "edged", "devices/#")
    ears = {name: Ear(broker, name, "#") for name in ("pump-1", "pump-2")}
    own = ["v1/devices/me/telemetry", "v1/devices/me/attributes", "v2/fw/request/1/chunk/0"]
    for topic in own:
        say(port, "pump-1", f"devices/pump-1/{topic}")
    for topic in (*own, "v2/fw/response/1/chunk/0", "v1/devices/me/attributes/response/1"):
        say(port, "pump-1", f"devices/pump-2/{topic}")
    # nor may it play the node to itself, or write elsewhere
    say(port, "pump-1", "devices/pump-1/v2/fw/response/1/chunk/0")
    say(port, "pump-1", "elsewhere")
    say(port, "edged", "devices/pump-2/v2/fw/response/1/chunk/0")
    for name in ears:
        say(port, "edged", f"devices/{name}/{LAST}")
    assert sorted(node.heard("pump-2")) == sorted(
        [*(f"devices/pump-1/{topic} x" for topic in own), "devices/pump-2/v2/fw/response/1/chunk/0 x"]
    )
    assert ears["pump-2"].heard("pump-2") == ["devices/pump-2/v2/fw/response/1/chunk/0 x"]
    assert ears["pump-1"].heard("pump-1") == ["devices/pump-1/v1/devices/me/attributes x"]


def test_the_vendors_client_needs_no_more_than_the_list_allows(
    broker: Mosquitto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It and its bridge with a password each; what the bridge says of itself below $SYS shows that the list holds."""
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    plant, folder = Plant(tmp_path / "plant"), tmp_path / "pump"
    plant.publish("1.0.0", "2.0.0", size=20_000)
    plant.secret("broker", "edged-secret\n")
    link = f"mqtt:127.0.0.1:{broker.port}"
    plant.device(address=f"{link}/devices/pump-1")
    plant.links.append(LinkSettings(address=link, config={"user": "edged", "credential": "broker"}))
    folder.mkdir()
    bridge = Mosquitto(
        folder,
        f"password_file {tmp_path / 'passwords'}",
        bridge=f"connection node\naddress 127.0.0.1:{broker.port}\nremote_username pump-1\n"
        'remote_password pump-1-secret\ntopic # both 1 "" devices/pump-1/\ntry_private true',
    )

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node:
            await awaited(node)
            login = {"username": "pump-1", "password": "pump-1-secret"}
            async with vendor_device(bridge.port, subscribe=True, **login) as client:
                for release in ("pump@1.0.0", "pump@2.0.0"):
                    job = await deployed(node, release)
                    assert job.state is State.SUCCEEDED, job.detail
                digest = hashlib.sha256(image_bytes("2.0.0", 20_000)).hexdigest()
                received = await client.until(lambda line: line.startswith("received"))
                assert received == f"received 20000 {digest} 2.0.0"
                # all that it asks for was answered
                assert (
                    await client.until(lambda line: line.startswith("limits")) == "limits 52428 False False"
                )
                client.tell("telemetry", {"temperature": 21})
                client.tell("attributes", {"serial": "P1"})
                async with asyncio.timeout(20):
                    while await node.reported("pump-1", "temperature") != 21:
                        await asyncio.sleep(0.02)
                    while await node.reported("pump-1", "serial") != "P1":
                        await asyncio.sleep(0.02)

    with bridge.running():
        asyncio.run(run())
    log = (tmp_path / "mosquitto.log").read_text(errors="replace")
    assert "u'pump-1'" in log and "u'edged'" in log
    denied = re.findall(r"Denied PUBLISH from .* '(.*?)', \.\.\.", log)
    assert denied and all(topic.startswith("$SYS/") for topic in denied), denied
