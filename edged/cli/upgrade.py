"""``node status|upgrade|rollback|reboot``: the node's own package, through the privileged helper; for root.

Everything is imported before the first request: the files that this command was loaded from are replaced while it waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NoReturn

import click

from edged.cli.client import ApiError, Unreachable
from edged.cli.context import Context, command, echo, fail, json_option, show_json
from edged.domain import reasons
from edged.helper.client import HelperClient, HelperGone
from edged.helper.protocol import SOCKET, Why

Answer = dict[str, Any]

POLL_S = 2.0
MOST_POLLS = 900
MOST_JOBS = 1000
UNREACHABLE_CURE = (
    "run it as root (sudo); systemctl status edged-helper.socket says whether the helper is there"
)
DEVICE_CURE = "wait for the jobs (edged jobs), or say --now: they go on after the restart"
RECOVER_CURE = "systemctl start edged-recover"

helper_option = click.option(
    "--helper",
    "helper_path",
    type=click.Path(path_type=Path, dir_okay=False, readable=False),
    default=SOCKET,
    show_default=True,
    help="The helper's socket.",
)


@click.group()
def node() -> None:
    """Upgrade the node's own package, go back, restart the node. As root.

    \b
    Examples:
      sudo edged node status
      sudo edged node upgrade 1.2.0
    """


@node.command()
@helper_option
@json_option
@click.pass_obj
@command
def status(context: Context, helper_path: Path, as_json: bool) -> None:
    """Show the package, what it can go back to, and how its last upgrade ended.

    \b
    Example:
      sudo edged node status
    """
    found = _ask(HelperClient(helper_path).status(), as_json=as_json)
    _judge(found, as_json=as_json)
    if as_json:
        show_json(found)
        return
    echo(
        f"package   edged {found['version'] or '-'}, {'whole' if found['whole'] else found['dpkg'] or 'not installed'}"
    )
    echo(f"kept      {', '.join(found['kept']) or '-'}; before it ran {found['previous'] or '-'}")
    if found["operation"]:
        echo(f"at work   {named(found['operation'])}: {found['operation']['phase']}")
    elif found.get("at_work"):
        echo("at work   apt or dpkg, started by somebody else")
    if found["outcome"]:
        echo(f"last      {named(found['outcome'])}: {told(found['outcome'])} ({found['outcome']['ended']})")
    if found["recovered"]:
        echo(f"boot      {recovery(found['recovered'])}")
    if found["interrupted"]:
        echo(f"PROBLEM   an upgrade was cut; cure: {RECOVER_CURE}")


@node.command()
@click.argument("version")
@helper_option
@json_option
@click.pass_obj
@command
def upgrade(context: Context, version: str, helper_path: Path, as_json: bool) -> None:
    """Upgrade the package to VERSION, from the repositories that apt trusts; back to what runs now where that is not well.

    \b
    Example:
      sudo edged node upgrade 1.2.0
    """
    _follow(helper_path, {"verb": "upgrade", "version": version}, as_json=as_json)


@node.command()
@helper_option
@json_option
@click.pass_obj
@command
def rollback(context: Context, helper_path: Path, as_json: bool) -> None:
    """Go back to the version of the package that ran before.

    \b
    Example:
      sudo edged node rollback
    """
    _follow(helper_path, {"verb": "rollback"}, as_json=as_json)


@node.command()
@helper_option
@click.option("--now", is_flag=True, help="Also while a device is between two images.")
@json_option
@click.pass_obj
@command
def reboot(context: Context, helper_path: Path, now: bool, as_json: bool) -> None:
    """Restart the node; jobs go on afterwards.

    Refused while a job has changed its device and has not ended: that device may run nothing until the node is back.

    \b
    Examples:
      sudo edged node reboot
      sudo edged node reboot --now
    """
    if not now and (changing := _changing(context)):
        detail = f"{', '.join(changing)}: between two images"
        fail(reasons.EXIT_REFUSED, "refused", Why.BUSY.value, detail, DEVICE_CURE, as_json=as_json)
    found = _ask(HelperClient(helper_path).reboot(), as_json=as_json)
    _judge(found, as_json=as_json)
    if as_json:
        show_json(found)
    else:
        echo("The node restarts.")


def _changing(context: Context) -> list[str]:
    """Devices that a job has changed and not left well yet; none where the daemon does not tell, which a restart may cure."""
    try:
        active = context.client().get("jobs", state="active", limit=MOST_JOBS)["jobs"]
    except (ApiError, Unreachable):
        return []
    return sorted({job["device"] for job in active if job["touched"]})


def _follow(helper_path: Path, request: Answer, *, as_json: bool) -> None:
    outcome = _ask(_to_the_end(HelperClient(helper_path), request, quiet=as_json), as_json=as_json)
    _judge(outcome, as_json=as_json)
    if as_json:
        show_json(outcome)
    else:
        echo(outcome["detail"])


async def _to_the_end(client: HelperClient, request: Answer, *, quiet: bool) -> Answer:
    """The outcome, also where the helper goes away in the middle and another one goes on."""
    accepted = False
    try:
        async for answer in client.ask(request, timeout_s=None):
            if "result" in answer:
                return answer
            accepted = True
            if not quiet:
                echo(f"{answer.get('phase', answer.get('event'))} …", err=True)
    except HelperGone:
        if not accepted:
            raise
    async for found in _statuses(client):
        if found["operation"] is None and found["outcome"] is not None:
            outcome: Answer = found["outcome"]
            return outcome
    raise HelperGone("the helper does not say how the upgrade ended")


async def _statuses(client: HelperClient) -> AsyncIterator[Answer]:
    for _ in range(MOST_POLLS):
        await asyncio.sleep(POLL_S)
        try:
            found = await client.status()
        except HelperGone:
            continue
        if found.get("event") == "status":
            yield found


def _ask(question: Any, *, as_json: bool) -> Answer:
    try:
        found: Answer = asyncio.run(question)
    except HelperGone as exc:
        fail(reasons.EXIT_UNREACHABLE, "unreachable", None, str(exc), UNREACHABLE_CURE, as_json=as_json)
    return found


def _judge(answer: Answer, *, as_json: bool) -> None:
    """End the process where the helper said no."""
    if answer.get("result") in ("refused", "failed"):
        _give_up(answer, as_json=as_json)


def _give_up(answer: Answer, *, as_json: bool) -> NoReturn:
    code = reasons.EXIT_REFUSED if answer["result"] == "refused" else reasons.EXIT_FAILED
    fail(code, answer["result"], answer["reason"], answer["detail"], answer["cure"], as_json=as_json)


def named(one: Answer) -> str:
    """An upgrade by its verb and versions."""
    return f"{one['verb']} from {one['from_version'] or '-'} to {one['to_version'] or '-'}"


def told(outcome: Answer) -> str:
    """How it ended."""
    why = f" ({outcome['reason']})" if outcome["reason"] else ""
    return f"{outcome['result']}{why}, {outcome['detail']}"


def recovery(one: dict[str, str]) -> str:
    """What a boot found of an upgrade, and did with it."""
    return f"upgrade to {one['to'] or '-'} was cut: {one['result']} by {one['step']} ({one['time']})"
