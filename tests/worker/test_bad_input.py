"""Bad input: the sender gets an error within seconds, with a code and a hint.

A refused request leaves no trace in Redis or in the broker. An invalid message that reached a queue becomes a
failed run under its task id, and the worker continues.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from celery import Celery
from kombu.connection import Connection

from openagents_worker.errors import OpenAgentsError, RunConflict, SubmitUnknown
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.local.stack import Stack
from openagents_worker.models import RunState
from openagents_worker.producer.client import Client
from openagents_worker.producer.handle import RunHandle
from openagents_worker.settings import load_settings
from tests.support.deployment import PATIENCE_S, ROOT, Installation, agent, call, installed, story
from tests.support.lossy_proxy import Proxy, closed_port, silent_port
from tests.support.waiting import wait_for

GOOD = {"agent_id": "clerk", "session_id": "s1", "input_text": "Go."}
MAX_BYTES = 20_000


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Generator[Installation]:
    clerk = agent("clerk", tools={"count": "tests.worker.workshop.count"})
    folder = tmp_path_factory.mktemp("bad-input")
    with installed(folder, clerk, OPENAGENTS_MAX_PAYLOAD_BYTES=str(MAX_BYTES)) as installation:
        installation.model.will_say({"tool_calls": [call("count", number=1)]}, {"text": "fine"})
        yield installation


KOMBUS_KEYS = ("_kombu.", "unacked")  # a worker's transport writes them by itself


def everything(client: Client) -> dict[str, bytes | None]:
    """All keys of Redis, when every previous run has ended and Celery was notified, without the keys that an
    idle worker writes by itself."""
    redis = client.store.redis
    by_itself = {client.store.keys(name) for name in ("workers", "watched", "looked", "fleet_lag")}
    sent = client.store.keys("sent", client.settings.queue)

    def snapshot() -> dict[str, bytes | None]:
        keys = (key for key in redis.scan_iter() if key not in by_itself and not key.startswith(KOMBUS_KEYS))
        return {key: redis.dump(key) for key in keys}

    wait_for(lambda: not redis.exists(sent), "Celery is notified of every end")
    return wait_for(lambda: now if (now := snapshot()) == snapshot() else {}, "Redis does not change")


def executes_the_next_run(installation: Installation) -> None:
    """The worker executes the next run; the messages before it were consumed by then."""
    assert installation.submit("clerk").wait(PATIENCE_S).final_output == "fine"


# --- refused where it is submitted -----------------------------------------------------------------------

REFUSED = {
    "unknown agent": ({"agent_id": "clrk"}, "user.agent_not_found", "did you mean 'clerk'?"),
    "misspelt field": ({"agentid": "clerk"}, "request.invalid", "did you mean 'agent_id'?"),
    "unknown field": ({"zzz": 1}, "request.invalid", "known fields: agent_id, session_id"),
    "field of a wrong type": (
        {"input_text": 17},
        "request.invalid",
        "input_text: Input should be a valid string",
    ),
    "id with a space": (
        {"session_id": "my session"},
        "request.invalid",
        "printable characters and no whitespace",
    ),
    "id that is too long": ({"run_id": "x" * 257}, "request.invalid", "it has 257 characters"),
    "limit below zero": ({"budget": {"max_steps": -1}}, "request.invalid", "budget.max_steps"),
    "unknown limit": ({"budget": {"max_step": 1}}, "request.invalid", "did you mean 'max_steps'?"),
    "a date": ({"metadata": {"when": datetime.now(UTC)}}, "request.invalid", "no tuples, dates, NaN"),
    "no number": ({"metadata": {"share": math.nan}}, "request.invalid", "metadata.share: it is NaN"),
    "an object": ({"context_hints": {"of": object()}}, "request.invalid", "no tuples, dates, NaN"),
    "too large": ({"input_text": "x" * MAX_BYTES}, "request.too_large", "OPENAGENTS_MAX_PAYLOAD_BYTES"),
}


@pytest.mark.parametrize(("fields", "code", "hint"), REFUSED.values(), ids=REFUSED.keys())
def test_a_request_that_cannot_work_is_refused_at_delay(
    installation: Installation, fields: dict[str, Any], code: str, hint: str
) -> None:
    """The error has a code and a hint; nothing is written and no message is sent."""
    before = everything(installation.client)

    with pytest.raises(OpenAgentsError) as error:
        installation.run_agent.delay({**GOOD, **fields})

    assert error.value.code == code
    assert hint in str(error.value)
    assert error.value.hint
    assert everything(installation.client) == before


WRONG_CALLS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "no request": (lambda task: task.apply_async(), "request.invalid", "run_agent.delay(RunRequest("),
    "only a text": (lambda task: task.delay("Go."), "request.invalid", "run_agent.delay(RunRequest("),
    "two arguments": (lambda task: task.delay(GOOD, GOOD), "request.two_arguments", ".si(request)"),
    "two ids": (
        lambda task: task.apply_async(({**GOOD, "run_id": "a"},), task_id="b"),
        "request.invalid",
        "they must be the same id",
    ),
    "option without effect": (
        lambda task: task.apply_async((GOOD,), serializer="pickle"),
        "request.invalid",
        "supported options: ",
    ),
    "priority beyond Celery's": (
        lambda task: task.apply_async((GOOD,), priority=10),
        "request.invalid",
        "0 to 9",
    ),
    "headers that are no JSON": (
        lambda task: task.apply_async((GOOD,), headers={"of": object()}),
        "request.invalid",
        "must be plain JSON",
    ),
}


@pytest.mark.parametrize(("submit", "code", "says"), WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_a_call_that_would_be_misunderstood_is_refused(
    installation: Installation, submit: Callable[[Any], Any], code: str, says: str
) -> None:
    """No argument of a caller is ignored silently."""
    before = everything(installation.client)

    with pytest.raises(OpenAgentsError) as error:
        submit(installation.run_agent)

    assert error.value.code == code
    assert says in str(error.value)
    assert everything(installation.client) == before


def test_the_same_run_id_with_the_same_request_is_the_same_run(installation: Installation) -> None:
    """Submitting again is always safe, also after the run has ended: its tool was executed once."""
    first = installation.submit("clerk", session_id="twice", run_id="twice")
    result = first.wait(PATIENCE_S)
    ended = everything(installation.client)

    again = installation.submit("clerk", session_id="twice", run_id="twice")

    assert again.wait(PATIENCE_S) == result
    assert everything(installation.client) == ended
    assert [line["what"] for line in installation.diary("twice")] == ["begin", "end"]


def test_the_same_run_id_with_another_request_is_a_conflict(installation: Installation) -> None:
    """The existing run is not changed."""
    installation.submit("clerk", session_id="mine", run_id="mine").wait(PATIENCE_S)
    before = everything(installation.client)

    with pytest.raises(RunConflict) as error:
        installation.submit("clerk", "Something else.", session_id="mine", run_id="mine")

    assert (error.value.code, error.value.run_id) == ("run.conflict", "mine")
    assert error.value.hint
    assert everything(installation.client) == before


# --- an unreachable Redis --------------------------------------------------------------------------------


@contextmanager
def closed_redis() -> Generator[int]:
    yield closed_port()


@pytest.mark.parametrize("somewhere", [closed_redis, silent_port], ids=["closed port", "silent port"])
def test_a_redis_that_does_not_answer_is_an_error(somewhere: Any) -> None:
    """The error has a code, the address and a hint; nothing was accepted."""
    with (
        somewhere() as port,
        Client(f"redis://:hush@127.0.0.1:{port}/0") as client,
        pytest.raises(OpenAgentsError) as error,
    ):
        client.submit(GOOD)

    assert error.value.code == "redis.unreachable"
    assert error.value.retryable
    assert str(port) in str(error.value)
    assert error.value.hint
    assert "hush" not in str(error.value)


def test_after_a_lost_answer_submitting_again_is_safe(installation: Installation) -> None:
    """The error says that the run may have been accepted; the same request again is the same run."""
    with Proxy(installation.stack.redis_url) as proxy:
        settings = {"OPENAGENTS_REDIS_URL": proxy.url, "OPENAGENTS_BROKER_URL": installation.stack.redis_url}
        with Client(settings=load_settings(settings)) as client:
            request = {**GOOD, "run_id": "lost", "session_id": "lost"}
            proxy.lose_answer_to = lambda data: b"EVAL" in data
            with pytest.raises(SubmitUnknown) as error:
                client.submit(request)
            proxy.lose_answer_to = lambda _: False

            handle = client.submit(request)

            assert (error.value.code, error.value.run_id) == ("run.submit_unknown", "lost")
            assert "safe" in str(error.value.hint)
            assert handle.wait(PATIENCE_S).final_output == "fine"
    assert [line["what"] for line in installation.diary("lost")] == ["begin", "end"]


# --- an invalid agents file ------------------------------------------------------------------------

CLERK = agent("clerk", llm={"api_base": "http://127.0.0.1:1/v1"})
WRONG_FILES = {
    "no JSON": ('{"agents": [', "not JSON at line 1, column 13"),
    "misspelt key": (
        {"agents": [{**CLERK, "patern": {}}]},
        "agents[0].patern: unknown key; did you mean 'pattern'?",
    ),
    "value of a wrong type": (
        {"agents": [{**CLERK, "runtime": {"max_steps": "many"}}]},
        "agents[0].runtime.max_steps: input should be a valid integer",
    ),
    "unknown tool": (
        {"agents": [{**CLERK, "tools": [{"id": "calc", "type": "calk"}]}]},
        "line 1: agents[0].tools[0].type: no tool is named 'calk'; did you mean 'calc'?",
    ),
    "class that is not there": (
        {"agents": [{**CLERK, "tools": [{"id": "t", "impl": "tests.worker.workshop.missing"}]}]},
        "agents[0].tools[0].impl: cannot load tool 'tests.worker.workshop.missing'",
    ),
    "no key for the model": (
        {"agents": [{**CLERK, "llm": {**CLERK["llm"], "api_key_env": "NO_SUCH_KEY"}}]},
        "agents[0].llm.api_key_env: the environment variable NO_SUCH_KEY is not set",
    ),
}


ONE_OF_EACH_KIND = {"no JSON", "unknown tool", "class that is not there"}
"""One error of the file's syntax, one of its content, one of a name in it. `tests/unit` has all errors."""


