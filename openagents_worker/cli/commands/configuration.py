"""Commands about the configuration: the agents file, its schema, the environment."""

from __future__ import annotations

import json
import os
import shlex
from functools import partial
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from openagents_worker.agents.current_folder import import_from_here
from openagents_worker.cli.commands.options import as_json_option, require_extras
from openagents_worker.cli.completion import COMPLETE_VARIABLE
from openagents_worker.cli.project_files import write_project
from openagents_worker.cli.terminal import dump, err, out
from openagents_worker.settings import Settings, load_settings

__all__ = ["COMMANDS", "prepared"]

PROGRAM = "openagents-worker"


@click.command()
@click.argument("file", required=False)
@click.option("-A", "--app", default=None, help="A Celery app with runs, as for celery: shop.celery:app.")
@as_json_option
def validate(file: str | None, app: str | None, as_json: bool) -> None:
    """Check the agents file and the settings.

    Checks FILE (default: OPENAGENTS_CONFIG) with its plugins, and the OPENAGENTS_ variables.

    Plugins are imported as the worker imports them: also from the current directory, and after the modules of
    the Celery app (-A) and the setup of Django.
    """
    require_extras("worker")
    from openagents_worker.cli.validation import validated
    from openagents_worker.runtime.start_checks import remarks

    path, config = validated(file, env=os.environ, prepare=partial(prepared, app))
    agents, found = [agent.id for agent in config.agents], remarks(config)
    if as_json:
        dump({"file": path, "agents": agents, "notices": found})
        return
    out(f"{path}: valid; agents: {', '.join(agents)}")
    for remark in found:
        err(f"note: {remark}")


def prepared(app: str | None) -> Settings:
    """The settings of the worker. Also imports the modules that a worker imports before its plugins."""
    from openagents_worker.celery.app_loading import load_app, prepare_as_worker, settings_of

    import_from_here(first=True)
    if app is not None:
        return settings_of(load_app(app), app)
    settings = load_settings()
    prepare_as_worker(settings)
    return settings


@click.command()
@click.option("--json", "as_json", is_flag=True, help="No effect: a schema is JSON.")
def schema(as_json: bool) -> None:
    """Print the JSON Schema of the agents file.

    It includes the options of the built-in plugins.
    """
    require_extras("worker")
    from openagents_worker.runtime.schema import agents_file_schema

    out(json.dumps(agents_file_schema(), indent=None if as_json else 2, ensure_ascii=False))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option("--json", "as_json", is_flag=True, help="The script as a JSON string.")
def completion(shell: str, as_json: bool) -> None:
    """Print a script that completes commands, options and ids in a shell.

    \b
    eval "$(openagents-worker completion bash)"             in ~/.bashrc
    eval "$(openagents-worker completion zsh)"              in ~/.zshrc
    openagents-worker completion fish | source              in config.fish

    Ids of runs, sessions and agents are read from Redis when Tab is pressed.
    """
    made = get_completion_class(shell)
    assert made is not None, "click knows each of these shells"
    root = click.get_current_context().find_root()
    script = made(root.command, {}, PROGRAM, COMPLETE_VARIABLE).source()
    if as_json:
        dump(script)
    else:
        out(script)


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@as_json_option
def init(folder: Path, as_json: bool) -> None:
    """Write a project with an agent, a tool, a test and a Celery app.

    DIR is created if it does not exist. No file is replaced. The project works with two commands of its own:
    `make dev` and `make test`.
    """
    written = write_project(folder)
    if as_json:
        dump({"folder": str(folder), "files": [str(path) for path in written]})
        return
    for path in written:
        out(str(path))
    err(f"\nnow: cd {shlex.quote(str(folder))} && make dev")


COMMANDS = (init, validate, schema, completion)
