"""Every argument of a client, a handle or a task is used, or rejected with an error code."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import MAXYEAR, UTC, datetime, timedelta
from typing import Any

import pytest

from openagents_worker.arguments import TEN_YEARS_MS
from openagents_worker.errors import ConfigError, OpenAgentsError, RequestInvalid
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.producer.handle import AsyncRunHandle, RunHandle
from openagents_worker.producer.sse import sse
from openagents_worker.producer.task import AgentTask, ProducerTask
from openagents_worker.settings import Settings
from openagents_worker.store.listing import RunFilters

GOOD = {"agent_id": "clerk", "session_id": "s1", "input_text": "hi"}
HALF = "\ud800"
LONG_AGO = datetime(1, 1, 1)  # noqa: DTZ001 - no operating system has this time
DEEP: Any = 1
for _ in range(150):
    DEEP = [DEEP]

NO_TEXT: dict[str, Any] = {
    "an integer of many digits": 10**5000,
    "a negative one": -(10**5000),
    "a small integer": 7,
    "a fraction": 1.5,
    "half of a pair": HALF,
    "half of a pair in a text": f"a{HALF}b",
    "the other half": "\udfff",
    "bytes": b"text",
    "a list": ["x"],
    "an object": {"x": 1},
    "any object": object(),
    "true": True,
    "a text of a megabyte": "x" * 1_000_000,
}
NO_NUMBER: dict[str, Any] = {
    "an integer of many digits": 10**5000,
    "a negative one": -(10**5000),
    "beyond 64 bits": 2**63,
    "below zero": -1,
    "a fraction": 1.5,
    "not a number": math.nan,
    "infinite": math.inf,
    "a text": "1",
    "half of a pair": HALF,
    "a list": [1],
    "any object": object(),
    "true": True,
}
TEXTS = ("run_id", "session_id", "reason", "by", "queue", "cursor", "name", "message_id",
         "call_id", "action", "note", "of_run")  # fmt: skip
NUMBERS = ("limit", "delay_ms", "expires_ms", "priority", "after")
NOT_OF_A_COMMAND = {"request", "headers", "canvas", "force", "dry_run", "output_type", "filters", "timeout",
                    "propagate", "callback", "celery_options", "options", "ignored", "value", "_",
                    "__", "text", "budget", "checkpoint_id", "new_session_id",
                    "arguments", "result"}  # fmt: skip
FILTERS = ("agent_id", "session_id", "tenant", "parent_run_id", "code")
NEEDED = {"request": GOOD, "run_id": "r1", "session_id": "s1", "name": "paid", "text": "Be brief.",
          "budget": {"max_steps": 2}, "checkpoint_id": "r1:step:1", "call_id": "pay:1",
          "action": "rerun", "by": "ann", "of_run": "r1"}  # fmt: skip


def methods_of(kind: type) -> Iterator[tuple[str, list[inspect.Parameter]]]:
    """The public methods of this library with their parameters."""
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_") and method.__module__.startswith("openagents_worker"):
            yield name, list(inspect.signature(method).parameters.values())[1:]


def doors_of(kind: type) -> list[tuple[str, str]]:
    return [(name, each.name) for name, given in methods_of(kind) for each in given
            if each.name in TEXTS + NUMBERS]  # fmt: skip


def wrong_values(parameter: str) -> dict[str, Any]:
    return NO_TEXT if parameter in TEXTS else NO_NUMBER


def arguments(kind: type, method: str, parameter: str, value: Any) -> tuple[list[Any], dict[str, Any]]:
    """Those without a keyword in their order, and the others."""
    taken = dict(methods_of(kind))[method]
    needed = {each.name: NEEDED[each.name] for each in taken
              if each.default is each.empty and each.name in NEEDED}  # fmt: skip
    given = {**needed, parameter: value}
    positional = [given.pop(each.name) for each in taken if each.kind is each.POSITIONAL_ONLY]
    return positional, given


def call_of(client: Client, method: str, parameter: str, value: Any) -> None:
    positional, named = arguments(Client, method, parameter, value)
    given = getattr(client, method)(*positional, **named)
    if isinstance(given, Iterator):
        next(given)


async def acall_of(client: AsyncClient, method: str, parameter: str, value: Any) -> None:
    positional, named = arguments(AsyncClient, method, parameter, value)
    given = getattr(client, method)(*positional, **named)
    await (anext(given) if isinstance(given, AsyncGenerator) else given)


@pytest.mark.parametrize("kind", [Client, AsyncClient, RunHandle, AsyncRunHandle])
def test_every_argument_is_one_that_is_tested_here(kind: type) -> None:
    """A new argument of a public method is checked like the others."""
    taken = {each.name for _, given in methods_of(kind) for each in given}

    assert taken - {*TEXTS, *NUMBERS} <= NOT_OF_A_COMMAND


# --- clients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_redis_beside_settings_of_another_one_is_refused(
    kind: type[Client | AsyncClient], settings: Settings
) -> None:
    """Before, the settings were dropped: with another key prefix, no worker would see the run."""
    own = settings.model_copy(update={"key_prefix": "shop:"})

    with pytest.raises(ConfigError, match="two Redis servers"):
        kind("redis://127.0.0.1:1/0", settings=own)
    assert Client(settings.redis_url, settings=own).store.keys("run", "r1").startswith("shop:")


@pytest.mark.parametrize(("method", "parameter"), doors_of(Client))
def test_an_argument_of_the_client_is_refused(client: Client, method: str, parameter: str) -> None:
    """Nothing is written, and hiredis never sees an integer of many digits: it would end the process."""
    for what, value in wrong_values(parameter).items():
        with pytest.raises(RequestInvalid) as refused:
            call_of(client, method, parameter, value)
        assert refused.value.code == "request.invalid", what
        str(refused.value).encode()
    assert client.store.redis.dbsize() == 0


@pytest.mark.parametrize(("method", "parameter"), doors_of(AsyncClient))
async def test_an_argument_of_the_asyncio_client_is_refused(
    settings: Settings, method: str, parameter: str
) -> None:
    """As by its twin."""
    async with AsyncClient(settings=settings) as client:
        for value in wrong_values(parameter).values():
            with pytest.raises(RequestInvalid):
                await acall_of(client, method, parameter, value)
        assert await client.store.redis.dbsize() == 0


@pytest.mark.parametrize(
    "value",
    [HALF, {"x": [1, HALF]}, {HALF: 1}, 10**5000, 2**64, math.nan, [math.inf], DEEP, object(), {1, 2}, b"x"],
    ids=lambda _: "value",
)
def test_a_value_that_cannot_be_sent_is_refused(client: Client, value: Any) -> None:
    """As a field of a request would be: a run could not receive it."""
    for send in (client.send, lambda *sent: client.handle("r1").send(*sent[1:])):
        with pytest.raises(RequestInvalid):
            send("r1", "paid", value)
    assert client.store.redis.dbsize() == 0


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_is_refused(client: Client, name: str) -> None:
    """Runs are found by text."""
    for value in NO_TEXT.values():
        with pytest.raises(RequestInvalid):
            client.runs(**{name: value})  # type: ignore[arg-type]
        with pytest.raises(RequestInvalid):
            next(client.resume_all(**{name: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "filters",
    [
        *({"labels": {"tier": value}} for value in NO_TEXT.values()),
        {"labels": {HALF: "x"}},
        {"labels": {7: "x"}},
        {"labels": "tier=gold"},
        *({name: value} for name in ("since", "until") for value in (7, "today", HALF, LONG_AGO)),
        {"state": 7},
        {"state": HALF},
        {"state": [10**5000]},
        {"state": [[]]},
    ],
    ids=lambda _: "filters",
)
def test_filters_of_a_wrong_shape_are_refused(client: Client, filters: Any) -> None:
    """The same for cursors that are not plain text."""
    with pytest.raises(RequestInvalid):
        client.runs(**filters)


def test_all_filters_are_tested_here() -> None:
    """A new one is checked like the others."""
    assert set(RunFilters.__annotations__) == {*FILTERS, "labels", "since", "until", "state"}


@pytest.mark.parametrize("cursor", ["1-", "-x", "x-y", f"{'9' * 5_000}-r1", "²-r1", "-1-r1"])
def test_a_cursor_that_is_not_ours_is_refused(client: Client, cursor: str) -> None:
    """Whoever sends it had it from a page, or has made it up."""
    with pytest.raises(RequestInvalid, match="cursor"):
        client.runs(cursor=cursor)


# --- requests --------------------------------------------------------------------------------------------

REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "half a pair in the input": ({"input_text": f"a{HALF}"}, "input_text"),
    "half a pair in an id": ({"session_id": f"a{HALF}"}, "session_id"),
    "half a pair in a run's id": ({"run_id": HALF}, "run_id"),
    "half a pair in metadata": ({"metadata": {"x": [1, HALF]}}, "metadata.x[1]"),
    "half a pair in a name": ({"metadata": {HALF: 1}}, "metadata.\ufffd"),
    "half a pair in a label": ({"labels": {"x": HALF}}, "labels.x"),
    "half a pair in the name of a label": ({"labels": {HALF: "x"}}, "labels.\ufffd"),
    "half a pair in the tenant": ({"tenant": HALF}, "tenant"),
    "half a pair in the queue": ({"queue": HALF}, "queue"),
    "half a pair in deps": ({"deps": HALF}, "deps"),
    "half a pair in the output type": ({"output_type": {"title": HALF}}, "output_type.title"),
    "many digits in metadata": ({"metadata": {"x": 10**5000}}, "metadata.x"),
    "many digits in hints": ({"context_hints": {"x": {"y": [-(10**30)]}}}, "context_hints.x.y[0]"),
    "many digits for the queue": ({"queue": 10**5000}, "queue"),
    "many digits for a label": ({"labels": {"x": 10**5000}}, "labels.x"),
    "many digits for a budget": ({"budget": {"max_steps": 10**5000}}, "budget.max_steps"),
    "many digits as text for a budget": ({"budget": {"max_steps": "1" + "0" * 30}}, "budget.max_steps"),
    "a budget of a century": ({"budget": {"max_duration_ms": 11 * TEN_YEARS_MS}}, "budget.max_duration_ms"),
    "an infinite budget": ({"budget": {"max_cost_usd": math.inf}}, "budget.max_cost_usd"),
    "NaN": ({"metadata": {"x": {"y": math.nan}}}, "metadata.x.y"),
    "101 levels": ({"metadata": DEEP[0][0]}, "metadata"),
    "150 levels": ({"context_hints": {"x": DEEP}}, "context_hints.x"),
    "150 levels of a schema": ({"output_type": {"x": DEEP}}, "output_type.x"),
}


@pytest.mark.parametrize(("fields", "where"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_that_breaks_a_rule_is_refused_with_its_path(
    client: Client, fields: dict[str, Any], where: str
) -> None:
    """As a dict of fields, and as a `RunRequest` whose class has let it through."""
    with pytest.raises(RequestInvalid) as refused:
        client.submit({**GOOD, **fields})

    assert str(refused.value).startswith(where)
    assert refused.value.hint
    assert client.store.redis.dbsize() == 0


@pytest.mark.parametrize("levels", [101, 150, 199, 230, 254, 255, 500, 5_000])
def test_a_request_is_either_refused_or_can_be_read(client: Client, levels: int) -> None:
    """200 to 254 levels used to be accepted, but no reader could parse them."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    with pytest.raises(RequestInvalid, match="100 levels"):
        client.submit({**GOOD, "metadata": {"x": value}})