@pytest.mark.share(of=3)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(*row, id=name, marks=[] if name in ONE_OF_EACH_KIND else pytest.mark.slow)
        for name, row in WRONG_FILES.items()
    ],
)
def test_a_worker_with_a_wrong_agents_file_does_not_start(tmp_path: Path, content: Any, says: str) -> None:
    """It exits with code 2 before it consumes a message, and names the file, the place and a correction."""
    file = tmp_path / "agents.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    env = {**os.environ, "OPENAGENTS_CONFIG": str(file), "OPENAGENTS_REDIS_URL": "redis://127.0.0.1:1/0"}

    ended = subprocess.run(
        [sys.executable, "-m", "openagents_worker.cli", "worker"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )

    last = ended.stderr[ended.stderr.rindex("error: ") :]
    assert ended.returncode == 2
    assert str(file) in last
    assert says in last
    assert "Traceback" not in ended.stderr


def test_a_run_submitted_before_any_worker_learns_of_its_unknown_agent_from_the_worker(
    tmp_path: Path,
) -> None:
    """While no worker has announced its agents, any agent is accepted; the first worker fails the run."""
    file = tmp_path / "agents.json"
    file.write_text(json.dumps({"agents": [CLERK]}))
    env = {**os.environ, "OPENAGENTS_CONFIG": str(file), "PYTHONPATH": str(ROOT)}
    with Stack(env=env) as stack, Client(settings=stack.settings) as client:
        handle = client.submit({**GOOD, "agent_id": "clrk"})
        assert handle.record().state is RunState.QUEUED

        stack.start_worker("late")
        result = handle.wait(PATIENCE_S)

    assert result.error_details is not None
    assert result.error_details.code == "user.agent_not_found"
    assert "did you mean 'clerk'?" in str(result.error_details.hint)


# --- messages of other programs --------------------------------------------------


@pytest.fixture
def send(installation: Installation) -> Generator[Callable[..., None]]:
    """Sends messages as a program without this library does."""
    app = Celery(broker=installation.stack.redis_url, set_as_current=False)
    with app.connection_for_write() as connection:

        def send(task_id: str, *args: Any, name: str = "tasks.run_agent", **kwargs: Any) -> None:
            app.send_task(name, args, kwargs, task_id=task_id, queue="agents", connection=connection)

        yield send
    app.close()


MALFORMED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "no argument": ((), {}, "request.invalid"),
    "too many arguments": ((GOOD, GOOD), {}, "request.invalid"),
    "unknown keyword": ((), {"req": GOOD}, "request.invalid"),
    "text for a request": (("Go.",), {}, "request.invalid"),
    "list for a request": (([1, 2],), {}, "request.invalid"),
    "nothing for a request": ((None,), {}, "request.invalid"),
    "ids only": (({"run_id": "ids-only", "agent_id": "clerk", "session_id": "s"},), {}, "request.invalid"),
    "misspelt field": (({**GOOD, "agentid": "clerk"},), {}, "request.invalid"),
    "wrong type": (({**GOOD, "input_text": {"a": 1}},), {}, "request.invalid"),
    "another run's id": (({**GOOD, "run_id": "another"},), {}, "request.invalid"),
    "unknown agent": (({**GOOD, "agent_id": "clrk"},), {}, "user.agent_not_found"),
    "huge": (({**GOOD, "input_text": "x" * 5_000_000},), {}, "request.too_large"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "code"), MALFORMED.values(), ids=MALFORMED.keys())
