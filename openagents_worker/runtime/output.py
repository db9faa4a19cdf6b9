"""Output types: the only place that validates the output of a run against the type its request asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from openagents_worker.errors import (
    CheckLimitExceeded,
    ModelRetryError,
    OutputValidationError,
    error_from_wire,
)
from openagents_worker.json_schema.rules import Schema
from openagents_worker.jsontext import canonical_json, dumps, loads
from openagents_worker.models import MAX_MESSAGE_CHARS, RunRequest, instance_of, schema_of
from openagents_worker.redaction import safe_message
from openagents_worker.runtime.context import AttemptContext
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.recorder import Recorder
from openagents_worker.runtime.registry import OUTPUTS
from openagents_worker.tools.checks import SchemaChecks, schema_of_output, schema_of_registered_output
from openagents_worker.tools.offload import Offload
from openagents_worker.tools.typed import JSON_FORMS

__all__ = [
    "DEFAULT_VALIDATION_RETRIES",
    "OutputMismatch",
    "OutputType",
    "parse_json_answer",
    "validated_output",
]

DEFAULT_VALIDATION_RETRIES = 3
MAX_PROBLEMS = 3

FITS = "fits"
FITS_AS_JSON = "fits as JSON"
"""Recorded results of a check: the output itself is valid, or the JSON in its text is."""

_FENCED = re.compile(r"\s*```[a-zA-Z]*\n(.*)```\s*", re.DOTALL)


class OutputMismatch(Exception):
    """An output is not valid. The text says why, for the model."""


@dataclass(frozen=True, slots=True)
class OutputType:
    """The output type of a run: a JSON Schema, and for a registered class also its pydantic validators."""

    name: str
    schema: dict[str, Any]
    checked: Schema
    model: type[BaseModel] | None = None

    @classmethod
    def of(cls, request: RunRequest) -> OutputType | None:
        """The output type of a request, None if it has none.

        Raises `PluginLoadError` for a name that is not registered, `RequestInvalid` for a schema that is not
        accepted, `PluginConfigError` for the schema of a registered class that is not.
        """
        output_type = request.output_type
        if output_type is None:
            return None
        if isinstance(output_type, str):
            model = OUTPUTS.get(output_type)
            schema = schema_of(model)
            return cls(output_type, schema, schema_of_registered_output(output_type, schema), model)
        schema = output_type if isinstance(output_type, dict) else schema_of(output_type)
        return cls(str(schema.get("title", "output")), schema, schema_of_output(schema))

    @property
    def instruction(self) -> str:
        """The instruction for the model, added to the system prompt."""
        return (
            f"Your final answer is JSON that fits this JSON Schema, and nothing else:\n{dumps(self.schema)}"
        )

    async def validate(self, output: Any, checks: SchemaChecks, offload: Offload) -> Any:
        """The valid output as JSON values. Text is parsed if it contains the output as JSON.

        Raises `OutputMismatch` if it is not valid, `CheckLimitExceeded` if the check takes too long.
        """
        output = _to_json_values(output)
        problem = await self._find_problem(output, checks, offload)
        if problem is None or not isinstance(output, str):
            return _unless(problem, output)
        try:
            parsed = parse_json_answer(output)
        except OutputMismatch:
            for repaired in _json_inside(output):
                if await self._find_problem(repaired, checks, offload) is None:
                    return repaired
            raise
        return _unless(await self._find_problem(parsed, checks, offload), parsed)

    async def _find_problem(self, value: Any, checks: SchemaChecks, offload: Offload) -> str | None:
        problem = await checks.mistakes(self.checked, value, "field")
        if problem is not None or self.model is None:
            return problem
        try:  # in a thread: validators are user code and can take long
            await offload.in_thread(_validator(self.model, self.name), value=value)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False, include_context=False)[:MAX_PROBLEMS]
            return "; ".join(
                f"{'.'.join(map(str, each['loc'])) or 'answer'}: {each['msg']}" for each in found
            )
        return None


def _validator(model: type[BaseModel], name: str) -> Callable[..., None]:
    """A function that validates by a class. Its name appears in logs while it executes."""

    def validate(value: Any) -> None:
        instance_of(model, value)

    validate.__qualname__ = f"output type {name}"
    return validate


def parse_json_answer(text: str) -> Any:
    """Parse JSON text, also inside a Markdown code fence. Raises `OutputMismatch`."""
    fenced = _FENCED.fullmatch(text)
    try:
        return loads(fenced.group(1) if fenced else text)
    except ValueError as error:
        raise OutputMismatch(f"the answer is not JSON: {error}") from error


def _unless(problem: str | None, output: Any) -> Any:
    """The output. Raises `OutputMismatch` if there is a problem."""
    if problem is not None:
        raise OutputMismatch(problem)
    return output


def _json_inside(text: str) -> Iterator[Any]:
    """The JSON objects and lists that text of other kind surrounds: from the first brace to the last one."""
    for opening, closing in ("{}", "[]"):
        if (first := text.find(opening)) >= 0:
            with suppress(ValueError):
                yield loads(text[first : text.rfind(closing) + 1])


async def validated_output(
    output: Any,
    output_type: OutputType | None,
    pattern: Any,
    context: AttemptContext,
    attempts: int,
    *,
    recorder: Recorder,
    checks: SchemaChecks,
    offload: Offload,
) -> Any:
    """Validate an output. If it is not valid, the model corrects it, up to `attempts` outputs in all.

    A pattern of the original SDK may have a `finalize`: it makes the output of what the pattern has returned,
    or refuses it. Without `output_type`, only that is done.

    Must be awaited in the task of the pattern: its model calls are recorded like those of the pattern. Raises
    `OutputValidationError` and `CheckLimitExceeded`.
    """
    for attempt in range(1, attempts + 1):
        try:
            final = await _finalized(output, output_type, pattern)
            if output_type is None:
                return final
            return await _validate_any_form(final, output_type, recorder, checks, offload)
        except OutputMismatch as mismatch:
            problem = str(mismatch)
        if attempt == attempts:
            break
        await context.emit("validation.retry", attempt=attempt, error=problem)
        # Part of recorded prompts: a change of this text would change the calls of runs in progress.
        form = "" if output_type is None else ", with JSON that fits the schema"
        feedback = f"That answer does not fit: {problem}. Answer again{form}."
        if hasattr(pattern, "try_again"):
            output = await pattern.try_again(feedback)
        else:
            output = await _request_correction(context, output_type, output, feedback)
    name = "what the pattern accepts" if output_type is None else output_type.name
    raise OutputValidationError(
        f"the answer does not match {name} after {attempts} attempts: {problem}",
        output_type=None if output_type is None else name,
        attempts=attempts,
    )


async def _finalized(output: Any, output_type: OutputType | None, pattern: Any) -> Any:
    """What the pattern's `finalize` makes of its output. Raises `OutputMismatch` if it refuses the output."""
    finalize = getattr(pattern, "finalized", None)
    if finalize is None:
        return output
    try:
        return await finalize(output, output_type)
    except ModelRetryError as error:
        raise OutputMismatch(safe_message(error.message, MAX_MESSAGE_CHARS) or "it was refused") from error


