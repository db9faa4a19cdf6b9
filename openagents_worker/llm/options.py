"""Provider options: the only place that checks an agent's `llm` options against those of its provider."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from openagents_worker.agents import LLMOptions
from openagents_worker.agents.problems import ConfigProblem, problems_of
from openagents_worker.agents.variables import as_field_type
from openagents_worker.errors import PluginConfigError
from openagents_worker.suggest import did_you_mean

__all__ = ["ProviderOptions", "read_extras", "raise_for_problems", "reject_extras"]


class ProviderOptions(BaseModel):
    """Base of the options that only one provider has. The base itself has none."""

    model_config = ConfigDict(extra="forbid", strict=True)


def read_extras(
    options: LLMOptions, known: type[ProviderOptions]
) -> tuple[ProviderOptions, list[ConfigProblem]]:
    """Parse the options in `llm` that are not common to all providers; also returns their problems."""
    extra_values = {
        name: as_field_type(value, field.annotation) if (field := known.model_fields.get(name)) else value
        for name, value in (options.model_extra or {}).items()
    }
    names = [*LLMOptions.model_fields, *known.model_fields]
    problems = [
        ConfigProblem((name,), f"{options.provider} has no such option", _hint(name, names, options))
        for name in extra_values
        if name not in known.model_fields
    ]
    try:
        extras = known.model_validate(
            {name: value for name, value in extra_values.items() if name in known.model_fields}
        )
    except ValidationError as error:
        return known(), [*problems, *problems_of(error)]
    return extras, problems


def _hint(name: str, names: Sequence[str], options: LLMOptions) -> str:
    """The similar option, and where other fields of a request belong."""
    hint = did_you_mean(name, names, "options")
    if options.provider in ("mock", "scripted"):
        return hint
    return f"{hint}; llm.extra_body takes further fields of the request"


def reject_extras(options: LLMOptions) -> None:
    """Check the options of a provider that has no extra ones. Raises `PluginConfigError`."""
    raise_for_problems(read_extras(options, ProviderOptions)[1])


def raise_for_problems(problems: Sequence[ConfigProblem]) -> None:
    """Raise `PluginConfigError` with all problems, if there are any. Their paths are relative to `llm`."""
    if problems:
        raise PluginConfigError("; ".join(f"llm.{problem}" for problem in problems), problems=problems)
