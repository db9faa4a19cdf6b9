"""Functions as tools: the only place that converts a signature and a docstring to a tool.

```python
@tool
async def refund(order_id: str, cents: int, context: ToolContext) -> dict[str, Any]:
    \"\"\"Pays an order back.

    Args:
        order_id: The order, as printed on the invoice.
        cents: How much, at most what was paid.
    \"\"\"
```
In the agents file: `{"id": "refund", "impl": "shop.tools.refund"}`.
"""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from functools import partial, update_wrapper
from itertools import islice
from types import SimpleNamespace
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    ParamSpec,
    TypeVar,
    cast,
    get_args,
    get_type_hints,
    overload,
)

from pydantic import BaseModel, Field, create_model
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from pydantic.fields import FieldInfo

from openagents_worker.errors import PluginConfigError
from openagents_worker.tools.base import Reconciled, ToolContext, ToolExecutionSpec
from openagents_worker.tools.offload import importable
from openagents_worker.tools.streaming import streamed_result
from openagents_worker.tools.typed import MAX_ITERATED, TypedTool, parse_arguments, plain_json

__all__ = ["DecoratedFunction", "FunctionTool", "tool"]

MAX_UNSEEN_CHARS = 1024 * 1024  # of the result of a streaming function that is called outside of a run

P = ParamSpec("P")
R = TypeVar("R")

ApprovalCheck = Callable[[dict[str, Any], ToolContext], bool]
"""Says whether a call with these arguments needs an approval."""

Reconcile = Callable[[dict[str, Any], str, ToolContext | None], Awaitable[Reconciled]]
"""Finds out whether an interrupted call had its effect: see `ToolPlugin.reconcile`."""


class FunctionTool(TypedTool):
    """A tool made from a function. A function that is not async never runs on the event loop: it runs in a
    thread or, if it is CPU-bound, in another process."""

    run_sync: Callable[..., Awaitable[Any]]
    """Runs `(function, **arguments)` off the event loop. A worker sets its own threads or processes here.

    The function cannot be stopped: after a timeout or a cancellation it continues, and its result is dropped.
    """

    def __init__(self, decorated: DecoratedFunction[..., Any], config: dict[str, Any] | None = None) -> None:
        super().__init__(config)
        self.run_sync = asyncio.to_thread
        self._function = decorated.function
        self._context_name = decorated.context_name
        self._execution_spec = decorated.spec
        self.name = decorated.tool_name
        self.description = decorated.description
        self.durable_idempotent = decorated.durable_idempotent
        self.Params = decorated.params
        self._reconcile = decorated.reconcile
        self._approval = decorated.approval

    def execution_spec(self) -> ToolExecutionSpec:
        return self._execution_spec

    @property
    def has_approval_check(self) -> bool:
        """Whether a function decides for each call if it needs an approval."""
        return self._approval is not None

    def requires_approval(self, params: dict[str, Any], context: ToolContext | None) -> bool:
        if self._approval is None:
            return super().requires_approval(params, context)
        return self._approval(params, cast(ToolContext, context))

    async def reconcile(
        self, params: dict[str, Any], idempotency_key: str, context: ToolContext | None
    ) -> Reconciled:
        if self._reconcile is None:
            return Reconciled.unknown()
        return await self._reconcile(params, idempotency_key, context)

    async def invoke_stream(self, params: dict[str, Any], context: ToolContext | None) -> AsyncIterator[Any]:
        """What the function yields, if it is an async generator; else its result alone."""
        if not self._execution_spec.supports_streaming:
            yield {"type": "result", "data": await self.invoke(params, context)}
            return
        arguments = self._arguments(parse_arguments(self.Params, params, self.tool_name), context)
        async with aclosing(self._function(**arguments)) as pieces:
            async for piece in pieces:
                yield piece

    def _arguments(self, args: BaseModel, context: ToolContext | None) -> dict[str, Any]:
        fields = type(args).model_fields
        arguments = {str(field.alias): getattr(args, name) for name, field in fields.items()}
        if self._context_name is not None:
            arguments[self._context_name] = context
        return arguments

    async def run(self, args: BaseModel, context: ToolContext | None) -> Any:
        arguments = self._arguments(args, context)
        if self._execution_spec.supports_streaming:
            return await streamed_result(
                self._function(**arguments), _unseen, tool_name=self.tool_name, max_chars=MAX_UNSEEN_CHARS
            )
        if inspect.iscoroutinefunction(self._function):
            return await self._function(**arguments)
        if self._execution_spec.cpu_bound:
            return await self.run_sync(self._function, **arguments)
        result = await self.run_sync(partial(_call, self._function, self.tool_name), **arguments)
        return await result if inspect.isawaitable(result) else result


