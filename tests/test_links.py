"""The pool of wires: one holder for each, many users, and never two holders of one wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engine_kit import until

from edged.api import Env, Link, LinkSpec
from edged.errors import Permanent, Reason, Transient
from edged.links import LinkPool, device_env


@dataclass
class Wire:
    address: str
    exclusive: bool


class Wires:
    """Counts how often its one wire is open; ``slow_close_s`` and ``hangs`` are what it does wrong."""

    def __init__(self, *, exclusive: bool = False) -> None:
        self.exclusive = exclusive
        self.open_now = 0
        self.opened = 0
        self.most = 0
        self.slow_close_s = 0.0
        self.closing = 0
        self.hangs = False
        self.fault: BaseException | None = None
        self.pool = LinkPool({"wire": LinkSpec("wire", self.open)})

    @asynccontextmanager
    async def open(self, rest: str, env: Env) -> AsyncIterator[Link]:
        if self.hangs:
            await asyncio.sleep(3600)
        if self.fault is not None:
            raise self.fault
        self.opened += 1
        self.open_now += 1
        self.most = max(self.most, self.open_now)
        try:
            yield Wire(f"wire:{rest}", self.exclusive)
        finally:
            self.closing += 1
            await asyncio.sleep(self.slow_close_s)
            self.closing -= 1
            self.open_now -= 1

    def use(self, user: str) -> Any:
        return device_env(user, self.pool).link("wire:a")


def _run(body: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await body()

    asyncio.run(limited())


def test_a_shared_wire_is_opened_once_and_closed_after_the_last() -> None:
    wires = Wires()

    async def body() -> None:
        async with wires.use("one") as first:
            async with wires.use("two") as second:
                assert first is second
                assert wires.pool.users() == {"wire:a": ("one", "two")}
            assert wires.open_now == 1
        assert (wires.open_now, wires.opened, wires.pool.users()) == (0, 1, {})

    _run(body)


def test_an_exclusive_wire_has_one_user() -> None:
    wires = Wires(exclusive=True)

    async def body() -> None:
        async with wires.use("one"):
            with pytest.raises(Transient, match="in use by one") as caught:
                async with wires.use("two"):
                    pass
            assert caught.value.reason is Reason.LINK_BUSY
            assert wires.open_now == 1
        async with wires.use("two"):
            pass
        assert wires.most == 1

    _run(body)


def test_the_next_user_waits_until_the_wire_is_really_closed() -> None:
    wires = Wires(exclusive=True)
    wires.slow_close_s = 0.05

    async def body() -> None:
        async def use(user: str) -> None:
            async with wires.use(user):
                await asyncio.sleep(0.01)

        first = asyncio.create_task(use("one"))
        while not wires.closing:
            await asyncio.sleep(0)
        assert wires.open_now == 1, "it is closing"
        await use("two")
        await first
        assert (wires.opened, wires.most) == (2, 1)

    _run(body)


def test_closing_goes_on_when_the_last_user_is_cancelled() -> None:
    wires = Wires(exclusive=True)
    wires.slow_close_s = 0.05

    async def body() -> None:
        async def use(user: str) -> None:
            async with wires.use(user):
                await asyncio.sleep(60)

        first = asyncio.create_task(use("one"))
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait([first])
        async with wires.use("two"):
            assert wires.most == 1

    _run(body)


def test_opening_that_hangs_ends_with_its_last_user() -> None:
    wires = Wires()
    wires.hangs = True

    async def body() -> None:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02), wires.use("one"):
                    pass
        assert wires.pool.users() == {}
        wires.hangs = False
        async with wires.use("two"):
            pass

    _run(body)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Transient(Reason.DEVICE_ABSENT, "gone"), Reason.DEVICE_ABSENT),
        (ValueError("bug"), Reason.PLUGIN_FAILED),
        (asyncio.CancelledError(), Reason.PLUGIN_FAILED),
        (SystemExit(1), Reason.PLUGIN_FAILED),
        (Transient("gone"), Reason.PLUGIN_FAILED),  # type: ignore[arg-type]
    ],
)
def test_what_opening_raises_reaches_all_users_and_the_next_try_is_fresh(
    fault: BaseException, reason: Reason
) -> None:
    wires = Wires()
    wires.fault = fault

    async def body() -> None:
        async def use(user: str) -> Reason:
            try:
                async with wires.use(user):
                    raise AssertionError("it opened")
            except (Transient, Permanent) as exc:
                return exc.reason

        assert await asyncio.gather(use("one"), use("two")) == [reason, reason]
        wires.fault = None
        async with wires.use("three"):
            pass

    _run(body)


def test_a_wire_is_opened_with_its_own_table_and_counts_in_its_own_name() -> None:
    seen: list[object] = []
    counted: list[tuple[str, str]] = []

    @asynccontextmanager
    async def opening(rest: str, env: Env) -> AsyncIterator[Link]:
        seen.append(env.config)
        env.count("opened")
        yield Wire(f"wire:{rest}", exclusive=False)

    spec = LinkSpec("wire", opening, parse_config=lambda table, rest: {"rest": rest, **table})
    pool = LinkPool(
        {"wire": spec},
        {"wire:a": {"x": 1}, "wire:bad": Permanent(Reason.CONFIG_INVALID, "config.x: found 2")},
        lambda source, event: counted.append((source, event)),
    )

    async def body() -> None:
        env = device_env("one", pool)
        async with env.link("wire:a"), env.link("wire:b"):
            env.count("used")
        assert seen == [{"x": 1}, {"rest": "b"}]
        assert counted == [("wire:a", "opened"), ("wire:b", "opened"), ("one", "used")]
        with pytest.raises(Permanent, match="found 2"):
            async with env.link("wire:bad"):
                pass
        assert not pool.users()

    _run(body)


def test_a_wire_may_stay_open_for_a_while_after_its_last_user() -> None:
    wires = Wires()
    wires.pool = LinkPool({"wire": LinkSpec("wire", wires.open, linger_s=60)})

    async def body() -> None:
        async with wires.use("one") as first:
            pass
        await asyncio.sleep(0.05)
        assert wires.open_now == 1 and not wires.pool.users()
        async with wires.use("two") as second:
            assert first is second

    _run(body)


def test_a_wire_that_stayed_open_is_closed_after_its_while_and_fails_no_later_user() -> None:
    wires = Wires()
    wires.pool = LinkPool({"wire": LinkSpec("wire", wires.open, linger_s=0.1)})

    async def body() -> None:
        async with wires.use("one") as first:
            pass
        async with wires.use("two") as second:
            assert first is second
            await asyncio.sleep(0.15)
            assert wires.open_now == 1, "the time since the first user was counted on"
        await until(lambda: wires.open_now == 0)
        async with wires.use("three"):
            assert wires.opened == 2
        wires.fault = Transient(Reason.DEVICE_ABSENT, "gone")
        await until(lambda: wires.open_now == 0)
        for _ in range(2):
            with pytest.raises(Transient, match="gone"):
                async with wires.use("four"):
                    pass
        wires.fault = None
        async with wires.use("five"):
            assert wires.opened == 3

    _run(body)


def test_an_unknown_kind_of_wire_is_unsupported() -> None:
    async def body() -> None:
        with pytest.raises(Permanent, match="links: wire") as caught:
            async with device_env("one", Wires().pool).link("can:can0"):
                pass
        assert caught.value.reason is Reason.UNSUPPORTED

    _run(body)


def test_a_mapper_reads_a_secret_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "edged_pump-key").write_text("s3cret\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    env = device_env("pump-1", LinkPool({}))
    assert asyncio.run(env.credential("pump-key")) == "s3cret"
    with pytest.raises(Permanent, match="other.*/etc/edged/credentials") as caught:
        asyncio.run(env.credential("other"))
    assert caught.value.reason is Reason.CONFIG_INVALID


def test_what_a_mapper_remembers_is_its_devices_own() -> None:
    pool = LinkPool({})

    async def body() -> None:
        await device_env("pump-1", pool).remember("x", "1")
        await device_env("pump-1", pool).remember("x", "2")
        assert await device_env("pump-1", pool).recall("x") == "2"
        assert await device_env("pump-1", pool).recall("y") is None
        assert await device_env("pump-2", pool).recall("x") is None

    asyncio.run(body())


def test_a_log_line_says_whose_it_is_and_what_the_plugin_said(caplog: pytest.LogCaptureFixture) -> None:
    log = device_env("pump-1", LinkPool({})).log
    log.warning("broker lost", extra={"detail": "refused"})
    log.warning("plain")
    said = [
        (record.message, record.__dict__["device"], record.__dict__.get("detail"))
        for record in caplog.records
    ]
    assert said == [("broker lost", "pump-1", "refused"), ("plain", "pump-1", None)]
