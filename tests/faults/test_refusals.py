"""What must be refused is refused before any byte reaches the wire: by the real daemon, with a tap on a real boot loader.

Each case has its own reason, an audit row, and exit code 3.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from daemon_kit import Node

from edged.domain.reasons import EXIT_DONE, EXIT_REFUSED
from edged.errors import Reason
from edged.testing.avr import SimulatedAvr
from edged.testing.demo import DEVICE, Bench, configure, publish, simulated_board
from edged_firmware import release

WISH = "blink@2.0.0"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, SimulatedAvr]]:
    """One board for all cases: none of them may change it."""
    folder = tmp_path_factory.mktemp("board")
    with simulated_board(folder) as bench:
        yield bench, SimulatedAvr(folder / "board")


@dataclass
class Site:
    """A repository and a node that trusts its root."""

    folder: Path
    repository: Path
    bench: Bench

    @property
    def metadata(self) -> Path:
        return self.repository / "metadata"

    def target(self, kind: str) -> Path:
        (file,) = (self.repository / "targets" / "blink" / "2.0.0").glob(f"*.{kind}")
        return file


def _edit(path: Path, change: Callable[[bytearray], None]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(bytes(data))


def _flip(data: bytearray, at: int) -> None:
    data[at] ^= 1


def change_signed_facts(site: Site) -> None:
    """A release counter is raised in the signed targets; lengths stay."""
    newest = max(site.metadata.glob("*.targets.json"), key=lambda path: int(path.name.split(".")[0]))
    text = newest.read_text()
    assert '"release_counter":2' in text.replace(" ", "")
    newest.write_text(text.replace('"release_counter":2', '"release_counter":9').replace(": 2,", ": 9,"))


def sign_with_other_keys(site: Site) -> None:
    """Everything is served by somebody who has no key that the node trusts."""
    stranger = site.folder / "stranger"
    stranger.mkdir()
    other = publish(site.bench, stranger)
    for file in other.joinpath("metadata").glob("*.json"):
        if not file.name.endswith("root.json"):
            (site.metadata / file.name).write_bytes(file.read_bytes())


def let_expire(site: Site) -> None:
    """Published long ago, and never since."""
    for folder in (site.repository, site.folder / "keys"):
        folder.rename(folder.with_name(folder.name + ".new"))
    long_ago = datetime.now(UTC) - timedelta(days=200)
    release.init(site.repository, site.folder / "keys", long_ago)
    release.publish(site.repository, [site.folder / "keys"], long_ago)


def cut_short(site: Site) -> None:
    _edit(site.target("image"), lambda data: data.__delitem__(slice(len(data) - 100, None)))


def swap_index(site: Site) -> None:
    _edit(site.target("chunks"), lambda data: _flip(data, len(data) - 1))


def withdraw(site: Site) -> None:
    ref = release.ReleaseRef.parse(WISH)
    release.remove(site.repository, ref)
    release.publish(site.repository, [site.folder / "keys"], datetime.now(UTC))


def flip_in_chunk(number: int) -> Callable[[Site], None]:
    def change(site: Site) -> None:
        _edit(site.target("image"), lambda data: _flip(data, min(number * 4096 + 2000, len(data) - 1)))

    change.__name__ = f"flip_in_chunk_{number}"
    return change


CASES: list[tuple[Callable[[Site], None], set[Reason]]] = [
    (change_signed_facts, {Reason.METADATA_INVALID, Reason.SIGNATURE_INVALID}),
    (sign_with_other_keys, {Reason.SIGNATURE_INVALID}),
    (let_expire, {Reason.METADATA_EXPIRED}),
    (withdraw, {Reason.RELEASE_UNKNOWN}),
    (cut_short, {Reason.LENGTH_MISMATCH}),
    (swap_index, {Reason.HASH_MISMATCH}),
    (flip_in_chunk(0), {Reason.CHUNK_MISMATCH}),
    (flip_in_chunk(1), {Reason.CHUNK_MISMATCH}),
    (flip_in_chunk(2), {Reason.CHUNK_MISMATCH}),
]


def _site(folder: Path, bench: Bench) -> tuple[Site, Node]:
    repository = publish(bench, folder)
    return Site(folder, repository, bench), Node(folder, configure(bench, repository, folder))


def _refused(node: Node, board: SimulatedAvr, wish: str) -> Reason:
    """Deploy, and check all that a refusal owes: exit code, audit row, silence on the wire. Returns its reason."""
    sent, flash = board.stats().bytes_in, board.flash()
    done = node.edged("deploy", wish, "--to", DEVICE, "--wait", "--yes")
    assert done.returncode == EXIT_REFUSED, done.stdout + done.stderr
    assert board.stats().bytes_in == sent, "bytes reached the wire"
    assert board.flash() == flash
    rows = [json.loads(str(row[0])) for row in node.rows("SELECT json FROM audit ORDER BY seq DESC LIMIT 3")]
    reasons = [row["reason"] for row in rows if row.get("reason")]
    assert reasons, f"no audit row says why: {rows}"
    assert reasons[0] in done.stdout + done.stderr
    return Reason(reasons[0])


@pytest.mark.parametrize(("spoil", "expected"), CASES, ids=[case[0].__name__ for case in CASES])
def test_refused(
    tmp_path: Path,
    board: tuple[Bench, SimulatedAvr],
    spoil: Callable[[Site], None],
    expected: set[Reason],
) -> None:
    bench, device = board
    site, node = _site(tmp_path, bench)
    spoil(site)
    with node.life():
        assert _refused(node, device, WISH) in expected
        assert node.edged("audit", "verify").returncode == EXIT_DONE


def test_another_model_and_another_protocol(tmp_path: Path, board: tuple[Bench, SimulatedAvr]) -> None:
    bench, device = board
    site, node = _site(tmp_path, bench)
    for version, draft in (
        ("9.0.0", {"models": ("valve",), "protocol": bench.protocol}),
        ("9.1.0", {"models": ("pump",), "protocol": "ymodem"}),
        ("9.2.0", {"models": ("pump",), "hardware_ids": ("avr:1e9801",)}),
    ):
        release.add(site.repository, bench.images["1.0.0"], release.Draft("other", version, **draft))  # type: ignore[arg-type]
    release.publish(site.repository, [tmp_path / "keys"], datetime.now(UTC))
    with node.life():
        assert _refused(node, device, "other@9.0.0") is Reason.MODEL_MISMATCH
        assert _refused(node, device, "other@9.1.0") is Reason.PROTOCOL_MISMATCH
        assert _refused(node, device, "other@9.2.0") is Reason.HARDWARE_MISMATCH


def test_an_image_beyond_the_flash(tmp_path: Path, board: tuple[Bench, SimulatedAvr]) -> None:
    bench, device = board
    _, node = _site(tmp_path, replace(bench, flash_bytes=4096))
    with node.life():
        assert _refused(node, device, WISH) is Reason.IMAGE_TOO_LARGE


def test_a_lower_counter_after_a_real_update(tmp_path: Path, board: tuple[Bench, SimulatedAvr]) -> None:
    bench, _ = board
    own = tmp_path / "own"
    own.mkdir()
    with simulated_board(own) as fresh:
        _, node = _site(tmp_path, replace(bench, address=fresh.address))
        device = SimulatedAvr(own / "board")
        with node.life():
            assert node.edged("deploy", WISH, "--to", DEVICE, "--wait", "--yes").returncode == EXIT_DONE
            assert _refused(node, device, "blink@1.0.0") is Reason.COUNTER_LOWER
