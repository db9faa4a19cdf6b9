"""Parsing requests. The only place that turns the argument of a caller into a checked request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from openagents_worker.arguments import TEN_YEARS_MS, number_of, reject_unstorable
from openagents_worker.errors import RequestInvalid, RequestTooLarge
from openagents_worker.json_schema.rules import SchemaProblem, read_schema
from openagents_worker.models.budget import RunBudget
from openagents_worker.models.child import ChildRequest
from openagents_worker.models.request import RunRequest, schema_of

__all__ = ["DEFAULT_MAX_PAYLOAD_BYTES", "parse_child_request", "parse_request"]

DEFAULT_MAX_PAYLOAD_BYTES = 1024 * 1024


def parse_request(
    data: RunRequest | Mapping[str, Any], *, max_bytes: int = DEFAULT_MAX_PAYLOAD_BYTES
) -> RunRequest:
    """A checked request from a `RunRequest` or a dict of its fields.

    Raises `RequestInvalid` with each mistake and its field, or `RequestTooLarge`.
    """
    if isinstance(data, RunRequest):
        request = data
        reject_unstorable(dict(request), run_id=request.run_id)
    elif isinstance(data, Mapping):
        fields = dict(data)
        reject_unstorable(fields)
        try:
            request = RunRequest.model_validate(fields)
        except ValidationError as error:
            raise _request_invalid(error, _HINT) from None
    else:
        raise RequestInvalid(
            f"a request must be a RunRequest or a dict of its fields, not {type(data).__name__}",
            hint="run_agent.delay(RunRequest(agent_id=..., session_id=..., input_text=...))",
        )
    if request.budget is not None:
        _check_budget(request.budget)
    size = len(_as_json(request).encode())
    if size > max_bytes:
        raise RequestTooLarge(
            f"the request has {size:,} bytes as JSON, but at most {max_bytes:,} are allowed",
            hint="send a reference (a URL, a key) to the content, or raise OPENAGENTS_MAX_PAYLOAD_BYTES",
            run_id=request.run_id,
        )
    _check_output_type(request)
    return request


def parse_child_request(data: ChildRequest | Mapping[str, Any]) -> ChildRequest:
    """A checked child request. Raises `RequestInvalid` with each mistake and its field.

    The size is checked when the request of the child run is made.
    """
    if isinstance(data, ChildRequest):
        request = data
        reject_unstorable(dict(request))
    elif isinstance(data, Mapping):
        fields = {name: value for name, value in data.items() if value is not None}
        reject_unstorable(fields)
        try:
            request = ChildRequest.model_validate(fields)
        except ValidationError as error:
            raise _request_invalid(error, "required: agent_id, input_text") from None
    else:
        raise RequestInvalid(
            f"a request to delegate must be a ChildRequest or a dict of its fields, not "
            f"{type(data).__name__}",
            hint="ChildRequest(agent_id=..., input_text=...)",
        )
    if request.budget is not None:
        _check_budget(request.budget)
    return request


def _check_output_type(request: RunRequest) -> None:
    """Raises `RequestInvalid` for an unsupported JSON Schema. Only workers can check a registered name."""
    output_type = request.output_type
    if output_type is None or isinstance(output_type, str):
        return
    try:
        read_schema(schema_of(output_type) if isinstance(output_type, type) else output_type)
    except SchemaProblem as problem:
        raise RequestInvalid(
            f"output_type is not a supported JSON Schema: {problem}",
            hint="use a JSON Schema object (draft 2020-12), or a name that the deployment has registered",
            run_id=request.run_id,
        ) from problem


def _check_budget(budget: RunBudget) -> None:
    """Check the limits after parsing, because a number may be given as text."""
    limits = dict(budget)
    reject_unstorable(limits, "budget")
    if (limit := budget.max_duration_ms) is not None:
        number_of("budget.max_duration_ms", limit, least=1, most=TEN_YEARS_MS)


def _as_json(request: RunRequest) -> str:
    try:
        return request.model_dump_json()
    except (TypeError, ValueError, RecursionError) as error:  # `model_construct` checks nothing
        raise RequestInvalid(f"the request cannot be written as JSON: {error}") from None


_HINT = "required: agent_id, session_id, input_text; values must be plain JSON (no tuples, dates, NaN)"


def _request_invalid(error: ValidationError, hint: str) -> RequestInvalid:
    """The error for a wrong request, with the first five mistakes and their fields."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    lines = []
    for problem in problems[:5]:
        field = ".".join(str(part) for part in problem["loc"]) or "request"
        lines.append(f"{field}: {problem['msg']}")
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return RequestInvalid("; ".join(lines) + more, hint=hint)
