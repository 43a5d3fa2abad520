"""Run in a guest as an operator's program: wishes for one release after the other, and tells what the API answered.

What it has been told it writes at once, one JSON object a line, to a port whose other end is outside the guest. So a
line there is an acknowledgement that must survive whatever happens to the guest afterwards. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

SOCKET = "/run/edged/edged.sock"
ENOUGH = Path("/run/enough")
ENDED = ("succeeded", "failed", "cancelled", "reverted")


def ask(method: str, path: str, body: object = None) -> Any:
    """Raises OSError where the daemon does not answer."""
    connection = http.client.HTTPConnection("edged")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(60)
    try:
        connection.sock.connect(SOCKET)
        connection.request(method, f"/v1/{path}", json.dumps(body) if body else None)
        answer = connection.getresponse()
        data = json.load(answer)
        assert answer.status < 300, data
        return data
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()


class Witness:
    def __init__(self, port: str, devices: list[str]) -> None:
        self._port = os.open(port, os.O_WRONLY)
        self._devices = devices
        self._audited = 0
        self._states: dict[str, str] = {}

    def tell(self, **facts: object) -> None:
        os.write(self._port, json.dumps(facts).encode() + b"\n")

    def run(self) -> None:
        self.tell(life=ask("GET", "status")["version"], intact=ask("GET", "audit/verify"))
        while True:
            self.drive(ask("GET", "jobs?limit=10")["jobs"])
            self.audit()
            # to ask is work for the daemon too, which on a slow machine must not be all that it does
            time.sleep(0.5)

    def drive(self, newest_first: list[Any]) -> None:
        for job in newest_first:
            if self._states.get(job["id"]) != job["state"]:
                self._states[job["id"]] = job["state"]
                self.tell(job=job["id"], device=job["device"], release=job["release"], state=job["state"])
        for device in self._devices:
            last = next((job for job in newest_first if job["device"] == device), None)
            if (last is None or last["state"] in ENDED) and not ENOUGH.exists():
                self.wish(device, int(last["release"].split("@")[1].split(".")[0]) + 1 if last else 1)

    def wish(self, device: str, version: int) -> None:
        release = f"blink@{version}.0.0"
        answer = ask("POST", "deployments", {"release": release, "devices": [device]})["devices"][0]
        self.tell(job=answer["job"], device=device, release=release, state="")

    def audit(self) -> None:
        for row in ask("GET", f"audit?after={self._audited}&limit=100")["records"]:
            self._audited = row["seq"]
            self.tell(audit=row["seq"], hash=row["hash"])


def main() -> None:
    witness = Witness(sys.argv[1], sys.argv[2:])
    while True:
        try:
            witness.run()
        except OSError:
            time.sleep(0.2)


if __name__ == "__main__":
    main()
