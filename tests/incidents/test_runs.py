"""Incidents of runs: tools, providers, decisions, budgets, and runs that kill their workers."""

from __future__ import annotations

import json
import uuid
from collections.abc import Generator
from contextlib import suppress

import pytest

from openagents_worker.errors import OpenAgentsError
from openagents_worker.models import RunState, WaitKind
from openagents_worker.producer.handle import RunHandle
from tests.incidents.files import CRASHES, KILLS, MENDED, PRICES
from tests.incidents.scene import Scene, Site, site_in
from tests.support.deployment import PATIENCE_S, call
from tests.support.waiting import wait_for

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Generator[Site]:
    with site_in(tmp_path_factory.mktemp("runs"), OPENAGENTS_MAX_RECOVERIES="2") as site:
        yield site


def in_state(handle: RunHandle[object], state: RunState) -> None:
    wait_for(lambda: handle.record().state is state, f"the run is {state}")


def parked(scene: Scene, state: RunState, **fields: object) -> RunHandle[object]:
    """A run of the clerk that waits. It is the RUN of the row, and its call is the CALL."""
    handle = scene.site.shop.submit("clerk", **fields)
    in_state(handle, state)
    scene.ids |= {"RUN": handle.id, "CALL": handle.record().waiting[0].call_id}
    return handle


def test_a_tool_that_raises(site: Site) -> None:
    with site.scene("Runs of an agent fail after a change of a tool") as scene:
        handle = site.shop.submit("pricing", "A17")
        scene.ids["RUN"] = handle.id
        assert not handle.wait(PATIENCE_S).ok
        scene.sees()
        (site.shop.folder / PRICES).write_text(json.dumps({"A17": 120}))
        scene.does("openagents-worker resume RUN")

        wait_for(lambda: handle.record().state is RunState.COMPLETED, "it goes on")
        assert handle.record().result.final_output == "120 cents"  # type: ignore[union-attr]


def test_a_tool_that_hangs(site: Site) -> None:
    site.shop.model.will_say({"tool_calls": [call("hang")]})
    with site.scene("A run stays `running` and does not go on") as scene:
        handle = site.shop.submit("clerk")
        scene.ids["RUN"] = handle.id
        scene.sees()
        scene.does("openagents-worker cancel RUN")

        assert handle.wait(PATIENCE_S).stop_reason == "cancelled"


def test_a_provider_that_limits_the_rate(site: Site) -> None:
    """The provider asks for a pause of some seconds. Nobody does anything."""
    site.shop.model.will_say({"error": "rate_limit", "retry_after_ms": 6_000}, {"text": "at last"})
    with site.scene("Many runs are `retrying`") as scene:
        handle = site.shop.submit("clerk")
        scene.ids["RUN"] = handle.id
        in_state(handle, RunState.RETRYING)
        assert handle.id in scene.sees()

        assert handle.wait(PATIENCE_S).final_output == "at last"


def test_a_provider_that_rejects_the_key(site: Site) -> None:
    site.shop.model.will_say({"error": "response", "status": 401, "times": 99}, {"text": "never"})
    with site.scene("All runs of a model fail at once") as scene:
        handles = [site.shop.submit("clerk") for _ in range(2)]
        assert not any(handle.wait(PATIENCE_S).ok for handle in handles)
        scene.ids["RUN"] = handles[0].id
        scene.sees()
        site.shop.model.will_say({"text": "welcome"})
        scene.does("openagents-worker resume --state failed --code llm.auth --yes")

        for handle in handles:
            in_state(handle, RunState.COMPLETED)


def test_an_approval_that_waits(site: Site) -> None:
    site.shop.model.will_say({"tool_calls": [call("refund", cents=120)]}, {"text": "done"})
    with site.scene("A run waits, and nobody knows for what") as scene:
        approved = parked(scene, RunState.AWAITING_APPROVAL)
        assert approved.id in scene.sees()
        scene.does("openagents-worker approve RUN CALL")
        denied = parked(scene, RunState.AWAITING_APPROVAL)
        scene.does("openagents-worker deny RUN CALL")

        assert [handle.wait(PATIENCE_S).final_output for handle in (approved, denied)] == ["done"] * 2
        names = {event.name for event in denied.events()}
        assert "tool.denied" in names


def test_a_used_up_budget(site: Site) -> None:
    both = [call("count", number=number) for number in (0, 1)]
    site.shop.model.will_say({"tool_calls": both}, {"text": "done"})
    budget = {"max_tool_calls": 1, "on_breach": "pause"}
    with site.scene("A run stops in the middle, `paused`") as scene:
        extended = parked(scene, RunState.PAUSED, budget=budget)
        scene.sees()
        scene.does("openagents-worker extend RUN max_tool_calls=9")
        cancelled = parked(scene, RunState.PAUSED, budget=budget)
        scene.does("openagents-worker cancel RUN")

        assert extended.wait(PATIENCE_S).final_output == "done"
        assert cancelled.wait(PATIENCE_S).stop_reason == "cancelled"


def test_an_unknown_outcome(site: Site) -> None:
    """The worker dies in the middle of a call that must not be repeated unasked."""
    site.shop.model.will_say({"tool_calls": [call("charge")]}, {"text": "done"})
    with site.scene("A run is `paused` after a worker died") as scene:
        for step in ("skip", "rerun"):
            (site.shop.folder / KILLS).touch()
            handle = site.shop.submit("clerk")
            wait_for(lambda: not (site.shop.folder / KILLS).exists(), "the tool kills its worker")
            wait_for(
                lambda: all(worker.exit_code is not None for worker in site.shop.stack.workers),
                "the worker has died",
            )
            site.ensure_worker()
            in_state(handle, RunState.PAUSED)
            [waiting] = handle.record().waiting
            assert waiting.kind is WaitKind.OUTCOME
            scene.ids |= {"RUN": handle.id, "CALL": waiting.call_id}
            scene.sees()
            scene.does(f"openagents-worker resolve RUN CALL {step}")

            assert handle.wait(PATIENCE_S).final_output == "done"


def test_a_run_that_kills_its_workers(site: Site) -> None:
    """A supervisor starts a new worker each time. A run beside it completes."""
    # Suspects are executed one by one, so the run beside it may have to end first.
    crashed: list[bool] = []
    with site.scene("Workers die again and again") as scene:
        site.shop.model.will_say({"tool_calls": [call("crash")]}, {"text": "done"})
        (site.shop.folder / CRASHES).write_text(run_id := uuid.uuid4().hex)
        bad = site.shop.submit("clerk", run_id=run_id)
        site.shop.model.may_answer = lambda run_id: run_id == bad.id or crashed
        beside = site.shop.submit("clerk")
        scene.ids["RUN"] = bad.id

        def has_failed() -> bool:
            with suppress(OpenAgentsError):  # it may die before its start is noticed
                site.ensure_worker()
            record = bad.record()
            crashed.extend([True] * record.recoveries)
            return record.state is RunState.FAILED

        wait_for(has_failed, "the run is given up")
        scene.sees()
        (site.shop.folder / MENDED).touch()
        site.ensure_worker()
        scene.does("openagents-worker resume RUN")

        in_state(bad, RunState.COMPLETED)
        completed = beside.wait(PATIENCE_S)
        assert completed.final_output == "done", completed.error_details
        site.shop.model.may_answer = lambda _: True
