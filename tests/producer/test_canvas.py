"""The canvas: which of Celery's options a run keeps, and what a signature of a run is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import chain, chord, group

from openagents_worker.errors import ConfigError, RequestInvalid, RequestTooLarge
from openagents_worker.models import RunRequest
from openagents_worker.producer.client import Client
from openagents_worker.producer.publisher import send_wakes
from openagents_worker.producer.task import AgentTask, ProducerTask
from openagents_worker.producer.task_options import parse_task_options, task_options_json
from openagents_worker.store.scripts import Wake

FIELDS = {"agent_id": "assistant", "session_id": "s1", "input_text": "hi"}
LARGE = 100_000


@pytest.fixture
def run_agent(client: Client) -> AgentTask:
    task: AgentTask = client.app.register_task(ProducerTask())
    return task


def stored(client: Client, run_id: str) -> dict[str, Any]:
    """The options that every message of the run will have."""
    return parse_task_options(str(client.store.redis.hget(client.store.keys("run", run_id), "canvas")))


def test_what_is_linked_is_kept_with_the_run(run_agent: AgentTask, client: Client) -> None:
    """Also arguments that only Celery's JSON supports, not plain JSON."""
    when = datetime(2026, 1, 1, tzinfo=UTC)
    link = client.app.signature("product.note", (when,))

    handle = run_agent.apply_async((FIELDS,), link=link, headers={"x-team": "a"}, priority=3)

    kept = stored(client, handle.id)
    assert (kept["link"]["task"], kept["link"]["args"]) == ("product.note", [when])
    assert (kept["headers"], kept["priority"]) == ({"x-team": "a"}, 3)
    handle.cancel()


def test_stamps_are_on_every_message(run_agent: AgentTask, client: Client) -> None:
    """On the first one and on each that is sent for the run later, as Celery has them."""
    signature = run_agent.s(FIELDS)
    signature.stamp(team="blue", shelf=[1, 2])

    handle = signature.apply_async()
    canvas = str(client.store.redis.hget(client.store.keys("run", handle.id), "canvas"))
    ids = {"run_id": handle.id, "agent_id": "a", "session_id": "s1", "queue": "agents"}
    later = Wake(**ids, sent_us=1, attempt=1, step=0, canvas=canvas)
    send_wakes(client.app, [later])

    for queue in ("agents", "agents.wake"):
        headers = json.loads(client.store.redis.lindex(queue, 0))["headers"]
        assert sorted(headers["stamped_headers"]) == ["shelf", "team"]
        assert headers["stamps"] == {"shelf": [1, 2], "team": "blue"}
    handle.cancel()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("linkk", "did you mean 'link'?"),
        ("countdown", "queue, delay_ms and expires_ms are arguments of submit"),
        ("time_limit", "the options are: chain, chord"),
    ],
)
def test_an_unknown_option_is_refused(client: Client, option: str, says: str) -> None:
    """It would have no effect: the run ends, and what should follow it is never called."""
    with pytest.raises(RequestInvalid, match=f"canvas has no option '{option}'") as caught:
        client.submit(RunRequest(**FIELDS), canvas={option: 5})
    assert says in str(caught.value.hint)


def test_a_canvas_may_have_stamps(client: Client) -> None:
    canvas = {"stamped_headers": ["team"], "team": "blue"}
    handle = client.submit(RunRequest(**FIELDS), canvas=canvas)
    assert stored(client, handle.id) == canvas
    handle.cancel()


def test_a_stamp_that_is_an_option_is_refused(run_agent: AgentTask) -> None:
    """Celery would take it for that option."""
    signature = run_agent.s(FIELDS)
    signature.stamp(queue="blue")

    with pytest.raises(RequestInvalid, match="must not be named queue"):
        signature.apply_async()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"priority": 11}, "priority"),
        ({"headers": {"wake_us": "1"}}, "wake_us"),
        ({"headers": {"x": math.nan}}, "headers.x: it is NaN"),
        ({"link": {"args": [object()]}}, "JSON"),
    ],
)
def test_what_cannot_be_kept_is_refused(options: dict[str, Any], error: str) -> None:
    """With its name, and before anything is written."""
    with pytest.raises(RequestInvalid, match=error):
        task_options_json(options, max_bytes=LARGE)


def test_more_than_a_request_may_have_is_refused() -> None:
    """It is part of every message of the run."""
    with pytest.raises(RequestTooLarge, match="linked"):
        task_options_json({"link": {"args": ["x" * LARGE]}}, max_bytes=LARGE)


def test_a_signature_is_a_new_run_each_time_it_is_applied(run_agent: AgentTask) -> None:
    """A `RunRequest` always has an id, but a signature keeps only an id that was set explicitly."""
    signature = run_agent.s(RunRequest(**FIELDS))

    first, second = signature.delay(), signature.delay()

    assert first.id != second.id
    for handle in (first, second):
        handle.cancel()


def test_a_signature_with_a_chosen_id_is_that_run(run_agent: AgentTask, client: Client) -> None:
    """Applied twice, as a task that is retried does, it is still one run; also frozen, as a group does."""
    signature = run_agent.s(RunRequest(**FIELDS, run_id="r1"))

    first, second = signature.delay(), signature.delay()
    frozen = group(run_agent.si(RunRequest(**FIELDS, run_id="r1"))).freeze()

    assert first.id == second.id == frozen[0].id == "r1"
    client.cancel("r1")


def test_a_chain_keeps_its_rest_with_its_first_run(run_agent: AgentTask, client: Client) -> None:
    """Its result is that of the last run, and its parents are the results before."""
    result = chain(run_agent.s(FIELDS), client.app.signature("product.note")).apply_async()

    kept = stored(client, result.parent.id)
    assert [each["task"] for each in kept["chain"]] == ["product.note"]
    client.cancel(result.parent.id)


def test_a_chord_without_a_result_backend_says_what_it_needs(run_agent: AgentTask, client: Client) -> None:
    """Celery counts a chord's tasks there. Nothing is submitted."""
    with pytest.raises(ConfigError, match="result backend") as error:
        chord([run_agent.s(FIELDS)])(client.app.signature("product.note"))
    with pytest.raises(ConfigError, match="result backend"):
        run_agent.apply_async((FIELDS,), chord=client.app.signature("product.note"))

    assert "OPENAGENTS_RESULT_BACKEND" in str(error.value)
    assert client.store.redis.dbsize() == 0


def in_a_minute() -> datetime:
    return datetime.now(UTC) + timedelta(seconds=60)


@pytest.mark.parametrize(
    "expires",
    [lambda: 60, in_a_minute, lambda: in_a_minute().isoformat()],
    ids=["seconds", "datetime", "text"],
)
def test_expires_is_a_time_by_the_stores_clock(
    run_agent: AgentTask, client: Client, expires: Callable[[], Any]
) -> None:
    """In seconds, as a datetime, or as its text."""
    handle = run_agent.apply_async((FIELDS,), expires=expires())

    key = client.store.keys("run", handle.id)
    created, until = (int(ms or 0) for ms in client.store.redis.hmget(key, "created", "expires"))
    assert 50_000 < until - created <= 60_000
    handle.cancel()


def test_a_time_of_expiry_that_is_none_is_refused(run_agent: AgentTask) -> None:
    """The error describes valid times."""
    with pytest.raises(RequestInvalid, match="expires"):
        run_agent.apply_async((FIELDS,), expires="soon")
