"""Errors. The only place that may define an error code.

Every class knows its `code`, whether a run that met it may be tried again (`retryable`) and the HTTP status
a web product would answer with. Codes and classes of the original SDK are kept; ours follow them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from openagents_worker.jsontext import whole_text
from openagents_worker.secret_text import mask_prose, mask_values

__all__ = [  # completed at the end of the module
    "ORIGINAL",
    "ProcessTraceback",
    "RAISED_BY_PLUGINS",
    "error_classes",
    "error_from_wire",
    "text_of",
]


def text_of(value: object) -> str:
    """The value's text, fit to be stored; also of a value whose own `__str__` fails."""
    try:
        return whole_text(str(value))
    except Exception as error:  # noqa: BLE001 - somebody else's __str__ may raise anything
        return f"<a {type(value).__name__} whose text cannot be read: {type(error).__name__}>"


class ProcessTraceback(Exception):
    """The traceback of an exception that was raised in another process, as text; it is set as its cause."""


class OpenAgentsError(Exception):
    """Base of every error this library raises on purpose.

    `str(error)` is the message, then a `hint:` and a `docs:` line where given. Ids are fields, so that a log
    or a caller never has to parse them out of the text. Secrets in the message and the hint are masked when
    the error is made: so they are in everything that shows it, sends it or stores it.
    """

    code: ClassVar[str] = "openagents.error"
    retryable: ClassVar[bool] = False
    http_status: ClassVar[int] = 500

    #: names of the fields that subclasses add; they travel with the error over process borders
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
    """Where code that is not of this library raised it: bounded, redacted text, also on other hosts."""

    def __init__(
        self,
        message: str = "",
        *,
        hint: str | None = None,
        docs_url: str | None = None,
        agent_id: str | None = None,
        session_id: str | None = None,
        run_id: str | None = None,
        tool_id: str | None = None,
        step_number: int | None = None,
    ) -> None:
        super().__init__(_masked(message))
        self.hint = _masked(hint)
        self.docs_url = docs_url
        self.agent_id = agent_id
        self.session_id = session_id
        self.run_id = run_id
        self.tool_id = tool_id
        self.step_number = step_number

    @property
    def message(self) -> str:
        """The text without hint and docs."""
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
        names = ("agent_id", "session_id", "run_id", "tool_id", "step_number", *self.extra_fields)
        context = {name: getattr(self, name, None) for name in names}
        # A plugin's own class may have fields and texts that no constructor of ours has seen.
        context |= {name: mask_values(context[name]) for name in self.extra_fields if name != "result"}
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
"""Attribute of an error that stands for somebody else's exception, in the process where that was raised; it
is neither recorded nor sent."""


LONGEST_TEXT_CHARS = 100_000
"""Of a message or a hint: it is looked through on the event loop, which takes a tenth of a second at worst. A
text of that length is a page that somebody has put into an exception."""


def _masked(text: Any) -> Any:
    if not isinstance(text, str):
        return text  # a plugin may give anything as a message
    if len(text) <= LONGEST_TEXT_CHARS:
        return mask_prose(text)
    more = len(text) - LONGEST_TEXT_CHARS
    return f"{mask_prose(text[:LONGEST_TEXT_CHARS])}… <{more:,} more characters>"


def _rebuild(cls: type[OpenAgentsError], args: tuple[Any, ...], fields: dict[str, Any]) -> OpenAgentsError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(fields)
    return error


# --- configuration ---------------------------------------------------------------------------------------


class ConfigError(OpenAgentsError):
    """Something is configured in a way that cannot work."""

    code = "config.error"


