"""Toolsets: when they are opened, listed and closed, and what a run does when its tools change under it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from openagents_worker.errors import ToolNotFoundError, ToolRateLimitError
from openagents_worker.models import RunRecord, RunState, StopReason
from openagents_worker.runtime.runner import AttemptOutcome
from tests.runtime import plugins
from tests.runtime.toolsets import Changing, Priced, Shop
from tests.support.runner import agent, due, process

HERE = "tests.runtime.toolsets"
SHOP = {"id": "shop", "impl": f"{HERE}.Shop"}
CHARGE = {"id": "charge", "impl": "tests.runtime.plugins.Charge"}


@pytest.fixture(autouse=True)
def _listed() -> Iterator[None]:
    Shop.LISTED, Changing.version = [Priced("price"), Priced("stock", concurrency_safe=True)], 1
    yield
    Shop.LISTED = []


def using(*called: str, tools: list[dict[str, Any]] | None = None, pattern: str = "Uses") -> dict[str, Any]:
    return agent(
        tools=tools or [SHOP], pattern={"impl": f"{HERE}.{pattern}", "config": {"tools": list(called)}}
    )


def log(*names: str) -> list[tuple[Any, ...]]:
    return [entry for entry in plugins.LOG if entry[0] in names]


def output_of(record: RunRecord) -> Any:
    assert record.result is not None
    return record.result.final_output


def error_of(record: RunRecord) -> tuple[str, str]:
    assert record.result is not None
    assert record.result.error_details is not None
    return record.result.error_details.code, record.result.error_details.message


def busy() -> Exception:
    return ToolRateLimitError("busy", "price", retry_after_ms=1)


async def test_a_toolset_offers_each_of_its_tools(redis_url: str) -> None:
    """It is opened and listed once, its calls are recorded like those of other tools, and it is closed."""
    async with process(redis_url, using("price", "stock")) as p:
        record = await p.run()

        assert output_of(record) == {
            "results": ["price of {'who': 'a'}", "stock of {'who': 'a'}"],
            "tools": {"price": "price by who.", "stock": "stock by who."},
        }
        assert [entry[:2] for entry in plugins.LOG] == [
            ("open",), ("list", "a"), ("call", "price"), ("call", "stock"), ("close",)
        ]  # fmt: skip
        kinds = [(entry["kind"], entry["name"]) for entry in await p.journal()]
        assert kinds == [("prepare", ""), ("tools", "list"), ("tool", "price"), ("tool", "stock")]
        assert record.usage.tool_calls == 2


async def test_a_run_keeps_the_tools_that_it_began_with(redis_url: str) -> None:
    """In a later attempt the toolset has another list: what the run sees, and may call, is the first one."""
    plugins.FAILURES["stock"] = [busy()]
    async with process(redis_url, using("price", "stock")) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        Shop.LISTED = [Priced("price", "article"), Priced("more")]
        await due(p)

        assert (await p.execute()).stop_reason is StopReason.COMPLETED
        assert output_of(await p.record())["tools"] == {"price": "price by who.", "stock": "stock by who."}
        assert len(log("list")) == 1
        assert [entry[1] for entry in log("call")] == ["price", "stock", "stock"]
        assert log("call")[1][3] == log("call")[2][3], "a repeated call has the same idempotency key"


async def test_a_tool_that_is_gone_fails_its_call(redis_url: str) -> None:
    """The toolset says so, as the model would see it from any tool."""
    plugins.FAILURES["stock"] = [ToolNotFoundError("no longer sold", "stock")]
    async with process(redis_url, using("stock")) as p:
        assert error_of(await p.run()) == ("tool.not_found", "no longer sold")


async def in_two_versions(
    redis_url: str, before: list[dict[str, Any]], after: list[dict[str, Any]], *called: str
) -> RunRecord:
    """The record of a run that a worker with other tools continues after its last call has failed."""
    plugins.FAILURES["a"] = [busy()]
    definitions = [using(*called, "charge", tools=[*tools, CHARGE]) for tools in (before, after)]
    async with process(redis_url, definitions[0]) as one, process(redis_url, definitions[1]) as two:
        await one.submit()
        assert (await one.execute()).kind is AttemptOutcome.SUSPENDED
        await due(two)
        await two.execute()
        return await two.record()


async def test_a_run_goes_on_without_a_toolset_that_was_added(redis_url: str) -> None:
    """It began without that toolset: neither its list nor its tools concern it."""
    record = await in_two_versions(redis_url, [], [SHOP])

    assert output_of(record)["tools"] == {"charge": "Charges somebody."}
    assert log("open", "list") == []


async def test_a_run_keeps_the_tools_of_a_toolset_that_was_removed(redis_url: str) -> None:
    """As the model has seen them. The calls that are recorded stay; a new one would fail."""
    record = await in_two_versions(redis_url, [SHOP], [], "price")

    assert output_of(record)["tools"].keys() == {"price", "stock", "charge"}
    assert output_of(record)["results"] == ["price of {'who': 'a'}", {"charged": "a"}]


async def test_a_new_call_of_a_removed_toolset_fails(redis_url: str) -> None:
    plugins.FAILURES["stock"] = [busy()]
    definitions = [using("stock", tools=[*tools, CHARGE]) for tools in ([SHOP], [])]
    async with process(redis_url, definitions[0]) as one, process(redis_url, definitions[1]) as two:
        await one.submit()
        assert (await one.execute()).kind is AttemptOutcome.SUSPENDED
        await due(two)
        await two.execute()

        code, message = error_of(await two.record())
        assert code == "tool.not_found"
        assert "'shop'" in message


async def test_a_toolset_that_cannot_be_opened_now_suspends_the_run(redis_url: str) -> None:
    """And it is closed as often as it was opened."""
    plugins.FAILURES["open"] = [busy()]
    async with process(redis_url, using("price")) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        await due(p)

        assert (await p.execute()).stop_reason is StopReason.COMPLETED
        assert [entry[0] for entry in plugins.LOG] == ["open", "open", "list", "call", "close"]


async def test_a_replayed_run_opens_a_toolset_only_to_call_it(redis_url: str) -> None:
    """A connection costs time; all calls of the second attempt but the last are answered by the journal."""
    plugins.FAILURES["a"] = [busy()]
    async with process(redis_url, using("price", "charge", tools=[SHOP, CHARGE])) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        await due(p)
        assert (await p.execute()).stop_reason is StopReason.COMPLETED

        assert [entry[0] for entry in log("open", "list", "call", "close")] == [
            "open",
            "list",
            "call",
            "close",
        ]


async def test_every_toolset_is_closed(redis_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Also after one whose `close` fails. The run is not affected."""
    plugins.FAILURES["close"] = [ValueError("first")]
    Shop.LISTED = []
    async with process(redis_url, using(tools=[SHOP, {**SHOP, "id": "other"}])) as p:
        assert (await p.run()).state is RunState.COMPLETED
        assert len(log("close")) == 2
    assert caplog.text.count("run.plugin_not_closed") == 1


