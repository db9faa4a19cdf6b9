"""Commands. The only place that says which commands and options there are."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, TypeVar

import click

from openagents_worker.agents import AppConfig, load_agents, notices
from openagents_worker.cli.display import (
    Follower,
    dump,
    left_nothing_line,
    record_lines,
    run_line,
    session_line,
    session_lines,
)
from openagents_worker.cli.exits import Exit, exit_of, show_error
from openagents_worker.cli.stack import Stack
from openagents_worker.errors import ConfigError, ConfigValidationError, OpenAgentsError
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import RunHandle
from openagents_worker.settings import PREFIX, load_settings, unknown_variables
from openagents_worker.store.listing import Page
from openagents_worker.store.scripts import CancelAnswer

__all__ = ["commands", "run"]


T = TypeVar("T")

as_json_option = click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
COLOURS = ("cyan", "magenta", "green", "yellow", "blue")
DEV_MODEL = "openagents_worker.cli.dev_model:reply"
BROUGHT_BY = {"worker": ("greenlet", "httpx", "jsonschema"), "flower": ("flower",)}
"""What a command meets first where an extra of the package is not installed."""


def run() -> None:
    """Parse the arguments, run the command, exit with its code."""
    as_json = "--json" in sys.argv
    try:
        code = commands.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        code = Exit.INTERRUPTED
    except OpenAgentsError as error:
        show_error(error, as_json=as_json)
        code = exit_of(error)
    sys.exit(code or Exit.SUCCESS)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="openagents-worker")
def commands() -> None:
    """Durable runs of LLM agents on Celery and Redis.

    Settings come from OPENAGENTS_ variables; config/.env.example explains them.
    """


# --- runs ------------------------------------------------------------------------------------------------


@commands.command("run")
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


@commands.command()
@click.argument("run_id", metavar="RUN")
@click.option("--after", default=0, help="Only events after this number.")
@as_json_option
def watch(run_id: str, after: int, as_json: bool) -> Exit:
    """Show the events of RUN from its start, then live until it is over, then its answer."""
    with Client() as client:
        return _follow(client.handle(run_id), as_json=as_json, after=after)


@commands.command()
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


@commands.command("runs")
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
            labels=_labels(labels),
            limit=limit,
            cursor=cursor,
        )
    _show_page(page, lambda record: record.model_dump(mode="json"), run_line, as_json=as_json)


def _labels(given: tuple[str, ...]) -> dict[str, str]:
    labels = {}
    for text in given:
        name, found, value = text.partition("=")
        if not found:
            raise click.BadParameter(f"{text!r} is no NAME=VALUE", param_hint="--label")
        labels[name] = value
    return labels


def _show_page(
    page: Page[T], to_json: Callable[[T], Any], to_line: Callable[[T], str], *, as_json: bool
) -> None:
    if as_json:
        dump({"items": [to_json(item) for item in page], "next_cursor": page.next_cursor})
        return
    for item in page:
        click.echo(to_line(item))
    if page.next_cursor is not None:
        click.echo(click.style(f"more: --cursor {page.next_cursor}", dim=True), err=True)


@commands.command()
@click.option("--limit", default=20, show_default=True, help="Sessions a page, 1000 at most.")
@click.option("--cursor", default=None, help="The next_cursor of the page before.")
@as_json_option
def sessions(limit: int, cursor: str | None, as_json: bool) -> None:
    """List sessions, the one with the newest run first."""
    with Client() as client:
        page = client.sessions(limit=limit, cursor=cursor)
    _show_page(page, asdict, session_line, as_json=as_json)


@commands.command()
@click.argument("session_id", metavar="SESSION")
@as_json_option
def session(session_id: str, as_json: bool) -> None:
    """Show SESSION: who works in it, who waits, its transcript, its artifacts and its state, and which of its
    newest 100 runs have ended and left nothing in the transcript."""
    with Client() as client:
        view = client.session(session_id)
        runs = client.runs(session_id=session_id).items
    said = {message.get("run_id") for message in view.transcript}
    left_nothing = [run for run in runs if run.state.is_terminal and run.run_id not in said]
    if as_json:
        dump(
            {
                **asdict(view),
                "artifacts": [one.model_dump(mode="json") for one in view.artifacts],
                "left_nothing": [run.run_id for run in left_nothing],
            }
        )
    else:
        click.echo("\n".join([*session_lines(view), *map(left_nothing_line, left_nothing)]))


@commands.command()
@as_json_option
def prune(as_json: bool) -> None:
    """Take runs and sessions that have expired out of the lists. Workers do it every minute."""
    with Client() as client:
        removed = client.prune()
    if as_json:
        dump({"removed": removed})
    else:
        click.echo(f"{removed} entries of what has expired are gone")


@commands.command()
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


def _need(*extras: str) -> None:
    missing = [extra for extra in extras if any(find_spec(module) is None for module in BROUGHT_BY[extra])]
    if missing:
        raise ConfigError(
            "this command needs what the base install, which is for producers, leaves out",
            hint=f"pip install 'openagents-worker[{','.join(missing)}]'",
        )


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


# --- processes -------------------------------------------------------------------------------------------


@commands.command()
@click.option("--name", default="worker", show_default=True, help="First part of the worker's name.")
@click.option("--concurrency", type=click.IntRange(min=1), default=None, help="Runs at once.")
@click.option("--queues", default="", help="Queues by commas, instead of OPENAGENTS_QUEUE.")
def worker(name: str, concurrency: int | None, queues: str) -> None:
    """Run a worker until it is told to stop (SIGTERM, Ctrl-C)."""
    _need("worker")
    from openagents_worker.worker.app import run_worker

    names = [queue.strip() for queue in queues.split(",") if queue.strip()]
    run_worker(load_settings(), name=name, concurrency=concurrency, queues=names)


@commands.command(hidden=True)
@click.option("--port", type=int, default=5555, show_default=True)
def flower(port: int) -> None:
    """Run Flower on this machine's loopback."""
    _need("worker", "flower")
    from openagents_worker.worker.app import run_flower

    run_flower(load_settings(), port=port)


