"""Parked runs outlive everything: every process, the restart of Redis, and the end of every TTL."""

from __future__ import annotations

from pathlib import Path

import pytest

from openagents_worker.local.child_process import free_port
from openagents_worker.local.redis_server import EmbeddedRedis
from openagents_worker.models import RunState
from tests.support.deployment import PATIENCE_S, agent, call, installed
from tests.support.waiting import wait_for

TOOLS = {name: f"tests.fundamentals.shop.{name}" for name in ("ask_the_customer", "wait_for_the_bank")}


@pytest.mark.long
def test_a_parked_run_outlives_a_restart_of_everything_and_the_end_of_every_ttl(tmp_path: Path) -> None:
    """Runs are kept for a second after their end. Two runs wait for longer: for a value, and for a time."""
    with (
        EmbeddedRedis(tmp_path / "redis", port=free_port()) as redis,
        installed(
            tmp_path,
            agent("clerk", tools=TOOLS),
            redis_url=redis.url,
            OPENAGENTS_RUN_TTL_S="1",
            OPENAGENTS_SESSION_TTL_S="1",
        ) as shop,
    ):
        shop.model.will_say({"tool_calls": [call("ask_the_customer", question="Which?")]}, {"text": "That."})
        asking = shop.submit("clerk")
        wait_for(lambda: asking.record().state is RunState.WAITING, "it waits for a value")
        shop.model.will_say({"tool_calls": [call("wait_for_the_bank", hours=4 / 3600)]}, {"text": "Paid."})
        sleeping = shop.submit("clerk")
        wait_for(lambda: sleeping.record().state is RunState.WAITING, "it waits for a time")
        due_ms = sleeping.record().due_ms
        assert due_ms is not None

        shop.worker.kill()
        redis.stop()
        redis.start()

        def is_due() -> bool:
            seconds, _ = shop.client.store.ask(lambda r: r.time())
            return bool(seconds * 1000 > due_ms)

        wait_for(is_due, "a run has been parked for longer than the TTL", PATIENCE_S)
        assert (asking.record().state, sleeping.record().state) == (RunState.WAITING, RunState.WAITING)
        shop.stack.start_worker("successor")

        assert sleeping.wait(PATIENCE_S).final_output == "Paid."
        shop.model.will_say({"text": "unused"}, {"text": "That."})
        asking.send("answer", "this one")
        assert asking.wait(PATIENCE_S).final_output == "That."
