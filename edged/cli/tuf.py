"""``edged tuf``: the TUF client as a command of its own, as the TUF conformance suite drives it. Hidden.

It has the refresh of ``edged_firmware.trust_client`` and none of what edged adds around it: no floors, no
grace, no last good metadata. Exit codes: 0 done, 1 not done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edged.clock import SystemClock
from edged_firmware.durable import write_durably
from edged_firmware.errors import EdgedError

if TYPE_CHECKING:
    from edged_firmware.trust_client import DurableUpdater

_SOCKET_TIMEOUT_S = 30.0
_FOLDER = click.Path(path_type=Path, file_okay=False)


@dataclass(frozen=True, slots=True)
class Places:
    """Where metadata and targets come from and go to."""

    metadata_dir: Path
    metadata_url: str
    target_names: Sequence[str]
    target_base_url: str | None
    target_dir: Path | None


@click.group(hidden=True)
@click.option("--metadata-dir", type=_FOLDER, required=True)
@click.option("--metadata-url", default="")
@click.option("--target-name", "target_names", multiple=True)
@click.option("--target-base-url")
@click.option("--target-dir", type=_FOLDER)
@click.pass_context
def tuf(
    context: click.Context,
    metadata_dir: Path,
    metadata_url: str,
    target_names: Sequence[str],
    target_base_url: str | None,
    target_dir: Path | None,
) -> None:
    """A TUF client, for the conformance suite."""
    context.obj = Places(metadata_dir, metadata_url, target_names, target_base_url, target_dir)


@tuf.command()
@click.argument("trusted_root", type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.pass_obj
def init(places: Places, trusted_root: Path) -> None:
    """Trust TRUSTED_ROOT from now on."""
    places.metadata_dir.mkdir(parents=True, exist_ok=True)
    write_durably(places.metadata_dir / "root.json", trusted_root.read_bytes())


@tuf.command()
@click.pass_obj
def refresh(places: Places) -> None:
    """Bring the top-level metadata up to date."""
    _run(places, ())


@tuf.command()
@click.pass_obj
def download(places: Places) -> None:
    """Bring the metadata up to date, then fetch the targets named by --target-name."""
    _run(places, places.target_names)


def _run(places: Places, target_names: Sequence[str]) -> None:
    from edged_firmware.trust_client import DurableUpdater, SourceFetcher, translated

    try:
        with translated():
            updater = DurableUpdater(
                places.metadata_dir,
                places.metadata_url,
                SourceFetcher(_SOCKET_TIMEOUT_S),
                root=(places.metadata_dir / "root.json").read_bytes(),
                now=SystemClock().now(),
                target_dir=places.target_dir,
                target_url=places.target_base_url,
            )
            updater.refresh()
            for name in target_names:
                _download(updater, name)
    except EdgedError as error:
        raise click.ClickException(str(error)) from error


def _download(updater: DurableUpdater, name: str) -> None:
    target = updater.get_targetinfo(name)
    if target is None:
        raise click.ClickException(f"there is no target {name}")
    if updater.find_cached_target(target) is None:
        updater.download_target(target)
