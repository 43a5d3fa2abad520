"""``edged release`` and ``edged tuf``: one clear line, JSON on request, exit codes 0, 1, 2, 3."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from web import serving

from edged.cli import release as commands
from edged.cli.release import release
from edged.cli.tuf import tuf
from edged_firmware.facts import Requirement

Run = Callable[..., Result]
HEX = ":0400000001020304F2\n:00000001FF\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGED_KEY_PASSWORD", raising=False)
    (tmp_path / "fw.bin").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "fw.hex").write_text(HEX)

    def invoke(*args: str, code: int = 0) -> Result:
        result = CliRunner().invoke(release, args)
        assert result.exit_code == code, result.output
        return result

    return invoke


ADD = ("add", "repo", "fw.bin", "--name", "blink", "--model", "uno")


def test_a_release_from_init_to_withdrawal(run: Run) -> None:
    assert "1.root.json" in run("init", "repo").output
    assert run("list", "repo").output.startswith("No releases")
    added = json.loads(run(*ADD, "--version", "1.0", "--json").output)
    assert (added["release"], added["status"], added["release_counter"]) == ("blink@1.0", "staged", 1)
    assert added["size_bytes"] == 16 + 16 + 2048
    published = run("publish", "repo").output
    assert "Published blink@1.0." in published
    assert "Signed timestamp version 2, valid until" in published
    assert json.loads(run("list", "repo", "--json").output)["releases"][0]["status"] == "published"
    assert "counter 2" in run(*ADD, "--version", "1.1").output
    assert "is removed" in run("remove", "repo", "blink@1.1").output
    assert json.loads(run("remove", "repo", "blink@1.0", "--json").output)["status"] == "withdrawing"
    assert json.loads(run("publish", "repo", "--json").output)["withdrawn"] == ["blink@1.0"]
    assert "Signed root version 3" in run("renew-root", "repo", "--rotate", "timestamp").output


@pytest.mark.parametrize("words", [("list", "repo"), ("publish", "repo"), ("remove", "repo", "blink@1")])
def test_an_error_of_the_publisher_has_no_cure_for_nodes(run: Run, words: tuple[str, ...]) -> None:
    output = run(*words, code=3).output
    assert "edged release init" in output
    assert "cure" not in output


def test_the_keys_lie_beside_the_repository(run: Run) -> None:
    run("init", "repo", "--root-keys", "5", "--root-threshold", "3")
    assert len(list(Path("repo.keys").glob("root-*.pem"))) == 5
    root = json.loads(Path("repo/metadata/1.root.json").read_bytes())["signed"]
    assert root["roles"]["root"]["threshold"] == 3


def test_a_password_in_the_environment_protects_the_keys(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGED_KEY_PASSWORD", "secret")
    run("init", "repo", "--keys", "mine")
    run("publish", "repo", "--keys", "mine")
    monkeypatch.setenv("EDGED_KEY_PASSWORD", "wrong")
    assert "EDGED_KEY_PASSWORD" in run("publish", "repo", "--keys", "mine", code=3).output


def test_all_facts_are_options(run: Run) -> None:
    run("init", "repo")
    options = [
        "--hardware-id",
        "1e950f",
        "--counter",
        "7",
        "--protocol",
        "stk500v1",
        "--param",
        "baud=115200",
    ]
    options += [
        "--param",
        "reset=true",
        "--param",
        "note=x",
        "--identifies-as",
        "v1",
        "--requires",
        "radio>=3",
    ]
    run(
        "add",
        "repo",
        "fw.hex",
        "--name",
        "b",
        "--version",
        "1",
        "--model",
        "uno",
        "--flash-size",
        "32K",
        *options,
    )
    (staged,) = Path("repo/.staged").glob("*.json")
    facts = json.loads(staged.read_bytes())["targets"]["b/1/image"]["custom"]["edged"]
    assert facts["flash"] == {"protocol": "stk500v1", "params": {"baud": 115200, "reset": True, "note": "x"}}
    assert (facts["hardware_ids"], facts["release_counter"], facts["format"]) == (["1e950f"], 7, "segments")
    assert (facts["identifies_as"], facts["requires"]) == ("v1", [{"component": "radio", "counter": 3}])


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("publish", "nowhere"), 3, "trust_missing"),
        (("list", "repo.keys"), 3, "edged release init"),
        (("init", "repo"), 1, "already"),
        (("init", "new", "--keys", "new/keys"), 1, "inside the repository"),
        ((*ADD, "--version", "1/2"), 3, "version"),
        ((*ADD, "--version", "1", "--flash-size", "1K"), 3, "image_too_large"),
        ((*ADD, "--version", "1", "--format", "hex"), 3, "image_invalid"),
        ((*ADD, "--version", "1", "--format", "hex", "--base", "0x100"), 1, "base address"),
        ((*ADD, "--version", "1", "--flash-size", "32Q"), 2, "32K"),
        ((*ADD, "--version", "1", "--requires", "radio"), 2, "radio>=3"),
        ((*ADD, "--version", "1", "--param", "x"), 2, "KEY=VALUE"),
        ((*ADD,), 2, "--version"),
        (("remove", "repo", "blink"), 2, "NAME@VERSION"),
        (("remove", "repo", "blink@9"), 3, "release_unknown"),
        (("renew-root", "repo", "--rotate", "mirror"), 2, "mirror"),
    ],
)
def test_an_error_is_one_clear_line_and_a_code(run: Run, args: tuple[str, ...], code: int, text: str) -> None:
    run("init", "repo")
    result = run(*args, code=code)
    assert text in result.output
    if code != 2:
        assert result.output.count("\n") == 1
        answer = json.loads(run(*args, "--json", code=code).stdout)
        assert answer["code"] == ("refused" if code == 3 else "failed")
        assert answer["reason"]
        assert answer["detail"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("32768", 32768), ("0x8000", 32768), ("32K", 32768), ("2MiB", 2 << 20), ("0", 0), (7, 7)],
)
def test_sizes(text: str | int, number: int) -> None:
    assert commands.size(text) == number


@pytest.mark.parametrize("text", ["", "-1", "1.5", "K", "0xZZ", "0x10K", "1 0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter):
        commands.size(text)


def test_parameters_and_requirements() -> None:
    assert commands.parameter("a=-3") == ("a", -3)
    assert commands.parameter("a=b=c") == ("a", "b=c")
    assert commands.parameter("a=") == ("a", "")
    assert commands.requirement("radio>=12") == Requirement("radio", 12)


def test_the_tuf_command_refreshes_and_downloads(run: Run) -> None:
    run("init", "repo")
    run(*ADD, "--version", "1.0")
    run("publish", "repo")

    def client(*args: str, code: int = 0) -> None:
        result = CliRunner().invoke(tuf, ["--metadata-dir", "cache", *args])
        assert result.exit_code == code, result.output

    with serving(Path("repo")) as url:
        client("init", "repo/metadata/1.root.json")
        client("--metadata-url", f"{url}/metadata", "refresh")
        names = sorted(path.name for path in Path("cache").glob("*.json"))
        assert names == ["root.json", "snapshot.json", "targets.json", "timestamp.json"]
        where = [
            "--metadata-url",
            f"{url}/metadata",
            "--target-base-url",
            f"{url}/targets",
            "--target-dir",
            "got",
        ]
        client(*where, "--target-name", "blink/1.0/image", "download")
        (got,) = Path("got").iterdir()
        assert got.stat().st_size == 16 + 16 + 2048
        client(*where, "--target-name", "blink/6.6/image", "download", code=1)
    client("--metadata-url", f"{url}/metadata", "refresh", code=1)