def _call(function: Callable[..., Any], tool_name: str, /, **arguments: Any) -> Any:
    """The result of a function as plain JSON. If it is a generator, its code is executed here as well."""
    result = function(**arguments)
    if inspect.isawaitable(result):
        return result
    if isinstance(result, Iterator):
        result = iter(list(islice(result, MAX_ITERATED + 1)))
    return plain_json(result, tool_name)


async def _unseen(text: str) -> None:
    """Nobody watches a call outside of a run."""


class DecoratedFunction(Generic[P, R]):
    """The result of `@tool`: callable like the function, and a factory of its tool.

    `shop.refund("A17", 500)` calls the function, for example in a unit test. `shop.refund(config={})` creates
    the tool; this is how the agents file is loaded.
    """

    __name__: str

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None,
        description: str | None,
        durable_idempotent: bool,
        spec: ToolExecutionSpec,
        reconcile: Reconcile | None = None,
        approval: ApprovalCheck | None = None,
    ) -> None:
        update_wrapper(self, function)
        self.function = function
        self.tool_name = name or _name_of(function)
        self.description = description or _first_paragraph(function)
        self.durable_idempotent = durable_idempotent
        self.spec = spec
        self.reconcile = reconcile
        self.approval = approval
        self.context_name, self.params = _parameters(function, self.tool_name)
        if reconcile is not None and durable_idempotent:
            raise PluginConfigError(
                f"reconcile of the tool {self.tool_name!r} would never be called: its calls may be repeated",
                hint="set durable_idempotent=False, if the effect of a call is visible to others",
            )
        if spec.cpu_bound:
            _check_cpu_bound(function, self.tool_name, self.context_name)
        if not self.description:
            raise PluginConfigError(
                f"the tool {self.tool_name!r} has no description",
                hint="write a docstring; the model gets its first paragraph as the description of the tool",
            )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not args and kwargs.keys() == {"config"}:
            return cast(R, self.build(cast("dict[str, Any] | None", kwargs["config"])))
        return self.function(*args, **kwargs)

    def build(self, config: dict[str, Any] | None = None) -> FunctionTool:
        """Create the tool of this function. Raises `PluginConfigError` for a config that is not empty."""
        return FunctionTool(self, config)


@overload
def tool(function: Callable[P, R], /) -> DecoratedFunction[P, R]: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    durable_idempotent: bool = True,
    concurrency_safe: bool = False,
    timeout_ms: int | None = None,
    cpu_bound: bool = False,
    approval: Literal["always", "never"] | ApprovalCheck | None = None,
    reconcile: Reconcile | None = None,
) -> Callable[[Callable[P, R]], DecoratedFunction[P, R]]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    durable_idempotent: bool = True,
    concurrency_safe: bool = False,
    timeout_ms: int | None = None,
    cpu_bound: bool = False,
    approval: Literal["always", "never"] | ApprovalCheck | None = None,
    reconcile: Reconcile | None = None,
) -> Any:
    """Make a tool of a function: name, description and schema come from its signature and docstring.

    A parameter named `context` (or annotated with `ToolContext`) receives the run's context and is not an
    argument for the model. `durable_idempotent=False` means that the effect is visible to others, so a call
    with a lost outcome is not repeated without permission; `reconcile(params, idempotency_key, context)` may
    find out whether it had its effect (`ToolPlugin.reconcile`); it needs `durable_idempotent=False`. An async
    generator streams its output: each text that it yields is a `tool.delta` event, and the whole text is the
    result, unless it yields `{"type": "result", "data": …}`. `cpu_bound=True` runs the function in another
    process: it must be defined at the top level of a module, its arguments and its result are copied, and it
    gets no context. `approval`: whether each call waits until somebody approves it; a function
    `(params, context)` decides this for one call. Raises `PluginConfigError` for an unsupported signature.
    """

    if not (approval is None or approval in ("always", "never") or callable(approval)):
        raise PluginConfigError(
            f"approval cannot be {approval!r}",
            hint='it is "always", "never" or a function (params, context) -> bool',
        )

    def decorate(function: Callable[P, R]) -> DecoratedFunction[P, R]:
        return DecoratedFunction(
            function,
            name=name,
            description=description,
            durable_idempotent=durable_idempotent,
            spec=ToolExecutionSpec(
                concurrency_safe=concurrency_safe,
                default_timeout_ms=timeout_ms,
                cpu_bound=cpu_bound,
                supports_streaming=inspect.isasyncgenfunction(function),
                approval_mode=approval if isinstance(approval, str) else "inherit",
            ),
            reconcile=reconcile,
            approval=approval if callable(approval) else None,
        )

    return decorate if function is None else decorate(function)


