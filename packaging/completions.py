"""Writes click's completion scripts below a folder, where Debian's shells look for them: ``completions.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from click.shell_completion import get_completion_class

from edged.cli import main as edged

PLACES = {
    "bash": "usr/share/bash-completion/completions/edged",
    "zsh": "usr/share/zsh/vendor-completions/_edged",
    "fish": "usr/share/fish/vendor_completions.d/edged.fish",
}


def main(folder: Path) -> None:
    """Each script asks the installed command what fits, so that it is as new as that."""
    for shell, place in PLACES.items():
        kind = get_completion_class(shell)
        assert kind is not None
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        script = kind(edged, {}, "edged", "_EDGED_COMPLETE").source()
        (folder / place).write_text(script.strip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
