"""Models. The only place that defines requests, results and records as they are sent and stored in JSON."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, Generic, Literal, Self, cast
from urllib.parse import quote

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PydanticUserError,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError
from typing_extensions import TypeVar

from openagents_worker.arguments import TEN_YEARS_MS, number_of, reject_unstorable
from openagents_worker.errors import (
    OpenAgentsError,
    ProcessTraceback,
    RequestInvalid,
    RequestTooLarge,
    RunCancelled,
    RunFailed,
    text_of,
)
from openagents_worker.json_schema.rules import SchemaProblem, read_schema
from openagents_worker.jsontext import LARGEST_COUNT, replaced
from openagents_worker.queue_names import problem_with_queue
from openagents_worker.redaction import safe_message
from openagents_worker.suggest import nearest

__all__ = [
    "ErrorDetails",
    "Id",
    "RunArtifact",
    "RunBudget",
    "RunRecord",
    "RunRequest",
    "RunResult",
    "RunState",
    "RunUsage",
    "StopReason",
    "parse_request",
    "run_failed",
]

MAX_ID_CHARS = 256
DEFAULT_MAX_PAYLOAD_BYTES = 1024 * 1024
MAX_LABELS = 32
MAX_MESSAGE_CHARS = 8_000  # a longer error message is cut


def _checked_id(value: str) -> str:
    # The space is the only printable character that is whitespace.
    is_clean = value.isprintable() and " " not in value
    bad = None if is_clean else next(c for c in value if c.isspace() or not c.isprintable())
    if not value or len(value) > MAX_ID_CHARS or bad is not None:
        found = f"it contains {bad!r}" if bad is not None else f"it has {len(value)} characters"
        raise PydanticCustomError(
            "id",
            "an id must have 1 to {limit} printable characters and no whitespace; {found}",
            {"limit": MAX_ID_CHARS, "found": found},
        )
    return value


Id = Annotated[str, AfterValidator(_checked_id)]


def _checked_queue(name: str) -> str:
    if problem := problem_with_queue(name):
        raise PydanticCustomError("queue", "{problem}", {"problem": problem})
    return name


QueueName = Annotated[str, AfterValidator(_checked_queue)]
"""A valid queue name. `submit` also checks that it does not begin with the key prefix."""


def _checked_label(name: str) -> str:
    if "=" in _checked_id(name):
        raise PydanticCustomError(
            "label", "the name of a label must not contain '='; found {found}", {"found": repr(name)}
        )
    return name


def _checked_checkpoint(value: str) -> str:
    run_id, _, step = value.rpartition(":step:")
    if not run_id or not step.isdecimal():
        raise PydanticCustomError(
            "checkpoint",
            "a checkpoint must have the form '{{run_id}}:step:{{n}}'; found {found}",
            {"found": repr(value)},
        )
    return value


class _Wire(BaseModel):
    """Base class of models in requests: frozen, without unknown fields, with finite numbers only."""

    # pydantic's messages would show the wrong value and the fields around it.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _unknown_fields_have_a_hint(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        for name in data:
            if name in cls.model_fields:
                continue
            near = nearest(str(name), cls.model_fields)
            hint = f"did you mean {near!r}?" if near else f"known fields: {', '.join(cls.model_fields)}"
            raise PydanticCustomError(
                "unknown_field",
                "{model} has no field {name}; {hint}",
                {"model": cls.__name__, "name": repr(name), "hint": hint},
            )
        return data


class _Stored(BaseModel):
    """Base class of models that are read from Redis: fields that a newer version has added are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class StopReason(StrEnum):
    """Why a run ended."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"
    MAX_STEPS = "max_steps"
    BUDGET_EXHAUSTED = "budget_exhausted"


class RunState(StrEnum):
    """The state of a run. The last three are terminal."""

    SCHEDULED = "scheduled"
    QUEUED = "queued"
    WAITING_SESSION = "waiting_session"
    RUNNING = "running"
    RETRYING = "retrying"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED)


class RunBudget(_Wire):
    """Limits of one run. None: the default of the agent or the deployment. Durations are in milliseconds."""

    max_steps: int | None = Field(
        default=None, ge=1, description="Number of steps (model turns). null: the pattern's max_steps."
    )
    max_duration_ms: int | None = Field(
        default=None, ge=1, description="Milliseconds of work; waiting is not counted. null: no limit."
    )
    max_tool_calls: int | None = Field(
        default=None, ge=0, description="Number of tool calls. null: no limit."
    )
    max_cost_usd: float | None = Field(
        default=None, ge=0, description="USD that the model's calls may cost. null: no limit."
    )
    max_resume_attempts: int | None = Field(
        default=None, ge=0, description="Number of retries of one failed call. null: 3."
    )
    max_validation_retries: int | None = Field(
        default=None,
        ge=0,
        description="Number of further answers if one does not match the output_type. null: 3.",
    )

    def within(self, limits: RunBudget | None) -> RunBudget:
        """A budget with the smaller one of each two limits; None is no limit."""
        if limits is None:
            return self
        both = [(name, getattr(self, name), getattr(limits, name)) for name in RunBudget.model_fields]
        return RunBudget(
            **{name: min((n for n in (a, b) if n is not None), default=None) for name, a, b in both}
        )


class RunRequest(_Wire):
    """One request to an agent in a session.

    The producer may choose the `run_id`: the same request with the same id is one run, even if it is
    submitted several times. `durable=None` means the default of the deployment
    (`OPENAGENTS_DURABLE_DEFAULT`).

    >>> RunRequest(agent_id="assistant", session_id="s1", input_text="hi", run_id="r1").run_id
    'r1'
    """

    agent_id: Id
    session_id: Id
    input_text: str
    run_id: Id = Field(default_factory=lambda: str(uuid.uuid4()))
    parent_run_id: Id | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    context_hints: dict[str, JsonValue] = Field(default_factory=dict)
    budget: RunBudget | None = None
    durable: bool | None = None
    queue: QueueName | None = None
    tenant: Id | None = None
    """The customer of the run. `Client.runs(tenant=...)` lists the runs of a customer."""
    labels: dict[Annotated[str, AfterValidator(_checked_label)], Id] = Field(
        default_factory=dict, max_length=MAX_LABELS
    )
    """Names and values, at most 32. `Client.runs(labels=...)` finds runs by them."""
    deps: Id | None = None
    """The registered name (`register_deps`) of the object that tools and patterns get as `context.deps`."""
    output_type: dict[str, JsonValue] | Id | SkipJsonSchema[type[BaseModel]] | None = None
    """The type of the answer: a JSON Schema, a registered name (`register_output`), or a pydantic class.

    A pydantic class is sent as its schema, and `wait()` parses the answer to the class.
    """
    on_busy: Literal["enqueue", "reject"] = "enqueue"
    """If the session already has a run: `enqueue` lets this run wait, `reject` raises `session.busy`."""
    resume_from_checkpoint: Annotated[str, AfterValidator(_checked_checkpoint)] | None = None
    """The last checkpoint, `{run_id}:step:{n}`, of a failed or cancelled run. That run continues.

    Agent and session must be those of the run, and `input_text` must be the same or empty.
    """

    @model_validator(mode="before")
    @classmethod
    def _a_resumed_run_keeps_its_id(cls, data: Any) -> Any:
        checkpoint = data.get("resume_from_checkpoint") if isinstance(data, Mapping) else None
        if not isinstance(checkpoint, str):
            return data
        run_id = checkpoint.rpartition(":step:")[0]
        if data.get("run_id", run_id) != run_id:
            raise PydanticCustomError(
                "run_id",
                "run_id {given} is not the run of the checkpoint {checkpoint}; leave run_id out",
                {"given": repr(data["run_id"]), "checkpoint": repr(checkpoint)},
            )
        return {**data, "run_id": run_id}

    @field_validator("output_type")
    @classmethod
    def _a_class_has_a_schema(cls, value: Any) -> Any:
        if isinstance(value, type):
            try:
                schema_of(value)
            except PydanticUserError as error:
                raise PydanticCustomError(
                    "output_type",
                    "{name} has no JSON Schema: {reason}",
                    {"name": value.__name__, "reason": str(error).splitlines()[0]},
                ) from None
        return value

    @field_serializer("output_type")
    def _a_class_travels_as_its_schema(self, value: Any) -> dict[str, JsonValue] | str | None:
        return schema_of(value) if isinstance(value, type) else value

    @property
    def output_class(self) -> type[BaseModel] | None:
        """The pydantic class in `output_type`; None if it is a schema, a name, or not set."""
        return self.output_type if isinstance(self.output_type, type) else None


@lru_cache(maxsize=256)  # one submission needs the schema several times
def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of a pydantic class."""
    return model.model_json_schema()


