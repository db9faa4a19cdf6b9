"""Output. The only place that holds a run's answer against the type its request asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from openagents_worker.errors import CheckLimitExceeded, OutputValidationError, error_from_wire
from openagents_worker.json_schema.rules import Schema
from openagents_worker.jsontext import canonical_json, dumps, loads
from openagents_worker.models import MAX_MESSAGE_CHARS, RunRequest, schema_of
from openagents_worker.redaction import safe_message
from openagents_worker.runtime.context import RunContext
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.registry import OUTPUTS
from openagents_worker.tools.checks import SchemaChecks, schema_of_output, schema_of_registered_output
from openagents_worker.tools.offload import Offload

__all__ = ["DEFAULT_VALIDATION_RETRIES", "OutputType", "fitted"]

DEFAULT_VALIDATION_RETRIES = 3
MAX_PROBLEMS = 3

FITS = "fits"
FITS_AS_JSON = "fits as JSON"
"""What a check gave, as it is recorded: the output, or what its text says as JSON, is of the type."""

_FENCED = re.compile(r"\s*```[a-zA-Z]*\n(.*)```\s*", re.DOTALL)


class Misfit(Exception):
    """An answer is not of the type; the text says why, for the model."""


@dataclass(frozen=True, slots=True)
class OutputType:
    """What a run is to answer with. A registered model also says what a schema cannot."""

    name: str
    schema: dict[str, Any]
    checked: Schema
    model: type[BaseModel] | None = None

    @classmethod
    def of(cls, request: RunRequest) -> OutputType | None:
        """Raises `PluginLoadError` for a name that nobody has registered, `RequestInvalid` for a schema that
        is not accepted, `PluginConfigError` for that of a registered class."""
        wanted = request.output_type
        if wanted is None:
            return None
        if isinstance(wanted, str):
            model = OUTPUTS.get(wanted)
            schema = schema_of(model)
            return cls(wanted, schema, schema_of_registered_output(wanted, schema), model)
        schema = wanted if isinstance(wanted, dict) else schema_of(wanted)
        return cls(str(schema.get("title", "output")), schema, schema_of_output(schema))

    @property
    def instruction(self) -> str:
        """What the model is told before it is asked for the first time."""
        return (
            f"Your final answer is JSON that fits this JSON Schema, and nothing else:\n{dumps(self.schema)}"
        )

    async def fit(self, output: Any, checks: SchemaChecks, offload: Offload) -> Any:
        """The answer as JSON values, parsed where it is JSON text.

        Raises `Misfit`, and `CheckLimitExceeded` where that cannot be found out.
        """
        output = _plain(output)
        problem = await self._problem(output, checks, offload)
        if problem is not None and isinstance(output, str):
            output = _parsed(output)
            problem = await self._problem(output, checks, offload)
        if problem is not None:
            raise Misfit(problem)
        return output

    async def _problem(self, value: Any, checks: SchemaChecks, offload: Offload) -> str | None:
        problem = await checks.mistakes(self.checked, value, "field")
        if problem is not None or self.model is None:
            return problem
        try:  # in a thread: the validators of a class are code of its owner, and may take long
            await offload.in_thread(_validation_by(self.model, self.name), value=value)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False, include_context=False)[:MAX_PROBLEMS]
            return "; ".join(
                f"{'.'.join(map(str, each['loc'])) or 'answer'}: {each['msg']}" for each in found
            )
        return None


def _validation_by(model: type[BaseModel], name: str) -> Callable[..., None]:
    """The validation of a class as a function; what is said of work that still runs is its name."""

    def validate(value: Any) -> None:
        model.model_validate(value)

    validate.__qualname__ = f"output type {name}"
    return validate


def _parsed(text: str) -> Any:
    """What the text says as JSON, also between the fences that models like to put around it."""
    fenced = _FENCED.fullmatch(text)
    try:
        return loads(fenced.group(1) if fenced else text)
    except ValueError as error:
        raise Misfit(f"the answer is not JSON: {error}") from error


async def fitted(
    output: Any,
    wanted: OutputType,
    pattern: Any,
    context: RunContext,
    attempts: int,
    *,
    recorder: Recorder,
    checks: SchemaChecks,
    offload: Offload,
) -> Any:
    """The answer once it is of the type; the model is told what is wrong and tries again, `attempts` in all.

    Must run where the pattern does: what it asks the model is recorded like the pattern's own calls. Raises
    `OutputValidationError`, and `CheckLimitExceeded`.
    """
    for attempt in range(1, attempts + 1):
        try:
            return await _fit_as_recorded(output, wanted, recorder, checks, offload)
        except Misfit as misfit:
            problem = str(misfit)
        if attempt == attempts:
            break
        await context.emit("validation.retry", attempt=attempt, error=problem)
        told = f"That answer does not fit: {problem}. Answer again, with JSON that fits the schema."
        if hasattr(pattern, "try_again"):
            output = await pattern.try_again(told)
        else:
            output = await _ask_again(context, wanted, output, told)
    raise OutputValidationError(
        f"the answer does not fit {wanted.name} after {attempts} attempts: {problem}",
        output_type=wanted.name,
        attempts=attempts,
    )


async def _fit_as_recorded(
    output: Any, wanted: OutputType, recorder: Recorder, checks: SchemaChecks, offload: Offload
) -> Any:
    """As `OutputType.fit`. What a check gave is a fact of the run: it is not checked again, and no later
    attempt goes another way because a check takes longer there, or is of another version."""
    output = _plain(output)
    try:
        key = digest_of(canonical_json([wanted.name, output]))
    except (TypeError, ValueError, RecursionError):  # it is not JSON, which is said in each attempt
        return await wanted.fit(output, checks, offload)
    if (known := recorder.recorded_check(key)) is not None:
        if "error" in known:
            raise error_from_wire(known["error"])
        if known["ok"] == FITS:
            return output
        if known["ok"] == FITS_AS_JSON:
            return _parsed(output)
        raise Misfit(str(known["ok"]["problem"]))
    try:
        fitting = await wanted.fit(output, checks, offload)
    except Misfit as misfit:  # what a validator of somebody's says goes to the model
        problem = safe_message(str(misfit), MAX_MESSAGE_CHARS)
        recorder.record_check(key, {"ok": {"problem": problem}})
        raise Misfit(problem) from misfit
    except CheckLimitExceeded as error:
        recorder.record_check(key, {"error": error.to_dict()})
        raise
    recorder.record_check(key, {"ok": FITS if fitting is output else FITS_AS_JSON})
    return fitting


def _plain(output: Any) -> Any:
    return output.model_dump(mode="json") if isinstance(output, BaseModel) else output


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