def _declared(function: Callable[..., Any]) -> Callable[..., Any]:
    """What has the name, the docstring and the type hints: the function inside of `functools.partial`."""
    while isinstance(function, partial):
        function = function.func
    return function


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(_declared(function), "__name__", None)
    if not isinstance(name, str):
        raise PluginConfigError(
            f"a {type(function).__name__} has no name, which a tool needs", hint="use @tool(name=…)"
        )
    return name


def _check_cpu_bound(function: Callable[..., Any], tool_name: str, context_name: str | None) -> None:
    is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    is_importable = hasattr(function, "__qualname__") and importable(function)
    if is_async or context_name is not None or not is_importable:
        raise PluginConfigError(
            f"the tool {tool_name!r} cannot be CPU-bound",
            hint="such a function is not async, takes no context and is defined at the top level of a module",
        )


def _parameters(function: Callable[..., Any], tool_name: str) -> tuple[str | None, type[TypedTool.Params]]:
    """The name of the context parameter (None: there is none), and a model of all other parameters."""
    hints = _type_hints(function, tool_name)
    described = _described_arguments(function)
    context_name: str | None = None
    fields: dict[str, Any] = {}
    given = function.keywords if isinstance(function, partial) else {}
    for position, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if name in given:
            continue
        if (
            parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            or name == "config"
        ):
            raise PluginConfigError(
                f"the tool {tool_name!r} cannot have the parameter {parameter}",
                hint="parameters are passed by name; the name `config` is reserved for creating the tool",
            )
        hint = hints.get(name, Any)
        if name == "context" or hint is ToolContext or ToolContext in get_args(hint):
            context_name = name
            continue
        # The parameter's name is only the alias: a field with that name could hide a method of the model.
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[f"argument_{position}"] = (_with_alias(hint, name, described.get(name)), default)
    try:
        return context_name, create_model(tool_name, __base__=TypedTool.Params, **fields)
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        raise PluginConfigError(
            f"the tool {tool_name!r} has a parameter type that has no JSON Schema: {error}",
            hint="use str, int, float, bool, list, dict, Literal, an Enum, a dataclass or a pydantic model",
        ) from error


def _with_alias(hint: Any, name: str, description: str | None) -> Any:
    """The type with the parameter's name as alias. `description` is added unless the type has its own."""
    has_description = any(isinstance(part, FieldInfo) and part.description for part in get_args(hint))
    field = Field(alias=name) if has_description else Field(alias=name, description=description)
    return Annotated[hint, field]


def _type_hints(function: Callable[..., Any], tool_name: str) -> Mapping[str, Any]:
    declared = _declared(function)
    if not (inspect.isroutine(declared) or hasattr(declared, "__wrapped__")):  # an object that can be called
        declared = type(declared).__call__
    annotations = {
        k: v for k, v in inspect.get_annotations(declared).items() if k not in ("context", "return")
    }
    try:
        return get_type_hints(
            SimpleNamespace(__annotations__=annotations),
            # a decorator of another module has copied the hints, but not the names in them
            globalns=getattr(inspect.unwrap(declared), "__globals__", {}),
            include_extras=True,
        )
    except NameError as error:
        raise PluginConfigError(
            f"the tool {tool_name!r} has a type hint that cannot be read: {error}",
            hint="import the types of the parameters at module level, not under TYPE_CHECKING",
        ) from error


def _first_paragraph(function: Callable[..., Any]) -> str:
    return " ".join((inspect.getdoc(_declared(function)) or "").split("\n\n", 1)[0].split())


def _described_arguments(function: Callable[..., Any]) -> dict[str, str]:
    """The parameters' descriptions in the `Args:` section of a Google-style docstring."""
    section = re.search(
        r"^(?:Args|Arguments|Parameters):\n((?:[ \t]+.*\n?|\n)+)",
        inspect.getdoc(_declared(function)) or "",
        re.MULTILINE,
    )
    described: dict[str, str] = {}
    if section is None:
        return described
    lines = inspect.cleandoc(section[1]).splitlines()
    name = ""
    for line in lines:
        entry = re.match(r"(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line)
        if entry is not None:
            name = entry[1]
        text = entry[2] if entry is not None else line.strip()
        if name and text:
            described[name] = f"{described[name]} {text}" if name in described else text
    return described