class RunUsage(BaseModel):
    """The model calls, tool calls, tokens and cost of a run.

    The provider counts the tokens. `cost_usd` is None while no price is known. The class is not frozen,
    because patterns for the original SDK change `context.usage`, which is a copy.
    """

    model_config = ConfigDict(extra="ignore")  # a newer version may have more counters

    llm_calls: int = 0
    tool_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_cached: int = 0
    input_tokens_cache_creation: int = 0
    cost_usd: float | None = None
    cost_breakdown: dict[str, float] = Field(default_factory=dict)
    ttft_ms: float | None = None
    llm_retry_count: int = 0

    def plus(self, delta: RunUsage) -> RunUsage:
        """The sum of two usages. No count exceeds 2^53. `ttft_ms` is the first known one."""
        costs = dict(self.cost_breakdown)
        for name, usd in delta.cost_breakdown.items():
            costs[name] = round(costs.get(name, 0.0) + usd, 12)
        known = [c for c in (self.cost_usd, delta.cost_usd) if c is not None]
        return RunUsage(
            llm_calls=min(self.llm_calls + delta.llm_calls, LARGEST_COUNT),
            tool_calls=min(self.tool_calls + delta.tool_calls, LARGEST_COUNT),
            input_tokens=min(self.input_tokens + delta.input_tokens, LARGEST_COUNT),
            output_tokens=min(self.output_tokens + delta.output_tokens, LARGEST_COUNT),
            total_tokens=min(self.total_tokens + delta.total_tokens, LARGEST_COUNT),
            input_tokens_cached=min(self.input_tokens_cached + delta.input_tokens_cached, LARGEST_COUNT),
            input_tokens_cache_creation=min(
                self.input_tokens_cache_creation + delta.input_tokens_cache_creation, LARGEST_COUNT
            ),
            cost_usd=round(sum(known), 12) if known else None,
            cost_breakdown=costs,
            ttft_ms=self.ttft_ms if self.ttft_ms is not None else delta.ttft_ms,
            llm_retry_count=min(self.llm_retry_count + delta.llm_retry_count, LARGEST_COUNT),
        )


