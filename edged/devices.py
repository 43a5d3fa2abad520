"""Configured devices to supervised units; what could not be used, and why; what each device said when it was attached."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial

from edged.api import (
    Desired,
    Device,
    Identity,
    MapperSpec,
    Reported,
    Session,
    SessionTraits,
    Slot,
    Slots,
    SupportsDesired,
    SupportsDesiredQuery,
    SupportsFirmware,
    SupportsReadBack,
)
from edged.clock import Clock
from edged.config import Config, DeviceSettings, LinkSettings, Model
from edged.domain.admission import check_identity, runs
from edged.domain.job import ACTIVE_STATES, State
from edged.domain.reconcile import FIRMWARE, release_of
from edged.domain.twin import Value
from edged.domain.wishes import Told, is_due, told
from edged.errors import EdgedError, Permanent, Reason, Refused, meaning
from edged.links import LinkPool, device_env, link_config
from edged.plugins import Plugins
from edged.reports import Reports
from edged.sessions import DeviceUnit, Sessions, expect, plugin_call
from edged.store import audit, jobs, meta, twins
from edged.store.database import Store, Tx
from edged_firmware.facts import VerifiedRelease

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a device cannot be used. ``detail``: key of its table, what was found, what is allowed."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A configured device that cannot be used; the others can. ``reason`` is that of the first fault."""

    settings: DeviceSettings
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Attached:
    """What a device said when its session was opened last. ``identity`` None: asking would have disturbed it.
    ``reads_back``: its flash can be read. ``active``: the slot that ran then, None where it was not asked.

    ``rejected`` has, by name, the desired properties that the device would not take.
    """

    time: datetime
    traits: SessionTraits
    identity: Identity | None
    reads_back: bool
    rejected: Mapping[str, str]
    active: Slot | None = None


def device_of(settings: DeviceSettings, model: Model, config: object) -> Device:
    """The mapper's view of a configured device."""
    return Device(
        id=settings.id,
        model=settings.model,
        mapper=settings.mapper,
        address=settings.address,
        hardware_ids=model.hardware_ids,
        flash_base=model.flash_base,
        flash_size_bytes=model.flash_size,
        config=config,
    )


def resolve(config: Config, plugins: Plugins) -> dict[str, tuple[Device, MapperSpec] | LeftOut]:
    """Each device of the configuration and its mapper, or why it is left out; by its id."""
    seen = examine(config, plugins)
    return {each.id: _resolved(each, config, seen[each.id]) for each in config.device}


def _resolved(
    settings: DeviceSettings, config: Config, found: tuple[MapperSpec, object] | list[Fault]
) -> tuple[Device, MapperSpec] | LeftOut:
    if isinstance(found, tuple):
        spec, parsed = found
        return device_of(settings, config.models[settings.model], parsed), spec
    return LeftOut(settings, found[0].reason, "; ".join(fault.detail for fault in found))


def examine(config: Config, plugins: Plugins) -> dict[str, tuple[MapperSpec, object] | list[Fault]]:
    """By the id of each device: its mapper and what that made of the device's own table; or every fault, at least one."""
    seen: dict[str, tuple[MapperSpec, object] | list[Fault]] = {}
    claimed: dict[tuple[str, str], str] = {}
    for settings in config.device:
        found = _examine_alone(settings, plugins, config.engine.call_s)
        faults = list(_shared(settings, *found, claimed)) if isinstance(found, tuple) else []
        seen[settings.id] = faults or found
    return seen


def _shared(
    settings: DeviceSettings, spec: MapperSpec, parsed: object, claimed: dict[tuple[str, str], str]
) -> Iterator[Fault]:
    """What an earlier device has already; ``claimed`` knows by whom, and of this one where there is no fault."""
    try:
        own = {(spec.name, text) for text in spec.claims(settings.address, parsed)} if spec.claims else set()
    except Exception as exc:  # noqa: BLE001 - the plugin boundary
        yield Fault(Reason.PLUGIN_FAILED, f"config: mapper {spec.name} raised {exc!r}")
        return
    for key in sorted(own & claimed.keys()):
        text = f"config: found {key[1]}, as device {claimed[key]!r} has; allowed: each by one device"
        yield Fault(Reason.CONFIG_INVALID, text)
    if not own & claimed.keys():
        claimed |= dict.fromkeys(own, settings.id)


