"""Who a device and a broker are: passwords, certificates, hardware ids, and probes that touch nothing."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from broker_kit import Mosquitto
from cli_kit import Place, eventually
from click.testing import CliRunner
from engine_kit import until
from mqtt_kit import LINKS, SPEC, PullingDevice, mqtt_device
from mqtt_node import Authority, Plant, deployed, image_bytes, vendor_device

from edged.api import Desired, Device, SupportsDesired
from edged.cli import main
from edged.config import LinkSettings
from edged.domain.job import State
from edged.errors import Permanent, Reason, Refused, Transient
from edged.links import LinkPool, device_env
from edged.testing.node import life
from edged_mqtt.config import parse_config, parse_link
from edged_mqtt.session import MqttSession


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", "")
    plant = Plant(tmp_path / "plant")
    plant.publish("1.0.0", "2.0.0", size=20_000)
    return plant


def test_the_vendors_client_shows_a_certificate(plant: Plant, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    plant.tls(authority, client_ca=str(authority.ca), client_certificates="required")
    plant.device(proof="certificate")
    certificate, key = authority.issue("pump-1")
    shown = {"ca": str(authority.ca), "certificate": str(certificate), "key": str(key)}

    async def run() -> None:
        async with (
            life(plant.config, plant.plugins) as node,
            vendor_device(plant.port, tls=True, username="anything", **shown) as client,
        ):
            assert (await deployed(node, "pump@1.0.0")).state is State.SUCCEEDED
            job = await deployed(node, "pump@2.0.0")
            assert job.state is State.SUCCEEDED, job.detail
            assert await client.until(lambda line: line.startswith("updated")) == "updated pump 2.0.0"

    asyncio.run(run())


def test_a_device_with_a_password_is_known_by_both(plant: Plant) -> None:
    plant.device(proof="password")
    right = PullingDevice(plant.port, "pump-1", password="token-of-pump-1")
    wrong = PullingDevice(plant.port, "pump-1", password="token-of-pump-2")

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node:
            wrong.start()
            await until(lambda: "refused: 4" in wrong.log)
            assert not wrong.connected.is_set()
            right.start()
            try:
                assert (await deployed(node, "pump@1.0.0")).state is State.SUCCEEDED
                job = await deployed(node, "pump@2.0.0")
                assert job.state is State.SUCCEEDED, job.detail
                assert bytes(right.flash) == image_bytes("2.0.0", 20_000)
                assert not wrong.written
            finally:
                await right.stop()
                await wrong.stop()

    asyncio.run(run())


def test_hardware_is_what_the_device_says_where_it_is_asked(plant: Plant) -> None:
    plant.device(hardware_key="board", report_s=1.0)
    device = PullingDevice(plant.port, "token-of-pump-1", values={"board": "rev-c"})

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node:
            device.start()
            async with asyncio.timeout(20):
                await device.connected.wait()
                while True:
                    try:
                        async with node.sessions["pump-1"].lease(5) as lease:
                            assert (await lease.session.identify()).hardware_id == "rev-c"
                            break
                    except Transient:
                        await asyncio.sleep(0.05)
            await device.stop()

    asyncio.run(run())


def test_a_probe_tells_what_a_device_said_and_sends_nothing(plant: Plant) -> None:
    plant.device()
    address = plant.devices[0].address
    device = PullingDevice(plant.port, "token-of-pump-1")

    async def run() -> None:
        assert SPEC.probe is not None and not SPEC.probe_disturbs
        pool = LinkPool(LINKS)
        (settings,) = plant.config.device
        described = mqtt_device(plant.port)
        assert described.address == settings.address
        async with device_env("holder", pool).link(plant.listener):
            assert await SPEC.probe(address, device_env("probe", pool)) is None
            device.start()
            async with SPEC.connect(described, device_env("pump-1", pool)) as session:
                await session.slots()  # type: ignore[attr-defined]
                await until(lambda: b"attributes/response/1" in device.received)
                await asyncio.sleep(0.3)
                before = len(device.received)
                found = await SPEC.probe(address, device_env("probe", pool))
                assert found is not None and found.serial_number == "pump-1"
                assert dict(found.detail) == {
                    "protocol": "thingsboard",
                    "title": "pump",
                    "version": "1.0.0",
                }
                await asyncio.sleep(0.1)
                assert len(device.received) == before
        await device.stop()
        with pytest.raises(Permanent, match="allowed: mqtt:listen@"):
            await SPEC.probe("mqtt:nowhere", device_env("probe", pool))

    asyncio.run(run())


def test_the_command_that_names_an_endpoint_prints_who_is_there_and_touches_nothing(plant: Plant) -> None:
    plant.device()
    address = plant.devices[0].address
    tables = f"""
