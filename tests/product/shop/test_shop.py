"""The product's own suite, on the fixtures of the plugin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import shop

from openagents_worker import AsyncClient, RunFailed, RunHandle, sse
from openagents_worker.testing.fixtures import StartModelServer, StartWorker
from openagents_worker.testing.scripted_model import ModelCall, ScriptedModel

REFUND: dict[str, Any] = {"tool_calls": [{"name": "refund", "arguments": {"order": "A17"}}]}


@pytest.fixture(autouse=True)
def nothing_refunded() -> Iterator[None]:
    shop.refunded.clear()
    yield
    shop.refunded.clear()


def test_a_refund_is_made_once(agents_worker: StartWorker, scripted_model: ScriptedModel) -> None:
    """The product's code runs as it is: `run_agent.delay` goes to the test's Redis."""
    scripted_model.will_say(REFUND, "Done: A17.")
    agents_worker([shop.AGENT])

    result = shop.answer("ada", "I want my money back").wait(timeout=60)

    assert (result.final_output, shop.refunded) == ("Done: A17.", ["A17"])
    assert result.usage.tool_calls == 1


def test_an_agent_in_python_stands_beside_one_of_the_file(
    agents_worker: StartWorker, scripted_model: ScriptedModel
) -> None:
    """Its program calls functions of the product, tools and the model."""
    scripted_model.will_say("No.")
    worker = agents_worker([shop.AGENT, shop.SETTLER])

    assert worker.run("settler", "A17").final_output == "A17 is paid back"
    assert worker.run("settler", "B-2000").final_output == "No."
    assert shop.refunded == ["A17"]


def test_the_model_is_a_function_of_what_it_is_asked(
    agents_worker: StartWorker, scripted_model: ScriptedModel
) -> None:
    """It sees the messages, the tools and which call of the run it is; it may be async."""

    @scripted_model
    async def model(call: ModelCall) -> str | dict[str, Any]:
        return REFUND if call.n == 0 else f"The shop says: {call.said}"

    worker = agents_worker([shop.AGENT])

    assert worker.run("support", "Refund A17").final_output == "The shop says: A17 is paid back"
    assert [call.n for call in scripted_model.calls] == [0, 1]
    assert scripted_model.calls[0].tools[0]["function"]["name"] == "refund"
    assert scripted_model.calls[0].said == "Refund A17"


def test_a_conversation_is_remembered(agents_worker: StartWorker, scripted_model: ScriptedModel) -> None:
    """The second run of a session sees the first."""
    scripted_model(lambda call: " / ".join(str(message["content"]) for message in call.messages[1:]))
    agents_worker([shop.AGENT])

    first = shop.answer("ada", "Hello").wait(timeout=60)
    second = shop.answer("ada", "Hello again").wait(timeout=60)

    assert first.final_output == "Hello"
    assert second.final_output == "Hello / Hello / Hello again"


def test_a_model_that_is_busy_is_asked_again(
    agents_worker: StartWorker, scripted_model: ScriptedModel
) -> None:
    """A retryable error suspends the run; it goes on when it is due."""
    scripted_model.will_say(REFUND, {"error": "rate_limit", "retry_after_ms": 1}, "Done.")
    worker = agents_worker([shop.AGENT])

    handle = worker.submit("support", "Refund A17")

    assert handle.wait(timeout=60).final_output == "Done."
    assert shop.refunded == ["A17"]
    assert "run.retry_scheduled" in [event.name for event in handle.events()]


def test_a_run_that_is_cancelled_stops(agents_worker: StartWorker, scripted_model: ScriptedModel) -> None:
    """While its model thinks."""
    scripted_model.will_say({"text": "too late", "latency_ms": 60_000})
    handle = agents_worker([shop.AGENT]).submit("support", "Hello")
    for event in handle.events():
        if event.name == "llm.called":
            handle.cancel("changed my mind")

    with pytest.raises(RunFailed, match="changed my mind"):
        handle.get(timeout=20)


def test_runs_of_different_customers_work_side_by_side(
    agents_worker: StartWorker, scripted_model: ScriptedModel
) -> None:
    """Fifty wait for the same slow model together."""
    scripted_model.will_say({"text": "hi", "latency_ms": 300})
    worker = agents_worker([shop.AGENT])

    handles = [worker.submit("support", "Hello") for _ in range(50)]

    assert {handle.wait(timeout=60).final_output for handle in handles} == {"hi"}


def test_each_test_begins_with_nothing(
    agents_worker: StartWorker, scripted_model: ScriptedModel, agents_redis: str
) -> None:
    """Neither runs nor sessions of the tests before."""
    scripted_model.will_say("hi")
    worker = agents_worker([shop.AGENT])

    assert worker.run("support", "Hello", session_id="ada").ok
    assert len(worker.client.session("ada").transcript) == 2
    assert shop.answer("ada", "Hello").id != RunHandle("another").id


def test_the_agents_may_stand_in_a_file(
    agents_worker: StartWorker, scripted_model: ScriptedModel, tmp_path: Path
) -> None:
    """The one that is deployed, for example; its model is replaced, its limits and tools are its own."""
    file = tmp_path / "agents.json"
    whole = {"name": "Support", "memory": {"type": "buffer"}, "pattern": {"type": "react"}, "llm": {}}
    file.write_text(json.dumps({"agents": [{**shop.AGENT, **whole}]}))
    scripted_model.will_say("from a file")

    assert agents_worker(file).run("support", "Hello").final_output == "from a file"


def test_settings_are_those_of_the_environment(
    agents_worker: StartWorker, scripted_model: ScriptedModel
) -> None:
    """By their names there, without the prefix."""
    scripted_model.will_say("x" * 5000)
    worker = agents_worker([shop.AGENT], MAX_PAYLOAD_BYTES="4096")

    result = worker.run("support", "Hello")

    assert result.error_details is not None
    assert result.error_details.code == "step.too_large"


def test_a_misspelled_setting_is_refused(agents_worker: StartWorker) -> None:
    """The worker would have the default."""
    with pytest.raises(TypeError, match="has no setting LEASE; did you mean LEASE_MS"):
        agents_worker([shop.AGENT], lease="8000")


def test_a_model_behind_http_can_be_had_too(
    agents_worker: StartWorker, agents_model_server: StartModelServer
) -> None:
    """The agent's own provider is used; what travels is what travels in production."""
    server = agents_model_server([REFUND, {"text": "Done."}])
    llm = {"provider": "openai_compatible", "model": "m", "api_base": server.url}
    worker = agents_worker([{**shop.AGENT, "llm": llm}])

    assert worker.run("support", "Refund A17").final_output == "Done."
    assert [line["tools"] for line in server.log if line["event"] == "received"] == [["refund"]] * 2


async def test_an_async_product_streams(
    agents_worker: StartWorker, scripted_model: ScriptedModel, agents_redis: str
) -> None:
    """The worker has a loop of its own, so a test may have one, too."""
    scripted_model.will_say("Hello Ada")
    agents_worker([shop.AGENT])

    async with AsyncClient() as client:
        handle = await client.submit({"agent_id": "support", "session_id": "ada", "input_text": "Hello"})
        frames = [frame async for frame in sse(handle)]

    assert frames[-1].startswith("event: end")
    assert "Hello Ada" in next(frame for frame in frames if "event: run.completed" in frame)
