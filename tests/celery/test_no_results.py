"""Without a result backend: everything except chords works in the same way."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import chain, chord, group

from tests.celery.shop import PATIENCE_S, open_shop
from tests.support.waiting import wait_for


def test_links_chains_and_groups_need_no_result_backend(tmp_path: Path) -> None:
    """The record of a run is its result; links are stored in messages."""
    with open_shop(tmp_path, results=False) as shop:
        run = shop.run_agent
        linked = run.apply_async((shop.request("retry ok"),), link=shop.note("link"))
        chain(run.s(shop.request("ok")), shop.note("chain")).apply_async()
        results = group(run.s(shop.request("ok")), run.s(shop.request("retry ok"))).apply_async()
        with pytest.raises(
            NotImplementedError, match="result backend"
        ):  # the app is not ours: the text is Celery's
            chord([run.s(shop.request("ok"))])(shop.note("chord"))

        outputs = [result["final_output"] for result in results.get(timeout=PATIENCE_S)]
        wait_for(lambda: shop.notes("chain"), "the chain continues", timeout=PATIENCE_S)
        wait_for(lambda: shop.notes("link"), "the link is called", timeout=PATIENCE_S)

        assert outputs == ["done", "done"]
        assert shop.notes("link") == [{"run_id": linked.id, "stop_reason": "completed"}]
