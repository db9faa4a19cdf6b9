"""Options of a provider. The only place that holds what stands under `llm` against what a provider knows."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem, did_you_mean, problems_of
from openagents_worker.agents.variables import as_wanted
from openagents_worker.errors import PluginConfigError

__all__ = ["ProviderOptions", "extras_of", "refuse", "refuse_extras"]


class ProviderOptions(BaseModel):
    """The options that only one provider knows; this one: none."""

    model_config = ConfigDict(extra="forbid", strict=True)


def extras_of(
    options: LLMOptions, known: type[ProviderOptions]
) -> tuple[ProviderOptions, list[ConfigProblem]]:
    """The options that the agents file does not name, as the provider knows them, and what is wrong there."""
    given = {
        name: as_wanted(value, field.annotation) if (field := known.model_fields.get(name)) else value
        for name, value in (options.model_extra or {}).items()
    }
    names = [*LLMOptions.model_fields, *known.model_fields]
    problems = [
        ConfigProblem((name,), f"{options.provider} has no such option", did_you_mean(name, names, "options"))
        for name in given
        if name not in known.model_fields
    ]
    try:
        extras = known.model_validate({name: given[name] for name in given if name in known.model_fields})
    except ValidationError as error:
        return known(), [*problems, *problems_of(error)]
    return extras, problems


def refuse_extras(options: LLMOptions) -> None:
    """For a provider without options of its own. Raises `PluginConfigError`."""
    refuse(extras_of(options, ProviderOptions)[1])


def refuse(problems: Sequence[ConfigProblem]) -> None:
    """Raises `PluginConfigError` that tells of all problems, if there are any; paths begin below `llm`."""
    if problems:
        raise PluginConfigError("; ".join(f"llm.{problem}" for problem in problems), problems=problems)
