"""Errors. The only place that may define an error code.

Every class has its `code`, whether a run with this error is retried (`retryable`), and the HTTP status for
a web application. Codes and classes of the original SDK are kept; the others follow their form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, Self, TypedDict, Unpack

from openagents_worker.jsontext import whole_text
from openagents_worker.secret_text import mask_prose, mask_values

__all__ = [  # completed at the end of the module
    "KIND_OF",
    "ORIGINAL",
    "PLACE",
    "RAISED_BY_PLUGINS",
    "ProcessTraceback",
    "error_classes",
    "error_from_wire",
    "text_of",
]


def text_of(value: object) -> str:
    """The text of the value, in a form that can be stored. It never raises, even if `__str__` fails."""
    if type(value) is str and value.isascii():  # the usual case
        return value
    try:
        return whole_text(str(value))
    except Exception as error:  # noqa: BLE001 - a foreign __str__ may raise anything
        return f"<a {type(value).__name__} whose text cannot be read: {type(error).__name__}>"


class ProcessTraceback(Exception):
    """The traceback text of an exception from another process. It is set as the cause of that exception."""


class ErrorPlace(TypedDict, total=False):
    """Where an error happened."""

    agent_id: str | None
    session_id: str | None
    run_id: str | None
    tool_id: str | None
    step_number: int | None


PLACE = tuple(ErrorPlace.__annotations__)


class OpenAgentsError(Exception):
    """Base class of every error of this library.

    `str(error)` is the message, followed by a `hint:` and a `docs:` line if they are set. Ids are fields, so
    that nobody has to parse them out of the text. Secrets in the message and the hint are masked when the
    error is created, so they are never shown, sent or stored.
    """

    code: ClassVar[str] = "openagents.error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500

    #: names of fields that subclasses add; they are part of `to_dict()`
    extra_fields: ClassVar[tuple[str, ...]] = ()

    # Defaults for subclasses that do not call this class's __init__.
    hint: str | None = None
    docs_url: str | None = None
    agent_id: str | None = None
    session_id: str | None = None
    run_id: str | None = None
    tool_id: str | None = None
    step_number: int | None = None
    traceback: str | None = None
    """The traceback of user code that raised the error: redacted text of limited length, also from other
    hosts."""

    def __init__(
        self,
        message: str = "",
        *,
        hint: str | None = None,
        docs_url: str | None = None,
        **place: Unpack[ErrorPlace],
    ) -> None:
        super().__init__(_masked(message))
        self.hint = _masked(hint)
        self.docs_url = docs_url
        for name, value in place.items():
            if name not in PLACE:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
            setattr(self, name, value)

    @property
    def message(self) -> str:
        """The text without the hint and the docs URL."""
        return text_of(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        lines = [self.message] if self.message else []
        if self.hint:
            lines.append(f"  hint: {self.hint}")
        if self.docs_url:
            lines.append(f"  docs: {self.docs_url}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: value for name, value in self.__dict__.items() if name != ORIGINAL}
        return _rebuild, (type(self), self.args, fields)

    def to_dict(self) -> dict[str, Any]:
        """The error as plain JSON: code, message, hint, docs_url, retryable, context."""
        names = (*PLACE, *self.extra_fields)
        # The class of a plugin may have fields that no constructor of this library has masked. The id of its
        # tool may be any text, for example a URL with a password.
        fields = {name: getattr(self, name, None) for name in names}
        context = {name: value if name == "result" else mask_values(value) for name, value in fields.items()}
        if isinstance(self.traceback, str):
            context["traceback"] = self.traceback
        return {
            "code": self.code,
            "message": _masked(self.message),
            "hint": None if self.hint is None else _masked(text_of(self.hint)),
            "docs_url": None if self.docs_url is None else text_of(self.docs_url),
            "retryable": bool(self.retryable),
            "context": context,
        }


ORIGINAL = "_openagents_original"
"""Name of the attribute with the foreign exception that an error replaces. It exists only in the process that
raised it: it is neither recorded nor sent."""


LONGEST_TEXT_CHARS = 100_000
"""The longest message or hint. Masking it on the event loop takes at most a tenth of a second. A longer text
is usually a whole page that was put into an exception."""


def _masked(text: Any) -> Any:
    if not isinstance(text, str):
        return text  # a plugin may use any object as a message
    if len(text) <= LONGEST_TEXT_CHARS:
        return mask_prose(text)
    cut_chars = len(text) - LONGEST_TEXT_CHARS
    return f"{mask_prose(text[:LONGEST_TEXT_CHARS])}… <{cut_chars:,} more characters>"


def _rebuild(cls: type[OpenAgentsError], args: tuple[Any, ...], fields: dict[str, Any]) -> OpenAgentsError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(fields)
    return error


# --- configuration ---------------------------------------------------------------------------------------


class ConfigError(OpenAgentsError):
    """The configuration cannot be used. The message has the reason."""

    code = "config.error"


class ConfigValidationError(ConfigError):
    """A setting or a part of the agents file has a wrong value. The message names it.

    `problems` lists each mistake as plain JSON: `path`, `line` (from 1), `code`, `message`, `hint`. It is
    empty if there is only the message. `file` is the file with the mistakes.
    """

    code = "config.validation"
    extra_fields = ("file", "problems")
    file: str | None = None
    problems: Sequence[Mapping[str, Any]] = ()

    def __init__(
        self,
        message: str = "",
        *,
        file: str | None = None,
        problems: Sequence[Mapping[str, Any]] = (),
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.file = file
        self.problems = mask_values(list(problems))


class ConfigLoadError(ConfigError):
    """The agents file is missing, unreadable or not valid JSON."""

    code = "config.load"


class BrokerConfigError(ConfigError):
    """The Celery broker or its options cannot be used as configured."""

    code = "config.broker"


class RedisUnsafe(ConfigError):
    """Redis may lose accepted runs: it evicts keys, or its persistence is weaker than `strict` requires."""

    code = "redis.unsafe"


class PluginError(OpenAgentsError):
    """Base class of errors of a plugin."""

    code = "plugin.error"


class PluginLoadError(PluginError):
    """A plugin cannot be found or imported, or is not of the kind that it is used as."""

    code = "plugin.load"


class PluginConfigError(PluginError):
    """A plugin rejects its `config`, or a model client its options. `problems` lists the mistakes."""

    code = "plugin.config"
    problems: Sequence[Any] = ()

    def __init__(self, message: str = "", *, problems: Sequence[Any] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.problems = tuple(problems)


# --- errors for producers --------------------------------------------------------------------------------


class UserError(OpenAgentsError):
    """Base class of errors that the caller has to correct."""

    code = "user.error"
    http_status = 400


class InvalidInputError(UserError):
    """Base class of errors for invalid input."""

    code = "user.invalid_input"
    http_status = 422


class AgentNotFoundError(UserError):
    """No worker knows an agent with this id."""

    code = "user.agent_not_found"
    http_status = 404


class RequestInvalid(InvalidInputError):
    """The request, or another argument, is not valid. Nothing was accepted."""

    code = "request.invalid"


class RequestTooLarge(InvalidInputError):
    """The request is larger than `OPENAGENTS_MAX_PAYLOAD_BYTES`. Nothing was accepted."""

    code = "request.too_large"
    http_status = 413


class TwoArguments(InvalidInputError):
    """A run got more than one argument: a chain passed a value to `.s(request)`. Use `.si(request)`."""

    code = "request.two_arguments"


class RunNotFound(UserError):
    """No run has this id: it never existed, or its record has expired."""

    code = "run.not_found"
    http_status = 404


class RunConflict(UserError):
    """The `run_id` belongs to another request, or its run is over. Nothing was accepted."""

    code = "run.conflict"
    http_status = 409


class ApprovalNotPending(UserError):
    """The call does not wait for a decision: somebody has decided before, or its run has ended.

    `decision` is the first decision, as a `Decision`; None if there was none.
    """

    code = "approval.not_pending"
    http_status = 409
    extra_fields = ("call_id",)

    def __init__(
        self, message: str = "", *, call_id: str | None = None, decision: Any = None, **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.call_id = call_id
        self.decision = decision


class SessionBusy(UserError):
    """A run of the session has not ended. Nothing was accepted (`on_busy="reject"`) or deleted."""

    code = "session.busy"
    http_status = 409


class SessionNotFound(UserError):
    """No session has this id."""

    code = "session.not_found"
    http_status = 404


class RedisUnreachable(OpenAgentsError):
    """Redis cannot be reached. Nothing was accepted."""

    code = "redis.unreachable"
    retryable = True
    http_status = 503


class RedisRefused(RedisUnreachable):
    """Redis rejects a command, and would reject it again."""

    code = "redis.refused"
    retryable = False
    http_status = 500


class RedisNoPermission(RedisRefused):
    """The Redis user lacks a permission. `command`, `key` (a key, a channel or a pattern) and `user` say
    which one. `lacking` is what the ACL needs, for example `+hset ~oa:run:*`."""

    code = "redis.no_permission"
    extra_fields = ("user", "command", "key", "lacking")

    def __init__(
        self,
        message: str = "",
        *,
        user: str | None = None,
        command: str | None = None,
        key: str | None = None,
        lacking: Sequence[str] = (),
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.user = user
        self.command = command
        self.key = key
        self.lacking = tuple(lacking)


class TooManyWatchers(OpenAgentsError):
    """This process already has `OPENAGENTS_MAX_WATCHERS` watchers."""

    code = "watch.too_many"
    retryable = True
    http_status = 503


class RedisWrongType(RedisRefused):
    """A key of this library has the wrong Redis type. `key` names it. Only what needs this key fails."""

    code = "redis.wrong_type"
    extra_fields = ("key",)

    def __init__(self, message: str = "", *, key: str = "", **fields: Any) -> None:
        super().__init__(message, **fields)
        self.key = key


class SubmitUnknown(OpenAgentsError):
    """The answer of Redis was lost, so the run may be accepted. It is safe to submit again."""

    code = "run.submit_unknown"
    retryable = True
    http_status = 503


# --- execution -------------------------------------------------------------------------------------------


class ExecutionError(OpenAgentsError):
    """Base class of errors that end a run from inside."""

    code = "execution.error"


class MaxStepsExceeded(ExecutionError):
    """The run has reached its limit of steps or of tool calls; fields as those of `BudgetExhausted`."""

    code = "execution.max_steps"
    http_status = 422
    extra_fields = ("kind", "current", "limit")

    def __init__(
        self,
        message: str = "",
        *,
        kind: str | None = None,
        current: float | None = None,
        limit: float | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.kind = kind
        self.current = current
        self.limit = limit


class BudgetExhausted(ExecutionError):
    """The run has reached a limit of its budget. `kind` names it; `current` and `limit` have its unit."""

    code = "execution.budget_exhausted"
    http_status = 422
    extra_fields = ("kind", "current", "limit")

    def __init__(
        self,
        message: str = "",
        *,
        kind: str | None = None,
        current: float | None = None,
        limit: float | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.kind = kind
        self.current = current
        self.limit = limit


class OutputValidationError(ExecutionError):
    """The answer does not match the `output_type`, after all attempts."""

    code = "execution.output_validation"
    extra_fields = ("output_type", "attempts")

    def __init__(
        self, message: str = "", *, output_type: str | None = None, attempts: int = 0, **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.output_type = output_type
        self.attempts = attempts


class CheckLimitExceeded(ExecutionError):
    """The check of the answer against the `output_type` needs too much time, memory or nesting. The schema
    refers to itself too often, has a very slow pattern, or is too large for this answer."""

    code = "execution.check_limit"
    http_status = 422


class SessionError(ExecutionError):
    """The state of the session is not what a plugin needs."""

    code = "session.error"


class PatternError(ExecutionError):
    """The pattern, or a plugin around it (memory, assembler, deps), raised an exception that is not an
    error of this library. The message names its type, and the cause has its text."""

    code = "pattern.error"


class StepTimeoutError(PatternError):
    """A step of the pattern took longer than `step_timeout_ms`, or a recorded function longer than its
    `timeout`. It is retried like a failed call, unless something was executing that must not be called
    twice."""

    code = "pattern.step_timeout"
    retryable = True
    http_status = 504


class StepFailed(OpenAgentsError):
    """A function that `context.step` or `context.recorded` called raised an exception that is not an error
    of this library, or its arguments or its result cannot be recorded."""

    code = "step.failed"
    http_status = 422


class StepTooLarge(ExecutionError):
    """The outcome of a call, the output, an artifact or a key of the state cannot be stored: it is not
    JSON, or is larger than `OPENAGENTS_MAX_PAYLOAD_BYTES`."""

    code = "step.too_large"
    http_status = 422


class StepTooDeep(ExecutionError):
    """The outcome of a call, the output, an artifact or a key of the state has more than 100 levels of nested
    lists and objects. JSON readers have such a limit, so it could not be read again."""

    code = "step.too_deep"
    http_status = 422


class ReplayMismatch(ExecutionError):
    """The program asked for a call that contradicts the journal. Nothing was executed."""

    code = "run.replay_mismatch"


class ApprovalTimeout(ExecutionError):
    """Nobody has decided in time about a call that needs an approval, and `approval_default` is fail."""

    code = "approval.timeout"
    http_status = 504


class OutcomeUnknown(ExecutionError):
    """A call with effects was interrupted before its outcome was stored, and it must not be repeated."""

    code = "run.outcome_unknown"
    extra_fields = ("call_id",)

    def __init__(self, message: str = "", *, call_id: str | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.call_id = call_id


class RunPoisoned(ExecutionError):
    """The run killed its worker process too often without committing a step in between."""

    code = "run.poisoned"


class RunCancelled(ExecutionError):
    """The run was cancelled."""

    code = "run.cancelled"
    http_status = 409


class DefinitionChanged(ReplayMismatch):
    """The program contradicts the journal because the definition of the agent was changed."""

    code = "run.definition_changed"


class AgentUnavailable(ExecutionError):
    """No worker could execute the run for `OPENAGENTS_LEFT_TO_OTHERS_MAX_S`: none can serve its agent, or
    none can read its format. The message has the reason of the last worker that tried."""

    code = "agent.unavailable"
    http_status = 503


class SignalTimeout(ExecutionError):
    """No value was sent to the run in time, and `receive` has no default."""

    code = "signal.timeout"
    http_status = 504
    extra_fields = ("signal",)
    signal: str | None = None


class DelegationTooDeep(ExecutionError):
    """The run cannot delegate: as many runs are above it as `multi_agent.max_delegation_depth` allows."""

    code = "delegation.depth"
    http_status = 422


class OtherFormat(ExecutionError):
    """A run or session has a format that this version of the library cannot read."""

    code = "run.other_format"
    retryable = True  # by a process with the version that wrote it
    http_status = 503


class RecordUnreadable(ExecutionError):
    """The record of a run or session is damaged, or was not written by this library."""

    code = "record.unreadable"


class HeldTurnsExpired(ExecutionError):
    """A run needs turns that shared children have left with another run, which is not stored any more."""

    code = "run.held_turns_expired"
    http_status = 410


class WorkerLost(ExecutionError):
    """The worker died while it executed a run that is not durable."""

    code = "worker.lost"
    http_status = 503


class DepsUnavailable(ExecutionError):
    """The factory that the request names with `deps` failed. The run is retried."""

    code = "deps.unavailable"
    retryable = True
    http_status = 503


class RunFailed(OpenAgentsError):
    """`RunHandle.get()` raises it for a run that did not complete. `code` is the error code of the run."""

    extra_fields = ("result",)

    def __init__(
        self,
        message: str = "",
        code: str = "execution.error",
        run_id: str | None = None,
        result: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, run_id=run_id, **fields)
        self.__dict__["code"] = code  # the failed run's code, on the instance
        self.result = dict(result) if result is not None else None
        self.args = (
            *self.args,
            code,
            run_id,
            self.result,
        )  # Celery's JSON keeps nothing else of an exception

    def showing(self, traceback: str | None) -> Self:
        """This error, with the traceback of the failed run as a note, which Python prints below the
        message."""
        if traceback is not None:
            self.traceback = traceback
            self.add_note(f"On the worker:\n{traceback}")
        return self

    def __repr__(self) -> str:
        """Without the result, because Celery's events and Flower show the representation."""
        return f"{type(self).__name__}({self.message!r}, {self.code!r}, {self.run_id!r})"