class ConfigValidationError(ConfigError):
    """A setting or a part of the agents file has a wrong value; the message says where.

    `problems` has each mistake as plain JSON: `path`, `line` (from 1), `code`, `message`, `hint`; empty where
    there is only the message. `file` is the file they are in.
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
    """The agents file is missing, unreadable or no JSON."""

    code = "config.load"


class BrokerConfigError(ConfigError):
    """The Celery broker or its options cannot be used as configured."""

    code = "config.broker"


class RedisUnsafe(ConfigError):
    """Redis is set up so that accepted runs can be lost: it evicts keys, or is not as strict as asked for."""

    code = "redis.unsafe"


class PluginError(OpenAgentsError):
    """Base of what is wrong with a plugin."""

    code = "plugin.error"


class PluginLoadError(PluginError):
    """A plugin cannot be found, imported or used as what it is named for."""

    code = "plugin.load"


class PluginConfigError(PluginError):
    """A plugin refuses its `config`, or a model client its options. `problems` are the single mistakes."""

    code = "plugin.config"
    problems: Sequence[Any] = ()

    def __init__(self, message: str = "", *, problems: Sequence[Any] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.problems = tuple(problems)


# --- what a producer meets -------------------------------------------------------------------------------


class UserError(OpenAgentsError):
    """Base of what whoever asks has to change."""

    code = "user.error"
    http_status = 400


class InvalidInputError(UserError):
    """Base of inputs that are not of the right shape."""

    code = "user.invalid_input"
    http_status = 422


class AgentNotFoundError(UserError):
    """No worker knows an agent of that id."""

    code = "user.agent_not_found"
    http_status = 404


class RequestInvalid(InvalidInputError):
    """The request does not have the shape of a `RunRequest`; nothing was accepted."""

    code = "request.invalid"


class RequestTooLarge(InvalidInputError):
    """The request is larger than `OPENAGENTS_MAX_PAYLOAD_BYTES`; nothing was accepted."""

    code = "request.too_large"
    http_status = 413


class TwoArguments(InvalidInputError):
    """A run was given more than its one argument, the request (a chain passed a value to `.s(request)`)."""

    code = "request.two_arguments"


class RunNotFound(UserError):
    """No run of that id is known: it never was, or its time is over."""

    code = "run.not_found"
    http_status = 404


class RunConflict(UserError):
    """The run_id belongs to another request; nothing was accepted."""

    code = "run.conflict"
    http_status = 409


class SessionBusy(UserError):
    """A run of the session has not ended: so nothing was accepted (`on_busy="reject"`) or deleted."""

    code = "session.busy"
    http_status = 409


class SessionNotFound(UserError):
    """No session of that id is known."""

    code = "session.not_found"
    http_status = 404


class RedisUnreachable(OpenAgentsError):
    """Redis cannot be reached, and nothing was accepted."""

    code = "redis.unreachable"
    retryable = True
    http_status = 503


class RedisRefused(RedisUnreachable):
    """Redis answers a command with an error that repeating does not mend."""

    code = "redis.refused"
    retryable = False
    http_status = 500


class RedisNoPermission(RedisRefused):
    """The user of Redis lacks a permission. `command`, `key` (a key or a channel, or a pattern of them) and
    `user` say which; `lacking` is what an ACL has to say, for example `+hset ~oa:run:*`."""

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
    """As many watchers as `OPENAGENTS_MAX_WATCHERS` allows follow runs' events in this process already."""

    code = "watch.too_many"
    retryable = True
    http_status = 503


class RedisWrongType(RedisRefused):
    """A key of this library holds something of another type; `key` names it. Whatever needs that key fails,
    and nothing else."""

    code = "redis.wrong_type"
    extra_fields = ("key",)

    def __init__(self, message: str = "", *, key: str = "", **fields: Any) -> None:
        super().__init__(message, **fields)
        self.key = key


class SubmitUnknown(OpenAgentsError):
    """Redis got the request but its answer was lost: the run may be accepted. Repeating is safe."""

    code = "run.submit_unknown"
    retryable = True
    http_status = 503


# --- execution -------------------------------------------------------------------------------------------


class ExecutionError(OpenAgentsError):
    """Base of what ends a run from inside."""

    code = "execution.error"


class MaxStepsExceeded(ExecutionError):
    """The run used up its steps, or its tool calls."""

    code = "execution.max_steps"
    http_status = 422


class BudgetExhausted(ExecutionError):
    """A budget is used up. `kind` names it, `current` and `limit` are in the unit of that budget."""

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
    """The answer does not fit the `output_type` that was asked for, after all attempts."""

    code = "execution.output_validation"
    extra_fields = ("output_type", "attempts")

    def __init__(
        self, message: str = "", *, output_type: str | None = None, attempts: int = 0, **fields: Any
    ) -> None:
        super().__init__(message, **fields)
        self.output_type = output_type
        self.attempts = attempts


