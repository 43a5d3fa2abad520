"""The configuration: every fault in one run, each with its file, its key, what was found and what is allowed."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from edged.api import LinkSpec, MapperSpec
from edged.cli import main
from edged.config import Node, examine, load
from edged.devices import LeftOut, resolve
from edged.errors import ConfigError, Reason
from edged.plugins import Plugins, discover

MODEL = '[[model]]\nid = "uno"\n'
DEVICE = '[[device]]\nid = "{id}"\nmodel = "uno"\nmapper = "uart-stk500"\naddress = "serial:/dev/ttyUSB0"\n'


def write(folder: Path, **files: str) -> Path:
    """``edged.toml``, and ``models.d/x.toml`` and ``devices.d/x.toml`` where ``models`` and ``devices`` are given."""
    for kind in ("models", "devices"):
        if kind in files:
            (folder / f"{kind}.d").mkdir()
            (folder / f"{kind}.d" / "x.toml").write_text(files[kind])
    path = folder / "edged.toml"
    path.write_text(files.get("node", ""))
    return path


def faults(path: Path) -> list[str]:
    """The faults, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(path)
    return sorted(problem.removeprefix(f"{path.parent}/") for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ('metrics.listen = "127.0.0.1:99999"', "metrics.listen: found '127.0.0.1:99999'; allowed: ADDRESS:PORT"),
        ('metrics.listen = "999.1.1.1:80"', "metrics.listen: found '999.1.1.1:80'; allowed: ADDRESS:PORT"),
        ('metrics.listen = "9464"', "metrics.listen: found '9464'; allowed: ADDRESS:PORT"),
        ('trust.repository = "ftp://x"', "trust.repository: found 'ftp://x'; allowed: https://HOST/PATH"),
        ('trust.repository = "http://"', "trust.repository: found 'http://'; allowed: https://HOST/PATH"),
        ('trust.repository = "http://h:99999/"', "trust.repository: found 'http://h:99999/'; allowed: "),
        ('trust.repository = "file://"', "trust.repository: found 'file://'; allowed: "),
        (
            "engine.first_backoff_s = 61",
            "engine.first_backoff_s: found 61.0; allowed: at most longest_backoff_s, which is 60",
        ),
        (
            "engine.longest_backoff_s = 0.5",
            "engine.first_backoff_s: found 1.0; allowed: at most longest_backoff_s, which is 0.5",
        ),
        (
            '[[model]]\nid = "uno"\n[model.health]\nkind = "property"\npattern = "x"\n',
            "model[0].health.query: found ''; allowed: what is to be asked, where kind is 'property'",
        ),
        ("trust = 3", "trust: found 3; allowed: a table"),
        ("engine.stall_s = nan", "engine.stall_s: found nan; allowed: a number from 0.1 to 3600"),
        (f"engine.stall_s = {10**400}", "allowed: a number"),
        ('[[model]]\nflash_size = 5', "model[0].id: found nothing; this key is required"),
        ("model = 5", "model: found 5; allowed: [[model]] tables"),
        ("x = " + "9" * 5000, "not TOML"),
        (
            'trust.credential = "key"\ntrust.repository = "http://h/"',
            "trust.repository: found 'http://h/'; allowed: with trust.credential: https://",
        ),
    ],
)  # fmt: skip
def test_one_fault_is_one_line(tmp_path: Path, node: str, says: str) -> None:
    (line,) = faults(write(tmp_path, node=node))
    assert line.startswith("edged.toml: ") and says in line


@pytest.mark.parametrize(
    "node",
    [
        'metrics.listen = "[::1]:9464"',
        'metrics.listen = "0.0.0.0:0"',
        'metrics.listen = ""',
        'trust.repository = "https://user@h:8443/releases"',
        'trust.repository = "file:///srv/releases"',
        'trust.repository = "releases"',
        'trust.repository = "/srv/releases"',
        "engine = {first_backoff_s = 60, longest_backoff_s = 60}",
        '[[model]]\nid = "uno"\n[model.health]\nkind = "line"\npattern = "x"\n',
    ],
)
def test_what_is_sound_passes(tmp_path: Path, node: str) -> None:
    load(write(tmp_path, node=node))


