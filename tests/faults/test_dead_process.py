"""A dead process is detected at once, long before its lease of ten minutes expires."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.worker.local_processes import this_process
from tests.pool.shopkeeper import PATIENCE_S, Shop, agent, open_shop
from tests.support.supervised_deployment import Worker, World
from tests.support.waiting import wait_for

LEASE_MS = 600_000
# Workers that count as workers of different hosts
ELSEWHERE = {"OPENAGENTS_WATCH_PROCESSES": "false", "OPENAGENTS_HEARTBEAT_MS": "1000"}
here = pytest.mark.skipif(this_process() is None, reason="this system does not show processes")


@pytest.fixture(scope="module")
def on_this_host(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    with World(tmp_path_factory.mktemp("here"), workers=3, lease_ms=LEASE_MS, concurrency=4) as world:
        yield world.start()


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Generator[World]:
    folder = tmp_path_factory.mktemp("elsewhere")
    with World(folder, workers=3, lease_ms=LEASE_MS, env=ELSEWHERE) as world:
        yield world.start()


def ages_ms(world: World, run_ids: Iterable[str]) -> list[int]:
    """The ages of the expired leases in ms when the runs were reclaimed."""
    events = [event for run_id in run_ids for event in world.assert_complete_events(run_id)]
    return [int(str(e.payload["age_ms"])) for e in events if e.name == "run.recovered"]


@contextmanager
def busy(world: World, name: str, count: int) -> Generator[dict[str, Worker]]:
    """Runs that wait for the model during the `with` block, with their workers."""
    run_ids = [f"{name}-{number}" for number in range(count)]
    world.model_answers.clear()
    try:
        for run_id in run_ids:
            world.submit(run_id)
        wait_for(
            lambda: (
                {
                    str(entry.get("key")).partition(":")[0]
                    for entry in world.model.log
                    if entry["event"] == "received"
                }
                >= set(run_ids)
            ),
            "each run waits for the model",
        )
        yield {run_id: world.owner(run_id) for run_id in run_ids}
    finally:
        world.model_answers.set()


def stop_one_and_kill_another(world: World, name: str) -> None:
    """Of three workers, the third executes the runs of the killed one, and none of the stopped one."""
    world.grow_to(3)
    world.restarts = False
    with busy(world, name, 9) as owners:
        paused = owners[f"{name}-0"]
        its_runs = {run_id for run_id, owner in owners.items() if owner is paused}
        victim = next(worker for worker in owners.values() if worker is not paused)
        orphans = [run_id for run_id, owner in owners.items() if owner is victim]
        paused.signal(signal.SIGSTOP)

        world.kill(victim)

        wait_for(lambda: len(world.incarnations()) == 2, "the victim's lease has ended")
    for run_id in owners.keys() - its_runs:
        world.wait(run_id)
    kept = [world.record(run_id).worker for run_id in its_runs]
    known = [incarnation.partition("@")[0] for incarnation in world.incarnations()]
    paused.signal(signal.SIGCONT)

    ages = ages_ms(world, orphans)
    assert len(ages) == len(orphans)
    assert all(age_ms < LEASE_MS for age_ms in ages)
    assert paused.name in known
    assert all(str(worker).startswith(f"{paused.name}@") for worker in kept)
    for run_id in its_runs:
        world.wait(run_id)
    assert ages_ms(world, its_runs) == []


@here
def test_a_worker_on_the_same_host_takes_over_at_once_unless_it_was_only_stopped(on_this_host: World) -> None:
    """One of three workers is killed, another gets SIGSTOP: it may continue, so its lease decides."""
    stop_one_and_kill_another(on_this_host, "here")


@here
def test_a_starting_worker_reclaims_runs_of_dead_workers_of_its_host(on_this_host: World) -> None:
    """All workers are killed, and their supervisor starts new ones."""
    world = on_this_host
    world.wait_ready()
    world.restarts = True
    with busy(world, "left", 8) as owners:
        for worker in world.live_workers().values():
            world.kill(worker)

    for run_id in owners:
        world.wait(run_id)
    assert len(ages_ms(world, owners)) == len(owners)


# --- a model that goes on in the background ----------------------------------------------------------------


@contextmanager
def paused_response(world: World, run_id: str) -> Generator[None]:
    """A run whose model writes its reply in the background, and is paused in it during the `with` block."""
    world.restarts = True
    world.wait_ready()
    keys = world.client.store.keys
    world.model_writes.clear()
    try:
        world.submit(run_id, agent="background")
        stored = partial(world.client.store.ask, lambda redis: redis.hkeys(keys("facts", run_id)))
        wait_for(lambda: [name for name in stored() if name.startswith("response:")], "the id is stored")
        yield
    finally:
        world.model_writes.set()


def model_log(world: World, event: str, since: int) -> list[dict[str, Any]]:
    return [entry for entry in world.model.log[since:] if entry["event"] == event]


@here
def test_a_reply_in_the_background_is_paid_for_once_although_its_worker_is_killed(
    on_this_host: World,
) -> None:
    """The next worker asks for the response that the first one has begun. The fact goes with the record."""
    world, run_id = on_this_host, "background-killed"
    since = len(world.model.log)
    with paused_response(world, run_id):
        world.kill(world.owner(run_id))
        wait_for(lambda: model_log(world, "retrieved", since), "another worker asks for the response")

    result = world.wait(run_id)

    assert result.final_output == "done after 0"
    assert len(model_log(world, "received", since)) == 1
    assert world.client.store.ask(lambda r: r.exists(world.client.store.keys("facts", run_id))) == 0
    world.assert_complete_events(run_id)


@here
def test_a_cancelled_run_cancels_its_reply_at_the_provider(on_this_host: World) -> None:
    """Otherwise it would be generated, and paid for, to its end."""
    world, run_id = on_this_host, "background-cancelled"
    since = len(world.model.log)
    with paused_response(world, run_id):
        world.client.handle(run_id).cancel()
        wait_for(lambda: model_log(world, "cancelled", since), "the provider is told")

    world.assert_complete_events(run_id, "run.cancelled")
    assert len(model_log(world, "received", since)) == 1


@pytest.mark.long
def test_workers_whose_connections_are_cut_again_and_again_keep_their_runs(elsewhere: World) -> None:
    """`CLIENT KILL TYPE pubsub` during execution: no lease ends, no run is recovered."""
    world = elsewhere
    world.grow_to(2)
    wait_watched(world)
    before = set(world.incarnations())
    run_ids = [f"cut-{number}" for number in range(10)]
    for run_id in run_ids:
        world.submit(run_id, [("step", {"n": n, "ms": 200}) for n in range(15)])

    cuts = 0
    while any(not world.record(run_id).state.is_terminal for run_id in run_ids):
        world.client.store.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        cuts += 1
        if cuts % 3 == 0:  # else it is cut again during the reconnect
            wait_for(lambda: listeners(world) == len(before), "all are subscribed again")

    assert cuts > 5
    assert set(world.incarnations()) == before
    assert ages_ms(world, run_ids) == []
    gone = world.client.store.redis.keys("oa:gone:*")
    assert [key for key in gone if key.removeprefix("oa:gone:") in before] == []


def test_a_worker_on_another_host_takes_over_soon_unless_it_was_only_stopped(elsewhere: World) -> None:
    """Without a view of the processes: the victim's connection is closed, and SIGSTOP closes none."""
    elsewhere.grow_to(3)
    wait_watched(elsewhere)
    stop_one_and_kill_another(elsewhere, "elsewhere")