[[model]]
id = "pump"
[[device]]
id = "pump-1"
model = "pump"
mapper = "mqtt-thingsboard"
address = "{address}"
"""
    place = Place(plant.folder / "node", extra=tables).write()
    device = PullingDevice(plant.port, "token-of-pump-1")

    def is_told() -> bool:
        return "current_fw_version" in place.run("twin", "get", "pump-1").out

    async def run() -> None:
        device.start()
        await asyncio.to_thread(eventually, is_told, 20)
        await until(lambda: b"attributes/response/1" in device.received)
        await asyncio.sleep(0.3)
        before = bytes(device.received)
        answer = await asyncio.to_thread(place.run, "mapper", "probe", address)
        await asyncio.sleep(0.1)
        log = [*device.log]
        await device.stop()
        assert (answer.code, answer.err) == (0, "")
        assert answer.out.splitlines() == [
            "mapper    mqtt-thingsboard",
            "hardware  credential:pump-1",
            "serial    pump-1",
            "protocol  thingsboard",
            "title     pump",
            "version   1.0.0",
        ]
        assert before and bytes(device.received) == before
        # the endpoint may not have been open at its first try
        assert (log.count("connected"), log[-1]) == (1, "connected")
        assert (device.requests, device.flash, device.shared) == (0, b"", {})

    with place.daemon(fake=False, CREDENTIALS_DIRECTORY=str(plant.secrets)):
        asyncio.run(run())


def test_a_probe_tells_who_is_refused_at_the_endpoint_and_no_secret(plant: Plant) -> None:
    plant.secret("pump-1", "right\n")
    described = mqtt_device(plant.port, proof="password")
    wrong = PullingDevice(plant.port, "pump-1", "wrong")
    other = PullingDevice(plant.port, "nobodys-token")

    async def run() -> None:
        assert SPEC.probe is not None
        pool = LinkPool(LINKS)
        env = device_env("probe", pool)

        async def refused(name: str) -> str:
            assert SPEC.probe is not None
            with pytest.raises(Transient) as caught:
                await SPEC.probe(f"{plant.listener}/{name}", env)
            assert caught.value.reason is Reason.DEVICE_ABSENT
            return caught.value.detail

        async with device_env("holder", pool).link(plant.listener):
            assert await SPEC.probe(described.address, env) is None
            session = asyncio.create_task(_session(described, pool))
            wrong.start()
            await until(lambda: "refused: 4" in wrong.log)
            text = await refused("pump-1")
            assert re.fullmatch(
                r"pump-1 is not there; refused lately: 127\.0\.0\.1, \d s ago \(login_refused, as pump-1\)",
                text,
            )
            assert "as pump" not in await refused("pump-2")
            await wrong.stop()
            other.start()
            await until(lambda: "refused: 4" in other.log)
            text = await refused("pump-1")
            assert text.endswith("s ago (login_refused)") and "token" not in text
            await other.stop()
            session.cancel()
            await asyncio.wait([session])

    asyncio.run(run())


def test_a_probe_does_not_take_a_device_that_was_there_for_one_that_is(plant: Plant) -> None:
    plant.device()
    described = mqtt_device(plant.port)
    right, wrong = (PullingDevice(plant.port, token) for token in ("token-of-pump-1", "an-old-token"))

    async def run() -> None:
        assert SPEC.probe is not None
        pool = LinkPool(LINKS)
        env = device_env("probe", pool)
        async with device_env("holder", pool).link(plant.listener):
            starting = asyncio.get_running_loop().call_later(0.5, right.start)
            async with SPEC.connect(described, device_env("pump-1", pool)) as session:
                assert starting.when() <= asyncio.get_running_loop().time(), "it waits for its device"
                await session.slots()  # type: ignore[attr-defined]
                assert await SPEC.probe(described.address, env) is not None
                await right.stop()
                await until(lambda: not session.seat.present)  # type: ignore[attr-defined]
                assert await SPEC.probe(described.address, env) is None
                wrong.start()
                await until(lambda: "refused: 4" in wrong.log)
                with pytest.raises(Transient, match="pump-1 is not there; refused lately: .*login_refused"):
                    await SPEC.probe(described.address, env)
        await wrong.stop()

    asyncio.run(run())


def test_a_probe_tells_nothing_that_was_said_on_a_former_connection(plant: Plant) -> None:
    plant.device()
    described = mqtt_device(plant.port)
    first, second = (PullingDevice(plant.port, "token-of-pump-1") for _ in range(2))

    async def run() -> None:
        assert SPEC.probe is not None
        pool = LinkPool(LINKS)
        env = device_env("probe", pool)
        async with device_env("holder", pool).link(plant.listener) as endpoint:
            first.start()
            async with SPEC.connect(described, device_env("pump-1", pool)) as session:
                await session.slots()  # type: ignore[attr-defined]
            found = await SPEC.probe(described.address, env)
            assert found is not None and found.detail["version"] == "1.0.0", "it is the same connection"
            await first.stop()
            await until(lambda: not endpoint.is_present("pump-1"))  # type: ignore[attr-defined]
            second.start()
            await second.connected.wait()
            await until(lambda: endpoint.is_present("pump-1"))  # type: ignore[attr-defined]
            found = await SPEC.probe(described.address, env)
            assert found is not None and dict(found.detail) == {"protocol": "thingsboard"}
        await second.stop()

    asyncio.run(run())


async def _session(device: Device, pool: LinkPool) -> None:
    async with SPEC.connect(device, device_env(device.id, pool)):
        pass


def test_a_probe_listens_for_a_device_on_a_broker(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    device = PullingDevice(broker.port, prefix="devices/pump-1/", every_s=0.1)

    async def run() -> None:
        device.start()
        try:
            assert SPEC.probe is not None
            env = device_env("probe", LinkPool(LINKS))
            found = await SPEC.probe(f"mqtt:127.0.0.1:{broker.port}/devices/pump-1", env)
            assert found is not None and found.hardware_id == "credential:devices/pump-1"
        finally:
            await device.stop()

    with broker.running():
        asyncio.run(run())


def test_a_probe_takes_nothing_from_a_session_on_a_broker(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    address = f"mqtt:127.0.0.1:{broker.port}/devices/pump-1"
    described = Device("pump-1", "pump", SPEC.name, address, config=parse_config({"report_s": 2}))
    device = PullingDevice(broker.port, prefix="devices/pump-1/")

    async def run() -> None:
        assert SPEC.probe is not None
        pool = LinkPool(LINKS)
        env = device_env("probe", pool)
        async with device_env("holder", pool).link(f"mqtt:127.0.0.1:{broker.port}"):
            waits = asyncio.create_task(_session(described, pool))
            await asyncio.sleep(0.2)
            assert await SPEC.probe(address, env) is None, "a session waits for it beside"
            waits.cancel()
            await asyncio.wait([waits])
            # no session has its seat, as while one rests: what it runs it says but once
            probe = asyncio.create_task(SPEC.probe(address, env))
            device.start()
            assert await probe is not None
            async with SPEC.connect(described, device_env("pump-1", pool)) as session:
                (slot,) = (await session.slots()).slots  # type: ignore[attr-defined]
                assert slot.runs == "1.0.0"
        await device.stop()

    with broker.running():
        asyncio.run(run())


def test_what_a_probe_listened_for_is_not_subscribed_for_good(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    device = PullingDevice(broker.port, prefix="devices/pump-1/", every_s=0.1)

    async def run() -> None:
        assert SPEC.probe is not None
        pool = LinkPool(LINKS)
        async with device_env("holder", pool).link(f"mqtt:127.0.0.1:{broker.port}") as link:
            device.start()
            address = f"mqtt:127.0.0.1:{broker.port}/devices/pump-1"
            assert await SPEC.probe(address, device_env("probe", pool)) is not None
            assert not await link.hears("devices/pump-2", 0.5)  # type: ignore[attr-defined]
            held = link._held  # type: ignore[attr-defined]
            kept = len(held.take("devices/pump-1", asyncio.get_running_loop().time()))
            assert kept, "it was heard"
            await asyncio.sleep(0.5)
            assert not held.take("devices/pump-1", asyncio.get_running_loop().time())
        await device.stop()

    with broker.running():
        asyncio.run(run())


@pytest.mark.parametrize("name", ["fw_url", "sw_title", "fw_checksum_algorithm", "sw_tag"])
def test_no_wish_offers_a_device_an_image(plant: Plant, name: str) -> None:
    """What a device takes for an offer comes with a release that was verified, and in no other way."""
    described = mqtt_device(plant.port)
    plant.device()
    device = PullingDevice(plant.port, "token-of-pump-1")

    async def run() -> None:
        pool = LinkPool(LINKS)
        device.start()
        async with SPEC.connect(described, device_env("pump-1", pool)) as session:
            assert isinstance(session, SupportsDesired) and isinstance(session, MqttSession)
            wishes = [Desired(name, "http://example.org/x", 1), Desired("interval", 5, 1)]
            session.offer(wishes)
            with pytest.raises(Permanent, match=f"'{name}' would offer firmware") as caught:
                await session.apply(wishes[0])
            assert caught.value.reason is Reason.REQUEST_INVALID
            assert session._memory.shared == {"interval": 5}
        await device.stop()
        assert not any(name in str(one) for one in device.received)

    asyncio.run(run())


async def _connects(broker: Mosquitto, **table: Any) -> None:
    """Raises what opening the broker's link raises."""
    address = f"mqtt:127.0.0.1:{broker.port}"
    pool = LinkPool(LINKS, {address: parse_link(table, address.removeprefix("mqtt:"))})
    async with device_env("one", pool).link(address):
        pass


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # paho forgets a socket without handshake
def test_a_broker_wants_user_password_and_certificate(plant: Plant, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("broker")
    own, own_key = authority.issue("edged")
    passwords = tmp_path / "passwords"
    passwords.touch()
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "edged", "broker-secret"], check=True)
    plant.secret("broker", "broker-secret")
    plant.secret("wrong", "guess")
    plant.secret("mqtt-client-key", own_key.read_text())
    broker = Mosquitto(
        tmp_path,
        f"password_file {passwords}\ncafile {authority.ca}\ncertfile {certificate}\nkeyfile {key}\n"
        "require_certificate true",
    )
    whole = {"tls": True, "ca": str(authority.ca), "certificate": str(own), "user": "edged"}
    with broker.running():
        asyncio.run(_connects(broker, **whole, credential="broker"))
        for table, reason in (
            ({**whole, "credential": "wrong"}, Reason.CONFIG_INVALID),
            ({**whole, "credential": "absent"}, Reason.CONFIG_INVALID),
            ({**whole, "credential": "broker", "ca": "/nowhere"}, Reason.CONFIG_INVALID),
            ({**whole, "credential": "broker", "ca": ""}, Reason.DEVICE_ABSENT),
        ):
            with pytest.raises((Permanent, Transient, Refused)) as caught:
                asyncio.run(_connects(broker, **table))
            assert caught.value.reason is reason, (table, caught.value)


