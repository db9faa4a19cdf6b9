"""Recorded functions: the only place that calls a function of a program as a recorded call of its run.

Arguments and results cross the journal as JSON. The program gets every result as it is read from there, also
the first time, so that a later attempt sees the same value.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from functools import lru_cache, partial, wraps
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import PydanticSerializationError

from openagents_worker.errors import OpenAgentsError, StepFailed, StepTimeoutError
from openagents_worker.jsontext import MAX_NESTING, NestedTooDeeply, canonical_json, dumps
from openagents_worker.llm.base import CallInfo
from openagents_worker.models import MAX_MESSAGE_CHARS, ErrorDetails
from openagents_worker.redaction import safe_message
from openagents_worker.runtime.context import AttemptContext, CallContext, writing_to
from openagents_worker.runtime.journal import digest_of
from openagents_worker.runtime.recorder import Outcome
from openagents_worker.runtime.storable import too_deep
from openagents_worker.runtime.user_code import (
    cancelling_itself_only,
    described_in_log,
    user_code,
    user_error_of,
)
from openagents_worker.runtime.writer import RunWriter
from openagents_worker.telemetry.logs import get_logger
from openagents_worker.tools.offload import Offload
from openagents_worker.tools.typed import to_plain_json

__all__ = ["RecordedFunctions"]

log = get_logger(__name__)

MAX_NAME_CHARS = 200
MAX_PROBLEMS = 3  # of a result that does not match its type, in the error
ONCE_HINT = "it is not called again once its outcome is stored; send its idempotency key to the receiver"
TYPES_HINT = "use JSON values, dataclasses, pydantic models, dates, or result_type"
NOT_JSON = (PydanticSerializationError, ValueError, TypeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Step:
    """A function that is called as a recorded call, and how it is called."""

    name: str
    function: Callable[..., Any]
    idempotent: bool
    """Whether it may be called again if its outcome was lost."""
    timeout_s: float | None
    type: TypeAdapter[Any] | None
    """The type of its result. None: the program gets plain JSON values."""

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        name: str | None,
        *,
        idempotent: bool = True,
        timeout: float | timedelta | None = None,
        result_type: Any = None,
    ) -> Step:
        """Raises `StepFailed` for a name, a timeout or a result type that cannot be used."""
        if name is None:
            name = str(getattr(_unwrapped(function), "__name__", type(function).__name__))
        if not (isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS and name.isprintable()):
            raise StepFailed(f"a step cannot have the name {name!r}", hint="1 to 200 printable characters")
        if not callable(function):
            raise StepFailed(f"step {name!r}: a {type(function).__name__} is not a function")
        timeout_s = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        if timeout_s is not None and not timeout_s > 0:
            raise StepFailed(f"step {name!r}: its timeout must be more than 0 seconds")
        returned = result_type if result_type is not None else _return_type(function, name)
        return cls(name, function, idempotent, timeout_s, _adapter(returned, name))

    def error(self, text: str) -> StepFailed:
        return StepFailed(f"step {self.name!r}: {text}")

    # --- arguments ---------------------------------------------------------------------------------------

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by their names, as JSON. Raises `StepFailed`, naming one that is not JSON."""
        return {name: self._json(name, value) for name, value in self._named(args, kwargs)}

    def _named(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        try:
            signature = inspect.signature(self.function)
        except ValueError:  # a function of C without a signature
            yield from (("args", list(args)), *kwargs.items())
            return
        try:
            yield from signature.bind(*args, **kwargs).arguments.items()
        except TypeError as error:
            raise TypeError(f"step {self.name!r}: {error}") from None

    def _json(self, name: str, value: Any) -> Any:
        if isinstance(value, AttemptContext | CallContext):
            return None  # the run itself
        try:
            return _ordered(value, MAX_NESTING)
        except (NestedTooDeeply, *NOT_JSON) as error:
            raise StepFailed(
                f"step {self.name!r}: the argument {name} is not JSON: {error}",
                hint="pass JSON values, dataclasses or pydantic models; bind clients with functools.partial, "
                "or take them from context.deps",
            ) from error

    # --- results -----------------------------------------------------------------------------------------

    def encoded(self, value: Any) -> Any:
        """The result as plain JSON. Raises `StepFailed` or `StepTooDeep` if it cannot be stored and read."""
        if isinstance(value, Iterator):
            raise StepFailed(f"step {self.name!r} returned an iterator", hint="return a list")
        try:
            if self.type is not None:
                value = self.type.dump_python(self.type.validate_python(value), mode="json")
            stored = to_plain_json(value)
        except NestedTooDeeply as error:
            raise too_deep(f"the result of step {self.name!r}", error) from error
        except ValidationError as error:
            raise self._mismatch(error, "returned a value that does not match its type") from error
        except NOT_JSON as error:
            raise StepFailed(
                f"the result of step {self.name!r} is not JSON: {error}", hint=TYPES_HINT
            ) from error
        self.decoded(stored)
        return stored

    def decoded(self, stored: Any) -> Any:
        """The result for the program. Raises `StepFailed` if the JSON does not match the type."""
        if self.type is None:
            return stored
        try:
            return self.type.validate_json(dumps(stored))
        except ValidationError as error:
            raise self._mismatch(error, "has a result that cannot be read back from JSON") from error

    def _mismatch(self, error: ValidationError, what: str) -> StepFailed:
        problems = error.errors(include_url=False, include_input=False, include_context=False)[:MAX_PROBLEMS]
        found = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'value'}: {each['msg']}" for each in problems)
        return StepFailed(f"step {self.name!r} {what}: {found}", hint=TYPES_HINT)


