"""Deleting a session that a real worker works in: the run's call is cut off, and nothing comes back."""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path

import pytest

from openagents_worker.errors import SessionBusy
from openagents_worker.store.keys import spec_of
from tests.installation import PATIENCE_S, Installation, agent, installed
from tests.waiting import wait_for


@pytest.fixture
def installation(tmp_path: Path) -> Generator[Installation]:
    with installed(tmp_path, agent("clerk"), OPENAGENTS_LEASE_MS="1000") as installation:
        yield installation


def test_a_session_is_deleted_under_a_worker_that_works_in_it(installation: Installation) -> None:
    """The worker goes on with others, and what it still believes of the run writes nothing."""
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
    time.sleep(1.5)  # heartbeats and the rescue come by
    keys = client.store.redis.scan_iter("oa:*")
    ids = {known[1] for key in keys if (known := spec_of(key, "oa"))}
    assert not {id_ for id_ in ids if "gone" in id_}
    assert not installation.model.asked("gone-2")
