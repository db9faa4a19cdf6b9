"""Submitting: within five seconds a request becomes one accepted run, or an error with the reason."""

from __future__ import annotations

import base64
import json
import logging
from typing import Any

import pytest

from openagents_worker.errors import (
    AgentNotFoundError,
    BrokerConfigError,
    RedisUnreachable,
    RequestInvalid,
    RequestTooLarge,
    RunConflict,
    SubmitUnknown,
)
from openagents_worker.models import RunRequest, RunState
from openagents_worker.producer import connection, plans
from openagents_worker.producer import publisher as transport
from openagents_worker.producer.client import AsyncClient, Client
from openagents_worker.producer.publisher import send_wakes
from openagents_worker.settings import load_settings
from openagents_worker.store import client as store_client
from openagents_worker.store.formats import WRITTEN
from openagents_worker.store.scripts import Wake
from openagents_worker.submission import submit as submit_module
from tests.support.lossy_proxy import Proxy, closed_port, silent_port
from tests.support.scripts import Hand

REQUEST = RunRequest(agent_id="assistant", session_id="s1", input_text="my secret question", run_id="r1")


def messages(client: Client, queue: str = "agents") -> list[dict[str, Any]]:
    """The messages in a queue of the broker, oldest first: headers, properties, args."""
    found = [json.loads(text) for text in reversed(client.store.redis.lrange(queue, 0, -1))]
    return [
        {
            "headers": m["headers"],
            "properties": m["properties"],
            "args": json.loads(base64.b64decode(m["body"]))[0],
        }
        for m in found
    ]


def cancel_all(client: Client, *run_ids: str) -> None:
    for run_id in run_ids:
        client.cancel(run_id)


# --- storing and sending ---------------------------------------------------------------------------------


def test_an_accepted_run_has_a_record_and_a_message_with_ids_only(client: Client) -> None:
    """The request waits in the record; what the broker, and Flower, get to see are ids."""
    handle = client.submit(REQUEST)

    record = client.record(handle.id)
    (message,) = messages(client)
    assert handle.id == "r1"
    assert (record.state, record.request) == (RunState.QUEUED, REQUEST)
    assert message["args"] == [{"run_id": "r1", "agent_id": "assistant", "session_id": "s1"}]
    headers = message["headers"]
    assert (headers["task"], headers["id"], headers["root_id"]) == ("tasks.run_agent", "r1", "r1")
    assert headers["argsrepr"] == "agent=assistant session=s1 run=r1"
    assert headers["ignore_result"] is True
    sent_us = client.store.redis.zscore(client.store.keys("sent", "agents"), "r1")
    assert int(headers["wake_us"]) == int(sent_us)
    assert headers["run_format"] == WRITTEN
    assert "secret question" not in str(client.store.redis.lrange("agents", 0, -1))
    cancel_all(client, "r1")


def test_the_same_request_again_is_the_same_run(client: Client) -> None:
    """A run_id with the same request is one run, however often it is submitted."""
    client.submit(REQUEST)
    client.submit(REQUEST.model_dump())

    assert client.store.redis.xlen(client.store.keys("events", "r1")) == 1
    cancel_all(client, "r1")


def test_a_run_id_of_another_request_is_a_conflict(client: Client) -> None:
    """Nothing is accepted, and the run that owns the id is untouched."""
    client.submit(REQUEST)

    with pytest.raises(RunConflict) as error:
        client.submit(REQUEST.model_copy(update={"input_text": "another"}))

    assert error.value.run_id == "r1"
    assert client.record("r1").request == REQUEST
    assert len(messages(client)) == 1
    cancel_all(client, "r1")


def test_a_run_whose_session_is_busy_is_sent_nothing(client: Client) -> None:
    """It waits in its session's queue; the end of the run before it sends its message."""
    client.submit(REQUEST)
    client.submit(REQUEST.model_copy(update={"run_id": "r2"}))

    assert client.record("r2").state is RunState.WAITING_SESSION
    assert [message["headers"]["id"] for message in messages(client)] == ["r1"]

    client.cancel("r1")
    woken = [message["headers"] for message in messages(client, "agents.wake")]
    assert sorted((each["id"], each["task"]) for each in woken) == [
        ("r1", "tasks.run_agent"),  # the notification of Celery of its end
        ("r2", "tasks.run_agent"),
    ]
    cancel_all(client, "r2")


