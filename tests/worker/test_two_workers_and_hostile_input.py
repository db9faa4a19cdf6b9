"""Two workers, and requests and items that could stop all workers: both execute the next runs."""

from __future__ import annotations

import base64
import gzip
import json
import threading
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from openagents_worker.errors import OpenAgentsError
from openagents_worker.local.child_process import ChildProcess
from openagents_worker.store.fleet import read_fleet
from tests.hostile.schemas import CATASTROPHE, CATASTROPHIC
from tests.support.deployment import PATIENCE_S, Installation, agent, installed
from tests.support.waiting import wait_for


class _Bomb(BaseHTTPRequestHandler):
    """A model whose reply is a few kilobytes that decompress to a hundred megabytes."""

    @cached_property
    def body(self) -> bytes:
        return gzip.compress(b" " * 100 * 2**20, compresslevel=1)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-encoding", "gzip")
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        with suppress(OSError):  # the client stops reading
            self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """The test's output is not a log."""


@contextmanager
def _bomb_server() -> Generator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Bomb) as server:
        thread = threading.Thread(target=server.serve_forever, name="bomb")
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Installation, list[ChildProcess]]]:
    with (
        _bomb_server() as url,
        installed(
            tmp_path_factory.mktemp("two"), agent("clerk"), agent("bomb", llm={"api_base": url})
        ) as installation,
    ):
        installation.model.will_say({"text": "fine"})
        workers = [installation.worker, installation.stack.start_worker("other")]
        wait_for(lambda: len(installation.client.workers()) == 2, "both workers are registered")
        yield installation, workers


def both_execute_runs(both: tuple[Installation, list[ChildProcess]]) -> None:
    """Submit runs until each of the two workers has executed one."""
    installation, workers = both
    executed: set[str] = set()

    def pids() -> set[int | None]:
        return {info.pid for info in installation.client.workers() if info.incarnation in executed}

    def next_run() -> bool:
        handle = installation.submit("clerk")
        assert handle.wait(PATIENCE_S).final_output == "fine"
        executed.update(event.worker for event in handle.events() if event.worker)
        return len(pids()) >= 2

    wait_for(next_run, "both workers have executed a run")
    assert [worker.exit_code for worker in workers] == [None, None]


def test_an_answer_whose_check_would_never_end(both: Any) -> None:
    """The check is given up, and the run ends with a code."""
    installation, _ = both
    installation.model.will_say({"text": CATASTROPHIC})
    try:
        result = installation.submit("clerk", output_type=CATASTROPHE).wait(PATIENCE_S)
    finally:
        installation.model.will_say({"text": "fine"})

    assert result.error_details.code == "execution.check_limit"
    both_execute_runs(both)


def test_a_request_that_is_nested_too_deep(both: Any) -> None:
    """The producer refuses it; where it comes as a message of somebody else's, its run fails."""
    installation, _ = both
    metadata: dict[str, Any] = {}
    for _level in range(250):
        metadata = {"n": metadata}
    request = {"agent_id": "clerk", "session_id": "deep", "input_text": "Go.", "metadata": metadata}
    run_id = uuid.uuid4().hex

    with pytest.raises(OpenAgentsError) as error:
        installation.client.submit(request)
    installation.run_agent.app.send_task(
        "tasks.run_agent", (request,), task_id=run_id, queue=installation.client.settings.queue
    )

    assert error.value.code == "request.invalid"
    handle = installation.client.handle(run_id)
    wait_for(
        lambda: installation.client.store.redis.exists(installation.client.store.keys("run", run_id)),
        "a worker has read it",
    )
    result = handle.wait(PATIENCE_S)
    assert result.error_details is not None
    assert result.error_details.code == "request.invalid"
    both_execute_runs(both)


def test_a_reply_that_decompresses_to_a_hundred_megabytes(both: Any) -> None:
    """It is read up to the limit of a reply, and the run ends with a code."""
    result = both[0].submit("bomb").wait(PATIENCE_S)

    assert result.error_details.code == "llm.too_large"
    both_execute_runs(both)


