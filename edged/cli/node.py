"""``run``, ``status``, ``check-config``: the daemon and its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edged.cli.context import (
    Context,
    command,
    counted,
    echo,
    give_up,
    json_option,
    load_config,
    show_json,
    text,
)

if TYPE_CHECKING:
    from edged.config import DeviceSettings, Examined


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Log as JSON, whatever the configuration says.")
@click.pass_obj
@command
def run(context: Context, as_json: bool) -> None:
    """Run the daemon in the foreground.

    Ends with SIGTERM or Ctrl-C; jobs keep their place and go on at the next start.

    \b
    Examples:
      edged run
      edged --config ./edged.toml run --json
    """
    config = load_config(context, as_json=False)
    if as_json:
        import attrs

        config = attrs.evolve(config, log=attrs.evolve(config.log, format="json"))
    from edged import app

    app.main(config)


@click.command()
@json_option
@click.pass_obj
@command
def status(context: Context, as_json: bool) -> None:
    """Show the node at a glance, and what is wrong with it.

    \b
    Examples:
      edged status
      edged status --json | jq .problems
    """
    found = context.client().get("status")
    if as_json:
        show_json(found)
        return
    devices, trust = found["devices"], found["trust"]
    # what the database cannot tell is not none
    counts, rows = found["jobs"], found["audit_seq"]
    jobs = "unknown" if counts is None else _listed(counts)
    audit = "unknown" if rows is None else counted(rows, "row")
    echo(f"node      {found['node']}, edged {found['version']}, pid {found['pid']}, since {found['started']}")
    away = devices["configured"] - devices["running"]
    echo(
        f"devices   {devices['configured']} configured, {devices['running']} connected, {devices['left_out']} left out"
        + ("; edged devices says why" if away else "")
    )
    echo(f"jobs      {jobs}; {found['running_jobs']} at work now")
    echo(f"trust     {_trust_line(trust)}")
    echo(f"audit     {audit}, key {found['public_key'][:16]}")
    for problem in found["problems"]:
        cure = f"; cure: {problem['cure']}" if problem["cure"] else ""
        echo(f"PROBLEM   {problem['part']}: {problem['detail']}{cure}")


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"


def _trust_line(trust: dict[str, Any]) -> str:
    if trust["online"] is None:
        return f"{text(trust['repository'])}: not verified yet"
    line = f"{trust['repository']}: {counted(trust['releases'], 'release')}, {'online' if trust['online'] else 'offline'}"
    line += f" ({trust['offline_because']})" if trust["offline_because"] else ""
    return line + (f", metadata expired {trust['stale_s'] / 3600:.1f} h ago" if trust["stale_s"] else "")


@click.command("check-config")
@json_option
@click.pass_obj
@command
def check_config(context: Context, as_json: bool) -> None:
    """Check the configuration files; list every fault.

    Also asks each device's mapper whether it understands the device's own table, and its link the address. Needs no daemon.

    \b
    Examples:
      edged check-config
      edged --config ./edged.toml check-config --json
    """
    from edged import config, devices, plugins

    found, installed = config.examine(context.config_path), plugins.discover()
    problems = list(found.problems)
    for device, seen in devices.examine(found.config, installed).items():
        settings = found.config.devices[device]
        faults = seen if isinstance(seen, list) else devices.examine_wire(settings, found.config, installed)
        problems += [f"{_place(found, settings, fault.detail)}.{fault.detail}" for fault in faults]
    for link in found.config.link:
        faults = devices.examine_link(link, installed)
        problems += [f"{found.places[link.address]}.{fault.detail}" for fault in faults]
    # what stands with a model is found once for each of its devices
    problems = list(dict.fromkeys(problems))
    if problems:
        give_up(problems, as_json=as_json)
    models, described = found.config.model, found.config.device
    if as_json:
        show_json({"problems": [], "models": len(models), "devices": len(described)})
    else:
        echo(f"{context.config_path}: {counted(models, 'model')}, {counted(described, 'device')}, no fault.")


def _place(found: Examined, settings: DeviceSettings, detail: str) -> str:
    """Where what a fault ``KEY: found ...`` is about is written."""
    table, _, path = detail.partition(":")[0].partition(".")
    return found.place_of(settings, path) if table == "config" and path else found.places[settings.id]
