"""Resuming a run from its last checkpoint, as a producer sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import Celery
from pydantic import BaseModel

from openagents_worker.errors import ConfigError, LLMResponseError, RequestInvalid, RunConflict, RunNotFound
from openagents_worker.models import RunBudget, RunRequest, RunState, parse_request
from openagents_worker.producer.client import Client
from tests.support.scripts import Hand


def resume(step: int = 1, **fields: Any) -> dict[str, Any]:
    return {
        "agent_id": "assistant",
        "session_id": "s1",
        "input_text": "",
        "resume_from_checkpoint": f"r1:step:{step}",
        **fields,
    }


class Answer(BaseModel):
    text: str


def task_options(client: Client) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(
        str(client.store.redis.hget(client.store.keys("run", "r1"), "canvas"))
    )
    return stored


def test_a_failed_run_goes_on_under_its_own_id(redis_url: str, hand: Hand, client: Client) -> None:
    """The request names a checkpoint; the handle is that of the run, which is queued in its next life."""
    hand.end("r1", steps=1, error=LLMResponseError("no"))
    handle = client.submit(resume())

    assert handle.id == "r1"
    record = client.record("r1")
    assert (record.state, record.life, record.steps) == (RunState.QUEUED, 2, 1)


def test_resuming_twice_is_resuming_once(redis_url: str, hand: Hand, client: Client) -> None:
    """A repeated request finds the run on its way already."""
    hand.end("r1", steps=1, error=LLMResponseError("no"))
    client.submit(resume())
    client.submit(resume())
    assert client.record("r1").life == 2


@pytest.mark.parametrize(
    ("fields", "error", "hint"),
    [
        ({"agent_id": "another"}, ConfigError, "assistant"),
        ({"session_id": "s2"}, ConfigError, "s1"),
        ({"input_text": "something else"}, ConfigError, "leave input_text empty"),
        ({"resume_from_checkpoint": "r1:step:0"}, ConfigError, "r1:step:1"),
        ({"resume_from_checkpoint": "nobody:step:1"}, RunNotFound, "never submitted"),
    ],
)
def test_what_is_not_that_run_is_refused(
    redis_url: str, hand: Hand, client: Client, fields: dict[str, str], error: type[Exception], hint: str
) -> None:
    """Another agent, session, input or checkpoint raises an error with the right value; nothing changes."""
    hand.end("r1", steps=1, error=LLMResponseError("no"))
    with pytest.raises(error, match=hint):
        client.submit(resume(**fields))
    assert client.record("r1").state is RunState.FAILED


@pytest.mark.parametrize(
    ("fields", "options", "named"),
    [
        ({"budget": {"max_steps": 99}}, {}, "budget"),
        ({"labels": {"env": "prod"}, "metadata": {"a": 1}}, {}, "labels, metadata"),
        ({"durable": False}, {}, "durable"),
        ({"on_busy": "reject"}, {}, "on_busy"),
        ({"queue": "slow"}, {}, "queue"),
        ({}, {"queue": "slow"}, "queue"),
        ({}, {"delay_ms": 3_600_000}, "delay_ms"),
        ({}, {"expires_ms": 5_000_000}, "expires_ms"),
    ],
)
def test_what_a_resumption_cannot_change_is_refused(
    hand: Hand, client: Client, fields: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    """A resumed run keeps its request and its queue. Before, these were ignored."""
    hand.end("r1", steps=1, error=LLMResponseError("no"))
    with pytest.raises(RequestInvalid, match=f"which cannot change {named}\n"):
        client.submit(resume(**fields), **options)
    assert client.record("r1").state is RunState.FAILED


def test_a_request_may_be_repeated_with_its_checkpoint(client: Client) -> None:
    """All of its fields are those of the run, whether they were set or are defaults."""
    request = RunRequest(
        agent_id="assistant",
        session_id="s1",
        input_text="hi",
        run_id="r1",
        budget=RunBudget(max_steps=3),
        labels={"env": "prod"},
        output_type=Answer,
    )
    client.submit(request)
    client.cancel("r1")

    again = request.model_copy(update={"resume_from_checkpoint": "r1:step:0", "durable": True})
    client.submit(again, queue="agents")

    assert client.record("r1").state is RunState.QUEUED
    client.cancel("r1")


def test_a_resumed_run_keeps_the_tasks_that_are_linked_to_it(client: Client) -> None:
    """Each option replaces only the one of its name. Before, a priority or a trace erased the link."""
    link, first = Celery().signature("shop.pay", args=[]), resume() | {"run_id": "r1", "input_text": "hi"}
    del first["resume_from_checkpoint"]
    client.submit(first, canvas={"link": [link]}, headers={"a": "1", "b": "1"})
    before = task_options(client)
    client.cancel("r1")

    client.submit(resume(step=0), priority=3, headers={"b": "2"})

    assert task_options(client) == {**before, "priority": 3, "headers": {"a": "1", "b": "2"}}
    client.cancel("r1")


def test_a_completed_run_is_not_resumed(redis_url: str, hand: Hand, client: Client) -> None:
    """It cannot continue; the hint says what to do instead."""
    hand.end("r1", steps=1)
    with pytest.raises(RunConflict, match="submit a new run"):
        client.submit(resume())


def test_the_run_id_follows_from_the_checkpoint() -> None:
    """It can be left out. A different one is rejected before Redis is read."""
    assert RunRequest.model_validate(resume()).run_id == "r1"
    with pytest.raises(RequestInvalid, match="is not the run of the checkpoint"):
        parse_request(resume(run_id="other"))
    with pytest.raises(RequestInvalid, match="step:"):
        parse_request(resume(resume_from_checkpoint="r1"))