@pytest.mark.long
def test_a_death_that_was_a_false_alarm_is_not_counted_for_its_runs(elsewhere: World) -> None:
    """The worker was stopped and its connection was cut meanwhile, so it could not reconnect in time."""
    world = elsewhere
    world.grow_to(2)
    wait_watched(world)
    with busy(world, "false", 1) as owners:
        paused = owners["false-0"]
        paused.signal(signal.SIGSTOP)
        world.client.store.redis.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        wait_for(lambda: world.record("false-0").recoveries == 1, "the run was reclaimed")
        wait_for(lambda: world.owner("false-0") is not paused, "another worker executes it")

        paused.signal(signal.SIGCONT)

        wait_for(lambda: world.record("false-0").recoveries == 0, "the death was removed")
    world.wait("false-0")
    [alarm] = [
        event for event in world.assert_complete_events("false-0") if event.name == "worker.false_alarm"
    ]
    assert str(alarm.payload["alive"]).startswith(f"{paused.name}@")


def wait_watched(world: World) -> None:
    """Wait until all workers have renewed over a connection that Redis can check."""
    store = world.client.store
    wait_for(
        lambda: set(store.redis.hkeys(store.keys("watched"))) >= set(world.incarnations()),
        "all leases are renewed",
    )


def listeners(world: World) -> int:
    keys = world.client.store.keys
    channels = [keys.alive(incarnation) for incarnation in world.incarnations()]
    return sum(count for _, count in world.client.store.redis.pubsub_numsub(*channels))


@pytest.mark.long
@here
def test_the_parent_of_a_pool_of_processes_ends_the_lease_of_a_child_it_reaps(tmp_path: Path) -> None:
    """prefork: the child is killed, and its run continues in another one."""
    with (
        EmbeddedRedis() as redis,
        open_shop(
            tmp_path,
            redis.url,
            "--pool",
            "processes",
            "-c",
            "1",
            agents=[agent("slow", {"text": "done", "latency_ms": 1_000})],
            env={"OPENAGENTS_LEASE_MS": str(LEASE_MS)},
        ) as shop,
    ):
        handle = shop.client.submit({"agent_id": "slow", "session_id": "s1", "input_text": "hi"})
        child = wait_for(lambda: _owner_pid(shop, handle.id), "a child executes the run", PATIENCE_S)

        os.kill(child, signal.SIGKILL)

        assert handle.wait(PATIENCE_S).final_output == "done"
        assert "run.recovered" in [event.name for event in handle.events()]
        lines = [line for line in shop.log.splitlines() if "worker.process_dead" in line]
        assert len(lines) == 1
        assert "celery.prefork" in lines[0]  # the parent, which forks a new child after that


def _owner_pid(shop: Shop, run_id: str) -> int:
    """The id of the process that has claimed the run; 0 if none has."""
    record = shop.client.record(run_id)
    own = this_process()
    assert own is not None
    process = shop.redis.hget(shop.client.store.keys("host", own.host), str(record.worker))
    return int(str(process).split()[0]) if process else 0
