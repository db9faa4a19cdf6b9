"""Agents whose pattern is an async function: `context.call_llm`, `call_tool`, `step` and `recorded`."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import pytest
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    Json,
    PrivateAttr,
    SecretStr,
    computed_field,
)
from pydantic.alias_generators import to_camel

from openagents_worker import Agent, RunContext, StepFailed, ToolContext, tool
from openagents_worker.errors import OpenAgentsError, RetryableToolError, StepTimeoutError
from openagents_worker.jsontext import canonical_json
from openagents_worker.models import RunState, StopReason
from openagents_worker.runtime.calls.recorded_values import Step
from openagents_worker.runtime.runner import AttemptOutcome
from tests.runtime import unstorable
from tests.support.runner import Process, agent, calls, crash, due, process, scripted
from tests.support.waiting import await_for

HERE = "tests.runtime.test_functions"

MADE: list[str] = []
"""The calls of functions in the test, by name."""


@pytest.fixture(autouse=True)
def _from_zero() -> None:
    MADE.clear()


@dataclass
class Offer:
    shop: str
    seen_at: datetime


class Order(BaseModel):
    order_id: str
    offers: list[Offer]


async def look_up(order_id: str, *, shops: list[str]) -> Order:
    """Ask the shops."""
    MADE.append(f"look_up {order_id}")
    return Order(order_id=order_id, offers=[Offer(shop, datetime(2026, 1, 2, tzinfo=UTC)) for shop in shops])


def add(a: int, b: int = 1) -> int:
    MADE.append(f"add in {threading.current_thread() is threading.main_thread()}")
    return a + b


def search(query: str) -> str:
    """Finds things."""
    MADE.append(f"search {query}")
    return f"all about {query}"


async def ends(p: Process, **request: Any) -> Any:
    """The output of a run that completes."""
    await p.submit(**request)
    await p.execute()
    record = await p.record()
    assert record.state is RunState.COMPLETED, record.result
    assert record.result is not None
    return record.result.final_output


def a(pattern: Callable[[Any], Awaitable[Any]], **options: Any) -> Agent:
    """An agent with this pattern and a scripted model."""
    return Agent("a", pattern=pattern, **{"llm": scripted({"text": "hello"}), **options})


# --- model and tools -------------------------------------------------------------------------------------


async def researcher(context: RunContext) -> str:
    found = await context.call_tool("search", {"query": context.input_text})
    reply = await context.call_llm(f"Answer from this: {found}", tools=["search"])
    return f"{reply.output_text} ({len(reply.tool_calls)})"


@pytest.mark.parametrize("where", ["python", "json"])
async def test_a_function_is_a_pattern(redis_url: str, where: str) -> None:
    """In an agent in Python, and by its path in the agents file."""
    in_python = a(researcher, tools=[search])
    in_json = agent(
        pattern={"impl": f"{HERE}.researcher"},
        tools=[{"id": "search", "impl": f"{HERE}.search_tool"}],
        llm=scripted({"text": "hello"}),
    )
    async with process(redis_url, in_python if where == "python" else in_json) as p:
        assert await ends(p, input_text="tea") == "hello (0)"
        assert MADE == ["search tea"]
        names = await p.event_names()
        assert [names.count(name) for name in ("tool.called", "llm.succeeded", "run.completed")] == [1, 1, 1]


def search_tool(config: dict[str, Any]) -> Any:
    return tool(search).build(config)


async def test_call_llm_sends_system_prompt_history_and_memory(redis_url: str) -> None:
    """A text follows what a turn of a pattern sends; a list of messages is sent as it is."""
    sent: list[Any] = []

    async def talker(context: RunContext) -> str:
        listen(context, sent)
        await context.call_llm([{"role": "user", "content": "alone"}])
        return (await context.call_llm(context.input_text)).output_text

    async with process(redis_url, a(talker, system_prompt="Be kind.", llm="mock")) as p:
        await p.run("r0", input_text="first")
        await p.run("r1", input_text="second")

    assert sent[2] == [("user", "alone")]
    assert [role for role, _ in sent[3]] == ["system", "user", "assistant", "user"]
    assert sent[3][0][1] == "Be kind."
    assert sent[3][-1][1] == "second"


def listen(context: Any, sent: list[Any]) -> None:
    """Add roles and contents of the messages of each request to `sent`."""
    generate = context.llm_client.generate

    async def listening(**request: Any) -> Any:
        sent.append([(message["role"], message["content"]) for message in request["messages"]])
        return await generate(**request)

    context.llm_client.generate = listening


class Verdict(BaseModel):
    guilty: bool


@pytest.mark.parametrize(
    ("prompt", "roles"),
    [
        ("Guilty?", ["user"]),
        ([{"role": "user", "content": "Guilty?"}], ["user"]),
        ([{"role": "user", "content": [{"type": "text", "text": "Guilty?"}]}], ["user", "user"]),
        ([{"role": "user", "content": "He did it."}, {"role": "assistant", "content": "?"}],
         ["user", "assistant", "user"]),
    ],
)  # fmt: skip
async def test_call_llm_says_which_json_it_wants(redis_url: str, prompt: Any, roles: list[str]) -> None:
    """Also to a model whose provider takes no schema."""
    sent: list[Any] = []

    async def judge(context: RunContext) -> bool:
        listen(context, sent)
        reply = await context.call_llm(prompt, output_type=Verdict)
        return bool(reply.structured_output.guilty)

    async with process(redis_url, a(judge, llm=scripted({"text": '{"guilty": true}'}))) as p:
        assert await ends(p) is True
    assert [role for role, _ in sent[0]] == roles
    assert '"guilty"' in sent[0][-1][1]
    assert "JSON Schema" in sent[0][-1][1]


async def test_call_llm_corrects_a_reply_that_does_not_match_its_type(redis_url: str) -> None:
    """The model gets the reason, as for the output of a run."""

    async def judge(context: RunContext) -> bool:
        reply = await context.call_llm("Guilty?", output_type=Verdict)
        assert isinstance(reply.structured_output, Verdict)
        return reply.structured_output.guilty

    script = scripted({"text": "maybe"}, {"text": '```json\n{"guilty": true}\n```'})
    async with process(redis_url, a(judge, llm=script)) as p:
        assert await ends(p) is True
        events = [event for event in await p.events() if event["name"] == "validation.retry"]
        assert len(events) == 1


async def test_the_corrections_of_call_llm_are_limited(redis_url: str) -> None:
    """Like those of the output."""

    async def judge(context: RunContext) -> Any:
        return (await context.call_llm("Guilty?", output_type=Verdict)).structured_output

    async with process(redis_url, a(judge, llm=scripted(*[{"text": "maybe"}] * 9))) as p:
        record = await p.run(budget={"max_validation_retries": 1})
        assert record.result is not None
        assert record.result.error_details.code == "execution.output_validation"  # type: ignore[union-attr]
        assert record.usage.llm_calls == 2


async def test_max_steps_limits_the_model_calls_of_a_function(redis_url: str) -> None:
    """Each `call_llm` is a step, so a loop without an end has one."""

    async def endless(context: RunContext) -> None:
        while True:
            await context.call_llm("Go on.")

    async with process(redis_url, a(endless, llm="mock", runtime={"max_steps": 3})) as p:
        record = await p.run()
        assert record.result is not None
        assert record.result.stop_reason is StopReason.MAX_STEPS
        assert record.usage.llm_calls == 3


async def test_p11_step_timeout_ms_limits_each_model_call_of_a_function(redis_url: str) -> None:
    """P11: the call is cancelled, and made again later."""

    async def asks(context: RunContext) -> str:
        return (await context.call_llm("Go on.")).output_text

    slow = {**scripted({"text": "hello"}), "latency_ms": 600_000}
    async with process(redis_url, a(asks, llm=slow, runtime={"step_timeout_ms": 100})) as p:
        await p.submit()
        result = await p.execute()
        assert (result.kind, result.reason) == (AttemptOutcome.SUSPENDED, StepTimeoutError.code)


async def test_unknown_tools_and_options_are_named_with_a_suggestion(redis_url: str) -> None:
    """Nothing is sent to a model."""

    async def mistaken(context: RunContext) -> list[str]:
        told = []
        for call in (
            context.call_tool("serch"),
            context.call_llm("x", tools=["serch"]),
            context.call_llm("x", temprature=1),
            context.call_llm("x", output_type="Verdict"),
        ):
            with pytest.raises(Exception, match=r"search|temperature|pydantic") as caught:
                await call
            told.append(type(caught.value).__name__)
        return told

    async with process(redis_url, a(mistaken, tools=[search])) as p:
        assert await ends(p) == ["ToolNotFoundError", "ToolNotFoundError", "TypeError", "TypeError"]


async def test_the_output_of_a_function_is_validated(redis_url: str) -> None:
    """The model corrects it, as the output of any pattern."""

    async def judge(context: RunContext) -> str:
        return "maybe"

    async with process(redis_url, a(judge, llm=scripted({"text": '{"guilty": false}'}))) as p:
        output = await ends(p, output_type=Verdict.model_json_schema())
        assert output == {"guilty": False}


async def test_a_budget_ends_a_function_that_catches_its_error(redis_url: str) -> None:
    """B05: budget errors are never swallowed."""

    async def stubborn(context: RunContext) -> str:
        for _ in range(3):
            with suppress(Exception):
                await context.call_tool("search", {"query": "x"})
        return "done"

    async with process(redis_url, a(stubborn, tools=[search])) as p:
        record = await p.run(budget={"max_tool_calls": 1})
        assert record.result is not None
        assert record.result.stop_reason is StopReason.MAX_STEPS
        assert MADE == ["search x"]


# --- steps -----------------------------------------------------------------------------------------------


async def test_a_step_gives_values_of_the_declared_types(redis_url: str) -> None:
    """Models, dataclasses and dates cross the journal as JSON. A sync function runs in a thread."""

    async def buyer(context: RunContext) -> list[Any]:
        order = await context.step("look up", look_up, "A17", shops=["north"])
        assert isinstance(order, Order)
        assert order.offers[0] == Offer("north", datetime(2026, 1, 2, tzinfo=UTC))
        total = await context.step("add", add, 2)
        plain = await context.step("plain", lambda: {"at": datetime(2026, 1, 2, tzinfo=UTC)})
        return [total, plain]

    async with process(redis_url, a(buyer)) as p:
        assert await ends(p) == [3, {"at": "2026-01-02T00:00:00Z"}]
        assert MADE == ["look_up A17", "add in False"]
        steps = [record for record in await p.journal() if record.get("kind") == "step"]
        assert [record["name"] for record in steps] == ["look up", "add", "plain"]
        events = [event for event in await p.events() if event["name"].startswith("step.")]
        assert events[2]["payload"]["params"] == {"a": 2}
        assert events[3]["payload"]["result"] == 3
        assert [(event["name"], event["payload"]["name"]) for event in events] == [
            (f"step.{end}", name) for name in ("look up", "add", "plain") for end in ("started", "succeeded")
        ]


async def test_a_finished_step_is_not_called_again(redis_url: str) -> None:
    """Another worker continues after a crash, with the same values and the same state."""
    hold = asyncio.Event()

    async def buyer(context: RunContext) -> list[Any]:
        order = await context.step("look up", look_up, "A17", shops=["north"])

        def remember() -> None:
            context.state["order"] = order.order_id
            context.add_artifact("order", payload=order.order_id)

        await context.step("remember", remember)
        note = await context.step("note", noted, context, "x")
        await hold.wait()
        return [order.offers[0].shop, note, context.state["order"], context.state["note"]]

    async with process(redis_url, a(buyer), name="w1") as p, process(redis_url, a(buyer), name="w2") as other:
        await p.submit()
        executing = asyncio.create_task(p.execute())
        await await_for(lambda: _has_steps(p, 3), "three steps are recorded")
        await crash(p, "r1", executing)
        hold.set()
        await other.execute()
        record = await other.record()

    assert record.result is not None
    assert record.result.final_output == ["north", "noted x", "A17", "x"]
    assert [artifact.name for artifact in record.result.artifacts] == ["order"]
    assert MADE == ["look_up A17", "noted x"]


async def noted(context: Any, text: str) -> str:
    MADE.append(f"noted {text}")
    assert context.idempotency_key
    context.state["note"] = text
    return f"noted {text}"


async def _has_steps(p: Process, number: int) -> bool:
    return sum(record.get("kind") == "step" for record in await p.journal()) >= number


async def test_a_retryable_error_of_a_step_suspends_the_run(redis_url: str) -> None:
    """The step is called again when the run is due. Finished steps are not."""

    async def flaky() -> str:
        MADE.append("flaky")
        if MADE.count("flaky") == 1:
            raise RetryableToolError("come back later")
        return "there"

    async def patient(context: RunContext) -> str:
        await context.step("add", add, 1)
        return await context.step("flaky", flaky)

    async with process(redis_url, a(patient)) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        await due(p)
        await p.execute()
        assert (await p.record()).state is RunState.COMPLETED
        assert MADE == ["add in False", "flaky", "flaky"]


async def test_a_function_that_is_not_idempotent_is_not_repeated(redis_url: str) -> None:
    """Its retryable error is its outcome."""

    async def charge() -> None:
        MADE.append("charge")
        raise RetryableToolError("nobody knows")

    async def seller(context: RunContext) -> str:
        with pytest.raises(RetryableToolError):
            await context.recorded(charge, idempotent=False)()
        return "not sold"

    async with process(redis_url, a(seller)) as p:
        assert await ends(p) == "not sold"
        assert MADE == ["charge"]
        assert "run.durable_idempotency_warning" in await p.event_names()


async def test_a_step_that_takes_too_long_is_cancelled_and_retried(redis_url: str) -> None:
    """P11: the function does not go on in the background."""
    ended = []

    async def dawdle() -> str:
        MADE.append("dawdle")
        if len(MADE) > 1:
            return "done"
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)
        raise AssertionError

    async def waiter(context: RunContext) -> str:
        return await context.recorded(dawdle, timeout=0.05)()

    async with process(redis_url, a(waiter)) as p:
        await p.submit()
        result = await p.execute()
        assert (result.kind, result.reason) == (AttemptOutcome.SUSPENDED, StepTimeoutError.code)
        assert ended == [True]
        await due(p)
        await p.execute()
        assert (await p.record()).state is RunState.COMPLETED


async def test_an_exception_of_a_step_is_step_failed_with_its_traceback(redis_url: str) -> None:
    """The program can catch it; otherwise the run fails with it."""

    def broken() -> None:
        raise ValueError("bad luck")

    async def careful(context: RunContext) -> None:
        with pytest.raises(StepFailed, match="bad luck"):
            await context.step("try", broken)
        await context.step("again", broken)

    async with process(redis_url, a(careful)) as p:
        record = await p.run()
        assert record.result is not None
        details = record.result.error_details
        assert details is not None
        assert details.code == "step.failed"
        assert details.message == "step 'again': ValueError: bad luck"
        assert "broken" in (details.traceback or "")
        [first, _] = [event["payload"] for event in await p.events() if event["name"] == "step.failed"]
        assert (first["name"], first["code"], first["type"]) == ("try", "step.failed", "ValueError")


async def test_what_cannot_be_recorded_is_named(redis_url: str) -> None:
    """The argument, the result, the type: what it is, and what would be right."""

    def unlisted(value: Any) -> Any:
        MADE.append("called")

    def typed() -> threading.Thread:
        MADE.append("called")
        return threading.current_thread()

    def lies() -> int:
        return "many"  # type: ignore[return-value]

    def secret() -> list[SecretStr]:
        MADE.append("called")
        return []

    twice: list[Any] = []
    for _ in range(60):
        twice = [twice, twice]

    def local() -> Missing:  # type: ignore[name-defined]  # noqa: F821
        MADE.append("called")

    async def mistaken(context: RunContext) -> list[str]:
        told = []
        for step in (
            lambda: context.step("s", unlisted, object()),
            lambda: context.step("s", typed),
            lambda: context.step("s", local),
            lambda: context.step("s", secret),
            lambda: context.step("s", unlisted, twice),
            lambda: context.step("", unlisted, 1),
            lambda: context.step("s", 5),  # type: ignore[call-overload]
            lambda: context.recorded(unlisted, timeout=0)(1),
            lambda: context.step("s", lambda: iter([1])),
            lambda: context.step("s", lies),
            lambda: context.step("s", object),
        ):
            with pytest.raises(StepFailed) as caught:
                await step()
            told.append(caught.value.message)
        with pytest.raises(TypeError, match="step 's': missing a required argument: 'value'"):
            await context.step("s", unlisted)  # type: ignore[call-overload]
        return told

    async with process(redis_url, a(mistaken)) as p:
        told = await ends(p)
    for text, expected in zip(
        told,
        (
            "step 's': the argument value is not JSON",
            "Thread'> has no JSON form",
            "step 's': the type of its result cannot be read: name 'Missing' is not defined",
            "contains a secret, which is not stored",
            "the argument value is not JSON: it is too large: at most 100,000 lists and objects",
            "a step cannot have the name ''",
            "a int is not a function",
            "its timeout must be more than 0 seconds",
            "step 's' returned an iterator",
            "step 's' returned a value that does not match its type: value: Input should be a valid integer",
            "the result of step 's' is not JSON",
        ),
        strict=True,
    ):
        assert expected in text
    assert MADE == []


@pytest.mark.parametrize("where", ["result", "argument", "state"])
async def test_a_value_that_cannot_be_stored_is_the_error_of_its_step(redis_url: str, where: str) -> None:
    """Whatever it is. What JSON can show in another way is stored like this; the program continues."""

    async def program(context: RunContext) -> dict[str, str]:
        def keep(name: str, value: Any) -> None:
            context.state[name] = value

        ends = {}
        for name, make in unstorable.VALUES.items():
            try:
                if where == "result":
                    await context.step("make", make)
                elif where == "argument":
                    await context.step("take", unordered, make())
                else:
                    await context.step("keep", partial(keep, name, make()))
            except OpenAgentsError as error:
                ends[name] = error.code
        return ends

    async with process(redis_url, a(program)) as p:
        codes = await ends(p)
        stored = {record["name"] for record in await p.journal() if record.get("kind") == "step"}
    kinds = {"result": "make", "argument": "take", "state": "keep"}
    assert stored == {kinds[where]}
    shown = {*unstorable.REPLACED, "a key that is not a text", "bytes", "a model that cannot be serialised"}
    assert set(unstorable.VALUES) - shown <= set(codes)
    assert set(codes.values()) <= {"step.failed", "step.too_deep", "step.too_large"}


async def test_a_recorded_function_keeps_its_signature_and_docstring(redis_url: str) -> None:
    """Frameworks read the schema of a tool from them."""

    async def wrapping(context: RunContext) -> list[str]:
        recorded = context.recorded(look_up)
        assert inspect.iscoroutinefunction(recorded)
        assert inspect.signature(recorded) == inspect.signature(look_up)
        order = await recorded("A1", shops=[])
        more = await context.recorded(partial(add, 5), name="more")(b=2)
        return [recorded.__doc__ or "", order.order_id, str(more)]

    async with process(redis_url, a(wrapping)) as p:
        assert await ends(p) == ["Ask the shops.", "A1", "7"]


class Colour(Enum):
    RED = "red"


class Parcel(BaseModel):
    """An answer of a service: its names are not those of Python."""

    model_config = ConfigDict(alias_generator=to_camel)

    parcel_no: str
    weight_g: int = 0


class Tracked(BaseModel):
    """Read under other names than it is written."""

    number: str = Field(validation_alias="no")
    seen_times: int = Field(0, validation_alias=AliasChoices("seen", "views"), serialization_alias="n")


class Label(BaseModel):
    model_config = ConfigDict(extra="forbid")

    side: int
    content: Json[list[int]] = Field("[1]", validate_default=True)

    @computed_field
    def area(self) -> int:
        return self.side**2


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)

    at: datetime
    colour: Colour
    pair: tuple[int, int]


@pytest.mark.parametrize(
    ("declared", "value"),
    [
        (list[int], [1, 2]),
        (dict[int, str], {1: "a"}),
        (set[int], {1, 2}),
        (tuple[int, str], (1, "a")),
        (datetime, datetime(2026, 1, 2, tzinfo=UTC)),
        (timedelta, timedelta(seconds=1.5)),
        (Decimal, Decimal("1.10")),
        (UUID, UUID(int=5)),
        (Path, Path("a/b")),
        (Colour, Colour.RED),
        (bytes, b"abc"),
        (int | None, None),
        (None, None),
        (float, 1.5),
        (Order | Offer, Order(order_id="1", offers=[])),
        (list[Offer], [Offer("x", datetime(2026, 1, 1, tzinfo=UTC))]),
        (dict[str, list[Order]], {"a": [Order(order_id="1", offers=[])]}),
        (Awaitable[int], 5),
        (list["Order"], [Order(order_id="1", offers=[])]),
        ("dict[str, Order] | None", {"a": Order(order_id="1", offers=[])}),
        (Annotated[int, {"unit": "cents"}], 5),
        (Parcel, Parcel(parcelNo="7", weightG=3)),
        (list[Parcel], [Parcel(parcelNo="7")]),
        (Tracked, Tracked(no="7", seen=1)),
        (Label, Label(side=2)),
        (Strict, Strict(at=datetime(2026, 1, 1, tzinfo=UTC), colour=Colour.RED, pair=(1, 2))),
    ],
    ids=str,
)
def test_a_result_is_read_back_in_its_declared_type(declared: Any, value: Any) -> None:
    """Equal, and of the same type, in every attempt."""

    def function() -> Any: ...

    function.__annotations__["return"] = declared
    step = Step.of(function, None)
    read = step.decoded(json.loads(json.dumps(step.encoded(value))))
    assert read == value
    assert type(read) is type(value)


class Locked(BaseModel):
    """Two instances are never equal."""

    model_config = ConfigDict(alias_generator=to_camel)

    parcel_no: str = ""
    _lock: Any = PrivateAttr(default_factory=object)


def test_a_result_that_equals_no_other_is_read_back_whole() -> None:
    """A field with an alias does not get its default."""

    def function() -> Locked: ...  # type: ignore[empty-body]

    step = Step.of(function, None)
    assert step.decoded(step.encoded(Locked(parcelNo="7"))).parcel_no == "7"


async def test_a_type_that_is_not_complete_is_found_before_the_call(redis_url: str) -> None:
    """The function may have an effect."""

    def order() -> list[Nowhere]:  # type: ignore[name-defined]  # noqa: F821
        MADE.append("called")

    class Incomplete(BaseModel):
        other: Nowhere  # type: ignore[name-defined]  # noqa: F821

    def make() -> Any:
        MADE.append("called")

    make.__annotations__["return"] = Incomplete

    async def buyer(context: RunContext) -> None:
        with pytest.raises(StepFailed, match="the type of its result cannot be read"):
            await context.step("order", order)
        with pytest.raises(StepFailed, match="has no JSON form"):
            await context.step("make", make)

    async with process(redis_url, a(buyer)) as p:
        await ends(p)
    assert MADE == []


async def test_the_output_of_a_function_may_be_an_instance_of_its_type(redis_url: str) -> None:
    """Its schema knows the fields by their aliases."""

    async def sender(context: RunContext) -> Parcel:
        return Parcel(parcelNo="7", weightG=3)

    async with process(redis_url, a(sender)) as p:
        output = await ends(p, output_type=Parcel.model_json_schema())
        assert output == {"parcelNo": "7", "weightG": 3}
        assert "validation.retry" not in await p.event_names()


async def test_the_schema_of_the_output_decides_about_the_names_of_its_fields(redis_url: str) -> None:
    """Also of those that it does not require."""

    async def sender(context: RunContext) -> Parcel:
        return Parcel(parcelNo="7", weightG=3)

    names = {"parcel_no": {"type": "string"}, "weight_g": {"type": "integer"}}
    async with process(redis_url, a(sender)) as p:
        output = await ends(p, output_type={"type": "object", "properties": names})
        assert output == {"parcel_no": "7", "weight_g": 3}


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        (({"b", "a", "c"},), {}, '{"names":["a","b","c"]}'),  # the order of a set differs between processes
        ((), {"names": frozenset({2, 1})}, '{"names":[1,2]}'),
        ((None,), {"offer": Offer("x", datetime(2026, 1, 1, tzinfo=UTC))}, None),
        ((None, Order(order_id="1", offers=[])), {}, '{"names":null,"offer":{"offers":[],"order_id":"1"}}'),
        (({1: {"k": (1, 2)}},), {}, '{"names":{"1":{"k":[1,2]}}}'),
    ],
)
def test_arguments_are_the_same_in_every_process(args: Any, kwargs: Any, expected: str | None) -> None:
    """The identity of a call is a digest of its arguments by their names."""
    arguments = Step.of(unordered, None).arguments(args, kwargs)
    text = expected or '{"names":null,"offer":{"seen_at":"2026-01-01T00:00:00Z","shop":"x"}}'
    assert canonical_json(arguments) == text


def unordered(names: Any, offer: Any = None) -> None: ...


async def test_steps_run_side_by_side_and_hold_other_calls(redis_url: str) -> None:
    """A step may call tools; they are recorded inside it."""

    async def outer(context: Any, query: str) -> str:
        found: str = await context.call_tool("search", {"query": query})
        return found.upper()

    async def both(context: RunContext) -> list[str]:
        return list(
            await asyncio.gather(
                context.step("outer", outer, context, "tea"), context.step("outer", outer, context, "milk")
            )
        )

    async with process(redis_url, a(both, tools=[search])) as p:
        assert await ends(p) == ["ALL ABOUT TEA", "ALL ABOUT MILK"]
        assert sorted(MADE) == ["search milk", "search tea"]


@tool
async def shopping(item: str, context: ToolContext) -> list[str]:
    """Makes recorded calls inside a tool."""
    context.state["by"] = "shopping"

    def find() -> str:
        context.state["found"] = item
        context.add_artifact("found", payload=item)
        return f"found {item}"

    found = await context.step("find", find)
    with suppress(StepFailed):
        await context.step("fail", _fails, context)
    reply = await context.call_llm("Good?")
    return [found, reply.output_text, context.state["by"], context.state["found"]]


async def _fails(context: Any) -> None:
    context.state["lost"] = True
    raise ValueError("lost")


async def test_a_tool_makes_recorded_calls(redis_url: str) -> None:
    """Each change of the state belongs to the innermost call; those of a failed call are lost."""

    async def buyer(context: RunContext) -> Any:
        bought = await context.call_tool("shopping", {"item": "tea"})
        return [bought, sorted(context.state)]

    async with process(redis_url, a(buyer, tools=[shopping])) as p:
        output = await ends(p)
        assert output == [["found tea", "hello", "shopping", "tea"], ["by", "found"]]
        record = await p.record()
        assert [artifact.name for artifact in record.result.artifacts] == ["found"]  # type: ignore[union-attr]
        journal = {each["name"]: each.get("state", {}) for each in await p.journal() if "name" in each}
        assert (sorted(journal["find"]), sorted(journal["shopping"])) == (["found"], ["by"])


async def test_a_function_can_run_the_calls_of_a_reply(redis_url: str) -> None:
    """The loop of a function: ask, run the calls, ask again with their results."""

    async def loop(context: RunContext) -> str:
        messages: list[Any] = [{"role": "user", "content": context.input_text}]
        while True:
            reply = await context.call_llm(messages, tools=["search"])
            if not reply.tool_calls:
                return reply.output_text
            for call in reply.tool_calls:
                result = await context.call_tool(call.name, call.arguments)
                messages.append({"role": "user", "content": f"{call.name}: {result}"})

    script = scripted(calls(("search", {"query": "tea"})), {"text": "done"})
    async with process(redis_url, a(loop, tools=[search], llm=script)) as p:
        assert await ends(p) == "done"
        assert MADE == ["search tea"]
