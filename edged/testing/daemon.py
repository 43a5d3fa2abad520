"""The real daemon with the fake devices plugged in: ``python -m edged.testing.daemon CONFIG``."""

from __future__ import annotations

import sys
from pathlib import Path

from edged.app import main
from edged.config import load
from edged.testing.fake import FakePlugin

if __name__ == "__main__":
    main(load(Path(sys.argv[1])), [("fake", FakePlugin())])
