"""Exit codes. The only place that says with which number a command ends, and how an error is shown."""

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

__all__ = ["Exit", "exit_of", "show_error"]


class Exit(IntEnum):
    SUCCESS = 0
    USAGE = 1
    INVALID = 2
    RUN_FAILED = 3
    NO_REDIS = 4
    INTERRUPTED = 130


def exit_of(error: OpenAgentsError) -> Exit:
    """Which exit code an error means."""
    match error:
        case RedisUnreachable() | SubmitUnknown():
            return Exit.NO_REDIS
        case ConfigError() | PluginError() | UserError():
            return Exit.INVALID
    return Exit.RUN_FAILED


def show_error(error: OpenAgentsError, *, as_json: bool) -> None:
    """Code, message, hint; no traceback. As JSON on standard output, for people on standard error.

    A Redis that cannot be reached is one line: nobody has to look for what is wrong in it.
    """
    if as_json:
        dump({"error": error.to_dict()})
        return
    name = styled(f"error: {error.code}: ", fg="red", bold=True)
    if exit_of(error) is Exit.NO_REDIS:
        err(
            joined(
                name,
                one_line(f"{error.message.rstrip(chr(46))}; {error.hint}" if error.hint else error.message),
            )
        )
    else:
        err(joined(name, str(error)))
