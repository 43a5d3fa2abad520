"""edged keeps the firmware of an edge node's peripherals at the signed release that they should run."""

__version__ = "0.1.0"
BUILD_TIME = "2026-11-23T00:00:00Z"
"""The moment, RFC 3339, before which no clock can be right: this version did not exist then."""
