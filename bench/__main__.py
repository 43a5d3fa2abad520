"""``python -m bench [NAME ...]``: measure, print the table, write ``bench/results/NAME.json``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from bench.figures import Figure, machine, save, table

BENCHES = {
    "flash": "avrdude against edged, on a real boot loader",
    "smp": "smpclient against edged, on real firmware in QEMU",
    "engine": "verified chunks per second against SHA-256 alone",
    "fleet": "64 serial devices at once against their lines",
    "daemon": "start and memory of the real process",
    "can": "UDS over ISO-TP: udsoncan with can-isotp against edged, and both against the bus",
    "mqtt": "devices that pull over MQTT: edged against a bare responder",
    "store": "durable twin updates per second against the disk",
}


def main() -> int:
    """A missed goal is in the table, not in the exit code: a slow machine is no fault."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="; ".join(f"{k}: {v}" for k, v in BENCHES.items())
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: all figures, none of them meaningful"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results"))
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not known; allowed: {', '.join(BENCHES)}")
    figures: list[Figure] = []
    for name in arguments.names or BENCHES:
        print(f"{name}: {BENCHES[name]} ...", file=sys.stderr, flush=True)
        # one at a time: what a benchmark imports must not be in the memory of the one before
        found: list[Figure] = importlib.import_module(f"bench.{name}").run(quick=arguments.quick)
        save(arguments.output, name, found, quick=arguments.quick)
        figures += found
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