def _examine_alone(
    settings: DeviceSettings, plugins: Plugins, call_s: float
) -> tuple[MapperSpec, object] | list[Fault]:
    """As :func:`examine`, of one device by itself. ``call_s``: the engine's."""
    spec = plugins.mappers.get(settings.mapper)
    faults = list(_address_faults(settings, plugins, spec))
    if spec is None:
        text = f"mapper: found {settings.mapper!r}; allowed: {_listed(plugins.mappers)}{_not_in_use(plugins)}"
        return [Fault(Reason.UNSUPPORTED, text), *faults]
    try:
        parsed = spec.parse_config(settings.config)
        longest_s = float(spec.longest_call_s(parsed)) if spec.longest_call_s else 0.0
    except ValueError as exc:
        return faults + [Fault(Reason.CONFIG_INVALID, f"config.{line}") for line in _lines(exc)]
    except Exception as exc:  # noqa: BLE001 - the plugin boundary
        return [*faults, Fault(Reason.PLUGIN_FAILED, f"config: mapper {spec.name} raised {exc!r}")]
    if longest_s > call_s:
        text = f"config: by its times (boot_s and the like) one call of {spec.name} may take {longest_s:g} s"
        text += f"; allowed: up to engine.call_s = {call_s:g}"
        faults.append(Fault(Reason.CONFIG_INVALID, text))
    return faults or (spec, parsed)


def examine_link(settings: LinkSettings, plugins: Plugins) -> list[Fault]:
    """Every fault of a wire's own table."""
    faults = list(_address_faults(settings, plugins, None))
    parsed = None if faults else _link_config(settings, plugins)
    if isinstance(parsed, Permanent):
        faults = [Fault(parsed.reason, line) for line in parsed.detail.splitlines()]
    return faults


def examine_wire(settings: DeviceSettings, config: Config, plugins: Plugins) -> list[Fault]:
    """Every fault of the wire that a device without faults is on, where it has no table and needs one."""
    scheme, _, rest = settings.address.partition(":")
    try:
        address = f"{scheme}:{plugins.links[scheme].wire(rest)}"
    except Exception as exc:  # noqa: BLE001 - the plugin boundary
        return [Fault(Reason.PLUGIN_FAILED, f"address: the link {scheme}: raised {exc!r}")]
    if any(link.address == address for link in config.link):
        return []
    faults = examine_link(LinkSettings(address=address), plugins)
    return [Fault(one.reason, f"address: {address} has no [[link]] table; {one.detail}") for one in faults]


def access_list(config: Config, plugins: Plugins, address: str) -> str:
    """What is to be installed at the far end of the wire at ``address``, for the devices of the configuration.

    Raises ``Permanent``: ``UNSUPPORTED`` where there is nothing to install at such a wire, ``CONFIG_INVALID`` where it cannot
    be made, and what its plugin makes of the wire's table.
    """
    scheme, _, rest = address.partition(":")
    spec = plugins.link(scheme)
    if spec.access_list is None:
        raise Permanent(Reason.UNSUPPORTED, f"there is no access list for a wire {scheme}:")
    table = next((link for link in config.link if link.address == address), None)
    parsed = link_config(spec, rest, table.config if table else {})
    beside = [device.address.partition(":") for device in config.device]
    try:
        return spec.access_list(rest, parsed, [found for kind, _, found in beside if kind == scheme])
    except ValueError as exc:
        raise Permanent(Reason.CONFIG_INVALID, f"{address}: {exc}") from exc
    except Exception as exc:
        raise meaning(exc) from exc


def _link_config(settings: LinkSettings, plugins: Plugins) -> object:
    """What the wire's plugin makes of its table, or the ``Permanent`` that says why nothing."""
    scheme, _, rest = settings.address.partition(":")
    if scheme not in plugins.links:
        return Permanent(Reason.UNSUPPORTED, f"no link for {scheme!r}")
    try:
        return link_config(plugins.links[scheme], rest, settings.config)
    except Permanent as exc:
        return exc


def _address_faults(
    settings: DeviceSettings | LinkSettings, plugins: Plugins, spec: MapperSpec | None
) -> Iterator[Fault]:
    scheme, _, rest = settings.address.partition(":")
    found = f"address: found {settings.address!r}"
    allowed = {known for known in plugins.links if spec is None or spec.reaches(f"{known}:")}
    if scheme not in allowed:
        schemes = _listed(f"{known}:" for known in allowed)
        allowed_text = f"an address that begins with one of: {schemes}{_not_in_use(plugins)}"
        yield Fault(Reason.UNSUPPORTED, f"{found}; allowed: {allowed_text}")
        return
    try:
        plugins.links[scheme].parse_address(rest)
    except ValueError as exc:
        yield Fault(Reason.CONFIG_INVALID, f"{found}; {'; '.join(_lines(exc))}")
    except Exception as exc:  # noqa: BLE001 - the plugin boundary
        yield Fault(Reason.PLUGIN_FAILED, f"{found}; the link {scheme}: raised {exc!r}")