async def _validate_any_form(
    output: Any, output_type: OutputType, recorder: Recorder, checks: SchemaChecks, offload: Offload
) -> Any:
    """The valid output. An instance of a class is tried in each of its JSON forms: the schema may know its
    fields by their aliases."""
    first, *others = _forms(output, output_type.schema)
    try:
        return await _validate_once(first, output_type, recorder, checks, offload)
    except OutputMismatch:
        for form in others:
            with suppress(OutputMismatch):
                return await _validate_once(form, output_type, recorder, checks, offload)
        raise


async def _validate_once(
    output: Any, output_type: OutputType, recorder: Recorder, checks: SchemaChecks, offload: Offload
) -> Any:
    """Like `OutputType.validate`, but each output is checked once and the result is recorded.

    A later attempt thus gets the same result, even if a check takes longer there or has another version.
    """
    try:
        key = digest_of(canonical_json([output_type.name, output]))
    except (TypeError, ValueError, RecursionError):  # not JSON: each attempt finds that out again
        return await output_type.validate(output, checks, offload)
    if (recorded_result := recorder.checkpoints.recorded_check(key)) is not None:
        if "error" in recorded_result:
            raise error_from_wire(recorded_result["error"])
        if recorded_result["ok"] == FITS:
            return output
        if recorded_result["ok"] == FITS_AS_JSON:
            return parse_json_answer(output)
        raise OutputMismatch(str(recorded_result["ok"]["problem"]))
    try:
        validated = await output_type.validate(output, checks, offload)
    except OutputMismatch as mismatch:  # the message of a custom validator goes to the model
        problem = safe_message(str(mismatch), MAX_MESSAGE_CHARS)
        recorder.checkpoints.record_check(key, {"ok": {"problem": problem}})
        raise OutputMismatch(problem) from mismatch
    except CheckLimitExceeded as error:
        recorder.checkpoints.record_check(key, {"error": error.to_dict()})
        raise
    if validated is output:
        recorder.checkpoints.record_check(key, {"ok": FITS})
    elif _is_json(output):  # earlier versions do not find JSON with text around it, so they check it again
        recorder.checkpoints.record_check(key, {"ok": FITS_AS_JSON})
    return validated


def _is_json(text: str) -> bool:
    """Whether a text is JSON and nothing else."""
    try:
        parse_json_answer(text)
    except OutputMismatch:
        return False
    return True


def _forms(output: Any, schema: Mapping[str, Any]) -> list[Any]:
    """The different JSON forms of an output; mostly one. The first has the fewest fields that the schema does
    not name."""
    if not isinstance(output, BaseModel):
        return [output]
    forms: list[Any] = []
    for options in sorted(JSON_FORMS, key=lambda options: "by_alias" not in options):
        if (form := output.model_dump(mode="json", **options)) not in forms:
            forms.append(form)
    properties = schema.get("properties")
    known = properties if isinstance(properties, dict) else {}
    return sorted(forms, key=lambda form: len(form.keys() - known.keys()) if isinstance(form, dict) else 0)


def _to_json_values(output: Any) -> Any:
    return output.model_dump(mode="json") if isinstance(output, BaseModel) else output


async def _request_correction(
    context: AttemptContext, output_type: OutputType | None, output: Any, feedback: str
) -> str:
    """Let the model correct the output of a pattern without `try_again`. No tools are called."""
    options = context.llm_options
    form = context.output_format
    more: dict[str, Any] = {} if form is None else {"response_format": form}
    instruction = [] if output_type is None else [{"role": "system", "content": output_type.instruction}]
    reply = await context.llm_client.generate(
        **more,
        messages=[
            *instruction,
            {"role": "user", "content": context.input_text},
            {"role": "assistant", "content": output if isinstance(output, str) else _text(output)},
            {"role": "user", "content": feedback},
        ],
        model=options.model,
        temperature=options.temperature,
        max_tokens=options.max_tokens,
    )
    return reply.output_text


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
