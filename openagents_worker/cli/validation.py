"""Validation. The only place that looks for everything at once that would keep a worker from starting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from openagents_worker.agents import AppConfig, read_agents_file
from openagents_worker.agents.problems import ConfigProblem, rejected
from openagents_worker.errors import ConfigError, ConfigLoadError, ConfigValidationError, OpenAgentsError
from openagents_worker.runtime.plugins import import_plugins
from openagents_worker.runtime.start_checks import find_problems
from openagents_worker.settings import PREFIX, Settings, unknown_variables

__all__ = ["validated"]


def validated(
    file: str | None, *, env: Mapping[str, str], prepare: Callable[[], Settings]
) -> tuple[str, AppConfig]:
    """The agents file that was checked, and what it says; FILE, else that of the settings.

    `prepare` gives the settings, and imports what a worker imports before its plugins. Raises the only error,
    or `ConfigValidationError` that tells of all: the environment's variables, the modules of plugins, the
    file, and whatever it names.
    """
    errors: list[OpenAgentsError] = []
    problems = [_unknown_variable(*named) for named in unknown_variables(env)]
    path = file or env.get(f"{PREFIX}CONFIG") or str(Settings.model_fields["config"].default)
    try:
        settings = prepare()
    except ConfigError as error:
        errors.append(error)
    else:
        path = file or settings.config
        errors += import_plugins(settings.imports)
    config = None
    try:
        agents_file = read_agents_file(path, env=env)
    except ConfigLoadError as error:
        errors.append(error if file is None else _of_argument(error))
    else:
        config = agents_file.config
        problems += find_problems(agents_file, env)
    if len(errors) == 1 and not problems:
        raise errors[0]
    problems = [*(problem for error in errors for problem in _problems_of(error)), *problems]
    if problems or config is None:
        raise rejected(path, problems)
    return path, config


def _of_argument(error: ConfigLoadError) -> ConfigLoadError:
    """Of a file that was named on the command line, a setting's name helps nobody."""
    if error.hint is not None and PREFIX in error.hint:
        error.hint = f"FILE is a path from {Path.cwd()}"
    return error


def _unknown_variable(name: str, meant: str | None) -> ConfigProblem:
    hint = f"did you mean {meant}?" if meant else "config/.env.example lists the settings"
    return ConfigProblem((name,), "no such setting", hint)


def _problems_of(error: OpenAgentsError) -> list[ConfigProblem]:
    if isinstance(error, ConfigValidationError) and error.problems:
        return [ConfigProblem((told["path"],), told["message"], told["hint"]) for told in error.problems]
    return [ConfigProblem(("environment",), error.message, error.hint, error.code)]
