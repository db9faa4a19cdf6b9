"""Commands: `shell_exec` executes a program, `execute_command` a line of a shell.

A command gets no variable of the worker's environment unless the agents file names it. It is not in a
sandbox: it can do what the user of the worker process can do. So give these tools to agents that you trust,
let somebody approve each call (`"approval": "always"`), or allow only certain programs (`command_allowlist`).
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from openagents_worker.errors import PermanentToolError, ToolValidationError
from openagents_worker.tools.base import ToolContext, ToolExecutionSpec
from openagents_worker.tools.builtin.command_runner import Command, CommandOutcome, run_command
from openagents_worker.tools.builtin.environment import may_read, name_problem, own_variables, value_problem
from openagents_worker.tools.builtin.file_tool import PathTool
from openagents_worker.tools.typed import TypedTool, with_own_limit

__all__ = ["ExecuteCommand", "ShellExec"]

MAX_COMMAND_CHARS = 32_768
MAX_ARGUMENTS = 1_000
MAX_ENV = 100
LONGEST_TIMEOUT_MS = 24 * 60 * 60 * 1000
LARGEST_CAPTURE_BYTES = 64 * 1024 * 1024
SHELL = "/bin/sh"


class _CommandTool(PathTool):
    """Base of both: the folder, the environment and the bounds of a command."""

    spec = ToolExecutionSpec(side_effects="processes")
    durable_idempotent = False

    class Config(PathTool.Config):
        cwd: str | None = Field(
            None,
            description="The folder in which commands start. Without `root`, calls cannot leave it. "
            "None: root.",
        )
        env_passthrough: list[str] = Field(
            [],
            description="Names and globs of variables of the worker that commands get. A glob never covers "
            "the name of a secret. Empty: none, not even PATH.",
        )
        capture_bytes: int = Field(
            200_000, ge=1, le=LARGEST_CAPTURE_BYTES,
            description="How many bytes of stdout, and of stderr, are in the result.",
        )  # fmt: skip

    @property
    def limit(self) -> str | None:
        limit: str | None = self.cfg.root or self.cfg.cwd
        return limit

    def _folder(self, path: str | None) -> str:
        """The folder in which the command starts. Raises a tool error if it may not be used."""
        if path is None and self.cfg.cwd is not None:
            path = str(Path(self.cfg.cwd).absolute())
        place = self.resolved(path or ".")
        if not place.is_dir():
            raise PermanentToolError(f"cwd: {str(path)[:200]} is not a folder", self.name)
        return str(place)

    def _environment(self, context: ToolContext | None, more: dict[str, str]) -> dict[str, str]:
        """The whole environment: variables of the worker, those of the session, and those of the call."""
        passed = {
            name: value for name, value in os.environ.items() if may_read(name, self.cfg.env_passthrough)
        }
        own = {**own_variables(context), **more}
        return {**passed, **{name: value for name, value in own.items() if self._may_set(name)}}

    def _may_set(self, name: str) -> bool:
        return True

    def _is_truncated(self, outcome: CommandOutcome) -> bool:
        return bool(max(outcome.stdout_bytes, outcome.stderr_bytes) > self.cfg.capture_bytes)


class ShellExec(_CommandTool):
    """Executes a program with its arguments, without a shell.

    With `command_allowlist`, the model chooses neither where the program is searched nor, unless
    `settable_env` names them, any variable: many of them make a harmless program execute another one.
    """

    name = "shell_exec"
    description = (
        "Executes a program and gives its exit code and output. There is no shell: no pipes, redirections, "
        "variables or globs."
    )

    class Config(_CommandTool.Config):
        command_allowlist: list[str] | None = Field(
            None, description="The programs that may be executed, by their names. None: any."
        )
        settable_env: list[str] | None = Field(
            None,
            description="Names and globs of variables that the model may set. None: any, or none if there is "
            "a `command_allowlist`.",
        )
        default_timeout_ms: int = Field(
            60_000, ge=1, le=LONGEST_TIMEOUT_MS,
            description="Timeout of a command in milliseconds, unless the call gives one.",
        )  # fmt: skip
        max_timeout_ms: int = Field(
            600_000, ge=1, le=LONGEST_TIMEOUT_MS,
            description="Longest timeout that a call may give, in milliseconds.",
        )  # fmt: skip

    class Params(TypedTool.Params):
        command: str | list[str] = Field(
            min_length=1, max_length=MAX_COMMAND_CHARS,
            description='The program and its arguments: `git log -1`, or `["git", "log", "-1"]`.',
        )  # fmt: skip
        cwd: str | None = Field(None, min_length=1, description="The folder in which it starts.")
        env: dict[str, str] | None = Field(None, description="More environment variables.")
        timeout_ms: int | None = Field(
            None, ge=1, description="Milliseconds after which it is killed with everything it has started."
        )

    def execution_spec(self) -> ToolExecutionSpec:
        return with_own_limit(self.spec, max(self.cfg.default_timeout_ms, self.cfg.max_timeout_ms))

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        argv, executable, folder = await asyncio.to_thread(self._found, args)  # long commands take 0.1 s
        default_ms, max_ms = self.cfg.default_timeout_ms, self.cfg.max_timeout_ms
        timeout_ms = min(args.timeout_ms, max(default_ms, max_ms)) if args.timeout_ms else default_ms
        command = Command(
            argv=argv,
            executable=executable,
            env=self._environment(context, self._checked_env(args.env or {})),
            cwd=folder,
            timeout_s=timeout_ms / 1000,
            max_bytes=self.cfg.capture_bytes,
        )
        outcome = await run_command(command, self.name)
        return {
            "exit_code": outcome.exit_code,
            "stdout": outcome.stdout,
            "stderr": outcome.stderr,
            "timed_out": outcome.timed_out,
            "truncated": self._is_truncated(outcome),
        }

    def _found(self, args: Params) -> tuple[list[str], str, str]:
        """The program with its arguments, its path, and the folder in which it starts."""
        argv = self._argv(args.command)
        folder = self._folder(args.cwd)
        return argv, self._executable(argv[0], folder), folder

    def _argv(self, command: str | list[str]) -> list[str]:
        """The program and its arguments. Raises `ToolValidationError` if the program may not be executed."""
        try:
            argv = shlex.split(command) if isinstance(command, str) else list(command)
        except ValueError as error:
            raise ToolValidationError(f"command: it cannot be split: {error}", self.name) from None
        if not argv or not argv[0]:
            raise ToolValidationError("command: it names no program", self.name)
        if len(argv) > MAX_ARGUMENTS or sum(map(len, argv)) > MAX_COMMAND_CHARS:
            raise ToolValidationError(
                f"command: at most {MAX_ARGUMENTS:,} arguments, {MAX_COMMAND_CHARS:,} characters are allowed",
                self.name,
            )
        if any("\0" in argument for argument in argv):
            raise ToolValidationError("command: it contains a NUL character", self.name)
        allowed = self.cfg.command_allowlist
        if allowed is not None and argv[0] not in [name for name in allowed if "/" not in name]:
            raise PermanentToolError(
                f"{argv[0][:200]!r} is not in command_allowlist",
                self.name,
                hint=f"allowed: {', '.join(allowed)[:500] or 'none'}; give the name without a path",
            )
        return argv

    def _executable(self, name: str, folder: str) -> str:
        """The path of a program: a path as it stands, a name as it is found on the PATH of the worker."""
        if "/" in name:
            return str(Path(folder, name))
        found = shutil.which(name)
        if found is None:
            raise PermanentToolError(f"{name[:200]!r} is not installed on the worker", self.name)
        return str(Path(found).absolute())

    def _checked_env(self, variables: dict[str, str]) -> dict[str, str]:
        if len(variables) > MAX_ENV:
            raise ToolValidationError(f"env: at most {MAX_ENV} variables can be set", self.name)
        for name, value in variables.items():
            if (problem := name_problem(name) or value_problem(value)) is not None:
                raise ToolValidationError(f"env: {problem}", self.name)
            if not self._may_set(name):
                raise PermanentToolError(
                    f"env: {name[:200]} may not be set for this tool",
                    self.name,
                    hint="the agent's configuration allows only certain programs; see settable_env",
                )
        return variables

    def _may_set(self, name: str) -> bool:
        settable: list[str] | None = self.cfg.settable_env
        if settable is None:
            return self.cfg.command_allowlist is None
        return may_read(name, settable)


class ExecuteCommand(_CommandTool):
    """Executes a line of a POSIX shell."""

    name = "execute_command"
    description = "Executes a command line of a POSIX shell (`sh`) and gives its exit code and output."

    class Config(_CommandTool.Config):
        timeout: float = Field(
            30, gt=0, le=LONGEST_TIMEOUT_MS / 1000,
            description="Timeout of a command in seconds, unless the call gives one.",
        )  # fmt: skip
        max_timeout: float = Field(
            600, gt=0, le=LONGEST_TIMEOUT_MS / 1000,
            description="Longest timeout that a call may give, in seconds.",
        )  # fmt: skip

    class Params(TypedTool.Params):
        command: str = Field(min_length=1, max_length=MAX_COMMAND_CHARS, description="The command line.")
        cwd: str | None = Field(None, min_length=1, description="The folder in which it starts.")
        timeout: float | None = Field(
            None, gt=0, description="Seconds after which it is killed with everything it has started."
        )

    def execution_spec(self) -> ToolExecutionSpec:
        return with_own_limit(self.spec, max(self.cfg.timeout, self.cfg.max_timeout) * 1000)

    async def run(self, args: Params, context: ToolContext | None) -> dict[str, Any]:
        if "\0" in args.command:
            raise ToolValidationError("command: it contains a NUL character", self.name)
        longest = max(self.cfg.timeout, self.cfg.max_timeout)
        command = Command(
            argv=["sh", "-c", args.command],
            executable=SHELL,
            env=self._environment(context, {}),
            cwd=await asyncio.to_thread(self._folder, args.cwd),
            timeout_s=min(args.timeout, longest) if args.timeout else self.cfg.timeout,
            max_bytes=self.cfg.capture_bytes,
        )
        outcome = await run_command(command, self.name)
        return {
            "command": args.command,
            "stdout": outcome.stdout,
            "stderr": outcome.stderr,
            "returncode": outcome.exit_code,
            "success": outcome.exit_code == 0,
            "timed_out": outcome.timed_out,
            "truncated": self._is_truncated(outcome),
        }