def test_a_request_at_the_limit_is_read_by_every_reader(client: Client) -> None:
    """What is written has been read back."""
    value: Any = [2**63 - 1, -(2**63), "😀\0", 1e308, None]
    for level in range(96):
        value = [value] if level % 2 else {"x": value}

    handle = client.submit({**GOOD, "metadata": {"x": value}})

    record = handle.record()
    assert record.request is not None
    assert record.request.metadata["x"] == value
    assert [one.run_id for one in client.runs()] == [handle.id]
    handle.cancel("😀" * 1_000)


# --- times and callbacks ---------------------------------------------------------------------------------


@pytest.fixture
def task(client: Client) -> AgentTask:
    task: AgentTask = client.app.register_task(ProducerTask())
    return task


CENTURY = timedelta(days=36_500)
TIMES = [
    math.nan,
    math.inf,
    10**5000,
    1e308,
    CENTURY.total_seconds(),
    datetime(MAXYEAR, 12, 31, tzinfo=UTC),
    "soon",
    HALF,
    "9999-12-31T23:59:59+00:00",
    b"1",
    [1],
    object(),
]


@pytest.mark.parametrize("option", ["countdown", "eta", "expires"])
def test_a_time_is_at_most_ten_years_away(task: AgentTask, client: Client, option: str) -> None:
    """A longer time is taken for a mistake in the unit; a value that is not a time is rejected, too."""
    for when in TIMES:
        with pytest.raises(RequestInvalid):
            task.apply_async((GOOD,), **{option: when})
    assert client.store.redis.dbsize() == 0


