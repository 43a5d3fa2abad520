"""The picture of who may import whom (CONTRIBUTING.md), and what else the shape of the code shows. Imports none of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "edged": ROOT / "edged",
    "edged_firmware": ROOT / "firmware" / "edged_firmware",
    **{path.name: path for path in sorted((ROOT / "mappers").glob("edged_*"))},
}
MAPPERS = frozenset(path.name for path in (ROOT / "mappers").glob("edged_*"))
ABOVE_THE_ENGINE = {
    "server",
    "control",
    "deployments",
    "views",
    "devices",
    "reports",
    "app",
    "cli",
    "uplinks",
}

PURE = {
    "__future__",
    "collections",
    "dataclasses",
    "datetime",
    "enum",
    "functools",
    "itertools",
    "math",
    "re",
    "typing",
}
"""All of the standard library that a pure module needs."""

PLUGIN_BOUNDARY = {
    "edged/plugins.py",
    "edged/supervisor.py",
    "edged/sessions.py",
    "edged/links.py",
    "edged/devices.py",
    "mappers/edged_can/security.py",
}
"""Where somebody else's code is called: the only places that may catch whatever it raises."""

BLOCKING = {"time.sleep", "os.system", "os.wait", "os.waitpid", "os.popen"}
BLOCKING_MODULES = {"subprocess"}
SYNCHRONOUS = ("edged/cli/", "edged/testing/avr/")
"""Code that runs outside the daemon and may block."""


def sources() -> Iterator[tuple[str, Path]]:
    """Module name and file of everything that is installed."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(module: str, path: Path) -> Iterator[str]:
    """Full names of the modules that ``module`` imports, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            )
            full = ".".join(part for part in (base, node.module) if part)
            # "from edged import api" imports a module, "from edged import __version__" does not
            yield from (_submodule(full, alias.name) for alias in node.names)


def _submodule(package: str, attribute: str) -> str:
    first, _, rest = package.partition(".")
    folder = PACKAGES.get(first, ROOT / "nowhere") / rest.replace(".", "/")
    is_module = (folder / f"{attribute}.py").exists() or (folder / attribute).is_dir()
    return f"{package}.{attribute}" if is_module else package


def unit(module: str) -> str:
    """``edged.store.jobs`` is of unit ``edged.store``; other packages are one unit each."""
    first, *rest = module.split(".")
    return f"edged.{rest[0]}" if first == "edged" and rest else first


@cache
def graph() -> dict[str, dict[str, str]]:
    """For each unit the units of ours that it imports, each with one file that does."""
    found: dict[str, dict[str, str]] = {}
    for module, path in sources():
        uses = found.setdefault(unit(module), {})
        for target in imported(module, path):
            if target.split(".")[0] in PACKAGES and unit(target) != unit(module):
                uses[unit(target)] = name(path)
    return found


