"""Commands that run processes on this machine: a worker, Flower, the development stack."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import click

from openagents_worker.agents.current_folder import import_from_here
from openagents_worker.cli.commands.options import as_json_option, need
from openagents_worker.cli.exits import Exit
from openagents_worker.cli.stack import Stack
from openagents_worker.cli.terminal import dump, err, joined, out, styled
from openagents_worker.settings import PREFIX, load_settings

__all__ = ["COMMANDS"]

COLOURS = ("cyan", "magenta", "green", "yellow", "blue")
DEV_MODEL = "openagents_worker.cli.dev_model:reply"


@click.command()
@click.option("--name", default="worker", show_default=True, help="First part of the worker's name.")
@click.option("--concurrency", type=click.IntRange(min=1), default=None, help="Runs at the same time.")
@click.option("--queues", default="", help="Queues, separated by commas, instead of OPENAGENTS_QUEUE.")
def worker(name: str, concurrency: int | None, queues: str) -> None:
    """Run a worker until SIGTERM or Ctrl-C.

    \b
    openagents-worker worker
    openagents-worker worker --queues agents,reports --concurrency 100
    """
    need("worker")
    from openagents_worker.worker.app import run_worker

    import_from_here(first=True)
    names = [queue.strip() for queue in queues.split(",") if queue.strip()]
    run_worker(load_settings(), name=name, concurrency=concurrency, queues=names)


@click.command(hidden=True)
@click.option("--port", type=int, default=5555, show_default=True)
def flower(port: int) -> None:
    """Run Flower on this machine's loopback."""
    need("worker", "flower")
    from openagents_worker.dashboard.sockets import read_sockets_as_celery_does
    from openagents_worker.worker.app import run_flower

    read_sockets_as_celery_does()
    run_flower(load_settings(), port=port)


@click.command()
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=50, show_default=True, help="Runs at the same time."
)
@click.option("--flower-port", type=int, default=0, help="Port of Flower. 0: a free port.")
@click.option("--data-dir", type=click.Path(path_type=Path), default=None, help="Where Redis keeps its data.")
@as_json_option
def dev(concurrency: int, flower_port: int, data_dir: Path | None, as_json: bool) -> Exit:
    """Run Redis, a worker and Flower here, until Ctrl-C.

    Uses OPENAGENTS_REDIS_URL if it is set.

    Without OPENAI_API_KEY and OPENAI_BASE_URL, a scripted model answers.
    """
    need("worker", "flower")
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
            err(f"{ended.name} has ended with code {ended.exit_code}")
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
        out(f"model   {model_url}  (a script: set OPENAI_API_KEY or OPENAI_BASE_URL for a real one)")
    out(f"redis   {stack.settings.redis_url_safe}")
    out(f"flower  {flower_url}")
    out("\nIn another terminal:")
    out(f"  export {PREFIX}REDIS_URL={stack.settings.redis_url_safe}")
    out('  openagents-worker run assistant "What is 17*23?"\n\nCtrl-C ends it all.')


def _end(signal_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _say_nothing(name: str, line: str) -> None:
    """JSON mode: standard output is for one object."""


def _prefixed() -> Callable[[str, str], None]:
    colours, of = cycle(COLOURS), dict[str, str]()

    def say(name: str, line: str) -> None:
        colour = of.setdefault(name, next(colours))
        err(joined(styled(f"{name:<7}", fg=colour), " ", line))

    return say


COMMANDS = (dev, worker, flower)