def test_an_invalid_request_becomes_a_failed_run_under_its_task_id(
    installation: Installation,
    send: Callable[..., None],
    request: pytest.FixtureRequest,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    code: str,
) -> None:
    """Its sender finds a failed run with a code, a hint and the usual events."""
    task_id = request.node.callspec.id.replace(" ", "-")
    send(task_id, *args, **kwargs)
    handle = handle_of(installation, task_id)
    result = handle.wait(PATIENCE_S)

    assert result.error_details is not None
    assert (result.error_details.code, bool(result.error_details.hint)) == (code, True)
    assert [event.name for event in story(handle)] == ["run.queued", "run.failed", "session.run.completed"]
    assert handle.state == "FAILURE"
    executes_the_next_run(installation)


@pytest.mark.parametrize("task_id", ["with a space", "x" * 257], ids=["with a space", "too long"])
def test_a_task_id_that_cannot_be_a_runs_is_answered_too(
    installation: Installation, send: Callable[..., None], task_id: str
) -> None:
    """Under that id, because the sender knows no other."""
    send(task_id, GOOD)

    result = handle_of(installation, task_id).wait(PATIENCE_S)

    assert (result.run_id, result.stop_reason) == (task_id, "failed")
    assert result.error_details is not None
    assert "run_id: an id must have 1 to 256 printable characters" in result.error_details.message