@cache
def table() -> dict[str, list[str]]:
    """The table of CONTRIBUTING.md, from top to bottom."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(edged[\w.]*)` \|(.*)\|$", text, re.MULTILINE)
    return {row[0]: re.findall(r"`([\w.]+)`", row[1]) for row in rows}


def test_the_table_has_every_unit_and_no_other() -> None:
    assert set(table()) == set(graph())


@pytest.mark.parametrize("one", sorted(graph()))
def test_only_what_the_table_allows_is_imported(one: str) -> None:
    extra = {target: file for target, file in graph()[one].items() if target not in table().get(one, ())}
    assert not extra, f"{one} imports {extra}; the table in CONTRIBUTING.md does not allow it"


def test_arrows_point_down() -> None:
    order = list(table())
    up = [
        (one, target) for one in order for target in table()[one] if order.index(target) <= order.index(one)
    ]
    assert not up


def test_firmware_knows_nothing_of_the_daemon() -> None:
    assert not graph()["edged_firmware"]


@pytest.mark.parametrize("mapper", sorted(MAPPERS))
def test_mappers_come_through_the_door(mapper: str) -> None:
    assert set(graph()[mapper]) <= {"edged.api", "edged.errors", "edged.tables", "edged_firmware"}


def test_nobody_but_the_entry_point_names_a_mapper() -> None:
    users = {one for one, uses in graph().items() if MAPPERS & set(uses)}
    assert not users, "a mapper is a plugin like anybody's"


def test_the_domain_is_pure() -> None:
    allowed = PURE | {"edged.api", "edged.errors", "edged.domain", "edged_firmware"}
    for module, path in sources():
        if unit(module) == "edged.domain":
            foreign = {
                target
                for target in imported(module, path)
                if (unit(target) if target.split(".")[0] in PACKAGES else target.split(".")[0]) not in allowed
            }
            assert not foreign, f"{name(path)} imports {foreign}"


def test_tables_are_pure() -> None:
    (path,) = (path for module, path in sources() if module == "edged.tables")
    assert {target.split(".")[0] for target in imported("edged.tables", path)} <= PURE


@pytest.mark.parametrize("one", ["edged.store", "edged.engine", "edged.domain"])
def test_the_core_knows_nothing_above_it(one: str) -> None:
    above = {f"edged.{part}" for part in ABOVE_THE_ENGINE} | MAPPERS
    if one == "edged.store":
        above |= {"edged.engine", "edged.sessions", "edged.plugins", "edged.config"}
    assert not above & set(graph()[one])


def test_only_the_command_and_the_test_tools_import_the_composition_root() -> None:
    assert {one for one, uses in graph().items() if "edged.app" in uses} == {"edged.cli", "edged.testing"}


def test_only_the_demo_imports_the_test_tools() -> None:
    users = {
        name(path)
        for module, path in sources()
        if unit(module) != "edged.testing"
        and any(unit(target) == "edged.testing" for target in imported(module, path))
    }
    assert users == {"edged/cli/demo.py"}


def _calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def test_only_the_clock_asks_for_the_time_of_day() -> None:
    asks = {"datetime.now", "datetime.utcnow", "datetime.today", "date.today", "time.time", "time.time_ns"}
    found = {
        name(path)
        for _, path in sources()
        if not name(path).startswith("edged/testing/")
        and any(call in asks for call, _ in _calls(parsed(path)))
    }
    assert found == {"edged/clock.py"}


def _is_broad(handler: ast.ExceptHandler) -> bool:
    caught = ast.unparse(handler.type) if handler.type else "BaseException"
    return bool(re.search(r"\b(Exception|BaseException)\b", caught))


def _raises_it_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_whatever_a_plugin_raises_is_caught_at_the_boundary_only() -> None:
    """Elsewhere a broad ``except`` raises again, or says in its line why it need not."""
    wrong = []
    for _, path in sources():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node):
                excused = re.search(r"# noqa: BLE001\W+\w+", lines[node.lineno - 1])
                if name(path) not in PLUGIN_BOUNDARY and not _raises_it_again(node) and not excused:
                    wrong.append(f"{name(path)}:{node.lineno}")
    assert not wrong


def test_every_excuse_has_a_reason() -> None:
    bare = [
        f"{name(path)}:{number}"
        for _, path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"# noqa: BLE001\s*$", line)
    ]
    assert not bare


def test_nothing_prints() -> None:
    assert not [
        f"{name(path)}:{line}"
        for _, path in sources()
        for call, line in _calls(parsed(path))
        if call == "print"
    ]


def test_nothing_blocks_the_loop() -> None:
    """No blocking call in a coroutine, and none at all in what the daemon imports."""
    wrong = []
    for module, path in sources():
        trees: list[ast.AST] = [parsed(path)]
        if name(path).startswith(SYNCHRONOUS):
            trees = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.AsyncFunctionDef)]
        elif BLOCKING_MODULES & set(imported(module, path)):
            wrong.append(f"{name(path)} imports {BLOCKING_MODULES}")
        for tree in trees:
            calls = _calls(tree)
            wrong += [f"{name(path)}:{line} {call}" for call, line in calls if _blocks(call)]
    assert not wrong


def _blocks(call: str) -> bool:
    return call in BLOCKING or call.split(".")[0] in BLOCKING_MODULES


def test_no_path_of_somebodys_machine() -> None:
    home = re.compile(r"/(?:home|Users)/\w|/root/\w")
    wrong = []
    for folder in ("edged", "firmware", "mappers", "docs", "examples", "packaging", "bench", "."):
        files = (ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*")
        for path in files:
            if path.suffix in {".py", ".md", ".toml", ".sh", ".txt", ".c", ".service", ""} and path.is_file():
                wrong += (
                    [name(path)] if home.search(path.read_text(encoding="utf-8", errors="replace")) else []
                )
    assert not wrong
