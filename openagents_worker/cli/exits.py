"""Exit codes. The only place that says with which number a command ends, and how an error is shown."""

from __future__ import annotations

import json
from enum import IntEnum

import click

from openagents_worker.errors import (
    ConfigError,
    OpenAgentsError,
    PluginError,
    RedisUnreachable,
    SubmitUnknown,
    UserError,
)

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
    """Code, message, hint; no traceback. As JSON on standard output, for people on standard error."""
    if as_json:
        click.echo(json.dumps({"error": error.to_dict()}, ensure_ascii=False))
        return
    click.echo(click.style(f"error: {error.code}", fg="red", bold=True) + f"\n{error}", err=True)
