"""``devices``, ``device show``, ``twin get|set``."""

from __future__ import annotations

import json
from typing import Any

import click

from edged.cli.context import Context, command, echo, json_option, show_json, show_table, text


@click.command()
@json_option
@click.pass_obj
@command
def devices(context: Context, as_json: bool) -> None:
    """List the devices: what each runs and should run.

    \b
    Examples:
      edged devices
      edged devices --json | jq -r '.devices[].id'
    """
    found = context.client().get("devices")
    if as_json:
        show_json(found)
        return
    rows = [
        [
            device["id"],
            device["model"],
            device["state"],
            text(device["runs"]),
            text(device["desired"]),
            device["job"]["state"] if device["job"] else "-",
            device["address"],
        ]
        for device in found["devices"]
    ]
    show_table(rows, ["DEVICE", "MODEL", "STATE", "RUNS", "DESIRED", "JOB", "ADDRESS"])
    for device in found["devices"]:
        if device["reason"]:
            cure = f"; cure: {device['cure']}" if device["cure"] else ""
            echo(f"{device['id']}: {device['reason']}: {device['detail']}{cure}")
        if device["left_alone"]:
            why = device["left_alone"]
            echo(f"{device['id']}: {why['reason']}: {why['detail']}; cure: {why['cure']}")
    if not rows:
        echo("No device is configured: add one in devices.d beside the configuration file.")


@click.group()
def device() -> None:
    """Look at one device.

    \b
    Example:
      edged device show plc-1
    """


@device.command()
@click.argument("device_id", metavar="DEVICE")
@json_option
@click.pass_obj
@command
def show(context: Context, device_id: str, as_json: bool) -> None:
    """Show a device: state, properties, last jobs.

    \b
    Examples:
      edged device show plc-1
      edged device show plc-1 --json
    """
    found = context.client().get("devices", device_id)
    if as_json:
        show_json(found)
        return
    attached, alone = found["attached"] or {}, found["left_alone"] or {}
    lines = {
        "device": f"{found['id']} ({found['model']}, mapper {found['mapper']}, {found['address']})",
        "state": found["state"] + (f": {found['reason']}: {found['detail']}" if found["reason"] else ""),
        "cure": found["cure"],
        "runs": text(found["runs"]),
        "desired": text(found["desired"])
        + (f": {alone['reason']}: {alone['detail']}; cure: {alone['cure']}" if alone else ""),
        "floor": f"release counter {found['floor']}",
        "hardware": text(attached.get("hardware_id")),
        "link": f"{attached['ceiling_bytes_per_s']:.0f} bytes/s at most" if attached else "-",
    }
    for name, line in lines.items():
        if line:
            echo(f"{name:<9} {line}")
    _show_twin(found["twin"])
    for name, why in attached.get("rejected", {}).items():
        echo(f"not taken {name}: {why}")
    for job in found["jobs"]:
        why = f"  {job['reason']}: {job['detail']}" if job["reason"] else ""
        echo(f"job       {job['id']}  {job['release']}  {job['state']}{why}")


@click.group()
def twin() -> None:
    """Read and set the properties of a device.

    \b
    Examples:
      edged twin get plc-1
      edged twin set plc-1 interval=5 firmware=blink@1.2
    """


@twin.command("get")
@click.argument("device_id", metavar="DEVICE")
@json_option
@click.pass_obj
@command
def get_command(context: Context, device_id: str, as_json: bool) -> None:
    """Show what a device should have (desired), and what it says that it has (reported).

    \b
    Example:
      edged twin get plc-1 --json | jq .delta
    """
    found = context.client().get("devices", device_id, "twin")
    if as_json:
        show_json(found)
    else:
        _show_twin(found)


@twin.command("set")
@click.argument("device_id", metavar="DEVICE")
@click.argument("assignments", metavar="NAME=VALUE...", nargs=-1, required=True)
@json_option
@click.pass_obj
@command
def set_command(context: Context, device_id: str, assignments: tuple[str, ...], as_json: bool) -> None:
    """Set desired properties. VALUE is JSON (5, true, "5", null), or a plain text.

    \b
    Examples:
      edged twin set plc-1 interval=5 name=pump
      edged twin set plc-1 firmware=blink@1.2
      edged twin set plc-1 firmware=null
    """
    desired = dict(_assignment(item) for item in assignments)
    answer = context.client().patch("devices", device_id, "twin", body={"desired": desired})
    if as_json:
        show_json(answer)
    elif answer["job"]:
        echo(
            f"{device_id}: job {answer['job']} ({answer['outcome']}); watch it: edged job watch {answer['job']}"
        )
    else:
        echo(f"{device_id}: {answer['outcome'].replace('_', ' ')}.{_told_later(device_id, desired)}")


def _told_later(device_id: str, desired: dict[str, Any]) -> str:
    """A property is told to the device when that is there, which may refuse it."""
    if desired.keys() <= {"firmware"}:
        return ""
    return f" What the device did not take, and why: edged device show {device_id}"


def _assignment(item: str) -> tuple[str, Any]:
    """``NAME=VALUE``. Raises ``click.UsageError``."""
    name, sign, value = item.partition("=")
    if not (name and sign):
        raise click.UsageError(f"{item!r}: write NAME=VALUE")
    try:
        return name, json.loads(value, parse_constant=str)
    except ValueError:
        return name, value


def _show_twin(twin: dict[str, Any]) -> None:
    names = sorted({*twin["desired"], *twin["reported"]})
    rows = [[name, _side(twin["desired"], name), _side(twin["reported"], name)] for name in names]
    # what was taken back is kept as null, and nothing to look at
    rows = [row for row in rows if row[1:] != ["-", "-"]]
    show_table(rows, ["PROPERTY", "DESIRED", "REPORTED"])


def _side(side: dict[str, Any], name: str) -> str:
    if name not in side:
        return "-"
    value, unit = side[name]["value"], side[name]["unit"]
    if isinstance(value, dict) and set(value) == {"name", "version"}:
        return f"{value['name']}@{value['version']}"
    return text(value) + (f" {unit}" if unit else "")
