"""The real daemon with the fake devices plugged in: ``python -m edged.testing.daemon CONFIG``."""

from __future__ import annotations

import sys
from pathlib import Path

from edged.app import main
from edged.config import load
from edged.errors import ConfigError
from edged.testing.fake import FakePlugin

if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m edged.testing.daemon CONFIG")
    try:
        config = load(Path(sys.argv[1]))
    except ConfigError as exc:
        raise SystemExit("\n".join(exc.problems)) from exc
    main(config, [("fake", FakePlugin())])