def test_a_broker_that_is_not_there_is_absent(tmp_path: Path) -> None:
    with pytest.raises(Transient) as caught:
        asyncio.run(_connects(Mosquitto(tmp_path)))
    assert caught.value.reason is Reason.DEVICE_ABSENT


def test_a_key_of_the_other_kind_of_wire_is_a_fault(plant: Plant) -> None:
    plant.device()
    plant.links.append(LinkSettings(address=plant.listener, config={"tls": True}))

    async def run() -> None:
        async with life(plant.config, plant.plugins) as node:
            with pytest.raises(Permanent, match="tls: found an unknown key; allowed: certificate, "):
                async with node.sessions["pump-1"].lease(5):
                    pass

    asyncio.run(run())


@pytest.mark.parametrize(
    ("address", "table", "text"),
    [
        (
            "mqtt:listen@0.0.0.0:8883",
            {"certificate": "/x", "client_id": "x"},
            "client_id: found an unknown key",
        ),
        (
            "mqtt:listen@0.0.0.0:8883",
            {"certificate": "/x", "client_certificates": "required"},
            "client_certificates: found 'required', but no client_ca",
        ),
        (
            "mqtt:broker.example.org:1883",
            {"ca": "/x", "user": "edged", "credential": "broker"},
            "credential: found one, but no TLS",
        ),
        ("mqtt:listen@0.0.0.0:1883", {}, "certificate: found none"),
    ],
)
def test_check_config_tells_what_a_wire_s_table_would_not_do(
    tmp_path: Path, address: str, table: dict[str, str], text: str
) -> None:
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items())
    config = tmp_path / "edged.toml"
    config.write_text(f'[[link]]\naddress = "{address}"\n[link.config]\n{lines}\n')
    answer = CliRunner().invoke(main, ["--config", str(config), "check-config"])
    assert answer.exit_code == 2 and f"config.{text}" in answer.stderr, answer.output


