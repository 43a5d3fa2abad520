"""What a benchmark brings home: figures, each against something, and how they are shown and kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A bound: at least or at most ``bound``."""

    bound: float
    at_least: bool

    def met_by(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


def at_least(bound: float) -> Goal:
    return Goal(bound=bound, at_least=True)


def at_most(bound: float) -> Goal:
    return Goal(bound=bound, at_least=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure: the median of ``samples``.

    ``against`` names the peer or the limit; ``detail`` has the numbers behind, with their units in their names. ``load`` is
    the machine's 1-minute load average when it was taken: other processes' work is in the figure too.
    """

    name: str
    what: str
    unit: str
    against: str
    samples: tuple[float, ...]
    goal: Goal | None = None
    detail: dict[str, Any] = field(default_factory=dict)
    load: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))

    @property
    def value(self) -> float:
        return statistics.median(self.samples)

    @property
    def met(self) -> bool | None:
        return self.goal.met_by(self.value) if self.goal else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "value": self.value,
            "met": self.met,
            "goal": str(self.goal) if self.goal else None,
        }


def median(values: Iterable[float]) -> float:
    return statistics.median(list(values))


def machine() -> dict[str, Any]:
    """The machine in general terms."""
    release = platform.freedesktop_os_release()
    return {
        "cores": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
        "architecture": platform.machine(),
        "os": release.get("PRETTY_NAME", "unknown"),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "python": platform.python_version(),
    }


def table(figures: Sequence[Figure]) -> str:
    """A Markdown table, as it stands in the documentation."""
    lines = [
        "| figure | value | goal | met | against | samples | load |",
        "|---|---:|---:|---|---|---:|---:|",
    ]
    for figure in figures:
        met = {True: "yes", False: "**no**", None: ""}[figure.met]
        unit = "" if figure.unit == "ratio" else f" {figure.unit}"
        lines.append(
            f"| {figure.what} | {figure.value:.3g}{unit} | {figure.goal or ''} | {met} | {figure.against} "
            f"| {len(figure.samples)} | {figure.load:.1f} |"
        )
    return "\n".join(lines)


def save(folder: Path, name: str, figures: Sequence[Figure], *, quick: bool) -> Path:
    """Write ``folder/name.json``; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    found = {"machine": machine(), "quick": quick, "figures": [figure.as_json() for figure in figures]}
    path.write_text(json.dumps(found, indent=2) + "\n")
    return path