def _not_in_use(plugins: Plugins) -> str:
    """The plugins that may offer what is missing, and why they do not."""
    told = [f"{one.name} ({one.distribution}): {one.problem}" for one in plugins.states if one.problem]
    return f"; not in use is plugin {', plugin '.join(told)}" if told else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none is installed"


def _lines(error: ValueError) -> list[str]:
    return str(error).splitlines() or [repr(error)]


class Devices:
    """All devices of the configuration. ``sessions`` has the usable ones, ``left_out`` the others, by id.

    ``drifted`` is called with a device that came back with another image, ``returned`` with one whose session was opened.
    """

    def __init__(
        self,
        config: Config,
        plugins: Plugins,
        store: Store,
        reports: Reports,
        clock: Clock,
        count: Callable[[str, str], None],
    ) -> None:
        configs = {link.address: _link_config(link, plugins) for link in config.link}
        self.pool = LinkPool(plugins.links, configs, count, clock, _Memory(store))
        self.left_out: dict[str, LeftOut] = {}
        self.attached: dict[str, Attached] = {}
        self.drifted: Callable[[str], None] = lambda device: None
        self.returned: Callable[[str], None] = lambda device: None
        self._told: dict[str, dict[str, Told]] = {}
        self._store = store
        self._reports = reports
        reports.behind = self._look_behind
        self._clock = clock
        self._call_s = config.engine.call_s
        units: dict[str, DeviceUnit] = {}
        for device, found in resolve(config, plugins).items():
            if isinstance(found, LeftOut):
                self.left_out[device] = found
                log.error(
                    "device left out",
                    extra={"device": device, "reason": found.reason.value, "detail": found.detail},
                )
            else:
                units[device] = self._unit(*found, watch=config.devices[device].watch)
        self.sessions = Sessions(units)

    def _unit(self, device: Device, spec: MapperSpec, *, watch: bool) -> DeviceUnit:
        return DeviceUnit(
            device,
            spec,
            device_env(device.id, self.pool),
            lambda reported: self._reports.put(device.id, reported),
            lambda session: self._attach(device, session),
            self._clock,
            watch=watch,
            call_s=self._call_s,
        )

    def unit(self, device: str) -> DeviceUnit:
        """The unit of ``device``. Raises ``Permanent`` with the reason that it was left out, or ``DEVICE_UNKNOWN``."""
        missing = self.left_out.get(device)
        if missing is not None:
            raise Permanent(missing.reason, f"{device} is left out: {missing.detail}")
        return self.sessions[device]

    async def _attach(self, device: Device, session: Session) -> None:
        """A fresh session, or a changed wish: make sure who is there, then tell it what it should have.

        Raises ``Refused(HARDWARE_MISMATCH)`` where another kind of device answers, and ``Transient``.
        """
        identity = None
        if not session.traits.identify_disturbs:
            identity = expect(Identity, await plugin_call(self._call_s, session.identify))
            check_identity(device, (), identity)
        reads_back = isinstance(session, SupportsReadBack)
        self.attached[device.id] = Attached(self._clock.now(), session.traits, identity, reads_back, {})
        self.returned(device.id)
        if not session.traits.identify_disturbs and isinstance(session, SupportsFirmware):
            active = expect(Slots, await plugin_call(self._call_s, session.slots)).active
            self.attached[device.id] = replace(self.attached[device.id], active=active)
            await self._notice_version(device, active)
        twin = await self._store.read(lambda tx: twins.get(tx, device.id))
        wishes = {name: wish for name, wish in twin.desired.items() if not is_firmware(name)}
        if isinstance(session, SupportsDesiredQuery):
            session.offer([Desired(name, wish.value, wish.version) for name, wish in wishes.items()])
        await self._apply(device, session, self._due(device.id, wishes, twin.reported))
        self._show_rejected(device.id, wishes)

    async def _notice_version(self, device: Device, active: Slot | None) -> None:
        """A device that came back with another image than the last job left in it: say that nobody knows what it runs, and
        have it reconciled."""
        if active is None or active.runs is None:
            return
        if await self._store.write(lambda tx: _forget_if_other(tx, device.id, active)):
            log.warning(
                "device came back with another image", extra={"device": device.id, "runs": active.runs}
            )
            self.drifted(device.id)

    def _due(
        self, device: str, wishes: Mapping[str, Value], reported: Mapping[str, Value]
    ) -> dict[str, Value]:
        told, now = self._told.get(device, {}), self._clock.monotonic()
        return {
            name: wish
            for name, wish in wishes.items()
            if is_due(wish, reported.get(name), told.get(name), now)
        }

    def _look_behind(self, device: str, behind: Mapping[str, Value], reported: Mapping[str, Value]) -> None:
        """The device reports other values than it should have: it lost them, or could not take them by now."""
        wishes = {name: wish for name, wish in behind.items() if not is_firmware(name)}
        if device in self.attached and self._due(device, wishes, reported):
            self.sessions[device].refresh()

    async def _apply(self, device: Device, session: Session, wishes: Mapping[str, Value]) -> None:
        """Raises ``Transient`` where the wire fails; that one wish is refused is told, and the others go on."""
        said = self._told.setdefault(device.id, {})
        for name, wish in wishes.items():
            record = partial(told, wish, said.get(name), self._clock.monotonic())
            try:
                reported = await self._tell(device, session, Desired(name, wish.value, wish.version))
            except EdgedError as exc:
                if not _is_refusal(exc):
                    raise
                if wish.value is None:
                    # a wish that was taken back: what cannot be set has nothing to give up
                    said[name] = record()
                    continue
                said[name] = record(refused=str(exc))
                log.warning(
                    "property not taken", extra={"device": device.id, "property": name, "detail": str(exc)}
                )
            else:
                said[name] = record(answer=reported.value)
                await self._reports.put(device.id, reported)

    async def _tell(self, device: Device, session: Session, wanted: Desired) -> Reported:
        if not isinstance(session, SupportsDesired):
            raise Permanent(Reason.UNSUPPORTED, f"mapper {device.mapper} sets no properties")
        return expect(Reported, await plugin_call(self._call_s, session.apply, wanted))

    def _show_rejected(self, device: str, wishes: Mapping[str, Value]) -> None:
        said = self._told.get(device, {})
        rejected = {
            name: said[name].refused
            for name, wish in wishes.items()
            if name in said and said[name].version == wish.version and said[name].refused
        }
        self.attached[device] = replace(self.attached[device], rejected=rejected)


