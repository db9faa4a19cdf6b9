"""Environment variables: `get_env`, `set_env`, and the only place that decides which ones a run may see.

A worker process serves many runs, and its environment contains secrets. So a run sees only harmless variables
of the worker, and those that the agents file names. What a run sets is stored in the state of its session: no
other session sees it, and it is the same on every worker.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pydantic import Field

from openagents_worker.errors import PermanentToolError, ToolValidationError
from openagents_worker.secret_names import is_secrets_name
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec
from openagents_worker.tools.typed import READS_ONLY, TypedTool

__all__ = ["GetEnv", "SetEnv", "may_read", "name_problem", "own_variables"]

STATE_KEY = "tool_environment"
"""The key of a session's state under which the variables are stored that its runs have set: name to value."""

HARMLESS = [
    "HOME",
    "HOSTNAME",
    "LANG",
    "LANGUAGE",
    "LC_*",
    "PATH",
    "PWD",
    "SHELL",
    "TERM",
    "TMPDIR",
    "TZ",
    "USER",
]
MAX_NAME_CHARS = 256
MAX_VALUE_CHARS = 32_768
MAX_VARIABLES = 100
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def may_read(name: str, allowed: Sequence[str]) -> bool:
    """Whether a variable may be read. A glob never covers a name such as `API_KEY`; the name itself does.

    >>> may_read("APP_MODE", ["APP_*"]), may_read("APP_TOKEN", ["APP_*"])
    (True, False)
    >>> may_read("APP_TOKEN", ["APP_TOKEN"])
    True
    """
    if name in allowed:
        return True
    return not is_secrets_name(name) and any(fnmatchcase(name, glob) for glob in allowed)


def own_variables(context: ToolContext | None) -> Mapping[str, str]:
    """The variables that the runs of this session have set."""
    stored = {} if context is None else context.state.get(STATE_KEY, {})
    return {str(name): str(value) for name, value in stored.items()} if isinstance(stored, dict) else {}


def name_problem(name: str) -> str | None:
    """Why a text cannot be the name of a variable; None if it can."""
    if len(name) > MAX_NAME_CHARS or NAME.fullmatch(name) is None:
        return f"{name[:80]!r} is not a valid name of an environment variable"
    return None


def value_problem(value: str) -> str | None:
    """Why a text cannot be the value of a variable; None if it can."""
    if len(value) > MAX_VALUE_CHARS:
        return f"it has {len(value):,} characters; {MAX_VALUE_CHARS:,} are allowed"
    return "it contains a NUL character" if "\0" in value else None


class GetEnv(TypedTool):
    """Reads a variable. A name that may not be read is refused whether or not it exists."""

    name = "get_env"
    description = "Reads an environment variable: one that `set_env` has set, or one that the worker allows."
    spec = READS_ONLY

    class Config(TypedTool.Config):
        allow: list[str] = Field(
            HARMLESS,
            description="Names and globs of the worker's variables that may be read. A glob never covers "
            "the name of a secret, such as `API_KEY`; name it in full.",
        )

    class Params(TypedTool.Params):
        key: str = Field(min_length=1, description="The name of the variable.")
        default: str | None = Field(None, description="The value if the variable does not exist.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        if (problem := name_problem(args.key)) is not None:
            raise ToolValidationError(f"key: {problem}", self.name)
        own = own_variables(context)
        if args.key not in own and not may_read(args.key, self.cfg.allow):
            raise PermanentToolError(
                f"{args.key} may not be read",
                self.name,
                hint="name it in `allow` of the tool's config if agents are meant to see it",
            )
        value = own.get(args.key, os.environ.get(args.key))
        exists = value is not None
        return {"key": args.key, "value": value if exists else args.default, "exists": exists}


class SetEnv(TypedTool):
    """Sets a variable in the state of the run, so it may be repeated, and is undone if the run fails."""

    name = "set_env"
    description = (
        "Sets an environment variable for this conversation. `get_env` and the tools that execute commands "
        "see it."
    )
    spec = ToolExecutionSpec(side_effects="state")

    class Params(TypedTool.Params):
        key: str = Field(min_length=1, description="The name of the variable.")
        value: str = Field(description="The value.")

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        if context is None:
            raise PermanentToolError("a variable can be set only within a run", self.name)
        if (problem := name_problem(args.key)) is not None:
            raise ToolValidationError(f"key: {problem}", self.name)
        if (problem := value_problem(args.value)) is not None:
            raise ToolValidationError(f"value: {problem}", self.name)
        variables = {**own_variables(context), args.key: args.value}
        if len(variables) > MAX_VARIABLES:
            raise PermanentToolError(f"at most {MAX_VARIABLES} variables can be set", self.name)
        context.state[STATE_KEY] = variables
        return {"key": args.key, "value": args.value, "set": True}
