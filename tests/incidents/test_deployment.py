"""Incidents of the deployment: Redis, queues, workers, the agents file and clocks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import redis

from openagents_worker.errors import RedisUnreachable, RunNotFound
from openagents_worker.models import RunState
from tests.incidents.scene import STOP_S, Site, site_in
from tests.support.deployment import PATIENCE_S, agent, call
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Generator[Site]:
    with site_in(tmp_path_factory.mktemp("deployment")) as site:
        yield site


def test_redis_is_away(site: Site) -> None:
    """A run that was accepted before continues afterwards."""
    released: list[bool] = []
    site.shop.model.will_say({"text": "done"})
    site.shop.model.may_answer = lambda _: released
    with site.scene("Producers get `redis.unreachable`; nothing answers at the address of Redis") as scene:
        handle = site.shop.submit("clerk")
        wait_for(lambda: site.shop.model.asked(handle.id), "the run works")
        site.redis.stop()
        try:
            with pytest.raises(RedisUnreachable) as refused:
                site.shop.submit("clerk")
            scene.sees(str(refused.value))
            assert scene.codes["openagents-worker doctor"] == 4
        finally:
            site.redis.start()
            released.append(True)

        assert handle.wait(PATIENCE_S).final_output == "done"
        assert site.shop.submit("clerk").wait(PATIENCE_S).final_output == "done"
        site.shop.model.may_answer = lambda _: True


def test_redis_is_full(site: Site) -> None:
    """Nothing is half written, and nothing is evicted."""
    site.shop.model.will_say({"text": "done"})
    with (
        site.scene("Producers get `redis.unreachable`; Redis answers") as scene,
        redis.Redis.from_url(site.redis.url) as admin,
    ):
        old = site.shop.submit("clerk", session_id="old")
        old.wait(PATIENCE_S)
        admin.config_set("maxmemory", int(admin.info("memory")["used_memory"]) // 2)
        try:
            with pytest.raises(RedisUnreachable) as refused:
                site.shop.submit("clerk")
            scene.sees(str(refused.value))
            scene.ids["SESSION"] = "old"
            scene.does("openagents-worker delete-session SESSION")
        finally:
            admin.config_set("maxmemory", 0)

        assert site.shop.submit("clerk").wait(PATIENCE_S).final_output == "done"


def test_redis_cannot_write_to_its_disk(site: Site) -> None:
    """As with a full disk: its snapshots fail, so it refuses writes."""
    released: list[bool] = []
    site.shop.model.will_say({"text": "done"})
    site.shop.model.may_answer = lambda _: released
    with (
        site.scene("Producers get `redis.unreachable`; Redis cannot write to its disk") as scene,
        redis.Redis.from_url(site.redis.url, decode_responses=True) as admin,
    ):
        handle = site.shop.submit("clerk")
        wait_for(lambda: site.shop.model.asked(handle.id), "the run works")
        snapshot = Path(admin.config_get("dir")["dir"]) / "dump.rdb"
        snapshot.unlink(missing_ok=True)
        snapshot.mkdir()
        admin.config_set("stop-writes-on-bgsave-error", "yes")
        admin.config_set("save", "3600 1000000")
        try:
            admin.bgsave()
            wait_for(lambda: snapshot_status(admin) == "err", "the snapshot has failed")
            with pytest.raises(RedisUnreachable) as refused:
                site.shop.submit("clerk")
            scene.sees(str(refused.value))
        finally:
            snapshot.rmdir()
            admin.bgsave()
            wait_for(lambda: snapshot_status(admin) == "ok", "the snapshot is written")
            released.append(True)

        assert handle.wait(PATIENCE_S).final_output == "done"
        site.shop.model.may_answer = lambda _: True


def snapshot_status(admin: redis.Redis) -> str:
    told = admin.info("persistence")
    return "" if told["rdb_bgsave_in_progress"] else str(told["rdb_last_bgsave_status"])


def test_redis_has_lost_its_data(site: Site) -> None:
    """The worker continues. A run of before is unknown, and is submitted again."""
    site.shop.model.will_say({"text": "done"})
    with (
        site.scene("Runs that were accepted are gone (`run.not_found`)") as scene,
        redis.Redis.from_url(site.redis.url) as admin,
    ):
        lost = site.shop.submit("clerk")
        lost.wait(PATIENCE_S)
        admin.flushall()

        with pytest.raises(RunNotFound):
            lost.record()
        scene.sees()
        assert site.shop.submit("clerk").wait(PATIENCE_S).final_output == "done"


def test_the_last_worker_has_died(site: Site) -> None:
    """A new one continues its runs. No finished call is made again."""
    released: list[bool] = []
    site.shop.model.will_say({"tool_calls": [call("count", number=1)]}, {"text": "done"})
    site.shop.model.may_answer = lambda run_id: len(site.shop.model.asked(run_id)) < 2 or released
    with site.scene("All runs stay in their state after a crash or a deployment") as scene:
        handle = site.shop.submit("clerk")
        wait_for(lambda: len(site.shop.model.asked(handle.id)) == 2, "its first tool is recorded")
        for worker in site.shop.stack.workers:
            worker.kill()
        scene.sees()
        scene.starts("openagents-worker worker")
        released.append(True)

        assert handle.wait(PATIENCE_S).final_output == "done"
        assert [line["what"] for line in site.shop.diary(handle.id)] == ["begin", "end"]
        site.shop.model.may_answer = lambda _: True


def test_a_queue_without_a_worker(site: Site) -> None:
    site.shop.model.will_say({"text": "reported"})
    with site.scene("A run stays `queued`, others work") as scene:
        handle = site.shop.submit("reports")
        assert site.shop.submit("clerk").wait(PATIENCE_S).ok
        scene.ids["RUN"] = handle.id
        scene.sees()
        assert handle.record().state is RunState.QUEUED
        scene.starts("openagents-worker worker --queues reports")

        assert handle.wait(PATIENCE_S).final_output == "reported"


def test_a_backlog(site: Site) -> None:
    """The only worker of the queue is busy with one run."""
    released: list[bool] = []
    site.shop.model.will_say({"text": "done"})
    with site.scene("Runs begin late") as scene:
        scene.start_worker("--queues", "slow", "--concurrency", "1")
        first = site.shop.submit("slow")
        site.shop.model.may_answer = lambda run_id: run_id != first.id or released
        try:
            wait_for(lambda: site.shop.model.asked(first.id), "the first run works")
            others = [site.shop.submit("slow") for _ in range(2)]
            scene.sees()
            scene.starts("openagents-worker worker --queues slow")

            assert [other.wait(PATIENCE_S).final_output for other in others] == ["done"] * 2
            assert not first.record().state.is_terminal
        finally:
            released.append(True)
        assert first.wait(PATIENCE_S).ok
        site.shop.model.may_answer = lambda _: True


def test_a_blocked_event_loop(site: Site) -> None:
    """As a function that is not async, the same tool blocks nothing."""
    with site.scene("All runs of one worker are slow") as scene:
        site.shop.model.will_say({"tool_calls": [call("block")]}, {"text": "done"})
        blocking = site.shop.submit("clerk")
        blocking.wait(PATIENCE_S)
        scene.sees()
        site.shop.model.will_say({"tool_calls": [call("wait_in_thread")]}, {"text": "done"})
        mended = site.shop.submit("clerk")
        mended.wait(PATIENCE_S)

        blocked = [line for line in scene.log.splitlines() if "loop.blocked" in line]
        assert any(blocking.id in line for line in blocked)
        assert not any(mended.id in line for line in blocked)


def test_a_mistake_in_the_agents_file(site: Site, tmp_path: Path) -> None:
    """The worker serves its other agents. The runs wait for a worker with a correct file."""
    file = tmp_path / "agents.json"

    def write(type_: str) -> None:
        agents = [agent("clerk", tools={"calc": {"type": type_}}), agent("other")]
        file.write_text(json.dumps({"version": "1.0", "agents": agents}))

    site.shop.model.will_say({"text": "done"})
    with site.scene("Runs of one agent do not begin after a change of the agents file") as scene:
        for old in site.shop.stack.workers:
            old.kill()
        write("calk")
        worker = scene.start_worker(OPENAGENTS_CONFIG=str(file))
        handle = site.shop.submit("clerk")
        assert site.shop.submit("other").wait(PATIENCE_S).ok
        scene.sees(OPENAGENTS_CONFIG=str(file))
        assert scene.codes["openagents-worker validate"] == 2
        write("calc")
        assert "valid" in scene.does("openagents-worker validate", OPENAGENTS_CONFIG=str(file))
        worker.stop(STOP_S)
        scene.starts("openagents-worker worker", OPENAGENTS_CONFIG=str(file))

        assert handle.wait(PATIENCE_S).final_output == "done"


def test_a_worker_that_cannot_read_its_agents_file_ends(site: Site, tmp_path: Path) -> None:
    """The same row."""
    file = tmp_path / "agents.json"
    file.write_text("{")
    command = [sys.executable, "-m", "openagents_worker.cli", "worker"]
    env = {**site.shop.stack._env, "OPENAGENTS_CONFIG": str(file)}

    assert subprocess.run(command, env=env, capture_output=True, timeout=PATIENCE_S).returncode == 2


def test_clocks_that_differ(site: Site) -> None:
    """The clock of the machine on which `doctor` is executed is 90 s ahead."""
    with site.scene("Delayed runs start at the wrong time; times in logs do not fit together") as scene:
        shown = scene.sees(ahead_s=90)

        assert "90.0 s behind that of this machine" in shown
        assert "the clock of Redis" not in scene.execute("openagents-worker doctor").stdout
