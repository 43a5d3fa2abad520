"""Watching jobs until they have ended: a bar for each at a terminal, plain lines elsewhere.

Goes on where it was when the daemon was restarted meanwhile: durable events have numbers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from edged.cli.client import ApiError, Client, Unreachable
from edged.cli.context import echo, printable, size_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Job = dict[str, Any]

RECONNECT_S = 60.0
"""How long a daemon may be away, for a restart or a reboot, before watching ends with ``Unreachable``."""
LINE_S = 5.0
_ENDED = ("succeeded", "failed", "cancelled", "reverted")


class View(Protocol):
    """Where events are shown."""

    def job(self, job: Job) -> None:
        """The job has changed."""
        ...

    def event(self, event: dict[str, Any]) -> None:
        """Something happened: a durable event (``seq``) or progress."""
        ...


def watch_jobs(
    client: Client, wanted: dict[str, str | None], after: int, *, quiet: bool = False, as_lines: bool = False
) -> list[Job]:
    """Watch one job of each device until all have ended; returns them as they are then.

    ``wanted`` has the job's id by device, None where the job is not made yet: the next that is made counts. ``after``
    is the number of the event to begin after. Raises :class:`Unreachable` and :class:`ApiError`.
    """
    with _view(quiet=quiet, as_lines=as_lines) as view:
        watching = _Watching(client, dict(wanted), view)
        watching.look()
        while not watching.done:
            after = _listen(client, watching, after)
    return watching.ended


class _Watching:
    """The jobs that are watched, and which have ended."""

    def __init__(self, client: Client, wanted: dict[str, str | None], view: View) -> None:
        self._client = client
        self._wanted = wanted
        self._view = view
        self._ended: dict[str, Job] = {}

    @property
    def query(self) -> dict[str, str]:
        """What restricts the events, where one device is watched."""
        return {"device": next(iter(self._wanted))} if len(self._wanted) == 1 else {}

    @property
    def done(self) -> bool:
        return len(self._ended) == len(self._wanted)

    @property
    def ended(self) -> list[Job]:
        return [self._ended[device] for device in self._wanted]

    def look(self) -> None:
        """Ask for every job anew: what happened while nobody listened."""
        for device, job_id in self._wanted.items():
            if job_id is not None and device not in self._ended:
                self._refresh(device, job_id)

    def see(self, event: dict[str, Any]) -> None:
        device, job_id = event.get("device"), event.get("job")
        if device not in self._wanted or job_id is None:
            return
        if self._wanted[device] is None and event.get("state") == "queued":
            self._wanted[device] = job_id
        if self._wanted[device] != job_id:
            return
        self._view.event(event)
        if event.get("kind") == "job":
            self._refresh(device, job_id)

    def _refresh(self, device: str, job_id: str) -> None:
        job = self._client.get("jobs", job_id)
        self._view.job(job)
        if job["state"] in _ENDED:
            self._ended[device] = job


def _listen(client: Client, watching: _Watching, after: int) -> int:
    """Follow the events until all jobs have ended, or the connection has; returns the number of the last event."""
    try:
        for event in client.events(after, **watching.query):
            if event is not None:
                after = event.get("seq", after)
                watching.see(event)
            if watching.done:
                return after
    except Unreachable:
        pass
    return _reconnected(client, watching, after)


def _reconnected(client: Client, watching: _Watching, after: int) -> int:
    deadline = time.monotonic() + RECONNECT_S
    while True:
        try:
            watching.look()
            return after
        except Unreachable:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.5)
        except ApiError as exc:
            if exc.code != "unavailable" or time.monotonic() >= deadline:
                raise
            time.sleep(0.5)


def _view(*, quiet: bool, as_lines: bool) -> AbstractContextManager[View]:
    if quiet:
        return nullcontext(_Silence())
    if as_lines:
        return nullcontext(_JsonLines())
    return _bars() if sys.stdout.isatty() else nullcontext(_Lines())


class _Silence:
    def job(self, job: Job) -> None:
        pass

    def event(self, event: dict[str, Any]) -> None:
        pass


class _JsonLines:
    """Every event as it came."""

    def job(self, job: Job) -> None:
        if job["state"] in _ENDED:
            echo(json.dumps({"kind": "ended", **job}))

    def event(self, event: dict[str, Any]) -> None:
        echo(json.dumps(event))


class _Lines:
    """A line for each change, and for progress now and then."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}
        self._at: dict[str, float] = {}

    def job(self, job: Job) -> None:
        line = describe(job)
        if self._said.get(job["id"]) != line:
            self._said[job["id"]] = line
            echo(line)

    def event(self, event: dict[str, Any]) -> None:
        if event.get("kind") != "progress" or not event["total_bytes"]:
            return
        now = time.monotonic()
        if now - self._at.get(event["job"], 0.0) >= LINE_S:
            self._at[event["job"]] = now
            echo(f"{event['device']}: {progress_text(event)}")


def describe(job: Job) -> str:
    """One line: where the job stands, why, and the cure."""
    line = f"{job['device']}: {job['state']}"
    if job["waiting"]:
        line += f", waits: {job['waiting']['reason']}: {job['detail']}"
    elif job["reason"]:
        line += f": {job['reason']}: {job['detail']}"
    elif job["state"] == "succeeded":
        line += f": runs {job['release']} ({job['detail']})" if job["detail"] else f": runs {job['release']}"
    return line + (f"; cure: {job['cure']}" if job["cure"] and (job["waiting"] or job["reason"]) else "")


def progress_text(event: dict[str, Any]) -> str:
    """``write 45 %, 11.0 KiB/s, 12 s left``."""
    done, total, speed = event["done_bytes"], event["total_bytes"], event["bytes_per_s"]
    words = [f"{event['phase']} {100 * done // total} %"]
    if speed:
        words += [f"{size_text(speed)}/s", f"{(total - done) / speed:.0f} s left"]
    return ", ".join(words)


@contextmanager
def _bars() -> Iterator[View]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns) as progress:
        yield _Bars(progress)


class _Bars:
    """A bar for each job; what it says at the end stays on the screen."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, str] = {}

    def _task(self, job_id: str, device: str) -> TaskID:
        if job_id not in self._tasks:
            self._tasks[job_id] = self._progress.add_task(device, total=None, speed="", left="")
        return self._tasks[job_id]

    def job(self, job: Job) -> None:
        task, line = self._task(job["id"], job["device"]), describe(job)
        self._progress.update(task, description=f"{job['device']} {job['state']}", speed="", left="")
        if (job["waiting"] or job["state"] in _ENDED) and self._said.get(job["id"]) != line:
            self._said[job["id"]] = line
            self._progress.console.print(printable(line), markup=False, highlight=False)
        if job["state"] in _ENDED:
            self._progress.remove_task(task)

    def event(self, event: dict[str, Any]) -> None:
        if event.get("kind") != "progress":
            return
        done, total, speed = event["done_bytes"], event["total_bytes"], event["bytes_per_s"]
        self._progress.update(
            self._task(event["job"], event["device"]),
            description=f"{event['device']} {event['phase']}",
            completed=done,
            total=total or None,
            speed=f"{size_text(speed)}/s" if speed else "",
            left=f"{(total - done) / speed:.0f} s left" if speed else "",
        )