def test_a_delayed_run_is_sent_nothing_before_it_is_due(client: Client) -> None:
    """It is scheduled: no message exists, and it has no place in its session yet."""
    client.submit(REQUEST, delay_ms=60_000)

    record = client.record("r1")
    assert record.state is RunState.SCHEDULED
    assert record.due_ms is not None
    assert record.created_ms is not None
    assert record.due_ms - record.created_ms == 60_000
    assert messages(client) == []
    cancel_all(client, "r1")


def test_priority_and_headers_are_on_every_message_of_a_run(client: Client) -> None:
    """They are stored with the run, so that a wake-up has them, too."""
    client.submit(REQUEST, priority=3, headers={"tenant": "blue"})
    client.submit(REQUEST.model_copy(update={"run_id": "r2"}), priority=6, headers={"tenant": "red"})
    client.cancel("r1")

    (first,) = messages(client, "agents\x06\x163")
    (wake,) = messages(client, "agents.wake\x06\x166")
    assert (first["headers"]["tenant"], wake["headers"]["tenant"]) == ("blue", "red")
    cancel_all(client, "r2")


def test_the_queue_of_the_submission_goes_before_the_requests(client: Client) -> None:
    """queue= of the call, else the request's own, else the agent's, else the deployment's."""
    client.submit(REQUEST.model_copy(update={"queue": "slow"}))
    client.submit(
        REQUEST.model_copy(update={"run_id": "r2", "queue": "slow", "session_id": "s2"}), queue="fast"
    )

    assert [m["headers"]["id"] for m in messages(client, "slow")] == ["r1"]
    assert [m["headers"]["id"] for m in messages(client, "fast")] == ["r2"]
    cancel_all(client, "r1", "r2")


def test_with_a_result_backend_the_worker_is_asked_to_keep_the_result(redis_url: str) -> None:
    """A plain AsyncResult works then; a submission still subscribes to nothing."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_RESULT_BACKEND": redis_url})
    with Client(settings=settings) as client:
        client.submit(REQUEST)

        (message,) = messages(client)
        assert message["headers"]["ignore_result"] is False
        assert client.store.redis.info("clients")["pubsub_clients"] == 0
        cancel_all(client, "r1")


def test_an_attempted_run_is_woken_with_its_checkpoint(client: Client) -> None:
    """A wake-up of a run that has been worked on is `tasks.resume_run` with the latest checkpoint's id."""
    wake = Wake("r1", "agents", 1_700_000_000_000_000, "assistant", "s1", attempt=2, step=4, canvas="")

    assert send_wakes(client.app, [wake]) == 1

    (message,) = messages(client, "agents.wake")
    assert message["args"] == ["r1", "r1:step:4"]
    assert (message["headers"]["task"], message["headers"]["id"]) == ("tasks.resume_run", "r1")
    assert message["headers"]["wake_us"] == "1700000000000000"
    assert message["headers"]["run_format"] == WRITTEN


def test_a_thousand_wakes_go_over_one_connection(client: Client) -> None:
    """After a crash many runs are woken at once: the broker sees one publisher."""
    wakes = [Wake(f"r{i}", "agents", i, "assistant", "s1", 1, 0, "") for i in range(1000)]
    before = client.store.redis.info("stats")["total_connections_received"]

    assert send_wakes(client.app, wakes) == 1000

    assert client.store.redis.llen("agents.wake") == 1000
    assert client.store.redis.info("stats")["total_connections_received"] - before <= 4


def test_a_newer_producer_submits_the_same_request(client: Client) -> None:
    """What its version added and this request leaves out: it is one run, and older workers read it."""

    class Tomorrow(RunRequest):
        mood: str | None = None

    client.submit(REQUEST)
    assert client.submit(Tomorrow(**dict(REQUEST))).id == "r1"
    client.submit(Tomorrow(**{**dict(REQUEST), "run_id": "r2"}))

    assert client.record("r2").request == REQUEST.model_copy(update={"run_id": "r2"})
    cancel_all(client, "r1", "r2")


def test_a_run_in_a_state_of_tomorrow_is_accepted_once_more(client: Client) -> None:
    """Repeating a submission is always safe, also when a newer worker has put the run somewhere new."""
    client.submit(REQUEST)
    client.store.redis.hset(client.store.keys("run", "r1"), "state", "dreaming")

    assert client.submit(REQUEST).id == "r1"

    cancel_all(client, "r1")


# --- rejections ------------------------------------------------------------------------------------------


def test_a_request_without_its_fields_is_refused_before_anything_is_written(client: Client) -> None:
    """The error names the mistake and the right form; Redis is not used."""
    with pytest.raises(RequestInvalid, match="session_id"):
        client.submit({"agent_id": "assistant", "input_text": "hi"})

    assert client.store.redis.dbsize() == 0


