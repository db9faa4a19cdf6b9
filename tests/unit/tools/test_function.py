"""`@tool`: a function's signature and docstring define the tool."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import date
from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from openagents_worker.errors import ModelRetryError, PluginConfigError, ToolError, ToolValidationError
from openagents_worker.tools import ToolContext, tool
from openagents_worker.tools.base import Reconciled
from tests.unit.run_fakes import FakeRun, traced

REQUEST: ContextVar[str] = ContextVar("request")


class Address(BaseModel):
    street: str
    city: str = "Bremen"


@dataclass
class Receipt:
    order: str
    due: date


class Kind(Enum):
    ROOM = "room"


class Booking(BaseModel):
    model_config = ConfigDict(strict=True)

    first: date
    kind: Kind


@tool
async def refund(
    order_id: str, cents: int = 100, reason: Annotated[str, Field(description="Why.")] = ""
) -> str:
    """Pays an order back.

    The money is there the next day.

    Args:
        order_id: The order, as printed
            on the invoice.
        cents (int): How much.
        reason: Not this one.

    Returns:
        A receipt.
    """
    return f"{order_id}:{cents}:{reason}"


async def test_name_description_and_schema_come_from_the_function() -> None:
    """The first paragraph is the description; `Args:` describes the parameters without one of their own."""
    described = refund(config={}).describe()  # type: ignore[call-arg,attr-defined]

    assert described == {
        "name": "refund",
        "description": "Pays an order back.",
        "parameters": {
            "type": "object",
            "properties": {
                "order_id": {"type": "string", "description": "The order, as printed on the invoice."},
                "cents": {"type": "integer", "default": 100, "description": "How much."},
                "reason": {"type": "string", "default": "", "description": "Why."},
            },
            "required": ["order_id"],
            "additionalProperties": False,
        },
    }


async def test_the_function_stays_a_function() -> None:
    """A unit test calls it directly. Only a call with `config=` creates the tool, as the agents file does."""
    assert await refund("A17", 500) == "A17:500:"
    assert await refund.build().invoke({"order_id": "A17", "cents": "500"}, None) == "A17:500:"
    assert (refund.__name__, refund.__module__) == ("refund", __name__)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "order_id: Field required"),
        ({"order_id": "a", "cents": "many"}, "cents: Input should be a valid integer"),
        ({"order_id": "a", "cent": 1}, "cent: unknown argument"),
    ],
)
async def test_wrong_arguments_are_told_in_words_for_the_model(arguments: dict[str, Any], told: str) -> None:
    """The error names the argument and what was expected. Its hint lists all arguments."""
    with pytest.raises(ToolValidationError, match=told) as caught:
        await refund.build().invoke(arguments, None)
    assert caught.value.hint == "arguments of refund: order_id, cents, reason"


async def test_types_arrive_as_the_types_they_are() -> None:
    """Models, dates and literals are parsed before the function is called."""

    @tool(description="Sends.")
    async def send(to: Address, on: date, speed: Literal["slow", "fast"] = "slow") -> Any:
        return [type(to).__name__, on.year, to.city, speed]

    sent = await send.build().invoke({"to": {"street": "Am Wall"}, "on": "2024-03-31"}, None)

    assert sent == ["Address", 2024, "Bremen", "slow"]


async def test_the_context_is_given_and_is_no_argument() -> None:
    """A parameter named `context`, or annotated with `ToolContext`, is not in the schema."""

    @tool(description="Tells the key.")
    def by_name(context):  # type: ignore[no-untyped-def]
        return context.idempotency_key

    @tool(description="Tells the key.")
    async def by_type(run: ToolContext | None) -> Any:
        return run and run.idempotency_key

    for made in (by_name.build(), by_type.build()):
        assert made.schema()["properties"] == {}
        assert await made.invoke({}, FakeRun()) == "r1:u1:2"


async def test_a_parameter_may_have_any_name() -> None:
    """Also names that pydantic uses itself."""

    @tool(description="Copies.")
    async def odd(schema: str, copy: bool, model_config: int, _hidden: int = 1) -> Any:
        return [schema, copy, model_config, _hidden]

    made = odd.build()

    assert list(made.schema()["properties"]) == ["schema", "copy", "model_config", "_hidden"]
    assert await made.invoke({"schema": "s", "copy": True, "model_config": 2}, None) == ["s", True, 2, 1]


async def test_a_sync_function_runs_in_a_thread_with_the_context_variables_of_its_run() -> None:
    """The event loop is not blocked, and tracing finds its context."""
    released = threading.Event()

    @tool(description="Waits for the loop.")
    def blocking() -> list[Any]:
        assert released.wait(60)
        return [REQUEST.get(), threading.current_thread() is threading.main_thread()]

    REQUEST.set("r1")
    running = asyncio.create_task(blocking.build().invoke({}, None))
    asyncio.get_running_loop().call_soon(released.set)

    assert await running == ["r1", False]


async def test_the_code_of_a_generator_does_not_run_on_the_event_loop() -> None:
    """Its values are the result. An exception in it is that of the tool."""

    @tool(description="Counts.")
    def counting(end: int) -> Iterator[bool]:
        for n in range(end):
            if n == 2:
                raise KeyError("two")
            yield threading.current_thread() is threading.main_thread()

    assert await counting.build().invoke({"end": 2}, None) == [False, False]
    with pytest.raises(KeyError, match="two"):
        await counting.build().invoke({"end": 3}, None)


async def test_a_decorated_function_has_the_types_of_its_own_module() -> None:
    """The decorator may be one of another module, where the names of the types mean nothing."""

    @tool
    @traced
    async def deliver(to: Address) -> str:
        """Delivers."""
        return to.street

    assert await deliver.build().invoke({"to": {"street": "Am Wall"}}, None) == "Am Wall"


async def test_a_part_of_a_function_is_a_tool() -> None:
    """With the name, the docstring and the types of the function. What was given is no argument."""

    def deliver(client: Any, to: Address, *, token: str) -> str:
        """Delivers.

        Args:
            to: Where to.
        """
        return f"{client} {to.street} {token}"

    made = tool(partial(deliver, "fast", token="t")).build()

    assert (made.name, made.description) == ("deliver", "Delivers.")
    assert made.schema()["properties"] == {"to": {"$ref": "#/$defs/Address", "description": "Where to."}}
    assert await made.invoke({"to": {"street": "Am Wall"}}, None) == "fast Am Wall t"


class Deliverer:
    """A client with a state of its own."""

    async def __call__(self, to: Address) -> str:
        return to.street


async def test_an_object_that_can_be_called_is_a_tool() -> None:
    """If it gets a name. Without one, the error says so."""
    made = tool(name="deliver", description="Delivers.")(Deliverer()).build()
    assert await made.invoke({"to": {"street": "Am Wall"}}, None) == "Am Wall"

    with pytest.raises(PluginConfigError, match="has no name") as caught:
        tool(Deliverer())
    assert "name=" in str(caught.value.hint)


async def test_a_strict_type_takes_what_json_has_for_it() -> None:
    """The arguments come from a model as JSON, in which a date is a text."""

    @tool(description="Books.")
    async def book(days: Booking) -> str:
        return f"{days.first:%d.%m.} {days.kind.name}"

    assert await book.build().invoke({"days": {"first": "2024-03-31", "kind": "room"}}, None) == "31.03. ROOM"
    with pytest.raises(ToolValidationError, match=r"days\.first"):
        await book.build().invoke({"days": {"first": "soon", "kind": "room"}}, None)


async def test_where_sync_functions_run_can_be_chosen() -> None:
    """A worker sets `run_sync` to use its own threads."""
    asked: list[Any] = []

    async def in_my_pool(function: Any, **arguments: Any) -> Any:
        asked.append(arguments)
        return function(**arguments)

    @tool(description="Doubles.")
    def double(n: int) -> int:
        return n * 2

    made = double.build()
    made.run_sync = in_my_pool

    assert await made.invoke({"n": 21}, None) == 42
    assert asked == [{"n": 21}]


async def test_results_become_plain_json() -> None:
    """Pydantic serializes dataclasses, models, dates and tuples."""

    @tool(description="Sells.")
    async def sell() -> Any:
        return {"receipt": Receipt("A17", date(2024, 3, 31)), "to": Address(street="Am Wall"), "pair": (1, 2)}

    assert await sell.build().invoke({}, None) == {
        "receipt": {"order": "A17", "due": "2024-03-31"},
        "to": {"street": "Am Wall", "city": "Bremen"},
        "pair": [1, 2],
    }


@pytest.mark.parametrize("result", [object(), {"x": lambda: 0}, {1, object()}])
async def test_a_result_that_is_not_json_is_an_error_of_the_tool(result: Any) -> None:
    """It is rejected when the tool returns, not when the run is stored."""

    @tool(description="Returns something odd.")
    async def odd() -> Any:
        return result

    with pytest.raises(ToolError, match="odd is not JSON"):
        await odd.build().invoke({}, None)


async def test_errors_of_the_function_keep_their_class() -> None:
    """`ModelRetryError` and other errors with codes are raised unchanged."""

    @tool(description="Asks again.")
    def picky(n: int) -> None:
        raise ModelRetryError("argument must be positive")

    with pytest.raises(ModelRetryError, match="must be positive"):
        await picky.build().invoke({"n": -1}, None)


def test_the_decorators_options_reach_the_runtime() -> None:
    """Name, idempotency, concurrency and timeout are the tool's own."""

    @tool(name="pay", durable_idempotent=False, concurrency_safe=True, timeout_ms=5)
    async def pay_out(cents: int) -> None:
        """Pays."""

    made = pay_out.build()
    spec = made.execution_spec()

    assert (made.name, made.durable_idempotent) == ("pay", False)
    assert (spec.concurrency_safe, spec.default_timeout_ms) == (True, 5)