class RunArtifact(_Stored):
    """A further output of a run beside its answer: a report, the URL of a picture, a table."""

    name: str
    kind: str = "generic"
    payload: JsonValue = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class ErrorDetails(_Stored):
    """An error as data. `cause` is its `__cause__`, up to three levels.

    `context` has the ids of the run, step or tool, and the `traceback` if user code raised the error.
    """

    code: str
    message: str
    hint: str | None = None
    docs_url: str | None = None
    retryable: bool = False
    context: dict[str, Any] = Field(default_factory=dict)
    cause: ErrorDetails | None = None

    @property
    def traceback(self) -> str | None:
        """The traceback of your code that raised the error: redacted text, at most 8 KiB, only your frames.

        None for an error of this library, and for an error that an older version has stored.
        """
        text = self.context.get("traceback")
        return text if isinstance(text, str) else None if self.cause is None else self.cause.traceback

    @classmethod
    def from_exception(cls, error: BaseException, depth: int = 3) -> Self:
        """Any exception as data. An exception that is not an `OpenAgentsError` has the code
        `error.unknown`."""
        caused_by = None if isinstance(error.__cause__, ProcessTraceback) else error.__cause__
        cause = cls.from_exception(caused_by, depth - 1) if caused_by is not None and depth > 1 else None
        if isinstance(error, OpenAgentsError):
            if isinstance(error.traceback, str) and cause is not None:
                cause = cause._without_traceback()  # the traceback of the error includes its causes
            data = error.to_dict()
            data["message"] = safe_message(data["message"], MAX_MESSAGE_CHARS)
            data["hint"] = data["hint"] and safe_message(data["hint"], MAX_MESSAGE_CHARS)
            data["context"] = {k: _storable_or_text(v) for k, v in data["context"].items() if v is not None}
            return cls(**data, cause=cause)
        text = safe_message(text_of(error), MAX_MESSAGE_CHARS) or type(error).__name__
        return cls(code="error.unknown", message=f"{type(error).__name__}: {text}", cause=cause)

    def _without_traceback(self) -> Self:
        context = {name: value for name, value in self.context.items() if name != "traceback"}
        cause = None if self.cause is None else self.cause._without_traceback()
        return self.model_copy(update={"context": context, "cause": cause})