NO_SIGNATURES: list[Any] = [
    7,
    "tasks.note",
    ["tasks.note"],
    {"args": []},
    {"task": 7},
    {"task": None, "args": []},
    {"task": "note", "subtask_type": "nothing known"},
    {"task": "celery.chain", "subtask_type": "chain", "kwargs": {}},
    [[{"task": "note"}]],
    [None],
    {"task": "note", "args": DEEP},
    {"task": "note", "args": [HALF]},
    {"task": "note", "args": [10**5000]},
    {"task": "note", "args": [math.nan]},
    True,
    b"note",
]


@pytest.mark.parametrize("option", ["link", "link_error", "chain", "chord"])
def test_a_callback_that_is_none_is_refused_at_submit(client: Client, option: str) -> None:
    """Celery would fail on it at the end of the run, when no caller can get the error."""
    for value in NO_SIGNATURES:
        with pytest.raises(RequestInvalid):
            client.submit(GOOD, canvas={option: value})
    assert client.store.redis.dbsize() == 0


@pytest.mark.parametrize(
    "options",
    [
        {"headers": 7},
        {"canvas": 7},
        {"canvas": ["link"]},
        {"headers": [("a", 1)]},
        {"headers": {"x": HALF}},
        {"headers": {"x": 10**5000}},
        {"headers": {"x": DEEP}},
        {"headers": {HALF: 1}},
        *({"canvas": {name: value}} for name in ("group_id", "root_id", "parent_id", "reply_to")
          for value in (7, HALF, ["x"])),
        *({"canvas": {name: value}} for name in ("group_index", "replaced_task_nesting")
          for value in (-1, 2**63, "x", 1.5)),
    ],
    ids=lambda _: "options",
)  # fmt: skip
def test_an_option_of_a_wrong_shape_is_refused(client: Client, options: dict[str, Any]) -> None:
    """It would be part of every message of the run."""
    with pytest.raises(RequestInvalid):
        client.submit(GOOD, **options)