def handle_of(installation: Installation, run_id: str) -> RunHandle[Any]:
    """The handle of the run of a foreign message, when the worker has stored it."""
    store = installation.client.store
    wait_for(lambda: store.redis.exists(store.keys("run", run_id)), f"the message {run_id!r} became a run")
    return installation.client.handle(run_id)


REFUSED_BY_CELERY: dict[str, dict[str, Any]] = {
    "unknown task": {"headers": {"task": "tasks.run_agnt"}},
    "no name for a task": {"headers": {"task": ["tasks.run_agent"]}},
    "broken JSON": {"body": "[[", "content_type": "application/json", "content_encoding": "utf-8"},
    "another shape": {"body": [1]},
    "object for a shape": {"body": {"a": 1}},
    "list for keywords": {"body": [[GOOD], [], {}]},
    "number for what is embedded": {"body": [[GOOD], {}, 7]},
    "pickled": {"body": pickle.dumps([[GOOD], {}, {}]), "content_type": "application/x-python-serialize",
                "content_encoding": "binary"},
    "yaml": {"body": "- - {}", "content_type": "application/x-yaml", "content_encoding": "utf-8"},
    "unknown compression": {"headers": {"compression": "zzz"}},
    "no time for eta": {"headers": {"eta": "soon"}},
    "no time for expires": {"headers": {"expires": "soon"}},
    "no time for a limit": {"headers": {"timelimit": "x"}},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED_BY_CELERY.values(), ids=REFUSED_BY_CELERY.keys())
def test_a_message_that_celery_rejects_becomes_a_failed_run_under_its_task_id(
    installation: Installation, request: pytest.FixtureRequest, message: dict[str, Any]
) -> None:
    """Nothing is unpickled and no worker ends; the sender finds a failed run with a code and a hint."""
    task_id = request.node.callspec.id.replace(" ", "-")
    headers = {"id": task_id, "task": "tasks.run_agent", **message.get("headers", {})}

    publish(installation, **{"body": [[GOOD], {}, {}], **message, "headers": headers})

    handle = handle_of(installation, task_id)
    details = handle.wait(PATIENCE_S).error_details
    assert details is not None
    assert (details.code, bool(details.hint)) == ("request.invalid", True)
    assert [event.name for event in story(handle)] == ["run.queued", "run.failed", "session.run.completed"]
    executes_the_next_run(installation)
    assert installation.worker.exit_code is None


@pytest.mark.parametrize(
    "message",
    [
        {"body": {"agent_id": "clerk"}, "headers": {}},
        {"body": [1], "headers": {"task": "tasks.run_agent"}},
        {"body": [[GOOD], {}, {}], "headers": {"task": "tasks.run_agnt"}},
        {"body": [[GOOD], {}, {}], "headers": {"id": 7, "task": ["tasks.run_agent"]}},
    ],
    ids=["no task", "another shape", "unknown task", "a number for an id"],
)
def test_an_invalid_message_without_an_id_is_dropped(
    installation: Installation, message: dict[str, Any]
) -> None:
    """No sender could find a result: nothing is written, and the worker continues."""
    executes_the_next_run(installation)
    known = set(installation.client.store.redis.scan_iter("oa:run:*"))

    publish(installation, **message)

    executes_the_next_run(installation)
    new = set(installation.client.store.redis.scan_iter("oa:run:*")) - known
    assert len({key.removesuffix(":events") for key in new}) == 1, "the key of the next run"
    assert installation.worker.exit_code is None


