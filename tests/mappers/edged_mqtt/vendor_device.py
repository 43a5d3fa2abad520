"""A device made of the vendor's own client, run by the interpreter of ``tests/peers/tb-mqtt-client.txt``.

Reads one JSON object of settings from its standard input, and prints one line for each thing that happens.
"""

import hashlib
import json
import logging
import sys
import threading
import time

import tb_device_mqtt
from tb_device_mqtt import TBDeviceMqttClient, TBFirmwareState

settings = json.loads(sys.stdin.readline())
# the client rests for a second after each state; shorter rests change nothing of what it does
tb_device_mqtt.sleep = lambda seconds: time.sleep(min(seconds, 0.02))
logging.basicConfig(level=settings.get("log", "WARNING"), stream=sys.stderr)
done = threading.Event()


def say(*words: object) -> None:
    print(*words, flush=True)


def received(client: TBDeviceMqttClient, data: bytes, version: str) -> None:
    say("received", len(data), hashlib.sha256(data).hexdigest(), version)
    client.update_firmware_info(state=TBFirmwareState.UPDATING)
    title = client.firmware_info.get("fw_title")
    client.update_firmware_info(title=title, version=version, state=TBFirmwareState.UPDATED)
    say("updated", title, version)


def connected(client: object, userdata: object, flags: object, code: object, *rest: object) -> None:
    say("connected", code)
    if code != 0:
        # what it asks now would wait for a connection for ever, in the thread that should make one
        return
    if settings.get("subscribe"):
        # a broker does not match the client's own filter, v2/fw/response/+
        device._client.subscribe("v2/fw/response/+/chunk/+", qos=1)
    device.get_firmware_update()


device = TBDeviceMqttClient(
    settings["host"],
    settings["port"],
    username=settings.get("username"),
    password=settings.get("password"),
    chunk_size=settings["chunk"],
    client_id=settings.get("client_id", ""),
)


def limits(request: object, answer: object, *rest: object) -> None:
    device.on_service_configuration(request, answer, *rest)
    say("limits", device.max_payload_size, device._messages_rate_limit.has_limit(), "error" in answer)


device.service_configuration_callback = limits
device.current_firmware_info["current_fw_title"] = settings.get("title", "pump")
device.current_firmware_info["current_fw_version"] = settings["version"]
device.set_on_firmware_received_callback(received)
tls = {}
if settings["tls"]:
    tls = {
        "tls": True,
        "ca_certs": settings["ca"],
        "cert_file": settings.get("certificate"),
        "key_file": settings.get("key"),
    }
# connect() sets it after the network thread has started, and may be too late
device._TBDeviceMqttClient__connect_callback = connected
device.connect(connected, min_reconnect_delay=1, timeout=2, keepalive=30, **tls)
for line in sys.stdin:
    word, _, rest = line.strip().partition(" ")
    if word == "telemetry":
        device.send_telemetry(json.loads(rest))
    elif word == "attributes":
        device.send_attributes(json.loads(rest))
    elif word == "watch":
        device.subscribe_to_all_attributes(lambda values, error: say("shared", json.dumps(values)))
device.stop()
device.disconnect()