def test_no_fault_hides_another(tmp_path: Path) -> None:
    node = (
        'nonsense = 1\n[engine]\nstall_s = -1\ncall_s = -1\nlease_s = "x"\nfirst_backoff_s = 100\nodd = 2\n'
    )
    models = MODEL + 'flash_base = -1\nflash_size = 0\n[model.health]\nkind = "smell"\npattern = "["\n'
    devices = DEVICE.format(id="a b").replace("serial:/dev/ttyUSB0", "nowhere") + "watch = 1\n"
    found = faults(write(tmp_path, node=node, models=models, devices=devices))
    assert [line.partition(": found")[0] for line in found] == [
        "devices.d/x.toml: device[0].address",
        "devices.d/x.toml: device[0].id",
        "devices.d/x.toml: device[0].watch",
        "edged.toml: engine.call_s",
        "edged.toml: engine.first_backoff_s",
        "edged.toml: engine.lease_s",
        "edged.toml: engine.odd",
        "edged.toml: engine.stall_s",
        "edged.toml: nonsense",
        "models.d/x.toml: model[0].flash_base",
        "models.d/x.toml: model[0].flash_size",
        "models.d/x.toml: model[0].health.kind",
        "models.d/x.toml: model[0].health.pattern",
    ]


def test_what_no_single_file_can_tell_names_its_files_too(tmp_path: Path) -> None:
    stray = DEVICE.format(id="b").replace('"uno"', '"mega"')
    path = write(tmp_path, node=MODEL + DEVICE.format(id="a"), devices=DEVICE.format(id="a") + stray)
    assert faults(path) == [
        f"devices.d/x.toml: device[0].id: found 'a', which is {path}: device[0] already; allowed: each id once",
        "devices.d/x.toml: device[1].model: found 'mega'; allowed: uno",
    ]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    """Without the right to it, or with something else in its place: whoever runs this may be root, so it is the latter."""
    path = write(tmp_path)
    (tmp_path / "models.d").write_text("")
    (tmp_path / "devices.d").symlink_to("devices.d")
    allowed = f"allowed: a folder that user {os.getuid()} may list (ls -ld shows owner and mode)"
    assert faults(path) == [
        f"devices.d: cannot be read: Too many levels of symbolic links; {allowed}",
        f"models.d: cannot be read: Not a directory; {allowed}",
    ]
    (tmp_path / "devices.d").unlink()
    (tmp_path / "devices.d").symlink_to(tmp_path / "not-mounted")
    assert faults(path)[0] == f"devices.d: cannot be read: No such file or directory; {allowed}"


def test_models_that_cannot_be_listed_blame_no_device(tmp_path: Path) -> None:
    path = write(tmp_path, devices=DEVICE.format(id="a"))
    (tmp_path / "models.d").write_text("")
    (line,) = faults(path)
    assert line.startswith("models.d: cannot be read: Not a directory")


def test_a_table_in_the_wrong_folder_is_told_the_right_one(tmp_path: Path) -> None:
    path = write(tmp_path, models=DEVICE.format(id="a"), devices=MODEL + "[log]\nlevel = 'info'\n")
    assert faults(path) == [
        "devices.d/x.toml: log: found an unknown key; allowed: device, link; log belongs into edged.toml",
        "devices.d/x.toml: model: found an unknown key; allowed: device, link; model belongs into models.d or edged.toml",
        "models.d/x.toml: device: found an unknown key; allowed: model; device belongs into devices.d or edged.toml",
    ]


