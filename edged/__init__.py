"""edged keeps the firmware of an edge node's peripherals at the signed release that they should run."""

__version__ = "0.1.0"
