"""``mapper list|probe``."""

from __future__ import annotations

import click

from edged.cli.context import Context, command, echo, fail, json_option, show_json, show_table
from edged.domain import reasons


@click.group()
def mapper() -> None:
    """List the mappers, and find out who answers at an address.

    \b
    Examples:
      edged mapper list
      edged mapper probe uart-stk500 serial:/dev/ttyACM0
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
        [spec["name"], ", ".join(spec["flash_protocols"]) or "-", "yes" if spec["probes"] else "no"]
        for spec in found["mappers"]
    ]
    show_table(rows, ["MAPPER", "FLASH PROTOCOLS", "PROBES"])
    for plugin in found["plugins"]:
        if plugin["problem"]:
            echo(f"plugin {plugin['name']} ({plugin['distribution']}) is not in use: {plugin['problem']}")
    if not rows:
        echo("No mapper is installed.")


@mapper.command()
@click.argument("mapper_name", metavar="MAPPER", required=False)
@click.argument("address", required=False)
@click.option("--device", "device_id", help="Ask a configured device instead.")
@json_option
@click.pass_obj
@command
def probe(
    context: Context, mapper_name: str | None, address: str | None, device_id: str | None, as_json: bool
) -> None:
    """Ask who answers at ADDRESS, or ask a configured device. This may reset the device.

    \b
    Examples:
      edged mapper probe uart-stk500 serial:/dev/ttyACM0
      edged mapper probe --device plc-1
    """
    client = context.client()
    if device_id is not None and mapper_name is None:
        found = client.post("devices", device_id, "probe")
    elif device_id is None and mapper_name is not None and address is not None:
        found = client.post("mappers", mapper_name, "probe", body={"address": address})
    else:
        raise click.UsageError("write MAPPER ADDRESS, or --device DEVICE")
    identity = found["identity"]
    if identity is None:
        text = f"nobody that mapper {found['mapper']} knows answers at {found['address']}"
        fail(
            reasons.EXIT_FAILED,
            "failed",
            "no_response",
            text,
            "check power, wiring and address",
            as_json=as_json,
        )
    if as_json:
        show_json(found)
        return
    echo(f"hardware  {identity['hardware_id']}")
    if identity["serial_number"]:
        echo(f"serial    {identity['serial_number']}")
    for name, value in identity["detail"].items():
        echo(f"{name:<9} {value}")
    for slot in found.get("slots", []):
        echo(
            f"slot      {slot['name']}: runs {slot['runs'] or 'unknown'}{', active' if slot['active'] else ''}"
        )