@pytest.mark.parametrize("models", ["[", MODEL + "flash_size = 0\n", "[[model]]\nid = 5\n"])
def test_a_bad_model_file_blames_no_device(tmp_path: Path, models: str) -> None:
    path = write(tmp_path, models=models, devices=DEVICE.format(id="a"))
    (line,) = faults(path)
    assert line.startswith("models.d/x.toml: ")
    assert set(examine(path).config.devices) == {"a"}


def test_without_any_model_a_device_is_told_so(tmp_path: Path) -> None:
    (line,) = faults(write(tmp_path, devices=DEVICE.format(id="a")))
    assert line.endswith("device[0].model: found 'uno'; allowed: none, since no model is described")


def test_check_config_asks_mapper_and_link_and_lists_all_in_one_run(tmp_path: Path) -> None:
    device = (
        DEVICE.format(id="a").replace("/dev/ttyUSB0", "board/tty") + "config = {baud = 1, answer_s = 0}\n"
    )
    alien = DEVICE.format(id="b").replace("uart-stk500", "warp").replace("serial:", "rope:")
    path = write(tmp_path, node="engine.stall_s = -1\n" + MODEL, devices=device + alien)
    answer = CliRunner().invoke(main, ["--config", str(path), "check-config"])
    assert answer.exit_code == 2
    where, installed = f"edged: configuration: {tmp_path}", discover()
    mappers, schemes = sorted(installed.mappers), sorted(f"{link}:" for link in installed.links)
    assert answer.stderr.splitlines() == [
        f"{where}/edged.toml: engine.stall_s: found -1; allowed: a number from 0.1 to 3600",
        f"{where}/devices.d/x.toml: device[0].address: found 'serial:board/tty'; "
        "allowed: serial:by-id/NAME, serial:by-path/NAME, serial:/dev/NAME",
        f"{where}/devices.d/x.toml: device[0].config.baud: found 1; allowed: a whole number from 1200 to 4000000",
        f"{where}/devices.d/x.toml: device[0].config.answer_s: found 0; allowed: a number of seconds from 0.05 to 60",
        f"{where}/devices.d/x.toml: device[1].mapper: found 'warp'; allowed: {', '.join(mappers)}",
        f"{where}/devices.d/x.toml: device[1].address: found 'rope:/dev/ttyUSB0'; "
        f"allowed: an address that begins with one of: {', '.join(schemes)}",
    ]


def test_check_config_holds_a_mapper_s_times_against_the_engine_s_bound(tmp_path: Path) -> None:
    """A device that may boot for longer than the engine lets a call take could never be updated."""
    device = DEVICE.format(id="a").replace("uart-stk500", "uart-smp") + "config = {boot_s = 90}\n"
    check = ["check-config"]
    path = write(tmp_path, node=MODEL, devices=device)
    answer = CliRunner().invoke(main, ["--config", str(path), *check])
    assert answer.exit_code == 2
    assert answer.stderr.splitlines() == [
        f"edged: configuration: {tmp_path}/devices.d/x.toml: device[0].config: by its times (boot_s and the like) "
        "one call of uart-smp may take 184 s; allowed: up to engine.call_s = 120"
    ]
    node = examine(path).config
    left_out = resolve(node, discover())["a"]
    assert isinstance(left_out, LeftOut) and left_out.reason is Reason.CONFIG_INVALID
    raised = tmp_path / "raised"
    raised.mkdir()
    path = write(raised, node="engine.call_s = 184\n" + MODEL, devices=device)
    assert CliRunner().invoke(main, ["--config", str(path), *check]).exit_code == 0


