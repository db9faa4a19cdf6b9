"""Traces of real workers, received by a collector over OTLP: one trace for each run, over a kill."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.support.deployment import Installation, agent, call, installed
from tests.support.otlp import Collector, collector
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long

TOOLS = "tests.worker.workshop"
SECRET = "sk-proj-abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(scope="module")
def received() -> Generator[Collector]:
    with collector() as received:
        yield received


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory, received: Collector) -> Generator[Installation]:
    tools = {name: f"{TOOLS}.{name}" for name in ("count", "hang")}
    with installed(
        tmp_path_factory.mktemp("traces"),
        agent("clerk", tools=tools),
        agent("lead", tools={"ask_helper": {"type": "delegate", "config": {"agent": "helper"}}}),
        {**agent("helper", queue="helpers"), "llm": {"provider": "scripted", "script": [{"text": "found"}]}},
        OTEL_EXPORTER_OTLP_ENDPOINT=received.url,
        OTEL_SERVICE_NAME="shop-worker",
        OTEL_BSP_SCHEDULE_DELAY="50",
        OTEL_METRIC_EXPORT_INTERVAL="200",
    ) as installation:
        yield installation


def test_a_run_is_one_trace_over_a_kill(installation: Installation, received: Collector) -> None:
    """Also without a span of its producer. A replayed call has no second span.

    The variables of OpenTelemetry are enough. Prompts, answers, arguments and results are not sent.
    """
    usage = {"input_tokens": 12, "output_tokens": 3}
    installation.model.will_say(
        {"tool_calls": [call("count", number=4711)], "usage": usage}, {"tool_calls": [call("hang")]}
    )
    handle = installation.submit("clerk", "a secret question")
    wait_for(lambda: len(received.named("chat test-model")) == 2, "the finished calls are received")
    wait_for(lambda: "hang" in [line.get("tool") for line in installation.diary(handle.id)], "it hangs")
    installation.stack.start_worker("second")
    installation.worker.kill()
    wait_for(
        lambda: [line.get("tool") for line in installation.diary(handle.id)].count("hang") == 2,
        "the second worker executes the run",
    )
    handle.cancel()
    handle.wait(60)
    wait_for(lambda: received.named("invoke_agent clerk"), "the second attempt is received")

    [attempt] = received.named("invoke_agent clerk")
    of_run = [span for span in received.spans if span.trace_id == attempt.trace_id]
    names = [span.name for span in of_run if not span.name.startswith("openagents.")]
    assert sorted(names) == [
        "chat test-model",
        "chat test-model",
        "execute_tool count",
        "execute_tool hang",
        "invoke_agent clerk",
    ]
    assert (
        attempt.attributes.items()
        >= {
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.agent.id": "clerk",
            "openagents.run.id": handle.id,
            "openagents.run.attempt": 2,
            "openagents.run.recoveries": 1,
            "openagents.stop_reason": "cancelled",
        }.items()
    )
    first = next(span for span in of_run if span.attributes.get("gen_ai.usage.input_tokens") == 12)
    assert (
        first.attributes.items()
        >= {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "test-model",
            "gen_ai.response.model": "test-model",
            "gen_ai.provider.name": "openai_compatible",
            "gen_ai.usage.output_tokens": 3,
        }.items()
    )
    assert first.attributes["gen_ai.response.finish_reasons"] == ["tool_calls"]
    [hang] = [span for span in of_run if span.name == "execute_tool hang"]
    assert hang.parent_id == attempt.span_id
    assert received.services == {"shop-worker"}
    assert "secret" not in str(received.spans)
    assert "4711" not in str(received.spans)


def test_measurements_are_sent_too(received: Collector, installation: Installation) -> None:
    """Under the names of the signals, those of the conventions where there are any."""
    ours = {"openagents.attempts", "openagents.calls.replayed", "openagents.claims"}
    every_heartbeat = {"openagents.lease.renewal"}
    wait_for(lambda: received.metrics >= ours | every_heartbeat, "the metrics of the second worker")


def test_content_is_captured_on_request_and_without_secrets(
    installation: Installation, received: Collector, tmp_path: Path
) -> None:
    """As the standard variable says: in spans. It is redacted and cut as in the events of a run."""
    installation.stack.set_env(OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT="SPAN_ONLY")
    for worker in list(installation.stack._workers):
        worker.kill()
    installation.stack.start_worker("third")
    installation.model.will_say(
        {"tool_calls": [call("count", number=4712)]}, {"text": "the answer " + "x" * 9_000}
    )

    handle = installation.submit("clerk", f"the key is {SECRET}")
    handle.wait(60)
    wait_for(
        lambda: any(
            span.attributes.get("openagents.run.id") == handle.id
            for span in received.named("invoke_agent clerk")
        ),
        "the attempt is received",
    )

    spans = [span for span in received.spans if span.attributes.get("openagents.run.id") == handle.id]
    chats = [span for span in spans if span.name == "chat test-model"]
    [count] = [span for span in spans if span.name == "execute_tool count"]
    question = json.loads(chats[0].attributes["gen_ai.input.messages"])
    answer = json.loads(chats[1].attributes["gen_ai.output.messages"])
    assert question[-1]["role"] == "user"
    assert question[-1]["parts"][0]["content"] == "the key is sk-***"
    assert answer[0]["parts"][0]["content"].startswith("the answer ")
    assert answer[0]["finish_reason"] == "stop"
    assert json.loads(count.attributes["gen_ai.tool.call.arguments"]) == {"number": 4712}
    assert json.loads(count.attributes["gen_ai.tool.call.result"]) == {"counted": 4712}
    assert SECRET not in str(received.spans)
    assert max(len(str(value)) for span in spans for value in span.attributes.values()) < 5_000


def test_a_child_on_another_worker_belongs_to_the_trace_of_its_parent(
    installation: Installation, received: Collector
) -> None:
    """Its attempts are below the call that delegates: invoke_agent, execute_tool, delegate, invoke_agent."""
    installation.model.will_say(
        {"tool_calls": [call("ask_helper", input_text="find order A17")]}, {"text": "It is found."}
    )
    if all(worker.exit_code is not None for worker in installation.stack.workers):
        installation.stack.start_worker("leads")
    installation.stack.set_env(OPENAGENTS_QUEUE="helpers")
    try:
        installation.stack.start_worker("helpers")
    finally:
        installation.stack.set_env(OPENAGENTS_QUEUE="agents")

    parent = installation.submit("lead")
    assert parent.wait(60).final_output == "It is found."
    [child] = installation.client.runs(parent_run_id=parent.id).items
    workers = [
        {event.worker for event in installation.client.handle(run_id).events() if event.worker}
        for run_id in (parent.id, child.run_id)
    ]
    assert not workers[0] & workers[1], "the child was executed by the same worker"

    def above() -> list[str]:
        """The names of the spans above the child. Its parent may have one attempt or, if it parks, two."""
        by_id = {span.span_id: span for span in received.spans}
        names, span = [], next(iter(received.named("invoke_agent helper")), None)
        while span is not None and (span := by_id.get(span.parent_id)) is not None:
            names.append(span.name)
        return names

    wait_for(lambda: "invoke_agent lead" in above(), "the attempts are received")

    [of_child] = received.named("invoke_agent helper")
    assert above() == ["delegate helper", "execute_tool ask_helper", "invoke_agent lead"]
    assert of_child.attributes["openagents.run.id"] == child.run_id
    of_parent = received.named("invoke_agent lead")
    assert {each.trace_id for each in of_parent} == {of_child.trace_id}
    assert {each.attributes["openagents.run.id"] for each in of_parent} == {parent.id}
