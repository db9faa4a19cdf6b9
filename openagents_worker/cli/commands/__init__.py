"""Commands, one module for each subject. The only place that puts them together and runs one."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from openagents_worker.cli.commands import configuration, fleet, processes, resuming, runs, sessions
from openagents_worker.cli.exits import Exit, exit_of, show_error
from openagents_worker.cli.terminal import err
from openagents_worker.errors import OpenAgentsError
from openagents_worker.tracebacks import traceback_text

__all__ = ["commands", "run"]

SUBJECTS = (
    ("Runs", (*runs.COMMANDS, *resuming.COMMANDS)),
    ("Sessions", sessions.COMMANDS),
    ("The deployment", fleet.COMMANDS),
    ("Processes", processes.COMMANDS),
    ("Configuration", configuration.COMMANDS),
)


def run() -> None:
    """Parse the arguments, run the command, exit with its code."""
    as_json = "--json" in sys.argv
    try:
        code = commands.main(standalone_mode=False)
    except click.ClickException as error:
        _show_usage_error(error)
        code = Exit.USAGE
    except (click.Abort, KeyboardInterrupt):
        code = Exit.INTERRUPTED
    except OpenAgentsError as error:
        show_error(error, as_json=as_json)
        code = exit_of(error)
    except Exception as error:  # noqa: BLE001 - a bug; Python would print texts that nobody has looked at
        err(traceback_text(error, collapse=False))
        code = Exit.USAGE
    sys.exit(code or Exit.SUCCESS)


def _show_usage_error(error: click.ClickException) -> None:
    """Which command, how it is used, and what was wrong."""
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    if ctx is not None:
        err(ctx.get_usage())
        err(f"Try '{ctx.command_path} --help' for help.\n")
    err(f"Error: {error.format_message()}")


class _BySubject(click.Group):
    """A group whose help lists its commands by subject."""

    def invoke(self, ctx: click.Context) -> Any:
        """The command's exit code. A reader that has had enough, as `head` has, is no failure."""
        try:
            code = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return Exit.SUCCESS
        return code

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for subject, found in SUBJECTS:
            shown = [command for command in found if not command.hidden]
            width = formatter.width - 6 - max(len(command.name or "") for command in shown)
            with formatter.section(subject):
                formatter.write_dl([(c.name or "", c.get_short_help_str(width)) for c in shown])


@click.group(cls=_BySubject, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="openagents-worker")
def commands() -> None:
    """Durable runs of LLM agents on Celery and Redis.

    \b
    openagents-worker dev                                  try it: Redis, a worker, Flower
    openagents-worker run assistant "What is 17*23?"       submit a run and watch it
    openagents-worker show RUN                             what it did, and why it waits
    openagents-worker status                               workers, queues, problems

    Settings come from OPENAGENTS_ variables; config/.env.example explains them. Every command takes --json.
    Exit codes: 0 success, 1 usage, 2 not valid, 3 the run failed, 4 no Redis, 130 interrupted.
    """


for _, found in SUBJECTS:
    for command in found:
        commands.add_command(command)