# --- tools -----------------------------------------------------------------------------------------------


class ToolError(OpenAgentsError):
    """A tool failed. The model gets the error."""

    code = "tool.error"
    was_executed: bool | None = True
    """Whether the call may have had its effect. False: certainly not. None: nobody knows."""

    def __init__(self, message: str = "", tool_name: str = "", **fields: Any) -> None:
        fields.setdefault("tool_id", tool_name or None)
        super().__init__(message, **fields)

    @property
    def tool_name(self) -> str:
        return self.tool_id or ""


class RetryableToolError(ToolError):
    """Base class of tool errors that may succeed if the call is repeated. The call is retried."""

    code = "tool.retryable"
    retryable = True
    http_status = 503


class ToolTimeoutError(RetryableToolError):
    """A tool took longer than its time limit."""

    code = "tool.timeout"
    http_status = 504


class ToolRateLimitError(RetryableToolError):
    """The system behind a tool limits the rate of calls. The call is retried after `retry_after_ms`."""

    code = "tool.rate_limit"
    http_status = 503
    extra_fields = ("retry_after_ms",)

    def __init__(
        self, message: str = "", tool_name: str = "", retry_after_ms: int | None = None, **fields: Any
    ) -> None:
        super().__init__(message, tool_name, **fields)
        self.retry_after_ms = retry_after_ms