def _storable_or_text(value: Any) -> Any:
    """The value if it can be stored, else its text. A field of an error may contain any object."""
    try:
        return replaced(value)
    except (TypeError, ValueError):
        return safe_message(text_of(value), MAX_MESSAGE_CHARS)


OutputT = TypeVar("OutputT", default=Any)


class RunResult(_Stored, Generic[OutputT]):
    """The result of a run that has ended. For a failed run, see `stop_reason` and `error_details`.

    `output` is the answer, or raises `RunFailed`. `final_output` is the answer, or None.
    """

    run_id: str
    task_id: str | None = None
    final_output: OutputT | None = None
    stop_reason: StopReason = StopReason.COMPLETED
    usage: RunUsage = Field(default_factory=RunUsage)
    artifacts: list[RunArtifact] = Field(default_factory=list)
    error_details: ErrorDetails | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.stop_reason is StopReason.COMPLETED

    @property
    def output(self) -> OutputT:
        """The answer of a completed run. For any other run it raises `RunFailed` with the error code of the
        run, as `RunHandle.get()` does."""
        if not self.ok:
            raise run_failed(self)
        return cast(OutputT, self.final_output)


def run_failed(
    result: RunResult[Any], *, agent_id: str | None = None, session_id: str | None = None
) -> RunFailed:
    """The `RunFailed` error for the result of a run that did not complete."""
    details = result.error_details
    cancelled = result.stop_reason is StopReason.CANCELLED
    failed = RunFailed(
        details.message if details else f"the run ended as {result.stop_reason}",
        code=details.code if details else (RunCancelled.code if cancelled else "execution.error"),
        hint=details.hint if details else None,
        result=result.model_dump(mode="json"),
        run_id=result.run_id,
        agent_id=agent_id,
        session_id=session_id,
    )
    return failed.showing(details.traceback if details else None)


class RunRecord(_Stored):
    """The current state of a run in Redis. Times are milliseconds since 1970 by the clock of Redis.

    `retries` counts the retries after retryable errors in all lives; `last_error` is the last of these
    errors. `duration_ms` is the sum of all finished attempts. It does not include waiting times (in a queue,
    for the session, for a retry).
    """

    run_id: str  # not an `Id`: a message from outside may contain an invalid id, and its run fails
    agent_id: str
    session_id: str
    queue: str
    state: RunState
    life: int = 1
    attempt: int = 0
    steps: int = 0
    retries: int = 0
    recoveries: int = 0
    worker: str | None = None
    cancel_requested: bool = False
    created_ms: int | None = None
    started_ms: int | None = None
    ended_ms: int | None = None
    due_ms: int | None = None
    duration_ms: int = 0
    usage: RunUsage = Field(default_factory=RunUsage)
    last_error: ErrorDetails | None = None
    request: RunRequest | None = None
    result: RunResult[Any] | None = None

    @property
    def reason_code(self) -> str | None:
        """The code of the error that ended the run, or that the run is retried for; None without an error."""
        if self.result is not None:
            details = self.result.error_details
            return details.code if details is not None else None
        return self.last_error.code if self.last_error and self.state is RunState.RETRYING else None


def output_class_of(request: RunRequest | Mapping[str, Any]) -> type[BaseModel] | None:
    """The pydantic class in the `output_type` of a request, also of an unchecked one; None without a
    class."""
    output_type = request.get("output_type") if isinstance(request, Mapping) else request.output_class
    return output_type if isinstance(output_type, type) and issubclass(output_type, BaseModel) else None


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
            raise _request_invalid(error) from None
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


def _request_invalid(error: ValidationError) -> RequestInvalid:
    """The error for a wrong request, with the first five mistakes and their fields."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    lines = []
    for problem in problems[:5]:
        field = ".".join(str(part) for part in problem["loc"]) or "request"
        lines.append(f"{field}: {problem['msg']}")
    more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
    return RequestInvalid(
        "; ".join(lines) + more,
        hint="required: agent_id, session_id, input_text; values must be plain JSON (no tuples, dates, NaN)",
    )


def header_text(text: str) -> str:
    """The text as the value of an HTTP header: everything but printable ASCII is percent-encoded."""
    return quote(text, safe=_PRINTABLE)


_PRINTABLE = "!#$&'()*+,/:;=?@[]~|"