class RecordedFunctions:
    """The recorded functions of one attempt."""

    def __init__(self, context: AttemptContext, writer: RunWriter, offload: Offload) -> None:
        self._context = context
        self._writer = writer
        self._offload = offload
        self._warned: set[str] = set()

    step = staticmethod(Step.of)

    def wrapped(self, step: Step) -> Callable[..., Awaitable[Any]]:
        """A function with the signature and the docstring of the step, whose calls are recorded."""

        @wraps(step.function)
        async def recorded(*args: Any, **kwargs: Any) -> Any:
            return await self.call(step, args, kwargs)

        return recorded

    async def call(self, step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of the function, from the journal or by calling it. Raises coded errors."""
        arguments = step.arguments(args, kwargs)
        digest = digest_of(canonical_json(arguments))

        async def make(info: CallInfo) -> Outcome:
            self._emit_started(step, info, arguments)
            return await self._make_call(step, info, args, kwargs)

        recorder = self._context.recorder
        return step.decoded(await recorder.call("step", step.name, digest, make, may_repeat=step.idempotent))

    async def _make_call(
        self, step: Step, info: CallInfo, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Outcome:
        """Call the function, and return its outcome. Changes of the state apply once it is recorded."""
        context = CallContext(self._context, info.idempotency_key, info.call_id)
        try:
            with user_code(step.error):
                value = await self._execute(step, context, args, kwargs)
                stored = step.encoded(value)
                state, artifacts = context.stored_changes(f"step {step.name!r}")
        except OpenAgentsError as error:
            return self._failed(step, info, error)
        payload = {"name": step.name, "call_id": info.call_id, "result": self._writer.preview(stored)}
        return Outcome(
            value=stored,
            state=state,
            artifacts=artifacts,
            events=[("step.succeeded", payload)],
            is_stored_form=True,
        )

    def _emit_started(self, step: Step, info: CallInfo, arguments: Mapping[str, Any]) -> None:
        """Emit `step.started` and, for a function that must not be repeated, a warning once per attempt."""
        params = self._writer.preview(arguments)
        self._writer.emit("step.started", {"name": step.name, "params": params, "call_id": info.call_id})
        if not step.idempotent and step.name not in self._warned:
            self._warned.add(step.name)
            warning = {"run_id": self._context.run_id, "tool_id": step.name, "hint": ONCE_HINT}
            self._writer.emit("run.durable_idempotency_warning", warning)

    async def _execute(
        self, step: Step, context: CallContext, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        def own(value: Any) -> Any:
            return context if isinstance(value, AttemptContext | CallContext) else value

        call = partial(step.function, *map(own, args), **{name: own(value) for name, value in kwargs.items()})
        timer = asyncio.timeout(step.timeout_s)
        try:
            async with timer:
                with writing_to(context):
                    return await cancelling_itself_only(self._call(step, call))
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise StepTimeoutError(f"step {step.name!r} took longer than {step.timeout_s} s") from error

    async def _call(self, step: Step, call: partial[Any]) -> Any:
        """Call an async function on the event loop, and any other one in a thread."""
        if is_async(step.function):
            return await call()
        value = await self._offload.in_thread(call)
        return await value if inspect.isawaitable(value) else value

    def _failed(self, step: Step, info: CallInfo, error: OpenAgentsError) -> Outcome:
        """The outcome of a failed call, with its log line and event."""
        raised, fields_ = user_error_of(error), described_in_log(error)
        payload = {
            "name": step.name,
            "call_id": info.call_id,
            "error": safe_message(str(error), MAX_MESSAGE_CHARS),
            **fields_,
            "type": type(raised or error).__name__,
            "error_details": ErrorDetails.from_exception(error).model_dump(exclude_none=True),
        }
        log.warning(
            "step.failed",
            run_id=self._context.run_id,
            agent_id=self._context.agent_id,
            name=step.name,
            call_id=info.call_id,
            **fields_,
            user_error=raised,
        )
        # A retryable error does not repeat a call whose side effects may already have happened.
        return Outcome(error=error, events=[("step.failed", payload)], may_retry=step.idempotent)


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function, or an object with `__call__`, is async."""
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(type(function), "__call__", None)  # noqa: B004  # the method itself is asked for
    )