class _Memory:
    """What mappers remember, in the node's database: see :class:`edged.links.Memory`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def recall(self, user: str, key: str) -> str | None:
        return await self._store.read(lambda tx: meta.get(tx, _kept_under(user, key)))

    async def remember(self, user: str, key: str, text: str) -> None:
        await self._store.write(lambda tx: meta.put(tx, _kept_under(user, key), text))


def _kept_under(user: str, key: str) -> str:
    return f"mapper/{user}/{key}"


def _is_refusal(error: EdgedError) -> bool:
    """Whether the device said no to one property, for good or for now; anything else is about the wire."""
    return isinstance(error, Permanent | Refused) or error.reason is Reason.DEVICE_ERROR


def _forget_if_other(tx: Tx, device: str, active: Slot) -> bool:
    """Whether ``active`` does not run the release that the twin reports; the report is then taken back.

    Never while a job changes the device, or is about to: a trial boot runs another image, a device that is prepared may run
    none, and the job says how it ended.
    """
    if any(
        job.touched or job.state is State.READY for job in jobs.find(tx, device=device, states=ACTIVE_STATES)
    ):
        return False
    reported = twins.get(tx, device).reported.get(FIRMWARE)
    release = release_of(reported.value) if reported else None
    if release is None:
        return False
    last = next(iter(jobs.find(tx, device=device, states=(State.SUCCEEDED,), limit=1)), None)
    if last is None or last.verified is None or last.release != release:
        return False
    if runs(VerifiedRelease.from_json(json.loads(last.verified)).facts, active):
        return False
    twins.set_reported(tx, device, FIRMWARE, None, "device")
    audit.append(tx, "engine", "device.drifted", {"device": device, "expected": release, "runs": active.runs})
    return True


def is_firmware(name: str) -> bool:
    """Whether a property is a firmware component, which only a job changes."""
    return name == FIRMWARE or name.startswith(f"{FIRMWARE}.")