def test_a_message_that_celery_rejects_does_not_change_an_existing_run(
    installation: Installation,
) -> None:
    """The message may be a damaged duplicate; the record of the run is authoritative."""
    result = installation.submit("clerk", run_id="torn").wait(PATIENCE_S)

    publish(installation, body=[1], headers={"id": "torn", "task": "tasks.run_agent"})
    executes_the_next_run(installation)

    assert installation.client.handle("torn").wait(PATIENCE_S) == result


def publish(installation: Installation, **message: Any) -> None:
    """Put a message into the queue without completing it."""
    with Connection(installation.stack.redis_url) as connection:  # type: ignore[no-untyped-call]  # kombu
        serializer = {} if "content_type" in message else {"serializer": "json"}
        connection.Producer().publish(**message, **serializer, routing_key="agents")


def test_a_whole_request_from_a_program_without_this_library_is_a_run(
    installation: Installation, send: Callable[..., None]
) -> None:
    """It needs the task name, the queue, JSON and one argument; the task id becomes the run id."""
    send("foreign", GOOD)

    handle = handle_of(installation, "foreign")

    assert handle.wait(PATIENCE_S).final_output == "fine"
    assert handle.record().request is not None
    assert [line["what"] for line in installation.diary("foreign")] == ["begin", "end"]
    story(handle)


@pytest.mark.parametrize(
    "garbage",
    [
        "garbage",
        "[1, 2]",
        "{}",
        '{"properties": {}}',
        '{"properties": {"delivery_tag": "x"}, "body": 7}',
        '{"properties": {"delivery_tag": "x", "delivery_info": {}, "body_encoding": "zzz"}, "body": "x"}',
        '{"properties": {"delivery_tag": "x", "delivery_info": {}, "body_encoding": "base64"}, "body": "x"}',
        '{"properties": {"delivery_tag": "x", "delivery_info": {}}, "body": "x", "headers": 7}',
        '{"properties": {"delivery_tag": [], "delivery_info": {}}, "body": "x"}',
        "\xff",
    ],
)
def test_an_item_that_is_not_a_message_stops_no_worker(installation: Installation, garbage: str) -> None:
    """An item that was pushed into the queue's list by hand is dropped; the worker executes the next run."""
    redis = installation.client.store.redis
    redis.lpush("agents", garbage)

    assert installation.submit("clerk").wait(timeout=PATIENCE_S).ok
    assert redis.llen("agents") == 0


def test_an_item_that_is_not_a_message_stops_no_worker_over_a_unix_socket(tmp_path: Path) -> None:
    """`redis+socket://` uses the same transport under another name."""
    (tmp_path / "agents.json").write_text(json.dumps({"agents": [{**CLERK, "llm": {"provider": "mock"}}]}))
    env = {**os.environ, "OPENAGENTS_CONFIG": str(tmp_path / "agents.json"), "PYTHONPATH": str(ROOT)}
    with (
        TemporaryDirectory(dir="/tmp") as short,  # a socket's path has 107 characters at most
        EmbeddedRedis(extra={"unixsocket": f"{short}/s"}) as redis,
        Stack(redis_url=f"unix://{short}/s", env=env) as stack,
        Client(settings=stack.settings) as client,
        Client(redis.url) as beside,
    ):
        worker = stack.start_worker("worker")
        for garbage in ("garbage", "[1, 2]", '{"properties": {}}'):
            beside.store.ask(lambda r, item=garbage: r.lpush("agents", item))

        assert client.app.conf.broker_url.startswith("redis+socket://")
        assert client.submit(GOOD).wait(PATIENCE_S).ok
        assert worker.exit_code is None


def test_the_same_message_twice_is_one_run(installation: Installation, send: Callable[..., None]) -> None:
    """A broker may deliver a message twice; the run's tool is executed once."""
    for _ in range(2):
        send("doubled", {**GOOD, "session_id": "doubled"})
    executes_the_next_run(installation)

    handle = installation.client.handle("doubled")

    assert handle.wait(PATIENCE_S).final_output == "fine"
    assert [line["what"] for line in installation.diary("doubled")] == ["begin", "end"]
