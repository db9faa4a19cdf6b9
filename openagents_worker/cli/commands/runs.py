"""Commands about runs: submit, watch, show, list, cancel."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any, get_args

import click

from openagents_worker.cli.commands.options import (
    as_json_option,
    current_user,
    filter_options,
    parse_pairs,
    show_page,
    to_run_filters,
)
from openagents_worker.cli.completion import agent_ids, run_ids, session_ids
from openagents_worker.cli.display import Follower
from openagents_worker.cli.exits import Exit
from openagents_worker.cli.lists import run_table
from openagents_worker.cli.live_region import can_draw
from openagents_worker.cli.not_started import NotStarted
from openagents_worker.cli.show import call_lines, read_run_details
from openagents_worker.cli.terminal import dump, err, out
from openagents_worker.errors import RedisUnreachable, RequestInvalid
from openagents_worker.jsontext import loads
from openagents_worker.models import RunBudget, RunRequest
from openagents_worker.producer.call_names import find_call, short_call_id
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import RunHandle
from openagents_worker.producer.run_summary import CallSummary
from openagents_worker.producer.waiting_reason import read_workers_for
from openagents_worker.store.scripts import CancelAnswer

__all__ = ["COMMANDS"]


@click.command("run")
@click.argument("agent", shell_complete=agent_ids)
@click.argument("text", metavar="TEXT|-")
@click.option(
    "--session",
    default=None,
    shell_complete=session_ids,
    help="Session of the run. Default: a new session.",
)
@click.option("--run-id", default=None, help="Id of the run. The same id with the same request is one run.")
@click.option(
    "--label", "labels", multiple=True, metavar="NAME=VALUE", help="Label of the run. May be repeated."
)
@click.option("--tenant", default=None, help="Tenant of the run.")
@click.option("--deps", default=None, help="Name of the factory for context.deps.")
@click.option(
    "--budget",
    "budget",
    multiple=True,
    metavar="LIMIT=N",
    help=f"A limit: {', '.join(RunBudget.model_fields)}. May be repeated.",
)
@click.option(
    "--on-busy",
    type=click.Choice(get_args(RunRequest.model_fields["on_busy"].annotation)),
    default=None,
    help="What happens if the session has a live run: the run waits, is refused, or ends the other one, whose"
    " messages stay (interrupt) or go (rollback). Default: enqueue.",
)
@click.option("--queue", default=None, help="Queue of the run, instead of the queue of its agent.")
@click.option("--detach", is_flag=True, help="Print the id of the run and do not wait.")
@as_json_option
def run_(
    agent: str,
    text: str,
    session: str | None,
    run_id: str | None,
    labels: tuple[str, ...],
    tenant: str | None,
    deps: str | None,
    budget: tuple[str, ...],
    on_busy: str | None,
    queue: str | None,
    detach: bool,
    as_json: bool,
) -> Exit:
    """Submit a run, watch its events, print its answer.

    AGENT is the id of an agent. If TEXT is -, the text is read from standard input. The answer goes to
    standard output, everything else to standard error. Ctrl-C stops the watching, but not the run.

    \b
    openagents-worker run assistant "What is 17*23?"
    git diff | openagents-worker run reviewer - --session pr-17
    openagents-worker run assistant "Go." --budget max_cost_usd=0.5 --detach
    """
    session_id = session or f"cli-{os.urandom(4).hex()}"
    optional = {
        "run_id": run_id,
        "tenant": tenant,
        "deps": deps,
        "labels": parse_pairs(labels) or None,
        "on_busy": on_busy,
    }
    request: dict[str, Any] = {
        "agent_id": agent,
        "session_id": session_id,
        "input_text": _standard_input() if text == "-" else text,
        **{name: value for name, value in optional.items() if value is not None},
    }
    if budget:
        request["budget"] = parse_pairs(budget, "--budget", "LIMIT=N")
    with Client() as client:
        handle = client.submit(request, queue=queue)
        if not detach:
            return _follow(client, handle, as_json=as_json)
    if as_json:
        dump({"run_id": handle.id, "session_id": session_id})
    else:
        out(handle.id)
    return Exit.SUCCESS


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestInvalid(
            f"standard input is not text in {error.encoding}: {error.reason} at byte {error.start}",
            hint="convert it, for example with iconv",
        ) from None


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=run_ids)
@click.option("--after", default=0, help="Only events after this number.")
@as_json_option
def watch(run_id: str, after: int, as_json: bool) -> Exit:
    """Watch the events of a run until it ends.

    Prints the stored events, then the live events, then the answer. Ctrl-C stops the watching, but not the
    run.
    """
    with Client() as client:
        return _follow(client, client.handle(run_id), as_json=as_json, after=after)


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=run_ids)
@click.option(
    "--step", "step", metavar="STEP", help="Show one step completely. STEP is its id or the beginning of it."
)
@as_json_option
def show(run_id: str, step: str | None, as_json: bool) -> None:
    """Show the state and the history of a run.

    Shows state, why it waits and until when, input, times, attempts with their workers, steps, tokens, cost
    and error. A step is a recorded call of a model or a tool. `active` is the sum of the durations of all
    finished attempts. It does not include the time in which the run waited.

    \b
    openagents-worker show 2f9c1e
    openagents-worker show 2f9c1e --step weather:0a1b
    openagents-worker show 2f9c1e --json
    """
    with Client() as client:
        picture = read_run_details(client.store, run_id)
        if step is not None:
            call = _only_call(picture.summary.calls, step)
            values = [one.value for one in client.checkpoints(run_id) if one.call == call.call_id]
            _show_step(call, values[-1] if values else None, as_json=as_json)
            return
    if as_json:
        dump(picture.to_json())
        return
    for line in picture.lines():
        out(line)


def _only_call(calls: list[CallSummary], wanted: str) -> CallSummary:
    """The step that `wanted` identifies. Raises `click.BadParameter`, which lists the possible steps."""
    found = find_call((call.call_id for call in calls), wanted)
    if len(found) == 1:
        return next(call for call in calls if call.call_id == found[0])
    near = ", ".join(short_call_id(id_) for id_ in found[:10]) or "none"
    if found:
        raise click.BadParameter(
            f"{wanted!r} is the beginning of {len(found)} steps: {near}", param_hint="--step"
        )
    known = ", ".join(short_call_id(call.call_id) for call in calls[:10]) or "none"
    raise click.BadParameter(f"the run has no step {wanted!r}; its first steps: {known}", param_hint="--step")


def _show_step(call: CallSummary, value: Any, *, as_json: bool) -> None:
    if as_json:
        dump({**call.to_json(), "value": value})
        return
    for line in call_lines(call, value):
        out(line)


@click.command("runs")
@filter_options()
@click.option("--limit", default=20, show_default=True, help="Runs per page, at most 1000.")
@click.option("--cursor", default=None, help="The next_cursor of the previous page.")
@as_json_option
def runs_(limit: int, cursor: str | None, as_json: bool, **options: Any) -> None:
    """List runs, newest first.

    AGE is the time since the run was accepted. REASON is the code of the error with which it failed or for
    which it waits, what a parked run waits for, or that no worker serves a queued run.

    \b
    openagents-worker runs --state failed --since 1h
    openagents-worker runs --code 'llm.*' --agent assistant --json
    """
    with Client() as client:
        page = client.runs(limit=limit, cursor=cursor, **to_run_filters(options))
        workers = client.store.execute(read_workers_for(client.store.keys, page.items))
    now_ms = round(time.time() * 1000)
    show_page(
        page,
        lambda record: record.model_dump(mode="json"),
        lambda records: run_table(records, now_ms, workers),
        as_json=as_json,
    )


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=run_ids)
@click.option("--reason", default=None, help="Reason, for the last events of the run.")
@as_json_option
def cancel(run_id: str, reason: str | None, as_json: bool) -> None:
    """Cancel a run.

    A run that is not being executed ends at once. Otherwise its worker cancels the current call.
    """
    with Client() as client:
        answer = client.cancel(run_id, reason)
    if as_json:
        dump({"run_id": run_id, "answer": answer})
    elif answer is CancelAnswer.ALREADY:
        out(f"{run_id} has already ended")
    else:
        out(f"{run_id}: {answer.lower()}")


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=run_ids)
@click.argument("name")
@click.argument("value", metavar="[JSON]", required=False)
@click.option("--message-id", default=None, help="The same id counts once: for a command that is repeated.")
@as_json_option
def send(run_id: str, name: str, value: str | None, message_id: str | None, as_json: bool) -> None:
    """Send a value to a run.

    A pattern or a tool gets it from context.receive(NAME). The value is kept until then. A run that is parked
    because it waits for the value continues.

    \b
    openagents-worker send 2f9c1e paid '{"amount": 12}'
    openagents-worker send 2f9c1e stop
    """
    try:
        sent = loads(value) if value is not None else None
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(
            f"{value!r} is not JSON: {error}; a text needs quotes of its own: '\"text\"'", param_hint="JSON"
        ) from None
    with Client() as client:
        client.send(run_id, name, sent, message_id=message_id)
    if as_json:
        dump({"run_id": run_id, "name": name})
    else:
        out(f"{run_id}: {name} was sent")


def _follow(client: Client, handle: RunHandle[Any], *, as_json: bool, after: int = 0) -> Exit:
    follower = _follower(as_json=as_json)
    try:
        with (
            follower,
            contextlib.closing(handle.events(after)) as events,
            NotStarted(client, handle.id) as waiting,
        ):
            for event in events:
                follower.event(event)
                waiting.event_shown(event)
        result = handle.wait()
    except KeyboardInterrupt:
        err(f"\nthe run continues; to watch it: openagents-worker watch {handle.id}")
        return Exit.INTERRUPTED
    except RedisUnreachable as error:
        if error.retryable:
            err(f"the run continues when Redis is back; to watch it: openagents-worker watch {handle.id}")
        raise
    follower.result(result)
    return Exit.SUCCESS if result.ok else Exit.RUN_FAILED


def _follower(*, as_json: bool) -> Follower:
    """A tree that changes, where it can be drawn; otherwise lines."""
    if as_json or not can_draw():
        return Follower(as_json=as_json)
    from openagents_worker.cli.live_run import LiveFollower

    return LiveFollower()


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=run_ids)
@click.argument("text", metavar="TEXT")
@click.option("--by", default=None, help="Name for the event. Default: the user of the operating system.")
@click.option("--message-id", default=None, help="The same id counts once.")
@as_json_option
def steer(run_id: str, text: str, by: str | None, message_id: str | None, as_json: bool) -> None:
    """Put a user message into a run.

    The model sees it in its next call. Nothing is interrupted.

    \b
    openagents-worker steer 2f9c1e "Only the German ones, please."
    """
    with Client() as client:
        client.steer(run_id, text, by=by or current_user(), message_id=message_id)
    if as_json:
        dump({"run_id": run_id})
    else:
        out(f"{run_id}: sent")


@click.command()
@click.argument("run_id", metavar="RUN", shell_complete=run_ids)
@click.argument("limits", metavar="LIMIT=N...", nargs=-1, required=True)
@click.option("--by", default=None, help="Name for the event. Default: the user of the operating system.")
@as_json_option
def extend(run_id: str, limits: tuple[str, ...], by: str | None, as_json: bool) -> None:
    """Extend the budget of a run.

    A run that waits because its budget is used up continues. Limits: max_steps, max_tool_calls,
    max_cost_usd, max_total_tokens, max_duration_ms.

    \b
    openagents-worker extend 2f9c1e max_cost_usd=2 max_steps=40
    """
    with Client() as client:
        client.extend(run_id, parse_pairs(limits, "LIMIT=N", "LIMIT=N"), by=by or current_user())
    if as_json:
        dump({"run_id": run_id})
    else:
        out(f"{run_id}: extended")


COMMANDS = (run_, watch, show, runs_, cancel, send, steer, extend)