def _unwrapped(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


# --- types -----------------------------------------------------------------------------------------------


def _return_type(function: Any, name: str) -> Any:
    """The declared type of the result, `Any` without one. Raises `StepFailed` if it cannot be read."""
    function = _unwrapped(function)
    if not hasattr(function, "__annotations__"):
        function = getattr(type(function), "__call__", function)  # noqa: B004  # as above
    declared = (getattr(function, "__annotations__", None) or {}).get("return", Any)
    if isinstance(declared, str):
        holder = SimpleNamespace(__annotations__={"return": declared})
        try:
            declared = get_type_hints(
                holder, globalns=getattr(inspect.unwrap(function), "__globals__", {}), include_extras=True
            )["return"]
        except Exception as error:
            raise StepFailed(
                f"step {name!r}: the type of its result cannot be read: {error}",
                hint="import the type at module level, or pass it as result_type of context.recorded",
            ) from error
    if get_origin(declared) in _AWAITABLE:  # a function that returns a coroutine
        return get_args(declared)[-1] if get_args(declared) else Any
    return declared


_AWAITABLE = (Awaitable, Coroutine)


def _adapter(declared: Any, name: str) -> TypeAdapter[Any] | None:
    if declared is Any or declared is inspect.Signature.empty:
        return None
    try:
        return _cached_adapter(declared) if isinstance(declared, Hashable) else TypeAdapter(declared)
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        raise StepFailed(
            f"step {name!r}: its result type {declared!r} has no JSON form", hint=TYPES_HINT
        ) from error


@lru_cache(maxsize=512)
def _cached_adapter(declared: Any) -> TypeAdapter[Any]:
    return TypeAdapter(declared)


def _ordered(value: Any, levels: int) -> Any:
    """A value as plain JSON, the same in every process: the elements of a set are sorted."""
    if value is None or isinstance(value, str | bool | int | float):
        return to_plain_json(value)
    if levels == 0:
        raise NestedTooDeeply(f"more than {MAX_NESTING} levels")
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields} | (value.model_extra or {})
    elif is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): _ordered(item, levels - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_ordered(item, levels - 1) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_ordered(item, levels - 1) for item in value), key=canonical_json)
    return to_plain_json(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else canonical_json(to_plain_json(key))
