"""Secrets, as the service manager hands them over: a file each, in a folder that only this process can read.

See systemd.exec(5), ``LoadCredential=``. The unit loads the folder ``/etc/edged/credentials``; a secret stands neither in
``edged.toml``, which everybody may read, nor in the environment, which children inherit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from edged.errors import Permanent, Reason

_PREFIX: Final = "edged_"
"""What systemd puts before the names of a folder's files: the ID that the unit gives the folder."""
_MOST_BYTES: Final = 65536
_CURE: Final = "put it into /etc/edged/credentials and start the daemon again"


def path(environment: Mapping[str, str], name: str) -> Path:
    """The file of the credential ``name``, which may not be there. Raises ``Permanent(CONFIG_INVALID)`` where there is no
    folder of credentials."""
    folder = environment.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise Permanent(
            Reason.CONFIG_INVALID,
            f"credential {name!r}: there are none; under systemd, {_CURE}; run by hand, set CREDENTIALS_DIRECTORY to a folder "
            f"with the file {_PREFIX}{name}",
        )
    return Path(folder) / f"{_PREFIX}{name}"


def read(environment: Mapping[str, str], name: str) -> str:
    """The text of the credential ``name``, without white space around it. Blocks.

    Raises ``Permanent(CONFIG_INVALID)`` where it is not there, is no text, or is empty; never shows what is in it.
    """
    file_path = path(environment, name)
    try:
        with file_path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        text = data.decode().strip()
    except OSError as exc:
        text = f"credential {name!r}: {file_path}: {exc.strerror}; {_CURE}; run by hand, make it that file"
        raise Permanent(Reason.CONFIG_INVALID, text) from exc
    except UnicodeDecodeError:
        raise Permanent(Reason.CONFIG_INVALID, f"credential {name!r} is not text in UTF-8") from None
    if len(data) > _MOST_BYTES or not text or not text.isprintable():
        raise Permanent(Reason.CONFIG_INVALID, f"credential {name!r} is not one line of text; {_CURE}")
    return text