@pytest.mark.parametrize(
    "options",
    [{"task_id": value} for value in NO_TEXT.values()]
    + [{"stamped_headers": value} for value in (7, [[]], [1, "x"], HALF)],
    ids=lambda _: "options",
)
def test_an_option_of_celery_is_refused(task: AgentTask, client: Client, options: dict[str, Any]) -> None:
    """As those of this library are."""
    with pytest.raises(RequestInvalid):
        task.apply_async((GOOD,), **options)
    assert client.store.redis.dbsize() == 0


def test_a_signature_of_a_request_that_breaks_a_rule_is_refused(task: AgentTask) -> None:
    """Where it is made, not where it is applied."""
    with pytest.raises(RequestInvalid, match=r"metadata\.x"):
        task.s(RunRequest(**GOOD, metadata={"x": HALF}))


MISSPELLED: dict[str, tuple[Callable[[Any], object], str]] = {
    "runs": (lambda client: client.runs(session="s1"), "'session': did you mean 'session_id'?"),
    "runs of a state": (lambda client: client.runs(sate="failed"), "'sate': did you mean 'state'?"),
    "resume_all": (
        lambda client: list(client.resume_all(agent="clerk")),
        "'agent': did you mean 'agent_id'?",
    ),
    "approvals": (lambda client: client.approvals(tennant="acme"), "'tennant': did you mean 'tenant'?"),
    "approvals, none": (
        lambda client: client.approvals(xyz=None),
        "'xyz': it has agent_id, session_id, tenant",
    ),
    "submit": (lambda client: client.submit(GOOD, dely_ms=1), "'dely_ms'"),
    "fork": (lambda client: client.fork("r1", "r1:step:1", sesion_id="s2"), "'sesion_id'"),
    "wait": (lambda client: client.handle("r1").wait(timeuot=1), "'timeuot': did you mean 'timeout'?"),
    "get": (lambda client: client.handle("r1").get(propgate=False), "'propgate': did you mean 'propagate'?"),
}