def test_a_request_over_the_limit_is_refused(redis_url: str) -> None:
    """`OPENAGENTS_MAX_PAYLOAD_BYTES` bounds a request."""
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_MAX_PAYLOAD_BYTES": "2000"})
    with Client(settings=settings) as client, pytest.raises(RequestTooLarge):
        client.submit(REQUEST.model_copy(update={"input_text": "x" * 2000}))


def test_an_agent_that_no_worker_knows_is_refused_with_a_guess(client: Client, hand: Hand) -> None:
    """When workers have announced their agents, a misspelt id raises at once and nothing is enqueued."""
    hand.register("assistant", "echo")

    with pytest.raises(AgentNotFoundError) as error:
        client.submit(REQUEST.model_copy(update={"agent_id": "asistant"}))

    assert error.value.agent_id == "asistant"
    assert "did you mean 'assistant'?" in str(error.value)
    assert "echo" not in str(error.value)
    assert "worker" in str(error.value)
    assert messages(client) == []


@pytest.mark.parametrize("priority", [-1, 10, 2.5, "high"])
def test_a_priority_that_is_none_is_refused(client: Client, priority: Any) -> None:
    """0 to 9, as Celery's."""
    with pytest.raises(RequestInvalid, match="priority"):
        client.submit(REQUEST, priority=priority)

    assert client.store.redis.dbsize() == 0


def test_headers_that_are_no_json_are_refused(client: Client) -> None:
    """They are stored with the run, as JSON."""
    with pytest.raises(RequestInvalid, match="headers"):
        client.submit(REQUEST, headers={"when": object()})


@pytest.mark.parametrize("name", ["id", "wake_us", "run_format", "argsrepr"])
def test_headers_that_would_break_the_message_are_refused(client: Client, name: str) -> None:
    """What Celery and we write there is not for a caller to write."""
    with pytest.raises(RequestInvalid, match=name):
        client.submit(REQUEST, headers={name: "x"})


def test_a_broker_that_celery_does_not_know_is_a_configuration_error(redis_url: str) -> None:
    """Known when the client is made; its password is not shown."""
    settings = load_settings(
        {"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_BROKER_URL": "pigeon://me:hush@host"}
    )
    with pytest.raises(BrokerConfigError, match="pigeon") as error:
        Client(settings=settings)

    assert "hush" not in str(error.value)


# --- a Redis that is away --------------------------------------------------------------------------------


def test_the_time_limits_of_a_submission_leave_it_five_seconds_in_all() -> None:
    """Whatever is away or silent: to connect (to both addresses of a name), to ask again, to send."""
    publishing_s = 2 * max(transport.CONNECT_TIMEOUT_S, transport.ANSWER_TIMEOUT_S)  # with one retry
    assert 2 * store_client.CONNECT_TIMEOUT_S < 5
    assert submit_module.REPEAT_FOR_S + submit_module.REPEAT_PAUSE_S + connection.ANSWER_TIMEOUT_S < 5
    assert plans.SEND_WITHIN_S + publishing_s < 5

    with Client("redis://127.0.0.1:1/0") as client:
        connecting = client.store.redis.connection_pool.connection_kwargs
    assert connecting["socket_connect_timeout"] == store_client.CONNECT_TIMEOUT_S
    assert connecting["socket_timeout"] == connection.ANSWER_TIMEOUT_S


def test_a_closed_port_is_a_coded_error() -> None:
    """Nobody listens: nothing was accepted."""
    with Client(f"redis://127.0.0.1:{closed_port()}/0") as client, pytest.raises(RedisUnreachable):
        client.submit(REQUEST)


def test_a_silent_port_is_a_coded_error() -> None:
    """Somebody listens and never answers: the same."""
    with silent_port() as port, Client(f"redis://127.0.0.1:{port}/0") as client:
        with pytest.raises(RedisUnreachable) as error:
            client.submit(REQUEST)
        assert error.value.code == "redis.unreachable"


async def test_asyncio_clients_hear_of_a_silent_port_too() -> None:
    """The same bounds hold for asyncio."""
    with silent_port() as port:
        async with AsyncClient(f"redis://127.0.0.1:{port}/0") as client:
            with pytest.raises(RedisUnreachable):
                await client.submit(REQUEST)