def test_a_tool_that_no_model_could_use_is_refused_where_it_is_written() -> None:
    """No description, unnamed parameters, types without a schema: errors with a hint at import."""

    def silent(n: int) -> None: ...

    def many(*numbers: int) -> None:
        """Adds."""

    def configured(config: str) -> None:
        """Takes what the agents file needs."""

    def typed(lock: threading.Lock) -> None:
        """Locks."""

    for function in (silent, many, configured, typed):
        with pytest.raises(PluginConfigError, match=function.__name__) as caught:
            tool(function)
        assert caught.value.hint


async def _find(params: dict[str, Any], idempotency_key: str, context: Any) -> Reconciled:
    return Reconciled.unknown()


def test_reconcile_needs_a_tool_that_must_not_be_repeated() -> None:
    """It is asked only about calls that may not be made once more."""
    with pytest.raises(
        PluginConfigError, match="reconcile of the tool 'pay' would never be called"
    ) as caught:

        @tool(reconcile=_find)
        def pay(cents: int) -> None:
            """Pays."""

    assert "durable_idempotent=False" in str(caught.value.hint)


def test_a_type_that_is_not_there_at_run_time_is_named() -> None:
    """For a type hint that is imported only under TYPE_CHECKING, the error says where to import it."""

    def late(when: Nowhere) -> None:  # type: ignore[name-defined]  # noqa: F821
        """Comes late."""

    with pytest.raises(PluginConfigError, match="Nowhere") as caught:
        tool(late)
    assert "module level" in str(caught.value.hint)


def test_a_function_takes_no_config() -> None:
    """A setting that is never read is a mistake in the agents file."""
    with pytest.raises(PluginConfigError):
        refund.build({"currency": "EUR"})