@pytest.mark.parametrize("queue", ["oa:due", "unacked", "agents\x06\x163"])
def test_a_request_for_a_queue_with_the_name_of_a_key_is_refused(both: Any, queue: str) -> None:
    """By every way of submission."""
    task = both[0].run_agent
    request = {"agent_id": "clerk", "session_id": "s", "input_text": "Go."}
    for submit in (
        lambda: task.delay({**request, "queue": queue}),
        lambda: task.apply_async((request,), queue=queue),
        lambda: both[0].client.submit(request, queue=queue),
    ):
        with pytest.raises(OpenAgentsError) as error:
            submit()
        assert error.value.code == "request.invalid"

    both_execute_runs(both)


def test_an_index_of_due_runs_with_the_wrong_type_is_moved_aside(both: Any) -> None:
    """Delayed runs still start; the moved key can be read, and `status` lists it."""
    installation = both[0]
    redis = installation.client.store.redis
    redis.delete("oa:due")
    redis.lpush("oa:due", "a message")

    later = installation.run_agent.apply_async(
        ({"agent_id": "clerk", "session_id": "later", "input_text": "Go."},), countdown=0.1
    )

    assert later.wait(PATIENCE_S).final_output == "fine"
    [moved] = [entry for entry in installation.client.put_aside() if entry.key == "oa:due"]
    assert redis.lrange(moved.moved_to, 0, -1) == ["a message"]
    both_execute_runs(both)


@pytest.mark.parametrize("item", ["{", "[1]", '{"headers": {"wake_us": 1}}', "\xff", "[" * 50_000])
def test_an_item_that_is_not_a_message_is_a_dead_letter(both: Any, item: str) -> None:
    """It is moved to the dead letters."""
    redis = both[0].client.store.redis
    before = len(both[0].client.put_aside())
    for _ in range(2):
        redis.lpush("agents", item)
    wait_for(lambda: not redis.llen("agents"), "the items are consumed")

    both_execute_runs(both)
    assert len(both[0].client.put_aside()) > before


def test_an_unreadable_unacknowledged_item_stops_no_worker(both: Any) -> None:
    """It is restored at the start of every worker; no worker ends because of it."""
    installation, workers = both
    redis = installation.client.store.redis
    for tag, item in enumerate(
        ["{", '[{"properties": 7}, "", "agents"]', base64.b64encode(b"x" * 99).decode()]
    ):
        redis.hset("unacked", str(tag), item)
        redis.zadd("unacked_index", {str(tag): 1})
    new = installation.stack.start_worker("third")
    try:
        wait_for(lambda: not redis.hlen("unacked"), "they are dead letters", timeout=150)
        assert new.exit_code is None
        both_execute_runs((installation, workers))
    finally:
        new.stop(PATIENCE_S)
    assert not redis.zcard("unacked_index")
    assert [worker.exit_code for worker in workers] == [None, None]


@pytest.mark.share(of=3)
@pytest.mark.parametrize("queue", ["oa:due", "oa:workers", "oa"])
def test_remote_control_cannot_make_a_worker_read_a_key(both: Any, queue: str) -> None:
    """A queue with the name of a key is not consumed, and the key is not changed."""
    installation = both[0]
    redis = installation.client.store.redis
    later = installation.run_agent.apply_async(
        ({"agent_id": "clerk", "session_id": f"s-{queue}", "input_text": "Go."},), countdown=600
    )
    before = len(installation.client.put_aside())

    installation.client.app.control.add_consumer(queue, reply=True, timeout=5)

    both_execute_runs(both)
    assert redis.zscore("oa:due", later.id) is not None
    assert len(installation.client.put_aside()) == before
    later.cancel()


def test_a_run_in_a_queue_without_a_worker_has_a_hint(both: Any) -> None:
    """It is accepted; its first event and `status` show why it waits."""
    installation = both[0]
    handle = installation.submit("clerk", queue="reports")
    waiting = installation.submit("clerk")
    assert waiting.wait(PATIENCE_S).ok

    client = installation.client
    events = client.store.redis.xrange(client.store.keys("events", handle.id))
    queued = json.loads(events[0][1]["payload"])
    read = json.loads(client.store.redis.xrange(client.store.keys("events", waiting.id))[0][1]["payload"])
    fleet = client.store.execute(read_fleet(client.store.keys, "agents"))

    assert (queued["queue"], queued["workers"]) == ("reports", 0)
    assert "reads this queue" in queued["hint"]
    assert read == {"queue": "agents"}
    assert [queue.workers for queue in fleet.queues if queue.name == "reports"] == [()]
    handle.cancel()