def test_a_lost_answer_is_asked_for_again(redis_url: str) -> None:
    """The run was written, its answer was not heard: the same script again finds the same run."""
    with Proxy(redis_url) as proxy:
        settings = load_settings({"OPENAGENTS_REDIS_URL": proxy.url, "OPENAGENTS_BROKER_URL": redis_url})
        proxy.lose_answer_to = lambda data: b"EVAL" in data and proxy.lost < 2
        with Client(settings=settings) as client:
            handle = client.submit(REQUEST)

            assert proxy.lost == 2
            assert handle.id == "r1"
            assert client.store.redis.xlen(client.store.keys("events", "r1")) == 1
            assert len(messages(client)) == 1
            cancel_all(client, "r1")


async def test_asyncio_asks_again_too(redis_url: str) -> None:
    """One implementation serves both."""
    async with Proxy(redis_url) as proxy:
        settings = load_settings({"OPENAGENTS_REDIS_URL": proxy.url, "OPENAGENTS_BROKER_URL": redis_url})
        proxy.lose_answer_to = lambda data: b"EVAL" in data and proxy.lost < 2
        async with AsyncClient(settings=settings) as client:
            handle = await client.submit(REQUEST)

            assert proxy.lost == 2
            assert (await handle.record()).state is RunState.QUEUED
            await handle.cancel()


def test_a_line_that_stays_bad_leaves_the_submission_unknown(redis_url: str) -> None:
    """The caller learns that the run may be accepted, its id, and that repeating is safe: it is."""
    with Proxy(redis_url) as proxy:
        settings = load_settings({"OPENAGENTS_REDIS_URL": proxy.url, "OPENAGENTS_BROKER_URL": redis_url})
        proxy.lose_answer_to = lambda data: b"EVAL" in data
        with Client(settings=settings) as client:
            with pytest.raises(SubmitUnknown) as error:
                client.submit(REQUEST)
            assert error.value.run_id == "r1"
            assert "safe" in str(error.value)

            proxy.lose_answer_to = lambda data: False
            client.submit(REQUEST)
            assert client.store.redis.xlen(client.store.keys("events", "r1")) == 1
            cancel_all(client, "r1")


def test_a_redis_that_dies_after_the_question_leaves_the_submission_unknown(redis_url: str) -> None:
    """A refused connection after a lost answer does not mean that nothing was accepted."""
    with Proxy(redis_url) as proxy, Client(proxy.url) as client:

        def loses_and_dies(data: bytes) -> bool:
            asked = b"EVAL" in data
            if asked:
                proxy.hang_up()
            return asked

        proxy.lose_answer_to = loses_and_dies
        with pytest.raises(SubmitUnknown) as error:
            client.submit(REQUEST)

    assert proxy.lost == 1
    assert type(error.value.__cause__) is RedisUnreachable  # the last error: connection refused


# --- a broker that is away -------------------------------------------------------------------------------


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, logger="openagents_worker")
    return caplog


def test_a_run_is_accepted_while_its_broker_is_down(
    redis_url: str, warnings: pytest.LogCaptureFixture
) -> None:
    """The record is written, so a worker's rescue loop sends the message later: one warning, no error."""
    broker = f"redis://:hush@127.0.0.1:{closed_port()}/0"
    settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_BROKER_URL": broker})
    with Client(settings=settings) as client:
        handle = client.submit(REQUEST)

        assert client.record(handle.id).state is RunState.QUEUED
        assert client.store.redis.zcard(client.store.keys("sent", "agents")) == 1
        (line,) = warnings.records
        assert "broker.unreachable" in line.getMessage()
        assert "r1" in line.getMessage()
        assert "hush" not in warnings.text
        cancel_all(client, "r1")


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_silent_broker_is_given_up(redis_url: str, scheme: str, warnings: pytest.LogCaptureFixture) -> None:
    """A broker that accepts the connection and never answers is abandoned in time."""
    with silent_port() as port:
        settings = load_settings(
            {"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_BROKER_URL": f"{scheme}://127.0.0.1:{port}/0"}
        )
        with Client(settings=settings) as client:
            client.submit(REQUEST)
            assert len(warnings.records) == 1
            cancel_all(client, "r1")


def test_a_broker_that_was_restarted_gets_the_next_message(redis_url: str) -> None:
    """A publishing connection that has died in between is made anew, unseen."""
    with Proxy(redis_url) as proxy:
        settings = load_settings({"OPENAGENTS_REDIS_URL": redis_url, "OPENAGENTS_BROKER_URL": proxy.url})
        with Client(settings=settings) as client:
            client.submit(REQUEST)
            client.store.redis.client_kill_filter(skipme=True, _type="normal")
            client.submit(REQUEST.model_copy(update={"run_id": "r2", "session_id": "s2"}))

            assert [m["headers"]["id"] for m in messages(client)] == ["r1", "r2"]
            cancel_all(client, "r1", "r2")
