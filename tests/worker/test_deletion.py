"""Deletion of a session that a real worker uses: the run's call is cancelled, and no key is written again."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from openagents_worker.errors import SessionBusy
from openagents_worker.store.keys import spec_of
from tests.support.deployment import PATIENCE_S, Installation, agent, installed
from tests.support.waiting import wait_for


@pytest.fixture
def installation(tmp_path: Path) -> Generator[Installation]:
    with installed(tmp_path, agent("clerk"), OPENAGENTS_LEASE_MS="1000") as installation:
        yield installation


def test_a_session_is_deleted_while_a_worker_uses_it(installation: Installation) -> None:
    """The worker executes other runs, and writes nothing more for the deleted run."""
    installation.model.will_say({"error": "hang"}, {"text": "fine"})
    client = installation.client
    busy = installation.submit("clerk", session_id="gone", run_id="gone-1")
    waiting = installation.submit("clerk", session_id="gone", run_id="gone-2")
    wait_for(lambda: installation.model.asked("gone-1"), "the model is asked")
    assert (busy.record().state, waiting.record().state) == ("running", "waiting_session")

    with pytest.raises(SessionBusy):
        client.delete_session("gone")
    assert client.delete_session("gone", force=True) == 2

    installation.model.will_say({"text": "fine"})
    assert installation.submit("clerk").wait(PATIENCE_S).final_output == "fine"
    wait_for_heartbeats_and_rescue(installation)
    keys = client.store.redis.scan_iter("oa:*")
    ids = {known[1] for key in keys if (known := spec_of(key, "oa"))}
    assert not {id_ for id_ in ids if "gone" in id_}
    assert not installation.model.asked("gone-2")


def wait_for_heartbeats_and_rescue(installation: Installation) -> None:
    """Wait for three heartbeats of the worker, and for its rescue loop: a delayed run starts only through
    it."""
    store = installation.client.store
    leases = store.keys("workers")
    for _ in range(3):
        seen = store.redis.zrange(leases, 0, -1, withscores=True)
        wait_for(
            lambda seen=seen: store.redis.zrange(leases, 0, -1, withscores=True) != seen,
            "the lease is renewed",
        )
    late = {"agent_id": "clerk", "session_id": "late", "input_text": "Go."}
    assert installation.client.submit(late, delay_ms=1).wait(PATIENCE_S).final_output == "fine"
