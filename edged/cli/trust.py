"""``trust init|show|refresh``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edged.cli.context import (
    Context,
    command,
    echo,
    json_option,
    show_json,
    show_table,
    size_text,
    text,
)


@click.group()
def trust() -> None:
    """Set and show whose releases this node installs.

    \b
    Examples:
      edged trust init 1.root.json
      edged trust show
    """


@trust.command()
@click.argument("root", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--replace", is_flag=True, help="Even where an operator set another root before.")
@json_option
@click.pass_obj
@command
def init(context: Context, root: Path, replace: bool, as_json: bool) -> None:
    """Trust the repository whose root metadata is the file ROOT, after it verified.

    \b
    Example:
      edged trust init /media/usb/metadata/1.root.json
    """
    try:
        data = root.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise click.UsageError(f"{root} is no root metadata: {exc}") from exc
    _show(context.client().post("trust", body={"root": data, "replace": replace}), as_json=as_json)


@trust.command()
@json_option
@click.pass_obj
@command
def show(context: Context, as_json: bool) -> None:
    """Show the repository, its roles and its releases, as this node verified them last.

    \b
    Example:
      edged trust show --json | jq -r '.releases[].release'
    """
    _show(context.client().get("trust"), as_json=as_json)


@trust.command()
@json_option
@click.pass_obj
@command
def refresh(context: Context, as_json: bool) -> None:
    """Verify the repository's metadata now, and not at the next turn.

    \b
    Example:
      edged trust refresh
    """
    _show(context.client().post("trust", "refresh"), as_json=as_json)


def _show(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    state = {None: "not verified yet", True: "online", False: "offline, from the last good metadata"}[
        found["online"]
    ]
    echo(f"repository  {text(found['repository'])} ({state})")
    if found["offline_because"]:
        echo(f"offline     {found['offline_because']}")
    if found["stale_s"]:
        echo(f"stale       the metadata expired {found['stale_s'] / 3600:.1f} hours ago")
    if found["failure"]:
        echo(f"failure     {found['failure']['detail']}; cure: {text(found['failure']['cure'])}")
    show_table(
        [[role["role"], str(role["version"]), role["expires"]] for role in found["roles"]],
        ["ROLE", "VERSION", "EXPIRES"],
    )
    rows = [
        [
            item["release"],
            str(item["release_counter"]),
            ", ".join(item["models"]),
            size_text(item["size_bytes"]),
        ]
        for item in found["releases"]
    ]
    show_table(rows, ["RELEASE", "COUNTER", "MODELS", "SIZE"])
    for item in found["rejected"]:
        echo(f"not usable: {item['path']}: {item['detail']}")
