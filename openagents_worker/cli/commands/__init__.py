"""The commands, one module for each subject. The only place that joins them and runs one."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from typing import Any

import click

from openagents_worker.cli.commands import (
    configuration,
    deciding,
    doctor,
    fleet,
    forking,
    mcp,
    probing,
    processes,
    resuming,
    runs,
    sessions,
)
from openagents_worker.cli.exits import Exit, exit_code_of, show_error
from openagents_worker.cli.streams import (
    OutputLost,
    discard_buffered_output,
    exit_when_reader_closes,
    repair_standard_streams,
)
from openagents_worker.cli.terminal import dump, err
from openagents_worker.errors import OpenAgentsError
from openagents_worker.tracebacks import traceback_text

__all__ = ["commands", "run"]

NO_ARGUMENTS: tuple[type[click.ClickException], ...] = tuple(
    filter(None, [getattr(click.exceptions, "NoArgsIsHelpError", None)])  # since click 8.2
)

SUBJECTS = (
    ("Runs", (*runs.COMMANDS, *resuming.COMMANDS, *deciding.COMMANDS, *forking.COMMANDS)),
    ("Sessions", (*sessions.COMMANDS, *forking.SESSION_COMMANDS)),
    ("The deployment", (*fleet.COMMANDS, *doctor.COMMANDS, *probing.COMMANDS)),
    ("Processes", (*processes.COMMANDS, *mcp.COMMANDS)),
    ("Configuration", configuration.COMMANDS),
)


def run() -> None:
    """Parse the arguments, run the command, and exit the process with its code."""
    repair_standard_streams()
    try:
        code = _run()
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    discard_buffered_output()
    sys.exit(code)


def _run() -> int:
    as_json = "--json" in sys.argv
    code: int
    try:
        return commands.main(standalone_mode=False) or Exit.SUCCESS
    except (click.Abort, KeyboardInterrupt):
        return Exit.INTERRUPTED
    except click.ClickException as error:
        code, show = Exit.USAGE, partial(_show_usage_error, error, as_json=as_json)
    except OpenAgentsError as error:
        code, show = exit_code_of(error), partial(show_error, error, as_json=as_json)
    except Exception as error:  # noqa: BLE001 - a bug; Python would print it without escapes and masks
        code, show = Exit.RUN_FAILED, partial(err, traceback_text(error, collapse=False))
    with suppress(BrokenPipeError, OutputLost):  # the reader has closed the stream
        show()
    return code


def _show_usage_error(error: click.ClickException, *, as_json: bool) -> None:
    """Print the usage of the command and the error: JSON to standard output, text to standard error."""
    if isinstance(error, NO_ARGUMENTS):
        err(error.format_message())
        return
    if isinstance(error, OutputLost):
        err(f"error: {error.format_message()}")
        return
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    if as_json:
        hint = None if ctx is None else f"{ctx.command_path} --help"
        wrong = {"code": "usage", "message": error.format_message(), "hint": hint, "retryable": False}
        dump({"error": wrong})
        return
    if ctx is not None:
        err(ctx.get_usage())
        err(f"Try '{ctx.command_path} --help' for help.\n")
    err(f"Error: {error.format_message()}")


class _BySubject(click.Group):
    """A group whose help lists its commands by subject."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse the arguments. click prints `--help` here, so errors of the streams are handled here, too."""
        with exit_when_reader_closes():
            try:
                return super().make_context(*args, **options)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise OutputLost(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and return its exit code."""
        with exit_when_reader_closes():
            return super().invoke(ctx)

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
    openagents-worker show RUN                             its steps, its state, why it waits
    openagents-worker status                               workers, queues, problems
    openagents-worker doctor                               what is wrong, and what to do

    Settings come from OPENAGENTS_ variables; config/.env.example explains them.
    All commands except worker take --json.
    Exit codes: 0 success, 1 usage, 2 invalid input, 3 the run failed, 4 no Redis, 130 interrupted.
    """


for _, found in SUBJECTS:
    for command in found:
        commands.add_command(command)
