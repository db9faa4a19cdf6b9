"""Exit codes. The only place that maps errors to exit codes and shows the error of a command."""

from __future__ import annotations

from enum import IntEnum

from openagents_worker.cli.terminal import dump, err, joined, styled
from openagents_worker.errors import (
    ConfigError,
    OpenAgentsError,
    PluginError,
    RedisUnreachable,
    SubmitUnknown,
    UserError,
)
from openagents_worker.printable import one_line

__all__ = ["Exit", "exit_code_of", "show_error"]


class Exit(IntEnum):
    """The exit codes of all commands."""

    SUCCESS = 0
    USAGE = 1
    INVALID = 2
    RUN_FAILED = 3
    NO_REDIS = 4
    INTERRUPTED = 130


def exit_code_of(error: OpenAgentsError) -> Exit:
    """The exit code for this error."""
    match error:
        case RedisUnreachable() | SubmitUnknown():
            return Exit.NO_REDIS
        case ConfigError() | PluginError() | UserError():
            return Exit.INVALID
    return Exit.RUN_FAILED


def show_error(error: OpenAgentsError, *, as_json: bool) -> None:
    """Print code, message and hint, without a traceback: JSON to standard output, text to standard error.

    If Redis cannot be reached, the text is a single line.
    """
    if as_json:
        dump({"error": error.to_dict()})
        return
    name = styled(f"error: {error.code}: ", fg="red", bold=True)
    if exit_code_of(error) is Exit.NO_REDIS:
        err(
            joined(
                name,
                one_line(f"{error.message.rstrip(chr(46))}; {error.hint}" if error.hint else error.message),
            )
        )
    else:
        err(joined(name, str(error)))
