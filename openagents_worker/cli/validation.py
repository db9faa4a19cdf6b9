"""Validation. The only place that finds all problems that would prevent a worker from starting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openagents_worker.agents import AppConfig
from openagents_worker.agents.code import read_agents
from openagents_worker.agents.problems import ConfigProblem, rejected
from openagents_worker.errors import ConfigError, ConfigLoadError, ConfigValidationError, OpenAgentsError
from openagents_worker.runtime.plugins import import_plugins
from openagents_worker.runtime.start_checks import find_problems
from openagents_worker.settings import PREFIX, Settings, unknown_variables

__all__ = ["validated"]


def validated(
    file: str | None, *, env: Mapping[str, str], prepare: Callable[[], Settings]
) -> tuple[str, AppConfig]:
    """Validate the agents file `file`, or the one of the settings, and the agents in Python.

    Returns where the agents are defined, for people, and all of them.

    `prepare` returns the settings and imports everything that a worker imports before its plugins. A single
    error is raised as it is. Several errors are raised as one `ConfigValidationError`. They may concern the
    variables of the environment, modules of plugins, the agents file, and everything that it refers to.
    """
    errors: list[OpenAgentsError] = []
    problems = [_unknown_variable(*unknown) for unknown in unknown_variables(env)]
    path = file or env.get(f"{PREFIX}CONFIG") or str(Settings.model_fields["config"].default)
    may_be_absent = file is None
    try:
        settings = prepare()
    except ConfigError as error:
        errors.append(error)
    else:
        path = file or settings.config
        may_be_absent = may_be_absent and settings.is_config_optional
        errors += import_plugins(settings.imports)
    config = None
    try:
        agents_file = read_agents(path, env=env, may_be_absent=may_be_absent)
    except ConfigLoadError as error:
        errors.append(error if file is None else _with_hint_for_argument(error))
    else:
        config, path = agents_file.config, agents_file.source
        problems += find_problems(agents_file, env)
    if len(errors) == 1 and not problems:
        raise errors[0]
    problems = [*(problem for error in errors for problem in _problems_of(error)), *problems]
    if problems or config is None:
        raise rejected(path, problems)
    return path, config


def _with_hint_for_argument(error: ConfigLoadError) -> ConfigLoadError:
    """Replace a hint about a setting: the path of this file comes from the command line."""
    if error.hint is not None and PREFIX in error.hint:
        error.hint = f"FILE is relative to {Path.cwd()}"
    return error


def _unknown_variable(name: str, similar: str | None) -> ConfigProblem:
    hint = f"did you mean {similar}?" if similar else "config/.env.example lists the settings"
    return ConfigProblem((name,), "unknown setting", hint)


def _problem_from(each: Mapping[str, Any]) -> ConfigProblem:
    """A problem from its JSON form."""
    place = each.get("place")
    path: tuple[str | int, ...] = (each["path"],) if each["path"] else ()
    if place is not None:
        path = ("agents", 0, *path)
    return ConfigProblem(path, each["message"], each["hint"], place=place)


def _problems_of(error: OpenAgentsError) -> list[ConfigProblem]:
    if isinstance(error, ConfigValidationError) and error.problems:
        return [_problem_from(each) for each in error.problems]
    return [ConfigProblem(("environment",), error.message, error.hint, error.code)]
