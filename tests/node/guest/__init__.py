"""Real Debian nodes for tests: images, containers (systemd-nspawn) and machines (QEMU under TCG).

Standard library only, and root is needed. Every guest, mount and process ends with the ``with`` block that
made it. No guest has a network beyond its own loopback, but for what a test forwards to it.
"""

from __future__ import annotations

from guest.command import Done, GuestError
from guest.images import SUITES, Image, image
from guest.nspawn import Container
from guest.qemu import Machine, Serial

__all__ = ["SUITES", "Container", "Done", "GuestError", "Image", "Machine", "Serial", "image"]
