"""Commands that run processes on this machine: a worker, Flower, the development stack."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path

import click

from openagents_worker.agents.current_folder import import_from_here
from openagents_worker.cli.commands.options import as_json_option, require_extras
from openagents_worker.cli.exits import Exit
from openagents_worker.cli.terminal import dump, err, joined, out, styled
from openagents_worker.errors import ConfigError, OpenAgentsError, RedisUnreachable
from openagents_worker.local.changes import can_watch, changed_files
from openagents_worker.local.child_process import ChildProcess, free_port, port_or_free
from openagents_worker.local.stack import Stack
from openagents_worker.producer.client import cell_of
from openagents_worker.settings import PREFIX, Settings, load_settings
from openagents_worker.store.client import Store
from openagents_worker.store.fleet import read_fleet

__all__ = ["COMMANDS", "start_lines"]

COLOURS = ("cyan", "magenta", "green", "yellow", "blue")
DEV_MODEL = "openagents_worker.cli.dev_model:reply"
DEV_AGENTS = Path(__file__).parents[1] / "dev_agents.json"
DEFAULT_REDIS_PORT = 6379
DEFAULT_FLOWER_PORT = 5555
MAX_NAMES = 3  # of changed files in one line
DEFAULT_AGENTS_FILE = Settings.model_fields["config"].default


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
    require_extras("worker")
    from openagents_worker.worker.interpreter import loading_for_life

    with loading_for_life():
        from openagents_worker.celery.app import run_worker

    import_from_here(first=True)
    names = [queue.strip() for queue in queues.split(",") if queue.strip()]
    run_worker(load_settings(), name=name, concurrency=concurrency, queues=names)


@click.command(hidden=True)
@click.option("--port", type=int, default=5555, show_default=True)
def flower(port: int) -> None:
    """Run Flower on the loopback interface of this machine."""
    require_extras("worker", "flower")
    from openagents_worker.celery.app import run_flower

    run_flower(load_settings(), port=port)


@click.command()
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=50,
    envvar=f"{PREFIX}CONCURRENCY",
    help=f"Runs at the same time. Default: {PREFIX}CONCURRENCY, or 50.",
)
@click.option(
    "--redis-port",
    type=click.IntRange(0, 65535),
    default=None,
    help="Port of the embedded Redis. 0: any free one. Default: 6379, or a free one if that is in use.",
)
@click.option(
    "--flower-port",
    type=click.IntRange(0, 65535),
    default=None,
    help="Port of Flower. 0: any free one. Default: 5555, or a free one if that is in use.",
)
@click.option("--data-dir", type=click.Path(path_type=Path), default=None, help="Where Redis keeps its data.")
@click.option(
    "--model",
    "script",
    default=None,
    metavar="FILE|MODULE:FUNCTION",
    help="The scripted model: a JSON file with its replies, or a function. Default: it does arithmetic.",
)
@click.option("--reload/--no-reload", default=True, help="Restart the worker when files change.")
@as_json_option
def dev(
    concurrency: int,
    redis_port: int | None,
    flower_port: int | None,
    data_dir: Path | None,
    script: str | None,
    reload: bool,
    as_json: bool,
) -> Exit:
    """Run Redis, a worker and Flower on this machine until Ctrl-C.

    Uses OPENAGENTS_REDIS_URL if it is set.

    Without OPENAI_API_KEY and OPENAI_BASE_URL, a scripted model answers. Without an agents file and
    OPENAGENTS_IMPORTS, an example file with one agent, `assistant`, is used.

    When the agents file or a source file below the current folder changes, a new worker replaces the old one,
    and runs continue in it. If the new worker does not start, the old one continues. The error is printed.
    """
    require_extras("worker", "flower")
    redis_url = os.environ.get(f"{PREFIX}REDIS_URL") or None
    if redis_url is not None and (data_dir is not None or redis_port):
        option = "--data-dir" if data_dir is not None else "--redis-port"
        text = f"{PREFIX}REDIS_URL is set, so dev starts no Redis: unset it, or leave {option} out"
        raise click.UsageError(text)
    if script is not None and _names_a_model():
        text = f"{_model_variable()} is set, so dev starts no scripted model: unset it, or leave --model out"
        raise click.UsageError(text)
    signal.signal(signal.SIGTERM, _interrupt)
    print_line = None if as_json else _line_printer()
    redis_port = port_or_free(DEFAULT_REDIS_PORT) if redis_port is None else redis_port or free_port()
    flower_port = port_or_free(DEFAULT_FLOWER_PORT) if flower_port is None else flower_port
    try:
        with Stack(redis_url=redis_url, data_dir=data_dir, redis_port=redis_port, say=print_line) as stack:
            model_url = _start_model(stack, script or DEV_MODEL)
            is_example = _use_example_agents(stack)
            worker = stack.start_worker("dev", concurrency=concurrency)
            flower_url = stack.start_flower(flower_port)
            keeps_data = stack.redis is None or data_dir is not None
            if as_json:
                url = stack.settings.redis_url_safe
                dump({"redis_url": url, "flower_url": flower_url, "model_url": model_url})
            else:
                for line in start_lines(
                    stack, flower_url, model_url, is_example=is_example, keeps_data=keeps_data
                ):
                    out(line)
            if reload and not can_watch():
                err("files are not watched: pip install 'openagents-worker[embedded]'")
            if reload and can_watch():
                ended = _replace_on_changes(stack, worker, concurrency)
            else:
                ended = stack.wait()
            for line in _end_lines(stack, ended, keeps_data=keeps_data):
                err(line)
            return Exit.RUN_FAILED
    except RedisUnreachable as error:
        if redis_url is not None:
            error.hint = f"start that Redis; or unset {PREFIX}REDIS_URL, and dev starts one"
        raise
    except KeyboardInterrupt:
        return Exit.SUCCESS


def _replace_on_changes(stack: Stack, worker: ChildProcess, concurrency: int) -> ChildProcess:
    """Start the worker anew with each change of a file, until a child process ends. Returns that child."""
    try:
        for changed in changed_files(Path.cwd(), Path(stack.settings.config)):
            if (ended := stack.ended()) is not None:
                return ended
            if changed:
                err(styled(f"{_names_of(changed)} changed: a new worker starts", bold=True))
                worker = _replaced(stack, worker, concurrency)
    except ConfigError as error:
        err(styled(f"{error}; changes of files start no new worker", fg="red"))
        return stack.wait()
    raise KeyboardInterrupt


def _replaced(stack: Stack, worker: ChildProcess, concurrency: int) -> ChildProcess:
    """A new worker in the place of this one, or this one if the new one does not start."""
    try:
        return stack.replace_worker(worker, concurrency=concurrency)
    except OpenAgentsError as error:
        err(styled(f"{error}; the worker with the code of before goes on", fg="red"))
        return worker


def _names_of(paths: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in paths[:MAX_NAMES])
    return f"{names} and {len(paths) - MAX_NAMES} more" if len(paths) > MAX_NAMES else names


def _start_model(stack: Stack, script: str) -> str | None:
    """Start a scripted model unless the environment names a model. Return its URL, or None."""
    if _names_a_model():
        return None
    url = stack.start_model_server(script)
    stack.set_env(OPENAI_BASE_URL=url, OPENAI_API_KEY="no-key-needed")
    return url


def _use_example_agents(stack: Stack) -> bool:
    """Use the example if there are no other agents: neither a file, nor modules that may define agents.

    Returns whether the example is used.
    """
    settings = stack.settings
    if os.environ.get(f"{PREFIX}CONFIG") or settings.imports or Path(settings.config).exists():
        return False
    stack.set_env(OPENAGENTS_CONFIG=str(DEV_AGENTS))
    return True


def start_lines(
    stack: Stack, flower_url: str, model_url: str | None, *, is_example: bool, keeps_data: bool
) -> Iterator[str]:
    """What runs where, and what to type in another terminal."""
    if model_url is not None:
        yield f"model   {model_url}  (a script: set OPENAI_API_KEY or OPENAI_BASE_URL for a real one)"
    else:
        yield f"model   a real one, which may cost money: {_model_variable()} is set"
    if is_example:
        yield f"agents  {DEV_AGENTS}  (an example: write {DEFAULT_AGENTS_FILE}, or set {PREFIX}CONFIG)"
    note = "" if keeps_data else "  (its data is deleted at the end; --data-dir DIR keeps it)"
    yield f"redis   {stack.settings.redis_url_safe}{note}"
    yield f"flower  {flower_url}"
    yield "\nIn another terminal:"
    url, shown = stack.settings.redis_url, stack.settings.redis_url_safe
    if url != shown:
        yield f"  export {PREFIX}REDIS_URL=…  # as in this terminal: it has a password"
    elif url != Settings.model_fields["redis_url"].default:
        yield f"  export {PREFIX}REDIS_URL={shown}"
    agent = _agent_to_try(stack.settings)
    if agent is not None:
        yield f'  {_own_command()} run {shlex.quote(agent)} "What is 17*23?"'
    yield "\nCtrl-C stops all of them."


def _end_lines(stack: Stack, ended: ChildProcess, *, keeps_data: bool) -> Iterator[str]:
    """Which child process ended by itself, and what becomes of the runs."""
    if stack.redis is not None and ended is stack.redis.process:
        yield from ended.lines  # those of the others were printed as they came
    yield f"the {ended.kind} {ended.name} exited with code {ended.exit_code}, so dev ends"
    if keeps_data:
        yield "start dev again: the runs continue"
    else:
        yield "the runs end with the data of Redis: --data-dir DIR keeps them for the next start"


def _names_a_model() -> bool:
    """Whether the environment names a model, which may cost money."""
    return bool(os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL"))


def _model_variable() -> str:
    return "OPENAI_API_KEY" if os.environ.get("OPENAI_API_KEY") else "OPENAI_BASE_URL"


def _own_command() -> str:
    """This command as it can be typed in another terminal, where a virtual environment may not be active."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m openagents_worker.cli"
    found = shutil.which(called.name)
    is_found = found is not None and Path(found).absolute() == called.absolute()
    return called.name if is_found else shlex.quote(str(called))


def _agent_to_try(settings: Settings) -> str | None:
    """An agent that the worker serves, or None."""
    with contextlib.closing(Store(cell_of(settings), max_connections=1)) as store:
        fleet = store.execute(read_fleet(store.keys, settings.queue))
    return min((agent.id for agent in fleet.agents if agent.workers), default=None)


def _interrupt(signal_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _line_printer() -> Callable[[str, str], None]:
    """A function that prints a line with the name of its process, in a colour for each process."""
    colours, colour_of = cycle(COLOURS), dict[str, str]()

    def print_line(name: str, line: str) -> None:
        colour = colour_of.setdefault(name, next(colours))
        err(joined(styled(f"{name:<7}", fg=colour), " ", line))

    return print_line


COMMANDS = (dev, worker, flower)