@pytest.mark.parametrize(
    ("listed", "problem"),
    [
        ([Priced("price"), Priced("price")], "'price'"),
        ([Priced("charge")], "'charge'"),
        ([Priced("two words")], "'two words'"),
        ([Priced("p" * 65)], "ppp"),
        ([Priced("price", "who", schema={"type": "nothing"})], "'price'"),
        (["price"], "str"),
        ([Priced("price")] * 1001, "1,001 tools"),
        (None, "NoneType"),
    ],
)
async def test_a_list_that_cannot_be_offered_fails_the_run(redis_url: str, listed: Any, problem: str) -> None:
    """With an error that names the toolset and the tool."""
    Shop.LISTED = listed
    async with process(redis_url, using(tools=[CHARGE, SHOP])) as p:
        code, message = error_of(await p.run())

        assert code == "plugin.config"
        assert "'shop'" in message
        assert problem in message


# --- single tools ----------------------------------------------------------------------------------------


CHANGING = [{"id": "changing", "impl": f"{HERE}.Changing"}]


async def test_a_run_that_does_not_contradict_its_journal_goes_on_with_a_changed_tool(redis_url: str) -> None:
    """A deployment that corrects a description ends no run."""
    plugins.FAILURES["changing"] = [busy()]
    async with process(redis_url, using("changing", tools=CHANGING)) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        Changing.version = 2
        await due(p)
        assert (await p.execute()).stop_reason is StopReason.COMPLETED


async def test_a_run_that_contradicts_its_journal_names_the_tools_that_changed(redis_url: str) -> None:
    """With the code for a changed definition."""
    plugins.FAILURES["changing"] = [busy()]
    async with process(redis_url, using(tools=CHANGING, pattern="Diverges")) as p:
        await p.submit()
        assert (await p.execute()).kind is AttemptOutcome.SUSPENDED
        Changing.version = 2
        await due(p)
        await p.execute()

        code, message = error_of(await p.record())
        assert code == "run.definition_changed"
        assert "changing" in message