@commands.command()
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=50, show_default=True, help="Runs at once."
)
@click.option("--flower-port", type=int, default=0, help="Flower's port; 0: a free one.")
@click.option("--data-dir", type=click.Path(path_type=Path), default=None, help="Where Redis keeps its data.")
@as_json_option
def dev(concurrency: int, flower_port: int, data_dir: Path | None, as_json: bool) -> Exit:
    """Redis, a worker and Flower on this machine, until Ctrl-C. Uses OPENAGENTS_REDIS_URL where that is set.

    Without OPENAI_API_KEY and OPENAI_BASE_URL a scripted model answers.
    """
    _need("worker", "flower")
    signal.signal(signal.SIGTERM, _end)
    say = _say_nothing if as_json else _prefixed()
    given = os.environ.get(f"{PREFIX}REDIS_URL") or None
    try:
        with Stack(redis_url=given, data_dir=data_dir, say=say) as stack:
            model_url = _start_model(stack)
            stack.start_worker("dev", concurrency=concurrency)
            flower_url = stack.start_flower(flower_port)
            _announce(stack, flower_url, model_url, as_json=as_json)
            ended = stack.wait()
            click.echo(f"{ended.name} has ended with code {ended.exit_code}", err=True)
            return Exit.RUN_FAILED
    except KeyboardInterrupt:
        return Exit.SUCCESS


def _start_model(stack: Stack) -> str | None:
    """A scripted model where the environment names none."""
    if os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"):
        return None
    url = stack.start_model_server(DEV_MODEL)
    stack.set_env(OPENAI_BASE_URL=url, OPENAI_API_KEY="no-key-needed")
    return url


def _announce(stack: Stack, flower_url: str, model_url: str | None, *, as_json: bool) -> None:
    if as_json:
        dump({"redis_url": stack.settings.redis_url_safe, "flower_url": flower_url, "model_url": model_url})
        return
    if model_url is not None:
        click.echo(f"model   {model_url}  (a script: set OPENAI_API_KEY or OPENAI_BASE_URL for a real one)")
    click.echo(f"redis   {stack.settings.redis_url_safe}")
    click.echo(f"flower  {flower_url}")
    click.echo("\nIn another terminal:")
    click.echo(f"  export {PREFIX}REDIS_URL={stack.settings.redis_url_safe}")
    click.echo('  openagents-worker run assistant "What is 17*23?"\n\nCtrl-C ends it all.')


def _end(signal_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _say_nothing(name: str, line: str) -> None:
    """JSON mode: standard output is for one object."""


def _prefixed() -> Callable[[str, str], None]:
    colours, of = cycle(COLOURS), dict[str, str]()

    def say(name: str, line: str) -> None:
        colour = of.setdefault(name, next(colours))
        click.echo(f"{click.style(f'{name:<7}', fg=colour)} {line}", err=True)

    return say


# --- configuration ---------------------------------------------------------------------------------------


@commands.command()
@click.argument("file", required=False)
@as_json_option
def validate(file: str | None, as_json: bool) -> None:
    """Check the agents file (FILE, else OPENAGENTS_CONFIG), its plugins and the environment's settings."""
    _need("worker")
    from openagents_worker.runtime.assembly import Assembly

    if unknown := unknown_variables(os.environ):
        raise ConfigValidationError(
            "; ".join(f"{name}: no such setting" for name, _ in unknown),
            hint="; ".join(f"did you mean {meant}?" for _, meant in unknown if meant) or None,
        )
    settings = load_settings()
    settings = settings if file is None else settings.model_copy(update={"config": file})
    config = load_agents(settings.config)
    Assembly.from_settings(settings)
    agents, remarks = [agent.id for agent in config.agents], notices(config)
    if as_json:
        dump({"file": settings.config, "agents": agents, "notices": remarks})
        return
    click.echo(f"{settings.config}: valid; agents: {', '.join(agents)}")
    for remark in remarks:
        click.echo(f"note: {remark}", err=True)


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="The same: a schema is JSON.")
def schema(as_json: bool) -> None:
    """Print the JSON Schema of the agents file."""
    click.echo(json.dumps(AppConfig.model_json_schema(), indent=None if as_json else 2, ensure_ascii=False))
