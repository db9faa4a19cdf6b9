"""Commands about runs: submit, follow, look at, list, cancel."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import click

from openagents_worker.cli.commands.options import as_json_option, labels_of, show_page
from openagents_worker.cli.display import Follower, dump, record_lines, run_line
from openagents_worker.cli.exits import Exit
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import RunHandle
from openagents_worker.store.scripts import CancelAnswer

__all__ = ["COMMANDS"]


@click.command("run")
@click.argument("agent")
@click.argument("text")
@click.option("--session", default=None, help="The conversation it belongs to; without one, a new one.")
@click.option("--detach", is_flag=True, help="Print the run's id and do not wait.")
@as_json_option
def run_(agent: str, text: str, session: str | None, detach: bool, as_json: bool) -> Exit:
    """Submit a run of AGENT with TEXT, show its events as they happen, then its answer."""
    with Client() as client:
        session_id = session or f"cli-{os.urandom(4).hex()}"
        handle = client.submit({"agent_id": agent, "session_id": session_id, "input_text": text})
        if not detach:
            return _follow(handle, as_json=as_json)
        if as_json:
            dump({"run_id": handle.id, "session_id": session_id})
        else:
            click.echo(handle.id)
        return Exit.SUCCESS


@click.command()
@click.argument("run_id", metavar="RUN")
@click.option("--after", default=0, help="Only events after this number.")
@as_json_option
def watch(run_id: str, after: int, as_json: bool) -> Exit:
    """Show the events of RUN from its start, then live until it is over, then its answer."""
    with Client() as client:
        return _follow(client.handle(run_id), as_json=as_json, after=after)


@click.command()
@click.argument("run_id", metavar="RUN")
@as_json_option
def show(run_id: str, as_json: bool) -> None:
    """Show where RUN stands: state, attempts, steps, tools, tokens, cost."""
    with Client() as client:
        record = client.record(run_id)
        if as_json:
            dump(record.model_dump(mode="json"))
            return
        events = client.handle(run_id).events() if record.state.is_terminal else ()
        click.echo("\n".join(record_lines(record, events)))


@click.command("runs")
@click.option(
    "--state", "states", multiple=True, type=click.Choice([*map(str, RunState)]), help="May be repeated."
)
@click.option("--agent", default=None)
@click.option("--session", default=None)
@click.option("--tenant", default=None)
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="May be repeated: all must fit.")
@click.option("--limit", default=20, show_default=True, help="Runs a page, 1000 at most.")
@click.option("--cursor", default=None, help="The next_cursor of the page before.")
@as_json_option
def runs_(
    states: tuple[str, ...],
    agent: str | None,
    session: str | None,
    tenant: str | None,
    labels: tuple[str, ...],
    limit: int,
    cursor: str | None,
    as_json: bool,
) -> None:
    """List runs, newest first."""
    with Client() as client:
        page = client.runs(
            state=states,
            agent_id=agent,
            session_id=session,
            tenant=tenant,
            labels=labels_of(labels),
            limit=limit,
            cursor=cursor,
        )
    show_page(page, lambda record: record.model_dump(mode="json"), run_line, as_json=as_json)


@click.command()
@click.argument("run_id", metavar="RUN")
@click.option("--reason", default=None, help="Stands in the run's last events.")
@as_json_option
def cancel(run_id: str, reason: str | None, as_json: bool) -> None:
    """Cancel RUN: at once when no worker carries it, else as soon as its worker hears of it."""
    with Client() as client:
        answer = client.cancel(run_id, reason)
    if as_json:
        dump({"run_id": run_id, "answer": answer})
    elif answer is CancelAnswer.ALREADY:
        click.echo(f"{run_id} is over already")
    else:
        click.echo(f"{run_id}: {answer.lower()}")


def _follow(handle: RunHandle[Any], *, as_json: bool, after: int = 0) -> Exit:
    follower = Follower(as_json=as_json)
    try:
        with contextlib.closing(handle.events(after)) as events:
            for event in events:
                follower.event(event)
        result = handle.wait()
    except KeyboardInterrupt:
        click.echo(f"\nthe run goes on: openagents-worker watch {handle.id}", err=True)
        return Exit.INTERRUPTED
    follower.result(result)
    return Exit.SUCCESS if result.ok else Exit.RUN_FAILED


COMMANDS = (run_, watch, show, runs_, cancel)