class CheckLimitExceeded(ExecutionError):
    """To check the answer against the `output_type` took more time, memory or nesting than a check may take.
    The schema multiplies itself, has a pattern that takes for ever, or is too large for such an answer."""

    code = "execution.check_limit"
    http_status = 422


class SessionError(ExecutionError):
    """The session's state is not what a plugin needs."""

    code = "session.error"


class PatternError(ExecutionError):
    """The pattern, or a plugin around it (memory, assembler, deps), raised something that is not an error of
    this library; the message names its type, and the cause says what."""

    code = "pattern.error"


class StepTimeoutError(PatternError):
    """One step of the pattern took longer than its `step_timeout_ms`; it is tried again like a failed call,
    unless a tool was at work that must not be called twice."""

    code = "pattern.step_timeout"
    retryable = True
    http_status = 504


class StepTooLarge(ExecutionError):
    """The outcome of a call, or what a run leaves (its output, an artifact, a key of its state), cannot be
    stored: it is not JSON, or is larger than `OPENAGENTS_MAX_PAYLOAD_BYTES`."""

    code = "step.too_large"
    http_status = 422


class StepTooDeep(ExecutionError):
    """The outcome of a call, or what a run leaves, has more than 100 levels of lists and objects: whoever
    reads JSON stops somewhere, and what is stored has to be read again."""

    code = "step.too_deep"
    http_status = 422


class ReplayMismatch(ExecutionError):
    """The program asked for another call than the journal holds at this place; nothing was executed."""

    code = "run.replay_mismatch"


class RunPoisoned(ExecutionError):
    """The run made its workers die again and again without committing a step in between."""

    code = "run.poisoned"


class RunCancelled(ExecutionError):
    """The run was cancelled."""

    code = "run.cancelled"
    http_status = 409


class DefinitionChanged(ReplayMismatch):
    """The program went another way than the journal because the agent's definition was changed meanwhile."""

    code = "run.definition_changed"


class AgentUnavailable(ExecutionError):
    """For `OPENAGENTS_LEFT_TO_OTHERS_MAX_S` no worker could execute the run: none that looked at it can serve
    its agent, or reads the format in which it is stored. The message says why the last one could not."""

    code = "agent.unavailable"
    http_status = 503


class OtherFormat(ExecutionError):
    """A run or session is stored in a format that this version of the library does not read."""

    code = "run.other_format"
    retryable = True  # by a process with the version that wrote it
    http_status = 503


class RecordUnreadable(ExecutionError):
    """What is stored of a run or session is not what this library writes."""

    code = "record.unreadable"


class WorkerLost(ExecutionError):
    """The worker died while it executed a run that is not durable."""

    code = "worker.lost"
    http_status = 503


class DepsUnavailable(ExecutionError):
    """What the request's `deps` names could not be made; the run is tried again."""

    code = "deps.unavailable"
    retryable = True
    http_status = 503


class RunFailed(OpenAgentsError):
    """What `RunHandle.get()` raises for a run that did not complete. `code` is the run's own error code."""

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
        self.args = (*self.args, code, run_id, self.result)  # all that Celery's JSON keeps of an exception

    def showing(self, traceback: str | None) -> Self:
        """The error with the traceback of where the run failed, which Python prints below it as a note."""
        if traceback is not None:
            self.traceback = traceback
            self.add_note(f"On the worker:\n{traceback}")
        return self

    def __repr__(self) -> str:
        """Without the result: Celery's events and Flower show it."""
        return f"{type(self).__name__}({self.message!r}, {self.code!r}, {self.run_id!r})"


# --- tools -----------------------------------------------------------------------------------------------


class ToolError(OpenAgentsError):
    """A tool failed; the model is told."""

    code = "tool.error"

    def __init__(self, message: str = "", tool_name: str = "", **fields: Any) -> None:
        fields.setdefault("tool_id", tool_name or None)
        super().__init__(message, **fields)

    @property
    def tool_name(self) -> str:
        return self.tool_id or ""


class RetryableToolError(ToolError):
    """Base of tool errors after which the same call may succeed; the run is retried from there."""

    code = "tool.retryable"
    retryable = True
    http_status = 503


class ToolTimeoutError(RetryableToolError):
    """A tool took longer than its time limit."""

    code = "tool.timeout"
    http_status = 504


