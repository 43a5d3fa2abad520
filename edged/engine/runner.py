"""One job, taken as far as it goes now: to an end, or to a wait.

Each turn asks ``domain.steps.next_step``, does what it says, and commits. There is no state here that a power cut could
lose: the row has it, or the device is asked again.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, ClassVar, ParamSpec, TypeVar

from edged.api import (
    Device,
    Health,
    Identity,
    Session,
    SessionTraits,
    Slot,
    Slots,
    SupportsFirmware,
    SupportsHealth,
    SupportsPreparation,
    SupportsReadBack,
    SupportsTrial,
)
from edged.clock import SteadyClock
from edged.config import EngineSettings, Model
from edged.domain import admission, retry
from edged.domain.job import SILENT, Fallback, Job, State
from edged.domain.reconcile import firmware_value
from edged.domain.steps import Bounds, Do, Facts, Move, View, next_step
from edged.engine import running
from edged.engine.events import Broadcast
from edged.engine.fallback import holds, is_blank, worth_keeping
from edged.engine.images import ImageKey, Images
from edged.engine.ledger import Effect, Ledger, log_fields
from edged.engine.observer import Observer
from edged.engine.transfer import Checkpoints, Interrupted, Meter, Status, unless
from edged.engine.trust import Trust
from edged.errors import Permanent, Reason, Refused, Transient
from edged.sessions import DeviceUnit, Lease, expect, plugin_call, translated
from edged.store import floors, jobs, twins
from edged.store.database import Store
from edged_firmware.facts import VerifiedRelease

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")
_BETWEEN_IMAGES = frozenset({State.STAGING, State.REVERTING})
_BAD_BYTES = frozenset(
    {Reason.CHUNK_MISMATCH, Reason.INDEX_MISMATCH, Reason.LENGTH_MISMATCH, Reason.HASH_MISMATCH}
)


@dataclass(frozen=True, slots=True)
class Workshop:
    """What every runner works with; built once by the composition root.

    ``sign`` signs the audit head at the end of each job.
    """

    store: Store
    clock: SteadyClock
    trust: Trust
    images: Images
    models: Mapping[str, Model]
    settings: EngineSettings
    observer: Observer
    broadcast: Broadcast
    sign: Callable[[bytes], bytes]


class JobRunner:
    """Takes one job as far as it goes. ``stop`` set from outside: somebody changed the row, look at it now."""

    def __init__(self, shop: Workshop, unit: DeviceUnit, job: Job) -> None:
        self._shop = shop
        self._unit = unit
        self._ledger = Ledger(job, shop.store, shop.sign, shop.broadcast, shop.observer)
        self._model = shop.models[unit.device.model]
        self._lease: Lease | None = None
        self._view: View | None = None
        self._active: Slot | None = None
        self._sound: set[ImageKey] = set()
        self._staged = False
        self._progressed = False
        self._stack = AsyncExitStack()
        self.stop = asyncio.Event()

    @property
    def job(self) -> Job:
        """The row as it is now, with what this run counted since its last commit."""
        return self._ledger.job

    async def run(self) -> Job:
        """Until the job has ended or waits; returns the row as it is then."""
        async with self._stack:
            while await self._turn():
                pass
        return self.job

    async def _turn(self) -> bool:
        """One step, or what an error leads to; False where there is nothing more to do now."""
        try:
            try:
                return await self._step()
            except jobs.Conflict:
                raise
            except Transient as exc:
                await self._give_back()
                return await self._try_again(exc)
            except (Permanent, Refused) as exc:
                await self._give_back()
                await self._stop_for(exc)
                return True
        except (jobs.Conflict, Interrupted):
            await self._give_back()
            self.stop.clear()
            return await self._ledger.reload()

    async def _step(self) -> bool:
        if self.job.deadline < self._shop.trust.build_time <= self._shop.clock.now():
            await self._set_deadline_anew()
        step = next_step(self.job, await self._facts())
        if step is None:
            return False
        if isinstance(step, Move):
            if step.to is State.READY:
                await self._check_bounds()
            elif step.to is State.STAGING:
                # the job may have waited for days: the configuration, and what is published, may be another since
                await self._check_published()
                await self._admit(self._release)
                await self._check_bounds()
                await self._prepare()
            await self._move(step)
        else:
            # in memory: the next commit brings the count to disk; a cut before it repeats an idempotent step
            self._ledger.job = replace(self.job, steps=self.job.steps + 1, waiting=None)
            await self._DOES[step](self)
        return True

    async def _set_deadline_anew(self) -> None:
        """The deadline was made by a clock that did not know the time; now it does."""
        deadline = self._shop.clock.now() + timedelta(seconds=self._shop.settings.deadline_s)
        await self._ledger.commit(replace(self.job, deadline=deadline), "clock was set")

    async def _give_back(self) -> None:
        """Nobody knows the state of the wire after an error or an interruption: what follows begins with a fresh session."""
        if self._lease is not None:
            self._lease.intact = False
        self._lease = self._view = None
        self._staged = False
        await self._stack.aclose()

    # -- facts

    @property
    def _device(self) -> Device:
        return self._unit.device

    @property
    def _release(self) -> VerifiedRelease:
        assert self.job.verified is not None, "queued is left only with a verified release"
        return VerifiedRelease.from_json(json.loads(self.job.verified))

    @property
    def _image_key(self) -> ImageKey:
        return ImageKey.of_release(self._release)

    async def _facts(self) -> Facts:
        job = self.job
        image = job.verified is not None and await self._is_sound(self._image_key)
        fallback = job.fallback is not None and await self._is_sound(ImageKey.of_fallback(job.fallback))
        settings = self._shop.settings
        return Facts(
            now=self._shop.clock.now(),
            image_on_disk=image,
            fallback_on_disk=fallback,
            device=self._view,
            staged=self._staged,
            bounds=Bounds(settings.max_steps, settings.max_trial_boots),
        )

    async def _is_sound(self, key: ImageKey) -> bool:
        """On disk and whole. Every byte is hashed once per run of the job; each chunk is checked again when it is read."""
        if key not in self._sound and await self._shop.images.verify(key):
            self._sound.add(key)
        return key in self._sound

    # -- changes of state

    async def _move(self, move: Move, *effects: Effect) -> None:
        job = replace(
            self.job,
            state=move.to,
            waiting=None,
            attempts=0,
            steps=self.job.steps + 1,
            reason=move.reason,
            detail=move.detail,
        )
        match move.to:
            case State.STAGING:
                # intent first: one slot is overwritten from here on, so nobody knows what it runs until that is proved
                job = replace(job, touched=True, done_bytes=0)
                if self._one_slot:
                    effects += (self._report(None, "job"),)
            case State.REVERTING:
                deadline = self._shop.clock.now() + timedelta(seconds=self._shop.settings.deadline_s)
                job = replace(job, deadline=deadline, done_bytes=0)
            case State.REVERTED:
                # what the way back moved is nothing of the release
                job = replace(job, done_bytes=0)
                if job.fallback is not None:
                    effects += (self._report(job.fallback.release, "fallback"),)
            case State.SUCCEEDED:
                # also where nothing was left to send
                job = replace(job, done_bytes=job.total_bytes)
            case State.FAILED if job.touched and not (self._view is not None and self._view.kept_old):
                effects += (self._report(None, "job"),)
        self._view = None if move.to is not State.STAGING else self._view
        await self._ledger.commit(job, move.event, *effects, detail=move.detail)

    @property
    def _one_slot(self) -> bool:
        return self._view is None or self._view.slot_count == 1

    def _report(self, release: str | None, source: str) -> Effect:
        value = firmware_value(release) if release else None
        device, component = self.job.device, self.job.component
        return lambda tx: twins.set_reported(tx, device, component, value, source)

    # -- what an error leads to

    async def _try_again(self, error: Transient) -> bool:
        job, settings = self.job, self._shop.settings
        policy = retry.RetryPolicy(
            settings.max_attempts, settings.first_backoff_s, settings.longest_backoff_s
        )
        row, now = self._ledger.row, self._shop.clock.now()
        waited = row.waiting.reason if row.waiting else None
        verdict = retry.decide(policy, job.attempts, error, now, progressed=self._progressed, waited=waited)
        self._progressed = False
        if isinstance(verdict, retry.Exhausted):
            text = f"{verdict.attempts} attempts; the last: {error}"
            await self._stop_for(Permanent(Reason.ATTEMPTS_EXHAUSTED, text))
            return True
        # who waits for the world does not use up the steps of the job: its deadline bounds it
        steps = row.steps if error.reason in retry.PATIENT else job.steps
        waiting = replace(job, attempts=verdict.attempts, waiting=verdict.waiting, steps=steps)
        await self._ledger.wait(waiting, error.detail)
        return False

    async def _stop_for(self, error: Permanent | Refused) -> None:
        """Before the first change an end; after it the way back; while reverting the end that says so."""
        job = self.job
        if error.reason is Reason.PLUGIN_FAILED:
            log.error("plugin failed", extra=log_fields(job, error.detail), exc_info=error)
        if job.state is State.REVERTING:
            text = f"{error}; the revert was for {job.reason}: {job.detail}"
            await self._move(Move(State.FAILED, "ended", Reason.REVERT_FAILED, text))
        elif job.touched:
            await self._move(Move(State.REVERTING, "revert", error.reason, error.detail))
        else:
            await self._move(Move(State.FAILED, "ended", error.reason, error.detail))

    # -- steps

    async def _resolve(self) -> None:
        release = await self._shop.trust.resolve(self.job.release)
        await self._admit(release)
        job = replace(
            self.job,
            state=State.FETCHING,
            verified=json.dumps(release.to_json(), sort_keys=True),
            total_bytes=release.image.length,
        )
        await self._ledger.commit(job, "admitted", detail=f"release counter {release.facts.release_counter}")

    async def _admit(self, release: VerifiedRelease) -> None:
        known = await running.known_of(self._shop.store, self._unit, self.job.component)
        admission.admit(release.facts, known)

    async def _check_published(self) -> None:
        """Raises ``Refused(RELEASE_UNKNOWN)`` where the release was withdrawn, or is another image by now.

        A node that has no metadata and reaches nobody goes on with what it verified.
        """
        try:
            now = await self._shop.trust.resolve(self.job.release)
        except Transient:
            return
        if now.image.sha256 != self._release.image.sha256:
            raise Refused(
                Reason.RELEASE_UNKNOWN,
                f"{self.job.release} was published with another image since this job began",
            )

    async def _fetch(self) -> None:
        await self._bring(self._release)

    async def _bring(self, release: VerifiedRelease) -> None:
        """Raises ``Interrupted`` where the row was changed meanwhile, and what a fetch raises."""
        await unless(self.stop, self._shop.images.fetch(release, self._tick_fetch))

    async def _check_bounds(self) -> None:
        async with self._shop.images.open(self._image_key) as image:
            admission.check_bounds(self._device, image.segments)

    def _mind_deadline(self) -> None:
        """A transfer that goes on for ever is interrupted, so that the next step is chosen anew."""
        if self._shop.clock.now() >= self.job.deadline:
            self.stop.set()

    def _tick_fetch(self, done_bytes: int, total_bytes: int) -> None:
        self._mind_deadline()
        self._send_progress("fetch", done_bytes, total_bytes, None)

    async def _ask_device(self) -> None:
        session, firmware = await self._firmware_session()
        self._active, view = await self._call(self._look, session, firmware)
        self._view = view
        if self.job.state is State.READY and view.slot_count == 1 and view.runs_new:
            await self._check_name()

    async def _check_name(self) -> None:
        """A version alone does not tell two firmwares apart that have the same: a device that tells no name may run the other.

        Raises ``Refused(UNSUPPORTED)`` where our record says so.
        """
        if self._active is None or self._active.runs_name is not None:
            return
        release = await running.recorded(self._shop.store, self._device.id, self.job.component)
        if release is not None and release.partition("@")[0] != self._release.facts.name:
            raise Refused(
                Reason.UNSUPPORTED,
                f"{self._device.id} runs {release} by our record and tells no name, so it cannot be told whether it runs "
                f"{self.job.release}; give that release another version",
            )

    async def _look(self, session: Session, firmware: SupportsFirmware) -> tuple[Slot | None, View]:
        slots = expect(Slots, await firmware.slots())
        active = slots.active
        return active, View(
            slot_count=expect(SessionTraits, session.traits).slot_count,
            runs_new=admission.runs(self._release.facts, active),
            confirmed=active.confirmed if active else True,
            pending=any(slot.pending for slot in slots.slots),
        )

    async def _call(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """A mapper's call that is no transfer."""
        return await plugin_call(self._shop.settings.call_s, call, *args, **kwargs)

    async def _firmware_session(self) -> tuple[Session, SupportsFirmware]:
        session = self._lease.session if self._lease else await self._find()
        if not isinstance(session, SupportsFirmware):
            raise Permanent(Reason.UNSUPPORTED, f"mapper {self._device.mapper} does not flash firmware")
        return session, session

    async def _find(self) -> Session:
        """:meth:`_connect`; who does not answer while it is between two images is absent: what it needs is on this node's disk,
        so it is waited for as long as the deadline lets it."""
        try:
            return await self._connect()
        except Transient as exc:
            if exc.reason is Reason.NO_RESPONSE and self.job.state in _BETWEEN_IMAGES:
                raise Transient(Reason.DEVICE_ABSENT, f"{SILENT}{exc.detail}") from exc
            raise

    async def _connect(self) -> Session:
        """Borrow the session for the rest of this run, and make sure who is there before anything is written."""
        lease = self._lease = await self._stack.enter_async_context(
            self._unit.lease(self._shop.settings.lease_s)
        )
        session = lease.session
        await self._check_identity(session)
        if self._model.health is not None and not isinstance(session, SupportsHealth):
            raise Permanent(Reason.UNSUPPORTED, f"mapper {self._device.mapper} has no health check")
        if expect(SessionTraits, session.traits).slot_count > 1 and not isinstance(session, SupportsTrial):
            raise Permanent(
                Reason.UNSUPPORTED, f"mapper {self._device.mapper} has two slots but cannot revert"
            )
        return session

    async def _check_identity(self, session: Session) -> None:
        """What may be one garbled answer is asked for once more: a refusal is for good, also between two images."""
        for last in (False, True):
            identity = expect(Identity, await self._call(session.identify))
            try:
                admission.check_identity(self._device, self._release.facts.hardware_ids, identity)
                return
            except Refused:
                if last:
                    raise

    async def _secure_fallback(self) -> None:
        """One slot: what runs now must be on this node's disk before the first erase."""
        session, _ = await self._firmware_session()
        left = await self._left_behind()
        if left is not None:
            text = f"{left.release or 'read-out'}, left by a job that could not go back"
            await self._ledger.commit(replace(self.job, fallback=left), "fallback secured", detail=text)
            return
        known = await self._to_be_had(self._recorded_release)
        if isinstance(session, SupportsReadBack) and self._device.flash_size_bytes is not None:
            await self._read_out(session, self._meter(session), known)
        elif known is not None:
            await self._commit_fallback(ImageKey.of_release(known), str(known.ref), "by record")
        elif (said := await self._to_be_had(self._told_release)) is not None:
            await self._commit_fallback(ImageKey.of_release(said), str(said.ref), "as the device says")
        elif self._model.policy.without_fallback:
            await self._go_without_fallback("allowed by policy")
        else:
            raise running.unknown(self._device, self._active)

    async def _left_behind(self) -> Fallback | None:
        left = await running.left_behind(self._shop.store, self.job.device, self.job.component)
        return left if left is not None and await self._is_sound(ImageKey.of_fallback(left)) else None

    async def _to_be_had(
        self, find: Callable[[], Awaitable[VerifiedRelease | None]]
    ) -> VerifiedRelease | None:
        """What ``find`` finds, when its image is on this node's disk; None where it cannot be had."""
        try:
            found = await find()
            if found is not None:
                await self._bring(found)
        except (Refused, Transient) as exc:
            log.info("fallback not to be had", extra=log_fields(self.job, str(exc)))
            return None
        return found

    async def _recorded_release(self) -> VerifiedRelease | None:
        """What our record says that the device runs, where the device does not deny it."""
        release = await running.recorded(self._shop.store, self._device.id, self.job.component)
        if release is None:
            return None
        known = await self._kept(release) or await self._shop.trust.known(release)
        return None if admission.runs(known.facts, self._active) is False else known

    async def _told_release(self) -> VerifiedRelease | None:
        shop = self._shop
        return await running.told(shop.store, shop.trust, self._unit, self.job.component, self._active)

    async def _kept(self, release: str) -> VerifiedRelease | None:
        """``release`` as the job that brought it verified it, where its files are here still: also one that was withdrawn
        since is a way back."""
        device = self.job.device
        found = await self._shop.store.read(
            lambda tx: jobs.find(tx, device=device, states=(State.SUCCEEDED,), limit=1)
        )
        if not found or found[0].release != release or found[0].verified is None:
            return None
        kept = VerifiedRelease.from_json(json.loads(found[0].verified))
        return kept if await self._is_sound(ImageKey.of_release(kept)) else None

    async def _read_out(self, session: SupportsReadBack, meter: Meter, known: VerifiedRelease | None) -> None:
        """The flash is the truth: it confirms our record, or is kept itself."""
        base, size = self._device.flash_base, self._device.flash_size_bytes
        assert size is not None
        flash = expect(bytes, await self._watched(meter, translated(session.read_flash, base, size, meter)))
        if len(flash) != size:
            raise Permanent(Reason.PLUGIN_FAILED, f"{len(flash)} bytes were read out, {size} were asked for")
        async with self._shop.images.open(self._image_key) as image:
            runs_already = await holds(flash, base, image)
            kept = worth_keeping(flash, base, image)
        if runs_already:
            await self._move(Move(State.VERIFYING, "runs already", None, "its flash holds the release"))
        elif known is not None and await self._is_held(flash, known):
            await self._commit_fallback(ImageKey.of_release(known), str(known.ref), "proved by read-back")
        elif is_blank(flash):
            await self._go_without_fallback("the device is blank")
        else:
            key = await self._shop.images.keep([(base, kept)], f"flash of {self._device.id}")
            await self._commit_fallback(key, None, f"{len(kept)} bytes read out")

    async def _is_held(self, flash: bytes, release: VerifiedRelease) -> bool:
        async with self._shop.images.open(ImageKey.of_release(release)) as image:
            return await holds(flash, self._device.flash_base, image)

    async def _go_without_fallback(self, why: str) -> None:
        await self._ledger.commit(replace(self.job, no_fallback=True), "no fallback", detail=why)

    async def _commit_fallback(self, key: ImageKey, release: str | None, detail: str) -> None:
        identifies_as = key.label.identifies_as if key.label else None
        fallback = Fallback(
            key.image_sha256, key.index_sha256, key.opaque, release, dict(key.params), identifies_as
        )
        text = f"{release or 'read-out'}, {detail}"
        await self._ledger.commit(replace(self.job, fallback=fallback), "fallback secured", detail=text)

    async def _fetch_fallback(self) -> None:
        """The recorded fallback was damaged on disk: only a release can be had again."""
        fallback = self.job.fallback
        assert fallback is not None
        if fallback.release is None:
            raise Permanent(Reason.NO_FALLBACK, "the flash that was read out is damaged on disk")
        await self._bring(await self._shop.trust.known(fallback.release))

    async def _prepare(self) -> None:
        """What the device has to agree to before it is committed that it is about to be changed."""
        session, _ = await self._firmware_session()
        if isinstance(session, SupportsPreparation):
            async with self._shop.images.open(self._image_key) as image:
                await self._watched(self._meter(session), translated(session.prepare, image))

    async def _stage(self) -> None:
        await self._send(self._image_key)
        self._staged = True
        if self.job.state is State.STAGING:
            await self._move(Move(State.ACTIVATING, "staged", detail=f"{self.job.total_bytes} bytes"))
        else:
            # staged again, for a boot: what the device says of it may be another by now
            self._view = None

    async def _send(self, key: ImageKey) -> None:
        """Stage the image ``key`` on the device, and account for what it moved, however it ends."""
        session, firmware = await self._firmware_session()
        try:
            async with self._shop.images.open(key) as image:
                meter = self._meter(session, image.size_bytes)
                try:
                    await self._watched(meter, translated(firmware.stage, image, meter))
                finally:
                    self._account(session, meter)
        except Refused as exc:
            if exc.reason not in _BAD_BYTES:
                raise
            # the disk failed, not the publisher: what was verified when it came is fetched again
            self._sound.discard(key)
            if self.job.fallback is None or self.job.fallback.release or key == self._image_key:
                await self._shop.images.discard(key)
            raise Transient(Reason.STORAGE_FAILED, f"the image on disk is damaged: {exc.detail}") from exc

    async def _activate(self) -> None:
        _, firmware = await self._firmware_session()
        booting = replace(self.job, trial_boots=self.job.trial_boots + 1)
        await self._ledger.commit(booting, "booting", detail=f"trial boot {booting.trial_boots}")
        try:
            await self._call(firmware.activate)
        except Permanent as error:
            if error.reason is not Reason.PLUGIN_FAILED:
                # the device did not boot it: that was no trial boot
                self._ledger.job = replace(self.job, trial_boots=self.job.trial_boots - 1)
            raise
        await self._move(Move(State.VERIFYING, "booted"))

    async def _check_health(self) -> None:
        session, _ = await self._firmware_session()
        release = self._release
        evidence = "no health check is configured"
        if self._model.health is not None:
            assert isinstance(session, SupportsHealth)
            check = self._model.health.check(release.facts.identifies_as)
            limit_s = check.timeout_s + self._shop.settings.call_s
            health = expect(Health, await plugin_call(limit_s, session.check_health, check))
            evidence = health.evidence
            if not health.healthy:
                raise Permanent(Reason.HEALTH_FAILED, f"expected {check.pattern!r}, saw {evidence!r}")
            if await self._left_it(session):
                return
        if isinstance(session, SupportsTrial):
            await self._call(session.confirm)
        await self._succeed(release, evidence)

    async def _left_it(self, session: Session) -> bool:
        """One slot, and a device that told what it runs: whether it tells otherwise by now. It went back by itself, and the
        next step says so."""
        if isinstance(session, SupportsTrial) or self._view is None or not self._view.runs_new:
            return False
        await self._ask_device()
        return self._view.runs_new is False

    async def _succeed(self, release: VerifiedRelease, evidence: str) -> None:
        device, component = self.job.device, self.job.component
        counter = release.facts.release_counter
        await self._move(
            Move(State.SUCCEEDED, "succeeded", detail=evidence),
            self._report(str(release.ref), "health" if self._model.health else "record"),
            lambda tx: floors.raise_to(tx, device, component, counter, str(release.ref)),
        )

    async def _revert(self) -> None:
        session, _ = await self._firmware_session()
        assert isinstance(session, SupportsTrial), "_connect has made sure"
        await self._call(session.revert)
        await self._ask_device()
        assert self._view is not None
        if self._view.runs_new or self._view.pending or not self._view.confirmed:
            raise Transient(
                Reason.DEVICE_ERROR, "the device did not leave the image that it was told to leave"
            )
        if self._view.runs_new is None:
            # it cannot tell: that its boot loader said yes is all that can be known
            await self._move(Move(State.REVERTED, "reverted", self.job.reason, self.job.detail))

    async def _stage_fallback(self) -> None:
        fallback = self.job.fallback
        assert fallback is not None
        _, firmware = await self._firmware_session()
        await self._send(ImageKey.of_fallback(fallback))
        await self._call(firmware.activate)
        await self._move(Move(State.REVERTED, "reverted", self.job.reason, self.job.detail))

    _DOES: ClassVar[dict[Do, Callable[[JobRunner], Awaitable[None]]]] = {
        Do.RESOLVE: _resolve,
        Do.FETCH: _fetch,
        Do.ASK_DEVICE: _ask_device,
        Do.SECURE_FALLBACK: _secure_fallback,
        Do.FETCH_FALLBACK: _fetch_fallback,
        Do.STAGE: _stage,
        Do.ACTIVATE: _activate,
        Do.CHECK_HEALTH: _check_health,
        Do.REVERT: _revert,
        Do.STAGE_FALLBACK: _stage_fallback,
    }

    # -- transfers

    def _meter(self, session: Session, image_bytes: int = 0) -> Meter:
        settings = self._shop.settings
        return Meter(
            self._shop.clock,
            max(settings.stall_s, session.traits.quiet_s),
            Checkpoints(settings.checkpoint_bytes, settings.checkpoint_s),
            image_bytes=image_bytes,
            observe_write=self._shop.observer.chunk_written,
        )

    async def _watched(self, meter: Meter, call: Coroutine[Any, Any, T]) -> T:
        """The result of ``call``. Raises ``Interrupted`` where the row was changed meanwhile."""
        return await meter.watch(call, checkpoint=self._checkpoint, tick=self._tick, stop=self.stop)

    async def _checkpoint(self, done_bytes: int) -> None:
        if done_bytes > self.job.done_bytes:
            self._progressed = True
            await self._ledger.checkpoint(done_bytes)

    def _tick(self, status: Status) -> None:
        self._mind_deadline()
        self._send_progress(status.phase.value, status.done_bytes, status.total_bytes, status.bytes_per_s)

    def _send_progress(self, phase: str, done: int, total: int, speed: float | None) -> None:
        self._shop.broadcast.send(
            {
                "kind": "progress",
                "job": self.job.id,
                "device": self.job.device,
                "state": self.job.state.value,
                "phase": phase,
                "done_bytes": done,
                "total_bytes": total,
                "bytes_per_s": speed,
            }
        )

    def _account(self, session: Session, meter: Meter) -> None:
        """What the transfer moved, for the metrics and for the count of attempts."""
        if meter.reached_bytes > self.job.done_bytes:
            self._progressed = True
            self._ledger.job = replace(self.job, done_bytes=meter.reached_bytes)
        observer, device = self._shop.observer, self.job.device
        observer.sent(device, meter.written_bytes)
        ceiling = session.traits.ceiling_bytes_per_s
        if meter.written_bytes and meter.write_seconds > 0 and ceiling > 0:
            observer.utilisation(device, meter.written_bytes / meter.write_seconds / ceiling)
