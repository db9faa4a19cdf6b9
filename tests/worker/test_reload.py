"""Reload of the agents file: runs that are under way keep the definition that they began with.

Redis, the workers and the model's server are real. The file is edited while the model thinks about the second
turn of a run; what a later worker asks the model shows with which definition it goes on.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from openagents_worker.local.child_process import ChildProcess
from openagents_worker.producer.handle import RunHandle
from tests.support.deployment import Installation, agent, call, installed, story
from tests.support.waiting import PATIENCE_S, wait_for

pytestmark = pytest.mark.long

KEY = "a secret that all workers share, of the test"
SCRIPT = ({"tool_calls": [call("calc", expression="6*7")]}, {"text": "42"})


def clerk(version: str, *tools: str, **fields: Any) -> dict[str, Any]:
    """The agent in one version of the file."""
    return agent(
        "clerk",
        tools={tool: {"type": tool} for tool in tools},
        pattern={"type": "react", "config": {"system_prompt": f"{version} prompt"}},
        llm={"model": f"{version}-model"},
        **fields,
    )


OLD = clerk("old", "calc", "current_time", limits={"max_steps": 9})
NEW = clerk("new", "calc", limits={"max_steps": 1})
"""Another prompt and model, lower limits, and a tool less."""


@pytest.fixture
def lines() -> list[str]:
    """What the workers print."""
    return []


@pytest.fixture
def may_go_on() -> threading.Event:
    """Until it is set, the model does not answer the second turn."""
    return threading.Event()


@pytest.fixture
def place(
    tmp_path: Path, lines: list[str], may_go_on: threading.Event, request: pytest.FixtureRequest
) -> Generator[Installation]:
    """A deployment with the old file, with a key unless the test is about one without."""
    key = getattr(request, "param", KEY)

    def say(_: str, line: str) -> None:
        lines.append(line)

    with installed(tmp_path, OLD, say=say, OPENAGENTS_DEFINITIONS_KEY=key) as installation:
        model = installation.model
        model.will_say(*SCRIPT)
        model.may_answer = lambda run_id: len(model.asked(run_id)) < 2 or may_go_on.is_set()
        yield installation
        may_go_on.set()


def begun(place: Installation) -> RunHandle[Any]:
    """A run whose first step is done, and whose second model call is under way."""
    handle = place.submit("clerk")
    wait_for(lambda: len(place.model.asked(handle.id)) == 2, "the model is asked for the second turn")
    return handle


def write(place: Installation, definition: dict[str, Any]) -> None:
    (place.folder / "agents.json").write_text(json.dumps({"version": "1.0", "agents": [definition]}))


def asked(place: Installation, run_id: str, at: int) -> tuple[str, str, list[str]]:
    """Prompt, model and tools of a model request of a run."""
    request = place.model.asked(run_id)[at]
    return request["messages"][0]["content"], request["model"], sorted(request["tools"])


OF_OLD = ("old prompt", "old-model", ["calc", "current_time"])
OF_NEW = ("new prompt", "new-model", ["calc"])


def goes_on_with_the_old_definition(place: Installation, handle: RunHandle[Any]) -> None:
    """The run ends as it has begun, on a worker with the new file; a new run has the new definition."""
    result = handle.wait(PATIENCE_S)
    assert (result.stop_reason, result.final_output) == ("completed", "42"), result.error_details
    assert asked(place, handle.id, -1) == OF_OLD
    assert result.usage.tool_calls == 1
    story(handle)
    new = place.submit("clerk")
    ended = new.wait(PATIENCE_S)
    assert asked(place, new.id, 0) == OF_NEW
    assert ended.stop_reason != "completed", "the new definition allows one step"


def stopped(worker: ChildProcess) -> None:
    worker.stop(PATIENCE_S)


def killed(worker: ChildProcess) -> None:
    worker.kill()


@pytest.mark.share(of=2)
@pytest.mark.parametrize("ends", [stopped, killed])
def test_a_run_keeps_its_definition_on_a_worker_with_a_new_file(
    place: Installation, may_go_on: threading.Event, lines: list[str], ends: Callable[[ChildProcess], None]
) -> None:
    """Prompt, model, limits and tools: after a hand-over, and after the death of the first worker."""
    handle = begun(place)
    write(place, NEW)
    place.stack.start_worker("second")
    ends(place.worker)
    wait_for(lambda: len(place.model.asked(handle.id)) == 3, "the second worker asks again")
    may_go_on.set()

    goes_on_with_the_old_definition(place, handle)
    assert any("run.definition_kept" in line for line in lines)


@pytest.mark.fresh_process("SIGHUP executes the command of the worker again")
def test_a_run_keeps_its_definition_when_its_worker_is_restarted_by_sighup(
    place: Installation, may_go_on: threading.Event, lines: list[str]
) -> None:
    """The worker hands its runs over, executes itself again and reads the new file, in the same process."""
    handle = begun(place)
    write(place, NEW)
    os.kill(place.worker.pid, signal.SIGHUP)
    wait_for(lambda: len(place.model.asked(handle.id)) == 3, "the worker asks again", timeout=PATIENCE_S)
    may_go_on.set()

    goes_on_with_the_old_definition(place, handle)
    assert place.worker.exit_code is None


@pytest.mark.parametrize("place", [""], indirect=True, ids=["no key"])
def test_without_a_key_a_run_goes_on_with_the_new_definition_if_a_tool_was_removed(
    place: Installation, lines: list[str]
) -> None:
    """Nothing is taken from Redis that the worker does not have itself; one line says what would help.

    The new definition contradicts the journal here, which holds a call of another model: the run says so.
    """
    handle = begun(place)
    write(place, clerk("new", "calc", limits={"max_steps": 9}))
    place.stack.start_worker("second")
    killed(place.worker)

    error = handle.wait(PATIENCE_S).error_details
    assert error is not None
    assert error.code == "run.definition_changed"
    [line] = [line for line in lines if "run.definition_not_kept" in line]
    assert "tool current_time" in line
    assert "OPENAGENTS_DEFINITIONS_KEY" in line
    assert handle.id in line


@pytest.mark.parametrize("place", [""], indirect=True, ids=["no key"])
def test_without_a_key_a_run_keeps_its_prompt_model_and_limits(
    place: Installation, may_go_on: threading.Event
) -> None:
    handle = begun(place)
    write(place, clerk("new", "calc", "current_time", "date_diff", limits={"max_steps": 1}))
    place.stack.start_worker("second")
    killed(place.worker)
    wait_for(lambda: len(place.model.asked(handle.id)) == 3, "the second worker asks again")
    may_go_on.set()

    assert handle.wait(PATIENCE_S).final_output == "42"
    assert asked(place, handle.id, -1) == OF_OLD
