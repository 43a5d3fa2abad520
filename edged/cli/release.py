"""``edged release``: make a release repository and sign releases. Works on folders, not through the daemon.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused. The libraries for signing are loaded by the commands
that need them, so that ``edged --help`` stays quick.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edged.cli.context import command as any_command
from edged.clock import SystemClock
from edged_firmware.errors import Refused
from edged_firmware.facts import ParamValue, ReleaseRef, Requirement

if TYPE_CHECKING:
    from edged_firmware.release import ListedRelease, Published

command = functools.partial(any_command, cures=False)
"""A publisher's command: what it says about an error is all; the cures of the reasons are a node's."""

PASSWORD_VARIABLE = "EDGED_KEY_PASSWORD"


def size(text: str | int) -> int:
    """A number of bytes or an address: decimal or ``0x``, or with K or M for 1024 and 1024².

    Raises ``click.BadParameter``.
    """
    match = re.fullmatch(r"(0x[0-9a-f]+|[0-9]+)(k|m)?(?:i?b)?", str(text).strip().lower())
    if match is None or (match[2] and match[1].startswith("0x")):
        raise click.BadParameter(f"{text!r} is no number of bytes: write 32768, 0x8000 or 32K")
    return int(match[1], 0) * {None: 1, "k": 1 << 10, "m": 1 << 20}[match[2]]


def ref(text: str) -> ReleaseRef:
    """``NAME@VERSION``. Raises ``click.BadParameter``."""
    try:
        return ReleaseRef.parse(text)
    except Refused as error:
        raise click.BadParameter(error.detail) from error


def requirement(text: str) -> Requirement:
    """``COMPONENT>=COUNTER``. Raises ``click.BadParameter``."""
    component, sign, counter = text.partition(">=")
    if not (component and sign and counter.isdecimal()):
        raise click.BadParameter(f"{text!r}: write COMPONENT>=COUNTER, such as radio>=3")
    return Requirement(component.strip(), int(counter))


def parameter(text: str) -> tuple[str, ParamValue]:
    """``KEY=VALUE``; a whole number, ``true`` or ``false`` becomes one. Raises ``click.BadParameter``."""
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise click.BadParameter(f"{text!r}: write KEY=VALUE")
    if value in ("true", "false"):
        return key, value == "true"
    return key, int(value) if re.fullmatch(r"-?[0-9]+", value) else value


_DIR = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
_JSON = click.option("--json", "as_json", is_flag=True, help="Answer as JSON.")
_KEYS = click.option(
    "--keys",
    "keys_dirs",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of private keys; may be given several times. [default: DIR.keys, beside DIR]",
)


@click.group()
def release() -> None:
    """Make and sign a release repository: a folder for a web server or a USB stick.

    Keys are protected with the password in EDGED_KEY_PASSWORD, if it is set.
    """


@release.command()
@_DIR
@click.option(
    "--keys", "keys_dir", type=click.Path(path_type=Path, file_okay=False), help="[default: DIR.keys]"
)
@click.option("--root-keys", default=3, show_default=True, help="Keys of root.")
@click.option("--root-threshold", default=2, show_default=True, help="Signatures that a new root needs.")
@click.option("--targets-keys", default=2, show_default=True, help="Keys of targets.")
@click.option("--targets-threshold", default=2, show_default=True, help="Signatures that releases need.")
@_JSON
@command
def init(
    directory: Path,
    keys_dir: Path | None,
    root_keys: int,
    root_threshold: int,
    targets_keys: int,
    targets_threshold: int,
    as_json: bool,
) -> None:
    """Make the keys and an empty, signed repository in DIR.

    \b
    Examples:
      edged release init firmware
      edged release init firmware --keys /media/vault/keys
    """
    from edged_firmware import release as publisher

    role_keys = dict(publisher.DEFAULT_KEYS)
    role_keys["root"] = publisher.RoleKeys(root_keys, root_threshold)
    role_keys["targets"] = publisher.RoleKeys(targets_keys, targets_threshold)
    keys = keys_dir or _default_keys(directory)
    root = publisher.init(directory, keys, SystemClock().now(), role_keys=role_keys, password=_password())
    if as_json:
        _show({"repository": str(directory), "keys": str(keys), "root": str(root)})
        return
    click.echo(f"Made {directory}. Nodes are to trust {root}.")
    click.echo(f"The private keys are in {keys}: move those of root off line, and serve none of them.")


@release.command()
@_DIR
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--name", required=True, help="Name of the firmware, such as blink.")
@click.option("--version", required=True, help="Version of this file.")
@click.option(
    "--model", "models", multiple=True, required=True, help="Device model that it is for; repeatable."
)
@click.option("--hardware-id", "hardware_ids", multiple=True, help="Hardware id that it is for; repeatable.")
@click.option(
    "--counter", type=click.IntRange(1), help="Release counter. [default: one more than the models have]"
)
@click.option("--allow-lower-counter", is_flag=True, help="Allow a counter below that of an earlier release.")
@click.option("--protocol", help="Flash protocol, if it is not the device's own choice.")
@click.option(
    "--param", "params", multiple=True, type=parameter, help="Parameter of the protocol; repeatable."
)
@click.option(
    "--identifies-as",
    help="What the device answers when it runs this. [default: the version; of an MCUboot image its hash]",
)
@click.option(
    "--requires", multiple=True, type=requirement, help="Another component and its counter; repeatable."
)
@click.option(
    "--format",
    "file_format",
    type=click.Choice(["auto", "bin", "hex", "opaque", "mcuboot"]),
    default="auto",
    help="How to read FILE; auto: by protocol and file.",
)
@click.option("--base", type=size, default=0, help="Address of a raw binary. [default: 0]")
@click.option("--flash-size", type=size, help="Refuse an image that does not fit into so many bytes.")
@_JSON
@command
def add(directory: Path, file: Path, as_json: bool, **facts: Any) -> None:
    """Put the firmware FILE into DIR; `publish` signs it.

    \b
    Examples:
      edged release add firmware blink.hex --name blink --version 1.2.0 --model uno \\
          --hardware-id avr:1e950f --protocol stk500v1
      edged release add firmware zephyr.signed.bin --name sensor --version 1.2.0 --model node \\
          --protocol smp
    """
    from edged_firmware import release as publisher

    draft = publisher.Draft(
        name=facts["name"],
        version=facts["version"],
        models=facts["models"],
        hardware_ids=facts["hardware_ids"],
        release_counter=facts["counter"],
        allow_lower_counter=facts["allow_lower_counter"],
        requires=facts["requires"],
        protocol=facts["protocol"],
        params=dict(facts["params"]),
        identifies_as=facts["identifies_as"],
        format=facts["file_format"],
        base_address=facts["base"],
        flash_size_bytes=facts["flash_size"],
    )
    added = publisher.add(directory, file, draft)
    if as_json:
        _show(added.to_json())
    else:
        click.echo(_line(added))


@release.command()
@_DIR
@_KEYS
@_JSON
@command
def publish(directory: Path, keys_dirs: Sequence[Path], as_json: bool) -> None:
    """Sign what was added to DIR; with nothing added, renew what expires.

    \b
    Examples:
      edged release publish firmware
      edged release publish firmware --keys online-keys
    """
    from edged_firmware import release as publisher

    keys = tuple(keys_dirs) or (_default_keys(directory),)
    _show_published(publisher.publish(directory, keys, SystemClock().now(), password=_password()), as_json)


@release.command("list")
@_DIR
@_JSON
@command
def list_command(directory: Path, as_json: bool) -> None:
    """List the releases in DIR, signed and not.

    \b
    Examples:
      edged release list firmware
      edged release list firmware --json | jq -r '.releases[].release'
    """
    from edged_firmware import release as publisher

    lines = publisher.list_releases(directory)
    if as_json:
        _show({"releases": [line.to_json() for line in lines]})
        return
    for line in lines:
        click.echo(_line(line))
    if not lines:
        click.echo(f"No releases in {directory}: add one with `edged release add`.")


@release.command()
@_DIR
@click.argument("release_ref", metavar="NAME@VERSION", type=ref)
@_JSON
@command
def remove(directory: Path, release_ref: ReleaseRef, as_json: bool) -> None:
    """Take back an added release, or withdraw a published one with the next `publish`.

    \b
    Example:
      edged release remove firmware blink@1.2.0
    """
    from edged_firmware import release as publisher

    status = publisher.remove(directory, release_ref)
    if as_json:
        _show({"release": str(release_ref), "status": status})
    elif status is None:
        click.echo(f"{release_ref} is removed.")
    else:
        click.echo(f"{release_ref} will be withdrawn by the next `edged release publish {directory}`.")


@release.command("renew-root")
@_DIR
@_KEYS
@click.option(
    "--rotate",
    multiple=True,
    type=click.Choice(["root", "targets", "snapshot", "timestamp"]),
    help="Give this role new keys; repeatable.",
)
@_JSON
@command
def renew_root(directory: Path, keys_dirs: Sequence[Path], rotate: Sequence[str], as_json: bool) -> None:
    """Sign the next root, with a new expiry and, if asked for, new keys.

    \b
    Examples:
      edged release renew-root firmware --keys alice --keys bob
      edged release renew-root firmware --keys alice --keys bob --rotate targets
    """
    from edged_firmware import release as publisher

    keys = tuple(keys_dirs) or (_default_keys(directory),)
    done = publisher.renew_root(directory, keys, SystemClock().now(), rotate=rotate, password=_password())
    _show_published(done, as_json)


def _default_keys(directory: Path) -> Path:
    whole = directory.absolute()
    return whole.with_name(f"{whole.name}.keys")


def _password() -> bytes | None:
    text = os.environ.get(PASSWORD_VARIABLE)
    return text.encode() if text else None


def _show(answer: object) -> None:
    click.echo(json.dumps(answer, indent=1))


def _show_published(done: Published, as_json: bool) -> None:
    if as_json:
        _show(done.to_json())
        return
    for what, refs in (("Published", done.added), ("Withdrew", done.withdrawn)):
        for published in refs:
            click.echo(f"{what} {published}.")
    for role in done.signed_roles:
        click.echo(f"Signed {role} version {done.versions[role]}, valid until {done.expires[role]:%Y-%m-%d}.")


def _line(listed: ListedRelease) -> str:
    models = ", ".join(listed.models)
    return (
        f"{listed.ref}  counter {listed.release_counter}  {models}  {listed.size_bytes} bytes  "
        f"sha256 {listed.sha256[:12]}  {listed.status}"
    )
