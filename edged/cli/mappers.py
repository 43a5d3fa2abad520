"""``mapper list|probe|acl``."""

from __future__ import annotations

from typing import Any, NoReturn

import click

from edged.cli.context import (
    Context,
    command,
    echo,
    fail,
    job_exit_code,
    json_option,
    load_config,
    show_json,
    show_table,
)
from edged.domain import reasons


@click.group()
def mapper() -> None:
    """List the mappers, find out who answers at an address, keep devices on a broker apart.

    \b
    Examples:
      edged mapper list
      edged mapper probe serial:/dev/ttyUSB0
      edged mapper probe uart-stk500 serial:/dev/ttyACM0
      edged mapper acl mqtt:localhost:8883
    """


@mapper.command("list")
@json_option
@click.pass_obj
@command
def list_command(context: Context, as_json: bool) -> None:
    """List the mappers and the plugins, with why one is not in use.

    \b
    Example:
      edged mapper list
    """
    found = context.client().get("mappers")
    if as_json:
        show_json(found)
        return
    rows = [
        [spec["name"], ", ".join(spec["flash_protocols"]) or "-", _probes(spec)] for spec in found["mappers"]
    ]
    show_table(rows, ["MAPPER", "FLASH PROTOCOLS", "PROBES"])
    for plugin in found["plugins"]:
        if plugin["problem"]:
            echo(f"plugin {plugin['name']} ({plugin['distribution']}) is not in use: {plugin['problem']}")
    if not rows:
        echo("No mapper is installed.")


def _probes(spec: dict[str, Any]) -> str:
    if not spec["probes"]:
        return "no"
    return "yes, may reset the device" if spec["probe_disturbs"] else "yes"


@mapper.command()
@click.argument("words", metavar="[MAPPER] ADDRESS", nargs=-1)
@click.option("--device", "device_id", help="Ask a configured device instead.")
@json_option
@click.pass_obj
@command
def probe(context: Context, words: tuple[str, ...], device_id: str | None, as_json: bool) -> None:
    """Ask who answers at ADDRESS, or ask a configured device.

    Without MAPPER every mapper asks that can do so without disturbing a device. With it, or with --device, the device may be
    reset.

    \b
    Examples:
      edged mapper probe serial:/dev/ttyUSB0
      edged mapper probe uart-stk500 serial:/dev/ttyACM0
      edged mapper probe --device plc-1
    """
    client = context.client()
    match words, device_id:
        case (), str():
            found = client.post("devices", device_id, "probe")
        case (address,), None if ":" in address:
            _show_all(client.post("probes", body={"address": address}), as_json)
            return
        case (mapper_name, address), None:
            found = client.post("mappers", mapper_name, "probe", body={"address": address})
        case _:
            raise click.UsageError(
                "write ADDRESS (such as serial:/dev/ttyUSB0), MAPPER ADDRESS, or --device DEVICE"
            )
    if found["identity"] is None:
        _nobody(f"nobody that mapper {found['mapper']} knows answers at {found['address']}", as_json)
    if as_json:
        show_json(found)
        return
    _show(found)


@mapper.command()
@click.argument("address")
@json_option
@click.pass_obj
@command
def acl(context: Context, address: str, as_json: bool) -> None:
    """Print the access list for the broker at ADDRESS, and how to install it.

    With it the broker keeps each configured device out of the topics of the others. ADDRESS is the broker's, as in its [[link]]
    table. Needs no daemon.

    \b
    Examples:
      edged mapper acl mqtt:localhost:8883
      edged mapper acl mqtt:localhost:8883 > /etc/mosquitto/edged.acl
    """
    from edged import devices, plugins

    config = load_config(context, as_json=as_json)
    found = devices.access_list(config, plugins.discover(), address)
    if as_json:
        show_json({"address": address, "access_list": found})
        return
    for line in found.splitlines():
        echo(line)


def _show_all(found: dict[str, Any], as_json: bool) -> None:
    if not found["answers"]:
        _unheard(found, as_json)
    if as_json:
        show_json(found)
        return
    for answer in found["answers"]:
        echo(f"mapper    {answer['mapper']}")
        _show(answer)


def _unheard(found: dict[str, Any], as_json: bool) -> NoReturn:
    """Nobody answered: end with the cause, after what else went wrong."""
    failure = found["failure"]
    if not as_json:
        for name, problem in found["problems"].items():
            if failure is None or name != failure["mapper"]:
                echo(f"{name}: {problem}", err=True)
    not_asked = ", ".join(found["not_asked"])
    others = f"; not asked, since it may reset the device: {not_asked}" if not_asked else ""
    if failure is None:
        _nobody(f"nobody answers at {found['address']}{others}", as_json)
    text = f"{failure['mapper']}: {failure['detail']}{others}"
    code = job_exit_code(failure["reason"])
    fail(code, "failed", failure["reason"], text, failure["cure"], as_json=as_json)


def _nobody(text: str, as_json: bool) -> NoReturn:
    fail(
        reasons.EXIT_FAILED, "failed", "no_response", text, "check power, wiring and address", as_json=as_json
    )


def _show(found: dict[str, Any]) -> None:
    identity = found["identity"]
    echo(f"hardware  {identity['hardware_id']}")
    if identity["serial_number"]:
        echo(f"serial    {identity['serial_number']}")
    for name, value in identity["detail"].items():
        echo(f"{name:<9} {value}")
    for slot in found.get("slots", []):
        echo(
            f"slot      {slot['name']}: runs {slot['runs'] or 'unknown'}{', active' if slot['active'] else ''}"
        )
