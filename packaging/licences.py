"""What the vendored wheels are and under which licences: ``debian/copyright`` and a bill of materials (CycloneDX).

    licences.py copyright WHEELS > packaging/debian/copyright
    licences.py sbom WHEELS VERSION

``packaging/debian/copyright`` is kept in the repository, so that a licence that changes is seen in review; the build makes
it anew and fails where it differs. A wheel whose licence is not understood here is an error, never a guess.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

EXPRESSIONS = {
    "aiomqtt": "BSD-3-Clause",
    "can-isotp": "MIT",
    "cattrs": "MIT",
    "click-default-group": "BSD-3-Clause",
    "intelhex": "BSD-3-Clause",
    "paho-mqtt": "BSD-3-Clause",
    "pluggy": "MIT",
    "pyserial": "BSD-3-Clause",
    "python-dateutil": "Apache-2.0 AND BSD-3-Clause",
    "rich": "MIT",
    "sqlite-fts4": "Apache-2.0",
    "udsoncan": "MIT",
    "wrapt": "BSD-2-Clause",
}
"""Read from the licence file by a person, where the wheel's metadata has no expression, one that says less, or a choice
(of paho-mqtt's two, the Eclipse Distribution License is the BSD licence of three clauses)."""

PARTS = (
    ("click", "click/parser.py", "BSD-3-Clause"),
    ("prometheus-client", "prometheus_client/decorator.py", "BSD-2-Clause"),
    ("pyserial", "serial/__init__.py", "BSD-3-Clause"),
    ("securesystemslib", "securesystemslib/_vendor/ed25519/LICENSE", "CC0-1.0"),
)
"""Files of others inside a wheel, and those that alone name the holder: wheel, file, licence."""

HOLDERS = {
    "python-can": ["the python-can contributors"],
    "typing-extensions": [
        "2001 Python Software Foundation",
        "1991-1995 Stichting Mathematisch Centrum Amsterdam",
    ],
}
"""Where the notices stand in the middle of sentences, or are of the licence's text only."""

COMMON = {"Apache-2.0": "Apache-2.0", "CC0-1.0": "CC0-1.0", "LGPL-3.0-only": "LGPL-3"}
"""Licences whose text Debian has in ``/usr/share/common-licenses``."""

BSD_3 = """\
Redistribution and use in source and binary forms, with or without modification, are permitted provided that the following
conditions are met:

1. Redistributions of source code must retain the above copyright notice, this list of conditions and the following
disclaimer.

2. Redistributions in binary form must reproduce the above copyright notice, this list of conditions and the following
disclaimer in the documentation and/or other materials provided with the distribution.

3. Neither the name of the copyright holder nor the names of its contributors may be used to endorse or promote products
derived from this software without specific prior written permission.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING,
BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE DISCLAIMED. IN NO EVENT
SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL
DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS
INTERRUPTION) HOWEVER CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING
NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""
"""For parts that name the licence without its text."""

HEAD = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: edged
Comment:
 The package brings pure-Python libraries of others, unpacked below
 /usr/lib/edged. Each has a paragraph below, made from its wheel by
 packaging/licences.py.

Files: *
Copyright: 2026 the edged maintainers
License: Apache-2.0
 On Debian systems the full text is in /usr/share/common-licenses/Apache-2.0.
"""


class Unclear(Exception):
    """A wheel that does not say what it is licensed under."""


@dataclass(frozen=True, slots=True)
class Wheel:
    """One vendored wheel. ``files``: every member's text that a licence can be in, by name."""

    name: str
    version: str
    author: str
    expression: str
    digest: str
    packages: tuple[str, ...]
    licences: dict[str, str]
    notices: dict[str, str]
    parts: dict[str, str]

    @property
    def licence_text(self) -> str:
        """All licences of the wheel but Apache's, whose text Debian has."""
        return "\n\n".join(text for text in self.licences.values() if not text.startswith("Apache License"))

    @property
    def holders(self) -> list[str]:
        """Who holds the rights, as far as the wheel says so; its author where it does not."""
        told = [text for part, text in self.parts.items() if part.endswith("__init__.py")] or [
            self.licence_text,
            *self.notices.values(),
        ]
        return HOLDERS.get(self.name) or holders_in("\n".join(told)) or [self.author]


def main(arguments: list[str]) -> None:
    """Write what was asked for to standard output. Raises ``Unclear``."""
    what, folder, *rest = arguments
    found = [read(path) for path in sorted(Path(folder).glob("*.whl")) if not path.name.startswith("edged-")]
    sys.stdout.write(copyright_file(found) if what == "copyright" else sbom(found, *rest))


def read(path: Path) -> Wheel:
    """What a wheel says of itself."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith(".dist-info/METADATA")).rpartition("/")[0]
        metadata = HeaderParser().parsestr(archive.read(f"{info}/METADATA").decode())
        name = re.sub(r"[-_.]+", "-", metadata["Name"]).lower()
        return Wheel(
            name=name,
            version=metadata["Version"],
            author=re.sub(r'\s*<[^>]*>|"', "", metadata["Author"] or metadata["Author-email"] or ""),
            expression=_expression(name, metadata["License-Expression"]),
            digest=hashlib.sha256(path.read_bytes()).hexdigest(),
            packages=tuple(sorted({n.split("/")[0] for n in names if ".dist-info/" not in n and ".data/" not in n})),
            licences=_texts(archive, rf"{info}/(licenses/)?(LICEN[CS]E[^/]*|edl-v10)"),
            notices=_texts(archive, rf"{info}/(licenses/)?NOTICE[^/]*"),
            parts={part: archive.read(part).decode() for wheel, part, _ in PARTS if wheel == name},
        )  # fmt: skip


def _expression(name: str, told: str | None) -> str:
    expression = EXPRESSIONS.get(name) or told
    if not expression:
        raise Unclear(
            f"{name}: its metadata has no licence expression; read its licence, and add it to EXPRESSIONS"
        )
    return expression


def _texts(archive: zipfile.ZipFile, pattern: str) -> dict[str, str]:
    found = [name for name in archive.namelist() if re.fullmatch(pattern, name)]
    return {name.rpartition("/")[2]: archive.read(name).decode().strip() for name in sorted(found)}


# -- debian/copyright


def copyright_file(wheels: list[Wheel]) -> str:
    """The whole file, in the format that Debian calls DEP-5."""
    return "\n".join([HEAD, *(paragraph for wheel in wheels for paragraph in _paragraphs(wheel))])


def _paragraphs(wheel: Wheel) -> list[str]:
    comment = [f"installed as {', '.join(wheel.packages)}", *wheel.notices.values()]
    paragraphs = [
        _paragraph(
            f"wheels/{wheel.name.replace('-', '_')}-*.whl",
            wheel.holders,
            _mainly(wheel),
            wheel.licence_text,
            "\n".join(comment),
        )
    ]
    for name, part, licence in PARTS:
        if name == wheel.name and not part.endswith("__init__.py"):
            text = _comments(part, wheel.parts[part])
            holders = holders_in(text) or ["none: given to the public domain"]
            pattern = f"wheels/{wheel.name.replace('-', '_')}-*.whl/{part}"
            paragraphs.append(_paragraph(pattern, holders, licence, text))
    return paragraphs


def _mainly(wheel: Wheel) -> str:
    """The licence of the wheel without those of parts that have a paragraph of their own."""
    apart = {licence for name, part, licence in PARTS if name == wheel.name}
    names = wheel.expression.split(" AND ")
    return " AND ".join([name for name in names if name not in apart] or names)


def _paragraph(files: str, holders: list[str], expression: str, text: str, comment: str = "") -> str:
    licence = expression.replace(" AND ", " and ").replace(" OR ", " or ")
    lines = [f"Files: {files}", "Copyright: " + "\n           ".join(holders), f"License: {licence}"]
    lines += [_block(_body(expression, text))]
    if comment:
        lines += ["Comment:", _block(comment)]
    return "\n".join(lines) + "\n"


def _body(expression: str, text: str) -> str:
    """The licence's text as it must go along: Debian's copy, where Debian has one, and what the wheel has of the others."""
    names = re.split(r" AND | OR ", expression)
    told = [f"On Debian systems the full text of {name} is in /usr/share/common-licenses/{COMMON[name]}."
            for name in names if name in COMMON]  # fmt: skip
    if set(names) <= set(COMMON):
        return "\n\n".join(told)
    others = text
    if not re.search("Redistribution|Permission is hereby|PYTHON SOFTWARE FOUNDATION LICENSE", text):
        if expression != "BSD-3-Clause":
            raise Unclear(f"{expression}: the wheel names the licence without its text")
        others = BSD_3
    return "\n\n".join([*told, others])


def _comments(part: str, text: str) -> str:
    """What a Python file says before and in its first lines of code, without the marks of a comment."""
    if not part.endswith(".py"):
        return text
    head = ast.get_docstring(ast.parse(text)) or ""
    lines = [line.lstrip("#").strip() for line in text.splitlines() if line.startswith("#")]
    return f"{head}\n" + "\n".join(lines)


def holders_in(text: str) -> list[str]:
    """The notices ``Copyright … NAME``, without the word."""
    found = re.findall(
        r"^\W*(?:Copyright(?: \(c\))?|\(C\)) ?((?:©|\d{4}|the |[A-Z]).*)$", text, re.MULTILINE | re.IGNORECASE
    )
    lines = [line.strip().rstrip(".") for line in found if re.search(r"\d{4}", line)]
    return list(dict.fromkeys(re.sub(r"\.? All rights reserved$", "", line) for line in lines))


def _block(text: str) -> str:
    """Text as a field of several lines: each begins with a space, and an empty one is a full stop."""
    lines = [line.rstrip() for line in text.expandtabs().strip().splitlines()]
    return "\n".join(f" {line}" if line else " ." for line in lines)


# -- bill of materials


def sbom(wheels: list[Wheel], version: str) -> str:
    """CycloneDX 1.5, without the time and the number of the build: the package is the same bytes each time."""
    components = [
        {
            "type": "library",
            "name": wheel.name,
            "version": wheel.version,
            "purl": f"pkg:pypi/{wheel.name}@{wheel.version}",
            "hashes": [{"alg": "SHA-256", "content": wheel.digest}],
            "licenses": [{"expression": wheel.expression}],
        }
        for wheel in wheels
    ]
    root = {
        "type": "application",
        "name": "edged",
        "version": version,
        "purl": f"pkg:deb/edged@{version}?arch=all",
    }
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": root},
        "components": components,
    }
    return json.dumps(bill, indent=1) + "\n"


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Unclear as unclear:
        sys.exit(f"licences.py: {unclear}")
