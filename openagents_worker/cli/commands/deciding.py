"""Commands with which a person decides about a call of a run."""

from __future__ import annotations

from typing import Any

import click

from openagents_worker.cli.commands.options import as_json_option, current_user, show_page
from openagents_worker.cli.completion import agent_ids, run_ids, session_ids
from openagents_worker.cli.lists import approval_table
from openagents_worker.cli.terminal import dump, out
from openagents_worker.errors import RequestInvalid
from openagents_worker.jsontext import loads
from openagents_worker.models import Decision
from openagents_worker.producer.client import Client
from openagents_worker.producer.deciding import RESOLVE_ACTIONS, ResolveAction

__all__ = ["COMMANDS"]

_by_option = click.option(
    "--by", default=None, help="Who decides. Default: the user of the operating system."
)
_note_option = click.option(
    "--note", default=None, help="A note for the events of the run and, of a denial, for the model."
)


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=run_ids)
@click.argument("call_id", metavar="CALL")
@click.argument("action", type=click.Choice(RESOLVE_ACTIONS))
@click.option(
    "--result", default=None, metavar="JSON", help="The result of the call, for skip. Default: null."
)
@_note_option
@_by_option
@as_json_option
def resolve(
    run_id: str,
    call_id: str,
    action: ResolveAction,
    result: str | None,
    note: str | None,
    by: str | None,
    as_json: bool,
) -> None:
    """Decide what becomes of a call whose outcome is unknown.

    The worker of the run died while it made the call, so the effect may have happened. Check the system
    behind the tool first. CALL is the id of the call, or the beginning of it. rerun makes the call again,
    with the same idempotency key. skip continues with a result. fail ends the run as failed.

    \b
    openagents-worker resolve 2f9c1e pay:0a1b rerun
    openagents-worker resolve 2f9c1e pay:0a1b skip --result '{"receipt": 17}'
    """
    with Client() as client:
        decision = client.resolve(
            run_id, call_id, action, by=_decider(by), note=note, result=_parse_json("--result", result)
        )
    _show_decision(run_id, decision, as_json=as_json)


@click.command("approvals")
@click.option("--agent", default=None, shell_complete=agent_ids, help="Id of the agent.")
@click.option("--session", default=None, shell_complete=session_ids, help="Id of the session.")
@click.option("--tenant", default=None, help="Tenant of the run.")
@click.option("--limit", default=100, show_default=True, help="Runs per page, at most 1000.")
@click.option("--cursor", default=None, help="The next_cursor of the previous page.")
@as_json_option
def approvals_(
    agent: str | None, session: str | None, tenant: str | None, limit: int, cursor: str | None, as_json: bool
) -> None:
    """List the calls that wait for an approval.

    EXPIRES is the time at which the default action decides. Secrets in the arguments are masked.
    """
    with Client() as client:
        page = client.approvals(agent_id=agent, session_id=session, tenant=tenant, limit=limit, cursor=cursor)
    show_page(page, lambda one: one.model_dump(mode="json"), approval_table, as_json=as_json)


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=run_ids)
@click.argument("call_id", metavar="CALL")
@click.option(
    "--arguments",
    default=None,
    metavar="JSON",
    help="An object that replaces all arguments of the model.",
)
@_note_option
@_by_option
@as_json_option
def approve(
    run_id: str, call_id: str, arguments: str | None, note: str | None, by: str | None, as_json: bool
) -> None:
    """Approve a call that waits for it.

    CALL is the id of the call, or the beginning of it.

    \b
    openagents-worker approve 2f9c1e refund:0a1b
    openagents-worker approve 2f9c1e refund:0a1b --arguments '{"cents": 500}' --note "half of it"
    """
    with Client() as client:
        given = _parse_json("--arguments", arguments)
        decision = client.approve(run_id, call_id, by=_decider(by), arguments=given, note=note)
    _show_decision(run_id, decision, as_json=as_json)


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=run_ids)
@click.argument("call_id", metavar="CALL")
@_note_option
@_by_option
@as_json_option
def deny(run_id: str, call_id: str, note: str | None, by: str | None, as_json: bool) -> None:
    """Deny a call that waits for an approval.

    The model gets the denial and the note as the result of the call. CALL is its id, or the beginning of
    it.
    """
    with Client() as client:
        decision = client.deny(run_id, call_id, by=_decider(by), note=note)
    _show_decision(run_id, decision, as_json=as_json)


def _decider(by: str | None) -> str:
    name = by or current_user()
    if not name:
        raise click.BadParameter("the user of the operating system has no name", param_hint="--by")
    return name


def _parse_json(option: str, text: str | None) -> Any:
    """The value of an option that is JSON. Raises `RequestInvalid`."""
    try:
        return None if text is None else loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestInvalid(f"{option} is not JSON: {error}", hint="text needs quotes: '\"text\"'") from None


def _show_decision(run_id: str, decision: Decision, *, as_json: bool) -> None:
    if as_json:
        dump({"run_id": run_id, **decision.model_dump(mode="json")})
    else:
        out(f"{run_id}: {decision.call_id}: {decision.action}, decided by {decision.by}")


COMMANDS = (approvals_, approve, deny, resolve)
