"""Steps: the only place that converts arguments and results of recorded functions to JSON and back.

The program gets every result as it is read from the journal, also the first time, so that a later attempt
sees the same value.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic_core import PydanticSerializationError

from openagents_worker.errors import StepFailed
from openagents_worker.jsontext import (
    LARGEST_COUNT,
    MAX_NESTING,
    NestedTooDeeply,
    canonical_json,
    dumps,
    replaced,
)
from openagents_worker.runtime.context import AttemptContext, CallContext
from openagents_worker.runtime.storable import too_deep
from openagents_worker.tools.typed import JSON_FORMS, to_plain_json

__all__ = ["Step", "unwrapped"]


MAX_NAME_CHARS = 200
MAX_ARGUMENT_CONTAINERS = 100_000
"""The most lists and objects in one argument; converting them takes the event loop up to 200 ms. Ten texts or
numbers count as one list. A list that occurs twice counts twice, as in its JSON."""
CONTAINER_SIZE = 10  # values
MAX_PROBLEMS = 3  # of a result that does not match its type, in the error
TYPES_HINT = "use JSON values, dataclasses, pydantic models, dates, or result_type"
NOT_JSON = (PydanticSerializationError, ValueError, TypeError, RecursionError)
BY_ALIAS: dict[str, Any] = {}
BY_ANY_NAME: dict[str, Any] = (
    {"by_alias": True, "by_name": True}
    if "by_name" in inspect.signature(TypeAdapter.validate_json).parameters
    else {}  # pydantic before 2.11
)
"""Results are read by the names of their fields too: an alias may be for reading only."""


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
            name = str(getattr(unwrapped(function), "__name__", type(function).__name__))
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
            return _ordered(value, MAX_NESTING, [MAX_ARGUMENT_CONTAINERS * CONTAINER_SIZE])
        except (NestedTooDeeply, *NOT_JSON) as error:
            raise StepFailed(
                f"step {self.name!r}: the argument {name} is not JSON: {error}",
                hint="pass JSON values, dataclasses or pydantic models; bind clients with functools.partial, "
                "or take them from context.deps",
            ) from error

    # --- results -----------------------------------------------------------------------------------------

    def encoded(self, value: Any) -> Any:
        """The result as plain JSON, from which the same value is read.

        Raises `StepFailed` or `StepTooDeep` if it cannot be stored and read.
        """
        if isinstance(value, Iterator):
            raise StepFailed(f"step {self.name!r} returned an iterator", hint="return a list")
        try:
            if self.type is None:
                return to_plain_json(value)
            value = self.type.validate_python(value)
            return self._readable_form(value, self.type)
        except NestedTooDeeply as error:
            raise too_deep(f"the result of step {self.name!r}", error) from error
        except ValidationError as error:
            raise self._mismatch(error, "returned a value that does not match its type") from error
        except NOT_JSON as error:
            raise StepFailed(
                f"the result of step {self.name!r} is not JSON: {error}", hint=TYPES_HINT
            ) from error

    def _readable_form(self, value: Any, type_: TypeAdapter[Any]) -> Any:
        """The value in the first form that is read as an equal value, or as one that is written alike; else
        in the first that can be read.

        Preferred is one that versions that read by alias only can read.
        """
        readable: list[Any] = []
        problem: StepFailed | None = None
        for names in (BY_ALIAS, BY_ANY_NAME):
            for form, stored in _forms(value, type_):
                try:
                    read = self._read(stored, type_, names)
                except StepFailed as error:
                    problem = problem or error
                    continue
                if _is_equal(read, value) or _written(read, type_, form) == stored:
                    return stored
                readable.append(stored)
        if not readable:
            assert problem is not None
            raise problem
        return readable[0]

    def decoded(self, stored: Any) -> Any:
        """The result for the program. Raises `StepFailed` if the JSON does not match the type."""
        return stored if self.type is None else self._read(stored, self.type, BY_ANY_NAME)

    def _read(self, stored: Any, type_: TypeAdapter[Any], names: Mapping[str, Any]) -> Any:
        try:
            return type_.validate_json(dumps(stored), **names)
        except ValidationError as error:
            raise self._mismatch(error, "has a result that cannot be read back from JSON") from error

    def _mismatch(self, error: ValidationError, what: str) -> StepFailed:
        problems = error.errors(include_url=False, include_input=False, include_context=False)[:MAX_PROBLEMS]
        found = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'value'}: {each['msg']}" for each in problems)
        return StepFailed(f"step {self.name!r} {what}: {found}", hint=TYPES_HINT)


# --- types -----------------------------------------------------------------------------------------------


def _return_type(function: Any, name: str) -> Any:
    """The declared type of the result, `Any` without one. Raises `StepFailed` if it cannot be read."""
    function = unwrapped(function)
    if not (inspect.isroutine(function) or hasattr(function, "__wrapped__")):  # an object that can be called
        function = getattr(type(function), "__call__", function)  # noqa: B004  # as above
    declared = (getattr(function, "__annotations__", None) or {}).get("return", Any)
    if not isinstance(declared, type) or get_origin(declared) is not None:  # it may hold names as text
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
        adapter = _cached_adapter(declared) if _is_hashable(declared) else _new_adapter(declared)
    except (PydanticSchemaGenerationError, PydanticUserError, NameError) as error:
        raise StepFailed(
            f"step {name!r}: its result type {declared!r} has no JSON form", hint=TYPES_HINT
        ) from error
    if adapter is None:
        raise StepFailed(
            f"step {name!r}: its result type {declared!r} contains a secret, which is not stored",
            hint="read the secret where it is used; a step returns what may be stored",
        )
    return adapter


def _new_adapter(declared: Any) -> TypeAdapter[Any] | None:
    """The adapter of a type. None: it contains one of pydantic's secrets, whose JSON is asterisks."""
    adapter: TypeAdapter[Any] = TypeAdapter(declared)
    _ = adapter.validator.title  # raises PydanticUserError for a type that refers to an unknown one
    return None if "pydantic.types.Secret" in str(adapter.core_schema) else adapter


