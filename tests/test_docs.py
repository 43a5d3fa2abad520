"""The documentation says what is there: keys, metrics, reasons, commands, files, tests, links, libraries."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import attrs
import click
import pytest

from edged import config
from edged.cli import main
from edged.clock import SystemClock
from edged.domain import reasons
from edged.domain.job import State
from edged.errors import Reason
from edged.metrics import Metrics, Snapshot
from edged.plugins import ENTRY_POINT_GROUP, PLUGIN_FOLDERS
from edged.supervisor import UnitState
from edged.testing.conformance import CHECKS
from edged_can.config import Property, UdsConfig
from edged_mqtt.config import BrokerConfig, ListenConfig, MqttConfig, parse_config, parse_link
from edged_uart.config import UartConfig, parse_v1, parse_v2
from edged_uart.smp_config import SmpConfig, parse_smp

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])

Row = dict[str, str]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What follows ``heading`` up to the next heading."""
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, f"there is no heading {heading!r}"
    return re.split(r"^#{1,4} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def rows(text: str, first: str) -> list[Row]:
    """The rows of the first table whose first column is called ``first``; backquotes around a whole cell are taken off."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    heads = [cell.strip() for cell in lines[start].strip("|").split("|")]
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [re.sub(r"^`([^`]*)`$", r"\1", cell.strip()) for cell in line.strip().strip("|").split("|")]
        found.append(dict(zip(heads, cells, strict=True)))
    return found


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


# -- configuration

TABLES: dict[str, type] = {
    "## `[node]`": config.Node,
    "## `[api]`": config.Api,
    "## `[trust]`": config.TrustSettings,
    "## `[fetch]`": config.FetchSettings,
    "## `[storage]`": config.Storage,
    "## `[engine]`": config.EngineSettings,
    "## `[metrics]`": config.MetricsSettings,
    "## `[log]`": config.LogSettings,
    "## `[[model]]`": config.Model,
    "### `[model.health]`": config.HealthSettings,
    "### `[model.policy]`": config.Policy,
    "## `[[device]]`": config.DeviceSettings,
    "## `[[link]]`": config.LinkSettings,
}
TYPES = {
    "str": "text",
    "int": "whole number",
    "int | None": "whole number",
    "float": "number",
    "bool": "true or false",
    "Path": "path",
    "Path | None": "path",
    "tuple[str, ...]": "list of texts",
    "HealthSettings | None": "table",
    "Policy": "table",
    "dict[str, Any]": "table",
}
WORDS = {"the host name": ..., "as below": config.Policy(), "empty": ("", {}), "none": (None, ())}
"""Defaults that the page puts into words."""
NEEDED = {"id": "x", "model": "x", "mapper": "x", "address": "x:y", "kind": "line", "pattern": "x"}
CHOICES = {"format", "level", "kind"}


def _default(field: Any) -> str:
    if field.default is attrs.NOTHING:
        return "required"
    value = field.default
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        return "the host name" if field.name == "id" else "empty"
    for word, meant in WORDS.items():
        if meant is not ... and (value in meant if isinstance(meant, tuple) else value == meant):
            return word
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _make(kind: type, name: str, value: object) -> object:
    return kind(
        **{key: text for key, text in NEEDED.items() if key in attrs.fields_dict(kind)} | {name: value}
    )


@pytest.mark.parametrize("heading", TABLES)
def test_every_key_has_its_row(heading: str) -> None:
    kind = TABLES[heading]
    told = {
        row["key"]: (row["type"], row["default"])
        for row in rows(section(page("docs/configuration.md"), heading), "key")
    }
    # not `field.type`: cattrs replaces that text by the type as soon as any test has loaded a configuration
    real = {
        field.name: (TYPES[kind.__annotations__[field.name]], _default(field)) for field in attrs.fields(kind)
    }
    assert told == real


def test_every_table_of_the_configuration_is_told() -> None:
    kinds = {attrs.fields_dict(config.Config)[name].type for name in attrs.fields_dict(config.Config)}
    assert len(kinds) == 11 and set(attrs.fields_dict(config.Config)) == {
        "node", "api", "trust", "fetch", "storage", "engine", "metrics", "log", "model", "device", "link",
    }  # fmt: skip


@pytest.mark.parametrize("heading", TABLES)
def test_what_is_allowed_is_allowed_and_nothing_beside_it(heading: str) -> None:
    kind = TABLES[heading]
    for row in rows(section(page("docs/configuration.md"), heading), "key"):
        name, allowed = row["key"], row["allowed"]
        field = attrs.fields_dict(kind)[name]
        bounds = re.fullmatch(r"([\d.]+) to ([\d.]+)", allowed)
        if bounds:
            low, high = float(bounds[1]), float(bounds[2])
            for good in (low, high):
                _make(kind, name, good)
            for bad in (low - 0.001, high * 1.001 + 1):
                with pytest.raises(ValueError):
                    _make(kind, name, bad)
        elif name in CHOICES:
            for good in re.findall(r"\w+", allowed):
                _make(kind, name, good)
            with pytest.raises(ValueError):
                _make(kind, name, "nonsense")
        assert bool(allowed) == bool(field.validator), (
            f"{name}: the page and the record differ in whether it is checked"
        )


def test_the_table_of_the_serial_mappers() -> None:
    heading = "### `[device.config]` of `uart-stk500` and `uart-stk500v2`"
    told = {row["key"]: row for row in rows(section(page("docs/configuration.md"), heading), "key")}
    assert {name: row["default"] for name, row in told.items()} == {
        field.name: f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        for field in fields(UartConfig)
    }
    for name, row in told.items():
        bounds = re.search(r"([\d.]+) to ([\d.]+)$", row["allowed"])
        texts: list[Any] = re.findall(r"`(\w+)`", row["allowed"])
        sizes: list[Any] = [] if bounds else [int(number) for number in re.findall(r"\d+", row["allowed"])]
        ends: list[Any] = (
            [float(end) if "." in end else int(end) for end in bounds.groups()] if bounds else []
        )
        parse = parse_v2 if name == "erase" else parse_v1
        for good in [*texts, *sizes, *ends]:
            assert getattr(parse({name: good}), name) == good
        for bad in ["nonsense", -1, *[end * 2 + 1 for end in ends[1:]]]:
            with pytest.raises(ValueError, match=name):
                parse({name: bad})


def test_the_table_of_the_smp_mapper() -> None:
    heading = "### `[device.config]` of `uart-smp`"
    told = {row["key"]: row for row in rows(section(page("docs/configuration.md"), heading), "key")}
    words = {("*",): "all"}
    defaults = {name: getattr(SmpConfig(), name) for name in told}
    assert list(told) == [field.name for field in fields(SmpConfig)]
    for name, row in told.items():
        default = defaults[name]
        shown = words.get(default) if isinstance(default, tuple) else default
        assert row["default"] == (
            "empty" if shown == {} else f"{shown:g}" if isinstance(shown, float) else str(shown)
        )
        bounds = re.fullmatch(r"([\d.]+) to ([\d.]+)", row["allowed"])
        goods: list[Any] = (
            re.findall(r"`(\w+)`", row["allowed"]) if name in ("framing", "reset", "boot_loader") else []
        )
        goods += [float(end) if "." in end else int(end) for end in bounds.groups()] if bounds else []
        assert goods or name in ("statistics", "settings")
        for good in goods:
            assert getattr(parse_smp({name: good}), name) == good
        for bad in ["nonsense", -1, *[end * 2 + 1 for end in goods[1:] if bounds]]:
            with pytest.raises(ValueError, match=name):
                parse_smp({name: bad})
    for kind in re.findall(r"`(\w+)`", told["settings"]["meaning"]):
        assert parse_smp({"settings": {"x": {"type": kind}}}).settings["x"].type == kind


CAN_TABLES: dict[str, tuple[Any, str]] = {
    "### `[device.config]` of `can-uds`": (UdsConfig(), "default"),
    "#### `erase` and `check` of `can-uds`": (UdsConfig().erase, "default of `erase`"),
    "#### `security` and `second_security` of `can-uds`": (UdsConfig().security, "default"),
    "#### `fingerprint` of `can-uds`": (UdsConfig().fingerprint, "default"),
    "#### `properties` of `can-uds`": (Property(), "default"),
}


def _said_of(default: object) -> str:
    """A default as the page writes it."""
    if isinstance(default, tuple):
        return ", ".join(default) or "none"
    if isinstance(default, bool):
        return str(default).lower()
    return (
        "below"
        if hasattr(default, "__dataclass_fields__")
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
    )


@pytest.mark.parametrize("heading", CAN_TABLES)
def test_the_tables_of_the_can_mapper(heading: str) -> None:
    record, column = CAN_TABLES[heading]
    told = {row["key"]: row[column] for row in rows(section(page("docs/configuration.md"), heading), "key")}
    assert list(told) == [field.name for field in fields(record)]
    for name, cell in told.items():
        default = getattr(record, name)
        if cell.startswith("0x"):
            assert int(cell, 16) == default
        elif cell != "required":
            assert cell.replace("empty", "") == _said_of(default), name


def test_the_checks_defaults_of_the_can_mapper() -> None:
    found = rows(section(page("docs/configuration.md"), "#### `erase` and `check` of `can-uds`"), "key")
    said = {row["key"]: row["default of `check`"] for row in found}
    check = UdsConfig().check
    assert said == {
        "routine": f"0x{check.routine:04X}",
        "parameters": "none",
        "per": check.per,
        "ok": check.ok,
        "poll_s": f"{check.poll_s:g}",
        "running": "empty",
    }


MQTT_TABLES: dict[str, tuple[Any, Any]] = {
    "### `[link.config]` of a listener, `mqtt:listen@ADDRESS:PORT`": (
        ListenConfig(),
        lambda table: parse_link({"certificate": "/c", "client_ca": "/ca"} | table, "listen@127.0.0.1:8883"),
    ),
    "### `[link.config]` of a broker, `mqtt:HOST:PORT`": (
        BrokerConfig(),
        lambda table: parse_link(table, "localhost:8883"),
    ),
    "### `[device.config]` of `mqtt-thingsboard`": (MqttConfig(), parse_config),
}


@pytest.mark.parametrize("heading", MQTT_TABLES)
def test_the_tables_of_the_mqtt_mapper(heading: str) -> None:
    record, parse = MQTT_TABLES[heading]
    told = {row["key"]: row for row in rows(section(page("docs/configuration.md"), heading), "key")}
    assert {name: row["default"].replace("empty", "") for name, row in told.items()} == {
        field.name: "" if getattr(record, field.name) == {} else _said_of(getattr(record, field.name))
        for field in fields(record)
    }
    for name, row in told.items():
        bounds = re.fullmatch(r"([\d.]+) to ([\d.]+)", row["allowed"])
        ends: list[Any] = (
            [float(end) if "." in end else int(end) for end in bounds.groups()] if bounds else []
        )
        for good in [*ends, *re.findall(r"`(\w+)`", row["allowed"])]:
            assert getattr(parse({name: good}), name) == good
        for bad in [[], *(end * 2 + 1 for end in ends[1:])]:
            with pytest.raises(ValueError, match=name):
                parse({name: bad})


def test_environment_variables_are_those_of_the_code() -> None:
    code = "".join(path.read_text() for path in (ROOT / "edged").rglob("*.py"))
    told = set(
        re.findall(r"`([A-Z_]{6,})`", section(page("docs/configuration.md"), "## Environment variables"))
    )
    assert told >= set(re.findall(r'"(EDGED_[A-Z_]+)"', code))
    assert all(f'"{variable}"' in code for variable in told)


# -- metrics


def _exposed() -> dict[str, tuple[str, frozenset[str], str]]:
    """Type, labels and help of each metric of a daemon in which everything has happened once."""
    from prometheus_client.parser import text_string_to_metric_families

    metrics = Metrics(SystemClock(), {"dev-1": "uno"})
    metrics.job_ended(State.FAILED, Reason.CHUNK_MISMATCH)
    metrics.fetched("https", 1)
    metrics.sent("dev-1", 1)
    metrics.utilisation("dev-1", 0.9)
    for observe in (metrics.chunk_verified, metrics.chunk_written, metrics.committed):
        observe(0.01)
    metrics.trust_refreshed(0.0, online=True)
    metrics.mapper_event("dev-1", "event")
    snapshot = Snapshot(
        writable=True,
        jobs={(State.QUEUED, None): 1},
        twin_lag_s={"dev-1": 1.0},
        outbox={"uplink": 1},
        audit_seq=1,
        units={"dev-1": UnitState.RUNNING},
        restarts={"dev-1": 0},
        plugins={"uart": True},
    )
    text = metrics.render(snapshot)[0].decode()
    return {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            frozenset(label for sample in family.samples for label in sample.labels if label != "le"),
            family.documentation,
        )
        for family in text_string_to_metric_families(text)
        if family.name.startswith("edged_")
    }


def test_every_metric_has_its_row() -> None:
    told = {
        row["metric"]: (row["type"], frozenset(re.findall(r"\w+", row["labels"])), row["meaning"])
        for row in rows(page("docs/metrics.md"), "metric")
    }
    assert told == _exposed()


def test_alerts_are_about_metrics_that_there_are() -> None:
    used = {
        word
        for block in fences(page("docs/metrics.md"), "yaml")
        for word in re.findall(r"\bedged_\w+", block)
    }
    assert used and used <= set(_exposed())
    states = re.findall(r"`(\w+)`", section(f"\n{page('docs/metrics.md')}", "# Metrics"))
    assert {state.value for state in [*State, *UnitState]} <= set(states)


# -- reasons and exit codes


def test_every_reason_has_its_row() -> None:
    told = [
        (row["reason"], row["kind"], row["exit code"], row["what to do"])
        for row in rows(page("docs/reasons.md"), "reason")
    ]
    real = [
        (reason.value, reasons.kind(reason).value, str(reasons.exit_code(reason)), reasons.cure(reason))
        for reason in Reason
    ]
    assert told == real
    assert all(row["what happened"] for row in rows(page("docs/reasons.md"), "reason"))


def test_the_cures_in_the_readme() -> None:
    told = {row["reason"]: row["what to do"] for row in rows(page("README.md"), "reason")}
    assert told == {reason.value: reasons.cure(reason) for reason in Reason if reasons.cure(reason)}


def test_exit_codes() -> None:
    real = {
        "0": reasons.EXIT_DONE,
        "1": reasons.EXIT_FAILED,
        "2": reasons.EXIT_USAGE,
        "3": reasons.EXIT_REFUSED,
        "4": reasons.EXIT_UNREACHABLE,
    }
    assert all(int(text) == code for text, code in real.items())
    assert [row["exit code"] for row in rows(page("README.md"), "exit code")] == list(real)


# -- commands


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All commands that are not hidden, as words."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        elif not command.hidden:
            yield (*words, name)


def test_every_command_is_told_and_no_other() -> None:
    told = re.findall(r"^\| `edged ([a-z -]+)` \|", page("docs/cli.md"), re.MULTILINE)
    assert sorted(told) == sorted(" ".join(words) for words in commands(main))


def _said() -> list[tuple[str, str]]:
    """Every line of a shell block, or piece in backquotes, that calls edged with something."""
    found = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        lines = [line.strip() for block in fences(text, "sh") for line in block.splitlines()]
        lines += re.findall(
            r"`(edged [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        )
        lines = [re.sub(r"^(sudo|/\S+/bin/)\s*", "", line) for line in lines]
        found += [(path.name, line) for line in lines if line.startswith("edged ") and "…" not in line]
    return found


@pytest.mark.parametrize(("where", "line"), sorted(set(_said())))
def test_what_the_pages_type_is_understood(where: str, line: str) -> None:
    """Command and options exist; values are not looked at."""
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = main
    context = click.Context(command)
    while isinstance(command, click.Group):
        _, words, _ = command.make_parser(context).parse_args(args=list(words))
        if not words or words[0].isupper():
            return
        name, *words = words
        found = command.get_command(context, name)
        assert found is not None, f"{where}: there is no command {name!r}: {line}"
        command, context = found, click.Context(found, parent=context)
    command.make_parser(context).parse_args(args=list(words))


# -- files, tests and links that the pages name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    missing = []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        goal = (path.parent / target).resolve() if target else path
        if not goal.exists():
            missing.append(target)
        elif anchor and anchor not in _anchors(goal):
            missing.append(f"{target}#{anchor}")
    assert not missing


def _anchors(path: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_tests_that_are_named_are_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    below = "edged|firmware|mappers|tests|docs|examples|packaging|bench"
    named = re.findall(rf"`((?:{below})/[\w./-]*?)(?:::(\w+))?`", text)
    missing = [
        (file, test)
        for file, test in named
        if not any((base / file).exists() for base in (ROOT, path.parent))
        or (test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert not missing


def test_each_state_of_a_job_has_its_row_of_a_power_cut() -> None:
    heading = "the power dies while the job is"
    first = [row[heading] for row in rows(page("docs/power-cuts.md"), heading)]
    assert re.findall(r"\w+", " ".join(first)) == [
        state.value
        for state in (
            State.QUEUED, State.FETCHING, State.READY, State.STAGING, State.ACTIVATING, State.VERIFYING, State.REVERTING,
            State.SUCCEEDED, State.FAILED, State.CANCELLED, State.REVERTED,
        )
    ]  # fmt: skip
    for heads in (heading, "the power dies during"):
        for row in rows(page("docs/power-cuts.md"), heads):
            assert re.search(r"tests/.*::test_", row["proved by"])


def test_decision_records_are_listed() -> None:
    listed = re.findall(r"\((\d{4}-[\w-]+\.md)\)", page("docs/adr/README.md"))
    assert listed == sorted(path.name for path in (ROOT / "docs" / "adr").glob("[0-9]*.md"))


# -- set-up, libraries, plugins


def test_the_set_up_names_every_package() -> None:
    script = page("packaging/setup-dev.sh")
    wanted = re.search(r'DEBIAN_PACKAGES="([^"]*)"', script)
    assert wanted is not None
    (line,) = re.findall(r"^sudo apt-get install .*$", page("README.md"), re.MULTILINE)
    assert set(wanted[1].split()) | {"make", "git", "python3"} <= set(line.split())


def test_make_targets_that_are_named_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", page("Makefile"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", page(name), re.MULTILINE))
        assert {
            a or b for a, b in re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", page(name), re.MULTILINE)
        } <= targets


def test_the_record_of_libraries_is_that_of_the_project() -> None:
    declared = {
        re.split(r"[<>=~]", line)[0]
        for line in tomllib.loads(page("pyproject.toml"))["project"]["dependencies"]
    }
    table = section(page("docs/adr/0005-libraries.md"), "## Outcome: 2").split("- **")[0]
    told = {name for row in rows(table, "library") for name in re.split(r", ", row["library"])}
    assert told == declared


def test_floors_are_those_of_the_project_and_of_the_record() -> None:
    """Of what the project declares itself; a floor may stand there for a library of a library too."""
    floors = dict(re.findall(r"^([\w-]+)==([\d.]+)$", page("packaging/floors.txt"), re.MULTILINE))
    dependencies = tomllib.loads(page("pyproject.toml"))["project"]["dependencies"]
    own = {name: line for line in dependencies if (name := re.split(r"[<>=~]", line)[0]) in floors}
    assert own
    for name, line in own.items():
        assert line == f"{name}>={floors[name]}"
        assert f"{name} {floors[name]}" in page("docs/adr/0005-libraries.md")


def test_what_a_plugin_author_is_told() -> None:
    text = page("docs/writing-a-mapper.md")
    assert all(f"`{check.__name__}`" in text for check in CHECKS)
    assert all(f"{folder}" in text for folder in PLUGIN_FOLDERS)
    assert f'[project.entry-points."{ENTRY_POINT_GROUP}"]' in text
    for word in re.findall(r"Reason\.([A-Z_]+)", text):
        assert word in Reason.__members__


def test_capabilities_are_those_of_the_contract() -> None:
    tree = ast.parse(page("edged/api.py"))
    real = {
        node.name: {
            item.name for item in node.body if isinstance(item, ast.AsyncFunctionDef | ast.FunctionDef)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name.startswith("Supports")
    }
    told = {
        row["Protocol"]: set(re.findall(r"\w+", row["methods"]))
        for row in rows(page("docs/writing-a-mapper.md"), "Protocol")
    }
    assert told == real


def test_toml_in_the_pages_is_toml() -> None:
    blocks = [block for path in PAGES for block in fences(path.read_text(encoding="utf-8"), "toml")]
    assert len(blocks) >= 4
    for block in blocks:
        tomllib.loads(block)


def test_the_manual_pages_can_be_made_of_the_configuration_page(tmp_path: Path) -> None:
    """The package's build makes them, where a table that they do not understand would be found late."""
    subprocess.run([sys.executable, ROOT / "packaging" / "manpages.py", tmp_path], check=True)
    made = (tmp_path / "edged.toml.5").read_text(encoding="utf-8")
    for key in attrs.fields_dict(config.Model):
        assert f".B {key}\n" in made, key