@pytest.mark.parametrize("described", [False, True])
def test_check_config_tells_of_a_wire_that_would_need_a_table(tmp_path: Path, described: bool) -> None:
    config = tmp_path / "edged.toml"
    table = (
        '[[link]]\naddress = "mqtt:listen@0.0.0.0:1883"\n[link.config]\nplain = true\n' if described else ""
    )
    address = "mqtt:listen@0.0.0.0:1883/pump-1"
    config.write_text(
        f'{table}[[model]]\nid = "pump"\n'
        f'[[device]]\nid = "pump-1"\nmodel = "pump"\nmapper = "{SPEC.name}"\naddress = "{address}"\n'
    )
    answer = CliRunner().invoke(main, ["--config", str(config), "check-config"])
    if described:
        assert answer.exit_code == 0, answer.output
    else:
        assert answer.exit_code == 2
        assert (
            "address: mqtt:listen@0.0.0.0:1883 has no [[link]] table; config.certificate: found none"
            in answer.stderr
        )


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (
            "listen@127.0.0.1:1883/pump-1",
            "listen@127.0.0.1:1883/pump-1",
            "pump-1 at mqtt:listen@127.0.0.1:1883",
        ),
        (
            'listen@127.0.0.1:1883/pump-1"\nconfig.credential = "key',
            'listen@127.0.0.1:1883/pump-2"\nconfig.credential = "key',
            "the token 'key' at mqtt:listen@127.0.0.1:1883",
        ),
        ("127.0.0.1:1883/a/pump-1", "127.0.0.1:1883/a/pump-1", "a/pump-1 at mqtt:127.0.0.1:1883"),
        ("listen@127.0.0.1:1883/pump-1", "listen@127.0.0.1:1884/pump-1", ""),
        ("127.0.0.1:1883/a/pump", "127.0.0.1:1883/b/pump", ""),
    ],
)
def test_check_config_tells_of_two_devices_that_are_one(
    tmp_path: Path, first: str, second: str, text: str
) -> None:
    devices = [
        f'[[device]]\nid = "{name}"\nmodel = "pump"\nmapper = "{SPEC.name}"\naddress = "mqtt:{address}"\n'
        for name, address in (("one", first), ("other", second))
    ]
    config = tmp_path / "edged.toml"
    config.write_text('[[model]]\nid = "pump"\n' + "".join(devices))
    answer = CliRunner().invoke(main, ["--config", str(config), "check-config"])
    if text:
        assert answer.exit_code == 2 and f"config: found {text}, as device 'one' has" in answer.stderr, (
            answer.output
        )
    else:
        assert answer.exit_code == 0, answer.output