_cached_adapter = lru_cache(maxsize=512)(_new_adapter)


def _forms(value: Any, type_: TypeAdapter[Any]) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """The options and the plain JSON of the different forms of a value. Usually the first one is taken."""
    forms: list[Any] = []
    for form in JSON_FORMS:
        stored = _written(value, type_, form)
        if stored not in forms:
            forms.append(stored)
            yield form, stored


def _written(value: Any, type_: TypeAdapter[Any], form: Mapping[str, Any]) -> Any:
    return to_plain_json(type_.dump_python(value, mode="json", **form))


def _is_hashable(declared: Any) -> bool:
    try:
        hash(declared)
    except TypeError:  # `Annotated` with a dict
        return False
    return True


def _is_equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - the class of a result may compare in its own way
        return False


def _ordered(value: Any, levels: int, left: list[int]) -> Any:
    """A value as plain JSON, the same in every process: the elements of a set are sorted.

    `left` holds the size that it may still have. Raises `NestedTooDeeply`, ValueError and others.
    """
    kind = type(value)
    left[0] -= 1
    if value is None or kind is bool or (kind is int and -LARGEST_COUNT < value < LARGEST_COUNT):
        return value
    if kind is str or kind is float:
        return replaced(value)
    left[0] -= CONTAINER_SIZE
    if left[0] < 0:
        raise ValueError(f"it is too large: at most {MAX_ARGUMENT_CONTAINERS:,} lists and objects")
    if levels == 0:
        raise NestedTooDeeply(f"more than {MAX_NESTING} levels")
    if isinstance(value, list | tuple):
        return [_ordered(item, levels - 1, left) for item in value]
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields} | (value.model_extra or {})
    elif is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {_key(key): _ordered(item, levels - 1, left) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_ordered(item, levels - 1, left) for item in value), key=canonical_json)
    return to_plain_json(value)


def _key(key: Any) -> str:
    return key if isinstance(key, str) else canonical_json(to_plain_json(key))


def unwrapped(function: Any) -> Any:
    """The function inside of `functools.partial`."""
    while isinstance(function, partial):
        function = function.func
    return function