def test_what_two_devices_cannot_both_have_is_found(tmp_path: Path) -> None:
    """One controller under two names, however its bus is written; each by itself is sound."""
    device = '[[device]]\nid = "{}"\nmodel = "uno"\nmapper = "can-uds"\naddress = "can:{}"\n'
    where = f"edged: configuration: {tmp_path}/devices.d/x.toml: device[1].config: found"
    path = write(
        tmp_path,
        node=MODEL,
        devices=device.format("a", "can0") + device.format("b", "socketcan@can0@250000"),
    )
    answer = CliRunner().invoke(main, ["--config", str(path), "check-config"])
    assert answer.exit_code == 2
    assert answer.stderr.splitlines() == [
        f"{where} request_id 0x7e0 on can:can0, as device 'a' has; allowed: each by one device",
        f"{where} response_id 0x7e8 on can:can0, as device 'a' has; allowed: each by one device",
    ]
    found = resolve(load(path), discover())
    assert isinstance(found["a"], tuple), "the first is used"
    assert isinstance(found["b"], LeftOut) and found["b"].reason is Reason.CONFIG_INVALID
    other = tmp_path / "other"
    other.mkdir()
    path = write(other, node=MODEL, devices=device.format("a", "can0") + device.format("b", "can1"))
    assert CliRunner().invoke(main, ["--config", str(path), "check-config"]).exit_code == 0


def test_a_mapper_that_breaks_down_over_its_claims_is_named(tmp_path: Path) -> None:
    def broken(address: str, config: object) -> list[str]:
        raise RuntimeError("no")

    installed = discover()
    spec = replace(installed.mappers["uart-stk500"], claims=broken)
    config = load(write(tmp_path, node=MODEL + DEVICE.format(id="a")))
    left_out = resolve(config, Plugins({spec.name: spec}, installed.links))["a"]
    assert isinstance(left_out, LeftOut) and left_out.reason is Reason.PLUGIN_FAILED
    assert left_out.detail == "config: mapper uart-stk500 raised RuntimeError('no')"


def test_a_link_has_a_table_of_its_own_and_its_faults_are_told(tmp_path: Path) -> None:
    link = '[[link]]\naddress = "{}"\n[link.config]\nodd = 1\neven = 2\n'
    path = write(tmp_path, node=MODEL, devices=link.format("serial:/dev/ttyUSB0") + link.format("rope:x"))
    answer = CliRunner().invoke(main, ["--config", str(path), "check-config"])
    where = f"edged: configuration: {tmp_path}/devices.d/x.toml"
    assert answer.exit_code == 2
    # the links that are installed are more than one
    assert [line.partition("; allowed")[0] for line in answer.stderr.splitlines()] == [
        f"{where}: link[0].config.even: found an unknown key",
        f"{where}: link[0].config.odd: found an unknown key",
        f"{where}: link[1].address: found 'rope:x'",
    ]
    twice = tmp_path / "twice"
    twice.mkdir()
    path = write(twice, node=MODEL, devices=link.format("serial:a") * 2)
    assert "link[1].address: found 'serial:a', which is" in faults(path)[0]
    assert "link[0]" in faults(path)[0]


def test_the_doctor_sees_an_address_that_nobody_understands(tmp_path: Path) -> None:
    path = write(tmp_path, node=MODEL + DEVICE.format(id="a").replace("/dev/ttyUSB0", "board/tty"))
    said = CliRunner().invoke(main, ["--config", str(path), "doctor"]).stdout
    assert "fail  device    a: address: found 'serial:board/tty'; allowed: serial:by-id/NAME" in said
    assert "\nwarn  port" not in said


def test_a_plugin_that_breaks_down_over_an_address_or_a_table_is_named(tmp_path: Path) -> None:
    def broken(_: object) -> object:
        raise RuntimeError("no")

    installed = discover()
    plugins = Plugins(
        {"uart-stk500": MapperSpec("uart-stk500", installed.mappers["uart-stk500"].connect, broken)},
        {"serial": LinkSpec("serial", installed.links["serial"].open, broken)},
    )
    config = load(write(tmp_path, node=MODEL + DEVICE.format(id="a")))
    left_out = resolve(config, plugins)["a"]
    assert isinstance(left_out, LeftOut)
    assert left_out.reason is Reason.PLUGIN_FAILED
    assert left_out.detail == (
        "address: found 'serial:/dev/ttyUSB0'; the link serial: raised RuntimeError('no'); "
        "config: mapper uart-stk500 raised RuntimeError('no')"
    )


