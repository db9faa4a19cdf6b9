"""Resuming a run from its last checkpoint, as a producer sees it."""

from __future__ import annotations

import pytest

from openagents_worker.errors import ConfigError, LLMResponseError, RequestInvalid, RunConflict, RunNotFound
from openagents_worker.models import RunRequest, RunState, parse_request
from openagents_worker.producer.client import Client
from tests.support.scripts import Hand


def resume(step: int = 1, **fields: str) -> dict[str, str]:
    return {
        "agent_id": "assistant",
        "session_id": "s1",
        "input_text": "",
        "resume_from_checkpoint": f"r1:step:{step}",
        **fields,
    }


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
