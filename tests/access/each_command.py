"""The commands of operators and watchers, each executed as the user of their role."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import kombu
import pytest

from openagents_worker import ApprovalNotPending, Client
from openagents_worker.errors import RedisNoPermission
from openagents_worker.events import RunEvent
from openagents_worker.producer.client import AsyncClient
from openagents_worker.producer.sse import sse
from openagents_worker.store.roles import RoleName
from openagents_worker.store.watch import awatch, watch
from tests.access.users import Guarded
from tests.cli.conftest import Done, typed
from tests.fundamentals.shop import DELIVERY_ALLOWED
from tests.support.deployment import Installation, Model, call
from tests.support.waiting import wait_for

Command = Callable[..., Done]


@pytest.fixture
def command(
    redis_of_users: Guarded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Runs `openagents-worker` with these arguments as the user of a role."""

    def as_role(role: RoleName, *arguments: str) -> Done:
        monkeypatch.setenv("OPENAGENTS_REDIS_URL", redis_of_users.url(role))
        return typed(arguments, monkeypatch, capsys)

    return as_role


@pytest.fixture
def completed(shop: Installation, model: Model) -> str:
    model.will_say({"tool_calls": [call("price", fruit="pear")]}, {"text": "A pear is 40 cents."})
    handle = shop.submit("clerk", session_id="pears")
    assert handle.wait(timeout=60).stop_reason == "completed"
    return handle.id


@pytest.mark.parametrize("role", [RoleName.WATCHER, RoleName.OPERATOR])
def test_every_role_that_may_read_can_run_the_reading_commands(
    role: RoleName, command: Command, completed: str
) -> None:
    for arguments in (
        ("status",),
        ("workers",),
        ("runs", "--limit", "1000"),
        ("runs", "--agent", "clerk", "--session", "pears", "--state", "completed", "--limit", "1000"),
        ("show", completed),
        ("watch", completed, "--json"),
        ("sessions", "--limit", "1000"),
        ("session", "pears"),
        ("approvals",),
    ):
        done = command(role, *arguments)
        assert (done.code, done.err.replace("none\n", "")) == (0, ""), arguments


@pytest.mark.parametrize("role", [RoleName.WATCHER, RoleName.OPERATOR])
def test_a_run_that_waits_is_shown_with_its_reason(
    role: RoleName, command: Command, shop: Installation
) -> None:
    later = shop.run_agent.apply_async(
        ({"agent_id": "clerk", "session_id": "later", "input_text": "Go."},), countdown=3600
    )
    assert command(role, "show", later.id).code == 0
    later.cancel()


@pytest.mark.parametrize("role", [RoleName.PRODUCER, RoleName.OPERATOR])
def test_who_may_submit_may_decide(redis_of_users: Guarded, completed: str, role: RoleName) -> None:
    """The answer comes from the script: this run has ended."""
    with Client(redis_of_users.url(role)) as client:
        handle = client.handle(completed)
        assert (handle.approvals(), len(client.approvals())) == ([], 0)
        for decide in (handle.approve, handle.deny):
            with pytest.raises(ApprovalNotPending):
                decide("price", by="ada")
        with pytest.raises(ApprovalNotPending):
            handle.resolve("price", "rerun", by="ada")


def test_an_operator_resumes_and_prunes(command: Command, shop: Installation, model: Model) -> None:
    model.will_say({"error": "response", "message": "I do not speak this language."})
    failed = shop.submit("clerk")
    assert failed.wait(timeout=60).stop_reason == "failed"
    model.will_say({"text": "Better now."})

    assert command(RoleName.OPERATOR, "resume", failed.id, "--by", "ada").code == 0
    assert failed.wait(timeout=60).final_output == "Better now."
    assert command(RoleName.OPERATOR, "prune").code == 0
    assert command(RoleName.OPERATOR, "run", "clerk", "Go.").code == 0


