"""`stream()`: the events of a run in the form of the original SDK, with the result at the end."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from openagents_worker.models import RunArtifact, RunStreamChunk
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.producer.handle import RunHandle
from openagents_worker.settings import Settings
from tests.support.scripts import Hand

FIELDS = {"agent_id": "assistant", "session_id": "s1", "input_text": "hi", "run_id": "r1"}
EVENTS = [
    ("run.validated", {}),
    ("session.run.started", {"input_text": "hi"}),
    ("run.checkpoint_saved", {"checkpoint_id": "r1:step:0", "step_index": 0}),
    ("llm.called", {"model": "m", "call": "m:1"}),
    ("llm.delta", {"call": "m:1", "offset": 0, "text": "He"}),
    ("llm.succeeded", {"model": "m", "call": "m:1"}),
    ("tool.called", {"tool_id": "look", "params": {}, "call_id": "look:1"}),
    ("tool.delta", {"call_id": "look:1", "offset": 0, "text": "…"}),
    ("tool.succeeded", {"tool_id": "look", "result": 7, "call_id": "look:1"}),
    ("tool.failed", {"tool_id": "look", "error": "no", "call_id": "look:2"}),
    ("validation.retry", {"attempt": 1, "error": "no number"}),
    ("run.resume_attempted", {"checkpoint_id": "r1:step:0", "error_type": "E", "attempt_index": 1}),
    ("run.resume_succeeded", {"checkpoint_id": "r1:step:0", "attempt_index": 1}),
]
STORED_KINDS = [
    "run.started",
    "run.checkpoint_saved",
    "llm.finished",
    "tool.started",
    "tool.finished",
    "tool.finished",
    "validation.retry",
    "run.resume_attempted",
    "run.resume_succeeded",
]


@pytest.fixture
def handle(client: Client, hand: Hand) -> RunHandle[Any]:
    """A run that has ended, with all events that have a chunk, and others."""
    handle = client.submit(FIELDS)
    hand.claim("r1")
    hand.commit("r1", steps=0)
    for name, payload in EVENTS:
        hand.emit("r1", name, payload=json.dumps(payload))
    hand.finish("r1", "391", artifacts=[RunArtifact(name="report", kind="markdown", payload="# 391")])
    return handle


def test_a_run_is_a_sequence_of_chunks(handle: RunHandle[Any]) -> None:
    """One for each event that has a kind, one for each artifact, and the result at the end alone."""
    chunks = list(handle.stream())

    assert [str(chunk.kind) for chunk in chunks] == [*STORED_KINDS, "artifact", "run.finished"]
    assert chunks[4].payload == {"tool_id": "look", "result": 7, "call_id": "look:1"}
    assert chunks[-2].payload == {"name": "report", "kind": "markdown", "payload": "# 391", "metadata": {}}
    assert chunks[-1].result is not None
    assert chunks[-1].result.final_output == "391"
    assert [chunk.result for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert {(chunk.run_id, chunk.session_id, chunk.agent_id) for chunk in chunks} == {
        ("r1", "s1", "assistant")
    }
    assert all(chunk.timestamp_ms > 1_700_000_000_000 for chunk in chunks)


def test_a_stream_continues_behind_any_of_its_chunks(handle: RunHandle[Any]) -> None:
    """Also behind the last one: then it has the artifacts and the result."""
    chunks = list(handle.stream())
    for position, chunk in enumerate(chunks[:-2]):
        rest = list(handle.stream(after=chunk.sequence))
        assert [each.kind for each in rest] == [each.kind for each in chunks[position + 1 :]]
    assert [str(each.kind) for each in handle.stream(after=chunks[-1].sequence)] == [
        "artifact",
        "run.finished",
    ]


def test_a_failed_run_has_its_error_in_the_last_chunk(client: Client, hand: Hand) -> None:
    handle = client.submit(FIELDS)
    hand.claim("r1")
    hand.commit("r1", steps=0)
    hand.finish("r1", error=ValueError("no"))

    [last] = list(handle.stream())

    assert last.result is not None
    assert last.result.error_details is not None
    assert (last.kind, last.result.ok) == ("run.finished", False)


def test_a_chunk_survives_its_journey(handle: RunHandle[Any]) -> None:
    """As JSON."""
    for chunk in handle.stream():
        assert RunStreamChunk.model_validate_json(chunk.model_dump_json()) == chunk


async def test_both_handles_stream_on_a_loop(handle: RunHandle[Any], settings: Settings) -> None:
    """The same chunks, by both names."""
    async with AsyncClient(settings=settings) as client:
        other = client.handle("r1")
        streams: list[AsyncGenerator[RunStreamChunk]] = [handle.astream(), other.stream(), other.astream()]
        found = [[str(chunk.kind) async for chunk in stream] for stream in streams]
    assert found == [[*STORED_KINDS, "artifact", "run.finished"]] * 3
