"""The command ``edged``: every command is one function that talks to the local API, or works on files where it must.

Commands are imported when they are called, so that ``edged --help`` and a script's ``edged status`` start quickly.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 refused by trust or policy, 4 the daemon does not answer.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from edged import __version__
from edged.cli.context import DEFAULT_CONFIG, Context

COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("edged.cli.node:run", "Run the daemon in the foreground."),
    "status": ("edged.cli.node:status", "Show the node at a glance, and what is wrong with it."),
    "devices": ("edged.cli.devices:devices", "List the devices: what each runs and should run."),
    "device": ("edged.cli.devices:device", "Look at one device."),
    "twin": ("edged.cli.devices:twin", "Read and set the properties of a device."),
    "deploy": ("edged.cli.jobs:deploy", "Make devices run a release."),
    "plan": ("edged.cli.jobs:plan", "Show what `deploy` would do; change nothing."),
    "jobs": ("edged.cli.jobs:jobs", "List jobs, newest first."),
    "job": ("edged.cli.jobs:job", "Look at a job, watch it, cancel it, run it again."),
    "mapper": (
        "edged.cli.mappers:mapper",
        "List the mappers, find out who answers at an address, keep devices on a broker apart.",
    ),
    "trust": ("edged.cli.trust:trust", "Set and show whose releases this node installs."),
    "audit": ("edged.cli.audit:audit", "Read, check and take away the audit trail."),
    "release": (
        "edged.cli.release:release",
        "Make and sign a release repository: a folder for a web server or a USB stick.",
    ),
    "node": ("edged.cli.upgrade:node", "Upgrade the node's own package, go back, restart the node."),
    "check-config": ("edged.cli.node:check_config", "Check the configuration files; list every fault."),
    "doctor": (
        "edged.cli.doctor:doctor",
        "Check everything that a node needs; say how to cure what is wrong.",
    ),
    "demo": ("edged.cli.demo:demo", "See it all work on simulated devices."),
}
"""Command name to where it is (``module:attribute``) and its line in ``--help``."""

HIDDEN = {"tuf": "edged.cli.tuf:tuf"}
"""For programs, not for people: the TUF client as the TUF conformance suite drives it."""


class _Commands(click.Group):
    """Imports a command when it is called; ``--help`` needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        place = HIDDEN.get(cmd_name) or COMMANDS.get(cmd_name, ("", ""))[0]
        if not place:
            return None
        module, _, attribute = place.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edged")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    default=DEFAULT_CONFIG,
    envvar="EDGED_CONFIG",
    show_default=True,
    show_envvar=True,
    help="Configuration file.",
)
@click.option(
    "--socket",
    "socket_path",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="EDGED_SOCKET",
    show_envvar=True,
    help="The daemon's socket. [default: api.socket of the configuration]",
)
@click.pass_context
def main(ctx: click.Context, config_path: Path, socket_path: Path | None) -> None:
    """Keep the firmware of this node's peripherals at the signed release that they should run.

    \b
    Examples:
      edged status
      edged plan blink@1.2 --model uno
      edged deploy blink@1.2 --to plc-1 --wait
      edged job watch 01JD8Z...

    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused by trust or policy, 4 the daemon does not answer.
    """
    ctx.obj = Context(config_path, socket_path)