def test_a_link_without_an_opinion_takes_any_address(tmp_path: Path) -> None:
    installed = discover()
    plugins = Plugins(installed.mappers, {"serial": LinkSpec("serial", installed.links["serial"].open)})
    config = load(write(tmp_path, node=MODEL + DEVICE.format(id="a").replace("/dev/ttyUSB0", "board/tty")))
    assert not isinstance(resolve(config, plugins)["a"], LeftOut)


@pytest.mark.parametrize(
    ("host", "node"),
    [("gw-7", "gw-7"), ("-gw_7.example", "gw_7.example"), ("x" * 64, "x" * 63), ("ö", "node")],
)
def test_any_host_name_makes_a_node(monkeypatch: pytest.MonkeyPatch, host: str, node: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert Node().id == node


def test_a_device_has_its_models_table_where_it_says_nothing_else(tmp_path: Path) -> None:
    model = (
        MODEL + "[model.config]\nbaud = 57600\nids = [1, 2]\n[model.config.erase]\nper = 'page'\nwait_s = 3\n"
    )
    own = DEVICE.format(id="b") + "[device.config]\nids = [3]\n[device.config.erase]\nwait_s = 9\n"
    path = write(tmp_path, models=model, devices=DEVICE.format(id="a") + own)
    found = load(path).devices
    assert found["a"].config == {"baud": 57600, "ids": [1, 2], "erase": {"per": "page", "wait_s": 3}}
    assert found["b"].config == {"baud": 57600, "ids": [3], "erase": {"per": "page", "wait_s": 9}}


def test_a_fault_of_the_models_table_is_told_for_each_device(tmp_path: Path) -> None:
    path = write(tmp_path, models=MODEL + "[model.config]\nbaud = 1\n", devices=DEVICE.format(id="a"))
    config = load(path)
    left = resolve(config, discover())["a"]
    assert isinstance(left, LeftOut) and "config.baud: found 1" in left.detail


def test_a_fault_of_a_mappers_table_is_told_once_with_the_file_that_it_stands_in(tmp_path: Path) -> None:
    own = DEVICE.format(id="a") + "[device.config]\nboot_s = -1\nbuad = 9600\n"
    path = write(tmp_path, models=MODEL + "[model.config]\nbaud = 1\n", devices=own + DEVICE.format(id="b"))
    answer = CliRunner().invoke(main, ["--config", str(path), "check-config"])
    lines = [line.removeprefix(f"edged: configuration: {tmp_path}/") for line in answer.stderr.splitlines()]
    assert answer.exit_code == 2
    assert sorted(line.partition(": found")[0] for line in lines) == [
        "devices.d/x.toml: device[0].config.boot_s",
        "devices.d/x.toml: device[0].config.buad",
        "models.d/x.toml: model[0].config.baud",
    ]


def test_what_a_device_changes_in_its_models_table_is_the_devices(tmp_path: Path) -> None:
    model = MODEL + "[model.config.check]\nok = 1\nper = 2\n[[model.config.properties]]\nname = 3\n"
    own = DEVICE.format(id="a") + "[device.config.check]\nper = 4\nextra = 5\n"
    path = write(tmp_path, models=model, devices=own + DEVICE.format(id="b"))
    found = examine(path)
    first, second = found.config.device
    places = {
        "check.ok": "model",
        "check.per": "device",
        "check.extra": "device",
        "check": "device",
        "properties[0].name": "model",
        "other": "device",
    }
    for key, place in places.items():
        assert found.place_of(first, key) == f"{tmp_path}/{place}s.d/x.toml: {place}[0]", key
    assert found.place_of(second, "check.per") == f"{tmp_path}/models.d/x.toml: model[0]"
