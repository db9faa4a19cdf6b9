"""Commands, one module for each subject. The only place that puts them together and runs one."""

from __future__ import annotations

import sys

import click

from openagents_worker.cli.commands import configuration, processes, runs, sessions
from openagents_worker.cli.exits import Exit, exit_of, show_error
from openagents_worker.errors import OpenAgentsError

__all__ = ["commands", "run"]


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


for module in (runs, sessions, processes, configuration):
    for command in module.COMMANDS:
        commands.add_command(command)
