"""``deploy``, ``plan``, ``jobs``, ``job show|watch|cancel|retry``."""

from __future__ import annotations

import math
import sys
from typing import Any

import click

from edged.cli.context import (
    Context,
    command,
    echo,
    job_exit_code,
    json_option,
    show_json,
    show_table,
    size_text,
    text,
)
from edged.cli.watch import watch_jobs
from edged.domain import reasons

_TO = click.option("--to", "devices", multiple=True, metavar="DEVICE", help="A device; repeatable.")
_MODEL = click.option("--model", help="All devices of this model.")


@click.command()
@click.argument("release", metavar="NAME@VERSION")
@_TO
@_MODEL
@click.option("--wait", is_flag=True, help="Watch until all jobs have ended; the exit code says how.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
@command
def deploy(
    context: Context,
    release: str,
    devices: tuple[str, ...],
    model: str | None,
    wait: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Make devices run a release. At a terminal it shows the plan and asks first.

    All or nothing: where trust or policy refuses one of the devices, none is told.

    \b
    Examples:
      edged deploy blink@1.2 --to plc-1 --wait
      edged deploy blink@1.2 --model uno --yes --json
    """
    wish = _wish(release, devices, model)
    client = context.client()
    if not yes and not as_json and sys.stdin.isatty():
        found = client.post("plans", body=wish)
        _show_plan(found)
        if _refuses(found):
            echo("Nothing is deployed.", err=True)
            raise SystemExit(reasons.EXIT_REFUSED)
        click.confirm("Deploy?", abort=True)
    answer = client.post("deployments", body=wish)
    if not wait:
        _show_deployment(answer, as_json=as_json)
        return
    if not as_json:
        _show_deployment(answer, as_json=False)
    # a job that is yet to be made, after one that is not ended, has no id
    wanted = {item["device"]: item["job"] for item in answer["devices"] if item["outcome"] != "up_to_date"}
    ended = watch_jobs(client, wanted, answer["events_after"], quiet=as_json)
    if as_json:
        show_json(answer | {"jobs": ended})
    raise SystemExit(max((_code(job) for job in ended), default=reasons.EXIT_DONE))


@click.command()
@click.argument("release", metavar="NAME@VERSION")
@_TO
@_MODEL
@json_option
@click.pass_obj
@command
def plan(context: Context, release: str, devices: tuple[str, ...], model: str | None, as_json: bool) -> None:
    """Show what `deploy` would do; change nothing. Exit code 3 where a device would be refused, also by its job at once.

    \b
    Examples:
      edged plan blink@1.2 --to plc-1
      edged plan blink@1.2 --model uno --json
    """
    found = context.client().post("plans", body=_wish(release, devices, model))
    if as_json:
        show_json(found)
    else:
        _show_plan(found)
    if _refuses(found):
        raise SystemExit(reasons.EXIT_REFUSED)


def _wish(release: str, devices: tuple[str, ...], model: str | None) -> dict[str, Any]:
    """The body of a wish. Raises ``click.UsageError``."""
    if bool(devices) == bool(model):
        raise click.UsageError("name devices with --to, or a model with --model")
    return {"release": release, "model": model} if model else {"release": release, "devices": list(devices)}


def _refuses(plan: dict[str, Any]) -> bool:
    return any(item["refused"] for item in plan["devices"])


def _show_plan(found: dict[str, Any]) -> None:
    head = f"{found['release']}"
    if found["image_bytes"] is not None:
        fetch = "nothing" if found["fetch_bytes"] == 0 else size_text(found["fetch_bytes"])
        head += (
            f": {size_text(found['image_bytes'])}, counter {found['release_counter']}, to download: {fetch}"
        )
    if found["offline"]:
        head += f": cannot be checked now: {found['offline']['detail']}"
    echo(head)
    rows = [
        [
            item["device"],
            text(item["runs"]),
            item["action"].replace("_", " "),
            _time_text(item),
            item["unit_state"],
        ]
        for item in found["devices"]
    ]
    show_table(rows, ["DEVICE", "RUNS", "ACTION", "AT LEAST", "STATE"])
    for item in found["devices"]:
        if item["refused"]:
            cure = f"; cure: {item['refused']['cure']}" if item["refused"]["cure"] else ""
            echo(
                f"{item['device']}: refused ({item['refused']['reason']}): {item['refused']['detail']}{cure}"
            )


def _time_text(item: dict[str, Any]) -> str:
    """What the line alone takes, for a person: to read out what runs now where it must be kept, and to write."""
    minutes = item["estimated_minutes"]
    if minutes is None or item["action"] in ("nothing", "refuse"):
        return "-"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{math.ceil(60 * minutes)} s"


def _show_deployment(answer: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        show_json(answer)
        return
    if answer["offline"]:
        echo(f"Not checked yet, the repository does not answer: {answer['offline']['detail']}")
    for item in answer["devices"]:
        words = {
            "created": f"job {item['job']}",
            "retried": f"job {item['job']} (another run)",
            "under_way": f"job {item['job']} is under way already",
            "after_active": f"follows job {item.get('after')}, which ends first",
            "up_to_date": f"runs {answer['release']} already",
        }
        echo(f"{item['device']}: {words[item['outcome']]}")


@click.command()
@click.option("--device", help="Only of this device.")
@click.option("--state", help="Only in this state; also `active` and `ended`.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@json_option
@click.pass_obj
@command
def jobs(context: Context, device: str | None, state: str | None, limit: int, as_json: bool) -> None:
    """List jobs, newest first.

    \b
    Examples:
      edged jobs --state active
      edged jobs --device plc-1 --json
    """
    found = context.client().get("jobs", device=device, state=state, limit=limit)
    if as_json:
        show_json(found)
        return
    rows = [
        [job["id"], job["device"], job["release"], job["state"], _progress(job), _why(job), job["updated"]]
        for job in found["jobs"]
    ]
    show_table(rows, ["JOB", "DEVICE", "RELEASE", "STATE", "DONE", "WHY", "UPDATED"])
    if not rows:
        echo("No jobs.")


def _progress(job: dict[str, Any]) -> str:
    """How much of the release the device holds, where that can be said: not on the way back, nor after it."""
    if job["state"] == "succeeded":
        return "100 %"
    if job["state"] not in ("staging", "activating", "verifying") or not job["total_bytes"]:
        return "-"
    return f"{100 * job['done_bytes'] // job['total_bytes']} %"


def _why(job: dict[str, Any]) -> str:
    return f"waits: {job['waiting']['reason']}" if job["waiting"] else text(job["reason"])


@click.group()
def job() -> None:
    """Look at a job, watch it, cancel it, run it again.

    \b
    Examples:
      edged job show 01JD8Z...
      edged job watch 01JD8Z...
    """


@job.command()
@click.argument("job_id", metavar="JOB")
@json_option
@click.pass_obj
@command
def show(context: Context, job_id: str, as_json: bool) -> None:
    """Show a job and its history.

    \b
    Example:
      edged job show 01JD8Z... --json | jq .history
    """
    found = context.client().get("jobs", job_id)
    if as_json:
        show_json(found)
        return
    _show_job(found)
    for entry in found["history"]:
        why = f"{entry['reason']}: " if entry["reason"] else ""
        echo(f"  {entry['time']}  {entry['to']:<10}  {entry['event']}  {why}{entry['detail']}".rstrip())


@job.command()
@click.argument("job_id", metavar="JOB")
@json_option
@click.pass_obj
@command
def watch(context: Context, job_id: str, as_json: bool) -> None:
    """Watch a job until it has ended; the exit code says how. With --json, one event a line.

    \b
    Examples:
      edged job watch 01JD8Z...
      edged job watch 01JD8Z... --json
    """
    client = context.client()
    found = client.get("jobs", job_id)
    ended = watch_jobs(client, {found["device"]: job_id}, found["events_after"], as_lines=as_json)
    raise SystemExit(_code(ended[0]))


@job.command()
@click.argument("job_id", metavar="JOB")
@json_option
@click.pass_obj
@command
def cancel(context: Context, job_id: str, as_json: bool) -> None:
    """Ask a job to end. A device that was changed already goes back first.

    \b
    Example:
      edged job cancel 01JD8Z...
    """
    found = context.client().post("jobs", job_id, "cancel")
    show_json(found) if as_json else echo(f"Job {job_id} is asked to end; it is {found['state']} now.")


@job.command()
@click.argument("job_id", metavar="JOB")
@json_option
@click.pass_obj
@command
def retry(context: Context, job_id: str, as_json: bool) -> None:
    """Run an ended job again, as a new one.

    \b
    Example:
      edged job retry 01JD8Z...
    """
    found = context.client().post("jobs", job_id, "retry")
    show_json(found) if as_json else echo(
        f"Job {found['id']} is made; watch it: edged job watch {found['id']}"
    )


def _show_job(job: dict[str, Any]) -> None:
    echo(
        f"{job['id']}: {job['release']} on {job['device']}: {job['state']}, {_progress(job)}, run {job['run']}"
    )
    if job["waiting"]:
        echo(f"waits until {job['waiting']['until']}: {job['waiting']['reason']}: {job['detail']}")
    elif job["reason"]:
        echo(f"{job['reason']}: {job['detail']}")
    if job["cure"]:
        echo(f"cure: {job['cure']}")


def _code(job: dict[str, Any]) -> int:
    if job["state"] == "succeeded":
        return reasons.EXIT_DONE
    return max(job_exit_code(job["reason"]), reasons.EXIT_FAILED)
