"""Output. The only place that holds a run's answer against the type its request asks for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from openagents_worker.errors import OutputValidationError
from openagents_worker.models import RunRequest, dumps, schema_of
from openagents_worker.runtime.context import RunContext
from openagents_worker.runtime.registry import OUTPUTS
from openagents_worker.secret_text import mask_prose
from openagents_worker.tools.validation import check_output, check_schema

__all__ = ["DEFAULT_VALIDATION_RETRIES", "OutputType", "fitted"]

DEFAULT_VALIDATION_RETRIES = 3
MAX_PROBLEMS = 3

_FENCED = re.compile(r"\s*```[a-zA-Z]*\n(.*)```\s*", re.DOTALL)


class Misfit(Exception):
    """An answer is not of the type; the text says why, for the model."""


@dataclass(frozen=True, slots=True)
class OutputType:
    """What a run is to answer with. A registered model also says what a schema cannot."""

    name: str
    schema: dict[str, Any]
    model: type[BaseModel] | None = None

    @classmethod
    def of(cls, request: RunRequest) -> OutputType | None:
        """Raises `PluginLoadError` for a name nobody knows, `RequestInvalid` for what is no JSON Schema."""
        wanted = request.output_type
        if wanted is None:
            return None
        if isinstance(wanted, str):
            model = OUTPUTS.get(wanted)
            return cls(wanted, schema_of(model), model)
        schema = wanted if isinstance(wanted, dict) else schema_of(wanted)
        check_schema(schema)
        return cls(str(schema.get("title", "output")), schema)

    @property
    def instruction(self) -> str:
        """What the model is told before it is asked for the first time."""
        return (
            f"Your final answer is JSON that fits this JSON Schema, and nothing else:\n{dumps(self.schema)}"
        )

    def fit(self, output: Any) -> Any:
        """The answer as JSON values, parsed where it is JSON text. Raises `Misfit`."""
        if isinstance(output, BaseModel):
            output = output.model_dump(mode="json")
        problem = self._problem(output)
        if problem is not None and isinstance(output, str):
            output = _parsed(output)
            problem = self._problem(output)
        if problem is not None:
            raise Misfit(problem)
        return output

    def _problem(self, value: Any) -> str | None:
        problem = check_output(self.schema, value)
        if problem is not None or self.model is None:
            return problem
        try:
            self.model.model_validate(value)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False, include_context=False)[:MAX_PROBLEMS]
            return "; ".join(
                f"{'.'.join(map(str, each['loc'])) or 'answer'}: {each['msg']}" for each in found
            )
        return None


def _parsed(text: str) -> Any:
    """What the text says as JSON, also between the fences that models like to put around it."""
    fenced = _FENCED.fullmatch(text)

    def no_json(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(fenced.group(1) if fenced else text, parse_constant=no_json)
    except (ValueError, RecursionError) as error:
        raise Misfit(f"the answer is not JSON: {error}") from error


async def fitted(output: Any, wanted: OutputType, pattern: Any, context: RunContext, attempts: int) -> Any:
    """The answer once it is of the type; the model is told what is wrong and tries again, `attempts` in all.

    Must run where the pattern does: what it asks the model is recorded like the pattern's own calls. Raises
    `OutputValidationError`.
    """
    for attempt in range(1, attempts + 1):
        try:
            return wanted.fit(output)
        except Misfit as misfit:
            problem = mask_prose(str(misfit))  # what a validator of somebody's says goes to the model
        if attempt == attempts:
            break
        await context.emit("validation.retry", attempt=attempt, error=problem)
        told = f"That answer does not fit: {problem}. Answer again, with JSON that fits the schema."
        if hasattr(pattern, "try_again"):
            output = await pattern.try_again(told)
        else:
            output = await _ask_again(context, wanted, output, told)
    raise OutputValidationError(
        f"the answer is no {wanted.name} after {attempts} attempts: {problem}",
        output_type=wanted.name,
        attempts=attempts,
    )


async def _ask_again(context: RunContext, wanted: OutputType, output: Any, told: str) -> str:
    """Ask the model to mend the answer of a pattern that cannot go on: no tool is called a second time."""
    options = context.llm_options
    reply = await context.llm_client.generate(
        messages=[
            {"role": "system", "content": wanted.instruction},
            {"role": "user", "content": context.input_text},
            {"role": "assistant", "content": output if isinstance(output, str) else _text(output)},
            {"role": "user", "content": told},
        ],
        model=options.model,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
    )
    return reply.output_text


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
