"""Writes the manual pages ``edged.1`` and ``edged.toml.5`` at build time, from what they are about.

    manpages.py FOLDER

The commands and their options come from the commands themselves, the keys of the configuration from
``docs/configuration.md``, which the tests hold to the code. What stands around them is in ``packaging/man``.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click

from edged import __version__
from edged.cli import main as edged

ROOT = Path(__file__).parent.parent


def main(folder: Path) -> None:
    """Both pages, with the date of the release and not of the build."""
    date = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH", "0")), UTC).strftime("%Y-%m-%d")
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in (
        ("edged.1", {"OPTIONS": "\n".join(_options(edged, [])), "COMMANDS": "\n".join(_commands(edged, []))}),
        ("edged.toml.5", {"KEYS": "\n".join(_markdown(ROOT / "docs" / "configuration.md"))}),
    ):
        page = (ROOT / "packaging" / "man" / f"{name}.in").read_text(encoding="utf-8")
        for key, text in {**body, "DATE": date, "VERSION": __version__}.items():
            page = page.replace(f"@{key}@", text)
        (folder / name).write_text(page, encoding="utf-8")


def escaped(text: str) -> str:
    """Text as roff shows it unchanged: hyphens that can be searched and copied, no line that begins a request."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


# -- commands


def _commands(group: click.Group, words: list[str]) -> Iterator[str]:
    context = _context(group, words)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, [*words, name])
        elif not command.hidden:
            pieces = command.collect_usage_pieces(_context(command, [*words, name]))
            usage = " ".join(["edged", *words, name, *pieces])
            yield f'.SS "{escaped(usage)}"'
            yield from _prose(command.help or "")
            yield from _options(command, [*words, name])


def _context(command: click.Command, words: list[str]) -> click.Context:
    return click.Context(command, info_name=" ".join(["edged", *words]), help_option_names=["-h", "--help"])


def _prose(text: str) -> Iterator[str]:
    """The paragraphs of a help text; click's mark for a paragraph that is not wrapped becomes one that is not filled."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith("\b"):
            yield ".PP\n.nf"
            yield escaped(textwrap.dedent(paragraph.removeprefix("\b").strip("\n")))
            yield ".fi"
        else:
            yield ".PP"
            yield escaped(" ".join(paragraph.split()))


def _options(command: click.Command, words: list[str]) -> Iterator[str]:
    context = _context(command, words)
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and record[1]:
            yield f".TP\n.B {escaped(record[0])}\n{escaped(record[1])}"


# -- configuration


def _markdown(path: Path) -> Iterator[str]:
    """As much of Markdown as the page has: headings, paragraphs, lists, tables with a key in the first column, fences."""
    blocks = re.split(r"\n\n+", path.read_text(encoding="utf-8").strip())
    for block in blocks:
        if block.startswith("```"):
            yield from _fence(block)
        elif block.startswith("#"):
            yield from _heading(block)
        elif block.startswith("|"):
            yield from _table(block)
        elif block.startswith("- "):
            for item in re.split(r"^- ", block, flags=re.MULTILINE)[1:]:
                yield f".IP \\(bu 2\n{_inline(item)}"
        else:
            yield f".PP\n{_inline(block)}"


def _fence(block: str) -> Iterator[str]:
    yield ".PP\n.RS\n.nf"
    yield escaped("\n".join(block.splitlines()[1:-1]))
    yield ".fi\n.RE"


def _heading(block: str) -> Iterator[str]:
    marks, _, title = block.partition(" ")
    if len(marks) > 1:
        yield f'.{"SH" if len(marks) == 2 else "SS"} "{escaped(title.replace("`", ""))}"'


def _table(block: str) -> Iterator[str]:
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    for key, *cells in rows:
        named = dict(zip(head[1:], cells, strict=True))
        meaning = named.pop("meaning")
        rest = [f"{name}: {cell}" if name != "type" else cell for name, cell in named.items() if cell]
        yield f".TP\n.B {_inline(key)}"
        yield _inline(meaning) or r"\&"
        if rest:
            yield f"({_inline('; '.join(rest))})"


def _inline(text: str) -> str:
    """Without the marks of Markdown; a link is its text."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return escaped(" ".join(re.sub(r"[`*]", "", text).split()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