def test_an_operator_deletes_a_session(redis_of_users: Guarded, shop: Installation, model: Model) -> None:
    """Also a session with a live run, as a producer does."""
    for role in (RoleName.OPERATOR, RoleName.PRODUCER):
        model.will_say({"tool_calls": [call("deliver")]}, {"text": "?"})
        with Client(redis_of_users.url(role)) as client:
            handle = shop.submit("clerk", session_id="gone")
            wait_for(lambda at=handle: len(shop.diary(at.id)) == 1, "the delivery has started")
            assert client.delete_session("gone", force=True) == 1


def test_a_producer_reads_what_its_runs_did(shop: Installation, completed: str) -> None:
    client = shop.client
    assert next(client.checkpoints(completed)).kind == "prepare"
    assert completed in {record.run_id for record in client.runs(session_id="pears", agent_id="clerk").items}
    assert "pears" in {session.session_id for session in client.sessions().items}
    assert client.workers()
    assert "clerk" in {agent.id for agent in client.agents()}


def test_a_watcher_follows_a_run_live(redis_of_users: Guarded, shop: Installation, model: Model) -> None:
    model.may_answer = lambda _: False
    handle = shop.submit("clerk", "Are you open?", session_id="followed")
    model.will_say({"text": "Yes."})
    with Client(redis_of_users.url(RoleName.WATCHER)) as watcher:
        seen: list[RunEvent] = []
        for event in watch(watcher.store, handle.id):
            seen.append(event)
            if event.name == "llm.called":
                model.may_answer = lambda _: True
    assert seen[-1].final


def test_a_watcher_follows_a_run_over_http(redis_of_users: Guarded, completed: str) -> None:
    async def frames() -> list[str]:
        async with AsyncClient(redis_of_users.url(RoleName.WATCHER)) as watcher:
            events = [event async for event in awatch(watcher.store, completed)]
            assert events[-1].final
            return [frame async for frame in sse(watcher.handle(completed))]

    assert "event: end" in asyncio.run(frames())[-1]


def test_a_worker_takes_over_what_a_dead_one_had(shop: Installation, model: Model) -> None:
    """Reclaiming, the watch over connections, and whatever else one worker does for another."""
    (shop.folder / DELIVERY_ALLOWED).unlink(missing_ok=True)  # tests that ran before may have opened it
    model.will_say({"tool_calls": [call("deliver")]}, {"text": "Delivered."})
    second = shop.stack.start_worker("second")
    handles = [shop.submit("clerk") for _ in range(8)]
    wait_for(lambda: all(shop.diary(handle.id) for handle in handles), "all couriers are under way")
    second.kill()
    wait_for(
        lambda: all((handle.record().worker or "second").partition("@")[0] != "second" for handle in handles),
        "another worker has them all",
    )
    for handle in handles:
        handle.cancel()
        handle.wait(timeout=60)


def test_a_worker_restores_messages_that_another_one_did_not_acknowledge(
    redis_of_users: Guarded, shop: Installation
) -> None:
    """As kombu does with messages without a run. The message is not a task, so it is dropped."""
    admin = redis_of_users.admin
    where = {"exchange": "agents", "routing_key": "agents"}
    for role in (RoleName.WORKER, RoleName.FLOWER):
        properties = {"delivery_tag": f"old-{role}", "delivery_info": where}
        message = {"body": "", "headers": {}, "content-type": "application/json", "properties": properties}
        admin.hset("unacked", f"old-{role}", json.dumps([message, "agents", "agents"]))
        admin.zadd("unacked_index", {f"old-{role}": 1})
        admin.delete("unacked_mutex")  # a killed worker may hold it
        with kombu.Connection(redis_of_users.url(role)) as connection:
            connection.default_channel.qos.restore_visible(interval=1)
        wait_for(lambda: admin.zcard("unacked_index") == 0, "it was put back, taken and dropped")
        wait_for(lambda: admin.llen("agents") == 0, "it was looked at")


def test_listing_queues_needs_the_right_to_scan(redis_of_users: Guarded, shop: Installation) -> None:
    """The user of a producer may not scan the names of all keys."""
    with pytest.raises(RedisNoPermission) as caught:
        shop.client.queues()
    assert (caught.value.code, caught.value.command) == ("redis.no_permission", "scan")
    assert caught.value.user == "openagents-producer"
    assert redis_of_users.refusals() == ["openagents-producer: command scan (toplevel)"]