@pytest.mark.parametrize(("call", "text"), MISSPELLED.values(), ids=MISSPELLED)
def test_a_misspelled_keyword_is_a_type_error(
    client: Client, call: Callable[[Client], object], text: str
) -> None:
    """As Python does it. A filter that is ignored would resume every failed run."""
    client.submit({**GOOD, "run_id": "r1"})
    with pytest.raises(TypeError, match=f"unexpected keyword argument {re.escape(text)}"):
        call(client)


# --- waiting and watching --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "timeout",
    ["soon", math.nan, 10**5000, 1e308, CENTURY.total_seconds(), [1], HALF],
    ids=lambda _: "timeout",
)
async def test_a_timeout_is_a_number_of_seconds(client: Client, settings: Settings, timeout: Any) -> None:
    """At most ten years; None waits without an end."""
    with pytest.raises(RequestInvalid, match="timeout"):
        await AsyncClient(settings=settings).handle("r1").wait(timeout)


EVENT_IDS: list[Any] = [
    *("9" * 20, "9" * 19, "9" * 5_000, "-1", "x", "1.5", HALF, "²", "٣", "1-0"),
    *(10**5000, -1, b"1", [1]),
]


@pytest.mark.parametrize("last_event_id", EVENT_IDS, ids=lambda _: "id")
async def test_an_id_of_an_event_that_is_none_is_refused(client: Client, last_event_id: Any) -> None:
    """`Last-Event-ID` comes from a browser: 20 digits must not cause a server error."""
    with pytest.raises(RequestInvalid, match="Last-Event-ID"):
        sse(client.handle("r1"), last_event_id)


async def test_an_id_of_an_event_that_does_not_exist_yet_shows_what_comes_later(client: Client) -> None:
    """18 digits are a number that Redis takes."""
    handle = client.submit(GOOD)
    handle.cancel()

    frames = [frame async for frame in sse(handle, "9" * 18)]

    assert frames[-1].startswith("event: end")


@pytest.mark.parametrize("reason", [10**5000, HALF], ids=["digits", "half of a pair"])
def test_a_reason_of_a_handle_is_refused(client: Client, reason: Any) -> None:
    """The run continues."""
    handle = client.submit(GOOD)
    with pytest.raises(OpenAgentsError) as refused:
        handle.cancel(reason)

    assert refused.value.code == "request.invalid"
    assert not handle.record().state.is_terminal
    handle.cancel()