class ToolUnavailableError(RetryableToolError):
    """The system behind a tool cannot be reached."""

    code = "tool.unavailable"
    http_status = 502


class PermanentToolError(ToolError):
    """A tool failed, and would fail again if the call were repeated."""

    code = "tool.permanent"


class ChildFailed(PermanentToolError):
    """The agent to which a tool has delegated did not complete its task. `child_run_id` names its run,
    `child_code` and `stop_reason` say why it ended."""

    code = "child.failed"
    extra_fields = ("child_run_id", "child_code", "stop_reason")
    child_run_id: str | None = None
    child_code: str | None = None
    stop_reason: str | None = None


class ToolNotFoundError(PermanentToolError):
    """The model asked for a tool that the agent does not have."""

    code = "tool.not_found"


class ToolValidationError(PermanentToolError):
    """The arguments of a tool do not match its schema."""

    code = "tool.validation"


class ToolAuthError(PermanentToolError):
    """The system behind a tool rejects the credentials."""

    code = "tool.auth"


class ToolCancelledError(PermanentToolError):
    """A tool was cancelled while it was executing, or its job was cancelled at its service."""

    code = "tool.cancelled"


# --- models ----------------------------------------------------------------------------------------------


class LLMError(OpenAgentsError):
    """Base class of errors of a model. `request_id` is the provider's id of the failed request."""

    code = "llm.error"
    http_status = 502
    extra_fields: ClassVar[tuple[str, ...]] = ("request_id",)
    request_id: str | None = None
    retry_after_ms: int | None = None
    requests: int = 1
    """How many requests the call sent in this attempt. It is not recorded with the error."""
    status: int | None = None
    """The HTTP status of the provider's reply. It is not recorded."""
    is_partial: bool = False
    """Whether pieces of the reply were delivered before the call failed. It is not recorded."""
    is_final: bool = False
    """Whether the call is not retried although the error is retryable: it has no tries left, or its provider
    says that a retry is useless. It is not recorded either."""
    usage: Any = None
    """The usage of a reply that is not an answer, if it was counted: an `LLMUsage`. It is part of the usage
    of the run, because the provider bills it."""