class ToolRateLimitError(RetryableToolError):
    """A tool's other side asks for patience; `retry_after_ms` is obeyed."""

    code = "tool.rate_limit"
    http_status = 503
    extra_fields = ("retry_after_ms",)

    def __init__(
        self, message: str = "", tool_name: str = "", retry_after_ms: int | None = None, **fields: Any
    ) -> None:
        super().__init__(message, tool_name, **fields)
        self.retry_after_ms = retry_after_ms


class ToolUnavailableError(RetryableToolError):
    """A tool's other side cannot be reached."""

    code = "tool.unavailable"
    http_status = 502


class PermanentToolError(ToolError):
    """A tool failed in a way that repeating will not mend."""

    code = "tool.permanent"


class ToolNotFoundError(PermanentToolError):
    """The model asked for a tool that the agent does not have."""

    code = "tool.not_found"


class ToolValidationError(PermanentToolError):
    """A tool's arguments do not fit its schema."""

    code = "tool.validation"


class ToolAuthError(PermanentToolError):
    """A tool's other side refuses the credentials; for tools that know."""

    code = "tool.auth"


class ToolCancelledError(PermanentToolError):
    """A tool was cancelled while it ran; for tools that can tell."""

    code = "tool.cancelled"


# --- models ----------------------------------------------------------------------------------------------


class LLMError(OpenAgentsError):
    """Base of what is wrong with a model."""

    code = "llm.error"
    http_status = 502


class LLMConnectionError(LLMError):
    """The model cannot be reached, broke off, or failed on its own side."""

    code = "llm.connection"
    http_status = 502
    retryable = True


class LLMRateLimitError(LLMError):
    """The model asks for patience; `retry_after_ms` is obeyed."""

    code = "llm.rate_limit"
    http_status = 503
    retryable = True
    extra_fields = ("retry_after_ms",)

    def __init__(self, message: str = "", *, retry_after_ms: int | None = None, **fields: Any) -> None:
        super().__init__(message, **fields)
        self.retry_after_ms = retry_after_ms


class LLMResponseError(LLMError):
    """The model refused the request, or answered with something unusable."""

    code = "llm.response"
    http_status = 502


class LLMReplyTooLarge(LLMResponseError):
    """The model's reply, or one event of its stream, is larger than `llm.max_reply_bytes`; the rest was not
    read."""

    code = "llm.too_large"
    http_status = 502


class ModelRetryError(LLMError):
    """Asks the model to try again with other arguments; a tool raises it, the model reads its text."""

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
        ToolAuthError,
        ToolCancelledError,
        LLMError,
        ModelRetryError,
    }
)
"""What this library itself never raises: bases, and classes of the original SDK that plugins raise."""


# --- over process borders --------------------------------------------------------------------------------


def error_classes() -> Iterator[type[OpenAgentsError]]:
    """Every loaded error class, parents first; also those that plugins have defined."""
    waiting = [OpenAgentsError]
    while waiting:
        cls = waiting.pop(0)
        yield cls
        waiting.extend(cls.__subclasses__())


class _Recorded(OpenAgentsError):
    """An error read back from a record whose class is not loaded here; it keeps code and retryable."""

    code = "openagents.recorded"

    @classmethod
    def of(cls, code: str, retryable: bool) -> type[Self]:
        return type(cls.__name__, (cls,), {"code": code, "retryable": retryable})


def error_from_wire(data: Mapping[str, Any]) -> OpenAgentsError:
    """The error that `to_dict()` wrote, as an instance of the class that owns its code."""
    code = str(data.get("code", OpenAgentsError.code))
    cls = next((c for c in error_classes() if c.code == code and not issubclass(c, _Recorded)), None)
    if cls is None:
        cls = _Recorded.of(code, bool(data.get("retryable", False)))
    base: dict[str, Any] = dict.fromkeys(("agent_id", "session_id", "run_id", "tool_id", "step_number"))
    base |= dict(data.get("context") or {})
    base |= {"hint": data.get("hint"), "docs_url": data.get("docs_url")}
    error = _rebuild(cls, (str(data.get("message", "")),), base)
    if isinstance(error, RunFailed):
        error.__dict__["code"] = code
    return error


__all__ += sorted(
    name
    for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, OpenAgentsError) and not name.startswith("_")
)