class LLMConnectionError(LLMError):
    """The model cannot be reached, closed the connection, or had an internal error."""

    code = "llm.connection"
    http_status = 502
    retryable = True


class LLMRateLimitError(LLMError):
    """The model limits the rate of requests. The call is retried after `retry_after_ms`."""

    code = "llm.rate_limit"
    http_status = 503
    retryable = True
    extra_fields = ("request_id", "retry_after_ms")

    def __init__(self, message: str = "", *, retry_after_ms: int | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.retry_after_ms = retry_after_ms


class LLMResponseError(LLMError):
    """The model rejected the request, or its reply is not valid."""

    code = "llm.response"
    http_status = 502


class LLMReplyTooLarge(LLMResponseError):
    """The reply of the model, or one event of its stream, is larger than `llm.max_reply_bytes`."""

    code = "llm.too_large"
    http_status = 502


class LLMAuthError(LLMResponseError):
    """The model's provider rejects the key, or the key may not use the model."""

    code = "llm.auth"
    http_status = 502


class LLMContextTooLong(LLMResponseError):
    """The request exceeds the model's context, and there is no history left that could be shortened."""

    code = "llm.context_length"
    http_status = 422


class LLMReplyFiltered(LLMResponseError):
    """The provider's content filter blocked the request or the reply."""

    code = "llm.filtered"
    http_status = 422


class LLMReplyRefused(LLMResponseError):
    """The model refuses to answer. The message has its words."""

    code = "llm.refused"
    http_status = 422


class LLMReplyTruncated(LLMResponseError):
    """The answer was cut: `llm.max_tokens` or the model's context is used up, perhaps by reasoning. A pattern
    with `accept_truncated` accepts the text that there is."""

    code = "llm.truncated"
    http_status = 422


class LLMReplyEmpty(LLMResponseError):
    """The model ended its reply without text and without tool calls."""

    code = "llm.empty"
    http_status = 502


class ModelRetryError(LLMError):
    """Raised by a tool to ask the model for other arguments. The model gets the text."""

    code = "llm.model_retry"

    def __init__(self, message: str = "", *, validation_error: Any = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.validation_error = validation_error


RAISED_BY_PLUGINS: frozenset[type[OpenAgentsError]] = frozenset(
    {
        OpenAgentsError,
        PluginError,
        UserError,
        InvalidInputError,
        RetryableToolError,
        LLMError,
        ModelRetryError,
    }
)
"""Classes that this library never raises itself: base classes, and classes of the original SDK for
plugins."""


# --- between processes -----------------------------------------------------------------------------------


def error_classes() -> Iterator[type[OpenAgentsError]]:
    """Every loaded error class, parents before children, including those that plugins define."""
    waiting = [OpenAgentsError]
    while waiting:
        cls = waiting.pop(0)
        yield cls
        waiting.extend(cls.__subclasses__())


class _Recorded(OpenAgentsError):
    """An error read from a record whose class is not loaded in this process; it keeps `code` and
    `retryable`."""

    code = "openagents.recorded"


KIND_OF = "kind_of"
"""Name of the context field with the code of the nearest class of this library, for an error whose own class
is not of this library."""


@lru_cache(maxsize=256)  # a class stays in memory longer than its errors
def _recorded_class(
    code: str, retryable: bool, parent: type[OpenAgentsError], more_fields: tuple[str, ...]
) -> type[OpenAgentsError]:
    fields = tuple(dict.fromkeys((*parent.extra_fields, *more_fields)))
    own = {"code": code, "retryable": retryable, "extra_fields": fields}
    bases = (_Recorded,) if parent is OpenAgentsError else (_Recorded, parent)
    return type(_Recorded.__name__, bases, own)


def _class_with(code: str) -> type[OpenAgentsError] | None:
    """The loaded class with this code."""
    return next((c for c in error_classes() if c.code == code and not issubclass(c, _Recorded)), None)


def error_from_wire(data: Mapping[str, Any]) -> OpenAgentsError:
    """The error that `to_dict()` wrote, as an instance of the class with its code.

    An error whose class is not loaded keeps code, `retryable` and its further fields.
    """
    code = str(data.get("code", OpenAgentsError.code))
    context = dict(data.get("context") or {})
    retryable = bool(data.get("retryable", False))
    cls = _class_with(code)
    if cls is None:
        parent = _class_with(str(context[KIND_OF])) if context.get(KIND_OF) else None
        more = tuple(name for name in context if name not in PLACE and name != "traceback")
        # mypy looks at the hash of an object
        cls = _recorded_class(code, retryable, parent or OpenAgentsError, more)  # type: ignore[arg-type]
    base: dict[str, Any] = dict.fromkeys(("agent_id", "session_id", "run_id", "tool_id", "step_number"))
    base |= context
    base |= {"hint": data.get("hint"), "docs_url": data.get("docs_url")}
    error = _rebuild(cls, (str(data.get("message", "")),), base)
    if "retryable" in data and retryable != bool(cls.retryable):
        error.__dict__["retryable"] = retryable  # of a class of the original SDK that has an inherited code
    if isinstance(error, RunFailed):
        error.__dict__["code"] = code
    return error


__all__ += sorted(
    name
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, OpenAgentsError) and not name.startswith("_")
)
